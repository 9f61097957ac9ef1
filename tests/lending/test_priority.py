"""Priorities and the reserved share of a group; groups as bulkheads."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Literal

import pytest
from support import SURVIVES_INTERRUPTIONS, config, interruptions, kill_backends, pid_of, server, wait_for

import pgdbpool
from pgdbpool import Connection, Handler


@pytest.fixture
def start(known_cluster: Any) -> Iterator[Callable[..., None]]:
    def init(mode: str = "threaded", **changes: Any) -> None:
        group = {"connection_count": 1, **changes}
        Connection.init(config([server(known_cluster.primary)], mode, g=group, other={"connection_count": 1}))

    yield init
    Connection.reset()


def waiting() -> int:
    return Connection.status().groups["g"].waiting


def settled() -> tuple[int, int]:
    status = Connection.status().groups["g"]
    return status.in_use, status.waiting


class Blocks:
    """Blocks in threads of their own, which note the order in which they begin."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self.order: list[str] = []
        self._threads = threads

    def __call__(self, name: str, priority: Literal["high", "normal"], **options: Any) -> Future[int]:
        def block() -> int:
            with Handler("g", priority=priority, **options) as db:
                self.order.append(name)
                return pid_of(db)

        queued = waiting() + 1
        future = self._threads.submit(block)
        wait_for(lambda: waiting() == queued, what=f"{name} waits")
        return future


def test_high_goes_before_normal_and_each_in_the_order_they_came(start: Any) -> None:
    start()
    with ThreadPoolExecutor(6) as threads:
        block = Blocks(threads)
        with Handler("g"):
            for name, priority in (("n1", "normal"), ("h1", "high"), ("n2", "normal"), ("h2", "high")):
                block(name, priority)  # type: ignore[arg-type]
            last = block("n3", "normal")
        last.result(5)
    assert block.order == ["h1", "h2", "n1", "n2", "n3"]
    assert settled() == (0, 0)


@pytest.mark.parametrize("min_size", [0, 3])
def test_the_reserved_share_is_for_high_priority_alone(start: Any, mode: str, min_size: int) -> None:
    start(mode, connection_count=3, min_size=min_size, reserved=1)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(Handler("g"))
        with pytest.raises(pgdbpool.PoolTimeout, match="1 for high priority"), Handler("g", timeout=0.05):
            pass
        with Handler("g", priority="high") as db:
            assert db.query("SELECT 1").fetchone()[0] == 1
            with pytest.raises(pgdbpool.PoolTimeout), Handler("g", priority="high", timeout=0.05):
                pass
    with ExitStack() as stack:  # what high priority has, counts as well: the last one is always kept
        for priority in ("high", "normal"):
            stack.enter_context(Handler("g", priority=priority))
        with pytest.raises(pgdbpool.PoolTimeout), Handler("g", timeout=0.05):
            pass
    with Handler("g"), Handler("g"):
        pass


def test_a_lock_free_group_refuses_at_once_when_the_reserved_share_is_left(start: Any) -> None:
    start("lock-free", connection_count=2, reserved=1)
    with Handler("g"):
        with pytest.raises(pgdbpool.PoolExhausted, match="1 for high priority"):
            Handler("g").__enter__()
        with Handler("g", priority="high"):
            pass


def test_a_nested_block_that_only_the_reserved_share_could_serve_does_not_wait(start: Any) -> None:
    start(connection_count=2, reserved=1, timeout=30)
    began = time.monotonic()
    with Handler("g"), pytest.raises(pgdbpool.PoolExhausted):
        Handler("g").__enter__()
    assert time.monotonic() - began < 5


def test_a_normal_waiter_is_served_when_more_than_the_reserved_share_is_free(start: Any) -> None:
    start(connection_count=3, reserved=2, min_size=1)
    with ThreadPoolExecutor(4) as threads:
        block = Blocks(threads)
        with Handler("g", priority="high"):
            with Handler("g", priority="high") as db:
                last = block("n1", "normal")
                assert not block.order
            with pytest.raises(pgdbpool.PoolTimeout), Handler("g", timeout=0.05):
                pass  # two are free, which is the reserved share
            assert not block.order
        assert isinstance(last.result(5), int)
    assert db is not None
    assert settled() == (0, 0)


def test_a_normal_waiter_gets_the_slot_of_a_lost_connection_but_no_reserved_one(
    start: Any, known_cluster: Any
) -> None:
    start(connection_count=2, reserved=1, min_size=0)
    with known_cluster.primary.connect() as admin, ThreadPoolExecutor(2) as threads:
        block = Blocks(threads)
        with Handler("g", priority="high"):
            with Handler("g", priority="high") as db:
                future = block("n", "normal")
                kill_backends(admin, pid_of(db))
                with pytest.raises(pgdbpool.ConnectionLostError):
                    db.query("SELECT 1")
            with Handler("g", priority="high"):  # the slot that became free is the reserved one
                assert not block.order
        future.result(5)
    assert settled() == (0, 0)


def test_max_waiting_counts_both(start: Any) -> None:
    start(max_waiting=2)
    with ThreadPoolExecutor(3) as threads:
        block = Blocks(threads)
        with Handler("g"):
            block("n", "normal")
            last = block("h", "high")
            for priority in ("high", "normal"):
                with pytest.raises(pgdbpool.TooManyWaiting):
                    threads.submit(lambda p=priority: Handler("g", priority=p).__enter__()).result(5)
        last.result(5)


def test_close_raises_in_waiters_of_either_priority(start: Any) -> None:
    start()
    with ThreadPoolExecutor(2) as threads, Handler("g"):
        block = Blocks(threads)
        futures = [block("n", "normal", timeout=30), block("h", "high", timeout=30)]
        Connection.close(timeout=0.2)
        for future in futures:
            with pytest.raises(pgdbpool.NotInitializedError):
                future.result(5)


def test_a_wrong_priority_is_refused(start: Any) -> None:
    start()
    with pytest.raises(ValueError, match="'urgent' is neither 'high' nor 'normal'"):
        Handler("g", priority="urgent")  # type: ignore[arg-type]


@SURVIVES_INTERRUPTIONS
@pytest.mark.parametrize("priority", ["high", "normal"])
def test_interrupted_waits_lose_nothing_of_the_share(start: Any, priority: Any) -> None:
    """The main thread is interrupted again and again while others of both priorities come and go."""
    start(connection_count=3, reserved=1)

    stop = threading.Event()
    counts = {"high": 0, "normal": 0}

    def others(mine: Literal["high", "normal"]) -> None:
        while not stop.is_set():
            with Handler("g", timeout=20, priority=mine):
                counts[mine] += 1

    threads = [threading.Thread(target=others, args=(p,)) for p in ("high", "normal", "normal", "normal")]
    interrupted = 0

    def block() -> None:
        with Handler("g", timeout=20, priority=priority):
            pass

    try:
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 20
        with interruptions() as interrupt:
            while (interrupted < 60 or not min(counts.values())) and time.monotonic() < deadline:
                interrupted += interrupt(0.002, block)
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    print(f"interrupted {interrupted} times; blocks {counts}")
    assert min(counts.values()) > 0
    with Handler("g", timeout=5), Handler("g", timeout=5), Handler("g", timeout=5, priority="high") as db:
        assert db.query("SELECT 1").fetchone()[0] == 1
        with pytest.raises(pgdbpool.PoolTimeout):
            Handler("g", timeout=0.05, priority="high").__enter__()
    assert settled() == (0, 0)


@pytest.mark.slow
def test_one_saturated_group_does_not_slow_another(start: Any) -> None:
    start(connection_count=2, max_waiting=4, timeout=20)
    stop = threading.Event()
    refused = [0]

    def crowd() -> None:
        while not stop.is_set():
            try:
                with Handler("g") as db:
                    db.query("SELECT pg_sleep(0.2)")
            except pgdbpool.TooManyWaiting:
                refused[0] += 1
                stop.wait(0.01)

    threads = [threading.Thread(target=crowd) for _ in range(10)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: waiting() == 4 and refused[0])
        took = []
        for _ in range(100):
            began = time.monotonic()
            with Handler("other", timeout=5) as db:
                assert db.query("SELECT 1").fetchone()[0] == 1
            took.append(time.monotonic() - began)
        status = Connection.status().groups
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    half = statistics.median(took)
    print(f"100 blocks beside a full group: {half * 1000:.1f} ms, {max(took) * 1000:.1f} ms the longest")
    assert half < 0.2  # a turn in the full group is that and more; one alone may meet a stall of the machine
    assert status["other"].timeouts == 0
    assert status["g"].in_use == 2

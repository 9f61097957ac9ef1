"""Threads that wait for a connection: fair, bounded, never forgotten."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support import config, evenness, interruptions, kill_backends, pid_of, server, wait_for

import pgdbpool
from pgdbpool import Connection, Handler


@pytest.fixture
def start(known_cluster: Any) -> Iterator[Callable[..., None]]:
    def init(entry: dict[str, Any] | None = None, mode: str = "threaded", **changes: Any) -> None:
        node = server(known_cluster.primary, **(entry or {}))
        Connection.init(config([node], mode, g={"connection_count": 1, **changes}))

    yield init
    Connection.reset()


def waiting() -> int:
    return Connection.status().groups["g"].waiting


def test_a_waiter_gets_the_connection_that_comes_back(start: Any) -> None:
    start()
    with ThreadPoolExecutor(1) as threads:
        with Handler("g") as db:
            pid = pid_of(db)

            def other() -> int:
                with Handler("g") as mine:
                    return pid_of(mine)

            future = threads.submit(other)
            wait_for(lambda: waiting() == 1)
        assert future.result(5) == pid


def test_waiters_are_served_in_the_order_they_came(start: Any) -> None:
    start()
    order: list[int] = []

    def block(i: int) -> None:
        with Handler("g"):
            order.append(i)

    with ThreadPoolExecutor(8) as threads:
        with Handler("g"):
            futures = []
            for i in range(8):
                futures.append(threads.submit(block, i))
                wait_for(lambda i=i: waiting() == i + 1)
        for future in futures:
            future.result(5)
    assert order == list(range(8))


def test_a_timeout_names_the_holders_of_the_connections(start: Any) -> None:
    start(timeout=0.1)
    ready, done = threading.Event(), threading.Event()

    def holder() -> None:
        with Handler("g"):
            ready.set()
            done.wait(10)

    thread = threading.Thread(target=holder, name="the-holder")
    thread.start()
    try:
        assert ready.wait(5)
        for timeout in (None, 0.05, 0):
            with pytest.raises(pgdbpool.PoolTimeout) as caught, Handler("g", timeout=timeout):
                pass
            assert "thread the-holder for" in str(caught.value)
            assert "in holder" in str(caught.value)
            assert caught.value.in_use == 1
        assert waiting() == 0  # those that gave up do not stay in the queue
        assert Connection.status().groups["g"].timeouts == 3
    finally:
        done.set()
        thread.join()


def test_max_waiting_refuses_one_more_at_once(start: Any) -> None:
    start(max_waiting=1)
    with ThreadPoolExecutor(2) as threads:
        with Handler("g"):
            first = threads.submit(lambda: Handler("g").__enter__().__exit__(None, None, None))
            wait_for(lambda: waiting() == 1)
            with pytest.raises(pgdbpool.TooManyWaiting):
                threads.submit(lambda: Handler("g").__enter__()).result(5)
        first.result(5)


def test_a_waiter_gets_the_slot_of_a_connection_that_was_lost(start: Any, known_cluster: Any) -> None:
    start()
    with known_cluster.primary.connect() as admin, ThreadPoolExecutor(1) as threads:
        with Handler("g") as db:

            def other() -> int:
                with Handler("g") as mine:
                    return int(mine.query("SELECT 1").fetchone()[0])

            future = threads.submit(other)
            wait_for(lambda: waiting() == 1)
            kill_backends(admin, pid_of(db))
            with pytest.raises(pgdbpool.ConnectionLostError):
                db.query("SELECT 1")
        assert future.result(5) == 1


def test_a_waiter_learns_at_once_that_no_server_is_left(
    start: Any, known_cluster: Any, proxy_to: Any
) -> None:
    proxy = proxy_to(known_cluster.primary)
    start({"port": proxy.port}, timeout=30)
    with ThreadPoolExecutor(1) as threads:
        with Handler("g") as db:
            future = threads.submit(lambda: Handler("g").__enter__())
            wait_for(lambda: waiting() == 1)
            proxy.stop()
            with pytest.raises(pgdbpool.ConnectionLostError):
                db.query("SELECT 1")
            began = time.monotonic()
        with pytest.raises(pgdbpool.DBOfflineError):
            future.result(20)
        assert time.monotonic() - began < 10


@pytest.mark.slow
def test_a_burst_connects_side_by_side(start: Any, known_cluster: Any, proxy_to: Any) -> None:
    proxy = proxy_to(known_cluster.primary)
    proxy.delay = 0.2
    start({"port": proxy.port}, connection_count=9, min_size=1)
    barrier = threading.Barrier(8)

    def block() -> float:
        barrier.wait(10)
        began = time.monotonic()
        with Handler("g"):
            taken = time.monotonic() - began
            barrier.wait(20)  # all hold theirs at the same time
            return taken

    with ThreadPoolExecutor(8) as threads:
        taken = [future.result(30) for future in [threads.submit(block) for _ in range(8)]]
    one = max(taken)
    print(f"8 checkouts over connects through a slow network: {min(taken):.2f} .. {one:.2f} s")
    assert one < 8 * 0.8 / 2  # one after another would take 8 connects of 0.8 s at least


@pytest.mark.slow
def test_threads_share_fairly(start: Any) -> None:
    start(connection_count=2)
    blocks = [0] * 6
    stop = threading.Event()
    all_there = threading.Barrier(7)

    def run(i: int) -> None:
        all_there.wait(30)
        while not stop.is_set():
            with Handler("g") as db:
                db.query("SELECT pg_sleep(0.002)").fetchall()  # longer than a thread takes to wake up
            blocks[i] += 1

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    all_there.wait(30)
    try:
        even = evenness(blocks, of=200)
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    print("blocks by thread:", blocks)
    status = Connection.status().groups["g"]
    assert (status.in_use, status.idle, status.waiting) == (0, 2, 0)
    assert even > 0.5


@pytest.mark.slow
def test_no_waiter_is_left_beside_an_idle_connection(start: Any) -> None:
    """Connections go in and out without the lock, and threads may change over at any step."""
    start(connection_count=2, timeout=20)
    before, blocks = sys.getswitchinterval(), [0] * 6
    longest = [0.0] * len(blocks)
    deadline = time.monotonic() + 1.5

    def work(number: int) -> None:
        while (began := time.monotonic()) < deadline:
            with Handler("g"):
                longest[number] = max(longest[number], time.monotonic() - began)
                if blocks[number] % 50 == 0:
                    time.sleep(0.0001)  # so that the others queue
            blocks[number] += 1

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(blocks)) as threads:
            for future in [threads.submit(work, number) for number in range(len(blocks))]:
                future.result(30)
    finally:
        sys.setswitchinterval(before)
    group = Connection.status().groups["g"]
    assert (group.in_use, group.waiting, group.size) == (0, 0, group.idle)
    assert group.checkouts == sum(blocks)
    assert max(longest) < 5  # a waiter that was forgotten would have waited to its timeout


def test_an_interrupted_wait_loses_nothing(start: Any) -> None:
    """The main thread is interrupted again and again while others hand connections to it."""
    start()
    stop = threading.Event()

    def block() -> None:
        with Handler("g", timeout=20):
            pass

    def others() -> None:
        while not stop.is_set():
            block()

    threads = [threading.Thread(target=others) for _ in range(3)]
    interrupted = 0
    try:
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 3
        with interruptions() as interrupt:
            while interrupted < 60 and time.monotonic() < deadline:
                interrupted += interrupt(0.002, block)
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    print(f"interrupted {interrupted} times")
    with Handler("g", timeout=5) as db:
        assert db.query("SELECT 1").fetchone()[0] == 1
    status = Connection.status().groups["g"]
    assert (status.in_use, status.size, status.waiting) == (0, 1, 0)


def test_a_lock_free_group_used_by_two_threads_says_so(start: Any) -> None:
    start(mode="non-threaded", connection_count=3)
    with Handler("g") as outer, Handler("g") as inner, ThreadPoolExecutor(1) as threads:
        assert pid_of(outer) != pid_of(inner)
        with pytest.raises(pgdbpool.ThreadingModelError, match="type: threaded"):
            threads.submit(lambda: Handler("g").__enter__()).result(5)
    with ThreadPoolExecutor(1) as threads:  # one thread after another is fine
        assert threads.submit(lambda: Handler("g").__enter__().__exit__(None, None, None)).result(5) is None


def test_an_exhausted_lock_free_group_raises_at_once(start: Any) -> None:
    start(mode="lock-free")
    with Handler("g"):
        with pytest.raises(pgdbpool.PoolExhausted, match="waiting is in vain"):
            Handler("g").__enter__()


@pytest.mark.slow
def test_a_status_and_the_threads_that_take_connections_disturb_nothing(start: Any) -> None:
    start(connection_count=4, min_size=4)
    blocks = 0
    ends_at = time.monotonic() + 2
    ends = threading.Event()

    def work() -> int:
        done = 0
        while not ends.is_set():
            with Handler("g"):
                done += 1
        return done

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as threads:
            futures = [threads.submit(work) for _ in range(3)]
            try:
                while time.monotonic() < ends_at:
                    Connection.status()
            finally:
                ends.set()
            blocks = sum(future.result(30) for future in futures)
    finally:
        sys.setswitchinterval(before)
    assert blocks > 100
    assert Connection.status().groups["g"].discarded == {}

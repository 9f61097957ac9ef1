"""The rate limit of a group: a token bucket, exact over time, that interruptions take nothing from."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support import config, interruptions, server, wait_for

import pgdbpool
from pgdbpool import Connection, Handler, RateLimitExceeded
from pgdbpool._config.model import RateLimit
from pgdbpool._lending.rate_limit import RateLimiter


class Clock:
    """A clock that moves when it is told to, and when somebody waits by it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.late = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, turn: Any, seconds: float) -> None:
        self.now += seconds + self.late


def limiter(per_second: float, burst: int, max_wait: float = 0.0) -> tuple[RateLimiter, Clock]:
    clock = Clock()
    limit = RateLimit(per_second=per_second, burst=burst, max_wait=max_wait)
    return RateLimiter(limit, "g", lock_free=True, clock=clock, wait=clock.wait), clock


def granted(bucket: RateLimiter) -> bool:
    try:
        bucket.acquire()
    except RateLimitExceeded:
        return False
    return True


def test_a_burst_is_admitted_and_the_next_gets_a_retry_after() -> None:
    bucket, clock = limiter(per_second=4, burst=3)
    for _ in range(3):
        bucket.acquire()
    with pytest.raises(RateLimitExceeded, match=r"room in 0\.250 s") as caught:
        bucket.acquire()
    assert caught.value.retry_after == pytest.approx(0.25)
    assert caught.value.group == "g"
    clock.now += caught.value.retry_after
    bucket.acquire()
    assert not granted(bucket)


def test_no_more_than_the_burst_is_kept_of_a_quiet_time() -> None:
    bucket, clock = limiter(per_second=10, burst=3)
    clock.now += 3600
    assert [granted(bucket) for _ in range(5)] == [True, True, True, False, False]


@pytest.mark.parametrize("per_second", [0.5, 7, 1000])
def test_over_time_the_rate_is_exact(per_second: float) -> None:
    bucket, clock = limiter(per_second, burst=5)
    rng, began, count = random.Random(1), clock.now, 0
    for _ in range(20_000):
        clock.now += rng.random() / per_second
        count += granted(bucket)
    assert abs(count - 5 - (clock.now - began) * per_second) <= 1


def test_waiters_begin_at_their_time_even_if_threads_wake_late() -> None:
    bucket, clock = limiter(per_second=10, burst=1, max_wait=1)
    began = clock.now
    for late, count in ((0.0, 50), (0.03, 50)):
        clock.late = late
        for _ in range(count):
            bucket.acquire()
    # 0.03 s late each time, and still ten a second: a late thread loses nothing of what follows.
    assert clock.now - began == pytest.approx(9.9, abs=0.04)


@pytest.fixture
def start(known_cluster: Any) -> Iterator[Callable[..., None]]:
    def init(mode: str = "threaded", **limit: Any) -> None:
        group = {"connection_count": 4, "min_size": 1, "rate_limit": limit}
        Connection.init(config([server(known_cluster.primary)], mode, g=group))

    yield init
    Connection.reset()


def test_a_block_waits_for_its_turn_and_is_refused_when_that_is_too_far(start: Any, mode: str) -> None:
    start(mode, per_second=20, burst=2, max_wait=0.2)
    began = time.monotonic()
    for _ in range(4):
        with Handler("g") as db:
            assert db.query("SELECT 1").fetchone()[0] == 1
            db.query("SELECT 2")  # a block counts, not its statements
    assert time.monotonic() - began >= 0.099
    start(mode, per_second=0.01, burst=1, max_wait=5)
    with Handler("g"):
        pass
    began = time.monotonic()
    with pytest.raises(RateLimitExceeded) as caught, Handler("g"):
        pass
    assert time.monotonic() - began < 4  # it is known at once that five seconds are not enough
    assert 90 < caught.value.retry_after <= 100
    status = Connection.status().groups["g"]
    assert (status.in_use, status.waiting) == (0, 0)


@pytest.mark.slow
def test_threads_get_exactly_what_the_rate_allows_in_the_order_they_came(start: Any) -> None:
    start(per_second=20, burst=1, max_wait=30)
    limiter = Connection.group("g").limiter
    assert limiter is not None
    order: list[int] = []
    limiter.acquire()

    def block(i: int) -> None:
        with Handler("g"):
            order.append(i)

    began = time.monotonic()
    with ThreadPoolExecutor(20) as threads:
        futures = []
        for i in range(20):
            futures.append(threads.submit(block, i))
            wait_for(lambda i=i: len(limiter._queue) + len(order) > i)
        for future in futures:
            future.result(20)
    # The last one's turn is 20 turns after the first; which thread goes on first of those that the system
    # lets go on late is the system's. In no order at all this sum is 133.
    assert time.monotonic() - began >= 20 / 20 - 0.01
    assert sum(abs(place - i) for place, i in enumerate(order)) < 60


@pytest.mark.slow
def test_interrupted_waiters_take_no_token_and_leave_the_queue(start: Any) -> None:
    start(per_second=20, burst=1, max_wait=60)
    limiter = Connection.group("g").limiter
    assert limiter is not None

    stop, begun = threading.Event(), []

    def others() -> None:
        while not stop.is_set():
            with Handler("g", timeout=20):
                begun.append(time.monotonic())

    threads = [threading.Thread(target=others) for _ in range(3)]
    began, interrupted, mine = time.monotonic(), 0, 0

    def acquire() -> None:
        nonlocal mine
        limiter.acquire()
        mine += 1

    try:
        for thread in threads:
            thread.start()
        with interruptions() as interrupt:
            while time.monotonic() - began < 3:
                interrupted += interrupt(0.005, acquire)
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    taken, allowed = len(begun) + mine, (time.monotonic() - began) * 20 + 1
    print(f"{interrupted} interrupted, {len(begun)} + {mine} of {allowed:.0f} turns taken")
    assert interrupted > 20
    assert not limiter._queue
    assert taken <= allowed + 1
    assert taken >= 0.7 * allowed  # a token lost with each interruption would leave far less


@pytest.mark.slow
def test_those_behind_an_interrupted_waiter_move_up(start: Any) -> None:
    start(per_second=0.5, burst=1, max_wait=60)
    limiter = Connection.group("g").limiter
    assert limiter is not None
    limiter.acquire()

    class Interrupt(BaseException):
        pass

    def interrupt(*_: Any) -> None:
        raise Interrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    began = time.monotonic()
    with ThreadPoolExecutor(2) as threads:
        try:

            def behind() -> float:
                wait_for(lambda: limiter._queue)
                limiter.acquire()
                return time.monotonic() - began

            def interrupt_the_first() -> None:
                wait_for(lambda: len(limiter._queue) == 2)
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

            future = threads.submit(behind)
            threads.submit(interrupt_the_first)
            with pytest.raises(Interrupt):
                limiter.acquire()
        finally:
            signal.signal(signal.SIGALRM, previous)
        assert 1.9 < future.result(10) < 3.9  # the first turn, at two seconds, and not the second


def test_a_forked_child_has_its_own_bucket(start: Any, mode: str) -> None:
    start(mode, per_second=0.01, burst=2, max_wait=0)
    for _ in range(2):
        with Handler("g"):
            pass
    child = os.fork()
    if child == 0:
        try:
            for _ in range(2):
                with Handler("g") as db:
                    db.query("SELECT 1")
            try:
                Handler("g").__enter__()
            except RateLimitExceeded:
                os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with pytest.raises(pgdbpool.RateLimitExceeded), Handler("g"):
        pass


def test_the_wait_for_a_turn_is_cut_by_the_deadline(start: Any, mode: str) -> None:
    start(mode, per_second=0.1, burst=1, max_wait=30)
    with Handler("g"):
        pass
    began = time.monotonic()
    with pytest.raises(RateLimitExceeded), pgdbpool.deadline(0.3), Handler("g"):
        pass
    assert time.monotonic() - began < 5

"""Who gets which connection when: endpoints by their share, threads in turn, and all of a burst at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from load import call
from support import config, evenness, pid_of, server, wait_for

from pgdbpool import Connection, Handler


def shares() -> list[int]:
    return list(Connection.status().groups["g"].connections.values())


def test_connections_lost_with_an_endpoint_are_opened_on_another(
    start: Any, known_cluster: Any, proxy_to: Any
) -> None:
    first, second = known_cluster.standbys
    proxy = proxy_to(second)
    start([first, server(second, port=proxy.port)], connection_count=12)
    assert shares() == [6, 6]
    proxy.stop()
    wait_for(lambda: call().error is None and shares() == [12, 0], what="as many as min_size says")


def test_a_returned_endpoint_gets_its_share_and_no_block_is_disturbed(
    start: Any, known_cluster: Any, proxy_to: Any, measured: Any
) -> None:
    first, second = known_cluster.standbys
    proxy = proxy_to(second)
    start([first, server(second, port=proxy.port)], connection_count=12)
    proxy.stop()
    wait_for(lambda: call().error is None and shares() == [12, 0], what="all are on the one that is left")
    with ExitStack() as stack:
        held = [stack.enter_context(Handler("g")) for _ in range(4)]
        pids = [db.query("SELECT pg_backend_pid()").fetchone()[0] for db in held]
        proxy.start()
        returned = time.monotonic()
        wait_for(lambda: call().error is None and min(shares()) == 6, 30, "its fair share")
        measured("6 of 12 connections on the returned endpoint", time.monotonic() - returned, at_most=30)
        assert [db.query("SELECT pg_backend_pid()").fetchone()[0] for db in held] == pids
        assert [pid_of(db) for db in held] == pids
    status = Connection.status().groups["g"]
    assert (status.in_use, status.size) == (0, 12)
    assert status.discarded["rebalanced"] <= 6  # not one more than it took


@pytest.fixture
def threaded() -> Iterator[Callable[..., None]]:
    def init(entry: dict[str, Any], **changes: Any) -> None:
        Connection.init(config([entry], "threaded", g=changes))

    yield init
    Connection.reset()


def test_eight_threads_share_four_connections_evenly(
    threaded: Any, known_cluster: Any, measured: Any
) -> None:
    threaded(server(known_cluster.primary), connection_count=4)
    blocks = [0] * 8
    ready, stop = threading.Barrier(9), threading.Event()

    def run(i: int) -> None:
        ready.wait(10)
        while not stop.is_set():
            with Handler("g") as db:
                db.query("SELECT pg_sleep(0.01)").fetchall()  # longer than a thread takes to wake up
            blocks[i] += 1

    with ThreadPoolExecutor(8) as threads:
        futures = [threads.submit(run, i) for i in range(8)]
        ready.wait(10)
        try:
            spread = 100 * (1 - evenness(blocks, of=800))
        finally:
            stop.set()
        for future in futures:
            future.result(10)
    measured("between the thread that had most and the one that had least", spread, "%", at_most=10)


def test_a_burst_over_slow_connects_is_served_in_the_time_of_one(
    threaded: Any, known_cluster: Any, proxy_to: Any, measured: Any
) -> None:
    proxy = proxy_to(known_cluster.primary)
    threaded(server(known_cluster.primary, port=proxy.port), connection_count=9, min_size=1)
    with Handler("g") as db:
        pid = pid_of(db)
        proxy.delay = 0.25  # four of them are a connect: the question for TLS and the start-up
        together = threading.Barrier(9)

        def block() -> float:
            together.wait(10)
            began = time.monotonic()
            with Handler("g") as mine:
                took = time.monotonic() - began
                assert pid_of(mine) != pid
                together.wait(20)  # all hold theirs at the same time
                return took

        with ThreadPoolExecutor(8) as threads:
            futures = [threads.submit(block) for _ in range(8)]
            together.wait(10)
            wait_for(lambda: proxy.connections == 9, what="all connects are under way")
            db.__exit__(None, None, None)
            began = time.monotonic()
            with Handler("g") as again:  # no lock is held while they connect
                other = time.monotonic() - began
                assert again._block is not None
                assert again._conn is not None
                assert again._conn.info.backend_pid == pid
                status = Connection.status().groups["g"]
                assert (status.in_use, status.size) == (1, 9)
                together.wait(20)
            took = [future.result(20) for future in futures]
    measured("a checkout of an idle connection meanwhile", other * 1000, "ms", at_most=300)
    measured("fastest of 8 checkouts that connect", min(took), at_least=1)
    measured("slowest of 8 checkouts that connect", max(took), at_most=4)


def test_threads_do_not_multiply_with_endpoints(
    start: Any, known_cluster: Any, proxy_to: Any, measured: Any, mode: str
) -> None:
    proxies = [proxy_to(node) for node in known_cluster.nodes]
    entries = [server(n, port=p.port) for n, p in zip(known_cluster.nodes, proxies, strict=True)]
    before = threading.active_count()
    documented = 2 if mode == "threaded" else 0  # a worker and a scheduler for the group
    for some in (entries[:1], entries):
        start(some, connection_count=6)
        assert call().error is None
        measured(
            f"threads for {len(some)} endpoints", threading.active_count() - before, "",
            at_most=documented, at_least=documented,
        )  # fmt: skip
    for proxy in proxies[1:]:
        proxy.stop()
    documented += mode == "threaded"  # one prober, however many are down

    def found() -> bool:
        assert call().error is None
        down = [e.state != "up" for e in Connection.status().endpoints.values()]
        return down == [False, True, True] and threading.active_count() - before >= documented

    wait_for(found)
    measured(
        "threads while two are down", threading.active_count() - before, "",
        at_most=documented, at_least=documented,
    )  # fmt: skip

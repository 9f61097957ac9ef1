"""A server that was restarted or was away: no needless error, no dial too many, back at once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from load import Call, Load, call
from support import server, wait_for

import pgdbpool
from pgdbpool import Connection


@pytest.mark.parametrize("stale", [5, 10, 40])
def test_a_restart_costs_no_error(
    start: Any, known_cluster: Any, measured: Any, mode: str, stale: int
) -> None:
    standby = known_cluster.standbys[0]
    for clients in (1, 4) if mode == "threaded" else (1,):
        start([standby], connection_count=stale)
        assert Connection.status().groups["g"].idle == stale
        standby.restart("immediate")
        with ThreadPoolExecutor(clients) as threads:
            accepting = time.monotonic()

            def client(_: int) -> list[Call]:
                return [call() for _ in range(stale)]

            calls = [each for some in threads.map(client, range(clients)) for each in some]
        assert [each.error for each in calls if each.error] == []
        what = f"{stale} stale connections, {clients} clients"
        first = min(each.ended for each in calls) - accepting
        measured(f"first success, {what}", first * 1000, "ms", at_most=1000)
        measured(f"slowest call, {what}", max(each.took for each in calls) * 1000, "ms", at_most=2000)
        wait_for(lambda: call().error is None and Connection.status().groups["g"].idle >= min(stale, 5))
        Connection.reset()


@pytest.mark.parametrize("seconds", [10, pytest.param(40, marks=pytest.mark.long)])
def test_an_outage_under_load(
    start: Any, known_cluster: Any, proxy_to: Any, measured: Any, mode: str, seconds: int
) -> None:
    standby = known_cluster.standbys[0]
    proxy = proxy_to(standby)  # accepts what it cannot pass on, and so counts every attempt to connect
    start([server(standby, port=proxy.port)], connection_count=8, min_size=4, timeout=30)
    label = f"127.0.0.1:{proxy.port}"
    with Load(clients=12) as load:
        wait_for(lambda: len(load.calls) > 100)
        before = proxy.connections
        standby.stop("immediate")
        down = time.monotonic()
        dials: list[tuple[float, int]] = []
        while (now := time.monotonic()) < down + seconds:
            dials.append((now, proxy.connections))
            time.sleep(0.02)
        dialled = proxy.connections - before
        standby.start()
        up = time.monotonic()
        wait_for(lambda: load.good_since(up), 10, "a success after the outage")
        wait_for(lambda: len(load.good_since(up)) > 100)
    refused = [each for each in load.calls if isinstance(each.error, pgdbpool.DBOfflineError)]
    for each in refused:
        assert isinstance(each.error, pgdbpool.DBOfflineError)
        assert each.error.endpoints[label]
        assert each.error.__cause__ is not None
    others = [e for e in load.errors if not isinstance(e, pgdbpool.DBOfflineError)]
    assert all(isinstance(e, pgdbpool.ConnectionLostError) for e in others), others
    worst = max(
        next((c for t, c in reversed(dials) if t <= since + 1), 0) - count
        for since, count in dials
        if since > down + 1
    )
    first_second = next(count for t, count in dials if t >= down + 1) - before
    measured("attempts to connect", dialled, "", at_most=2 * seconds + 4)
    measured("attempts in the first second", first_second, "", at_most=5)
    measured("most attempts in any later second", worst, "", at_most=3)  # two, and the edges of a window
    measured("calls refused", len(refused), "", at_least=100)
    measured("calls lost while they were at the server", len(others), "", at_most=12)
    waits = sorted(each.took for each in refused)
    measured("a refusal, 99 of 100", waits[len(waits) * 99 // 100] * 1000, "ms", at_most=200)
    measured("slowest refusal, with a timeout of 30 s", waits[-1], at_most=5)  # the machine may stall
    measured("first success after recovery", load.good_since(up)[0].ended - up, "s", at_most=2)
    status = Connection.status().groups["g"]
    assert (status.waiting, status.in_use) == (0, 0)

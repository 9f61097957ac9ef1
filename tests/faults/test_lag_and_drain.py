"""A standby too far behind is passed over; a server can be taken out of use and put back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from support import config, wait_for

import pgdbpool
from pgdbpool import Connection, Handler
from pgdbpool._servers.endpoint import Role
from pgdbpool._servers.replication import Lag, PrimaryHistory, ServerReport


@pytest.fixture(params=["threaded", "non-threaded"])
def start(request: pytest.FixtureRequest) -> Iterator[Any]:
    def init(nodes: Any, **changes: Any) -> None:
        Connection.init(config(nodes, request.param, g={"connection_count": 4, **changes}))

    yield init
    Connection.reset()


def use(n: int = 8) -> set[str]:
    used = set()
    for _ in range(n):
        with Handler("g") as db:
            db.query("SELECT 1")
            used.add(db.endpoint)
    return used


def used() -> set[str]:
    """Use the group, where that is possible now."""
    try:
        return use()
    except pgdbpool.TargetUnavailableError:
        return set()


def write(node: Any) -> None:
    node.execute(
        "CREATE TABLE IF NOT EXISTS filler AS SELECT repeat('x', 100) FROM generate_series(1, 20000)"
    )
    node.execute("INSERT INTO filler SELECT repeat('x', 100) FROM generate_series(1, 20000)")


@pytest.mark.parametrize("limit", [{"bytes": "1MB"}, {"seconds": 1}])
def test_a_standby_that_is_too_far_behind_gets_no_block_until_it_has_caught_up(
    start: Any, known_cluster: Any, limit: dict[str, Any]
) -> None:
    behind, abreast = known_cluster.standbys
    start(known_cluster.nodes, target="standby", max_lag=limit)
    assert use() == {behind.label, abreast.label}
    behind.execute("SELECT pg_wal_replay_pause()")
    try:
        write(known_cluster.primary)
        wait_for(lambda: used() == {abreast.label}, 15)  # the other needs a moment for so much, too
        status = Connection.status().endpoints[behind.label]
        assert status.lag_bytes or status.lag_seconds
        assert use(20) == {abreast.label}
    finally:
        behind.execute("SELECT pg_wal_replay_resume()")
    wait_for(lambda: used() == {behind.label, abreast.label}, 15)


def test_an_idle_primary_causes_no_lag(start: Any, known_cluster: Any) -> None:
    start(known_cluster.nodes, target="standby", max_lag={"seconds": 1.5})
    ends = time.monotonic() + 3
    while time.monotonic() < ends:  # nobody writes
        assert use(1)
    lags = [Connection.status().endpoints[node.label].lag_seconds for node in known_cluster.standbys]
    assert max(lag or 0.0 for lag in lags) < 1.5


def test_with_every_standby_behind_the_error_says_how_far(start: Any, known_cluster: Any) -> None:
    (first, second), primary = known_cluster.standbys, known_cluster.primary
    start(known_cluster.nodes, target="standby", max_lag={"bytes": "1MB"})
    for node in (first, second):
        node.execute("SELECT pg_wal_replay_pause()")
    try:
        write(primary)

        def refused() -> str:
            try:
                use(1)
            except pgdbpool.DBConnectionError as error:
                return str(error)
            return ""

        assert "more than max_lag" in wait_for(refused, 15)
    finally:
        for node in (first, second):
            node.execute("SELECT pg_wal_replay_resume()")


def test_lag_is_the_time_since_the_primary_was_beyond_the_standby() -> None:
    def standby(position: int, at: float) -> ServerReport:
        return ServerReport(True, None, "7", position, 3600.0, at)

    history = PrimaryHistory()
    assert history.lag(standby(10, 0.0)) is None
    history.note(1.0, 100)
    history.note(2.0, 100)
    assert history.lag(standby(100, 2.0)) == Lag(0, 0.0)  # idle, however old the last transaction is
    history.note(3.0, 150)
    assert history.lag(standby(100, 3.5)) == Lag(50, 0.5)
    history.note(9.0, 200)
    assert history.lag(standby(120, 10.0)) == Lag(80, 7.0)
    assert history.lag(standby(50, 10.0)) == Lag(150, 3600.0)  # behind since before anybody looked


def test_a_group_takes_a_standby_back_at_half_of_its_limit(known_cluster: Any) -> None:
    Connection.init(config(known_cluster.nodes, g={"target": "any", "max_lag": {"bytes": 100}}), wait=False)
    try:
        group = Connection.group("g")
        endpoint = group.endpoints[0]
        endpoint.role = Role.STANDBY
        barred = []
        for lag in (100, 101, 80, 51, 50, 90):
            endpoint.lag = Lag(lag, 0.0)
            group.note_lag(endpoint)
            barred.append(endpoint in group._excluded)
        assert barred == [False, True, True, True, False, False]
    finally:
        Connection.reset()


def test_a_drained_server_gets_no_block_and_loses_its_idle_connections_at_once(
    start: Any, known_cluster: Any
) -> None:
    first, second = known_cluster.standbys
    start([first, second])
    assert use() == {first.label, second.label}
    held = []
    while first.label not in [db.endpoint for db in held]:
        held.append(Handler("g").__enter__())
    on_first = next(db for db in held if db.endpoint == first.label)
    Connection.drain(first.label)
    # The block that is on it goes on; nothing else does.
    assert on_first.query("SELECT 1").fetchone()[0] == 1
    assert Connection.status().endpoints[first.label].state == "draining"
    assert Connection.status().groups["g"].connections[first.label] == 1
    for db in held:
        db.__exit__(None, None, None)
    assert Connection.status().groups["g"].connections[first.label] == 0
    assert use(20) == {second.label}
    Connection.undrain(first.label)
    wait_for(lambda: use() == {first.label, second.label}, 15)


def test_with_all_servers_drained_the_error_says_so(start: Any, known_cluster: Any) -> None:
    start([known_cluster.primary])
    Connection.drain(known_cluster.primary.label)
    with pytest.raises(pgdbpool.DBOfflineError, match="draining"):
        use(1)
    Connection.undrain(known_cluster.primary.label)
    assert use(1)


def test_a_server_that_is_not_configured_cannot_be_drained(start: Any, known_cluster: Any) -> None:
    start([known_cluster.primary])
    with pytest.raises(pgdbpool.UnknownEndpointError, match="the endpoints are"):
        Connection.drain("nowhere")

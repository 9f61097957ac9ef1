"""Tokens over promotions, restarts and crashes of servers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support import config, server, wait_for

import pgdbpool
from pgdbpool import Connection, Handler, StaleReadError, Token
from pgdbpool._servers import positions
from pgdbpool.cluster import Cluster

pytestmark = pytest.mark.slow

COUNT = "SELECT count(*) FROM t WHERE i = %s"


@pytest.fixture
def servers() -> Iterator[Cluster]:
    with Cluster(standbys=2) as cluster:
        cluster.primary.execute("CREATE TABLE t (i int)")
        cluster.primary.execute("CREATE ROLE app LOGIN")
        cluster.primary.execute("GRANT ALL ON t TO app")
        cluster.wait_in_sync()
        yield cluster
        Connection.reset()


@pytest.fixture(autouse=True)
def no_history_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test begin as a new process does."""
    monkeypatch.setattr(positions.TIMELINES, "_forks", {})


def init(servers: Cluster, mode: str, user: str = "postgres", **changes: Any) -> None:
    few = {"connection_count": 3, "fresh_wait": 0.2, "timeout": 5, **changes}
    groups = {
        "write": {"target": "primary", **few},
        "read": {"target": "standby", **few},
        "prefer": {"target": "prefer-standby", **few},
    }
    Connection.init(config([server(node, user=user) for node in servers.nodes], mode, **groups))


def write(number: int) -> Token:
    with pgdbpool.read_your_writes() as seen:
        Connection.execute("write", "INSERT INTO t VALUES (%s)", (number,))
    assert seen.token is not None
    return seen.token


def fail_over(servers: Cluster) -> None:
    """Kill the primary, promote a standby, and let the other one follow it."""
    old = servers.primary
    old.kill()
    servers.standbys[0].promote()
    servers.follow(servers.primary)
    servers.wait_in_sync()


def reads_from_the_standby(servers: Cluster) -> bool:
    """Return whether the group knows the roles: a session learns of a promotion with its next message."""
    with Handler("read") as db:
        db.query("SELECT 1")
        return db.endpoint == next(node.label for node in servers.standbys if node.running)


def test_after_a_promotion_a_write_that_survived_is_read_from_standbys(servers: Cluster, mode: str) -> None:
    init(servers, mode)
    token = write(1)
    servers.wait_in_sync()
    fail_over(servers)
    wait_for(lambda: reads_from_the_standby(servers))
    wait_for(lambda: Connection.fetchval("read", COUNT, (1,), after=token) == 1)
    assert Connection.fetchval("prefer", COUNT, (1,), after=token) == 1
    with Handler("read", after=token) as db:
        assert db.endpoint == next(node.label for node in servers.standbys if node.running)
    newer = write(2)
    assert newer.positions[0].timeline == token.positions[0].timeline + 1
    assert Connection.fetchval("read", COUNT, (2,), after=token | newer) == 1


def test_a_write_that_a_failover_lost_is_said_to_be_lost_though_its_position_is_reached(
    servers: Cluster, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    init(servers, mode)
    write(1)
    servers.wait_in_sync()
    for standby in servers.standbys:
        standby.stop()
    token = write(2)
    servers.primary.kill()
    for standby in servers.standbys:
        standby.start()
    fail_over_from_killed(servers)
    with servers.primary.connect() as admin:
        while True:  # other records take its place
            admin.execute("SELECT pg_logical_emit_message(true, '', repeat('x', 100000))")
            ((end,),) = admin.execute("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn").fetchall()
            if end > token.positions[0].lsn:
                break
    servers.wait_in_sync()
    for group in ("read", "prefer"):
        with pytest.raises(StaleReadError, match="may have been lost in a failover") as caught:
            Connection.fetchval(group, COUNT, (2,), after=token)
        assert caught.value.lost
    assert Connection.fetchval("read", COUNT, (1,)) == 1
    with pgdbpool.read_your_writes(token) as seen:
        seen.forgiving = True
        assert Connection.fetchval("read", COUNT, (2,)) == 0
        assert seen.token is None
    assert [r.event for r in caplog.records if getattr(r, "event", "") == "token.lost"] == ["token.lost"]


def fail_over_from_killed(servers: Cluster) -> None:
    servers.standbys[0].promote()
    servers.follow(servers.primary)
    servers.wait_in_sync()


def test_a_role_that_may_not_read_histories_reads_from_the_primary_after_a_promotion(
    servers: Cluster, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    init(servers, mode, user="app", connection_count=1)
    token = write(1)
    servers.wait_in_sync()
    fail_over(servers)
    for node in (servers.primary, servers.standbys[0]):
        if node.running:
            node.execute("CHECKPOINT")  # what such a role sees of a standby's timeline is its last one's

    def read() -> Any:
        with Handler("prefer", after=token) as db:
            return db.fetchval(COUNT, (1,)), db.endpoint

    wait_for(lambda: reads_from_the_standby(servers))
    assert wait_for(read) == (1, servers.primary.label)
    with pytest.raises(StaleReadError) as caught:
        Connection.fetchval("read", COUNT, (1,), after=token)
    assert not caught.value.lost
    records = [record for record in caplog.records if getattr(record, "event", "") == "endpoint.no_history"]
    assert len(records) == 1
    assert "permission denied" in records[0].reason


def test_a_promotion_that_nothing_has_told_of_is_found_by_the_read_that_needs_it(
    servers: Cluster, mode: str
) -> None:
    init(servers, mode, connection_count=1, min_size=0)
    promoted, other = servers.standbys
    for used, drained in ((promoted, other), (other, promoted)):
        Connection.drain(drained.label)
        with Handler("prefer") as db:
            assert db.fetchval("SELECT pg_is_in_recovery()")
            assert db.endpoint == used.label
        Connection.undrain(drained.label)
    other.execute("SELECT pg_wal_replay_pause()")
    token = write(1)
    wait_for(lambda: promoted.execute("SELECT count(*) FROM t") == [(1,)])
    servers.primary.kill()
    promoted.promote()
    with Handler("prefer", after=token) as db:
        assert db.fetchval(COUNT, (1,)) == 1
        assert db.endpoint == promoted.label


def test_a_standby_that_receives_nothing_proves_nothing(servers: Cluster, mode: str) -> None:
    """Where its receiver is away, so is the timeline; and what it is said to have received is not true."""
    init(servers, mode)
    token = write(1)
    servers.wait_in_sync()
    servers.primary.kill()
    standby = servers.standbys[0]
    standby.restart()
    ((receives, replayed),) = standby.execute(
        "SELECT pg_last_wal_receive_lsn() - '0/0'::pg_lsn, pg_last_wal_replay_lsn() - '0/0'::pg_lsn"
    )
    assert (receives or 0) % (16 << 20) == 0
    assert receives is None or receives < token.positions[0].lsn <= replayed
    with pytest.raises(StaleReadError, match="that receives nothing"):
        Connection.fetchval("read", COUNT, (1,), after=token)
    assert Connection.fetchval("read", COUNT, (1,)) == 1


def test_a_standby_is_promoted_under_a_block_that_reads_from_it(servers: Cluster, mode: str) -> None:
    init(servers, mode)
    token = write(1)
    servers.wait_in_sync()
    standby = servers.standbys[0]
    with pgdbpool.read_your_writes(token), Handler("prefer") as db:
        assert db.fetchval(COUNT, (1,)) == 1
        at = db.endpoint
        servers.primary.kill()
        promoted = next(node for node in servers.standbys if node.label == at)
        promoted.promote()
        assert db.fetchval(COUNT, (1,)) == 1
        number = wait_for(lambda: write_again(2))
        assert db.fetchval(COUNT, (number,)) == 1
    assert standby.running


def write_again(number: int) -> int:
    try:
        write(number)
    except pgdbpool.DBConnectionError:
        return 0
    return number


def test_a_primary_that_was_left_behind_serves_no_token_of_the_new_one(servers: Cluster, mode: str) -> None:
    old = servers.primary
    servers.standbys[0].promote()  # while the old one lives
    one = {"target": "any", "connection_count": 1, "fresh_wait": 0.1}
    entries = [server(servers.primary, label="new"), server(old, label="old")]
    groups = {"new": {**one, "endpoints": ["new"]}, "old": {**one, "endpoints": ["old"]}}
    Connection.init(config(entries, mode, **groups))
    with pgdbpool.read_your_writes() as seen:
        Connection.execute("new", "INSERT INTO t VALUES (1)")
    assert seen.token is not None
    assert seen.token.positions[0].timeline == 2
    with pytest.raises(StaleReadError, match="a primary on timeline 1"):
        Connection.fetchval("old", COUNT, (1,), after=seen.token)

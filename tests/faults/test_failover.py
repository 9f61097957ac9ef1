"""The role moves: writes follow it, whatever the order of hosts, and no standby is ever written to."""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from support import config, wait_for

import pgdbpool
from pgdbpool import Connection, Handler
from pgdbpool._process import observer
from pgdbpool.cluster import Cluster, Node

MODES = ["threaded", "non-threaded"]
# What an application retries a write after.
RETRYABLE = (pgdbpool.DBConnectionError, pgdbpool.ConnectionLostError, pgdbpool.ReadOnlyServerError)


@pytest.fixture(params=MODES)
def start(request: pytest.FixtureRequest) -> Iterator[Any]:
    def init(nodes: Any, wait: bool = True, read: dict[str, Any] | None = None, **changes: Any) -> None:
        write = {"connection_count": 4, "target": "read-write", "autocommit": False, **changes}
        groups = {"write": write} | ({"read": {"connection_count": 2, **read}} if read else {})
        Connection.init(config(nodes, request.param, **groups), wait=wait)

    yield init
    Connection.reset()


@pytest.fixture(scope="module")
def two() -> Iterator[Cluster]:
    """A primary and a standby of this module's own, since roles move in it."""
    with Cluster(standbys=1) as cluster:
        yield cluster


@pytest.fixture
def pair(two: Cluster) -> Cluster:
    """The two with one of them a primary, the other its standby, and an empty table."""
    primary = two.primary
    other = next(node for node in two.nodes if node is not primary)
    if not primary.running:
        primary.start()
    primary.execute("ALTER SYSTEM RESET ALL")
    primary.execute("SELECT pg_reload_conf()")
    if not other.running or other.upstream is not primary:
        other.rejoin(primary)
    wait_for(lambda: primary.execute("SHOW default_transaction_read_only")[0][0] == "off")
    primary.execute("DROP TABLE IF EXISTS log")
    primary.execute("CREATE TABLE log (id bigint GENERATED ALWAYS AS IDENTITY, label text)")
    two.wait_in_sync()
    return two


def roles(cluster: Cluster) -> tuple[Node, Node]:
    """Return the primary and the standby."""
    primary = cluster.primary
    return primary, next(node for node in cluster.nodes if node is not primary)


def write() -> str:
    """Commit a row; return the label of the server that has it."""
    with Handler("write") as db:
        cursor = db.query("INSERT INTO log (label) VALUES (%s) RETURNING pg_is_in_recovery()", (db.endpoint,))
        assert cursor.fetchone()[0] is False
        return db.endpoint


def writes() -> str | None:
    """Commit a row if that is possible now; return the label of the server that has it."""
    try:
        return write()
    except RETRYABLE:
        return None


@pytest.mark.parametrize(
    ("order", "target"), [(1, "primary"), (-1, "read-write")], ids=["primary-first", "standby-first"]
)
def test_writes_follow_the_primary_after_a_promotion(
    start: Any, pair: Cluster, order: int, target: str
) -> None:
    old, new = roles(pair)
    start([old, new][::order], target=target)
    assert {write() for _ in range(8)} == {old.label}
    old.kill()
    new.promote()
    for endpoint in Connection._pools.endpoints.values():
        endpoint.role_seen_at = time.monotonic()  # as by a look just before it
    assert {write() for _ in range(8)} == {new.label}
    # It comes back as a standby: nothing is written to it, and nothing is asked of the requests.
    old.rejoin(new)
    wait_for(lambda: writes() and Connection.status().endpoints[old.label].state == "up", 10)
    assert {write() for _ in range(20)} == {new.label}


def promotions(rounds: int, cluster: Cluster, threads: int) -> None:
    """Promote so many times under load; no write may reach a standby."""
    first_commits: list[float] = []
    events: Counter[str] = Counter()
    commits: list[tuple[float, str]] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            try:
                commits.append((time.monotonic(), write()))
            except RETRYABLE as error:
                events[type(error).__name__] += 1
                time.sleep(0.01)
            except AssertionError:
                events["writes on a standby"] += 1

    if threads:
        workers = [threading.Thread(target=load) for _ in range(threads)]
        for worker in workers:
            worker.start()
    try:
        for _ in range(rounds):
            old = cluster.primary
            new = next(node for node in cluster.nodes if node is not old)
            old.kill()
            new.promote()
            promoted = time.monotonic()

            def landed(new: Node = new, promoted: float = promoted) -> float | None:
                if not threads and (label := writes()):
                    commits.append((time.monotonic(), label))
                found = [at for at, label in commits[-50:] if at > promoted and label == new.label]
                return found[0] if found else None

            first_commits.append(wait_for(landed, 10) - promoted)
            old.rejoin(new)
            cluster.wait_in_sync()
    finally:
        stop.set()
        if threads:
            for worker in workers:
                worker.join()
    middle, worst = statistics.median(first_commits), max(first_commits)
    print(
        f"{rounds} promotions, {len(commits)} commits: the first after {middle:.3f} s, at worst {worst:.3f} s"
    )
    print(f"meanwhile: {dict(events)}")
    assert events["writes on a standby"] == events["ReadOnlyServerError"] == 0
    assert max(first_commits) < 5  # 1 s where nothing else uses the machine


@pytest.mark.parametrize(("mode", "rounds", "threads"), [("threaded", 20, 4), ("non-threaded", 4, 0)])
def test_twenty_promotions_under_load_write_nothing_to_a_standby(
    pair: Cluster, mode: str, rounds: int, threads: int
) -> None:
    group = {"connection_count": 4, "target": "primary", "autocommit": False}
    Connection.init(config(pair.nodes, mode, write=group))
    try:
        promotions(rounds, pair, threads)
    finally:
        Connection.reset()


def test_of_two_writable_servers_the_one_on_the_higher_timeline_is_used(
    start: Any, pair: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(observer, "SLOWLY", (0.2, 0.3))
    old, new = roles(pair)
    start(pair.nodes)
    assert write() == old.label
    with caplog.at_level(logging.WARNING, "pgdbpool"):
        new.promote()  # and nobody has stopped the old one
        wait_for(lambda: writes() == new.label, 10)
    assert {write() for _ in range(10)} == {new.label}
    assert Connection.status().endpoints[old.label].outdated
    assert "no writes go there" in caplog.text
    # With the new one gone, the old one is still not written to: what it has, the other does not.
    new.kill()
    with pytest.raises(pgdbpool.DBConnectionError, match="another was promoted"):
        wait_for(lambda: write() == old.label, 3)


def test_a_promotion_that_a_read_finds_moves_the_writes(start: Any, pair: Cluster) -> None:
    old, new = roles(pair)
    start(pair.nodes, read={"target": "standby"})
    with Handler("read") as db:
        assert db.endpoint == new.label
    assert write() == old.label
    new.promote()

    def moved() -> bool:
        try:
            with Handler("read") as db:
                db.query("SELECT 1")
        except pgdbpool.TargetUnavailableError:
            pass
        return writes() == new.label

    wait_for(moved, 10)
    assert {write() for _ in range(10)} == {new.label}


def test_a_write_to_a_server_that_became_read_only_has_its_own_error(start: Any, pair: Cluster) -> None:
    old, new = roles(pair)
    start(pair.nodes)
    assert write() == old.label
    old.execute("ALTER SYSTEM SET default_transaction_read_only = on")
    old.execute("SELECT pg_reload_conf()")

    def refused() -> Exception | None:
        try:
            write()
        except (pgdbpool.ReadOnlyServerError, pgdbpool.TargetUnavailableError) as error:
            return error
        return None

    error = wait_for(refused, 10)
    if isinstance(error, pgdbpool.ReadOnlyServerError):
        assert isinstance(error, psycopg.errors.ReadOnlySqlTransaction)
        assert not error.maybe_executed
        assert not error.maybe_committed
    # None of its connections is lent again, and none is asked for by trying.
    with pytest.raises(pgdbpool.TargetUnavailableError, match="read only"):
        write()
    new.promote()
    assert wait_for(writes, 10) == new.label


def test_a_transaction_that_is_read_only_by_itself_says_nothing_of_the_server(
    start: Any, pair: Cluster
) -> None:
    start(pair.nodes)
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction) as caught, Handler("write") as db:
        db.query("SET TRANSACTION READ ONLY")
        db.query("INSERT INTO log (label) VALUES ('x')")
    assert not isinstance(caught.value, pgdbpool.ReadOnlyServerError)
    assert write() == pair.primary.label


def test_without_a_writer_the_error_comes_at_once_with_each_servers_role(start: Any, pair: Cluster) -> None:
    old, new = roles(pair)
    start(pair.nodes)
    write()
    old.kill()
    wait_for(lambda: writes() is None, 10)
    began = time.monotonic()
    with pytest.raises(pgdbpool.DBConnectionError) as caught:
        write()
    assert time.monotonic() - began < 5
    assert set(caught.value.endpoints) == {old.label, new.label}
    assert "standby" in caught.value.endpoints[new.label]


def test_a_read_is_repeated_if_its_group_only_reads(start: Any, pair: Cluster) -> None:
    _, node = roles(pair)
    start(pair.nodes, read={"target": "standby"})
    with node.connect() as admin, Handler("read") as db:
        pid = db.query("SELECT pg_backend_pid()").fetchone()[0]
        admin.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
        # Its first statement went well, so the connection was known to work: the loss is found by the second.
        assert db.query("SELECT 1").fetchone()[0] == 1


def test_an_old_role_known_to_idle_readers_changes_nothing_after_a_promotion(
    start: Any, pair: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = roles(pair)
    start(pair.nodes, read={"target": "read-only", "connection_count": 6, "min_size": 6})
    assert write() == old.label
    old.kill()
    with caplog.at_level(logging.WARNING, "pgdbpool"):
        new.promote()
        assert wait_for(writes, 10) == new.label
        for _ in range(12):
            with pytest.raises(pgdbpool.DBConnectionError), Handler("read"):
                pass
            assert write() == new.label
    assert [record.message for record in caplog.records if " and is now " in record.message] == [
        f"endpoint {new.label} was standby and is now primary"
    ]
    assert Connection.status().endpoints[new.label].failovers == 1


def test_no_commit_is_acknowledged_on_the_older_timeline_once_the_newer_was_seen(
    start: Any, pair: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observer, "SLOWLY", (0.2, 0.3))
    old, new = roles(pair)
    start(pair.nodes, read={"target": "read-only", "connection_count": 6, "min_size": 6})
    with Handler("write") as db:
        db.query("INSERT INTO log (label) VALUES ('late')")
        new.promote()  # and nobody has stopped the old one
        wait_for(lambda: writes() == new.label, 10)
        with pytest.raises(pgdbpool.ConnectionLostError):
            db.commit()
        db.rollback()
    for _ in range(12):  # what the readers say is of before
        with pytest.raises(pgdbpool.DBConnectionError), Handler("read"):
            pass
        assert write() == new.label
    assert old.execute("SELECT count(*) FROM log WHERE label = 'late'") == [(0,)]


@pytest.mark.parametrize("found", ["in use", "idle"])
@pytest.mark.parametrize("target", ["read-only", "standby"])
def test_a_group_that_only_reads_writes_nothing_to_a_server_that_was_promoted(
    start: Any, pair: Cluster, target: str, found: str
) -> None:
    _, new = roles(pair)
    start(pair.nodes, wait=False, read={"target": target, "connection_count": 1})
    with Handler("read") as db:
        db.query("SET work_mem = '1MB'")  # the session is cleaned before the next block
    with Handler("read") as db:
        assert db.query("SHOW work_mem").fetchone()[0] != "1MB"
        if found == "in use":
            new.promote()
            with pytest.raises(pgdbpool.ReadOnlyServerError):
                db.query("INSERT INTO log (label) VALUES ('read')")
    if found == "idle":
        new.promote()  # which this process hears of by the statement, or by the background just before
        refused = (pgdbpool.ReadOnlyServerError, pgdbpool.TargetUnavailableError)
        with pytest.raises(refused), Handler("read") as db:
            db.query("INSERT INTO log (label) VALUES ('read')")
    assert new.execute("SELECT count(*) FROM log") == [(0,)]
    with pytest.raises(pgdbpool.TargetUnavailableError, match="is a primary"), Handler("read"):
        pass

"""What puts an endpoint DOWN, and what never does."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
from known import leave
from load import call
from support import kill_backends, pid_of, server, wait_for

import pgdbpool
from pgdbpool import Connection, Handler
from pgdbpool.cluster import Cluster, Node


def state() -> str:
    (endpoint,) = Connection.status().endpoints.values()
    return endpoint.state


def refused_to_log_in(entry: dict[str, Any], start: Callable[..., None], says: str) -> None:
    """Let every checkout of a pool fail with the server's own words, and look at the endpoint."""
    with pytest.raises(pgdbpool.DBConnectionError, match=says):
        start([entry])
    start([entry], wait=False)
    for _ in range(20):
        with pytest.raises(pgdbpool.DBConnectionError, match=says) as caught, Handler("g"):
            pass
        assert not isinstance(caught.value, pgdbpool.DBOfflineError)
        assert caught.value.__cause__ is not None
        assert state() == "up"


# No evidence.


def test_a_thousand_statement_timeouts_put_no_endpoint_down(
    start: Any, known_cluster: Any, caplog: pytest.LogCaptureFixture, measured: Any
) -> None:
    start([known_cluster.primary], query_timeout="1ms")
    began, cancelled = time.monotonic(), 0
    while cancelled < 1000:
        with Handler("g") as db:
            with pytest.raises(psycopg.errors.QueryCanceled):
                db.query("SELECT pg_sleep(10)")
        cancelled += 1
    measured("1,000 statement timeouts", time.monotonic() - began, at_most=60)
    assert state() == "up"
    status = Connection.status().groups["g"]
    assert (status.opened, status.discarded) == (4, {})
    assert not caplog.records


def test_errors_of_statements_put_no_endpoint_down(
    start: Any, known_cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    start([known_cluster.primary])
    for statement, error in {
        "SELEC": psycopg.errors.SyntaxError,
        "SELECT 1/0": psycopg.errors.DivisionByZero,
        "SELECT * FROM nothing": psycopg.errors.UndefinedTable,
        "DO $$ BEGIN RAISE SQLSTATE '40001'; END $$": psycopg.errors.SerializationFailure,
        "DO $$ BEGIN RAISE SQLSTATE '53300'; END $$": psycopg.errors.TooManyConnections,
        "DO $$ BEGIN RAISE SQLSTATE '57P03'; END $$": psycopg.errors.CannotConnectNow,
        "DO $$ BEGIN RAISE SQLSTATE '08006'; END $$": psycopg.errors.ConnectionFailure,
    }.items():
        for _ in range(20):
            with Handler("g") as db, pytest.raises(error):
                db.query(statement)
    assert state() == "up"
    assert Connection.status().groups["g"].opened == 4
    assert not caplog.records


def test_a_saturated_pool_puts_no_endpoint_down(
    start: Any, known_cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    start([known_cluster.primary], timeout=0.01)
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(Handler("g"))
        for _ in range(50):
            with pytest.raises(pgdbpool.PoolTimeout), Handler("g"):
                pass
    assert state() == "up"
    assert call().error is None
    assert Connection.status().groups["g"].opened == 4
    assert not caplog.records


def test_too_many_clients_put_no_endpoint_down(start: Any, known_cluster: Any) -> None:
    node = known_cluster.standbys[0]
    with ExitStack() as stack:
        with pytest.raises(psycopg.OperationalError, match="too many clients"):
            while True:
                stack.enter_context(node.connect())
        start([node], wait=False, timeout=0.1)
        for _ in range(3):
            with pytest.raises(pgdbpool.PoolTimeout, match=r"is full: .*too many clients"), Handler("g"):
                pass
            assert state() == "up"
    wait_for(lambda: call().error is None, what="there is room again")


@pytest.fixture(params=["role", "database"])
def limited(request: pytest.FixtureRequest, known_cluster: Any) -> Iterator[dict[str, Any]]:
    """A `db` entry whose role, or whose database, may have two connections."""
    node = known_cluster.primary
    role, database = ("2", "-1") if request.param == "role" else ("-1", "2")
    node.execute(f"CREATE ROLE few LOGIN CONNECTION LIMIT {role}")
    node.execute(f"CREATE DATABASE few CONNECTION LIMIT {database}")
    yield server(node, user="few", name="few")
    Connection.reset()
    node.execute("DROP DATABASE few WITH (FORCE)")
    node.execute("DROP ROLE few")


def test_a_full_server_is_waited_for(start: Any, limited: Any, mode: str, measured: Any) -> None:
    start([limited], wait=False, timeout=10, connection_count=6, min_size=0)
    if mode == "threaded":
        found: list[Any] = []

        def work() -> None:
            found.extend(call() for _ in range(40))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [each.error for each in found if each.error] == []
        assert len(found) == 320
        measured("the longest wait of 8 threads for 2 connections", max(c.took for c in found), at_most=3)
    else:
        others = [psycopg.connect(**connect_to(limited)) for _ in range(2)]
        timer = threading.Timer(0.3, lambda: [other.close() for other in others])
        timer.start()
        done = call()
        assert done.error is None
        measured("the wait for another program's connections", done.took, at_least=0.2, at_most=3)
        timer.join()
    assert state() == "up"


def test_a_server_that_stays_full_is_named_when_the_time_is_up(
    start: Any, limited: Any, proxy_to: Any, known_cluster: Any, measured: Any
) -> None:
    proxy = proxy_to(known_cluster.primary)
    start([{**limited, "label": "small", "port": proxy.port}], wait=False, timeout=1, min_size=0)
    others = [psycopg.connect(**connect_to(limited)) for _ in range(2)]
    began = time.monotonic()
    with (
        pytest.raises(pgdbpool.PoolTimeout, match=r"small is full: .*too many connections for"),
        Handler("g"),
    ):
        pass
    measured("the error of a block that may wait for 1 s", time.monotonic() - began, at_least=1, at_most=2.5)
    assert proxy.connections <= 8  # at a growing interval
    assert state() == "up"
    for other in others:
        other.close()
    assert call().error is None


def connect_to(entry: dict[str, Any]) -> dict[str, Any]:
    return {"host": entry["host"], "port": entry["port"], "user": entry["user"], "dbname": entry["name"]}


def test_a_wrong_password_puts_no_endpoint_down(start: Any) -> None:
    with Cluster(standbys=0, auth="scram-sha-256", password="right") as cluster:
        refused_to_log_in(
            server(cluster.primary, **{"pass": "wrong"}), start, "password authentication failed"
        )


def test_a_terminated_backend_is_only_a_reason_to_look(
    start: Any, known_cluster: Any, proxy_to: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """57P01, in use and idle: one connection is replaced, and the others are kept."""
    node = known_cluster.primary
    start([node])
    with node.connect() as admin:
        with Handler("g") as db:
            kill_backends(admin, pid_of(db))
            with pytest.raises(pgdbpool.ConnectionLostError) as caught:
                db.query("SELECT 1")
            assert caught.value.sqlstate in ("57P01", None)
            assert state() == "up"
        with Handler("g") as db:
            idle = pid_of(db)
        kill_backends(admin, idle)
        assert [call().error for _ in range(8)] == [None] * 8
    status = Connection.status().groups["g"]
    assert status.discarded == {"lost": 2}
    assert state() == "up"
    assert not caplog.records


@pytest.mark.parametrize("timeout", [0, 0.1])
def test_a_hurried_connect_that_is_set_up_slowly_puts_no_endpoint_down(
    start: Any, known_cluster: Any, timeout: float
) -> None:
    """As behind a pooler that has all of its sessions in use: it logs in at once, and a statement waits."""

    def configure(conn: psycopg.Connection[Any]) -> None:
        conn.execute("SELECT pg_sleep(%s)", (sleep,))

    sleep = 2
    start([known_cluster.primary], min_size=0, configure=configure, wait=False)
    for _ in range(3):
        with pytest.raises(pgdbpool.DBConnectionError) as caught, Handler("g", timeout=timeout):
            pass
        assert not isinstance(caught.value, pgdbpool.DBOfflineError)
        assert state() == "up"
    sleep = 0
    assert call().error is None


# Evidence.


@pytest.fixture
def expect_down(start: Any, known_cluster: Any, proxy_to: Any) -> Callable[[str, str, str], None]:
    """Break the way to a standby, look for the endpoint's state and its reason, and mend it."""
    proxy = proxy_to(known_cluster.standbys[0])

    def check(fault: str, mend: str, says: str) -> None:
        start([server(known_cluster.standbys[0], port=proxy.port, connect_timeout=1.5)], min_size=0)
        with Handler("g"):  # on the one connection that there is
            getattr(proxy, fault)()
            found = call()
        assert isinstance(found.error, pgdbpool.DBOfflineError)
        assert says in str(found.error)
        assert found.error.__cause__ is not None
        assert state() in ("down", "probing")
        getattr(proxy, mend)()
        wait_for(lambda: call().error is None, 10, "up again")
        assert state() == "up"

    return check


def test_a_connect_that_is_refused_is_evidence(expect_down: Any) -> None:
    expect_down("stop", "start", "refused")


def test_a_connect_that_times_out_is_evidence(expect_down: Any) -> None:
    expect_down("stall", "resume", "no answer within")


def test_a_ping_past_its_deadline_is_a_reason_to_connect(
    start: Any, known_cluster: Any, proxy_to: Any
) -> None:
    proxy = proxy_to(known_cluster.standbys[0])
    entry = server(known_cluster.standbys[0], port=proxy.port, connect_timeout=1)
    start([entry], ping="always", ping_timeout=0.2)
    proxy.stall()
    assert isinstance(call().error, pgdbpool.DBOfflineError)
    assert state() in ("down", "probing")
    wait_for(lambda: Connection.status().groups["g"].size == 0, what="none of them is lent again")


def test_connections_that_the_network_has_forgotten_are_replaced(
    start: Any, known_cluster: Any, proxy_to: Any, mode: str, measured: Any, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = proxy_to(known_cluster.standbys[0])
    start([server(known_cluster.standbys[0], port=proxy.port)], ping="always", ping_timeout=0.5)
    proxy.forget()
    if mode == "threaded":
        found: list[Any] = []
        threads = [threading.Thread(target=lambda: found.append(call())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        found = [call()]
    assert [each.error for each in found] == [None] * len(found)
    measured("a request on a forgotten connection", max(each.took for each in found), at_most=0.5 + 1)
    later = [call() for _ in range(8)]
    assert [each.error for each in later] == [None] * 8
    measured("the slowest of those after it", max(each.took for each in later), at_most=0.5)
    assert state() == "up"
    assert "is down" not in caplog.text


def test_a_server_that_takes_no_sessions_is_evidence(start: Any, known_cluster: Any) -> None:
    """57P03: it answers, but takes no sessions."""
    node: Node = known_cluster.standbys[0]
    leave(node)
    with node.connect():  # a smart shutdown waits for this one
        start([node], min_size=0)
        with Handler("g") as db:
            db.query("SELECT 1")
            os.kill(node.pid, signal.SIGTERM)
            wait_for(lambda: "shutting down" in refusal(node), what="the server refuses sessions")
            found = call()
            assert isinstance(found.error, pgdbpool.DBOfflineError)
            assert "shutting down" in str(found.error)
            assert state() in ("down", "probing")
            assert db.query("SELECT 1").fetchone()[0] == 1  # whoever has a connection may go on
    wait_for(lambda: not node.running, what="the server's end")
    node.start()
    wait_for(lambda: call().error is None, 10, "up again")


def refusal(node: Node) -> str:
    """Return why a session is refused, or nothing."""
    try:
        node.connect().close()
    except psycopg.OperationalError as error:
        return str(error)
    return ""

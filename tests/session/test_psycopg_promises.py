"""What psycopg promises of a connection: two-phase commit, contexts, pipelines, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.transaction import OutOfOrderTransactionNesting
from support import config, kill_backends, pid_of, server

import pgdbpool
from pgdbpool import (
    BlockClosedError,
    Connection,
    ConnectionLostError,
    DBQueryError,
    Handler,
    TenantConflictError,
    TransactionAbortedError,
)
from pgdbpool.cluster import Cluster, Node

TENANT = "SELECT current_setting('app.tenant', true)"


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A server that takes two-phase transactions."""
    with Cluster(standbys=0, settings={"max_prepared_transactions": 5}) as cluster:
        yield cluster.primary


@pytest.fixture
def admin(node: Node) -> Iterator[psycopg.Connection[Any]]:
    with node.connect() as conn:
        for (xid,) in conn.execute("SELECT gid FROM pg_prepared_xacts").fetchall():  # of a test that failed
            conn.execute(f"ROLLBACK PREPARED '{xid}'")
        conn.execute("DROP TABLE IF EXISTS t; CREATE TABLE t (i int PRIMARY KEY, tenant text)")
        yield conn


@pytest.fixture(autouse=True)
def pools(node: Node, mode: str, admin: Any) -> Iterator[None]:
    """Groups `auto` and `manual` of one connection, in each mode."""
    auto = {
        "connection_count": 1,
        "row_factory": "tuple",
        "tenant": {"setting": "app.tenant", "verify": "off"},
    }
    auto["tenant"]["required"] = False  # type: ignore[index]
    manual = {**auto, "autocommit": False}
    Connection.init(config([server(node)], mode, auto=auto, manual=manual, plain={"connection_count": 1}))
    yield
    Connection.reset()


@pytest.fixture(params=["auto", "manual"])
def group(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def rows(admin: psycopg.Connection[Any]) -> list[Any]:
    return admin.execute("SELECT i, tenant FROM t ORDER BY i").fetchall()


INSERT = "INSERT INTO t VALUES (%s, current_setting('app.tenant', true))"


# Two-phase commit.


@pytest.mark.slow
@pytest.mark.parametrize("end", ["commit", "rollback", "recovered", "one-phase"])
def test_two_phase_commit_works_with_the_tenant(group: str, admin: Any, end: str) -> None:
    with Handler(group, tenant="acme") as db:
        conn = db.connection
        conn.autocommit = False
        xid = conn.xid(1, "global", end)
        conn.tpc_begin(xid)
        conn.execute(INSERT, (1,))
        if end != "one-phase":
            conn.tpc_prepare()
            assert admin.execute("SELECT count(*) FROM pg_prepared_xacts").fetchone() == (1,)
        assert rows(admin) == []
        if end == "recovered":
            pid = pid_of(db)
        elif end == "rollback":
            conn.tpc_rollback()
        else:
            conn.tpc_commit()
    if end == "recovered":
        with Handler(group, tenant="acme") as db:
            assert pid_of(db) != pid  # a prepared transaction that is not finished closes the connection
            conn = db.connection
            [xid] = conn.tpc_recover()
            conn.tpc_commit(xid)
    assert rows(admin) == ([] if end == "rollback" else [(1, "acme")])
    with Handler(group, tenant="zeta") as db:
        assert db.fetchval(TENANT) == "zeta"


def test_two_phase_commit_is_refused_in_autocommit_mode() -> None:
    with Handler("auto") as db, pytest.raises(psycopg.ProgrammingError, match="autocommit"):
        db.connection.tpc_begin("x")


@pytest.mark.parametrize("end", ["tpc_prepare", "tpc_commit"])
@pytest.mark.parametrize("kept", [True, False])
def test_a_failed_two_phase_transaction_is_neither_prepared_nor_committed(
    admin: Any, end: str, kept: bool
) -> None:
    with Connection.getconn("manual") if kept else Handler("manual") as taken:
        conn = taken if kept else taken.connection
        conn.tpc_begin("x")
        conn.execute(INSERT, (1,))
        with pytest.raises(psycopg.DataError):
            conn.execute("SELECT 1 / 0")
        with pytest.raises(TransactionAbortedError, match="failed"):
            getattr(conn, end)()
        conn.tpc_begin("x")
        conn.execute(INSERT, (2,))
        conn.tpc_prepare()
        conn.tpc_commit()
    assert rows(admin) == [(2, "")]


def test_two_phase_transactions_of_a_kept_connection_have_the_tenant_of_their_begin(admin: Any) -> None:
    with pgdbpool.tenant("before"):
        conn = Connection.getconn("manual")
    for number, tenant in enumerate(("a", "b")):
        with pgdbpool.tenant(tenant):
            conn.tpc_begin("x")
            conn.execute(INSERT, (number,))
        with pgdbpool.tenant("other"), pytest.raises(TenantConflictError):
            conn.execute(INSERT, (9,))
        conn.tpc_prepare()
        conn.tpc_commit()
    conn.tenant = "own"
    conn.tpc_begin("x")
    conn.execute(INSERT, (2,))
    conn.tpc_commit()
    conn.close()
    assert rows(admin) == [(0, "a"), (1, "b"), (2, "own")]


def test_a_kept_connection_that_was_lost_begins_and_ends_two_phase_transactions_on_another(
    admin: Any,
) -> None:
    with Connection.getconn("manual") as conn:
        kill_backends(admin, conn.info.backend_pid)
        conn.tpc_begin("x")
        conn.execute(INSERT, (1,))
        conn.tpc_prepare()
        conn.close()
    with Connection.getconn("manual") as conn:
        kill_backends(admin, conn.info.backend_pid)
        conn.tpc_commit("x")
    assert rows(admin) == [(1, "")]


@pytest.mark.parametrize("end", ["tpc_prepare", "tpc_commit"])
def test_a_two_phase_step_that_was_not_sent_is_not_maybe_committed(admin: Any, end: str) -> None:
    with Handler("manual") as db:
        conn = db.connection
        conn.tpc_begin("x")
        conn.execute(INSERT, (1,))
        kill_backends(admin, pid_of(db))
        with pytest.raises(ConnectionLostError):
            conn.execute("SELECT 1")
        with pytest.raises(ConnectionLostError) as caught:
            getattr(conn, end)()
        assert not caught.value.maybe_committed
        db.rollback()


def test_a_lost_commit_of_a_prepared_transaction_is_maybe_committed_and_can_be_recovered(admin: Any) -> None:
    with Connection.getconn("manual") as conn:
        conn.tpc_begin("x")
        conn.execute(INSERT, (1,))
        conn.tpc_prepare()
        kill_backends(admin, conn.info.backend_pid)
        with pytest.raises(ConnectionLostError) as caught:
            conn.tpc_commit()
        assert caught.value.maybe_committed
        [xid] = conn.tpc_recover()
        conn.rollback()
        conn.tpc_commit(xid)
    assert rows(admin) == [(1, "")]


def test_a_two_phase_transaction_that_is_left_open_is_not_committed(admin: Any) -> None:
    with pytest.raises(psycopg.ProgrammingError, match="two-phase"), Handler("manual") as db:
        db.connection.tpc_begin("x")
        db.query("INSERT INTO t VALUES (1)")
    with pytest.raises(RuntimeError), Handler("manual") as db:
        db.connection.tpc_begin("x")
        db.query("INSERT INTO t VALUES (1)")
        raise RuntimeError
    assert rows(admin) == []


@pytest.mark.parametrize("cut", ["before", "after"])
@pytest.mark.parametrize("step", ["PREPARE TRANSACTION", "COMMIT PREPARED", "ROLLBACK PREPARED"])
def test_a_lost_step_of_two_phases_says_what_it_may_have_done(
    node: Node, mode: str, proxy_to: Any, admin: Any, group: str, step: str, cut: str
) -> None:
    proxy = proxy_to(node)
    auto = {"connection_count": 1, "tenant": {"setting": "app.tenant", "verify": "off"}}
    groups = {"auto": auto, "manual": {**auto, "autocommit": False}}
    Connection.init(config([server(node, port=proxy.port)], mode, **groups))
    with pytest.raises(ConnectionLostError) as caught, Handler(group, tenant="acme") as db:
        conn = db.connection
        conn.autocommit = False
        conn.tpc_begin(conn.xid(1, "lost", cut))
        conn.execute(INSERT, (1,))
        if step != "PREPARE TRANSACTION":
            conn.tpc_prepare()
        (proxy.cut_before if cut == "before" else proxy.cut_after)(step.encode())
        if step == "PREPARE TRANSACTION":
            conn.tpc_prepare()
        elif step == "COMMIT PREPARED":
            conn.tpc_commit()
        else:
            conn.tpc_rollback()
    error = caught.value
    assert (error.maybe_committed, error.maybe_executed) == (
        (False, True) if step == "ROLLBACK PREPARED" else (True, error.maybe_executed)
    )
    assert not error.repeatable
    with Handler(group, tenant="zeta") as db:
        assert db.fetchval(TENANT) == "zeta"
    left = admin.execute("SELECT count(*) FROM pg_prepared_xacts").fetchone()
    assert left == ((step == "PREPARE TRANSACTION") is (cut == "after"),)
    assert rows(admin) == ([(1, "acme")] if (step, cut) == ("COMMIT PREPARED", "after") else [])


# Notifications, and contexts in the wrong order.


def test_notifies_with_a_timeout_of_zero_returns_at_once(group: str) -> None:
    with Handler(group) as db:
        conn = db.connection
        conn.execute("LISTEN here")
        conn.commit()
        pid = pid_of(db)
        assert list(conn.notifies(timeout=0)) == []
        conn.execute("NOTIFY here, 'now'")
        conn.commit()
        assert [n.payload for n in conn.notifies(timeout=0)] == ["now"]
        assert pid_of(db) == pid


def cross(conn: Any) -> None:
    first, second = conn.transaction(), conn.transaction()
    first.__enter__()
    conn.execute("INSERT INTO t VALUES (1)")
    second.__enter__()
    for context in (first, second):
        with pytest.raises(OutOfOrderTransactionNesting):
            context.__exit__(None, None, None)


def test_contexts_left_in_the_wrong_order_raise_and_the_block_goes_on(group: str, admin: Any) -> None:
    with Handler(group, tenant="acme") as db:
        pid = pid_of(db)
        cross(db.connection)
        assert db.fetchval(TENANT) == "acme"
        db.connection.rollback()
        assert db.fetchval("SELECT count(*) FROM t") == 0
        assert pid_of(db) == pid


@pytest.mark.parametrize("end", ["commit", "block"])
def test_a_transaction_left_open_by_contexts_in_the_wrong_order_is_not_committed(
    group: str, admin: psycopg.Connection[Any], end: str
) -> None:
    with pytest.raises(pgdbpool.TransactionAbortedError, match="wrong order"), Handler(group) as db:
        cross(db.connection)
        if end == "commit":
            db.commit()
    assert rows(admin) == []
    with Handler(group) as db:
        db.query("INSERT INTO t VALUES (2)")
    assert rows(admin) == [(2, None)]


# Errors in pipelines.


def fails_early(conn: Any) -> None:
    with conn.pipeline():
        conn.execute("SELECT 1 / 0")
        for i in range(300):
            conn.execute("SELECT repeat('x', 1000), %s::int", (i,))


def test_an_error_in_a_pipeline_keeps_the_connection(group: str) -> None:
    with Handler(group, tenant="acme") as db:
        pid = pid_of(db)
        for _ in range(10):
            with pytest.raises(psycopg.errors.DivisionByZero) as caught:
                fails_early(db.connection)
            assert isinstance(caught.value, DBQueryError)
            db.rollback()
            assert db.fetchval(TENANT) == "acme"
        assert pid_of(db) == pid


def test_a_savepoint_around_a_pipeline_that_fails_helps(admin: Any) -> None:
    with Handler("manual") as db:
        db.query("INSERT INTO t VALUES (1)")
        with pytest.raises(psycopg.errors.DivisionByZero), db.transaction():
            fails_early(db.connection)
        db.query("INSERT INTO t VALUES (2)")
    assert [i for i, _ in rows(admin)] == [1, 2]


def test_a_connection_lost_in_a_pipeline_loses_no_transaction_that_was_not_open(admin: Any) -> None:
    with Handler("plain") as db:
        with pytest.raises(psycopg.OperationalError), db.pipeline():
            kill_backends(admin, db.connection.info.backend_pid)
            for _ in range(100):
                db.query("SELECT 1")
        assert db.fetchval("SELECT 1") == 1
        with pytest.raises(psycopg.OperationalError), db.transaction(), db.pipeline():
            kill_backends(admin, db.connection.info.backend_pid)
            for _ in range(100):
                db.query("SELECT 1")


def test_a_copy_that_a_pipeline_refuses_does_not_hang(group: str) -> None:
    with pytest.raises(psycopg.Error), Handler(group) as db, db.pipeline():
        db.query("COPY t FROM STDIN").fetchall()
    with Handler(group) as db:
        assert db.fetchval("SELECT 1") == 1


# After the block, after a loss, after a failure.

FETCHES: dict[str, Callable[[Any], Any]] = {
    "fetchone": lambda cursor: cursor.fetchone(),
    "fetchmany": lambda cursor: cursor.fetchmany(1),
    "fetchall": lambda cursor: cursor.fetchall(),
    "next": next,
    "scroll": lambda cursor: cursor.scroll(0),
}


@pytest.mark.parametrize("fetch", FETCHES)
def test_fetching_after_the_block_is_refused_by_its_own_error(group: str, fetch: str) -> None:
    with Handler(group) as db, db.transaction():
        cursors: list[Any] = [db.query("SELECT 1"), db.cursor(), db.cursor("named").execute("SELECT 1")]
    with Handler(group) as db, db.pipeline():
        db.query("SELECT 1")
        for cursor in cursors:
            with pytest.raises(BlockClosedError):
                FETCHES[fetch](cursor)
    cursors[-1].close()


def test_a_statement_on_a_connection_that_is_known_to_be_lost_says_so(group: str, admin: Any) -> None:
    with Handler(group) as db:
        conn = db.connection
        cursor = conn.cursor()
        kill_backends(admin, pid_of(db))
        for _ in range(2):
            with pytest.raises(ConnectionLostError) as caught:
                conn.execute("INSERT INTO t VALUES (1)")
            with pytest.raises(ConnectionLostError):
                cursor.execute("SELECT 1")
        assert not caught.value.maybe_executed
        db.rollback()


def test_the_query_is_known_after_executemany(group: str) -> None:
    with Handler(group, tenant="acme") as db:
        cursor = db.connection.cursor()
        cursor.executemany("INSERT INTO t VALUES (%s)", [(1,), (2,)])
        assert cursor._query.query == b"INSERT INTO t VALUES ($1)"
        assert cursor._query.params == [b"\0\2"]


def test_the_message_of_a_failure_is_there_until_the_next_statement(group: str) -> None:
    statement = "SELECT 1 / i FROM (SELECT %s::int AS i) AS v"
    with Handler(group, tenant="acme") as db:
        conn = db.connection
        assert conn.info.error_message == ""
        for _ in range(2):
            with pytest.raises(psycopg.errors.DivisionByZero) as caught:
                conn.execute(statement, (0,))
            assert "division by zero" in conn.info.error_message
            assert conn.info.error_message == f"ERROR:  {caught.value}\n"
            db.rollback()
            conn.execute(statement, (1,))
            assert conn.info.error_message == ""

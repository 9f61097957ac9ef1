"""Cursors of psycopg's classes and of the application's take part in the block as the block's own do."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from support import config, kill_backends, pid_of, server

import pgdbpool
from pgdbpool import BlockClosedError, Connection, ConnectionLostError, DBQueryError, Handler
from pgdbpool.cluster import Cluster

TENANT = "SELECT current_setting('app.tenant', true)"


class OwnCursor(psycopg.ClientCursor[Any]):
    """As Django's default is."""


CLASSES: list[type[psycopg.Cursor[Any]]] = [
    psycopg.Cursor,
    psycopg.ClientCursor,
    psycopg.RawCursor,
    OwnCursor,
]
SERVER_CLASSES: list[Any] = [psycopg.ServerCursor, psycopg.RawServerCursor]


@pytest.fixture
def start(known_cluster: Cluster, mode: str) -> Iterator[Callable[..., None]]:
    """Initialise groups of one connection, `auto` and `manual`, and a table `t` of numbers."""
    node = known_cluster.primary

    def init(entry: dict[str, Any] | None = None) -> None:
        one = {
            "connection_count": 1,
            "row_factory": "tuple",
            "tenant": {"setting": "app.tenant", "verify": "off", "required": False},
        }
        manual = {**one, "autocommit": False}
        plain = {"connection_count": 1}
        Connection.init(config([entry or server(node)], mode, auto=one, manual=manual, plain=plain))

    with node.connect() as admin:
        admin.execute("CREATE TABLE t (i int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    yield init
    Connection.reset()


@pytest.fixture(params=["auto", "manual"])
def group(request: pytest.FixtureRequest, start: Callable[..., None]) -> str:
    """A group of each kind."""
    start()
    return str(request.param)


def numbers(node: Any) -> list[int]:
    with node.connect() as admin:
        return [i for (i,) in admin.execute("SELECT i FROM t ORDER BY i")]


def by_itself(cls: Any, db: Handler) -> Any:
    return cls(db.connection)


def by_factory(cls: Any, db: Handler) -> Any:
    db.connection.cursor_factory = cls
    return db.connection.cursor()


@pytest.mark.parametrize("make", [by_itself, by_factory])
@pytest.mark.parametrize("cls", CLASSES)
def test_each_of_its_statements_has_the_tenant(group: str, cls: Any, make: Callable[..., Any]) -> None:
    for tenant in ("acme", "zeta"):
        with Handler(group, tenant=tenant) as db:
            cursor = make(cls, db)
            assert type(cursor) is cls
            for _ in range(3):
                assert cursor.execute(TENANT).fetchone() == (tenant,)
            assert list(cursor.stream(TENANT)) == [(tenant,)]
            with cursor.copy(f"COPY ({TENANT}) TO STDOUT") as copy:
                assert b"".join(map(bytes, copy)) == tenant.encode() + b"\n"
            mark = "$1" if cls is psycopg.RawCursor else "%s"
            cursor.executemany(f"{TENANT} || {mark}::text", [("1",), ("2",)], returning=True)
            assert [result.fetchone() for result in cursor.results()] == [(f"{tenant}1",), (f"{tenant}2",)]
            if cls is OwnCursor:
                several = cursor.execute(f"{TENANT}; {TENANT} || %s", ("!",))
                assert [result.fetchone() for result in several.results()] == [(tenant,), (f"{tenant}!",)]
    with Handler(group) as db:
        assert by_itself(cls, db).execute(TENANT).fetchone() in [(None,), ("",)]


@pytest.mark.parametrize("cls", CLASSES)
def test_its_transaction_is_the_blocks(group: str, cls: Any, known_cluster: Cluster) -> None:
    def write(*values: int) -> None:
        with Handler(group, tenant="acme") as db:
            cls(db.connection).execute(f"INSERT INTO t VALUES ({values[0]})")
            with cls(db.connection).copy("COPY t FROM STDIN") as copy:
                copy.write_row((values[1],))
            mark = "$1" if cls is psycopg.RawCursor else "%s"
            cls(db.connection).executemany(f"INSERT INTO t VALUES ({mark})", [(i,) for i in values[2:]])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write(1, 2, 3, 4)
    assert numbers(known_cluster.primary) == ([1, 2, 3, 4] if group == "auto" else [])


@pytest.mark.slow
@pytest.mark.parametrize("cls", CLASSES)
def test_its_errors_are_the_blocks_and_the_next_statement_is_well(group: str, cls: Any) -> None:
    with Handler(group, tenant="acme") as db:
        cursor = cls(db.connection)
        with pytest.raises(psycopg.errors.UndefinedTable) as caught:
            cursor.execute("SELECT * FROM nowhere")
        assert isinstance(caught.value, DBQueryError)
        db.rollback()
        assert cursor.execute(TENANT).fetchone() == ("acme",)
        with pytest.raises(psycopg.errors.DivisionByZero):
            list(cursor.stream("SELECT 1 / (3 - i) FROM generate_series(1, 5) AS i"))
        db.rollback()
        assert cursor.execute(TENANT).fetchone() == ("acme",)
        for i, _ in enumerate(cursor.stream("SELECT generate_series(1, 100000)")):
            if i == 3:
                break
        db.rollback()
    with Handler(group, tenant="zeta") as db:
        assert db.fetchval(TENANT) == "zeta"


def test_a_commit_that_the_server_refuses_is_an_error(group: str, known_cluster: Cluster) -> None:
    with Handler(group, tenant="acme") as db, pytest.raises(psycopg.errors.UniqueViolation):
        cursor = psycopg.ClientCursor(db.connection)
        cursor.execute("INSERT INTO t VALUES (1), (1)")
        db.commit()
    assert numbers(known_cluster.primary) == []


def test_a_commit_of_a_failed_transaction_is_an_error(start: Callable[..., None]) -> None:
    start()
    with Handler("manual", tenant="acme") as db:
        cursor = psycopg.ClientCursor(db.connection)
        with pytest.raises(psycopg.errors.UndefinedTable):
            cursor.execute("SELECT * FROM nowhere")
        with pytest.raises(pgdbpool.TransactionAbortedError):
            cursor.execute("COMMIT")
        assert cursor.execute(TENANT).fetchone() == ("acme",)
        cursor.execute("COMMIT AND CHAIN")
        assert cursor.execute(TENANT).fetchone() == ("acme",)


@pytest.mark.parametrize("cls", SERVER_CLASSES)
def test_a_server_side_cursor_has_the_tenant(start: Callable[..., None], cls: Any) -> None:
    start()
    with Handler("manual", tenant="acme") as db:
        with cls(db.connection, "mine") as cursor:
            cursor.execute(f"{TENANT} FROM generate_series(1, 3)")
            assert cursor.fetchall() == [("acme",)] * 3
        db.connection.server_cursor_factory = cls
        with db.connection.cursor("other") as cursor:
            assert type(cursor) is cls
            assert cursor.execute(TENANT).fetchone() == ("acme",)
    with Handler("auto", tenant="acme") as db:
        with (
            cls(db.connection, "mine") as cursor,
            pytest.raises(psycopg.NotSupportedError, match="transaction"),
        ):
            cursor.execute(TENANT)
        with cls(db.connection, "held", withhold=True) as cursor:
            assert cursor.execute(TENANT).fetchone() == ("acme",)
        with db.transaction(), cls(db.connection, "mine") as cursor:
            assert cursor.execute(TENANT).fetchone() == ("acme",)


@pytest.mark.parametrize("cls", CLASSES)
def test_it_is_refused_after_its_block(group: str, cls: Any) -> None:
    with Handler(group) as db:
        cursor = cls(db.connection)
        cursor.execute("SELECT 1")
        pid = pid_of(db)
    for use in (
        cursor.execute,
        lambda sql: cursor.executemany(sql, [()]),
        lambda sql: next(cursor.stream(sql)),
    ):
        with pytest.raises(BlockClosedError):
            use("SELECT 1")
    with Handler(group) as db:
        assert pid_of(db) == pid


def test_a_lost_connection_is_noted(group: str, known_cluster: Cluster) -> None:
    with known_cluster.primary.connect() as admin:
        with Handler(group, tenant="acme") as db:
            cursor = psycopg.ClientCursor(db.connection).execute("SELECT 1")
            kill_backends(admin, pid_of(db))
            with pytest.raises(ConnectionLostError) as caught:
                cursor.execute("INSERT INTO t VALUES (1)")
            assert not caught.value.maybe_committed
            assert not caught.value.maybe_executed
            if group == "manual":
                with pytest.raises(pgdbpool.TransactionAbortedError):
                    db.query("SELECT 1")
                db.rollback()
            assert db.fetchval(TENANT) == "acme"


def test_a_transaction_that_is_lost_in_its_first_statement_is_noted(start: Callable[..., None]) -> None:
    start()
    with Handler("manual", tenant="acme") as db:
        with pytest.raises(ConnectionLostError):
            psycopg.ClientCursor(db.connection).execute("SELECT pg_terminate_backend(pg_backend_pid())")
        with pytest.raises(pgdbpool.TransactionAbortedError):
            db.query("SELECT 1")
        db.rollback()
        assert db.fetchval(TENANT) == "acme"


def test_a_statement_inside_of_its_stream_is_refused_and_does_not_hang(group: str) -> None:
    with Handler(group, tenant="acme") as db:
        cursor = psycopg.ClientCursor(db.connection)
        for _ in cursor.stream("SELECT generate_series(1, 3)"):
            with pytest.raises(psycopg.ProgrammingError, match="still open in this thread"):
                db.query("SELECT 1")
        assert db.fetchval(TENANT) == "acme"


def test_the_lock_knows_whether_it_is_held(group: str) -> None:
    with Handler(group) as db:
        conn = db.connection
        assert not conn.lock.locked()
        with conn.lock:
            assert conn.lock.locked()
        assert not conn.lock.locked()
        for _ in db.cursor().stream("SELECT 1"):
            assert conn.lock.locked()


def test_preparations_due_take_their_own_round_trip(
    start: Callable[..., None], known_cluster: Cluster, proxy_to: Any
) -> None:
    proxy = proxy_to(known_cluster.primary)
    start(server(known_cluster.primary, port=proxy.port))
    counts = []
    for name, tenant in (("plain", None), ("auto", "acme"), ("manual", "acme")):
        with Handler(name, tenant=tenant) as db:
            conn = db.connection
            conn.execute("SELECT 1")  # with the cleaning
            conn.commit()
            proxy.reset_counts()
            for _ in range(2):
                psycopg.ClientCursor(conn).execute("SELECT 1")
        counts.append(proxy.round_trips)
    # A plain statement; BEGIN with the tenant, the statement, COMMIT; BEGIN with the tenant, and one COMMIT.
    assert counts == [2, 6, 4]


def test_a_server_cursor_that_is_refused_outside_of_the_block_is_dropped_in_silence(
    group: str, monkeypatch: Any
) -> None:
    unheard: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unheard.append)
    with Handler(group) as db:
        conn = db.connection
        factory = conn.server_cursor_factory
    with pytest.raises(BlockClosedError):
        factory(conn, "refused")
    gc.collect()
    assert unheard == []

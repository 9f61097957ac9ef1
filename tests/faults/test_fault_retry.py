"""A connection that is lost with a statement or a COMMIT under way: what is sent again, what the error says.

The proxy cuts it at the exact place: before the server has what was sent, or after the server has done it and
before the client has the answer. The client cannot tell the one from the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from support import config, server

import pgdbpool
from pgdbpool import Connection, Handler

CUTS = ["cut_before", "cut_after"]


@pytest.fixture
def proxy(known_cluster: Any, proxy_to: Any, mode: str) -> Iterator[Any]:
    """The proxy to a primary with an empty table `t`, and groups `auto` and `manual` over it."""
    known_cluster.primary.execute("CREATE TABLE t (i int)")
    proxy = proxy_to(known_cluster.primary)
    groups: dict[str, dict[str, Any]] = {
        "auto": {"connection_count": 2},
        "manual": {"connection_count": 2, "autocommit": False},
        "tenants": {
            "connection_count": 2,
            "autocommit": False,
            "tenant": {"setting": "app.tenant", "verify": "off", "required": False},
        },
    }
    Connection.init(config([server(known_cluster.primary, port=proxy.port)], mode, **groups))
    yield proxy
    Connection.reset()


@pytest.fixture
def rows(known_cluster: Any, proxy: Any) -> Callable[[], list[int]]:
    return lambda: [i for (i,) in known_cluster.primary.execute("SELECT i FROM t ORDER BY i")]


@pytest.mark.parametrize("cut", CUTS)
def test_an_autocommit_statement_is_not_sent_again_and_may_have_run(proxy: Any, rows: Any, cut: str) -> None:
    with Handler("auto") as db:
        getattr(proxy, cut)(b"INSERT")
        with pytest.raises(pgdbpool.ConnectionLostError) as caught:
            db.query("INSERT INTO t VALUES (1)")
        assert caught.value.maybe_executed
        assert not caught.value.maybe_committed
        db.query("INSERT INTO t VALUES (2)")  # the block goes on, on another connection
    assert proxy.cuts == 1
    assert rows() == ([2] if cut == "cut_before" else [1, 2])


@pytest.mark.parametrize("cut", CUTS)
def test_the_first_statement_of_a_transaction_is_sent_again_and_counts_once(
    proxy: Any, rows: Any, cut: str
) -> None:
    with Handler("manual") as db:
        getattr(proxy, cut)(b"INSERT")
        db.query("INSERT INTO t VALUES (%s)", (1,))
        db.query("INSERT INTO t VALUES (2)")
    assert proxy.cuts == 1
    assert rows() == [1, 2]


@pytest.mark.parametrize("cut", CUTS)
def test_a_later_statement_of_a_transaction_is_not_sent_again_and_has_no_effect(
    proxy: Any, rows: Any, cut: str
) -> None:
    with pytest.raises(pgdbpool.ConnectionLostError) as caught, Handler("manual") as db:
        db.query("INSERT INTO t VALUES (1)")
        getattr(proxy, cut)(b"VALUES (2)")
        db.query("INSERT INTO t VALUES (2)")
    assert not caught.value.maybe_executed
    assert not caught.value.maybe_committed
    assert proxy.cuts == 1
    assert rows() == []


@pytest.mark.parametrize("how", ["exit", "commit", "text", "transaction"])
@pytest.mark.parametrize("cut", CUTS)
def test_a_commit_is_never_sent_again_and_may_have_happened(
    proxy: Any, rows: Any, cut: str, how: str
) -> None:
    group = "auto" if how == "transaction" else "manual"
    with pytest.raises(pgdbpool.ConnectionLostError) as caught, Handler(group) as db:
        if how == "transaction":
            with db.transaction():
                db.query("INSERT INTO t VALUES (1)")
                getattr(proxy, cut)(b"COMMIT")
        else:
            db.query("INSERT INTO t VALUES (1)")
            getattr(proxy, cut)(b"COMMIT")
            if how == "commit":
                db.commit()
            elif how == "text":
                db.query("COMMIT")
    assert caught.value.maybe_committed
    assert proxy.cuts == 1
    assert rows() == ([] if cut == "cut_before" else [1])
    status = Connection.status().groups[group]
    assert (status.in_use, status.waiting) == (0, 0)


def test_a_statement_that_ran_into_its_deadline_is_not_sent_again(
    proxy: Any, rows: Any, known_cluster: Any, mode: str
) -> None:
    entry = server(known_cluster.primary, port=proxy.port, query_timeout=100)
    Connection.init(config([entry], mode, manual={"connection_count": 1, "autocommit": False}))
    with pytest.raises(pgdbpool.QueryDeadlineError), Handler("manual") as db:
        proxy.stall()
        db.query("INSERT INTO t VALUES (1)")
    proxy.resume()
    assert rows() == []


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("target", ["standby", "read-only"])
def test_a_statement_of_a_read_only_group_is_sent_again(
    known_cluster: Any, proxy_to: Any, mode: str, target: str, cut: str
) -> None:
    proxy = proxy_to(known_cluster.standbys[0])
    entry = server(known_cluster.standbys[0], port=proxy.port)
    Connection.init(config([entry], mode, g={"connection_count": 2, "target": target}))
    try:
        with Handler("g") as db:
            getattr(proxy, cut)(b"SELECT 41")
            assert db.query("SELECT 41 + 1").fetchone()[0] == 42
            with pytest.raises(pgdbpool.DBQueryError), db.transaction():
                db.query("SELECT 1")
                getattr(proxy, cut)(b"SELECT 43")
                with pytest.raises(pgdbpool.ConnectionLostError):
                    db.query("SELECT 43 + 1")  # what came before it in the transaction is gone
            db.connection.execute("SET work_mem = '1MB'")
            getattr(proxy, cut)(b"SELECT 45")
            with pytest.raises(pgdbpool.ConnectionLostError):
                db.query("SELECT 45 + 1")  # so is what the block has set
        assert proxy.cuts == 3
    finally:
        Connection.reset()


@pytest.mark.parametrize("cut", CUTS)
def test_a_statement_of_a_group_whose_settings_forbid_writes_is_sent_again(
    known_cluster: Any, proxy_to: Any, mode: str, cut: str
) -> None:
    proxy = proxy_to(known_cluster.primary)
    entry = server(known_cluster.primary, port=proxy.port)
    forbid = {"default_transaction_read_only": "on"}
    groups = {"reads": {"connection_count": 1, "settings": forbid}, "any": {"connection_count": 1}}
    Connection.init(config([entry], mode, **groups))
    try:
        for group, block in (("reads", {}), ("any", {"settings": forbid})):
            with Handler(group, **block) as db:
                getattr(proxy, cut)(b"SELECT 41")
                assert db.query("SELECT 41 + 1").fetchone()[0] == 42
                with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                    db.query("CREATE TABLE t (i int)")
        getattr(proxy, cut)(b"SELECT 43")
        assert Connection.fetchval("reads", "SELECT 43 + 1") == 44
        conn = Connection.getconn("reads")
        getattr(proxy, cut)(b"SELECT 45")
        assert conn.execute("SELECT 45 + 1").fetchone()[0] == 46
        conn.close()
        with Handler("any") as db, pytest.raises(pgdbpool.ConnectionLostError):
            getattr(proxy, cut)(b"SELECT 47")
            db.query("SELECT 47 + 1")
        assert proxy.cuts == 5
    finally:
        Connection.reset()


ENDED = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = pg_backend_pid() AND backend_start < %s
"""
"""Ends its own session, if it began before a moment; else it has no row."""


def by_handler(moment: object) -> None:
    with Handler("manual") as db:
        assert db.query(ENDED, (moment,)).fetchall() == []


def by_executemany(moment: object) -> None:
    with Handler("manual") as db:
        assert db.fetchmany(ENDED, [(moment,), (moment,)]) == []


def by_connection(moment: object) -> None:
    with Connection.getconn("manual") as conn:
        assert conn.execute(ENDED, (moment,)).fetchall() == []


def by_one_shot(moment: object) -> None:
    assert Connection.fetch("reads", ENDED, (moment,)) == []


WAYS = [by_handler, by_executemany, by_connection, by_one_shot]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at_once", [True, False])
def test_connections_that_the_same_event_ends_do_not_count(
    known_cluster: Any, mode: str, way: Callable[[object], None], at_once: bool, monkeypatch: Any
) -> None:
    monkeypatch.setattr("pgdbpool._session.resending.SAME_EVENT", 10.0 if at_once else 0.0)
    every = {"connection_count": 3, "min_size": 3}
    reads = {**every, "settings": {"default_transaction_read_only": "on"}}
    groups = {"manual": {**every, "autocommit": False}, "reads": reads}
    Connection.init(config([known_cluster.primary], mode, **groups))
    try:
        moment = known_cluster.primary.execute("SELECT clock_timestamp()")[0][0]
        if at_once:  # three sessions are lost, the fourth answers
            way(moment)
        else:
            with pytest.raises(pgdbpool.ConnectionLostError):
                way(moment)
        retries = sum(group.retries for group in Connection.status().groups.values())
        assert retries == (3 if at_once else 1)
    finally:
        Connection.reset()


def roll_back_to(db: Any) -> None:
    """Undo a part of the open transaction, as the savepoints of SQLAlchemy and Django do."""
    db.execute("SAVEPOINT s")
    db.execute("INSERT INTO t VALUES (9)")
    db.execute("ROLLBACK TO SAVEPOINT s")


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("group", ["manual", "tenants"])
def test_after_a_rollback_to_a_savepoint_nothing_is_sent_again(
    proxy: Any, rows: Any, group: str, many: bool, cut: str
) -> None:
    def insert(db: Any) -> None:
        getattr(proxy, cut)(b"INSERT")
        if many:
            with db.cursor() as cursor:
                cursor.executemany("INSERT INTO t VALUES (%s)", [(2,), (3,)])
        else:
            db.execute("INSERT INTO t VALUES (2)")

    with pgdbpool.tenant("a" if group == "tenants" else None):
        with pytest.raises(pgdbpool.ConnectionLostError) as caught, Handler(group) as db:
            db.execute("INSERT INTO t VALUES (1)")
            roll_back_to(db)
            insert(db)
        assert not caught.value.maybe_committed
        with Connection.getconn(group) as conn:
            conn.execute("INSERT INTO t VALUES (1)")
            roll_back_to(conn)
            with pytest.raises(pgdbpool.ConnectionLostError):
                insert(conn)
            with pytest.raises(pgdbpool.TransactionAbortedError):
                conn.commit()
            conn.rollback()
    assert rows() == []


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("statement", ["ROLLBACK", "ROLLBACK TO SAVEPOINT s"])
def test_a_lost_rollback_has_committed_nothing(proxy: Any, rows: Any, statement: str, cut: str) -> None:
    with Connection.getconn("manual") as conn:
        conn.execute("INSERT INTO t VALUES (1)")
        conn.execute("SAVEPOINT s")
        getattr(proxy, cut)(b"ROLLBACK")
        with pytest.raises(pgdbpool.ConnectionLostError) as caught:
            conn.execute(statement)
        assert (caught.value.maybe_committed, caught.value.maybe_executed) == (False, False)
        conn.rollback()
        conn.execute("SAVEPOINT s")
        getattr(proxy, cut)(b"ROLLBACK")
        with pytest.raises(pgdbpool.ConnectionLostError) as caught:
            conn.execute("ROLLBACK; INSERT INTO t VALUES (2)")  # which the end of the text commits
        assert caught.value.maybe_committed
        conn.rollback()
    assert rows() == ([2] if cut == "cut_after" else [])

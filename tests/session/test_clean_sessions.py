"""A borrower sees nothing of the last one's, at no round trip of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from psycopg.types.string import StrDumper
from support import config, pid_of, server, wait_for

from pgdbpool import Connection, Handler


@pytest.fixture(params=["threaded", "non-threaded"])
def start(request: pytest.FixtureRequest, known_cluster: Any, proxy_to: Any) -> Iterator[Callable[..., Any]]:
    """Initialise groups `auto` and `manual` of one connection each behind a counting proxy."""
    known_cluster.primary.execute("CREATE ROLE other; CREATE TABLE t (i serial)")
    proxy = proxy_to(known_cluster.primary)
    entry = server(known_cluster.primary, port=proxy.port)

    def init(**changes: Any) -> Any:
        auto = {"connection_count": 1, "timeout": 5, **changes}
        groups = {"auto": auto, "manual": {**auto, "autocommit": False}}
        Connection.init(config([entry], request.param, **groups))
        return proxy

    yield init
    Connection.reset()
    known_cluster.primary.execute("DROP TABLE t; DROP ROLE other")


def value(db: Handler, sql: str) -> Any:
    return db.query(sql).fetchone()[0]


# What is left behind, and what shows it.
LEFT = {
    "setting": (["SET work_mem = '7MB'"], "SHOW work_mem", "4MB"),
    "setting by function": (["SELECT set_config('work_mem', '7MB', false)"], "SHOW work_mem", "4MB"),
    "custom setting": (
        ["SELECT set_config('app.x', 'secret', false)"],
        "SELECT coalesce(current_setting('app.x', true), '')",
        "",
    ),
    "role": (["SET ROLE other"], "SELECT current_user", "postgres"),
    "session user": (["SET SESSION AUTHORIZATION other"], "SELECT session_user", "postgres"),
    "search_path": (["SET search_path = pg_catalog"], "SHOW search_path", '"$user", public'),
    "timeout": (["SET statement_timeout = 60000"], "SHOW statement_timeout", "5s"),
    "temporary table": (
        ["CREATE TEMP TABLE mine (i int)"],
        "SELECT count(*) FROM pg_class WHERE relname = 'mine' AND relpersistence = 't'",
        0,
    ),
    "select into temporary": (
        ["SELECT 1 AS i INTO TEMPORARY mine"],
        "SELECT count(*) FROM pg_class WHERE relname = 'mine' AND relpersistence = 't'",
        0,
    ),
    "table in pg_temp": (
        ["CREATE TABLE pg_temp.mine (i int)"],
        "SELECT count(*) FROM pg_class WHERE relname = 'mine' AND relpersistence = 't'",
        0,
    ),
    "advisory lock": (
        ["SELECT pg_advisory_lock(1)"],
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
        0,
    ),
    "listen": (["LISTEN news"], "SELECT count(*) FROM pg_listening_channels()", 0),
    "prepared statement": (
        ["PREPARE mine AS SELECT 1"],
        "SELECT count(*) FROM pg_prepared_statements WHERE from_sql",
        0,
    ),
    "open cursor": (
        ["DECLARE mine CURSOR WITH HOLD FOR SELECT 1"],
        "SELECT count(*) FROM pg_cursors WHERE name = 'mine'",
        0,
    ),
    "by a DO block": (
        ["DO $$ BEGIN PERFORM set_config('work_mem', '7MB', false); END $$"],
        "SHOW work_mem",
        "4MB",
    ),
    "in one string": (["SELECT 1; SET work_mem = '7MB'"], "SHOW work_mem", "4MB"),
    "read only by default": (
        ["SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"],
        "SHOW transaction_read_only",
        "off",
    ),
    "isolation by default": (
        ["SET default_transaction_isolation = 'serializable'"],
        "SHOW transaction_isolation",
        "read committed",
    ),
    "a timeout too short to clean in": (["SET statement_timeout = 1"], "SHOW statement_timeout", "5s"),
}


@pytest.mark.parametrize("group", ["auto", "manual"])
@pytest.mark.parametrize("what", LEFT)
def test_nothing_of_the_last_borrower_is_left(start: Any, group: str, what: str) -> None:
    left, shows, clean = LEFT[what]
    proxy = start(prepare_threshold=None)
    with Handler(group) as db:
        for statement in left:
            db.query(statement)
    conn = Connection.group(group)
    proxy.reset_counts()
    with Handler(group) as db:
        assert value(db, shows) == clean
    assert proxy.round_trips == (1 if group == "auto" else 2)  # no more than without
    assert conn.status().discarded == {}
    with Handler(group) as db:
        assert value(db, shows) == clean


# What no statement cleans, and what shows it.
CLOSED = {
    "random numbers": ("SELECT setseed(0.5)", "SELECT random() = 0.9851677175347999", False),
    "random numbers by SET": ("SET seed = 0.5", "SELECT random() = 0.9851677175347999", False),
    "replication origin": (
        "SELECT pg_replication_origin_session_setup('here')",
        "SELECT pg_replication_origin_session_is_setup()",
        False,
    ),
    "temporary slot": (
        "SELECT pg_create_physical_replication_slot('mine', false, true)",
        "SELECT count(*) FROM pg_replication_slots WHERE active_pid = pg_backend_pid()",
        0,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("group", ["auto", "manual"])
@pytest.mark.parametrize("what", CLOSED)
def test_a_session_that_cannot_be_cleaned_is_not_lent_again(
    start: Any, known_cluster: Any, group: str, what: str
) -> None:
    left, shows, clean = CLOSED[what]
    known_cluster.primary.execute("SELECT pg_replication_origin_create('here')")
    try:
        start()
        with Handler(group) as db:
            pid = pid_of(db)
            db.query(left)
        with Handler(group) as db:
            assert value(db, shows) == clean
            assert pid_of(db) != pid
    finally:
        Connection.reset()
        gone = "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = %s)"
        with known_cluster.primary.connect() as admin:
            wait_for(lambda: admin.execute(gone, (pid,)).fetchone()[0])
            admin.execute("SELECT pg_replication_origin_drop('here')")


@pytest.mark.parametrize("group", ["auto", "manual"])
def test_the_limit_of_pg_trgm_is_the_blocks_own(start: Any, known_cluster: Any, group: str) -> None:
    try:
        known_cluster.primary.execute("CREATE EXTENSION pg_trgm")
    except psycopg.Error:
        pytest.skip("the server has no pg_trgm")
    start()
    with Handler(group) as db:
        limit = value(db, "SELECT show_limit()")
        db.query("SELECT set_limit(0.9)")
    with Handler(group) as db:
        assert value(db, "SELECT show_limit()") == limit
    known_cluster.primary.execute("DROP EXTENSION pg_trgm")


HIDDEN = r"SELECT '\'' ; SET work_mem = 7168; --'"
"""Two statements where a plain string has backslash escapes, and else one."""


@pytest.mark.parametrize("where", ["server", "session"])
@pytest.mark.parametrize("group", ["auto", "manual"])
def test_a_statement_behind_a_backslash_is_seen(
    start: Any, known_cluster: Any, group: str, where: str
) -> None:
    off = where == "server"
    if off:
        known_cluster.primary.execute("ALTER ROLE postgres SET standard_conforming_strings = off")
    start()
    for _ in range(2):
        with Handler(group) as db:
            if not off:
                db.query("SET standard_conforming_strings = off")
                db.commit()
            db.query(r"SELECT 'it''s \\ one'")  # one statement
            db.query(HIDDEN)
            assert value(db, "SHOW work_mem") == "7MB"
        with Handler(group) as db:
            if not off:
                assert db.query(HIDDEN).fetchone()[0] == r"\' ; SET work_mem = 7168; --"
            assert value(db, "SHOW work_mem") == "4MB"
    known_cluster.primary.execute("ALTER ROLE postgres RESET standard_conforming_strings")


@pytest.mark.parametrize("group", ["auto", "manual"])
def test_a_cleaning_is_not_undone_with_the_borrowers_transaction(start: Any, group: str) -> None:
    start()
    with Handler(group) as db:
        db.query("SET work_mem = '7MB'")
    with pytest.raises(psycopg.errors.DivisionByZero), Handler(group) as db:
        db.query("SELECT 1 / 0")
    with Handler(group) as db:
        assert value(db, "SHOW work_mem") == "4MB"


@pytest.mark.parametrize("group", ["auto", "manual"])
def test_a_blocks_own_settings_last_through_the_block(start: Any, group: str) -> None:
    start()
    with Handler(group) as db:
        db.query("SET work_mem = '5MB'")
    with Handler(group) as db:
        db.query("SET work_mem = '7MB'")
        db.commit()
        assert value(db, "SHOW work_mem") == "7MB"
        db.commit()
        assert value(db, "SHOW work_mem") == "7MB"


@pytest.mark.parametrize("how", ["connection", "cursor"])
@pytest.mark.parametrize("group", ["auto", "manual"])
def test_uses_of_the_connection_itself_are_cleaned_too(start: Any, group: str, how: str) -> None:
    start()
    with Handler(group) as db:
        conn = db.connection if how == "connection" else db.query("SELECT 1").connection
        pid = conn.info.backend_pid
        conn.pgconn.exec_(b"SET work_mem = '7MB'")
        conn.pgconn.exec_(b"PREPARE mine AS SELECT 1")
        conn.row_factory = dict_row
        conn.prepare_threshold = 0
        conn.prepared_max = 1
        conn.adapters.register_dumper(int, StrDumper)
        conn.add_notice_handler(print)
        conn.add_notify_handler(print)
        conn.cursor_factory = psycopg.ClientCursor  # type: ignore[assignment]
        if group == "manual":
            conn.rollback()
        conn.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        conn.read_only = True
        conn.autocommit = group != "auto"
    with Handler(group) as db:
        assert value(db, "SHOW work_mem") == "4MB"
        assert value(db, "SELECT count(*) FROM pg_prepared_statements WHERE from_sql") == 0
        assert db.query("SELECT pg_typeof(%s)::text AS a, 1 AS b", (1,)).fetchone()["a"] != "text"
        assert db.query("SELECT 1").fetchone()[0] == 1
        conn = db.connection
        assert conn.info.backend_pid == pid
        assert (conn.autocommit, conn.isolation_level, conn.read_only) == (group == "auto", None, None)
        assert (conn.prepare_threshold, conn.prepared_max) == (5, 100)
        assert (conn._notice_handlers, conn._notify_handlers) == ([], [])


def mark(conn: Any) -> None:
    conn.mine, conn.kept = "configured", []


@pytest.mark.parametrize("changes", [{}, {"slow_query": 5}, {"reset": "never"}], ids=lambda c: "".join(c))
@pytest.mark.parametrize("group", ["auto", "manual"])
def test_attributes_of_the_connection_are_its_blocks_alone(start: Any, group: str, changes: Any) -> None:
    start(configure=mark, **changes)
    with Handler(group) as db:
        conn = db.connection
        pid = conn.info.backend_pid
        conn.note, conn.mine, conn.execute = "of the first block", "changed", None  # type: ignore[attr-defined]
        del conn.kept
    for _ in range(2):
        with Handler(group) as db:
            conn = db.connection
            assert conn.execute("SELECT pg_backend_pid()").fetchone() == (pid,)
            assert (hasattr(conn, "note"), conn.mine, conn.kept) == (False, "configured", [])  # type: ignore[attr-defined]


def test_the_prepared_statements_of_sqlprepare_stay(start: Any, known_cluster: Any) -> None:
    known_cluster.primary.execute("""
        CREATE SCHEMA "SQLPrepare";
        CREATE FUNCTION "SQLPrepare"."PrepareQueries"() RETURNS void LANGUAGE plpgsql AS
            $$ BEGIN EXECUTE 'PREPARE "it''s" AS SELECT 1'; END $$""")
    start(sqlprepare=True)
    with Handler("auto") as db:
        db.query("PREPARE mine AS SELECT 1")
    with Handler("auto") as db:
        rows = db.query("SELECT name FROM pg_prepared_statements WHERE from_sql").fetchall()
    assert rows == [("it's",)]


def test_psycopgs_own_prepared_statements_stay(start: Any) -> None:
    start(prepare_threshold=1)
    for _ in range(4):
        with Handler("auto") as db:
            db.query("SELECT %s::int + 1", (1,))
            db.query("SET work_mem = '7MB'")
    with Handler("auto") as db:
        assert value(db, "SELECT count(*) FROM pg_prepared_statements WHERE NOT from_sql") >= 1
        assert db.query("SELECT %s::int + 1", (1,)).fetchone()[0] == 2


def test_a_session_that_cannot_be_cleaned_is_closed(start: Any) -> None:
    start()
    with Handler("auto") as db:
        pid = pid_of(db)
        db.query("LOAD 'plpgsql'")
    with Handler("auto") as db:
        assert pid_of(db) != pid
    assert Connection.status().groups["auto"].discarded == {"not clean": 1}


def test_reset_always_and_never(start: Any) -> None:
    start(reset="always")
    with Handler("auto") as db:
        db.query("""CREATE FUNCTION mine() RETURNS text LANGUAGE sql
                    AS $$ SELECT set_config('work_mem', '7MB', false) $$""")
    with Handler("auto") as db:
        db.query("SELECT mine()")  # what a function does is not in the statement's text
    with Handler("auto") as db:
        assert value(db, "SHOW work_mem") == "4MB"
        db.query("DROP FUNCTION mine()")
    start(reset="never")
    with Handler("auto") as db:
        db.query("SET work_mem = '7MB'")
    with Handler("auto") as db:
        assert value(db, "SHOW work_mem") == "7MB"


def test_statements_refused_in_a_transaction_work_in_a_session_to_be_cleaned(start: Any) -> None:
    start()
    for statement in ("VACUUM t", "CREATE INDEX CONCURRENTLY ON t (i)", "CALL nothing()"):
        with Handler("auto") as db:
            db.query("CREATE OR REPLACE PROCEDURE nothing() LANGUAGE plpgsql AS $$ BEGIN COMMIT; END $$")
            db.query("SET work_mem = '7MB'")
        with Handler("auto") as db:
            db.query(statement)
            assert value(db, "SHOW work_mem") == "4MB"


def test_local_settings_leave_nothing_to_clean(start: Any) -> None:
    start()
    plain = ("SELECT 1", "UPDATE t SET i = 1", "SELECT 'SET x', $$ LISTEN $$")
    for statement in ("SET LOCAL work_mem = '7MB'", "SET TRANSACTION READ ONLY", *plain):
        with Handler("manual") as db:
            db.query(statement)
            assert not Connection.group("manual")._blocks()[0].failure
        assert not idle_connection("manual").stale, statement


def test_a_session_of_a_standby_is_cleaned_too(known_cluster: Any) -> None:
    for mode in ("threaded", "non-threaded"):
        Connection.init(config([known_cluster.standbys[0]], mode, g={"connection_count": 1}))
        try:
            with Handler("g") as db:
                db.query("SET work_mem = '7MB'")
                db.connection.execute("PREPARE mine AS SELECT 1")
            with Handler("g") as db:
                assert value(db, "SHOW work_mem") == "4MB"
                assert value(db, "SELECT count(*) FROM pg_prepared_statements WHERE from_sql") == 0
        finally:
            Connection.reset()


def idle_connection(group: str) -> Any:
    pool = Connection.group(group)._pool
    idle = getattr(pool, "_pool", None) or pool._idle  # type: ignore[attr-defined]
    wait_for(lambda: len(idle) == 1)
    return idle[0]


@pytest.mark.parametrize("group", ["auto", "manual"])
@pytest.mark.parametrize("statement", ["SELECT 1", "SELECT 1; SELECT 1"])
def test_a_session_that_cannot_be_cleaned_is_replaced_without_an_error(
    start: Any, known_cluster: Any, group: str, statement: str
) -> None:
    start()
    with Handler(group) as db:
        pid = pid_of(db)
        db.query("SET work_mem = '7MB'")
    conn = idle_connection(group)
    conn.cleaning = (conn.cleaning[0], (b"SELECT 1 / 0", None), *conn.cleaning[1:])
    with Handler(group) as db:
        assert db.query(statement).fetchone()[0] == 1
        assert pid_of(db) != pid

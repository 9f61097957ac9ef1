"""Reads see the writes before them, though they are read from standbys."""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pgbouncer import PROGRAM, PgBouncer
from support import config, server, wait_for

import pgdbpool
from pgdbpool import Connection, Handler, NotReplicatedError, StaleReadError, Token
from pgdbpool.cluster import Cluster, Node

SYSTEM_15 = Path("/usr/lib/postgresql/15/bin")
OLDER = [16, *([15] if SYSTEM_15.is_dir() else [])]
OWN = os.environ.get("PGDBPOOL_TEST_PG_BIN")
VERSIONS = [18, *(pytest.param(version, marks=pytest.mark.slow) for version in OLDER), *filter(None, [OWN])]
READING = ("auto_read", "manual_read")
INSERT, COUNT = "INSERT INTO t VALUES (%s)", "SELECT count(*) FROM t WHERE i = %s"


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: f"pg{version}")
def servers(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    programs = {15: str(SYSTEM_15), OWN: OWN}.get(request.param)
    where = {"bin_dir": programs} if programs else {"version": request.param}
    # Nothing but the tests writes, since they compare positions to a few bytes.
    with Cluster(standbys=2, settings={"autovacuum": "off"}, **where) as cluster:
        cluster.primary.execute("CREATE TABLE t (i int)")
        cluster.primary.execute("CREATE ROLE app LOGIN")
        cluster.primary.execute("GRANT ALL ON t TO app")
        cluster.wait_in_sync()
        yield cluster


def groups(**changes: Any) -> dict[str, dict[str, Any]]:
    few = {"connection_count": 3, "min_size": 1, **changes}
    return {
        "auto": {"target": "primary", **few},
        "manual": {"target": "primary", "autocommit": False, **few},
        "auto_read": {"target": "standby", **few},
        "manual_read": {"target": "standby", "autocommit": False, **few},
        "prefer": {"target": "prefer-standby", **few},
    }


@pytest.fixture
def init(servers: Cluster, mode: str) -> Iterator[Callable[..., None]]:
    """A function that initialises the groups over all servers."""

    def start(*entries: Any, **changes: Any) -> None:
        Connection.init(config(entries or servers.nodes, mode, **groups(**changes)))

    yield start
    Connection.reset()


@contextmanager
def paused(*standbys: Node) -> Iterator[None]:
    """Let standbys replay nothing."""
    for node in standbys:
        node.execute("SELECT pg_wal_replay_pause()")
        wait_for(lambda node=node: node.execute("SELECT pg_get_wal_replay_pause_state()") == [("paused",)])
    try:
        yield
    finally:
        for node in standbys:
            node.execute("SELECT pg_wal_replay_resume()")


def numbers() -> Iterator[int]:
    yield from range(1, 1_000_000)


_numbers = numbers()


def write(group: str = "auto") -> tuple[int, Token]:
    """Write a row; return its number and the token."""
    number = next(_numbers)
    with pgdbpool.read_your_writes() as seen, Handler(group) as db:
        db.query(INSERT, (number,))
    assert seen.token is not None
    return number, seen.token


def status(group: str) -> Any:
    return Connection.status().groups[group]


# Tokens.


def test_a_token_is_small_text_and_comes_back_from_it(init: Any) -> None:
    init()
    _, token = write()
    assert len(str(token)) == 27
    assert Token.parse(str(token)) == token
    assert hash(Token.parse(str(token))) == hash(token)
    assert eval(repr(token)) == token


@pytest.mark.parametrize("text", ["", "x", "ä", "A" * 26, "A" * 28, "A" * 26 + "B", "A" * 27 + "=", None, 5])
def test_text_that_is_no_token_is_refused_before_anything_is_sent(text: Any) -> None:
    with pytest.raises((ValueError, AttributeError)):
        Token.parse(text)
    if isinstance(text, str):
        with pytest.raises(ValueError, match="is not a token"), pgdbpool.read_your_writes(text):
            pass


def test_a_token_that_no_server_can_have_written_is_refused() -> None:
    from pgdbpool._util.token import Position

    with pytest.raises(ValueError, match="is not a token"):
        Token.parse(str(Token([Position(1, 2**31, 5)])))


def test_joined_tokens_keep_the_last_position_of_each_cluster() -> None:
    from pgdbpool._util.token import Position

    one, two, other = Position(1, 1, 50), Position(1, 2, 40), Position(2, 1, 10)
    joined = Token([one]) | Token([two, other])
    assert joined.positions == (two, other)
    assert Token.parse(str(joined)) == joined
    assert (joined | None) == (None | joined) == joined


WRITES: dict[str, Callable[[str, int], object]] = {
    "query": lambda group, i: in_block(group, lambda db: db.query(INSERT, (i,))),
    "fetchval": lambda group, i: in_block(group, lambda db: db.fetchval(INSERT + " RETURNING i", (i,))),
    "executemany": lambda group, i: in_block(group, lambda db: db.executemany(INSERT, [(i,), (i,)])),
    "cursor": lambda group, i: in_block(group, lambda db: db.cursor().execute(INSERT, (i,))),
    "several": lambda group, i: in_block(group, lambda db: db.query(f"SELECT 1; INSERT INTO t VALUES ({i})")),
    "copy": lambda group, i: in_block(group, lambda db: copy_in(db, i)),
    "copy_records_to_table": lambda group, i: in_block(
        group, lambda db: db.copy_records_to_table("t", records=[(i,)])
    ),
    "transaction": lambda group, i: in_block(group, lambda db: in_transaction(db, i)),
    "pipeline": lambda group, i: in_block(group, lambda db: in_pipeline(db, i)),
    "function": lambda group, i: in_block(group, lambda db: db.query("SELECT put(%s)", (i,))),
    "foreign cursor": lambda group, i: in_block(
        group, lambda db: psycopg.ClientCursor(db.connection).execute(INSERT, (i,))
    ),
    "connection": lambda group, i: in_block(group, lambda db: db.connection.execute(INSERT, (i,))),
    "begin": lambda group, i: in_block(
        group, lambda db: [db.query(s) for s in ("BEGIN", f"INSERT INTO t VALUES ({i})", "COMMIT")]
    ),
    "do": lambda group, i: in_block(group, lambda db: db.query(DO.format(i))),
    "one-shot do": lambda group, i: Connection.execute(group, DO.format(i)),
    "transaction in a pipeline": lambda group, i: in_block(group, lambda db: in_both(db, i)),
    "do that fails after a commit": lambda group, i: in_block(group, lambda db: fails_after_commit(db, i)),
    "one-shot": lambda group, i: Connection.execute(group, INSERT, (i,)),
    "one-shots": lambda group, i: Connection.executemany(group, INSERT, [(i,)]),
    "run": lambda group, i: pgdbpool.run(group, lambda db: db.query(INSERT, (i,))),
    "getconn": lambda group, i: out_of_pool(group, i),
}


def in_block(group: str, work: Callable[[Handler], object]) -> None:
    with Handler(group) as db:
        work(db)


def copy_in(db: Handler, i: int) -> None:
    with db.copy("COPY t FROM STDIN") as copy:
        copy.write_row((i,))


def in_transaction(db: Handler, i: int) -> None:
    with db.transaction():
        db.query(INSERT, (i,))


def in_pipeline(db: Handler, i: int) -> None:
    with db.pipeline():
        db.query(INSERT, (i,))


DO = "DO $$ BEGIN INSERT INTO t VALUES ({}); END $$"


def in_both(db: Handler, i: int) -> None:
    with db.pipeline(), db.transaction():
        db.query(INSERT, (i,))


def fails_after_commit(db: Handler, i: int) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        db.query(f"DO $$ BEGIN INSERT INTO t VALUES ({i}); COMMIT; PERFORM 1 / 0; END $$")


def out_of_pool(group: str, i: int) -> None:
    with Connection.getconn(group) as conn:
        conn.execute(INSERT, (i,))


@pytest.mark.slow
@pytest.mark.parametrize("group", ["auto", "manual"])
@pytest.mark.parametrize("way", list(WRITES))
def test_each_way_to_write_gives_a_token_that_reads_then_wait_for(
    servers: Cluster, init: Any, group: str, way: str
) -> None:
    init(fresh_wait=0)
    if way == "function":
        servers.primary.execute(
            "CREATE OR REPLACE FUNCTION put(int) RETURNS void LANGUAGE sql AS 'INSERT INTO t VALUES ($1)'"
        )
    if way in ("begin", "do that fails after a commit") and group == "manual":
        pytest.skip("the block begins its transactions itself")
    number = next(_numbers)
    with paused(*servers.standbys), pgdbpool.read_your_writes() as seen:
        WRITES[way](group, number)
        assert seen.token is not None
        ((end,),) = servers.primary.execute("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
        (position,) = seen.token.positions
        assert end - 100 <= position.lsn <= end
        assert Connection.fetchval("prefer", COUNT, (number,)) > 0
        with pytest.raises(StaleReadError):
            Connection.fetchval("auto_read", COUNT, (number,))
    assert status("prefer").fresh_from_primary == 1


def test_a_block_that_only_reads_gives_no_token(init: Any, servers: Cluster) -> None:
    servers.primary.execute("CREATE OR REPLACE FUNCTION nine() RETURNS int LANGUAGE sql AS 'SELECT 9'")
    init()
    with pgdbpool.read_your_writes() as seen:
        for group in ("auto", "manual"):
            with Handler(group) as db:
                assert db.fetchval("SELECT nine()") == 9  # may write, as far as the text says
                assert db.fetchval("SELECT count(*) FROM t") is not None
            assert db.token is None
            assert Connection.fetchval(group, "SELECT nine()") == 9
    assert seen.token is None


def test_a_block_that_failed_or_was_rolled_back_gives_no_token(init: Any) -> None:
    init()
    with pgdbpool.read_your_writes() as seen:
        with Handler("manual") as db:
            db.query(INSERT, (0,))
            db.rollback()
        with pytest.raises(ZeroDivisionError), Handler("manual") as db:
            db.query(INSERT, (0,))
            raise ZeroDivisionError
        for group in ("auto", "manual"):
            with pytest.raises(psycopg.errors.DivisionByZero):
                Connection.execute(group, "INSERT INTO t SELECT 1 / 0")
            with pytest.raises(psycopg.errors.DivisionByZero), Handler(group) as db:
                db.query("INSERT INTO t SELECT 1 / 0")
    assert seen.token is None


@pytest.mark.parametrize("group", ["auto", "manual"])
def test_a_deferred_constraint_that_fails_at_the_commit_is_raised_and_gives_no_token(
    servers: Cluster, init: Any, group: str
) -> None:
    servers.primary.execute("""
        DROP TABLE IF EXISTS late; CREATE TABLE late (i int UNIQUE DEFERRABLE INITIALLY DEFERRED);
        INSERT INTO late VALUES (1)""")
    init()
    with pgdbpool.read_your_writes() as seen:
        with pytest.raises(psycopg.errors.UniqueViolation), Handler(group) as db:
            db.query("INSERT INTO late VALUES (1)")
        with pytest.raises(psycopg.errors.UniqueViolation):
            Connection.execute(group, "INSERT INTO late VALUES (1)")
        assert Connection.fetchval(group, "SELECT 1") == 1
    assert seen.token is None


def test_the_blocks_own_token_and_that_of_a_group(init: Any) -> None:
    init()
    with pgdbpool.read_your_writes() as seen:
        with Handler("manual") as first:
            first.query(INSERT, (0,))
            assert first.token is None  # nothing is committed yet
        with Handler("auto") as second:
            second.query(INSERT, (0,))
            assert second.token is not None
    assert first.token is not None
    assert first.token != second.token
    assert seen.token == second.token == first.token | second.token
    with Handler("auto") as outside:
        outside.query(INSERT, (0,))
        asked = outside.token
    assert asked is not None
    assert asked | seen.token == asked
    assert Connection.token("auto") | asked == Connection.token("manual")
    with pytest.raises(pgdbpool.BlockClosedError):
        _ = outside.token
    with pytest.raises(pgdbpool.TargetUnavailableError, match="is a standby on timeline"):
        Connection.token("auto_read")


# Contexts.


def test_contexts_compose(init: Any) -> None:
    init()
    _, before = write()
    with pgdbpool.read_your_writes(str(before)) as outer:
        assert outer.token == before
        with pgdbpool.read_your_writes() as inner:
            assert inner.token == before  # what is inside both sees what the outer one does
            _, written = write()
        assert inner.token == outer.token == written
        assert inner.written == written
    assert pgdbpool.read_your_writes()(lambda: None)() is None


def test_a_thread_has_a_context_of_its_own_unless_it_is_given_a_copy(init: Any) -> None:
    init()
    found: list[Any] = []
    with pgdbpool.read_your_writes() as seen:
        plain = threading.Thread(target=lambda: found.append(write()[1]))
        plain.start()
        plain.join()
        assert seen.token is None
        if Connection.get_threading_model() == "threaded":
            context = contextvars.copy_context()
            copied = threading.Thread(target=lambda: context.run(lambda: found.append(write()[1])))
            copied.start()
            copied.join()
            assert seen.token == found[1]


# Guards.


@pytest.mark.parametrize("group", READING)
def test_a_read_waits_for_a_standby_that_is_about_to_have_the_write(
    servers: Cluster, init: Any, group: str
) -> None:
    init(fresh_wait=5)
    with paused(*servers.standbys):
        number, token = write()
        timer = threading.Timer(
            0.1, lambda: [s.execute("SELECT pg_wal_replay_resume()") for s in servers.standbys]
        )
        timer.start()
        with Handler(group, after=token) as db:
            assert db.fetchval(COUNT, (number,)) == 1
        timer.join()
    assert status(group).fresh_waits == 1
    assert status(group).fresh_refused == 0


@pytest.mark.parametrize("group", READING)
def test_a_read_goes_to_the_other_standby(servers: Cluster, init: Any, group: str) -> None:
    init(fresh_wait=5)
    late, early = servers.standbys
    with paused(late):
        number, token = write()
        wait_for(lambda: early.execute(COUNT, (number,)) == [(1,)])
        for _ in range(4):
            with Handler(group, after=token) as db:
                assert db.fetchval(COUNT, (number,)) == 1
                assert db.endpoint == early.label
    assert status(group).fresh_waits == 0


def in_handler(group: str, number: int, token: Token) -> tuple[Any, str]:
    with Handler(group, after=token) as db:
        return db.fetchval(COUNT, (number,)), db.endpoint


def in_one_shot(group: str, number: int, token: Token) -> tuple[Any, str]:
    row = Connection.fetchrow(group, COUNT + " AND inet_server_port() > 0", (number,), after=token)
    port = Connection.fetchval(group, "SELECT inet_server_port()", after=token)
    return row and row[0], f"127.0.0.1:{port}"


def in_kept_connection(group: str, number: int, token: Token) -> tuple[Any, str]:
    conn = Connection.getconn(group, after=token)
    try:
        found = conn.execute(COUNT, (number,)).fetchone()
        return found and found[0], conn.endpoint.label
    finally:
        Connection.putconn(conn)


@pytest.mark.parametrize("group", READING)
@pytest.mark.parametrize("read", [in_handler, in_one_shot, in_kept_connection])
def test_a_block_under_a_token_is_lent_a_connection_to_a_standby_that_is_known_to_have_it(
    servers: Cluster, init: Any, group: str, read: Callable[[str, int, Token], tuple[Any, str]]
) -> None:
    init(connection_count=4, fresh_wait=5)
    late, early = servers.standbys
    with ExitStack() as stack:
        opened = [stack.enter_context(Handler(group)) for _ in range(4)]
        assert {db.endpoint for db in opened} == {late.label, early.label}
    with paused(late):
        number, token = write()
        wait_for(lambda: early.execute(COUNT, (number,)) == [(1,)])
        with Handler(group, after=token) as db:
            assert db.fetchval(COUNT, (number,)) == 1
        failed = status(group).guards_failed
        for _ in range(8):
            for endpoint in Connection.group(group).endpoints:
                endpoint.behind_at = 0.0  # as a while later
            assert read(group, number, token) == (1, early.label)
        assert status(group).guards_failed == failed
    assert status(group).fresh_waits == 0


READS: dict[str, Callable[[Handler, int], int]] = {
    "query": lambda db, i: db.query(COUNT, (i,)).fetchone()[0],
    "fetchmany": lambda db, i: db.fetchmany(COUNT, [(i,)])[0][0],
    "cursor": lambda db, i: db.cursor().execute(COUNT, (i,)).fetchone()[0],
    "client cursor": lambda db, i: psycopg.ClientCursor(db.connection).execute(COUNT, (i,)).fetchone()[0],
    "stream": lambda db, i: next(iter(db.cursor().stream(COUNT, (i,))))[0],
    "copy": lambda db, i: copied(db, i),
    "several": lambda db, i: db.fetchval(f"SELECT 1; SELECT count(*) FROM t WHERE i = {i}"),
    "pipeline": lambda db, i: pipelined(db, i),
    "transaction": lambda db, i: transacted(db, i),
    "named cursor": lambda db, i: named(db, i),
    "connection": lambda db, i: db.connection.execute(COUNT, (i,)).fetchone()[0],
}


def copied(db: Handler, i: int) -> int:
    with db.copy(f"COPY (SELECT count(*) FROM t WHERE i = {i}) TO STDOUT") as copy:
        return int(b"".join(bytes(data) for data in copy))


def pipelined(db: Handler, i: int) -> Any:
    with db.pipeline():
        return db.query(COUNT, (i,)).fetchone()[0]


def transacted(db: Handler, i: int) -> Any:
    with db.transaction():
        return db.fetchval(COUNT, (i,))


def named(db: Handler, i: int) -> Any:
    with db.transaction(), db.cursor("name") as cursor:
        return cursor.execute(COUNT, (i,)).fetchone()[0]


@pytest.mark.slow
@pytest.mark.parametrize("group", [*READING, "prefer"])
@pytest.mark.parametrize("way", list(READS))
def test_no_way_to_read_gives_a_stale_row(servers: Cluster, init: Any, group: str, way: str) -> None:
    init(fresh_wait=0)
    with paused(*servers.standbys):
        number, token = write()
        if group == "prefer":
            with Handler(group, after=token) as db:
                assert READS[way](db, number) == 1
            with pgdbpool.read_your_writes(token), Handler(group) as db:
                assert READS[way](db, number) == 1
        else:
            with pytest.raises(StaleReadError) as caught, Handler(group, after=token) as db:
                READS[way](db, number)
            assert set(caught.value.servers) == {node.label for node in servers.standbys}
            assert not caught.value.lost
    servers.wait_in_sync()
    with Handler(group, after=token) as db:
        assert READS[way](db, number) == 1


def test_the_writes_inside_a_block_that_is_open_already_are_seen_too(servers: Cluster, init: Any) -> None:
    init(fresh_wait=0)
    with paused(*servers.standbys), pgdbpool.read_your_writes(), Handler("prefer") as db:
        assert db.fetchval("SELECT 1") == 1
        number, _ = write()
        assert db.fetchval(COUNT, (number,)) == 1


def test_hooks_see_the_connection_that_a_block_goes_on_with(servers: Cluster, init: Any) -> None:
    calls: list[tuple[str, str]] = []
    init(
        fresh_wait=0,
        on_checkout=lambda conn: calls.append(("out", conn.endpoint.label)),
        on_checkin=lambda conn: calls.append(("in", conn.endpoint.label)),
    )
    with paused(*servers.standbys):
        number, token = write()
        calls.clear()
        with Handler("prefer", after=token) as db:
            assert db.fetchval(COUNT, (number,)) == 1
    (_, standby), *_ = calls
    primary = servers.primary.label
    assert standby != primary
    assert calls == [("out", standby), ("out", primary), ("in", standby), ("in", primary)]


def test_a_hook_that_fails_leaves_the_block_its_connection(servers: Cluster, init: Any) -> None:
    def refuse_the_primary(conn: Any) -> None:
        if refusing and conn.endpoint.label == servers.primary.label:
            raise ZeroDivisionError

    refusing = False
    init(fresh_wait=0, on_checkout=refuse_the_primary)
    with paused(*servers.standbys):
        number, token = write()
        refusing = True
        with Handler("prefer", after=token) as db:
            for _ in range(2):
                with pytest.raises(pgdbpool.HookError):
                    db.fetchval(COUNT, (number,))
    servers.wait_in_sync()
    with Handler("prefer", after=token) as db:
        assert db.fetchval(COUNT, (number,)) == 1
    assert status("prefer").in_use == 0


def test_a_session_that_the_block_has_made_its_own_is_not_left_for_another(
    servers: Cluster, init: Any
) -> None:
    init(fresh_wait=0)
    with paused(*servers.standbys), pgdbpool.read_your_writes(), Handler("prefer") as db:
        db.query("SET work_mem = '5MB'")
        number, _ = write()
        with pytest.raises(StaleReadError):
            db.fetchval(COUNT, (number,))


def test_a_connection_out_of_its_pool_reads_its_writes_too(servers: Cluster, init: Any) -> None:
    init(fresh_wait=0)
    for group in ("prefer", "auto_read", "manual_read"):
        conn = Connection.getconn(group)
        with paused(*servers.standbys), pgdbpool.read_your_writes():
            assert conn.execute("SELECT 1").fetchone()[0] == 1
            conn.commit()
            number, _ = write()
            if group == "prefer":
                cursor = conn.cursor()
                assert cursor.execute(COUNT, (number,)).fetchone()[0] == 1
                assert cursor.execute(COUNT, (number,)).fetchone()[0] == 1
            else:
                with pytest.raises(StaleReadError):
                    conn.execute(COUNT, (number,))
        servers.wait_in_sync()
        assert conn.execute(COUNT, (number,)).fetchone()[0] == 1
        conn.close()
    assert [status(group).in_use for group in ("prefer", "auto_read", "manual_read")] == [0, 0, 0]
    assert status("prefer").size <= 3


KEPT_READS: dict[str, Callable[[Any, int], Any]] = {
    "execute": lambda conn, i: conn.execute(COUNT, (i,)).fetchone()[0],
    "executemany": lambda conn, i: returned(conn, i),
    "stream": lambda conn, i: next(iter(conn.cursor().stream(COUNT, (i,))))[0],
    "copy": lambda conn, i: copied(conn.cursor(), i),
    "pipeline": lambda conn, i: kept_pipeline(conn, i),
    "transaction": lambda conn, i: kept_transaction(conn, i),
    "named cursor": lambda conn, i: conn.cursor("name", withhold=True).execute(COUNT, (i,)).fetchone()[0],
}


def returned(conn: Any, i: int) -> Any:
    cursor = conn.cursor()
    cursor.executemany(COUNT, [(i,)], returning=True)
    return cursor.fetchone()[0]


def kept_pipeline(conn: Any, i: int) -> Any:
    with conn.pipeline():
        return conn.execute(COUNT, (i,)).fetchone()[0]


def kept_transaction(conn: Any, i: int) -> Any:
    with conn.transaction():
        return conn.execute(COUNT, (i,)).fetchone()[0]


@pytest.mark.parametrize("way", list(KEPT_READS))
def test_no_way_to_read_over_a_kept_connection_gives_a_stale_row(
    servers: Cluster, init: Any, way: str
) -> None:
    init(fresh_wait=0)
    with paused(*servers.standbys):
        number, token = write()
        with Connection.getconn("prefer", after=token) as conn:
            assert KEPT_READS[way](conn, number) == 1
        with pgdbpool.read_your_writes(token), Connection.getconn("prefer") as conn:
            assert KEPT_READS[way](conn, number) == 1
        with pytest.raises(StaleReadError), Connection.getconn("auto_read", after=token) as conn:
            KEPT_READS[way](conn, number)


@pytest.mark.skipif(PROGRAM is None, reason="PgBouncer is not installed")
def test_behind_pgbouncer_each_transaction_is_guarded(servers: Cluster, mode: str) -> None:
    """It hands out what its server said when it logged in, and may give each transaction another session."""
    standby = servers.standbys[0]
    with PgBouncer(standby, ("postgres",), pool_size=2) as pooled:
        entries = [
            server(servers.primary, label="primary"),
            server(pooled, label="pooled", pooler="transaction"),
        ]
        few = {"connection_count": 2, "min_size": 1, "fresh_wait": 0}
        read = {**few, "endpoints": ["pooled"], "target": "standby"}
        groups = {
            "auto": {**few, "endpoints": ["primary"]},
            "read": read,
            "manual": {**read, "autocommit": False},
            "prefer": {**few, "target": "prefer-standby"},
        }
        Connection.init(config(entries, mode, **groups))
        try:
            for way in (READS["query"], READS["stream"], READS["several"], READS["transaction"]):
                with paused(standby):
                    number, token = write()
                    for group in ("read", "manual"):
                        with pytest.raises(StaleReadError), Handler(group, after=token) as db:
                            way(db, number)
                    with Handler("prefer", after=token) as db:
                        assert way(db, number) == 1
                wait_for(lambda number=number: standby.execute(COUNT, (number,)) == [(1,)])
                for group in ("read", "manual"):
                    for _ in range(2):
                        with Handler(group, after=token) as db:
                            assert way(db, number) == 1
        finally:
            Connection.reset()


@pytest.mark.slow
@pytest.mark.parametrize("group", ["auto_read", "manual_read"])
def test_in_repeatable_read_the_snapshot_is_not_older_than_the_guard(
    servers: Cluster, init: Any, group: str
) -> None:
    """The guard's own statement would take the snapshot before it looks, and pass all the same."""
    servers.primary.execute("ALTER ROLE app SET default_transaction_isolation = 'repeatable read'")
    try:
        servers.wait_in_sync()
        init(*(server(node, user="app") for node in servers.nodes), fresh_wait=5)
        for _ in range(200):
            number, token = write("manual")
            with Handler(group, after=token) as db:
                assert db.fetchval(COUNT, (number,)) == 1
                assert db.fetchval("SHOW transaction_isolation") == "repeatable read"
    finally:
        servers.primary.execute("ALTER ROLE app RESET default_transaction_isolation")


def test_a_role_without_privileges_is_guarded_too(servers: Cluster, init: Any) -> None:
    init(*(server(node, user="app") for node in servers.nodes), fresh_wait=0)
    with paused(*servers.standbys):
        number, token = write()
        with pytest.raises(StaleReadError):
            Connection.fetchval("auto_read", COUNT, (number,), after=token)
        assert Connection.fetchval("prefer", COUNT, (number,), after=token) == 1
    servers.wait_in_sync()
    assert Connection.fetchval("auto_read", COUNT, (number,), after=token) == 1


def test_a_token_of_another_cluster_guards_nothing_here(servers: Cluster, init: Any) -> None:
    from pgdbpool._util.token import Position

    init()
    foreign = Token([Position(12345, 1, 2**60)])
    assert Connection.fetchval("auto_read", "SELECT 1", after=foreign) == 1


# The positions of writes.


def test_the_position_inside_of_a_statements_own_transaction_is_before_its_commit(init: Any) -> None:
    init()
    with pgdbpool.read_your_writes() as seen, Handler("auto") as db:
        inside = db.fetchval(
            "INSERT INTO t VALUES (0) RETURNING pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')"
        )
    assert seen.token is not None
    assert seen.token.positions[0].lsn > inside


def test_with_synchronous_commit_off_the_token_is_at_the_commit(servers: Cluster, init: Any) -> None:
    """Only the position to insert at is: what is written or flushed is behind it."""
    init(settings={"synchronous_commit": "off"})
    with servers.primary.connect() as admin, pgdbpool.read_your_writes() as seen:
        behind = 0
        for _ in range(30):
            with Handler("manual") as db:
                db.query(INSERT, (0,))
            ((flushed,),) = admin.execute("SELECT pg_current_wal_flush_lsn() - '0/0'::pg_lsn").fetchall()
            assert seen.token is not None
            behind += flushed < seen.token.positions[0].lsn
    assert behind > 20


def test_a_position_behind_the_header_of_a_new_page_is_that_of_the_last_records_end(
    servers: Cluster, init: Any
) -> None:
    """Where a record fills its page, the position to insert at is one that no standby has until the next."""
    from pgdbpool._servers.positions import PAGE, SHORT_HEADER

    init(fresh_wait=1)
    with pgdbpool.read_your_writes() as seen, servers.primary.connect() as admin:

        def write_bytes(number: int) -> None:
            Connection.execute("auto", "SELECT pg_logical_emit_message(true, '', repeat('x', %s))", (number,))

        def at() -> int:
            ((lsn,),) = admin.execute("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn").fetchall()
            return int(lsn)

        for _ in range(100):
            while PAGE - at() % PAGE < 5000:
                write_bytes(1000)
            before = at()
            write_bytes(1000)
            after = at()
            write_bytes(1000 + PAGE - after % PAGE - (after - before))
            if (raw := at()) % PAGE == SHORT_HEADER:  # else the server has written something itself
                break
        assert raw % PAGE == SHORT_HEADER
        assert seen.token is not None
        assert seen.token.positions[0].lsn == raw - SHORT_HEADER
        assert Connection.fetchval("auto_read", "SELECT 1") == 1


@pytest.mark.slow
def test_a_commit_that_did_not_wait_for_its_standby_is_read_from_the_primary(
    servers: Cluster, init: Any
) -> None:
    init(fresh_wait=0)
    node, over = servers.primary, threading.Event()
    canceller = threading.Thread(target=cancel_waiting, args=(node, over))
    node.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    node.execute("SELECT pg_reload_conf()")
    canceller.start()
    try:
        for group in ("auto", "manual"):
            number, seen = wait_for(lambda group=group: not_replicated(group))
            assert seen.token is not None
            with pgdbpool.read_your_writes(seen.token), Handler("prefer") as db:
                assert db.fetchval(COUNT, (number,)) == 1
                assert db.endpoint == node.label
    finally:
        node.execute("ALTER SYSTEM RESET synchronous_standby_names")
        node.execute("SELECT pg_reload_conf()")
        over.set()
        canceller.join()


def not_replicated(group: str) -> tuple[int, pgdbpool.Seen] | None:
    """Write a row; return its number if its commit did not wait: the server takes a moment to reload."""
    number = next(_numbers)
    with pgdbpool.read_your_writes() as seen:
        try:
            with Handler(group) as db:
                db.query(INSERT, (number,))
        except NotReplicatedError:
            return number, seen
    return None


def cancel_waiting(node: Node, over: threading.Event) -> None:
    with node.connect() as admin:
        while not over.wait(0.05):
            admin.execute("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")


def test_a_connection_gives_its_place_to_one_to_a_standby_that_has_the_write(
    init: Any, servers: Cluster
) -> None:
    init(connection_count=1, min_size=0, fresh_wait=0.1)
    for group in READING:
        with Handler(group) as db:
            db.query("SELECT 1")
            (behind,) = (node for node in servers.standbys if node.label == db.endpoint)
        with paused(behind):
            number, token = write()
            other = servers.standbys[behind is servers.standbys[0]]
            wait_for(lambda: other.execute(f"SELECT count(*) FROM t WHERE i = {number}") == [(1,)])  # noqa: B023
            with Handler(group, after=token) as db:
                assert db.fetchval(COUNT, (number,)) == 1
                assert db.endpoint == other.label
        assert status(group).fresh_from_primary == 0
        assert status(group).size == 1


def test_a_lost_commit_may_be_there_and_is_looked_for_on_the_primary(
    servers: Cluster, init: Any, proxy_to: Any
) -> None:
    proxy = proxy_to(servers.primary)
    init(server(servers.primary, port=proxy.port), *servers.standbys, fresh_wait=0)
    with pgdbpool.read_your_writes() as seen:
        number = next(_numbers)
        with pytest.raises(pgdbpool.ConnectionLostError) as caught, Handler("manual") as db:
            db.query(INSERT, (number,))
            proxy.cut_after(b"COMMIT")
        assert caught.value.maybe_committed
        assert seen.token is not None
        with pytest.raises(StaleReadError):
            Connection.fetchval("auto_read", COUNT, (number,))
        assert Connection.fetchval("prefer", COUNT, (number,)) in (0, 1)


# Round trips.


def test_a_guarded_read_takes_one_round_trip(servers: Cluster, mode: str, proxy_to: Any) -> None:
    primary, standby = servers.primary, servers.standbys[0]
    proxy = proxy_to(standby)
    entries = [server(primary, label="primary"), server(standby, port=proxy.port, label="standby")]
    read = {"endpoints": ["standby"], "target": "standby", "connection_count": 1}
    groups = {"read": read, "manual": {**read, "autocommit": False}, "auto": {"endpoints": ["primary"]}}
    Connection.init(config(entries, mode, **groups))
    try:
        for group, trips in (("read", 1), ("manual", 2)):
            for _ in range(3):
                number, token = write()
                wait_for(lambda number=number: standby.execute(COUNT, (number,)) == [(1,)])
                before, passed = proxy.round_trips, status(group).guards_passed
                with Handler(group, after=token) as db:
                    assert db.fetchval(COUNT, (number,)) == 1
                assert proxy.round_trips - before == trips
                assert status(group).guards_passed == passed + 1
                with Handler(group, after=token) as db:  # its standby is known to have it
                    assert db.fetchval(COUNT, (number,)) == 1
                assert status(group).guards_passed == passed + 1
    finally:
        Connection.reset()


@pytest.mark.parametrize("group", ["auto", "manual"])
def test_a_write_takes_as_many_round_trips_with_its_token_as_without(
    servers: Cluster, mode: str, proxy_to: Any, group: str
) -> None:
    proxy = proxy_to(servers.primary)
    proxy.delay = 0.003  # libpq sends at each Sync: so what it sends at once is counted as one
    entry = server(servers.primary, port=proxy.port)
    few = {"connection_count": 1, "prepare_threshold": None}
    Connection.init(config([entry], mode, auto=few, manual={**few, "autocommit": False}))

    def trips() -> list[int]:
        counts = []
        for way in ("query", "executemany", "cursor", "one-shot", "one-shots", "getconn"):
            WRITES[way](group, 0)
            proxy.reset_counts()
            WRITES[way](group, 0)
            counts.append(proxy.round_trips)
        return counts

    try:
        without = trips()
        with pgdbpool.read_your_writes() as seen:
            assert trips() == without
            assert seen.token is not None
    finally:
        Connection.reset()


def test_outside_of_a_context_nothing_more_is_sent(servers: Cluster, mode: str, proxy_to: Any) -> None:
    proxy = proxy_to(servers.primary)
    entry = server(servers.primary, port=proxy.port)
    Connection.init(config([entry], mode, manual={"connection_count": 1, "autocommit": False}))
    try:
        Connection.execute("manual", INSERT, (0,))
        counts = []
        for _ in range(2):
            proxy.reset_counts()
            with Handler("manual") as db:
                db.query(INSERT, (0,))
            counts.append(proxy.bytes_up)
            with pgdbpool.read_your_writes(), Handler("manual") as db:
                db.query(INSERT, (0,))
        assert counts[0] == counts[1]
    finally:
        Connection.reset()


@pytest.mark.parametrize("group", READING)
def test_a_guard_tells_what_else_the_standby_has(servers: Cluster, init: Any, group: str) -> None:
    """It shares the transaction of its statement, and the next token is known to be there already."""
    init(connection_count=1, fresh_wait=5)
    for _ in range(2):
        written = [write(), write()]
        servers.wait_in_sync()
        counts = []
        for number, token in written:
            with Handler(group, after=token) as db:
                assert db.fetchval(COUNT, (number,)) == 1
            counts.append(status(group).guards_passed)
        assert counts[0] == counts[1]


def by_set(db: Handler) -> None:
    db.query("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")


def by_foreign_cursor(db: Handler) -> None:
    psycopg.ClientCursor(db.connection).execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")


def by_attribute(db: Handler) -> None:
    db.connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ


@pytest.mark.parametrize("way", [by_set, by_foreign_cursor, by_attribute])
def test_a_block_may_still_choose_its_isolation_level_first(
    servers: Cluster, init: Any, way: Callable[[Handler], None]
) -> None:
    init(connection_count=1, fresh_wait=5)
    for _ in range(2):  # the first guard of a session is another one
        number, token = write()
        with Handler("manual_read", after=token) as db:
            way(db)
            assert db.fetchval("SHOW transaction_isolation") == "repeatable read"
            assert db.fetchval(COUNT, (number,)) == 1
    with pgdbpool.read_your_writes(), Handler("manual_read") as db:
        db.query("SELECT 1")
        db.commit()
        number, _ = write()
        way(db)
        assert db.fetchval("SHOW transaction_isolation") == "repeatable read"
        assert db.fetchval(COUNT, (number,)) == 1
    number, token = write()
    with Handler("auto_read", after=token) as db:
        db.query("SELECT 1")
        db.query("BEGIN ISOLATION LEVEL REPEATABLE READ")
        assert db.fetchval("SHOW transaction_isolation") == "repeatable read"
        assert db.fetchval(COUNT, (number,)) == 1
        db.query("COMMIT")


def test_a_guard_that_finds_one_snapshot_for_all_goes_apart_from_then_on(servers: Cluster, init: Any) -> None:
    """The level may be a default that nobody asked for: the guard looks, since it would prove nothing."""
    servers.primary.execute("ALTER DATABASE postgres SET default_transaction_isolation = 'repeatable read'")
    try:
        servers.wait_in_sync()
        init(connection_count=1, fresh_wait=5)
        for reads in range(1, 5):
            number, token = write()
            servers.wait_in_sync()
            with Handler("auto_read", after=token) as db:
                assert db.fetchval(COUNT, (number,)) == 1
            assert status("auto_read").guards_failed == min(reads - 1, 1)
    finally:
        servers.primary.execute("ALTER DATABASE postgres RESET default_transaction_isolation")

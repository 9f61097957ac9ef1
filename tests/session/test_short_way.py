"""Known statements go the short way, and no caller can see it: generated statements are compared."""

from __future__ import annotations

import datetime as dt
import gc
import json
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from psycopg.adapt import Loader
from psycopg.rows import dict_row, tuple_row
from psycopg.types.string import StrDumper
from statements import TABLES, TYPES, Statements
from support import config, server

import pgdbpool
from pgdbpool import Connection, Handler
from pgdbpool._session import short_way
from pgdbpool._session.riding import RidingCursor
from pgdbpool.cluster import Cluster, Node

INTRANS = psycopg.pq.TransactionStatus.INTRANS
GROUPS: dict[str, dict[str, Any]] = {
    "auto": {},
    "manual": {"autocommit": False},
    "tenant": {"tenant": {"setting": "app.tenant", "verify": "off"}},
    "unprepared": {"prepare_threshold": None},
    "annotated": {"annotate": True},
    "timed": {"slow_query": 60},
}


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Cluster(standbys=0) as cluster:
        yield cluster.primary


@pytest.fixture
def start(node: Node) -> Iterator[Callable[..., None]]:
    """Initialise the groups, each of one connection, with the tables in a schema of their own."""
    with node.connect() as admin:
        admin.execute(TYPES)
        for schema in ("own", "theirs"):
            admin.execute(TABLES.format(schema))

    def init(**changes: Any) -> None:
        entry = server(node, **{"options": {"search_path": "own"}, **changes})
        Connection.init(config([entry], **{n: {"connection_count": 1, **g} for n, g in GROUPS.items()}))

    yield init
    Connection.reset()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each known statement went the short way, in order."""
    seen: list[bool] = []
    function = RidingCursor._ride_known

    def followed(self: Any, *arguments: Any) -> bool:
        seen.append(True)
        seen[-1] = done = function(self, *arguments)
        return done

    monkeypatch.setattr(RidingCursor, "_ride_known", followed)
    return seen


def seen_of(cursor: psycopg.Cursor[Any]) -> list[Any]:
    """Return all that a caller can see of a result, and of the rows in it."""
    found: list[Any] = []
    while True:
        columns = cursor.description
        found.append([cursor.rowcount, cursor.statusmessage, cursor.rownumber])
        found.append(None if columns is None else [(*c, c.type_display) for c in columns])
        query = cursor._query
        found.append(None if query is None else [query.query, query.params, query.types, query.formats])
        if columns is not None:
            found.append([repr(row) for row in (cursor.fetchone(), *cursor.fetchmany(2), *cursor.fetchall())])
            found.append([cursor.rownumber, cursor.fetchone()])
        if not cursor.nextset():
            return found


class Watched:
    """A connection that notes what comes with its statements."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.connection = connection
        self.heard: list[str] = []
        connection.add_notice_handler(lambda diag: self.heard.append(str(diag.message_primary)))
        connection.add_notify_handler(lambda notify: self.heard.append(notify.payload))

    def run(self, cursor: psycopg.Cursor[Any], statement: tuple[str, Any], prepare: bool | None) -> list[Any]:
        """Execute a statement, and return all that a caller can see."""
        self.heard.clear()
        found: list[Any]
        try:
            cursor.execute(*statement, prepare=prepare)
        except Exception as error:  # noqa: BLE001 - of any kind
            diag = getattr(error, "diag", None)
            code = getattr(error, "sqlstate", None)
            kind = next(c for c in type(error).__mro__ if c.__module__.startswith(("psycopg", "builtins")))
            text = str(error).splitlines()
            found = [
                kind.__name__,
                code,
                text,
                getattr(diag, "message_detail", None),
                cursor.pgresult is None,
            ]
            if self.connection.info.transaction_status == INTRANS:  # psycopg sends BEGIN before it refuses
                self.connection.rollback()
        else:
            found = seen_of(cursor)
        return [found, self.heard[:], int(self.connection.info.transaction_status)]


@pytest.mark.parametrize(
    ("group", "number", "seed"),
    [
        *((group, 170, seed) for seed, group in enumerate(GROUPS)),
        *(pytest.param(group, 1500, seed, marks=pytest.mark.long) for seed, group in enumerate(GROUPS, 90)),
    ],
)  # fmt: skip
def test_nothing_shows_which_way_a_statement_went(
    start: Any, node: Node, taken: list[bool], group: str, number: int, seed: int
) -> None:
    start()
    statements = Statements(seed)
    tenant = {"tenant": "x"} if group == "tenant" else {}
    with node.connect(options="-c search_path=theirs") as bare, Handler(group, **tenant) as db:
        bare.execute("LISTEN theirs")
        db.query("LISTEN own")
        bare.autocommit = group != "manual"
        bare.prepare_threshold = GROUPS[group].get("prepare_threshold", 5)
        conn = db._conn
        assert conn is not None  # `db.connection` would have its session cleaned
        both = Watched(bare), Watched(conn)
        factories = [tuple_row, dict_row]
        for _ in range(number):
            statement, factory, binary = (
                statements(),
                statements.choice(factories),
                statements.random.random() < 0.1,
            )
            if group in ("tenant", "annotated") and ";" in statement[0]:
                continue  # psycopg itself takes one statement in a pipeline
            short_way.remember(statement[0], bare)
            cursors = [watched.connection.cursor(binary=binary, row_factory=factory) for watched in both]
            for prepare in (None if ";" in statement[0] else True, None, None):
                theirs, own = (w.run(c, statement, prepare) for w, c in zip(both, cursors, strict=True))
                assert own == theirs, statement
            for watched in both:
                if watched.connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
                    watched.connection.rollback()
        assert sum(taken) > 0.8 * number


def known(db: Handler, statement: str, params: Any = None) -> Any:
    """Execute a statement until it is prepared, and return the last result's first row."""
    for _ in range(7):
        row = db.query(statement, params).fetchone()
    return row


def test_a_dumper_registered_late_is_used(start: Any, taken: list[bool]) -> None:
    class Loud(StrDumper):
        def dump(self, obj: str) -> bytes:
            return obj.upper().encode()

    start()
    with Handler("auto") as db:
        assert known(db, "SELECT %s::text", ("a",))[0] == "a"
        assert taken[-1]
        cursor = db.cursor()
        cursor.execute("SELECT %s::text", ("a",))
        cursor.adapters.register_dumper(str, Loud)
        assert cursor.execute("SELECT %s::text", ("a",)).fetchone() == ("A",)
        assert db.query("SELECT %s::text", ("a",)).fetchone()[0] == "a"
        db.connection.adapters.register_dumper(str, Loud)
        assert db.query("SELECT %s::text", ("a",)).fetchone()[0] == "A"
    with Handler("auto") as db:
        assert db.query("SELECT %s::text", ("a",)).fetchone()[0] == "a"


def test_what_a_session_writes_its_own_way_is_left_to_psycopg(start: Any, taken: list[bool]) -> None:
    start()
    for style in ("postgres", "sql_standard"):
        with Handler("manual") as db:
            db.query(f"SET LOCAL IntervalStyle = {style}")
            assert known(db, "SELECT %t = '-1 day -01:00'::interval", (dt.timedelta(days=-1, hours=-1),))[0]
    assert not any(taken)


def test_a_session_in_another_encoding_is_written_in_it(start: Any, taken: list[bool]) -> None:
    start()
    with Handler("auto") as db:
        db.query("""CREATE FUNCTION latin() RETURNS text LANGUAGE sql
                    AS $$ SELECT set_config('client_encoding', 'LATIN1', false) $$""")
        assert known(db, "SELECT %s::text, ascii(%s)", ("ä", "ä")) == ("ä", 228)
        assert taken[-1]
        db.query("SELECT latin()")
        assert known(db, "SELECT %s::text, ascii(%s)", ("ä", "ä")) == ("ä", 228)
        assert not taken[-1]


def test_rows_have_the_columns_of_their_table(start: Any) -> None:
    start()
    with Handler("auto") as db:
        assert known(db, "SELECT * FROM late").keys() == ("i",)
        for change in ("RENAME i TO j", "ADD k int", "DROP k"):
            db.query(f"ALTER TABLE late {change}")
            wanted = ("j", "k") if change == "ADD k int" else ("j",)
            assert known(db, "SELECT * FROM late").keys() == wanted


@pytest.mark.parametrize("ends", ["auto", "manual"])
def test_known_statements_do_not_skip_a_cleaning(
    start: Any, node: Node, taken: list[bool], ends: str
) -> None:
    """A setting made inside a function is in no statement's text: `reset: always` cleans it all the same."""
    start()
    with node.connect() as admin:
        admin.execute("""CREATE OR REPLACE FUNCTION own.leak() RETURNS text LANGUAGE sql
                         AS $$ SELECT set_config('app.tenant', 'secret', false) $$""")
    group = {"connection_count": 1, "reset": "always", "autocommit": ends == "auto"}
    entry = server(node, options={"search_path": "own"})
    Connection.init(config([entry], always=group))
    for _ in range(15):
        with Handler("always") as db:
            db.query("SELECT leak()").fetchone()
        with Handler("always") as db:
            row = db.query("SELECT coalesce(current_setting('app.tenant', true), '') AS left").fetchone()
            assert row[0] == ""
    assert sum(taken) > 10


def test_a_text_that_is_not_ascii_is_written_in_the_sessions_encoding(start: Callable[..., None]) -> None:
    start(options={"search_path": "own", "client_encoding": "LATIN1"})
    for _ in range(3):
        with Handler("unprepared") as db:
            assert db.fetchval("SELECT 'é'") == "é"
            assert db.fetchval("SELECT length('é')") == 1


@pytest.mark.parametrize("name", ["manual", "unprepared"])
def test_fetch_and_execute_have_the_columns_of_their_cursor_or_statement(
    start: Callable[..., None], name: str
) -> None:
    start()
    for columns in ("1 AS a, 2 AS b", "3 AS x, 4 AS y", "5 AS p, 6 AS q, 7 AS r"):
        names = [column.split()[-1] for column in columns.split(", ")]
        for _ in range(7):
            with Handler(name) as db, db.transaction():
                db.query(f"DECLARE cu CURSOR FOR SELECT {columns}")
                assert list(db.query("FETCH ALL FROM cu").fetchone().keys()) == names
            with Handler(name) as db, db.transaction():
                db.query(f"PREPARE made AS SELECT {columns}")
                assert list(db.query("EXECUTE made").fetchone().keys()) == names
                db.query("DEALLOCATE made")


def test_parameters_classes_are_not_kept_for_ever(start: Callable[..., None]) -> None:
    start()
    kept = []
    for number in range(600):
        made = type(f"Text{number}", (str,), {})
        kept.append(weakref.ref(made))
        with Handler("auto") as db:
            db.query("SELECT %s", (made("x"),)).fetchone()
        del made
    gc.collect()
    assert sum(made() is not None for made in kept) < 300


@pytest.mark.parametrize("factory", [None, tuple_row, dict_row])
def test_results_of_one_statement_that_are_held_at_once_stay_apart(
    start: Callable[..., None], taken: list[bool], factory: Any
) -> None:
    start()
    with Handler("auto") as db:

        def asked(number: int) -> Any:
            return db.cursor(row_factory=factory).execute(
                "SELECT g, g::text FROM generate_series(%s, 9) g", (number,)
            )

        for _ in range(6):
            asked(9)
        held = [asked(number) for number in range(10)]
        again = held[4].execute("SELECT g, g::text FROM generate_series(%s, 9) g", (7,))
        assert [len(cursor.fetchall()) for cursor in held] == [10, 9, 8, 7, 3, 5, 4, 3, 2, 1]
        assert again.fetchone() is None
        del held, again
        gc.collect()
        assert len(asked(8).fetchall()) == 2
        assert taken[-12:] == [True] * 12


def test_a_result_is_freed_with_its_cursor(start: Callable[..., None], taken: list[bool]) -> None:
    start()
    with Handler("auto") as db:
        for _ in range(8):
            assert len(db.query("SELECT 1 FROM generate_series(1, 100)").fetchall()) == 100
        (reader,) = db._live().readers.values()
        assert taken[-1]
        assert reader.tx.pgresult is None
        cursor = db.query("SELECT 1 FROM generate_series(1, 100)")
        assert reader.tx.pgresult is cursor.pgresult


@pytest.mark.skipif(sys.version_info < (3, 11), reason="each instance has a dictionary")
def test_a_connection_that_is_not_handed_out_has_no_dictionary(node: Node) -> None:
    program = """
        import gc, json, sys
        from pgdbpool import Connection, Handler

        Connection.init(json.loads(sys.argv[1]))
        for group in ("auto", "manual", "tenant"):
            for _ in range(3):
                with Handler(group, tenant="a" if group == "tenant" else None) as db:
                    db.query("SELECT 1")
                    conn = db._live()
            print([each for each in gc.get_referents(conn) if isinstance(each, dict) and "pgconn" in each])
    """
    # In a process of its own: keys are shared until the instances of a class have had too many.
    arguments = [sys.executable, "-c", textwrap.dedent(program), json.dumps(config([server(node)], **GROUPS))]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n" * 3


def test_a_time_is_read_in_the_time_zone_of_now(start: Callable[..., None], taken: list[bool]) -> None:
    start()
    with Handler("auto") as db:

        def offset() -> Any:
            return db.fetchval("SELECT now() WHERE %s = 1", (1,)).utcoffset()

        for _ in range(8):
            assert offset() == dt.timedelta(0)
        db.query("SELECT pg_catalog.set_config('TimeZone', 'Asia/Tokyo', false)")
        assert [offset(), offset()] == [dt.timedelta(hours=9)] * 2
        db.query("SET TimeZone = 'UTC'")
        assert offset() == dt.timedelta(0)
        assert taken[-1]


def test_a_loader_registered_late_is_used(start: Callable[..., None], taken: list[bool]) -> None:
    class Shouting(Loader):
        def load(self, data: Any) -> str:
            return bytes(data).decode().upper()

    start()
    with Handler("auto") as db:
        for _ in range(8):
            assert db.fetchval("SELECT %s::text", ("a",)) == "a"
        cursor = db.query("SELECT %s::text", ("a",))
        cursor.adapters.register_loader("text", Shouting)
        assert cursor.fetchone() == ("A",)
        assert db.fetchval("SELECT %s::text", ("a",)) == "a"
        db.connection.adapters.register_loader("text", Shouting)
        assert db.fetchval("SELECT %s::text", ("a",)) == "A"
    with Handler("auto") as db:
        assert db.fetchval("SELECT %s::text", ("a",)) == "a"


# psycopg's generator of the pipeline finds another one in its place as it is dropped.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["auto", "manual"])
def test_a_pipeline_that_was_left_open_is_not_the_next_blocks(start: Callable[..., None], name: str) -> None:
    start()
    with suppress(psycopg.Error, pgdbpool.Error), Handler(name) as db:
        pipeline = db.pipeline()
        pipeline.__enter__()
    with Handler(name, settings={"app.left": "two"}) as db:
        assert db.fetchval("SELECT current_setting('app.left', true)") == "two"
    del pipeline

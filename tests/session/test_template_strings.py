"""Template strings (`t"..."`) work wherever a statement does, and are known as well as one that is text."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from support import config, kill_backends, pid_of, server
from templates import REAL, template

import pgdbpool
from pgdbpool import Connection, DBQueryError, Handler
from pgdbpool._session import outcome
from pgdbpool._session.statement_shape import shape
from pgdbpool._session.statement_text import text_of
from pgdbpool.errors import ResultError

GROUPS = pytest.mark.parametrize("group", ["auto", "manual", "auto_t", "manual_t"])


@pytest.fixture
def admin(known_cluster: Any) -> Iterator[psycopg.Connection[Any]]:
    with known_cluster.primary.connect() as conn:
        conn.execute("CREATE TABLE t (i int, v text)")
        yield conn


@pytest.fixture
def start(mode: str, known_cluster: Any, admin: Any) -> Iterator[Callable[..., None]]:
    """Initialise groups `auto` and `manual`, and `auto_t` and `manual_t` with a tenant, of one connection."""
    common: dict[str, Any] = {"connection_count": 1}
    tenant = {**common, "tenant": {"setting": "app.tenant", "required": False, "verify": "off"}}
    groups = {
        "auto": common,
        "manual": {**common, "autocommit": False},
        "auto_t": tenant,
        "manual_t": {**tenant, "autocommit": False},
    }

    def begin(**changes: Any) -> None:
        all_groups = {name: {**group, **changes} for name, group in groups.items()}
        Connection.init(config([server(known_cluster.primary)], mode, **all_groups))

    yield begin
    Connection.reset()


def insert(number: int, text: str) -> Any:
    return template("INSERT INTO t VALUES (", (number, "number"), ", ", (text, "text"), ")")


WHERE = template("WHERE i = ", (1, "number"))


@GROUPS
def test_values_are_bound_in_every_method_of_a_block(start: Any, group: str) -> None:
    start()
    tenant = {"tenant": "a"} if group.endswith("_t") else {}
    with Handler(group, **tenant) as db:
        assert db.execute(insert(1, "it's")) == "INSERT 0 1"
        chosen = template(
            "SELECT ",
            ("v", "column", "i"),
            ", current_setting('app.tenant', true) FROM t ",
            (WHERE, "w", "q"),
        )
        who = "a" if tenant else None
        assert [(row[0], row[1] or None) for row in db.fetch(chosen)] == [("it's", who)]
        assert db.fetchrow(chosen)["v"] == db.fetchval(chosen) == "it's"
        assert [row.v for row in db.query(chosen)] == ["it's"]
        assert [row.v for row in db.cursor().stream(chosen)] == ["it's"]
        assert db.fetchval(template("SELECT ", (sql.Literal("x"), "literal", "l"))) == "x"


@GROUPS
def test_values_are_bound_in_a_block_of_one_statement(start: Any, admin: Any, group: str) -> None:
    start()
    tenant = {"tenant": "a"} if group.endswith("_t") else {}
    assert Connection.execute(group, insert(1, "a"), **tenant) == "INSERT 0 1"
    (row,) = Connection.fetch(group, template("SELECT v FROM t WHERE i = ", (1, "n")), **tenant)
    assert row == Connection.fetchrow(group, template("SELECT v FROM t"), **tenant) == ("a",)
    assert Connection.fetchval(group, template("SELECT ", (7, "n")), **tenant) == 7
    assert admin.execute("SELECT * FROM t").fetchall() == [(1, "a")]


@GROUPS
def test_copy_takes_a_query_with_values(start: Any, group: str) -> None:
    start()
    tenant = {"tenant": "a"} if group.endswith("_t") else {}
    with Handler(group, **tenant) as db:
        output = io.BytesIO()
        tag = db.copy_from_query(template("SELECT ", (5, "n"), ", ", ("x;y", "text")), output=output)
        assert (tag, output.getvalue()) == ("COPY 1", b"5\tx;y\n")
        with db.copy(template("COPY (SELECT ", (6, "n", "l"), ") TO STDOUT")) as copy:
            assert b"".join(copy) == b"6\n"


@pytest.mark.skipif(not REAL, reason="psycopg makes another template string of it: Python 3.14")
def test_a_named_cursor_takes_one(start: Any) -> None:
    start()
    with Handler("manual") as db, db.cursor("c") as cursor:
        cursor.execute(template("SELECT generate_series(1, ", (3, "n"), ") AS i"))
        assert [row.i for row in cursor] == [1, 2, 3]


@pytest.mark.skipif(not REAL, reason="a syntax error before Python 3.14")
def test_the_interpreters_own_syntax_makes_one(start: Any) -> None:
    start()
    names = {"text": "it's", "column": "v; --", "made": template("::text")}
    written = eval('t"SELECT {text}{made:q} AS {column:i}, 100 % {3}"', names)
    for group in ("auto", "manual"):
        with Handler(group) as db:
            assert dict(db.fetchrow(written)) == {"v; --": "it's", "?column?": 1}
        assert Connection.fetchval(group, written) == "it's"


@GROUPS
def test_several_statements_share_its_values(start: Any, admin: Any, group: str) -> None:
    start()
    tenant = {"tenant": "a"} if group.endswith("_t") else {}
    several = template("INSERT INTO t VALUES (", (1, "n"), ", ", ("100 %", "v"), "); SELECT ", (2, "n"))
    with Handler(group, **tenant) as db:
        assert db.fetchval(several) == 2
        assert db.cursor().execute(several).nextset()
        with pytest.raises(TypeError, match="doesn't support parameters"):
            db.query(several, (1,))
    assert Connection.fetchval(group, several, **tenant) == 2
    assert admin.execute("SELECT * FROM t").fetchall() == [(1, "100 %")] * 3


@GROUPS
def test_sets_of_parameters_are_refused_before_anything_is_sent(start: Any, admin: Any, group: str) -> None:
    start()
    tenant = {"tenant": "a"} if group.endswith("_t") else {}
    refused = pytest.raises(TypeError, match="text with %s, or execute a template string for each set")
    with Handler(group, **tenant) as db:
        for many in (db.executemany, db.fetchmany, db.cursor().executemany):
            with refused:
                many(insert(1, "a"), [(1,)])
        assert db.execute(insert(2, "b")) == "INSERT 0 1"
    with refused:
        Connection.executemany(group, insert(1, "a"), [(1,)], **tenant)
    assert admin.execute("SELECT * FROM t").fetchall() == [(2, "b")]


@pytest.mark.skipif(not REAL, reason="psycopg makes another template string of it: Python 3.14")
def test_what_cannot_ride_has_its_id_in_a_comment(start: Any) -> None:
    start(annotate=True)
    with Handler("auto", correlation_id="mine") as db:
        several = template("SELECT current_query(), ", (1, "n"), "; SELECT 2")
        assert db.query(several).fetchone()[0].startswith("/* correlation_id=mine */ SELECT")
        with db.copy(template("COPY (SELECT current_query(), ", (1, "n"), ") TO STDOUT")) as copy:
            (row,) = copy.rows()
            assert row[0].startswith("/* correlation_id=mine */ COPY")


def test_one_that_is_written_again_and_again_is_prepared(start: Any) -> None:
    start()
    with Handler("auto") as db:
        for number in range(8):
            assert db.fetchval(template("SELECT ", (number, "number"), "::int")) == number
        prepared = "SELECT count(*) FROM pg_prepared_statements WHERE statement = 'SELECT $1::int'"
        assert db.fetchval(prepared) == 1


@pytest.mark.parametrize("group", ["manual", "manual_t"])
def test_the_first_of_a_transaction_is_sent_again_after_a_loss(start: Any, admin: Any, group: str) -> None:
    start()
    tenant = {"tenant": "a"} if group == "manual_t" else {}
    with Handler(group, **tenant) as db:
        pid = pid_of(db)
    with Handler(group, **tenant) as db:
        kill_backends(admin, pid)
        assert db.execute(insert(1, "a")) == "INSERT 0 1"
    assert admin.execute("SELECT * FROM t").fetchall() == [(1, "a")]


@pytest.mark.slow
@GROUPS
def test_one_that_reads_is_cancelled_at_its_deadline(start: Any, group: str) -> None:
    start()
    tenant = {"tenant": "a"} if group.endswith("_t") else {}
    with Handler(group, **tenant) as db:
        pid = pid_of(db)
        with pytest.raises(DBQueryError), pgdbpool.deadline(0.3):
            db.query(template("SELECT pg_sleep(", (20, "seconds"), ")"))
        db.rollback()
        assert pid_of(db) == pid


def test_an_unreadable_result_of_one_that_only_reads_names_no_commit(start: Any) -> None:
    start()

    def fails(cursor: Any) -> Any:
        return lambda values: 1 / 0

    for group in ("auto", "manual"):
        with pytest.raises(ZeroDivisionError):
            Connection.fetch(group, template("SELECT ", (1, "n")), row_factory=fails)
        writes = template("INSERT INTO t VALUES (", (1, "n"), ") RETURNING i")
        with pytest.raises(ResultError, match="the statement is committed"):
            Connection.fetch(group, writes, row_factory=fails)


def test_parameters_beside_one_are_refused(start: Any) -> None:
    start()
    with Handler("auto") as db:
        with pytest.raises(TypeError, match="doesn't support parameters"):
            db.fetch(template("SELECT 1"), (1,))
        assert db.fetchval(template("SELECT 1")) == 1


def test_it_may_begin_and_end_a_transaction_and_change_its_session(start: Any, admin: Any) -> None:
    start()
    with Handler("auto") as db:
        db.query(template("BEGIN"))
        db.query(insert(1, "a"))
        db.query(template("ROLLBACK"))
        db.query(template("SET search_path = ", ("pg_catalog", "path", "i")))
    with Handler("auto") as db:
        assert db.fetchval("SHOW search_path") == '"$user", public'
    assert admin.execute("SELECT * FROM t").fetchall() == []


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("SELECT ", (1, "n")), "SELECT $1"),
        (("SELECT 1; SELECT 2",), "SELECT 1; SELECT 2"),
        (("SET statement_timeout = ", (5, "n", "l")), "SET statement_timeout = 5"),
        (("SELECT ", (sql.Identifier("a;b"), "name", "i")), 'SELECT "a;b"'),
        (("SELECT ", ("a;b", "name", "i")), 'SELECT "a;b"'),
        (((template("COPY t TO STDOUT"), "copy", "q"),), "COPY t TO STDOUT"),
        (("SELECT 1 ", (template("AS ", ("x", "name", "i")), "as", "q")), 'SELECT 1 AS "x"'),
    ],
)
def test_what_is_known_of_it_is_what_is_known_of_its_text(
    known_cluster: Any, parts: tuple[Any, ...], text: str
) -> None:
    with known_cluster.primary.connect() as conn:
        assert shape(template(*parts), conn) == shape(text, conn)


@pytest.mark.parametrize(
    "text", ["SELECT 1", "INSERT INTO t VALUES (1)", "WITH x AS (DELETE FROM t) SELECT 1", "COMMIT"]
)
@pytest.mark.parametrize("inside", [False, True])
def test_whether_it_may_commit_is_seen_in_its_text(text: str, inside: bool) -> None:
    head, space, rest = text.partition(" ")
    for whole in (template(text), template((sql.SQL(head), "head", "q"), space + rest)):
        assert outcome.may_commit(whole, inside) is outcome.may_commit(text, inside)


class Own:
    """A value that only a connection with an adapter of its own can write."""


def test_a_literal_that_only_its_connection_can_write_may_commit() -> None:
    for whole in (template("SELECT ", (Own(), "own", "l")), sql.SQL("SELECT {}").format(Own())):
        assert outcome.may_commit(whole, inside=False)


@pytest.mark.parametrize(
    ("parts", "shown"),
    [
        (("SELECT  ", ("secret", "name.text")), "SELECT {name.text}"),
        (("SELECT ", ("secret", "name", "l")), "SELECT {name}"),
        (
            ("SELECT ", ("v", "column", "i"), "\n FROM t ", (WHERE, "where", "q")),
            'SELECT "v" FROM t WHERE i = {number}',
        ),
        (((sql.SQL("SELECT {}, {}").format("secret", sql.Identifier("x")), "all", "q"),), 'SELECT ..., "x"'),
    ],
)
def test_people_see_its_text_and_expressions_but_no_value(parts: tuple[Any, ...], shown: str) -> None:
    assert text_of(template(*parts)) == shown

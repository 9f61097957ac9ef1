"""Template strings (`t"..."`) work wherever a statement does, and are known as well as one that is text."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from support import config, server
from templates import REAL, template

from pgdbpool import Connection, Handler
from pgdbpool._session.statement_shape import shape

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
    yield lambda: Connection.init(config([server(known_cluster.primary)], mode, **groups))
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

"""What mypy and pyright find in an application's code; `test_typing` runs them over it, and nothing runs it.

Each line with an error says who reports it: mypy knows no literal strings (PEP 675), and takes any string.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import class_row, dict_row, kwargs_row, scalar_row
from typing_extensions import assert_type

from pgdbpool import Connection, Handler, Pools, Query, Row, retrying, run


@dataclass
class Account:
    id: int
    name: str


def a_statement_is_no_composed_string(db: Handler, table: str, given: bytes) -> None:
    db.query("SELECT 1")
    db.query("SELECT 1 UNION ALL SELECT 2")
    db.query(given)
    db.query(sql.SQL("SELECT * FROM {}").format(sql.Identifier(table)))
    db.query("SELECT * FROM " + table)  # pyright
    db.query(f"SELECT * FROM {table}")  # pyright
    db.fetch("SELECT * FROM " + table)  # pyright
    db.fetchrow("SELECT * FROM " + table)  # pyright
    db.fetchval("SELECT * FROM " + table)  # pyright
    db.fetchmany("SELECT * FROM " + table, [])  # pyright
    db.execute("DELETE FROM " + table)  # pyright
    db.executemany("DELETE FROM " + table, [])  # pyright
    db.copy("COPY " + table)  # pyright
    db.copy_from_query("SELECT * FROM " + table, output="x")  # pyright
    db.cursor().execute("SELECT * FROM " + table)  # pyright
    db.cursor("named").execute("SELECT * FROM " + table)  # pyright
    Query.execute(db, "SELECT * FROM " + table)  # pyright
    Connection.fetch("read", "SELECT * FROM " + table)  # pyright
    Connection.fetchrow("read", "SELECT * FROM " + table)  # pyright
    Connection.fetchval("read", "SELECT * FROM " + table)  # pyright
    Connection.fetchmany("read", "SELECT * FROM " + table, [])  # pyright
    Connection.execute("read", "DELETE FROM " + table)  # pyright
    Connection.executemany("read", "DELETE FROM " + table, [])  # pyright
    Connection.getconn("read").execute("DELETE FROM " + table)  # pyright
    db.query(1)  # mypy pyright
    Connection.fetch("read", None)  # mypy pyright


def parameters_are_a_sequence_or_a_mapping(db: Handler) -> None:
    db.query("SELECT %s", (1,))
    db.query("SELECT %(x)s", {"x": 1})
    db.query("SELECT %s", 1)  # mypy pyright
    db.fetch("SELECT %s", 1)  # mypy pyright
    db.execute("SELECT %s", {1})  # mypy pyright
    db.executemany("SELECT %s", [1, 2])  # mypy pyright
    Connection.fetchval("read", "SELECT %s", 1)  # mypy pyright


def rows_are_what_the_row_factory_makes(db: Handler) -> None:
    with db.cursor(row_factory=class_row(Account)) as cursor:
        assert_type(cursor, psycopg.Cursor[Account])
        assert_type(cursor.execute("SELECT 1").fetchone(), Account | None)
    with db.cursor("large", row_factory=dict_row) as named:
        assert_type(named.fetchall(), list[dict[str, Any]])
    assert_type(db.fetch("SELECT 1", row_factory=class_row(Account)), list[Account])
    assert_type(db.fetchrow("SELECT 1", row_factory=class_row(Account)), Account | None)
    assert_type(db.fetchmany("SELECT 1", [], row_factory=kwargs_row(Account)), list[Account])
    assert_type(db.fetch("SELECT 1", (1,), row_factory=scalar_row), list[Any])
    one = Connection.fetchrow("read", "SELECT 1", row_factory=class_row(Account), tenant=1)
    assert_type(one, Account | None)
    assert_type(Connection.fetch("read", "SELECT 1", row_factory=class_row(Account)), list[Account])
    assert_type(Connection.fetchmany("read", "SELECT 1", [], row_factory=dict_row), list[dict[str, Any]])
    accounts: list[Account] = db.fetch("SELECT 1", row_factory=dict_row)  # mypy pyright
    print(accounts, one.name)  # mypy pyright


def rows_without_one_are_the_groups_which_nobody_knows_here(db: Handler) -> None:
    assert_type(db.fetch("SELECT 1"), list[Any])
    assert_type(Connection.fetch("read", "SELECT 1"), list[Any])
    rows: list[Row] = db.fetch("SELECT 1")
    dicts: list[dict[str, Any]] = db.fetch("SELECT 1")
    for row in db.query("SELECT 1"):
        print(row.id, row["id"], rows, dicts)
    print(rows[0].id, rows[0]["id"], rows[0].get("id"))


def a_command_tag_is_a_string(db: Handler) -> None:
    tag: str = db.execute("DELETE FROM accounts")
    print(tag, db.execute("SELECT 1").fetchall())  # mypy pyright


def work(db: Handler) -> int:
    return db.executemany("DELETE FROM accounts WHERE id = %s", [(1,)])


def a_set_of_pools_is_typed_as_the_default_one(table: str) -> None:
    with Pools({"db": {}}, wait="all", name="reports") as pools:
        assert_type(pools, Pools)
        assert_type(pools.fetch("read", "SELECT 1", row_factory=class_row(Account)), list[Account])
        with pools.Handler("read", timeout=1) as db:
            assert_type(db, Handler)
        assert_type(run("write", work, pools=pools), int)
        assert_type(retrying("write", pools=pools)(work)(), int)
        pools.fetchval("read", "SELECT * FROM " + table)  # pyright
        pools.getconn("read").execute("DELETE FROM " + table)  # pyright
        pools.Handler("read", priority="urgent")  # mypy pyright
        pools.fetch("read", "SELECT 1", timeuot=1)  # mypy pyright
        pools.init({})  # mypy pyright
    Pools({}, name=1)  # mypy pyright
    run("write", work, pools=Connection)  # mypy pyright


assert_type(run("write", work), int)
Connection.init({"db": {}}, wait="al")  # mypy pyright
Handler("read", priority="urgent")  # mypy pyright
Connection.fetch("read", "SELECT 1", timeuot=1)  # mypy pyright

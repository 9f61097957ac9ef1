"""The query methods of a Handler under asyncpg's names, in both modes."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from psycopg.rows import class_row, tuple_row
from support import config, kill_backends, server

import pgdbpool
from pgdbpool import Connection, Handler, Row

THREE = "SELECT i, 'v' || i AS v FROM generate_series(1, 3) AS i"


@pytest.fixture(params=["threaded", "non-threaded"])
def start(request: pytest.FixtureRequest, known_cluster: Any, admin: Any) -> Iterator[Callable[..., None]]:
    """Initialise groups `auto`, `manual`, and with a tenant `auto_t` and `manual_t`; `t` is empty."""
    admin.execute("CREATE TABLE t (i int PRIMARY KEY, v text DEFAULT current_setting('app.tenant', true))")

    def init(**changes: Any) -> None:
        common = {"connection_count": 1, **changes}
        tenant = {**common, "tenant": {"setting": "app.tenant", "verify": "off"}}
        groups = {
            "auto": common,
            "manual": {**common, "autocommit": False},
            "auto_t": tenant,
            "manual_t": {**tenant, "autocommit": False},
        }
        Connection.init(config([server(known_cluster.primary)], request.param, **groups))

    yield init
    Connection.reset()


@pytest.fixture
def admin(known_cluster: Any) -> Iterator[psycopg.Connection[Any]]:
    with known_cluster.primary.connect() as conn:
        yield conn


def values(admin: psycopg.Connection[Any]) -> list[Any]:
    return [row[0] for row in admin.execute("SELECT i FROM t ORDER BY i")]


GROUPS = pytest.mark.parametrize("group", ["auto", "manual"])


@GROUPS
def test_fetch_returns_all_rows(start: Any, group: str) -> None:
    start()
    with Handler(group) as db:
        rows = db.fetch(THREE)
        assert [(row["i"], row.v) for row in rows] == [(1, "v1"), (2, "v2"), (3, "v3")]
        assert all(isinstance(row, Row) for row in rows)
        assert db.fetch("SELECT 1 WHERE false") == []
        assert db.fetch("INSERT INTO t VALUES (1)") == []
        assert db.fetch("") == []
        assert db.fetch("INSERT INTO t VALUES (2) RETURNING i") == [(2,)]


@GROUPS
def test_fetchrow_returns_the_first_row_or_none(start: Any, group: str) -> None:
    start()
    with Handler(group) as db:
        assert db.fetchrow(THREE) == (1, "v1")
        assert db.fetchrow("SELECT %s AS x", ("%",)) == ("%",)
        assert db.fetchrow("SELECT 1 WHERE false") is None
        assert db.fetchrow("INSERT INTO t VALUES (1)") is None


@GROUPS
def test_fetchval_returns_a_value_by_index_or_name(start: Any, group: str) -> None:
    start()
    with Handler(group) as db:
        assert db.fetchval(THREE) == 1
        assert db.fetchval(THREE, column=1) == "v1"
        assert db.fetchval(THREE, None, -1) == "v1"
        assert db.fetchval(THREE, column="v") == "v1"
        assert db.fetchval("SELECT %(a)s::int", {"a": 7}) == 7
        assert db.fetchval("SELECT NULL") is None
        assert db.fetchval("SELECT 1 WHERE false", column="nope") is None
        assert db.fetchval("INSERT INTO t VALUES (1)") is None


@GROUPS
def test_a_wrong_column_is_named_and_the_block_goes_on(start: Any, group: str) -> None:
    start()
    with Handler(group) as db:
        with pytest.raises(IndexError, match="no column 2; the columns from 0 on are i, v"):
            db.fetchval(THREE, column=2)
        with pytest.raises(KeyError, match="no column 'w'; the columns are i, v"):
            db.fetchval(THREE, column="w")
        assert db.fetchval("SELECT 1") == 1


@GROUPS
def test_execute_returns_the_command_tag(start: Any, group: str, admin: Any) -> None:
    start()
    with Handler(group) as db:
        assert db.execute("INSERT INTO t VALUES (%s), (%s)", (1, 2)) == "INSERT 0 2"
        assert db.execute("UPDATE t SET v = 'x'") == "UPDATE 2"
        assert db.execute(THREE) == "SELECT 3"
        assert db.execute("CREATE TEMP TABLE x ()") == "CREATE TABLE"
        assert db.execute("") == ""
    assert values(admin) == [1, 2]


@GROUPS
def test_of_several_statements_it_is_the_last_one_that_counts(start: Any, group: str) -> None:
    start()
    several = "INSERT INTO t VALUES (%s); SELECT i + 1 AS j FROM t"
    with Handler(group) as db:
        assert db.fetch(several, (1,)) == [(2,)]
        db.execute("DELETE FROM t")
        assert db.fetchrow(several, (1,)).j == 2
        db.execute("DELETE FROM t")
        assert db.fetchval(several, (1,), "j") == 2
        assert db.execute("SELECT 1; DELETE FROM t") == "DELETE 1"


@pytest.mark.parametrize("kind", [str.encode, psycopg.sql.SQL], ids=["bytes", "sql"])
@GROUPS
def test_several_statements_that_are_not_text_share_parameters_too(
    start: Any, group: str, kind: Callable[[str], Any]
) -> None:
    start()
    several = kind("INSERT INTO t VALUES (%s); SELECT i + 1 FROM t")
    with Handler(group) as db:
        assert db.fetchval(several, (1,)) == 2
        db.execute("DELETE FROM t")
    assert Connection.fetchval(group, several, (1,)) == 2


@GROUPS
def test_the_rows_are_those_of_the_groups_row_factory(start: Any, group: str) -> None:
    start(row_factory="dict")
    with Handler(group) as db:
        assert db.fetch("SELECT 1 AS a") == [{"a": 1}]
        assert db.fetchrow("SELECT 1 AS a") == {"a": 1}
        assert db.fetchval("SELECT 1 AS a") == 1
        assert db.fetchval("SELECT 1 AS a", column="a") == 1
        assert db.fetchmany("SELECT %s::int AS a", [(1,), (2,)]) == [{"a": 1}, {"a": 2}]


@GROUPS
def test_executemany_counts_the_rows_of_all(start: Any, group: str, admin: Any) -> None:
    start()
    with Handler(group) as db:
        assert db.executemany("INSERT INTO t VALUES (%s, %s)", [(i, "x") for i in range(5)]) == 5
        assert db.executemany("DELETE FROM t WHERE i < %(n)s", ({"n": n} for n in (2, 3))) == 3
        assert db.executemany("DELETE FROM t WHERE i = %s", []) == 0
    assert values(admin) == [3, 4]


@pytest.mark.parametrize("method", ["executemany", "fetchmany"])
@pytest.mark.parametrize("group", ["auto", "auto_t", "manual"])
def test_many_are_executed_all_or_none(start: Any, group: str, admin: Any, method: str) -> None:
    start()
    insert = "INSERT INTO t VALUES (%s) RETURNING i"
    use = {"tenant": "a"} if group == "auto_t" else {}
    with pytest.raises(psycopg.errors.UniqueViolation), Handler(group, **use) as db:
        getattr(db, method)(insert, [(1,), (2,), (1,), (3,)])
    assert values(admin) == []
    with Handler(group, **use) as db:
        getattr(db, method)(insert, [(1,), (2,)])
    assert values(admin) == [1, 2]


@GROUPS
def test_fetchmany_returns_the_rows_of_all(start: Any, group: str, admin: Any) -> None:
    start()
    with Handler(group) as db:
        rows = db.fetchmany("INSERT INTO t VALUES (%s) RETURNING i, i * 2 AS twice", [(1,), (2,), (3,)])
        assert [(row.i, row.twice) for row in rows] == [(1, 2), (2, 4), (3, 6)]
        assert db.fetchmany("SELECT n FROM generate_series(1, %s) n", [(2,), (0,), (1,)]) == [
            (1,),
            (2,),
            (1,),
        ]
        assert db.fetchmany("UPDATE t SET v = %s", [("x",)]) == []
        assert db.fetchmany("SELECT %s", []) == []
    assert values(admin) == [1, 2, 3]


def test_a_broken_iterable_of_parameters_sends_nothing(start: Any, admin: Any) -> None:
    def broken() -> Iterator[tuple[int]]:
        yield (1,)
        raise ZeroDivisionError

    start()
    with Handler("manual") as db:
        for method in (db.executemany, db.fetchmany):
            with pytest.raises(ZeroDivisionError):
                method("INSERT INTO t VALUES (%s)", broken())
        db.execute("INSERT INTO t VALUES (2)")
    assert values(admin) == [2]


@pytest.mark.parametrize("group", ["auto", "auto_t"])
def test_a_constraint_that_fails_at_the_end_of_a_pipeline_is_that_error(
    start: Any, admin: Any, group: str
) -> None:
    start()
    admin.execute("CREATE TABLE child (i int REFERENCES t DEFERRABLE INITIALLY DEFERRED)")
    use = {"tenant": "a"} if group == "auto_t" else {}
    with Handler(group, **use) as db:
        for method in (db.executemany, db.fetchmany):
            with pytest.raises(psycopg.errors.ForeignKeyViolation) as caught:
                method("INSERT INTO child VALUES (%s) RETURNING i", [(8,), (9,)])
            assert isinstance(caught.value, pgdbpool.DBQueryError)
            assert not isinstance(caught.value, pgdbpool.ConnectionLostError)
        with pytest.raises(psycopg.errors.ForeignKeyViolation) as caught, db.pipeline():
            db.query("INSERT INTO child VALUES (9)")
        assert isinstance(caught.value, pgdbpool.DBQueryError)
        assert db.fetchval("SELECT count(*) FROM child") == 0


def test_many_are_prepared_once_for_each_combination_of_types(start: Any) -> None:
    start()
    with Handler("auto") as db:
        sets = [(1,), (2,), ("x",), (None,), (100_000,), (3,)] * 3
        rows = db.fetchmany("SELECT %s AS many", sets)
        assert [row.many for row in rows] == [value for (value,) in sets]
        prepared = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%AS many'"
        count = db.fetchval(prepared)
        assert 2 <= count <= 4
        assert len(db.fetchmany("SELECT %s AS many", sets)) == len(sets)
        assert db.fetchval(prepared) == count
    start(prepare_threshold=None)
    with Handler("auto") as db:
        assert db.fetchmany("SELECT %s AS many", sets) == rows
        assert db.fetchval(prepared) == 0


@pytest.mark.parametrize("method", ["executemany", "fetchmany"])
def test_a_bad_set_of_parameters_sends_nothing_and_keeps_the_connection(
    start: Any, admin: Any, method: str
) -> None:
    start()
    with Handler("auto") as db:
        pid = db.fetchval("SELECT pg_backend_pid()")
        for sets, error in (
            ([("1",), ("2\0",)], psycopg.DataError),
            ([(1,), (2, 3)], psycopg.ProgrammingError),
            ([(1,), (object(),)], psycopg.ProgrammingError),
            ([(1,), None], psycopg.ProgrammingError),
        ):
            with pytest.raises(error):
                getattr(db, method)("INSERT INTO t VALUES (%s)", sets)
        assert db.fetchval("SELECT pg_backend_pid()") == pid
    assert values(admin) == []


@pytest.mark.parametrize("method", ["executemany", "fetchmany"])
def test_executemany_works_for_statements_that_cannot_ride(start: Any, admin: Any, method: str) -> None:
    start()
    admin.execute("CREATE PROCEDURE add(n int) LANGUAGE sql AS 'INSERT INTO t VALUES (n)'")
    for group in ("auto", "manual"):
        with Handler(group) as db:
            getattr(db, method)("CALL add(%s)", [(1,), (2,)])
        assert values(admin) == [1, 2]
        with Handler(group) as db, db.pipeline():
            getattr(db, method)("DELETE FROM t WHERE i = %s RETURNING i", [(1,), (2,)])
        assert values(admin) == []


@pytest.mark.parametrize("method", ["executemany", "fetchmany"])
def test_many_that_lose_their_connection_say_so(start: Any, admin: Any, method: str) -> None:
    start()
    lose = "SELECT pg_terminate_backend(pg_backend_pid()), %s"
    with Handler("auto") as db:
        with pytest.raises(pgdbpool.ConnectionLostError) as caught:
            getattr(db, method)(lose, [(1,)])
        assert caught.value.maybe_executed
        assert db.fetchval("SELECT 1") == 1
    with pytest.raises(pgdbpool.TransactionAbortedError), Handler("manual") as db:
        db.execute("INSERT INTO t VALUES (1)")
        with pytest.raises(pgdbpool.ConnectionLostError) as caught:
            getattr(db, method)(lose, [(1,)])
        assert not caught.value.maybe_executed
    admin.execute("CREATE SEQUENCE s; GRANT ALL ON s TO public")
    once = "SELECT CASE WHEN nextval('s') = 1 THEN pg_terminate_backend(pg_backend_pid()) END, %s"
    with Handler("manual") as db:  # as the first of its transaction it is sent again
        getattr(db, method)(once, [(1,), (2,)])
    assert admin.execute("SELECT last_value FROM s").fetchone() >= (3,)


def test_a_failure_of_many_that_is_swallowed_raises_at_the_end(start: Any, admin: Any) -> None:
    start()
    for method in ("executemany", "fetchmany"):
        with pytest.raises(pgdbpool.TransactionAbortedError) as caught, Handler("manual") as db:
            with pytest.raises(psycopg.errors.UniqueViolation):
                getattr(db, method)("INSERT INTO t VALUES (%s)", [(1,), (1,)])
        assert isinstance(caught.value.__cause__, psycopg.errors.UniqueViolation)
    assert values(admin) == []


@GROUPS
@pytest.mark.parametrize("method", ["fetch", "fetchrow", "fetchval", "execute"])
def test_each_raises_the_errors_of_query(start: Any, group: str, method: str) -> None:
    start()
    with pytest.raises(psycopg.errors.DivisionByZero) as caught, Handler(group) as db:
        getattr(db, method)("SELECT 1 / 0")
    assert isinstance(caught.value, pgdbpool.DBQueryError)
    with pytest.raises(psycopg.DataError, match="NUL"), Handler(group) as db:
        getattr(db, method)("SELECT %s", ("a\0b",))
    with pytest.raises(psycopg.ProgrammingError, match="COPY"), Handler(group) as db:
        getattr(db, method)("COPY t TO STDOUT")
    with pytest.raises(pgdbpool.BlockClosedError):
        getattr(db, method)("SELECT 1")
    with Handler(group) as db:
        assert getattr(db, method)("SELECT 1")


def test_the_first_statement_is_sent_again_if_that_does_no_harm(start: Any, admin: Any) -> None:
    start()
    with Handler("manual") as db:
        db.fetchval("SELECT pg_backend_pid()")
        db.rollback()
        kill_backends(admin)
        assert db.fetchval("SELECT 1") == 1


@GROUPS
def test_a_pipeline_sends_without_waiting_and_each_method_can_wait_in_it(start: Any, group: str) -> None:
    start()
    with Handler(group) as db, db.pipeline():
        first = db.query("INSERT INTO t VALUES (1)")
        assert db.fetch("SELECT i FROM t") == [(1,)]
        assert first.rowcount == 1
        assert db.fetchrow("SELECT i FROM t") == (1,)
        assert db.fetchval("SELECT i FROM t") == 1
        assert db.execute("UPDATE t SET v = 'x'") == "UPDATE 1"
        assert db.fetch("DELETE FROM t") == []


@GROUPS
def test_a_failure_in_a_pipeline_is_raised_and_not_an_empty_result(start: Any, group: str) -> None:
    start()
    with pytest.raises(psycopg.errors.DivisionByZero), Handler(group) as db, db.pipeline():
        db.query("SELECT 1 / 0")
        db.fetch("DELETE FROM t")
        raise AssertionError("not reached")
    with Handler(group) as db:
        assert db.fetchval("SELECT 1") == 1


@pytest.mark.parametrize("group", ["auto", "auto_t", "manual_t"])
def test_a_named_cursor_reads_a_large_result_in_parts(start: Any, group: str) -> None:
    start()
    use = {"tenant": "a"} if group.endswith("_t") else {}
    with Handler(group, **use) as db, db.transaction(), db.cursor("large") as cursor:
        cursor.itersize = 10
        query = "SELECT i, current_setting('app.tenant', true) AS tenant FROM generate_series(1, 25) AS i"
        rows = list(cursor.execute(query))
        assert [row.i for row in rows] == list(range(1, 26))
        assert {row.tenant or None for row in rows} == {use.get("tenant")}
        cursor.execute("SELECT 1 AS one")
        assert cursor.fetchall() == [(1,)]


def test_a_named_cursor_without_a_transaction_says_how_to_have_one(start: Any) -> None:
    start()
    with Handler("auto_t", tenant="a") as db:
        with pytest.raises(psycopg.NotSupportedError, match=r"db\.transaction\(\)"):
            db.cursor("large").execute("SELECT 1")
        with db.cursor("held", withhold=True) as held:  # its rows are there when its own transaction ends
            held.execute("SELECT current_setting('app.tenant') FROM generate_series(1, 5)")
            assert [row[0] for row in (*held.fetchmany(2), *held)] == ["a"] * 5
    with Handler("auto") as db:
        with pytest.raises(psycopg.errors.NoActiveSqlTransaction):
            db.cursor("large").execute("SELECT 1")
        assert db.fetchval("SELECT 1") == 1


def test_a_cursor_that_outlives_its_transaction_does_not_outlive_its_block(start: Any) -> None:
    start()
    with Handler("auto") as db:
        db.cursor("kept", withhold=True).execute("SELECT 1")
        pid = db.fetchval("SELECT pg_backend_pid()")
        assert db.fetchval("SELECT count(*) FROM pg_cursors WHERE name = 'kept'") == 1
    with Handler("auto") as db:
        assert db.fetch("SELECT pg_backend_pid(), (SELECT count(*) FROM pg_cursors WHERE name = 'kept')") == [
            (pid, 0)
        ]


def test_a_cursor_without_a_name_is_one_of_the_block(start: Any) -> None:
    start()
    with Handler("manual_t", tenant="a") as db:
        cursor = db.cursor(row_factory=psycopg.rows.dict_row)
        assert cursor.execute("SELECT current_setting('app.tenant') AS t").fetchone() == {"t": "a"}
        binary = db.cursor(binary=True)
        assert binary.execute("SELECT 7").pgresult.fformat(0) == psycopg.pq.Format.BINARY
    with pytest.raises(psycopg.InterfaceError):
        cursor.execute("SELECT 1")


def test_none_of_them_makes_the_next_block_clean_up(start: Any) -> None:
    start()
    with Handler("manual") as db:
        db.executemany("INSERT INTO t VALUES (%s)", [(1,)])
        db.fetchmany("SELECT %s", [(1,)])
        with db.cursor("c") as cursor:
            cursor.execute("SELECT 1")
        with db.pipeline():
            db.query("SELECT 1")
        conn = db._conn
        assert not conn.touched
    assert not conn.stale


@pytest.mark.parametrize("group", ["auto", "manual", "auto_t", "manual_t"])
def test_a_stream_changes_nothing_for_the_statements_after_it(start: Any, group: str) -> None:
    start(prepare_threshold=0)  # libpq goes on row by row in a pipeline, if that begins with a query
    with Handler(group, tenant="acme" if group.endswith("_t") else None) as db:
        for _ in range(2):
            assert len(list(db.cursor().stream(THREE))) == 3
            assert len(db.fetchmany(THREE + " WHERE i < %s", [(3,), (4,)])) == 5
            list(db.cursor().stream(THREE))
            assert len(db.fetch(THREE)) == 3


# The caller's own row factory, and habits of other libraries.


@dataclass
class Pair:
    i: int
    v: str


@GROUPS
@pytest.mark.parametrize("kind", ["row", "dict"])
def test_rows_are_what_the_given_row_factory_makes(start: Any, group: str, kind: str) -> None:
    start(row_factory=kind)
    insert = "INSERT INTO t VALUES (%s, 'x') RETURNING i, v"
    make = class_row(Pair)
    with Handler(group) as db:
        assert db.fetch(THREE, row_factory=make)[1] == Pair(2, "v2")
        assert db.fetch("SELECT 0 AS i, '' AS v; " + THREE, row_factory=make)[0] == Pair(1, "v1")
        assert db.fetchrow(THREE + " WHERE i > %s", (2,), row_factory=make) == Pair(3, "v3")
        assert db.fetchrow(THREE + " WHERE false", row_factory=make) is None
        assert db.fetch("INSERT INTO t VALUES (9)", row_factory=make) == []
        assert db.fetchmany(insert, [(1,), (2,)], row_factory=make) == [Pair(1, "x"), Pair(2, "x")]
        assert db.fetchrow(THREE)["v"] == "v1"  # the group's again
    assert Connection.fetch(group, THREE, row_factory=make)[0] == Pair(1, "v1")
    assert Connection.fetchrow(group, THREE, row_factory=tuple_row) == (1, "v1")
    assert Connection.fetchmany(group, insert, [(3,)], row_factory=make) == [Pair(3, "x")]


@GROUPS
@pytest.mark.parametrize("wrong", [1, 0, False, "", "pen", b"", {1}, set()], ids=repr)
def test_parameters_that_are_no_sequence_are_refused_with_the_remedy(
    start: Any, group: str, wrong: Any
) -> None:
    start()
    says = pytest.raises(TypeError, match=rf"not of type {type(wrong).__name__}: for one .* \(value,\)")
    with Handler(group) as db:
        for method in (db.query, db.fetch, db.fetchrow, db.fetchval, db.execute, db.cursor().execute):
            with says:
                method("SELECT %s", wrong)
        with says, db.cursor("c") as cursor:
            cursor.execute("SELECT %s", wrong)
        with says:
            db.executemany("SELECT %s", [wrong])
        with says, db.copy("COPY (SELECT %s) TO STDOUT", wrong):
            pass
        with says:
            db.copy_from_query("SELECT %s", wrong, output=print)
        assert db.fetchval("SELECT 1") == 1
    for method in (Connection.fetch, Connection.fetchrow, Connection.fetchval, Connection.execute):
        with says:
            method(group, "SELECT %s", wrong)


@GROUPS
def test_a_command_tag_is_not_taken_for_rows(start: Any, group: str) -> None:
    start()
    with Handler(group) as db:
        for tag in (db.execute(THREE), Connection.execute("auto_t", THREE, tenant="a")):
            assert (tag, tag.upper(), f"{tag}", "3" in tag, tag[:6]) == (
                "SELECT 3", "SELECT 3", "SELECT 3", True, "SELECT",
            )  # fmt: skip
            assert json.dumps(tag) == '"SELECT 3"'
            assert pickle.loads(pickle.dumps(tag)) == copy.copy(tag) == tag
            with pytest.raises(TypeError, match=r"command tag, 'SELECT 3', and no rows: write db.query"):
                list(tag)
            with pytest.raises(AttributeError, match=r"command tag, 'SELECT 3', and no rows"):
                tag.fetchall()
            assert not hasattr(tag, "rowcount")


def test_connection_is_not_instantiated() -> None:
    for arguments in ((), ("pgdbpool.yaml",)):
        with pytest.raises(TypeError, match=r"not instantiated: call Connection.init\(config\)"):
            Connection(*arguments)

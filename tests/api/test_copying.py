"""COPY through a Handler, in both modes: records, files, paths, iterables, callables, and what breaks."""

from __future__ import annotations

import datetime
import io
import tempfile
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from support import config, server

import pgdbpool
from pgdbpool import Connection, Handler

ODD = 'T "x"; DROP--'


@pytest.fixture
def admin(known_cluster: Any) -> Iterator[psycopg.Connection[Any]]:
    with known_cluster.primary.connect() as conn:
        yield conn


@pytest.fixture(params=["threaded", "non-threaded"])
def start(request: pytest.FixtureRequest, known_cluster: Any, admin: Any) -> Iterator[Callable[..., None]]:
    """Initialise groups `auto`, `manual`, and with a tenant `auto_t`, `manual_t`; `docs` has policies."""
    admin.execute(
        """CREATE ROLE app LOGIN;
           CREATE TABLE t
             (i int PRIMARY KEY, v text, tenant text DEFAULT current_setting('app.tenant', true));
           CREATE TABLE docs (LIKE t INCLUDING ALL);
           ALTER TABLE docs ENABLE ROW LEVEL SECURITY;
           CREATE POLICY own ON docs USING (tenant = current_setting('app.tenant', true));
           GRANT ALL ON t, docs TO app"""
    )
    common = {"connection_count": 1}
    tenant = {**common, "tenant": "app.tenant"}
    groups = {
        "auto": common,
        "manual": {**common, "autocommit": False},
        "auto_t": tenant,
        "manual_t": {**tenant, "autocommit": False},
    }
    Connection.init(config([server(known_cluster.primary, user="app")], request.param, **groups))
    yield
    Connection.reset()


def rows(admin: psycopg.Connection[Any]) -> list[Any]:
    return admin.execute("SELECT i, v FROM t ORDER BY i").fetchall()


def known(db: Handler) -> None:
    """The session is in a known state: it works, and it is not in the midst of something."""
    db.rollback()
    assert db.fetchval("SELECT 1") == 1


pytestmark = pytest.mark.usefixtures("start")
GROUPS = pytest.mark.parametrize("group", ["auto", "manual"])


# Into a table.


@GROUPS
def test_records_are_copied_and_counted(admin: Any, group: str) -> None:
    with Handler(group) as db:
        assert db.copy_records_to_table("t", [(1, "a", None), [2, None, None]]) == "COPY 2"
        more = ((i, f"v\t{i}\n\\N") for i in range(3, 1003))
        assert db.copy_records_to_table("t", more, columns=["i", "v"], schema="public") == "COPY 1000"
        assert db.copy_records_to_table("t", []) == "COPY 0"
        fetched = db.fetch("SELECT i + 10000, v FROM t WHERE i < 3")
        assert db.copy_records_to_table("t", fetched, columns=["i", "v"]) == "COPY 2"
    assert rows(admin)[:3] == [(1, "a"), (2, None), (3, "v\t3\n\\N")]
    assert len(rows(admin)) == 1004


def test_postgresql_reads_each_value_by_its_columns_type(admin: Any) -> None:
    admin.execute(
        "CREATE TABLE typed"
        " (a smallint, b numeric, c timestamptz, d int[], e jsonb, f bytea, g bool, h uuid);"
        "GRANT ALL ON typed TO app"
    )
    when = datetime.datetime(2020, 1, 2, tzinfo=datetime.timezone.utc)
    record = (7, Decimal("1.50"), when, [1, 2], psycopg.types.json.Jsonb({"a": 1}), b"\0\n", True, "0" * 32)
    with Handler("auto") as db:
        assert db.copy_records_to_table(
            "typed", [record, ("7", "1.5", "2020-01-02Z", "{1,2}", "{}", "x", 1, None)]
        )
        row = db.fetchrow("SELECT * FROM typed")
    assert tuple(row)[:4] == (7, Decimal("1.50"), when, [1, 2])
    assert (row.e, row.f, row.g, row.h.int) == ({"a": 1}, b"\0\n", True, 0)


@GROUPS
def test_only_rows_that_meet_a_condition_are_copied(admin: Any, group: str) -> None:
    records = [(i, "100%") for i in range(10)]
    with Handler(group) as db:
        where = "i % 2 = 0 AND v LIKE '%\\%'"
        assert db.copy_records_to_table("t", records, columns=["i", "v"], where=where) == "COPY 5"
        least = sql.SQL("i > {}").format(8)
        assert db.copy_records_to_table("t", records, columns=["i", "v"], where=least) == "COPY 1"
    assert [i for i, _ in rows(admin)] == [0, 2, 4, 6, 8, 9]


class Words:
    """A file of one's own, with nothing but `read`."""

    def __init__(self, *words: Any) -> None:
        self.words = list(words)

    def read(self, size: int) -> Any:
        return self.words.pop(0) if self.words else b""


@GROUPS
@pytest.mark.parametrize(
    "kind", ["path", "str", "binary", "text", "own", "bytes", "memoryview", "list", "generator"]
)
def test_data_comes_from_every_kind_of_source(tmp_path: Path, admin: Any, group: str, kind: str) -> None:
    data = "1,a\n2,é\n"
    path = tmp_path / "data.csv"
    path.write_text(data, encoding="utf-8")
    with path.open("rb") as binary, path.open(encoding="utf-8") as text:
        source: Any = {
            "path": path,
            "str": str(path),
            "binary": binary,
            "text": text,
            "own": Words("1,", "a\n2,é", "\n"),
            "bytes": data.encode(),
            "memoryview": memoryview(data.encode()),
            "list": ["1,a\n", "2,é\n".encode()],
            "generator": (part for part in (b"1,", b"", "a\n2,é\n")),
        }[kind]
        with Handler(group) as db:
            assert db.copy_to_table("t", source, columns=["i", "v"], format="csv") == "COPY 2"
    assert rows(admin) == [(1, "a"), (2, "é")]


def test_large_data_goes_in_and_out_in_parts(tmp_path: Path, admin: Any) -> None:
    lines = "".join(f"{i}\t{'x' * 1000}\n" for i in range(3000))
    path = tmp_path / "out"
    with Handler("manual") as db:
        assert db.copy_to_table("t", lines.encode(), columns=["i", "v"]) == "COPY 3000"
        assert db.copy_from_query("SELECT i, v FROM t ORDER BY i", output=path) == "COPY 3000"
    assert path.read_text() == lines


def test_options_reach_postgresql(admin: Any) -> None:
    data = "i;v\n1;'it''s'\n2;NIX\n3;''\n"
    options: Any = {
        "format": "csv",
        "delimiter": ";",
        "quote": "'",
        "escape": "'",
        "null": "NIX",
        "header": True,
    }
    with Handler("auto") as db:
        assert db.copy_to_table("t", data.encode(), columns=["i", "v"], **options) == "COPY 3"
        assert rows(admin) == [(1, "it's"), (2, None), (3, "")]
        out = io.StringIO()
        assert db.copy_from_table("t", out, columns=["i", "v"], **options, force_quote=["i"]) == "COPY 3"
        assert out.getvalue() == "i;v\n'1';'it''s'\n'2';NIX\n'3';\n"
        out = io.StringIO()
        db.copy_from_query(
            "SELECT 1 AS a", output=out, format="csv", force_quote=True, header=None, null=None
        )
        assert out.getvalue() == '"1"\n'
        latin = "4\té\n".encode("latin-1")
        db.copy_to_table("t", latin, columns=["i", "v"], encoding="latin1")
        assert rows(admin)[-1] == (4, "é")
        db.copy_to_table("t", b'5,""\n', columns=["i", "v"], format="csv", force_null=["v"])
        db.copy_to_table("t", b"6,\n", columns=["i", "v"], format="csv", force_not_null=["v"], freeze=False)
        assert rows(admin)[-2:] == [(5, None), (6, "")]
        parts: list[bytes] = []
        db.copy_from_table("t", parts.append, columns=["i", "v"], format="binary")
        db.execute("DELETE FROM t")
        assert db.copy_to_table("t", parts, columns=["i", "v"], format="binary") == "COPY 6"


# Out of a table or a query.


@GROUPS
@pytest.mark.parametrize(
    "kind", ["path", "str", "binary", "text", "bytesio", "stringio", "callable", "temporary"]
)
def test_data_goes_to_every_kind_of_sink(tmp_path: Path, admin: Any, group: str, kind: str) -> None:
    admin.execute("INSERT INTO t VALUES (1, 'a'), (2, 'é')")
    path = tmp_path / "out"
    parts: list[bytes] = []
    memory: Any = io.StringIO() if kind == "stringio" else io.BytesIO()
    with path.open("wb") as binary, path.open("w", encoding="utf-8") as text:
        with tempfile.NamedTemporaryFile("w+", encoding="utf-8") as temporary:
            output: Any = {
                "path": path, "str": str(path), "binary": binary, "text": text, "bytesio": memory,
                "stringio": memory, "callable": parts.append, "temporary": temporary,
            }[kind]  # fmt: skip
            with Handler(group) as db:
                assert db.copy_from_table("t", output, columns=("i", "v")) == "COPY 2"
            temporary.seek(0)
            wrote = temporary.read()
    got = {
        "bytesio": lambda: memory.getvalue().decode(),
        "stringio": lambda: memory.getvalue(),
        "callable": lambda: b"".join(parts).decode(),
        "temporary": lambda: wrote,
    }.get(kind, lambda: path.read_text(encoding="utf-8"))()
    assert got == "1\ta\n2\té\n"


@GROUPS
def test_the_rows_of_a_query_with_parameters(admin: Any, group: str) -> None:
    admin.execute("INSERT INTO t VALUES (1, 'it''s 5%'), (2, 'x')")
    out = io.StringIO()
    with Handler(group) as db:
        query = "SELECT v FROM t WHERE v = %s AND v LIKE '%%\\%%' -- the end"
        assert db.copy_from_query(query, ("it's 5%",), output=out, format="csv", delimiter="%") == "COPY 1"
        named = "SELECT %(a)s::int + 1"
        assert db.copy_from_query(named, {"a": 1}, output=out) == "COPY 1"
        assert db.copy_from_query("SELECT 7 % 4 -- the end", output=out) == "COPY 1"
        assert db.copy_from_query(b"SELECT 4", output=out) == "COPY 1"
        assert db.copy_from_query(sql.SQL("SELECT {}").format("a{b"), output=out) == "COPY 1"
        assert db.copy_from_query(sql.SQL("SELECT %s::int"), (5,), output=out) == "COPY 1"
    assert out.getvalue() == '"it\'s 5%"\n2\n3\n4\na{b\n5\n'


# Names.


def test_names_are_quoted(admin: Any) -> None:
    name, schema = sql.Identifier(ODD), sql.Identifier("S.1")
    admin.execute(sql.SQL("CREATE SCHEMA {}; GRANT ALL ON SCHEMA {} TO app").format(schema, schema))
    table = sql.SQL(".").join([schema, name])
    admin.execute(sql.SQL("CREATE TABLE {} ({} int); GRANT ALL ON {} TO app").format(table, name, table))
    out = io.StringIO()
    with Handler("auto") as db:
        assert db.copy_records_to_table(ODD, [(1,)], columns=[ODD], schema="S.1") == "COPY 1"
        assert db.copy_to_table(ODD, b"2\n", columns=[ODD], schema="S.1") == "COPY 1"
        options: Any = {"format": "csv", "force_quote": [ODD]}
        assert db.copy_from_table(ODD, out, columns=[ODD], schema="S.1", **options) == "COPY 2"
    assert out.getvalue() == '"1"\n"2"\n'


BAD_NAMES: list[dict[str, Any]] = [
    {"table": ""},
    {"table": "t\0x"},  # libpq would take the table t
    {"table": b"t"},
    {"table": None},
    {"schema": ""},
    {"schema": "public\0"},
    {"columns": "i"},
    {"columns": []},
    {"columns": ["i", ""]},
    {"columns": ["i\0"]},
    {"columns": [1]},
]


@pytest.mark.slow
@pytest.mark.parametrize("bad", BAD_NAMES, ids=str)
def test_invalid_names_are_refused_before_anything_is_sent(admin: Any, bad: dict[str, Any]) -> None:
    given = {"table": "t", **bad}
    with Handler("manual") as db:
        for call in (
            lambda: db.copy_records_to_table(records=[(1, "a", "")], **given),
            lambda: db.copy_to_table(source=b"1\ta\t\n", **given),
            lambda: db.copy_from_table(output=print, **given),
        ):
            with pytest.raises(ValueError, match=next(iter(bad))):
                call()
        assert db._conn.pgconn.transaction_status == psycopg.pq.TransactionStatus.IDLE
    assert rows(admin) == []


@GROUPS
def test_a_name_that_is_not_there_is_postgresqls_error(tmp_path: Path, group: str) -> None:
    path = tmp_path / "precious"
    path.write_text("precious")
    with Handler(group) as db:
        for call, error in (
            (lambda: db.copy_records_to_table("nope", [(1,)]), psycopg.errors.UndefinedTable),
            (lambda: db.copy_records_to_table("public.t", [(1,)]), psycopg.errors.UndefinedTable),
            (
                lambda: db.copy_records_to_table("t", [(1,)], columns=["i", "w"]),
                psycopg.errors.UndefinedColumn,
            ),
            (lambda: db.copy_to_table("t", b"", schema="nope"), psycopg.errors.InvalidSchemaName),
            (lambda: db.copy_from_table("nope", path), psycopg.errors.UndefinedTable),
            (lambda: db.copy_from_query("SELECT nope", output=path), psycopg.errors.UndefinedColumn),
            (lambda: db.copy_from_query("SELECT 1;", output=path), psycopg.errors.SyntaxError),
        ):
            with pytest.raises(error) as caught:
                call()
            assert isinstance(caught.value, pgdbpool.DBQueryError)
            known(db)
    assert path.read_text() == "precious"


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"format": "tsv"}, "format='tsv': it is text, csv or binary"),
    ({"format": "csv) TO PROGRAM 'x'"}, "format="),
    ({"delimiter": ",,"}, "delimiter=',,': it is one ASCII character"),
    ({"delimiter": "é"}, "delimiter='é'"),
    ({"delimiter": "\n"}, "delimiter="),
    ({"delimiter": 5}, "delimiter=5"),
    ({"delimiter": False}, "delimiter=False"),
    ({"null": "a\0"}, "null="),
    ({"null": 0}, "null=0: it is text"),
    ({"quote": "'"}, "quote=\"'\" does not go with format='text'"),
    ({"format": "csv", "quote": "''"}, "quote="),
    ({"format": "csv", "escape": ""}, "escape=''"),
    ({"format": "binary", "delimiter": ","}, "delimiter=',' does not go with format='binary'"),
    ({"format": "binary", "header": True}, "header=True does not go with format='binary'"),
    ({"header": "yes"}, "header='yes'"),
    ({"encoding": "utf8\0"}, "encoding="),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=str)
def test_invalid_options_are_refused_by_name_and_value(options: dict[str, Any], message: str) -> None:
    with Handler("manual") as db:
        for call in (
            lambda: db.copy_to_table("t", b"", **options),
            lambda: db.copy_from_table("t", print, **options),
            lambda: db.copy_from_query("SELECT 1", output=print, **options),
        ):
            with pytest.raises(ValueError, match="^" + message.replace("(", r"\(").replace(")", r"\)")):
                call()
        assert db._conn.pgconn.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_each_direction_has_its_own_options() -> None:
    into: Any = {"force_quote": True}
    out: Any = {"force_null": ["v"]}
    none: Any = {"oids": True}
    with Handler("auto") as db:
        with pytest.raises(TypeError, match="no option 'force_quote' in this direction; it has delimiter"):
            db.copy_to_table("t", b"", format="csv", **into)
        with pytest.raises(TypeError, match="no option 'force_null'"):
            db.copy_from_table("t", print, format="csv", **out)
        with pytest.raises(TypeError, match="no option 'oids'"):
            db.copy_to_table("t", b"", **none)
        with pytest.raises(ValueError, match="force_null='v': it is a list of names"):
            db.copy_to_table("t", b"", format="csv", force_null="v")
        with pytest.raises(ValueError, match="header='match'"):
            db.copy_from_table("t", print, header="match")


def test_a_header_can_be_held_against_the_columns(admin: Any) -> None:
    with Handler("auto") as db:
        assert (
            db.copy_to_table("t", b"i,v\n1,a\n", columns=["i", "v"], format="csv", header="match") == "COPY 1"
        )
        with pytest.raises(psycopg.errors.BadCopyFileFormat, match="column name mismatch"):
            db.copy_to_table("t", b"v,i\n2,a\n", columns=["i", "v"], format="csv", header="match")
    assert rows(admin) == [(1, "a")]


# What breaks.


class Broken(Exception):
    """What an application's own iterable or file raises."""


def broken(*values: Any) -> Iterator[Any]:
    yield from values
    raise Broken


def refuse(data: bytes) -> None:
    raise Broken


class BrokenFile:
    def read(self, size: int) -> bytes:
        raise Broken

    def write(self, data: bytes) -> None:
        raise Broken


ALL_GROUPS = pytest.mark.parametrize("group", ["auto", "manual", "auto_t", "manual_t"])


def use(group: str) -> dict[str, Any]:
    return {"tenant": "a"} if group.endswith("_t") else {}


@ALL_GROUPS
def test_an_error_on_the_way_leaves_a_session_in_a_known_state(admin: Any, group: str) -> None:
    with Handler(group, **use(group)) as db:
        pid = db.fetchval("SELECT pg_backend_pid()")
        for call in (
            lambda: db.copy_records_to_table("t", broken((1, "a"), (2, "b")), columns=["i", "v"]),
            lambda: db.copy_records_to_table("t", broken()),
            lambda: db.copy_to_table("t", broken(b"1\ta\n", b"2"), columns=["i", "v"]),
            lambda: db.copy_to_table("t", BrokenFile(), columns=["i", "v"]),
            lambda: db.copy_from_query("SELECT generate_series(1, 100000)", output=refuse),
            lambda: db.copy_from_query("SELECT generate_series(1, 100000)", output=BrokenFile()),
        ):
            with pytest.raises(Broken):
                call()
            known(db)
        assert db.fetchval("SELECT pg_backend_pid()") == pid
        assert db.copy_records_to_table("t", [(9, "z")], columns=["i", "v"]) == "COPY 1"
    assert rows(admin) == [(9, "z")]
    assert Connection.status().groups[group].idle == 1


@ALL_GROUPS
def test_rows_refused_by_postgresql_on_the_way_leave_nothing(admin: Any, group: str) -> None:
    with Handler(group, **use(group)) as db:
        for call, error in (
            (
                lambda: db.copy_records_to_table("t", [(1, "a"), (1, "b")], columns=["i", "v"]),
                "UniqueViolation",
            ),
            (
                lambda: db.copy_records_to_table("t", [(1, "a"), ("x", "b")], columns=["i", "v"]),
                "InvalidTextRep",
            ),
            (
                lambda: db.copy_records_to_table("t", [(1, "a"), (2,)], columns=["i", "v"]),
                "BadCopyFileFormat",
            ),
            (lambda: db.copy_records_to_table("t", [(1, "a", 3)], columns=["i", "v"]), "BadCopyFileFormat"),
            (lambda: db.copy_to_table("t", b"1\ta\n2", columns=["i", "v"]), "BadCopyFileFormat"),
            (lambda: db.copy_records_to_table("t", [(1, "a"), (2, "b\0")], columns=["i", "v"]), "DataError"),
        ):
            with pytest.raises(psycopg.Error) as caught:
                call()
            assert error in type(caught.value).__name__
            known(db)
    assert rows(admin) == []


@GROUPS
def test_invalid_records_and_data_are_named_by_number_or_kind(admin: Any, group: str) -> None:
    with Handler(group) as db:
        for call, message in (
            (lambda: db.copy_records_to_table("t", [(1, "a", ""), "ab"]), "record 2 is a str"),
            (lambda: db.copy_records_to_table("t", [{"i": 1}]), "record 1 is a dict"),
            (
                lambda: db.copy_to_table("t", [(1, "a")]),
                "gave a tuple: records go into copy_records_to_table",
            ),
            (lambda: db.copy_to_table("t", 7), "source=7"),
            (lambda: db.copy_to_table("t", ["1\n"], encoding="latin1"), "gives str"),
            (lambda: db.copy_from_table("t", 7), "output=7"),
        ):
            with pytest.raises(TypeError, match=message):
                call()
            known(db)
        with pytest.raises(ValueError, match="binary mode"):
            db.copy_from_table("t", io.StringIO(), format="binary")
        with pytest.raises(BlockingIOError):
            db.copy_to_table("t", Words(b"1\ta\t\n", None))
        known(db)
        with pytest.raises(FileNotFoundError):
            db.copy_to_table("t", "/no/such/file")
        with pytest.raises(FileNotFoundError):
            db.copy_from_table("t", "/no/such/directory/file")
        known(db)
    assert rows(admin) == []


def test_a_swallowed_failure_is_the_cause_at_the_end_of_the_block(admin: Any) -> None:
    with pytest.raises(pgdbpool.TransactionAbortedError) as caught, Handler("manual") as db:
        with pytest.raises(Broken):
            db.copy_records_to_table("t", broken((1, "a", "")))
    assert isinstance(caught.value.__cause__, Broken)
    assert rows(admin) == []


@ALL_GROUPS
def test_a_connection_lost_on_the_way_is_reported_and_replaced(admin: Any, group: str) -> None:
    def lost(pid: int) -> Iterator[Any]:
        yield (1, "a")
        admin.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
        for i in range(2, 100_000):
            yield (i, "x" * 100)

    with Handler(group, **use(group)) as db:
        with pytest.raises(pgdbpool.ConnectionLostError):
            db.copy_records_to_table("t", lost(db.fetchval("SELECT pg_backend_pid()")), columns=["i", "v"])
        known(db)
    assert rows(admin) == []


# Tenants.


@pytest.mark.parametrize("group", ["auto_t", "manual_t"])
def test_each_method_has_the_blocks_tenant_and_no_other(admin: Any, group: str) -> None:
    admin.execute("INSERT INTO docs VALUES (1, 'x', 'a'), (2, 'x', 'b'), (3, 'x', NULL), (4, 'x', '')")
    for number, tenant in enumerate(("a", "b"), 10):
        for copy in (
            lambda db, out: db.copy_from_table("docs", out, columns=["tenant"]),
            lambda db, out: db.copy_from_query("SELECT tenant FROM docs", output=out),
            lambda db, out: db.copy_from_query("SELECT tenant FROM docs WHERE v = %s", ("x",), output=out),
        ):
            out = io.StringIO()
            with Handler(group, tenant=tenant) as db:
                assert copy(db, out) == "COPY 1"
            assert out.getvalue() == f"{tenant}\n"
        with Handler(group, tenant=tenant) as db, db.copy("COPY docs (tenant) TO STDOUT") as copy_out:
            assert list(copy_out.rows()) == [(tenant,)]
        for ask, expected in (
            (lambda db: db.fetch("SELECT tenant FROM docs"), [(tenant,)]),
            (lambda db: db.fetchrow("SELECT tenant FROM docs"), (tenant,)),
            (lambda db: db.fetchval("SELECT tenant FROM docs"), tenant),
            (lambda db: db.fetchmany("SELECT tenant FROM docs WHERE v = %s", [("x",)] * 2), [(tenant,)] * 2),
            (lambda db: db.executemany("UPDATE docs SET v = %s", [("x",)] * 2), 2),
            (lambda db: db.execute("UPDATE docs SET v = 'x'"), "UPDATE 1"),
        ):
            with Handler(group, tenant=tenant) as db:
                assert ask(db) == expected
        with Handler(group, tenant=tenant) as db:
            db.copy_records_to_table("t", [(number, "x")], columns=["i", "v"])
        with Handler(group, tenant=tenant) as db:
            db.copy_to_table("t", b"%d\tx\n" % (number * 2), columns=["i", "v"])
    seen = admin.execute("SELECT i, tenant FROM t ORDER BY i").fetchall()
    assert seen == [(10, "a"), (11, "b"), (20, "a"), (22, "b")]


def test_postgresql_copies_nothing_into_a_table_with_policies() -> None:
    with Handler("auto_t", tenant="a") as db:
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="INSERT statements"):
            db.copy_records_to_table("docs", [(1, "x")], columns=["i", "v"])
        known(db)


def test_a_copy_leaves_the_connections_own_attributes_as_they_were() -> None:
    with Handler("auto") as db, db.copy("COPY (SELECT 1) TO STDOUT") as copy:
        copy.connection.row_factory = psycopg.rows.dict_row
        assert list(copy.rows()) == [("1",)]
    with Handler("auto") as db:
        assert db.fetch("SELECT 1") == [(1,)]

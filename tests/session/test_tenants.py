"""Tenants and local settings: bound with each statement, never left behind, never built into text."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import psycopg
import pytest
from support import config, kill_backends, server

import pgdbpool
from pgdbpool import Connection, Handler
from pgdbpool._cli.main import main

A, B = "a", "b"
GROUPS = ["auto", "manual"]
MINE = "SELECT array_agg(DISTINCT tenant) FROM docs"


@pytest.fixture(params=["threaded", "non-threaded"])
def start(request: pytest.FixtureRequest, known_cluster: Any, proxy_to: Any) -> Iterator[Callable[..., Any]]:
    """Initialise groups over a table with row-level security; return the counting proxy."""
    primary = known_cluster.primary
    primary.execute("""
        DROP ROLE IF EXISTS app;
        CREATE ROLE app LOGIN;
        CREATE TABLE docs (id serial PRIMARY KEY, tenant text NOT NULL, body text);
        INSERT INTO docs (tenant, body) SELECT t, 'x' FROM unnest(ARRAY['a', 'b']) t, generate_series(1, 3);
        ALTER TABLE docs ENABLE ROW LEVEL SECURITY;
        ALTER TABLE docs FORCE ROW LEVEL SECURITY;
        CREATE POLICY own ON docs
            USING (tenant = NULLIF(current_setting('app.tenant', true), ''))
            WITH CHECK (tenant = NULLIF(current_setting('app.tenant', true), ''));
        GRANT ALL ON docs TO app;
        REVOKE TRUNCATE ON docs FROM app;
        GRANT USAGE ON SEQUENCE docs_id_seq TO app;
        GRANT CREATE ON SCHEMA public TO app;
    """)
    proxy = proxy_to(primary)
    entry = server(primary, port=proxy.port, user="app")

    def init(tenant: Any = None, **changes: Any) -> Any:
        spec = {"setting": "app.tenant", "required": True, **(tenant or {})}
        auto = {
            "connection_count": 2,
            "timeout": 5,
            "prepare_threshold": None,
            "tenant": {key: value for key, value in spec.items() if value is not None},
            **changes,
        }
        Connection.init(config([entry], request.param, auto=auto, manual={**auto, "autocommit": False}))
        proxy.reset_counts()
        return proxy

    yield init
    Connection.reset()


def seen(db: Handler) -> list[str] | None:
    return db.query(MINE).fetchone()[0]


# What a block sees.


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_a_block_sees_its_tenants_rows_only(start: Any, group: str) -> None:
    start()
    for tenant in (A, B, A):
        with Handler(group, tenant=tenant) as db:
            assert seen(db) == [tenant]
            assert seen(db) == [tenant]
    with Handler(group, tenant="nobody") as db:
        assert seen(db) is None


@pytest.mark.parametrize("group", GROUPS)
def test_a_row_of_another_tenant_cannot_be_written(start: Any, group: str) -> None:
    start()
    with pytest.raises(psycopg.errors.InsufficientPrivilege), Handler(group, tenant=A) as db:
        db.query("INSERT INTO docs (tenant) VALUES ('b')")
    with Handler(group, tenant=A) as db:
        assert db.query("UPDATE docs SET body = 'y' WHERE tenant = 'b'").rowcount == 0


def test_the_tenant_is_still_the_blocks_after_commit_and_rollback(start: Any) -> None:
    start()
    with Handler("manual", tenant=A) as db:
        assert seen(db) == [A]
        db.commit()
        assert seen(db) == [A]
        db.rollback()
        assert seen(db) == [A]
        db.query("COMMIT")
        assert seen(db) == [A]
        db.query("COMMIT AND CHAIN")
        assert seen(db) == [A]
        db.query("ROLLBACK AND CHAIN")
        assert seen(db) == [A]
        db.query("SAVEPOINT s")
        db.query("ROLLBACK TO s")
        assert seen(db) == [A]
        with pytest.raises(psycopg.errors.DivisionByZero):
            db.query("SELECT 1 / 0")
        db.rollback()
        assert seen(db) == [A]


@pytest.mark.parametrize("group", GROUPS)
def test_transactions_and_savepoints_keep_the_tenant(start: Any, group: str) -> None:
    start()
    with Handler(group, tenant=A) as db:
        with db.transaction():
            with pytest.raises(psycopg.errors.DivisionByZero), db.transaction():
                assert seen(db) == [A]
                db.query("SELECT 1 / 0")
            assert seen(db) == [A]
        assert seen(db) == [A]
        with db.transaction(force_rollback=True):
            assert seen(db) == [A]
        assert seen(db) == [A]
        db.query("BEGIN")
        assert seen(db) == [A]
        assert seen(db) == [A]
        db.query("ROLLBACK")
        assert seen(db) == [A]


@pytest.mark.parametrize("settings", [None, {"default_transaction_isolation": "serializable"}])
@pytest.mark.parametrize("first", ["", "SET work_mem = '1MB'"])
def test_a_begin_of_ones_own_has_its_modes_and_the_tenant(
    start: Any, settings: dict[str, str] | None, first: str
) -> None:
    proxy = start()
    for sql, level, read_only in (
        ("BEGIN ISOLATION LEVEL REPEATABLE READ", "repeatable read", "off"),
        ("START TRANSACTION ISOLATION LEVEL READ COMMITTED, READ ONLY", "read committed", "on"),
        ("BEGIN", "serializable" if settings else "read committed", "off"),
    ):
        with Handler("auto", tenant=A, settings=settings) as db:
            if first:
                db.query(first)
            proxy.reset_counts()
            db.query(sql)
            assert seen(db) == [A]
            assert db.fetchval("SHOW transaction_isolation") == level
            assert db.fetchval("SHOW transaction_read_only") == read_only
            db.query("SAVEPOINT s")
            db.query("ROLLBACK TO s")
            assert seen(db) == [A]
            db.query("COMMIT")
            assert proxy.round_trips == 8
            assert seen(db) == [A]
            db.query(sql)
            db.query("COMMIT")
            assert seen(db) == [A]


def test_a_begin_of_ones_own_is_read_only_by_a_setting_and_may_say_otherwise(start: Any) -> None:
    start()
    with Handler("auto", tenant=A, settings={"default_transaction_read_only": "on"}) as db:
        for sql, read_only in (("BEGIN", "on"), ("BEGIN READ WRITE", "off")):
            db.query(sql)
            assert db.fetchval("SHOW transaction_read_only") == read_only
            assert seen(db) == [A]
            db.query("ROLLBACK")
            assert db.fetchval("SHOW transaction_read_only") == "on"


@pytest.mark.parametrize("group", GROUPS)
def test_statements_that_cannot_ride_have_the_tenant_too(start: Any, group: str) -> None:
    start()
    with Handler(group, tenant=A) as db:
        several = db.query(f"{MINE}; {MINE}")
        assert [r.fetchone()[0] for r in several.results()] == [[A], [A]]
        db.query("INSERT INTO docs (tenant) VALUES (%s); INSERT INTO docs (tenant) VALUES (%s)", (A, A))
    with Handler(group, tenant=A) as db:
        with db.connection.cursor().copy("COPY docs (tenant) TO STDOUT") as copy:
            assert {row[0] for row in copy.rows()} == {A}
    with Handler(group, tenant=A) as db:
        with db.connection.cursor().copy("COPY (SELECT DISTINCT tenant FROM docs) TO STDOUT") as copy:
            assert [row[0] for row in copy.rows()] == [A]
    with Handler(group, tenant=B) as db:
        db.connection.cursor().executemany("INSERT INTO docs (tenant) VALUES (%s)", [(B,), (B,)])
    with Handler(group, tenant=B) as db:
        assert {row[0] for row in db.connection.cursor().stream("SELECT tenant FROM docs")} == {B}
    with Handler(group, tenant=B) as db, db.connection.pipeline():
        first, second = db.query(MINE), db.query(MINE)
        assert first.fetchone()[0] == second.fetchone()[0] == [B]
    with Handler(group, tenant=B) as db, db.transaction():
        with db.connection.cursor("named") as named:
            named.execute("SELECT DISTINCT tenant FROM docs")
            assert named.fetchall() == [(B,)]
    with Handler(group, tenant=B) as db:
        assert db.connection.execute(MINE).fetchone()[0] == [B]
        assert db.query("DO $$ BEGIN PERFORM 1; END $$").statusmessage == "DO"
    with Handler(group, tenant=A) as db:
        assert db.query("SELECT count(*) FROM docs").fetchone()[0] == 5  # what was written is committed
    with Handler(group, tenant=B) as db:
        assert db.query("SELECT count(*) FROM docs").fetchone()[0] == 5


def test_a_named_cursor_of_an_autocommit_block_asks_for_a_transaction(start: Any) -> None:
    start()
    with Handler("auto", tenant=A) as db, db.connection.cursor("named") as named:
        with pytest.raises(psycopg.NotSupportedError, match=r"db\.transaction"):
            named.execute("SELECT 1")


def test_a_stream_left_open_cannot_roll_back_the_next_block(start: Any) -> None:
    start(connection_count=1, settings={"work_mem": "5MB"})
    with pytest.raises(pgdbpool.TransactionAbortedError, match="under way"), Handler("auto", tenant=A) as db:
        left = db.connection.cursor().stream("SELECT 1")
        next(left)
    with Handler("auto", tenant=A) as db, db.transaction():
        db.query("UPDATE docs SET body = 'kept'")
        left.close()
    with Handler("auto", tenant=A) as db:
        assert db.query("SELECT count(*) FROM docs WHERE body = 'kept'").fetchone()[0] == 3


@pytest.mark.parametrize("group", GROUPS)
def test_no_statement_of_a_string_runs_after_the_tenants_transaction(start: Any, group: str) -> None:
    start()
    for text in (f"COMMIT; {MINE}", f"SELECT 1; /* x */ ROLLBACK; {MINE}", f"END; BEGIN; {MINE}"):
        with pytest.raises(pgdbpool.DBQueryError, match="send it by itself"), Handler(group, tenant=A) as db:
            db.query(text)
    with pytest.raises(pgdbpool.DBQueryError, match="send it by itself"):
        with Handler(group, tenant=A) as db, db.connection.pipeline():
            db.query("COMMIT")


def test_a_procedure_cannot_commit_the_tenant_away(start: Any) -> None:
    start()
    with Handler("auto", tenant=A) as db:
        db.query("""CREATE PROCEDURE away() LANGUAGE plpgsql AS $$
                    BEGIN COMMIT; UPDATE docs SET body = 'z'; END $$""")
    with pytest.raises(psycopg.errors.InvalidTransactionTermination), Handler("auto", tenant=A) as db:
        db.query("CALL away()")


@pytest.mark.parametrize("group", GROUPS)
def test_a_failing_preamble_means_that_the_statement_did_not_run(start: Any, group: str) -> None:
    proxy = start()
    with Handler("auto", tenant=A) as db:
        before = db.query("SELECT count(*) FROM docs").fetchone()[0]
    proxy.reset_counts()
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        with Handler(group, tenant=A, settings={"work_mem": "no size"}) as db:
            db.query("INSERT INTO docs (tenant) VALUES ('a')")
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        with Handler(group, tenant=A, settings={"work_mem": "no size"}) as db:
            db.query("INSERT INTO docs (tenant) VALUES ('a'); INSERT INTO docs (tenant) VALUES ('a')")
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        with Handler(group, tenant=A, settings={"work_mem": "no size"}) as db:
            with db.connection.cursor().copy("COPY docs (tenant) FROM STDIN") as copy:
                copy.write_row(("a",))
    with Handler(group, tenant=A) as db:
        assert db.query("SELECT count(*) FROM docs").fetchone()[0] == before


def test_a_failing_preamble_prepares_nothing(start: Any) -> None:
    start(prepare_threshold=1)
    good, bad = {"work_mem": "5MB"}, {"work_mem": "no size"}
    for settings in (good, bad, bad, good, good):
        try:
            with Handler("auto", tenant=A, settings=settings) as db:
                assert db.query("SELECT %s::int + 41", (1,)).fetchone()[0] == 42
        except psycopg.errors.InvalidParameterValue:
            assert settings is bad


# Round trips.


@pytest.mark.parametrize("n", [1, 3, 10])
def test_a_tenant_costs_no_round_trip(start: Any, n: int) -> None:
    proxy = start()
    for settings in (None, {"work_mem": "5MB", "search_path": "public"}):
        with Handler("auto", tenant=A, settings=settings) as db:
            for _ in range(n):
                db.query(MINE)
        assert (proxy.round_trips, proxy.syncs) == (n, n)
        proxy.reset_counts()
        with Handler("manual", tenant=A, settings=settings) as db:
            for _ in range(n):
                db.query(MINE)
        assert (proxy.round_trips, proxy.syncs) == (n + 1, n + 1)
        proxy.reset_counts()


def test_a_mid_block_commit_costs_itself_only(start: Any) -> None:
    proxy = start()
    with Handler("manual", tenant=A) as db:
        seen(db)
        db.commit()
        seen(db)
        seen(db)
    assert proxy.round_trips == 5


# Who is the tenant.


@pytest.mark.parametrize("group", GROUPS)
def test_a_required_tenant_is_asked_for_before_anything_is_sent(start: Any, group: str) -> None:
    proxy = start()
    with pytest.raises(pgdbpool.TenantRequiredError, match=r"tenant=.*pgdbpool\.tenant"):
        Handler(group).__enter__()
    assert proxy.bytes_up == 0
    assert Connection.status().groups[group].in_use == 0


@pytest.mark.parametrize("group", GROUPS)
def test_without_a_tenant_nothing_left_in_the_session_counts_as_one(start: Any, group: str) -> None:
    start({"required": False}, reset="never", connection_count=1)
    with Handler(group) as db:
        db.query("SELECT set_config('app.tenant', 'a', false)")
    with Handler(group) as db:
        assert seen(db) is None
        assert db.query("SELECT current_setting('app.tenant')").fetchone()[0] == ""


def test_the_current_tenant_is_the_default(start: Any) -> None:
    start()
    with pgdbpool.tenant(A):
        assert pgdbpool.current_tenant() == A
        with Handler("auto") as db:
            assert seen(db) == [A]
        with pgdbpool.tenant(B), Handler("auto") as db:
            assert seen(db) == [B]
        with Handler("auto", tenant=A) as db:
            assert seen(db) == [A]
    assert pgdbpool.current_tenant() is None


def test_an_explicit_tenant_that_contradicts_the_current_one(start: Any) -> None:
    proxy = start()
    with pgdbpool.tenant(A):
        with pytest.raises(pgdbpool.TenantConflictError, match="tenant_override"):
            Handler("auto", tenant=B).__enter__()
        assert proxy.bytes_up == 0
        with Handler("auto", tenant=B, tenant_override=True) as db:
            assert seen(db) == [B]


def test_the_current_tenant_is_each_threads_own(start: Any) -> None:
    start()
    with pgdbpool.tenant(A), ThreadPoolExecutor(1) as threads:
        assert threads.submit(pgdbpool.current_tenant).result() is None
        assert threads.submit(copy_context().run, pgdbpool.current_tenant).result() == A


def test_several_tenant_settings(start: Any) -> None:
    region = {"type": "regex", "pattern": "[a-z]{2}"}
    start({"setting": None, "settings": {"app.tenant": "text", "app.region": region}})
    with Handler("auto", tenant={"app.tenant": A, "app.region": "de"}) as db:
        assert seen(db) == [A]
        assert db.query("SELECT current_setting('app.region')").fetchone()[0] == "de"
    for wrong in (
        A,
        {"app.tenant": A},
        {"app.tenant": A, "app.region": "DE!"},
        {"app.tenant": A, "x.y": "z"},
    ):
        with pytest.raises(pgdbpool.SettingError):
            Handler("auto", tenant=wrong).__enter__()


def test_a_group_without_a_tenant_setting_takes_none(start: Any, known_cluster: Any) -> None:
    start()
    Connection.init(config([known_cluster.primary], g={"connection_count": 1}))
    with pytest.raises(pgdbpool.SettingError, match="no tenant setting"):
        Handler("g", tenant=A).__enter__()
    with pgdbpool.tenant(A), Handler("g") as db:  # the current one is not for this group
        assert db.query("SELECT 1").fetchone()[0] == 1


# Values and names.

EVIL = [
    "'",
    "''",
    "'; DROP TABLE docs; --",
    "a' OR '1'='1",
    "$1",
    "%s",
    "\\",
    "\n\r\t",
    "ünï©ödé ☃ \U0001d4b3",
    "x" * 1_000_000,
    " a",
    "a ",
    "NULL",
]


@pytest.mark.parametrize("value", EVIL, ids=lambda value: ascii(value[:12]))
@pytest.mark.parametrize("group", GROUPS)
def test_a_value_is_bound_as_it_is(start: Any, group: str, value: str) -> None:
    start()
    with Handler(group, tenant=value, settings={"app.other": value}) as db:
        row = db.query("SELECT current_setting('app.tenant'), current_setting('app.other')").fetchone()
        assert row == (value, value)
        assert seen(db) is None
    with Handler(group, tenant=A) as db:
        assert seen(db) == [A]


def name_of(value: object) -> str:
    """Name a value in a test's id: one without an address, which differs from process to process."""
    return "object" if type(value) is object else ascii(value)


@pytest.mark.parametrize("value", ["a\0b", "", b"a", 1.5j, object(), ["a"], {"x": 1}, "\ud800"], ids=name_of)
def test_a_value_that_cannot_be_bound_is_a_clear_error(start: Any, value: Any) -> None:
    proxy = start()
    for use in ({"tenant": value}, {"tenant": A, "settings": {"app.x": value}}):
        if use.get("settings") == {"app.x": ""}:
            continue  # an empty setting is fine, an empty tenant is none
        with pytest.raises(pgdbpool.SettingError):
            Handler("auto", **use).__enter__()
    assert proxy.bytes_up == 0


def test_values_are_checked_against_the_type(start: Any) -> None:
    one = uuid.uuid4()
    for kind, right, wrong in (
        (
            "uuid",
            [(one, str(one)), (str(one).upper(), str(one)), (one.hex, str(one))],
            ["x", 5, b"x", "' OR 1"],
        ),
        ("int", [(5, "5"), ("007", "7"), (-3, "-3")], ["x", True, 1.5, "1 OR 1", "٣", 10**30]),
        ("text", [("x", "x"), (5, "5"), (one, str(one))], ["", b"x", None.__class__]),
    ):
        start({"type": kind})
        for value, expected in right:
            with Handler("auto", tenant=value) as db:
                assert db.query("SELECT current_setting('app.tenant')").fetchone()[0] == expected
        for value in wrong:
            with pytest.raises(pgdbpool.SettingError):
                Handler("auto", tenant=value).__enter__()


class Text(str, Enum):
    """Its `str()` is another text from Python 3.11 on."""

    A = "a"


class Number(int, Enum):
    ONE = 1


class Shouted(str):
    def __str__(self) -> str:
        return self.upper()


class Masked(uuid.UUID):
    """As an id that no log is to show; all are equal, too."""

    def __str__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Masked)

    def __hash__(self) -> int:
        return 1


@pytest.mark.parametrize("value", [Text.A, Number.ONE, IntEnum("Number", {"ONE": 1}).ONE, Shouted("a")])
@pytest.mark.parametrize("group", GROUPS)
def test_a_value_of_a_subclass_is_bound_as_psycopg_sends_it(start: Any, group: str, value: Any) -> None:
    start(settings={"app.third": value})
    shown = "SELECT current_setting('app.tenant'), current_setting('app.other'), current_setting('app.third')"
    for use in ({"tenant": value, "settings": {"app.other": value}}, {"tenant": value}):
        with Handler(group, **use) as db:
            sent = db.query("SELECT (%s)::text", (value,)).fetchone()[0]
            bound = db.query(shown.replace("'app.other'", "'app.other', true")).fetchone()
        assert sent in ("a", "1")
        assert [text for text in bound if text] == [sent] * (2 + ("settings" in use))


def test_a_tenant_of_a_subclass_is_never_taken_for_another(start: Any) -> None:
    start({"type": "uuid"})
    for number in (1, 2, 3):
        with Handler("auto", tenant=Masked(int=number)) as db:
            bound = db.query("SELECT current_setting('app.tenant')").fetchone()[0]
        assert bound == str(uuid.UUID(int=number))


@pytest.mark.parametrize("value", [Enum("Plain", {"A": "a"}).A, Decimal("1.5"), 1.5])
def test_values_of_another_type_than_the_tenants_are_refused(start: Any, value: Any) -> None:
    start({"type": "int"})
    with pytest.raises(pgdbpool.SettingError):
        Handler("auto", tenant=value).__enter__()


@pytest.mark.parametrize(
    "name", ["x'; DROP TABLE docs; --", "", "a b", "a.", ".a", "1a", "a-b", 'a"b', "a\0", "ä", 5, None]
)
def test_a_name_that_is_not_a_setting_is_refused(start: Any, name: Any) -> None:
    start()
    with pytest.raises(pgdbpool.SettingError):
        Handler("auto", tenant=A, settings={name: "x"}).__enter__()


@pytest.mark.parametrize("group", GROUPS)
def test_a_value_is_bound_unchanged_in_each_session_encoding(start: Any, group: str) -> None:
    start(connection_count=1)
    shown = "SELECT current_setting('app.tenant') = U&'caf\\00E9', %s = U&'th\\00E9'"
    for _ in range(2):
        with Handler(group, tenant="caf\u00e9") as db:
            assert db.query(shown, ("th\u00e9",)).fetchone() == (True, True)
            db.commit()
            db.query("SET client_encoding = 'LATIN1'")
            db.commit()
            assert db.query(shown, ("th\u00e9",)).fetchone() == (True, True)
        with Handler(group, tenant="caf\u00e9") as db:
            assert db.query(shown, ("th\u00e9",)).fetchone() == (True, True)


# Settings.


@pytest.mark.parametrize("group", GROUPS)
def test_settings_hold_for_the_block_and_not_longer(start: Any, group: str, known_cluster: Any) -> None:
    known_cluster.primary.execute("DROP ROLE IF EXISTS reader; CREATE ROLE reader; GRANT reader TO app")
    start(settings={"work_mem": "5MB", "app.x": True}, connection_count=1)
    shown = "SELECT current_setting('work_mem'), current_setting('app.x'), current_user::text"
    for own, expected in (
        (None, ("5MB", "on", "app")),
        ({"WORK_MEM": "7MB", "role": "reader", "app.x": 3}, ("7MB", "3", "reader")),
        (None, ("5MB", "on", "app")),
    ):
        with Handler(group, tenant=A, settings=own) as db:
            assert db.query(shown).fetchone() == expected
            db.commit()
            assert db.query(shown).fetchone() == expected


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_a_statement_timeout_of_the_block(start: Any, group: str) -> None:
    start(query_timeout=100)
    with pytest.raises(psycopg.errors.QueryCanceled), Handler(group, tenant=A) as db:
        db.query("SELECT pg_sleep(3)")
    with Handler(group, tenant=A, settings={"statement_timeout": "5s"}) as db:
        db.query("SELECT pg_sleep(1.3)")  # beyond what the client would have waited
    with pytest.raises(psycopg.errors.QueryCanceled), Handler(group, tenant=A) as db:
        db.query("SELECT pg_sleep(3)")


def test_a_setting_cannot_stand_in_for_the_tenant(start: Any) -> None:
    start()
    with pytest.raises(pgdbpool.SettingError, match="tenant="):
        Handler("auto", tenant=A, settings={"App.Tenant": B}).__enter__()


# Roles.


def test_a_role_that_bypasses_row_level_security_is_refused(start: Any, known_cluster: Any) -> None:
    group = {"connection_count": 1, "tenant": {"setting": "app.tenant"}}
    start()
    with pytest.raises(pgdbpool.DBConnectionError, match="superuser"):
        Connection.init(config([known_cluster.primary], g=group))
    group["tenant"]["verify"] = "off"
    Connection.init(config([known_cluster.primary], g=group))
    group["tenant"]["verify"] = "error"
    group["settings"] = {"role": "app"}  # the role that the statements run as is what counts
    Connection.init(config([known_cluster.primary], g=group))
    with Handler("g", tenant=A) as db:
        assert seen(db) == [A]


def test_verify_warn_starts_with_a_warning(
    start: Any, known_cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    start()
    group = {"connection_count": 2, "tenant": {"setting": "app.tenant", "verify": "warn"}}
    Connection.init(config([known_cluster.primary], g=group))
    assert sum("superuser" in record.message for record in caplog.records) == 1


# Lost connections.


def test_the_tenant_goes_with_the_block_to_another_connection(start: Any, known_cluster: Any) -> None:
    start()
    with known_cluster.primary.connect() as admin:
        for group in GROUPS:
            with Handler(group, tenant=A) as db:
                pid = db.query("SELECT pg_backend_pid()").fetchone()[0]
                db.rollback()
                kill_backends(admin, pid)
                if group == "auto":
                    with pytest.raises(pgdbpool.ConnectionLostError) as caught:
                        seen(db)
                    assert caught.value.maybe_executed
                assert seen(db) == [A]


# The audit of a configured group.


@pytest.mark.slow
def test_the_audit_of_a_group_is_silent_on_a_sound_schema_and_finds_a_hole(
    start: Any, known_cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start()
    assert Connection.audit_rls("auto").ok
    assert main(["rls", str(written(tmp_path, known_cluster)), "g"]) == 0
    known_cluster.primary.execute("CREATE POLICY hole ON docs FOR SELECT USING (true)")
    audit = start() and Connection.audit_rls("auto", ["docs"])
    assert not audit.ok
    assert "policy-ignores-setting" in {finding.code for finding in audit.findings}
    capsys.readouterr()
    assert main(["rls", str(written(tmp_path, known_cluster)), "g", "docs", "--json"]) == 1
    assert "policy-ignores-setting" in capsys.readouterr().out
    assert main(["rls", str(written(tmp_path, known_cluster)), "g", "no_such_table"]) == 1
    assert "no_such_table" in capsys.readouterr().err


def written(tmp_path: Path, cluster: Any) -> Path:
    path = tmp_path / "pgdbpool.yaml"
    path.write_text(
        f"db: {{host: 127.0.0.1, port: {cluster.primary.port}, name: postgres, user: app}}\n"
        "groups: {g: {connection_count: 1, tenant: app.tenant}}\n"
    )
    return path


def test_a_group_without_a_tenant_setting_cannot_be_audited(start: Any, known_cluster: Any) -> None:
    Connection.init(config([known_cluster.primary], g={"connection_count": 1}))
    with pytest.raises(pgdbpool.ConfigError, match="no tenant setting"):
        Connection.audit_rls("g")


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(
    "text", ["SELECT '1' /* a /* b; */ c; */", "SELECT 'a;'\n'b;'", "SELECT $a$;$$;$a$", "SELECT E'\\';'"]
)
def test_a_semicolon_in_a_constant_or_comment_is_not_between_statements(
    start: Any, group: str, text: str
) -> None:
    start(prepare_threshold=5)
    for _ in range(7):
        with Handler(group, tenant=A) as db:
            assert len(db.fetch(text)) == 1
    assert len(Connection.fetch(group, text + " || %s", ("x",), tenant=A)) == 1

"""The audit of row-level security finds each hole planted in a schema, and nothing in the schema without."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from known import VERSION_VARIABLE
from proxy import Proxy
from psycopg.rows import dict_row
from support import closed_port, config

import pgdbpool
from pgdbpool.cluster import Cluster
from pgdbpool.errors import ConfigError
from pgdbpool.rls import Audit, Finding, audit, role_findings

Connection = psycopg.Connection[Any]
TENANT = "app.tenant"
OPEN = "current_setting('app.tenant', true)"
SAFE = f"NULLIF({OPEN}, '')::uuid"

# One table per way to do it right. Policies, views and functions belong to a role that is neither the
# application's nor a superuser, and every policy is forced on it.
SOUND = f"""
CREATE ROLE keeper; CREATE ROLE app LOGIN; CREATE ROLE "Odd ""role";
CREATE SCHEMA shop AUTHORIZATION keeper;
GRANT USAGE ON SCHEMA shop TO app;
SET LOCAL ROLE keeper;
SET LOCAL search_path = shop;

CREATE TABLE orders (id int PRIMARY KEY, tenant_id uuid NOT NULL, note text);
CREATE POLICY tenant ON orders USING (tenant_id = {SAFE});

CREATE TABLE items (order_id int REFERENCES orders, name text);
CREATE POLICY parent ON items USING (EXISTS (SELECT FROM orders o WHERE o.id = order_id));

CREATE TABLE notes (tenant text NOT NULL, body text);
CREATE POLICY r ON notes FOR SELECT USING (tenant = NULLIF({OPEN}, ''));
CREATE POLICY a ON notes FOR INSERT WITH CHECK (tenant = NULLIF({OPEN}, ''));
CREATE POLICY w ON notes FOR UPDATE TO app USING (tenant = NULLIF({OPEN}, ''));
CREATE POLICY d ON notes FOR DELETE USING (tenant = NULLIF({OPEN}, ''));

CREATE FUNCTION tenant() RETURNS int STABLE LANGUAGE sql RETURN NULLIF({OPEN}, '')::int;
CREATE TABLE docs (tenant_id int, title text);
CREATE POLICY tenant ON docs USING (tenant_id = tenant() OR tenant_id IS NULL)
    WITH CHECK (tenant_id = tenant());

CREATE TABLE gates (tenant_id uuid, open bool);
CREATE POLICY all_rows ON gates USING (true);
CREATE POLICY tenant ON gates AS RESTRICTIVE USING (tenant_id = {SAFE});

CREATE TABLE events (tenant_id uuid, at date) PARTITION BY RANGE (at);
CREATE TABLE events_2020 PARTITION OF events FOR VALUES FROM ('2020-01-01') TO ('2021-01-01');
CREATE POLICY tenant ON events USING (tenant_id = {SAFE});

CREATE VIEW recent WITH (security_invoker) AS SELECT * FROM orders;
CREATE VIEW older AS SELECT * FROM orders;
CREATE MATERIALIZED VIEW totals AS SELECT count(*) FROM orders;
CREATE FUNCTION sum_up() RETURNS bigint LANGUAGE sql SECURITY DEFINER SET search_path = shop, pg_temp
    AS 'SELECT count(*) FROM orders';

DO $$ DECLARE name text; BEGIN
    FOREACH name IN ARRAY ARRAY['orders', 'items', 'notes', 'docs', 'gates', 'events'] LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format('ALTER TABLE %I FORCE ROW LEVEL SECURITY', name);
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON %I TO app', name);
    END LOOP;
END $$;
GRANT SELECT ON recent, older TO app;
RESET ROLE;
SET LOCAL search_path = shop;"""


@pytest.fixture(scope="module")
def server() -> Iterator[Cluster]:
    """A server of this module's own, of the version in the environment."""
    version = os.environ.get(VERSION_VARIABLE)
    with Cluster(standbys=0, version=int(version) if version else None) as cluster:
        yield cluster


@pytest.fixture
def admin(server: Cluster) -> Iterator[Connection]:
    """A superuser's new session, in a transaction with the sound schema that is then rolled back."""
    with server.primary.connect(autocommit=False) as connection:
        connection.execute(SOUND.encode())
        yield connection
        connection.rollback()


@pytest.fixture
def committed(server: Cluster) -> Iterator[Connection]:
    """The same, committed, and removed after the test: for sessions of the role itself."""
    with server.primary.connect() as connection:
        with connection.transaction():
            connection.execute(SOUND.encode())
        yield connection
        connection.execute("DROP SCHEMA shop CASCADE")
        connection.execute('DROP OWNED BY app, keeper; DROP ROLE app, keeper, "Odd ""role"')


def bad(result: Audit) -> list[tuple[str, str, str]]:
    return [(f.severity, f.code, f.subject) for f in result.findings if f.severity != "info"]


def one(result: Audit, code: str) -> Finding:
    [finding] = [finding for finding in result.findings if finding.code == code]
    return finding


@pytest.mark.slow
def test_a_sound_schema_gives_no_error_and_no_warning(admin: Connection) -> None:
    result = audit(admin, [TENANT], role="app")
    assert bad(result) == []
    assert result.ok
    names = [table.name for table in result.tables]
    assert names == ["shop.docs", "shop.events", "shop.gates", "shop.items", "shop.notes", "shop.orders"]


def test_with_rows_it_is_as_silent_and_reports_those_for_all(admin: Connection) -> None:
    admin.execute(
        "INSERT INTO orders SELECT i, gen_random_uuid() FROM generate_series(1, 100) i;"
        "INSERT INTO items SELECT i, 'x' FROM generate_series(1, 100) i;"
        "INSERT INTO notes VALUES ('', 'a'), ('b', 'c'); INSERT INTO docs VALUES (1, 'd'), (NULL, 'for all')"
    )
    result = audit(admin, [TENANT], role="app")
    assert bad(result) == []
    assert one(result, "rows-shared").subject == "shop.docs"


POLICY = "ALTER POLICY tenant ON orders USING"
ORDERS = "tenant ON shop.orders"

ITEMS = "parent ON shop.items"
CREW = (
    "CREATE ROLE crew; GRANT USAGE ON SCHEMA shop TO crew;"
    "ALTER TABLE orders OWNER TO crew; ALTER TABLE orders NO FORCE ROW LEVEL SECURITY"
)
LEDGER = f"""
    CREATE TABLE ledger (tenant_id uuid NOT NULL, year int) PARTITION BY LIST (year);
    CREATE TABLE ledger_1 PARTITION OF ledger FOR VALUES IN (1);
    CREATE POLICY tenant ON ledger_1 USING (tenant_id = {SAFE});
    ALTER TABLE ledger_1 ENABLE ROW LEVEL SECURITY; ALTER TABLE ledger_1 FORCE ROW LEVEL SECURITY"""

# What is planted, and all that is found: severity, code, subject, and a part of the message of the first.
HOLES: dict[str, tuple[str, list[tuple[str, str, str]], str]] = {
    "superuser": ("ALTER ROLE app SUPERUSER", [("error", "role-superuser", "app")], "no policy binds it"),
    "bypassrls": ("ALTER ROLE app BYPASSRLS", [("error", "role-bypassrls", "app")], "no policy binds it"),
    "owner, not forced": (
        "ALTER TABLE orders NO FORCE ROW LEVEL SECURITY; ALTER TABLE orders OWNER TO app;"
        "REVOKE TRUNCATE ON orders FROM app",
        [("error", "table-not-forced", "shop.orders")],
        "the rights of its owner app",
    ),
    "inherits from the owner, not forced": (
        f"{CREW}; REVOKE TRUNCATE ON orders FROM crew; GRANT crew TO app",
        [("error", "table-not-forced", "shop.orders")],
        "the rights of its owner crew",
    ),
    "may become superuser": (
        "CREATE ROLE boss SUPERUSER; CREATE ROLE link NOINHERIT; GRANT boss TO link; GRANT link TO app",
        [("warning", "role-can-become", "boss")],
        "app may SET ROLE to boss, which is a superuser",
    ),
    "may become one with bypassrls": (
        'ALTER ROLE "Odd ""role" BYPASSRLS; GRANT "Odd ""role" TO app',
        [("warning", "role-can-become", '"Odd ""role"')],
        "has BYPASSRLS",
    ),
    "may become an owner": (
        f"{CREW}; ALTER ROLE app NOINHERIT; GRANT crew TO app",
        [("warning", "role-can-become", "crew")],
        "owns tables whose policies are not forced",
    ),
    "table without": (
        'CREATE TABLE "Odd, ""table" (tenant_id uuid); GRANT SELECT ON "Odd, ""table" TO app',
        [("warning", "rls-disabled", 'shop."Odd, ""table"')],
        "app has SELECT on it",
    ),
    "a column of a table without": (
        "CREATE TABLE lost (tenant_id uuid, x int); GRANT UPDATE (x) ON lost TO app",
        [("warning", "rls-disabled", "shop.lost")],
        "app has UPDATE on it",
    ),
    "policies, but not enabled": (
        "ALTER TABLE orders DISABLE ROW LEVEL SECURITY",
        [
            ("error", "policy-ignores-setting", ITEMS),
            ("error", "rls-disabled", "shop.orders"),
        ],
        "though it has the policies tenant",
    ),
    "command without a policy": (
        "DROP POLICY w ON notes",
        [("warning", "command-uncovered", "shop.notes")],
        "app has UPDATE on it",
    ),
    "commands with a restrictive policy only": (
        "DROP POLICY all_rows ON gates",
        [("warning", "command-uncovered", "shop.gates")],
        "app has SELECT, INSERT, UPDATE, DELETE on it",
    ),
    "policy that is open": (
        "CREATE POLICY all_rows ON orders FOR SELECT USING (true)",
        [("error", "policy-ignores-setting", "all_rows ON shop.orders")],
        "USING (true) does not read app.tenant, and policies are joined by OR: it opens SELECT",
    ),
    "policy that deletes": (
        "CREATE POLICY more ON orders FOR DELETE USING (note IS NULL)",
        [("error", "policy-ignores-setting", "more ON shop.orders")],
        "it opens DELETE",
    ),
    "policy on another setting": (
        "CREATE POLICY more ON orders USING (note = current_setting('app.other', true))",
        [("error", "policy-ignores-setting", "more ON shop.orders")],
        "it opens SELECT, UPDATE, DELETE, INSERT",
    ),
    "check that is open": (
        f"{POLICY} (tenant_id = {SAFE}) WITH CHECK (true)",
        [("error", "check-ignores-setting", ORDERS)],
        "it opens INSERT, UPDATE",
    ),
    "breaks on unset": (
        f"{POLICY} (tenant_id = NULLIF(current_setting('app.tenant'), '')::uuid)",
        [("warning", "policy-breaks-unset", subject) for subject in (ITEMS, ORDERS)],
        "unrecognized configuration parameter",
    ),
    "breaks on empty": (
        f"{POLICY} (tenant_id = {OPEN}::uuid)",
        [("warning", "policy-breaks-empty", subject) for subject in (ITEMS, ORDERS)],
        'invalid input syntax for type uuid: ""',
    ),
    "breaks on empty, in a function": (
        f"CREATE OR REPLACE FUNCTION tenant() RETURNS int STABLE LANGUAGE sql RETURN {OPEN}::int",
        [("warning", "policy-breaks-empty", "tenant ON shop.docs")] * 2,
        'invalid input syntax for type integer: ""',
    ),
    "opens on unset": (
        f"{POLICY} ({OPEN} IS NULL OR tenant_id = {SAFE})",
        [("error", "policy-opens", ORDERS)],
        "with app.tenant unset it lets app SELECT, UPDATE, DELETE, INSERT a row with tenant_id = ",
    ),
    "opens on empty": (
        f"{POLICY} ({OPEN} = '' OR tenant_id = {SAFE})",
        [("error", "policy-opens", ORDERS)],
        "with app.tenant empty",
    ),
    "opens on both": (
        f"{POLICY} (tenant_id = coalesce({SAFE}, tenant_id))",
        [("error", "policy-opens", ORDERS)],
        "with app.tenant unset or empty",
    ),
    "opens in a function": (
        f"CREATE OR REPLACE FUNCTION tenant() RETURNS int STABLE LANGUAGE sql RETURN NULLIF({OPEN}, '')::int;"
        "ALTER POLICY tenant ON docs USING (tenant() IS NULL OR tenant_id = tenant())",
        [("error", "policy-opens", "tenant ON shop.docs")],
        "lets app SELECT, UPDATE, DELETE a row",
    ),
    "opens for a write only": (
        f"{POLICY} (tenant_id = {SAFE}) WITH CHECK ({SAFE} IS NULL OR tenant_id = {SAFE})",
        [("error", "policy-opens", ORDERS)],
        "lets app INSERT, UPDATE a row",
    ),
    "opens in a function of the row": (
        f"""CREATE FUNCTION seen(orders) RETURNS bool STABLE LANGUAGE plpgsql AS
        $$ BEGIN RETURN $1.id IS NOT NULL AND {OPEN} IS NULL; END $$;
        {POLICY} (tenant_id = {SAFE} OR seen(orders))""",
        [("error", "policy-opens", ORDERS)],
        "with app.tenant unset it lets",
    ),
    "restrictive policy that opens": (
        f"ALTER POLICY tenant ON gates USING (tenant_id = {SAFE} OR {SAFE} IS NULL)",
        [("error", "policy-opens", "tenant ON shop.gates")],
        "unset or empty",
    ),
    "opens rows without a tenant": (
        f"ALTER POLICY tenant ON gates USING (tenant_id IS NOT DISTINCT FROM {SAFE})",
        [("error", "policy-opens", "tenant ON shop.gates")],
        "a row with tenant_id = NULL",
    ),
    "falls back to a tenant": (
        "ALTER POLICY tenant ON docs USING (tenant_id = coalesce(tenant(), 42))",
        [("warning", "policy-fallback", "tenant ON shop.docs")],
        "tenant_id = 42",
    ),
    "any tenant will do": (
        f"{POLICY} ({SAFE} IS NOT NULL)",
        [("warning", "policy-any-tenant", ORDERS)],
        "for a tenant that does not exist it lets app SELECT",
    ),
    "rights that the policy lacks": (
        f"CREATE TABLE secret (tenant_id uuid);{POLICY} (tenant_id = {SAFE} AND EXISTS (SELECT FROM secret))",
        [("warning", "policy-fails", ORDERS)],
        "permission denied for table secret",
    ),
    "view of a superuser": (
        "ALTER VIEW older OWNER TO postgres",
        [("error", "view-bypasses-rls", "shop.older")],
        "reads shop.orders as postgres",
    ),
    "view of an owner, not forced": (
        "ALTER TABLE orders NO FORCE ROW LEVEL SECURITY; DROP FUNCTION sum_up()",
        [("error", "view-bypasses-rls", "shop.older")],
        "reads shop.orders as keeper",
    ),
    "view of a view": (
        "CREATE VIEW inner_ AS SELECT * FROM orders; GRANT SELECT ON inner_ TO keeper;"
        "CREATE VIEW outer_ WITH (security_invoker = off) AS SELECT * FROM inner_;"
        "ALTER VIEW outer_ OWNER TO keeper; GRANT SELECT ON outer_ TO app",
        [("error", "view-bypasses-rls", "shop.outer_")],
        "reads shop.orders through shop.inner_ as postgres",
    ),
    "invoker's view in a superuser's": (
        "CREATE VIEW outer_ AS SELECT * FROM recent; GRANT SELECT ON outer_ TO app",
        [("error", "view-bypasses-rls", "shop.outer_")],
        "as postgres",
    ),
    "materialized view": (
        "GRANT SELECT ON totals TO app",
        [("error", "matview-snapshot", "shop.totals")],
        "rows of shop.orders",
    ),
    "materialized view in a view": (
        "CREATE VIEW shown AS SELECT * FROM totals; ALTER VIEW shown OWNER TO keeper;"
        "GRANT SELECT ON shown TO PUBLIC",
        [("error", "matview-snapshot", "shop.shown")],
        "rows of shop.orders",
    ),
    "definer": (
        "ALTER FUNCTION sum_up() OWNER TO postgres",
        [("warning", "definer-bypasses-rls", "shop.sum_up()")],
        "runs as postgres, who is a superuser",
    ),
    "definer that owns": (
        "ALTER TABLE notes NO FORCE ROW LEVEL SECURITY",
        [("warning", "definer-bypasses-rls", "shop.sum_up()")],
        "owns shop.notes, not forced",
    ),
    "definer without a search_path": (
        "ALTER FUNCTION sum_up() RESET search_path",
        [("warning", "definer-search-path", "shop.sum_up()")],
        "set its search_path",
    ),
    "partition": (
        "GRANT SELECT ON events_2020 TO app",
        [("error", "partition-unprotected", "shop.events_2020")],
        "policies of shop.events do not apply to queries that name its part",
    ),
    "child": (
        "CREATE TABLE old_orders () INHERITS (orders); GRANT DELETE ON old_orders TO PUBLIC",
        [("error", "partition-unprotected", "shop.old_orders")],
        "app has DELETE on it",
    ),
    "parent": (
        f"{LEDGER}; GRANT SELECT, INSERT ON ledger TO app",
        [("error", "parent-unprotected", "shop.ledger")],
        "app has SELECT on it, and policies of shop.ledger_1 do not apply to queries that name its parent",
    ),
    "view on a parent": (
        f"{LEDGER}; CREATE VIEW books AS SELECT * FROM ledger; GRANT SELECT ON books TO app",
        [("error", "view-bypasses-rls", "shop.books")],
        "it reads shop.ledger as",
    ),
    "truncate": (
        "GRANT TRUNCATE ON orders TO PUBLIC",
        [("error", "truncate-granted", "shop.orders")],
        "app may TRUNCATE it",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOLES)
def test_each_planted_hole_is_found_and_nothing_else(admin: Connection, name: str) -> None:
    plant, expected, message = HOLES[name]
    admin.execute(plant.encode())
    result = audit(admin, [TENANT], role="app")
    assert bad(result) == expected
    assert message in str([finding.message for finding in result.findings])
    assert not result.ok


# Where a remedy is another role, a decision or the text of a function, there is no SQL to run.
WITHOUT_REMEDY = {
    "any tenant will do",
    "rights that the policy lacks",
    "breaks on empty, in a function",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in HOLES if name not in WITHOUT_REMEDY])
def test_each_remedy_ends_its_finding(admin: Connection, name: str) -> None:
    plant, expected, _ = HOLES[name]
    admin.execute(plant.encode())
    for finding in audit(admin, [TENANT], role="app").findings:
        if finding.severity != "info":
            admin.execute(finding.remedy.encode())
    left = {code for _, code, _ in bad(audit(admin, [TENANT], role="app"))}
    assert left.isdisjoint({code for _, code, _ in expected})


def test_rows_show_an_opening_that_made_up_ones_do_not(admin: Connection) -> None:
    admin.execute(
        f"""CREATE TABLE members (tenant_id uuid, who text); GRANT SELECT ON members TO app;
        {POLICY} (tenant_id IN (SELECT m.tenant_id FROM members m WHERE who = coalesce({OPEN}, 'guest')));
        INSERT INTO members VALUES (gen_random_uuid(), 'guest');
        INSERT INTO orders SELECT 1, tenant_id FROM members""".encode()
    )
    finding = one(audit(admin, [TENANT], ["orders"], "app"), "rows-open")
    assert (finding.severity, finding.subject) == ("error", "shop.orders")
    assert "with app.tenant unset, app reads 1 of its rows, and 0 as a tenant" in finding.message


def test_of_a_large_table_a_sample_is_looked_at(admin: Connection) -> None:
    admin.execute("UPDATE pg_class SET reltuples = 1e12 WHERE oid = 'orders'::regclass")
    assert audit(admin, [TENANT], role="app").ok


NOTES: dict[str, tuple[str, str, str]] = {
    "not forced": (
        "ALTER TABLE notes NO FORCE ROW LEVEL SECURITY; DROP FUNCTION sum_up()",
        "table-not-forced",
        "shop.notes",
    ),
    "no policy": ("DROP POLICY parent ON items", "no-policy", "shop.items"),
    "references": ("GRANT REFERENCES ON notes TO app", "references-granted", "shop.notes"),
    "trigger": ("GRANT TRIGGER ON notes TO app", "trigger-granted", "shop.notes"),
    "owner, forced": (
        "ALTER TABLE notes OWNER TO app; REVOKE TRUNCATE ON notes FROM app",
        "table-owned",
        "shop.notes",
    ),
    "definer of an extension": (
        "ALTER FUNCTION sum_up() OWNER TO postgres; ALTER FUNCTION sum_up() RESET search_path;"
        "ALTER EXTENSION plpgsql ADD FUNCTION sum_up()",
        "definer-bypasses-rls",
        "shop.sum_up()",
    ),
    "a policy that writes": (
        "CREATE FUNCTION noted() RETURNS bool LANGUAGE plpgsql AS "
        "$$ BEGIN CREATE TABLE trace (); RETURN true; END $$;"
        f"{POLICY} (tenant_id = {SAFE} AND CASE WHEN {SAFE} IS NULL THEN noted() ELSE true END)",
        "policy-not-probed",
        ORDERS,
    ),
    "a tenant that cannot be made up": (
        f"{POLICY} (host(NULLIF({OPEN}, '')::inet) = note)",
        "policy-fails",
        ORDERS,
    ),
}


@pytest.mark.parametrize("name", NOTES)
def test_a_probable_mistake_is_a_note(admin: Connection, name: str) -> None:
    plant, code, subject = NOTES[name]
    admin.execute(plant.encode())
    result = audit(admin, [TENANT], role="app", ignore=["policy-fails:parent*"])
    assert {(f.severity, f.subject) for f in result.findings if f.code == code} == {("info", subject)}
    assert result.ok


def test_a_member_that_may_not_set_the_role_is_not_warned_of(admin: Connection) -> None:
    if admin.info.server_version < 160000:
        pytest.skip("GRANT ... WITH SET is new in PostgreSQL 16")
    admin.execute("CREATE ROLE boss SUPERUSER; GRANT boss TO app WITH SET FALSE")
    assert audit(admin, [TENANT], role="app").ok
    admin.execute("GRANT boss TO app WITH ADMIN OPTION")
    assert bad(audit(admin, [TENANT], role="app")) == [("warning", "role-can-become", "boss")]


def test_policies_for_other_roles_are_not_the_roles(admin: Connection) -> None:
    admin.execute("CREATE ROLE crew; CREATE POLICY report ON orders FOR SELECT TO crew USING (true)")
    assert audit(admin, [TENANT], role="app").ok
    admin.execute("GRANT crew TO app")
    expected = [("error", "policy-ignores-setting", "report ON shop.orders")]
    assert bad(audit(admin, [TENANT], ["orders"], "app")) == expected


def test_the_settings_a_policy_reads_are_found_through_functions_and_views(admin: Connection) -> None:
    admin.execute(
        "CREATE VIEW mine AS SELECT id FROM orders;"
        "CREATE POLICY seen ON items AS RESTRICTIVE USING (order_id IN (SELECT id FROM mine))"
    )
    reads = {
        f"{policy.name} ON {table.name}": policy.reads
        for table in audit(admin, ["app.TENANT"], role="app").tables
        for policy in table.policies
    }
    assert reads.pop("all_rows ON shop.gates") == ()
    assert set(reads.values()) == {("app.tenant",)}


def test_several_settings_of_several_types_are_tried_together(admin: Connection) -> None:
    both = f"tenant_id = {SAFE} AND id = NULLIF(current_setting('app.number', true), '')::int"
    admin.execute(f"{POLICY} ({both})".encode())
    assert audit(admin, [TENANT, "app.number"], ["orders"], "app").ok
    admin.execute(f"{POLICY} ({both} OR current_setting('app.number', true) = '')".encode())
    found = audit(admin, [TENANT, "app.number"], ["orders"], "app")
    assert bad(found) == [("error", "policy-opens", ORDERS)]


def test_odd_names_are_quoted_in_findings_and_remedies(admin: Connection) -> None:
    schema, table, policy, view, role = '"S ""%"', '"T \'%s"', '"P ""%"', '"V ""%"', '"Odd ""role"'
    admin.execute(
        f"""CREATE SCHEMA {schema}; GRANT USAGE ON SCHEMA {schema} TO {role};
        SET LOCAL search_path = {schema};
        CREATE TABLE {table} ("C ""%" uuid, t text); GRANT SELECT, TRUNCATE ON {table} TO {role};
        ALTER TABLE {table} ENABLE ROW LEVEL SECURITY; ALTER TABLE {table} FORCE ROW LEVEL SECURITY;
        CREATE POLICY {policy} ON {table} TO {role} USING ("C ""%" = {OPEN}::uuid AND t NOT LIKE '%s''');
        CREATE VIEW {view} AS SELECT * FROM {table}; GRANT SELECT ON {view} TO {role}""".encode()
    )
    assert bad(audit(admin, [TENANT], ["T '%s"], 'Odd "role')) == [
        ("error", "truncate-granted", f"{schema}.{table}"),
        ("error", "view-bypasses-rls", f"{schema}.{view}"),
        ("warning", "policy-breaks-empty", f"{policy} ON {schema}.{table}"),
    ]
    for finding in audit(admin, [TENANT], ["T '%s"], 'Odd "role').findings:
        admin.execute(finding.remedy.encode())
    assert audit(admin, [TENANT], ["T '%s"], 'Odd "role').findings == ()


def test_tables_are_named_with_or_without_their_schema(admin: Connection) -> None:
    for name in ("orders", "shop.orders"):
        assert [table.name for table in audit(admin, [TENANT], [name], "app").tables] == ["shop.orders"]
    admin.execute("CREATE TABLE public.lost (); CREATE SCHEMA other; CREATE TABLE other.far ()")
    for name in ("far", "missing", "recent", "Orders"):
        with pytest.raises(ConfigError, match=f"no such table: {name}; name it with its schema, .* shop"):
            audit(admin, [TENANT], ["orders", name], "app")
    assert bad(audit(admin, [TENANT], ["public.lost", "other.far"], "app")) == [
        ("error", "rls-disabled", "other.far"),
        ("error", "rls-disabled", "public.lost"),
    ]


def test_a_named_table_brings_its_partitions_and_no_other_table(admin: Connection) -> None:
    admin.execute("GRANT TRUNCATE ON notes TO app; GRANT SELECT ON events_2020 TO app")
    result = audit(admin, [TENANT], ["events"], "app")
    assert bad(result) == [("error", "partition-unprotected", "shop.events_2020")]


def test_tables_of_extensions_are_audited_if_named(admin: Connection) -> None:
    admin.execute("CREATE TABLE srs (); GRANT SELECT ON srs TO app; ALTER EXTENSION plpgsql ADD TABLE srs")
    assert audit(admin, [TENANT], role="app").ok
    assert bad(audit(admin, [TENANT], ["srs"], "app")) == [("error", "rls-disabled", "shop.srs")]


def test_ignored_findings_are_named_by_code_and_subject(admin: Connection) -> None:
    admin.execute("CREATE TABLE a (); CREATE TABLE b (); GRANT SELECT ON a, b TO app")
    for patterns, left in (
        (["rls-disabled:shop.a"], ["shop.b"]),
        (["rls-disabled:shop.*"], []),
        (["rls-disabled"], []),
        (["shop.a", "no-policy:*"], ["shop.a", "shop.b"]),
    ):
        found = audit(admin, [TENANT], role="app", ignore=iter(patterns))
        assert [subject for _, _, subject in bad(found)] == left


@pytest.mark.parametrize("settings", [[], ["tenant"], ["app.tenant; DROP"], ["role"], ["app."]])
def test_settings_that_are_none_are_refused(admin: Connection, settings: list[str]) -> None:
    with pytest.raises(ConfigError, match="setting"):
        audit(admin, settings, role="app")


def test_a_role_that_is_none_is_refused(admin: Connection) -> None:
    with pytest.raises(ConfigError, match="there is no role 'nobody'"):
        audit(admin, [TENANT], role="nobody")
    with pytest.raises(ConfigError, match="there is no role 'nobody'"):
        role_findings(admin, "nobody")


def test_a_session_that_has_had_the_setting_says_what_it_cannot_try(admin: Connection) -> None:
    admin.execute("SELECT set_config('app.tenant', 'x', true)")
    result = audit(admin, [TENANT], role="app")
    assert result.ok
    untried = {finding.subject for finding in result.findings if finding.code == "policy-not-probed"}
    assert untried == {"tenant ON shop.docs", ITEMS}
    admin.execute(f"{POLICY} (current_setting('app.tenant') = '' OR tenant_id = {SAFE})".encode())
    found = {code for _, code, _ in bad(audit(admin, [TENANT], role="app"))}
    assert found == {"policy-breaks-unset", "policy-opens"}


@pytest.mark.parametrize("autocommit", [True, False])
def test_the_session_of_the_role_itself_is_left_as_it_was(
    server: Cluster, committed: Connection, autocommit: bool
) -> None:
    state = "SELECT current_user, current_setting('search_path'), current_setting('transaction_read_only')"
    committed.execute("INSERT INTO shop.docs VALUES (NULL, 'for all'), (1, 'not for all')")
    with psycopg.connect(
        server.primary.conninfo(user="app", options="-c search_path=shop"),
        autocommit=autocommit,
        row_factory=dict_row,
        cursor_factory=psycopg.RawCursor,
    ) as connection:
        before = connection.execute(state).fetchone()
        connection.rollback()
        result = audit(connection, [TENANT])
        assert result.role == "app"
        assert result.ok
        assert "reads 1 of its rows" in one(result, "rows-shared").message
        assert connection.info.transaction_status is psycopg.pq.TransactionStatus.IDLE
        assert connection.execute(state).fetchone() == before
        audit(connection, [TENANT])  # within the transaction that the last statement began, or of its own
        assert connection.execute(state).fetchone() == before
        connection.rollback()
    assert committed.execute("SELECT count(*) FROM shop.docs").fetchone() == (2,)


TEXTS = {
    "policy-breaks-unset": "tenant_id = NULLIF(current_setting('app.tenant'), '')::uuid",
    "policy-breaks-empty": f"tenant_id = {OPEN}::uuid",
    "policy-opens": f"{OPEN} IS NULL OR tenant_id = {SAFE}",
}


def test_a_role_that_the_session_may_not_become_is_audited_by_the_text(
    server: Cluster, committed: Connection
) -> None:
    with psycopg.connect(server.primary.conninfo(user="app"), autocommit=True) as connection:
        result = audit(connection, [TENANT], role="keeper", ignore=["truncate-granted", "matview-snapshot"])
        assert one(result, "not-probed").subject == "keeper"
        assert [code for _, code, _ in bad(result) if code.startswith("policy")] == []
        for code, expression in TEXTS.items():
            committed.execute(f"ALTER POLICY tenant ON shop.orders USING ({expression})".encode())
            finding = one(audit(connection, [TENANT], ["shop.orders"], "keeper"), code)
            assert (finding.severity, finding.subject) == ("warning", ORDERS)


def test_the_role_is_judged_in_one_round_trip(server: Cluster, committed: Connection) -> None:
    with Proxy(server.primary.host, server.primary.port) as proxy:
        conninfo = server.primary.conninfo(user="app", port=proxy.port)
        with psycopg.connect(conninfo, autocommit=True) as connection:
            proxy.reset_counts()
            assert role_findings(connection) == ()
            assert proxy.round_trips == 1
    committed.execute("ALTER TABLE shop.notes NO FORCE ROW LEVEL SECURITY; GRANT keeper TO app")
    for role, code in (("app", "table-not-forced"), ("keeper", "table-not-forced"), (None, "role-superuser")):
        assert [finding.code for finding in role_findings(committed, role)] == [code]


def test_the_report_names_tables_policies_findings_and_remedies(admin: Connection) -> None:
    admin.execute("GRANT TRUNCATE ON orders TO app")
    result = audit(admin, [TENANT], ["orders"], "app")
    assert (
        str(result)
        == f"""\
Row-level security for the role app and app.tenant:
1 tables, 1 errors, 0 warnings, 0 notes

shop.orders: row-level security enabled, forced, owner keeper
    tenant: permissive, ALL, to PUBLIC, reads app.tenant
      USING ({result.tables[0].policies[0].using})

ERROR truncate-granted: shop.orders
    app may TRUNCATE it, which no policy prevents
    REVOKE TRUNCATE ON shop.orders FROM app;"""
    )
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["ok"] is False
    assert plain["findings"][0]["code"] == "truncate-granted"
    assert plain["tables"][0]["policies"][0]["reads"] == [TENANT]


READS = "NULLIF(current_setting('app.tenant', true), '')::uuid"
IMMUTABLES = {
    "itself": f"""CREATE FUNCTION who() RETURNS uuid IMMUTABLE LANGUAGE sql AS $$ SELECT {READS} $$;
        ALTER POLICY tenant ON orders USING (tenant_id = who())""",
    "a body that is parsed": f"""CREATE FUNCTION who() RETURNS uuid IMMUTABLE LANGUAGE sql RETURN {READS};
        ALTER POLICY tenant ON orders USING (tenant_id = who())""",
    "through what it calls": f"""
        CREATE FUNCTION inner_() RETURNS uuid STABLE LANGUAGE sql AS $$ SELECT {READS} $$;
        CREATE FUNCTION who() RETURNS uuid IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN RETURN inner_(); END $$;
        ALTER POLICY tenant ON orders USING (tenant_id = who())""",
    "below one that is not": f"""
        CREATE FUNCTION who() RETURNS uuid IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN RETURN {READS}; END $$;
        CREATE FUNCTION outer_() RETURNS uuid STABLE LANGUAGE sql AS $$ SELECT shop.who() $$;
        ALTER POLICY tenant ON orders USING (tenant_id = outer_())""",
    "by a name that it is given": """
        CREATE FUNCTION who() RETURNS uuid STABLE LANGUAGE sql AS $$ SELECT value('app.tenant')::uuid $$;
        CREATE FUNCTION value(name text) RETURNS text IMMUTABLE LANGUAGE sql
            AS $$ SELECT NULLIF(current_setting(name, true), '') $$;
        ALTER POLICY tenant ON orders USING (tenant_id = who())""",
    "through a view": f"""
        CREATE VIEW me AS SELECT {READS} AS id;
        CREATE FUNCTION who() RETURNS uuid IMMUTABLE LANGUAGE sql AS $$ SELECT id FROM shop.me $$;
        ALTER POLICY tenant ON orders USING (tenant_id = who())""",
    "in a view that filters": f"""
        CREATE FUNCTION who() RETURNS uuid IMMUTABLE LANGUAGE sql AS $$ SELECT {READS} $$;
        CREATE VIEW mine WITH (security_invoker) AS SELECT * FROM orders WHERE tenant_id = who();
        GRANT SELECT ON mine TO app""",
}


@pytest.mark.parametrize("how", IMMUTABLES)
def test_an_immutable_function_that_reads_the_tenant_is_an_error(admin: Connection, how: str) -> None:
    if "value(" in IMMUTABLES[how]:
        admin.execute("SET LOCAL check_function_bodies = off")
    admin.execute(IMMUTABLES[how].encode())
    result = audit(admin, [TENANT], role="app")
    [finding] = [finding for finding in result.findings if finding.code == "immutable-reads-setting"]
    culprit = "shop.value(text)" if "value(" in IMMUTABLES[how] else "shop.who()"
    assert (finding.severity, finding.subject) == ("error", culprit)
    if how in ("itself", "in a view that filters"):
        assert finding.message.endswith("view shop.mine" if "view" in how else "policy tenant ON shop.orders")
    admin.execute(finding.remedy.encode())
    codes = {finding.code for finding in audit(admin, [TENANT], role="app").findings}
    assert "immutable-reads-setting" not in codes


def test_an_immutable_function_does_harm_a_tenant_as_reported(admin: Connection) -> None:
    """After some executions the plan has the first tenant's value for good."""
    admin.execute(IMMUTABLES["in a view that filters"].encode())
    one_, two = "00000000-0000-0000-0000-000000000001", "00000000-0000-0000-0000-000000000002"
    admin.execute("ALTER TABLE orders DISABLE ROW LEVEL SECURITY")
    admin.execute("INSERT INTO orders VALUES (1, %s), (2, %s)", (one_, two))
    shown = {}
    for tenant in (one_, two):
        admin.execute("SELECT set_config('app.tenant', %s, true)", (tenant,))
        shown[tenant] = [admin.execute("SELECT id FROM mine", prepare=True).fetchall() for _ in range(8)][-1]
    assert shown[two] == shown[one_] == [(1,)]


def test_an_immutable_function_that_reads_no_tenant_is_none(admin: Connection) -> None:
    admin.execute("""
        CREATE FUNCTION twice(tenant int) RETURNS int IMMUTABLE LANGUAGE sql AS $$ SELECT tenant * 2 $$;
        CREATE FUNCTION zone() RETURNS text IMMUTABLE LANGUAGE sql
            AS $$ SELECT current_setting('TimeZone') $$""")
    assert bad(audit(admin, [TENANT], role="app")) == []


def test_a_foreign_table_that_the_role_may_use_is_an_error(admin: Connection) -> None:
    admin.execute("""
        CREATE FOREIGN DATA WRAPPER nothing; CREATE SERVER elsewhere FOREIGN DATA WRAPPER nothing;
        CREATE FOREIGN TABLE shop.remote (tenant_id uuid) SERVER elsewhere;
        CREATE FOREIGN TABLE shop.unused (tenant_id uuid) SERVER elsewhere;
        CREATE ROLE readers; GRANT readers TO app; GRANT SELECT ON shop.remote TO readers""")
    result = audit(admin, [TENANT], role="app")
    assert bad(result) == [("error", "foreign-table-granted", "shop.remote")]
    [finding] = [finding for finding in result.findings if finding.code == "foreign-table-granted"]
    admin.execute(finding.remedy.encode())
    assert bad(audit(admin, [TENANT], role="app")) == []


def test_an_audit_asks_the_next_server_when_one_is_away(known_cluster: Any, mode: str) -> None:
    away = {"host": "127.0.0.1", "name": "postgres", "user": "postgres"}
    entries = [{**away, "port": closed_port()}, known_cluster.primary, {**away, "port": closed_port()}]
    for _ in range(6):  # each begins at any of them
        pgdbpool.Connection.init(config(entries, mode, g={"tenant": "app.tenant"}), wait=False)
        try:
            assert pgdbpool.Connection.audit_rls("g", []).findings is not None
        finally:
            pgdbpool.Connection.reset()
    pgdbpool.Connection.init(config([entries[0], entries[2]], mode, g={"tenant": "app.tenant"}), wait=False)
    try:
        with pytest.raises(pgdbpool.DBConnectionError) as caught:
            pgdbpool.Connection.audit_rls("g")
        assert len(caught.value.endpoints) == 2
        assert all("refused" in text for text in caught.value.endpoints.values())
    finally:
        pgdbpool.Connection.reset()

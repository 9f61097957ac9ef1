"""The catalogs' facts about a role, the tables it may use, their policies, and the ways around them.

Each query is one noun of the audit. All but `ROLE` run with `search_path = pg_catalog`, so that every
name and expression they return is qualified, and quoted if SQL needs quotes.
Source: https://www.postgresql.org/docs/current/ddl-rowsecurity.html and
https://www.postgresql.org/docs/current/catalogs.html
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg
from psycopg.rows import class_row

COMMANDS = ("SELECT", "INSERT", "UPDATE", "DELETE")
T = TypeVar("T")
_READ = re.compile(r"current_setting\s*\(\s*'((?:[^']|'')+)'", re.IGNORECASE)


def read_settings(text: str) -> set[str]:
    """Return the names, in lower case, of the settings that SQL text reads with `current_setting`."""
    return {name.replace("''", "'").lower() for name in _READ.findall(text)}


def fetch(conn: psycopg.Connection[Any], kind: type[T], query: str, **params: object) -> list[T]:
    """Run a query of this module with a plain cursor, whatever the connection's own is; return the rows."""
    with psycopg.Cursor(conn, row_factory=class_row(kind)) as cursor:
        return cursor.execute(query.encode(), params, prepare=False).fetchall()


@dataclass(frozen=True, slots=True)
class RoleFact:
    """One fact about a role: `kind` is role, owns or becomes; `subject` a role or table, as in SQL."""

    kind: str
    oid: int
    subject: str
    through: str
    """The table's owner; or the roles that were granted and lead to the one it may become."""
    superuser: bool
    bypassrls: bool


# The row of the kind `role` always comes, unless there is no such role.
# Each role with the owner's privileges (pg_has_role USAGE) counts as owner. SET ROLE: before version 16
# each member may, since then a grant may leave it out, and ADMIN OPTION is enough to grant it to oneself.
ROLE = """
WITH me AS MATERIALIZED (
    SELECT * FROM pg_roles WHERE rolname = coalesce(%(role)s::text, current_user)
), unforced AS MATERIALIZED (
    SELECT c.oid, c.relowner, format('%%I.%%I', n.nspname, c.relname) AS name
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relrowsecurity AND NOT c.relforcerowsecurity AND c.relkind IN ('r', 'p')
      AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
)
SELECT 'role' AS kind, me.oid, quote_ident(me.rolname) AS subject, '' AS through,
       me.rolsuper AS superuser, me.rolbypassrls AS bypassrls
FROM me
UNION ALL
SELECT 'owns', u.oid, u.name, quote_ident(pg_get_userbyid(u.relowner)), false, false
FROM me JOIN unforced u ON pg_has_role(me.oid, u.relowner, 'USAGE')
WHERE NOT me.rolsuper
UNION ALL
SELECT 'becomes', r.oid, quote_ident(r.rolname),
       (SELECT string_agg(DISTINCT quote_ident(pg_get_userbyid(roleid)), ', ') FROM pg_auth_members
        WHERE member = me.oid AND pg_has_role(roleid, r.oid, 'MEMBER')), r.rolsuper, r.rolbypassrls
FROM me JOIN pg_roles r ON r.oid <> me.oid
 AND (pg_has_role(me.oid, r.oid, 'MEMBER WITH ADMIN OPTION') OR pg_has_role(me.oid, r.oid,
      CASE WHEN current_setting('server_version_num')::int >= 160000 THEN 'SET' ELSE 'MEMBER' END))
WHERE NOT me.rolsuper
  AND (r.rolsuper OR r.rolbypassrls
       OR EXISTS (SELECT FROM unforced u WHERE pg_has_role(r.oid, u.relowner, 'USAGE')
                                           AND NOT pg_has_role(me.oid, u.relowner, 'USAGE')))
ORDER BY 1 DESC, 3"""


@dataclass(frozen=True, slots=True)
class Column:
    """A column: how a row made up for a probe may fill it, as JSON; and whether a policy refers to it."""

    name: str
    ident: str
    """The name, quoted if SQL needs it."""
    type: str
    required: bool
    filler: Any
    used: bool


@dataclass(frozen=True, slots=True)
class Table:
    """An ordinary or partitioned table as a role sees it."""

    oid: int
    name: str
    """Qualified, and quoted if SQL needs it."""
    schema: str
    relname: str
    alias: str
    """The name by which policies refer to it, quoted if SQL needs it."""
    owner: str
    owned: bool
    """Whether the role has the owner's privileges."""
    enabled: bool
    forced: bool
    usable: bool
    """Whether the role has USAGE on the schema."""
    granted: list[str]
    """The privileges that the role has on the table or on a column of it."""
    grantees: dict[str, list[str]]
    """The role through which it has each privilege: itself, a role it inherits from, PUBLIC."""
    ancestors: list[int]
    extension: bool
    pages: float
    """The part of the table to look at, in percent of its pages: of about 100,000 rows."""
    columns_: list[dict[str, Any]]

    @property
    def columns(self) -> list[Column]:
        """The columns, of a table that has policies."""
        return [Column(**fields) for fields in self.columns_]

    @property
    def used(self) -> list[Column]:
        """The columns that policies refer to by name; all if they refer to none."""
        return [column for column in self.columns if column.used] or self.columns

    @property
    def binds(self) -> bool:
        """Whether its policies bind the role, if it is neither superuser nor has BYPASSRLS."""
        return self.enabled and (self.forced or not self.owned)

    def allows(self, privilege: str) -> bool:
        """Return whether the role can use a privilege on the table."""
        return self.usable and privilege in self.granted

    def examined(self, parts: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
        """Return (part, command) for the commands that the role may use; for all if it may use none."""
        pairs = [(part, command) for part, commands in parts.items() for command in commands]
        return [pair for pair in pairs if self.allows(pair[1])] or pairs


# A filler is a value that no tenant has: nothing is true, null or empty if the type has a choice.
TABLES = """
WITH RECURSIVE tree (child, ancestor) AS (
    SELECT inhrelid, inhparent FROM pg_inherits
    UNION
    SELECT t.child, i.inhparent FROM tree t JOIN pg_inherits i ON i.inhrelid = t.ancestor
), parts AS (
    SELECT child, array_agg(ancestor) AS ancestors FROM tree GROUP BY child
)
SELECT c.oid, format('%%I.%%I', n.nspname, c.relname) AS name, n.nspname::text AS schema,
    c.relname::text, quote_ident(c.relname) AS alias,
    quote_ident(pg_get_userbyid(c.relowner)) AS owner,
    pg_has_role(%(role)s::oid, c.relowner, 'USAGE') AS owned,
    c.relrowsecurity AS enabled, c.relforcerowsecurity AS forced,
    has_schema_privilege(%(role)s::oid, n.oid, 'USAGE') AS usable,
    ARRAY(SELECT p FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) p
          WHERE has_any_column_privilege(%(role)s::oid, c.oid, p)
          UNION ALL
          SELECT p FROM unnest(ARRAY['DELETE', 'TRUNCATE', 'TRIGGER']) p
          WHERE has_table_privilege(%(role)s::oid, c.oid, p)) AS granted,
    coalesce((SELECT jsonb_object_agg(privilege_type, grantees) FROM (
        SELECT privilege_type, jsonb_agg(
            CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END) AS grantees
        FROM aclexplode(coalesce(c.relacl, acldefault('r', c.relowner)))
        WHERE grantee = 0 OR pg_has_role(%(role)s::oid, grantee, 'USAGE')
        GROUP BY privilege_type) a), '{}') AS grantees,
    coalesce(parts.ancestors, '{}') AS ancestors,
    EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
            AND d.deptype = 'e') AS extension,
    least(100, 100 * 1e5 / greatest(c.reltuples, 1))::float8 AS pages,
    coalesce((SELECT jsonb_agg(jsonb_build_object(
        'name', a.attname, 'ident', quote_ident(a.attname), 'type', format_type(a.atttypid, NULL),
        'required', a.attnotnull,
        'filler', CASE
            WHEN base.oid = 'uuid'::regtype THEN to_jsonb(gen_random_uuid())
            WHEN base.oid IN ('json'::regtype, 'jsonb'::regtype) THEN '{}'
            WHEN base.typcategory = 'N' THEN '7'
            WHEN base.typcategory = 'S' THEN '"x"'
            WHEN base.typcategory = 'B' THEN 'false'
            WHEN base.typcategory = 'D' THEN '"2000-01-01 00:00:00"'
            WHEN base.typcategory = 'T' THEN '"1 day"'
            WHEN base.typcategory = 'A' THEN '[]'
            WHEN base.typcategory = 'I' THEN '"192.0.2.1"'
            WHEN base.typcategory = 'R' THEN '"empty"'
            WHEN base.typcategory = 'E' THEN (SELECT to_jsonb(enumlabel) FROM pg_enum
                                              WHERE enumtypid = base.oid ORDER BY enumsortorder LIMIT 1)
            END,
        'used', EXISTS (SELECT FROM pg_policy p JOIN pg_depend d ON d.objid = p.oid
                        WHERE d.classid = 'pg_policy'::regclass AND p.polrelid = c.oid
                          AND d.refobjid = c.oid AND d.refobjsubid = a.attnum)) ORDER BY a.attnum)
        FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
        JOIN pg_type base ON base.oid = coalesce(nullif(t.typbasetype, 0), t.oid)
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
          AND EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = c.oid)), '[]') AS columns_
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN parts ON parts.child = c.oid
WHERE c.relkind IN ('r', 'p') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
ORDER BY 2"""


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy as a role meets it."""

    oid: int
    table: int
    name: str
    command: str
    permissive: bool
    roles: list[str]
    applies: bool
    using: str | None
    check: str | None
    sources: list[tuple[str, str]]
    """The objects that the expressions call or query, as (name, SQL text), with their dependencies."""

    def expression(self, part: str) -> str | None:
        """Return the condition on rows that are read (`using`) or written (`check`)."""
        return self.using if part == "using" or self.check is None else self.check

    def covers(self, command: str, part: str) -> bool:
        """Return whether the policy applies to the rows that a command of the role reads or writes."""
        return self.applies and self.command in ("ALL", command) and self.expression(part) is not None

    def reads(self, text: str | None) -> set[str]:
        """Return the settings that an expression of the policy reads, itself or through objects it names."""
        return read_settings(text) | self.reads_through(text) if text is not None else set()

    def reads_through(self, text: str) -> set[str]:
        """Return the settings that the functions, views and tables in an expression read."""
        return set().union(*(read_settings(source) for name, source in self.sources if name in text))


# `reach` follows an expression to the functions, views and tables it names, a function with a parsed body
# and a view to the objects they name, and a table to the policies on reading it: `EXISTS (SELECT FROM
# orders ...)` reads the tenant if the policies of orders do. `via` is the name in the expression that led
# to them.
POLICIES = """
WITH RECURSIVE reach (policy, via, class, object) AS (
    SELECT p.oid, NULL::text COLLATE "C", 'pg_policy'::regclass::oid, p.oid FROM pg_policy p
    WHERE p.polrelid = ANY (%(tables)s::oid[])
    UNION
    SELECT r.policy, coalesce(r.via, next.name COLLATE "C"), next.class, next.object
    FROM reach r CROSS JOIN LATERAL (
        SELECT d.refclassid AS class, d.refobjid AS object,
               coalesce((SELECT relname FROM pg_class WHERE d.refclassid = 'pg_class'::regclass
                                                        AND oid = d.refobjid),
                        (SELECT proname FROM pg_proc WHERE d.refclassid = 'pg_proc'::regclass
                                                       AND oid = d.refobjid))::text AS name
        FROM pg_depend d
        WHERE d.classid = r.class AND d.objid = r.object AND r.class <> 'pg_class'::regclass
          AND d.refclassid IN ('pg_class'::regclass, 'pg_proc'::regclass)
          AND d.refobjid NOT IN (SELECT polrelid FROM pg_policy WHERE oid IN (r.object, r.policy)
                                 UNION ALL SELECT ev_class FROM pg_rewrite WHERE oid = r.object)
        UNION ALL
        SELECT 'pg_policy'::regclass, q.oid, q.polname::text
        FROM pg_policy q JOIN pg_class c ON c.oid = q.polrelid AND c.relrowsecurity
        WHERE r.class = 'pg_class'::regclass AND q.polrelid = r.object AND q.polcmd IN ('r', '*')
        UNION ALL
        SELECT 'pg_rewrite'::regclass, w.oid, w.rulename::text
        FROM pg_rewrite w WHERE r.class = 'pg_class'::regclass AND w.ev_class = r.object
    ) next
)
SELECT p.oid, p.polrelid AS table, quote_ident(p.polname) AS name,
    CASE p.polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE' WHEN 'd' THEN 'DELETE'
                  ELSE 'ALL' END AS command,
    p.polpermissive AS permissive,
    ARRAY(SELECT CASE r WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(r)) END
          FROM unnest(p.polroles) r) AS roles,
    EXISTS (SELECT FROM unnest(p.polroles) r
            WHERE r = 0 OR pg_has_role(%(role)s::oid, r, 'USAGE')) AS applies,
    pg_get_expr(p.polqual, p.polrelid) AS using, pg_get_expr(p.polwithcheck, p.polrelid) AS check,
    coalesce((SELECT jsonb_agg(jsonb_build_array(r.via, CASE r.class
        WHEN 'pg_proc'::regclass THEN (SELECT prosrc || coalesce(pg_get_function_sqlbody(oid), '')
                                       FROM pg_proc WHERE oid = r.object)
        WHEN 'pg_policy'::regclass THEN (SELECT coalesce(pg_get_expr(polqual, polrelid), '')
                                         FROM pg_policy WHERE oid = r.object)
        WHEN 'pg_rewrite'::regclass THEN (SELECT pg_get_ruledef(oid) FROM pg_rewrite WHERE oid = r.object)
        ELSE '' END)) FROM reach r WHERE r.policy = p.oid AND r.via IS NOT NULL), '[]') AS sources
FROM pg_policy p WHERE p.polrelid = ANY (%(tables)s::oid[])
ORDER BY p.polrelid, p.polname"""


@dataclass(frozen=True, slots=True)
class ViewFact:
    """A view that shows a protected table past its policies; `via` is the one whose owner's rights do."""

    name: str
    via: str
    owner: str
    table: str
    snapshot: bool
    grantees: list[str]
    """The role through which it may use the view."""


# A view's tables are read with the rights of its owner, or with security_invoker of its reader, which
# for a view in a view is again the outer one's owner. Policies apply to that user, not to the session's.
# Source: https://www.postgresql.org/docs/current/sql-createview.html
VIEWS = """
WITH RECURSIVE views AS MATERIALIZED (
    SELECT c.oid, c.relkind, c.relowner, format('%%I.%%I', n.nspname, c.relname) AS name,
        c.relkind = 'v' AND coalesce((
            SELECT bool_or(option_value::bool) FROM pg_options_to_table(c.reloptions)
            WHERE option_name = 'security_invoker'), false) AS invoker,
        has_schema_privilege(%(role)s::oid, n.oid, 'USAGE') AND (
            has_table_privilege(%(role)s::oid, c.oid, 'DELETE') OR EXISTS (
            SELECT FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) p
            WHERE has_any_column_privilege(%(role)s::oid, c.oid, p))) AS usable,
        ARRAY(SELECT DISTINCT CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END
              FROM aclexplode(c.relacl)
              WHERE grantee = 0 OR pg_has_role(%(role)s::oid, grantee, 'USAGE')) AS grantees
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('v', 'm') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
), reach (view, relation, reader, via, snapshot) AS (
    SELECT oid, oid, CASE WHEN invoker THEN %(role)s::oid ELSE relowner END, oid, relkind = 'm'
    FROM views WHERE usable
    UNION
    SELECT r.view, d.refobjid, CASE WHEN v.oid IS NULL OR v.invoker THEN r.reader ELSE v.relowner END,
           CASE WHEN v.oid IS NULL OR v.invoker THEN r.via ELSE v.oid END,
           r.snapshot OR coalesce(v.relkind = 'm', false)
    FROM reach r JOIN pg_rewrite w ON w.ev_class = r.relation
    JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid
                    AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> r.relation
    LEFT JOIN views v ON v.oid = d.refobjid
)
SELECT DISTINCT top.name, via.name AS via, quote_ident(u.rolname) AS owner,
    format('%%I.%%I', n.nspname, t.relname) AS table, r.snapshot,
    top.grantees
FROM reach r JOIN views top ON top.oid = r.view JOIN views via ON via.oid = r.via
JOIN pg_roles u ON u.oid = r.reader
JOIN pg_class t ON t.oid = r.relation AND t.oid = ANY (%(tables)s::oid[])
JOIN pg_namespace n ON n.oid = t.relnamespace
WHERE r.snapshot OR (r.reader <> %(role)s::oid AND (
    u.rolsuper OR u.rolbypassrls OR NOT t.relrowsecurity
    OR (pg_has_role(u.oid, t.relowner, 'USAGE') AND NOT t.relforcerowsecurity)))
ORDER BY 1, 4"""


@dataclass(frozen=True, slots=True)
class FunctionFact:
    """A SECURITY DEFINER function that the role may execute and that another role owns."""

    name: str
    schema: str
    owner: str
    why: str | None
    """Why policies do not bind the owner; None if they do."""
    extension: str | None
    open_path: bool
    """Whether names in its body are looked up in the caller's search_path."""


# A body in SQL-standard form was parsed, and its names resolved, when the function was made.
FUNCTIONS = """
SELECT f.oid::regprocedure::text AS name, quote_ident(n.nspname) AS schema, quote_ident(u.rolname) AS owner,
    CASE WHEN u.rolsuper THEN 'is a superuser' WHEN u.rolbypassrls THEN 'has BYPASSRLS'
         ELSE (SELECT 'owns ' || min(format('%%I.%%I', tn.nspname, t.relname)) || ', not forced'
               FROM pg_class t JOIN pg_namespace tn ON tn.oid = t.relnamespace
               WHERE t.oid = ANY (%(tables)s::oid[]) AND pg_has_role(u.oid, t.relowner, 'USAGE')
                 AND t.relrowsecurity AND NOT t.relforcerowsecurity) END AS why,
    (SELECT quote_ident(e.extname) FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid
     WHERE d.classid = 'pg_proc'::regclass AND d.objid = f.oid AND d.deptype = 'e'
       AND d.refclassid = 'pg_extension'::regclass) AS extension,
    f.prosqlbody IS NULL AND NOT EXISTS (
        SELECT FROM unnest(f.proconfig) s WHERE s ~ '^search_path=') AS open_path
FROM pg_proc f JOIN pg_namespace n ON n.oid = f.pronamespace JOIN pg_roles u ON u.oid = f.proowner
WHERE f.prosecdef AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
  AND has_schema_privilege(%(role)s::oid, n.oid, 'USAGE')
  AND has_function_privilege(%(role)s::oid, f.oid, 'EXECUTE')
  AND NOT pg_has_role(%(role)s::oid, f.proowner, 'USAGE')
ORDER BY 1"""


@dataclass(frozen=True, slots=True)
class SourceFact:
    """A function or view with its text, and the policies and views that depend on it."""

    name: str
    plain: str
    """Its unqualified name, as callers write it."""
    immutable: bool
    source: str
    used_by: list[str]


# A body in quotes leaves no dependencies: its callees are found by name.
SOURCES = """
WITH things AS (
    SELECT 'pg_proc'::regclass AS class, f.oid, f.oid::regprocedure::text AS name, f.proname::text AS plain,
           f.provolatile = 'i' AS immutable,
           f.prosrc || ' ' || coalesce(pg_get_function_sqlbody(f.oid), '') AS source
    FROM pg_proc f JOIN pg_namespace n ON n.oid = f.pronamespace JOIN pg_language l ON l.oid = f.prolang
    WHERE f.prokind = 'f' AND l.lanname NOT IN ('c', 'internal')
      AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
    UNION ALL
    SELECT 'pg_class'::regclass, c.oid, format('%%I.%%I', n.nspname, c.relname), c.relname::text, false,
           pg_get_viewdef(c.oid)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'v' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
)
SELECT t.name, t.plain, t.immutable, t.source, ARRAY(
    SELECT DISTINCT coalesce(
        (SELECT 'the policy ' || quote_ident(p.polname) || ' ON ' || format('%%I.%%I', n.nspname, c.relname)
         FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE d.classid = 'pg_policy'::regclass AND p.oid = d.objid),
        (SELECT 'the view ' || format('%%I.%%I', n.nspname, c.relname)
         FROM pg_rewrite w JOIN pg_class c ON c.oid = w.ev_class JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE d.classid = 'pg_rewrite'::regclass AND w.oid = d.objid AND c.oid <> t.oid)) AS who
    FROM pg_depend d
    WHERE d.refclassid = t.class AND d.refobjid = t.oid
      AND d.classid IN ('pg_policy'::regclass, 'pg_rewrite'::regclass)
    ORDER BY 1) AS used_by
FROM things t ORDER BY 1"""


@dataclass(frozen=True, slots=True)
class ForeignFact:
    """A foreign table that the role has privileges on."""

    name: str
    server: str
    granted: list[str]
    grantees: list[str]


FOREIGN = """
SELECT format('%%I.%%I', n.nspname, c.relname) AS name, quote_ident(s.srvname) AS server, p.granted,
    ARRAY(SELECT DISTINCT CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END
          FROM aclexplode(c.relacl) WHERE grantee = 0 OR pg_has_role(%(role)s::oid, grantee, 'USAGE')
          ORDER BY 1) AS grantees
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_foreign_table f ON f.ftrelid = c.oid JOIN pg_foreign_server s ON s.oid = f.ftserver
CROSS JOIN LATERAL (SELECT ARRAY(
    SELECT p FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) p
    WHERE has_any_column_privilege(%(role)s::oid, c.oid, p)
    UNION ALL
    SELECT 'DELETE' WHERE has_table_privilege(%(role)s::oid, c.oid, 'DELETE')) AS granted) p
WHERE has_schema_privilege(%(role)s::oid, n.oid, 'USAGE') AND p.granted <> '{}'
ORDER BY 1"""


def protected(tables: Mapping[int, Table], among: Collection[int]) -> list[int]:
    """Return the tables that policies are meant to guard: those with RLS, their partitions and parents."""
    guarded = [
        oid
        for oid in among
        if tables[oid].enabled or any(tables[a].enabled for a in tables[oid].ancestors if a in tables)
    ]
    return list({*guarded, *(a for oid in guarded for a in tables[oid].ancestors if a in tables)})


def children_with_policies(tables: Mapping[int, Table]) -> dict[int, list[str]]:
    """Return the names of the tables with RLS whose rows a query of a parent reads, by the parent."""
    found: dict[int, list[str]] = {}
    for table in tables.values():
        for ancestor in table.ancestors if table.enabled else ():
            found.setdefault(ancestor, []).append(table.name)
    return found


def resolve(name: str, tables: Sequence[Table], path: Sequence[str]) -> Table | None:
    """Return the table of a name, `schema.table` or found in the search path, written plain or quoted."""
    for table in tables:
        if name in (table.name, f"{table.schema}.{table.relname}"):
            return table
    candidates = [t for t in tables if name in (t.relname, t.alias) and t.schema in path]
    return min(candidates, key=lambda table: path.index(table.schema), default=None)

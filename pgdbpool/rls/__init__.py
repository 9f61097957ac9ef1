"""Whether row-level security really keeps tenants apart: an audit of the declarations and of the behaviour.

    audit(conn, ["app.current_tenant_id"], role="app")

reports which tables that the role may use are protected, their policies, and the ways around them: for
the role itself, for a command, for a tenant that is not set, around a view, a function or a partition.
Nothing is changed: it all happens in a read-only transaction that is rolled back. But the session knows the
settings afterwards, so they read '' if they read NULL before: close the connection, or lend it only to
blocks that set the tenant.

A sound policy (with `true` and NULLIF, since a setting reads NULL before it is first set in a
session, and '' after the transaction that set it):

    CREATE POLICY tenant ON orders
        USING (tenant_id = NULLIF(current_setting('app.current_tenant_id', true), '')::uuid);

Policies are evaluated with the rights of the role, but a function in one might take back the session user's:
if the tables' owners are not trusted, connect as the role itself, not as a superuser.

Not detected: foreign tables, which have no row-level security; reads by a function in C; reads by a view
through a function; hidden rows that a unique or foreign key reveals. Source: https://www.postgresql.org/docs/current/ddl-rowsecurity.html
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import psycopg
from psycopg.rows import scalar_row

from ..errors import ConfigError, Problem
from ..rls import _catalog as catalog
from ..rls import _findings as findings
from ._catalog import Policy, RoleFact, Table
from ._findings import Finding, Severity
from ._probe import TIMEOUT, Guarded, Probe, assume

__all__ = ["Audit", "Finding", "PolicyReport", "Severity", "TableReport", "audit", "role_findings"]

_ORDER = {"error": 0, "warning": 1, "info": 2}
_SETTING = re.compile(r"[A-Za-z_][\w$]*(\.[A-Za-z_][\w$]*)+")


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """One policy; `using` and `check` as the server prints them, `reads` the settings they depend on."""

    name: str
    command: str
    permissive: bool
    roles: tuple[str, ...]
    using: str | None
    check: str | None
    reads: tuple[str, ...]

    def __str__(self) -> str:
        kind = "permissive" if self.permissive else "restrictive"
        reads = ", ".join(self.reads) or "no setting"
        lines = [f"{self.name}: {kind}, {self.command}, to {', '.join(self.roles)}, reads {reads}"]
        lines += [f"  USING {_flat(self.using)}"] * (self.using is not None)
        lines += [f"  WITH CHECK {_flat(self.check)}"] * (self.check is not None)
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class TableReport:
    """One table, its owner, and whether its policies are enabled, and forced on the owner."""

    name: str
    owner: str
    enabled: bool
    forced: bool
    policies: tuple[PolicyReport, ...]

    def __str__(self) -> str:
        state = ("enabled" if self.enabled else "NOT ENABLED") + (", forced" if self.forced else "")
        lines = [f"{self.name}: row-level security {state}, owner {self.owner}"]
        return "\n".join([*lines, *(_indent(str(policy)) for policy in self.policies)])


@dataclass(frozen=True, slots=True)
class Audit:
    """The audited objects and the findings, worst first; `str()` is a report."""

    role: str
    settings: tuple[str, ...]
    tables: tuple[TableReport, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no finding is an error or a warning."""
        return all(finding.severity == "info" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return the audit as plain dicts, lists and strings, as JSON has them."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        counts = [sum(finding.severity == severity for finding in self.findings) for severity in _ORDER]
        lines = [
            f"Row-level security for the role {self.role} and {', '.join(self.settings)}:",
            f"{len(self.tables)} tables, {counts[0]} errors, {counts[1]} warnings, {counts[2]} notes",
        ]
        lines += ["", *(str(table) for table in self.tables)]
        for finding in self.findings:
            lines += ["", f"{finding.severity.upper()} {finding.code}: {finding.subject}"]
            lines += [_indent(text) for text in (finding.message, finding.remedy) if text]
        return "\n".join(lines)


def role_findings(conn: psycopg.Connection[Any], role: str | None = None) -> tuple[Finding, ...]:
    """Return the facts that let the role (default: the current one) past policies, in one round trip.

    That is: a superuser, BYPASSRLS, the owner's rights on tables without FORCE, SET ROLE to such roles. On a
    connection that is not in autocommit mode it is part of the caller's transaction.
    Raises ConfigError if there is no such role, and psycopg.Error.
    """
    return tuple(sorted(findings.on_role(_role_facts(conn, role)), key=_rank))


def audit(
    conn: psycopg.Connection[Any],
    settings: Sequence[str],
    tables: Sequence[str] | None = None,
    role: str | None = None,
    *,
    ignore: Iterable[str] = (),
) -> Audit:
    """Look for ways in which the role (default: the current one) reaches rows of another tenant.

    `settings` are the group's tenant settings. `tables` are names as in the catalog, `schema.table` or found
    in the search path, their partitions included; None is every table outside the system's schemas and
    extensions that the role has privileges on. `ignore` leaves out findings by `code` or `code:subject`, with
    `*`: for a table that belongs to no tenant, `rls-disabled:public.countries`.

    Policies are tried and rows counted as the role, if the session may become it, for two seconds each. The
    connection should be a new one, not a pooled one: if the session has had the settings, functions in
    policies are not tried as they behave before that. Raises ConfigError for a setting, table or role that
    cannot be audited, and psycopg.Error.
    """
    _check_settings(settings)
    with conn.transaction(force_rollback=True):
        # The planner takes the catalogs for large: compiling would cost a second for queries of milliseconds.
        _execute(conn, "SET LOCAL transaction_read_only = on; SET LOCAL jit = off")
        me, *facts = _role_facts(conn, role)
        found: list[Finding] = []
        with conn.transaction(force_rollback=True):  # only the catalogs are read without the session's path
            path = _execute(conn, "SELECT pg_catalog.current_schemas(true)::text[]")[0]
            _execute(conn, "SET LOCAL search_path = pg_catalog")
            known = {table.oid: table for table in catalog.fetch(conn, Table, catalog.TABLES, role=me.oid)}
            chosen = _choose(known, tables, path)
            rules = catalog.fetch(conn, Policy, catalog.POLICIES, role=me.oid, tables=list(chosen))
            guarded = catalog.protected(known, known if tables is None else chosen)
            found += findings.on_sources(catalog.fetch(conn, catalog.SourceFact, catalog.SOURCES), settings)
            if tables is None:
                foreign = catalog.fetch(conn, catalog.ForeignFact, catalog.FOREIGN, role=me.oid)
                found += findings.on_foreign(me.subject, foreign)
            if guarded and not me.superuser:  # a superuser does not need a way around
                scope: dict[str, Any] = {"role": me.oid, "tables": guarded}
                views = catalog.fetch(conn, catalog.ViewFact, catalog.VIEWS, **scope)
                functions = catalog.fetch(conn, catalog.FunctionFact, catalog.FUNCTIONS, **scope)
                found += findings.on_views(me.subject, views)
                found += findings.on_functions(me.subject, functions)
        policies = {oid: [rule for rule in rules if rule.table == oid] for oid in chosen}
        facts = [fact for fact in facts if fact.kind != "owns" or tables is None or fact.oid in chosen]
        found += findings.on_role([me, *facts])
        children = catalog.children_with_policies(known)
        for oid, table in chosen.items():
            parents = [known[a].name for a in table.ancestors if a in known and known[a].enabled]
            # One finding covers a parent.
            found += list(findings.on_parent(me.subject, table, children.get(oid, ()))) or list(
                findings.on_table(me.subject, table, policies[oid], parents, tables is not None)
            )
            found += findings.on_policies(table, policies[oid], settings)
        if me.superuser:  # whose privileges mean nothing
            found = [finding for finding in found if finding.code not in findings.OF_PRIVILEGES]
        met = {oid: [policy for policy in those if policy.applies] for oid, those in policies.items()}
        guarded_by = {oid: (chosen[oid], those) for oid, those in met.items() if those}
        found += _behaviour(conn, me, guarded_by, settings)
    reports = tuple(_report(table, policies[oid]) for oid, table in chosen.items())
    patterns = tuple(ignore)
    kept = {finding for finding in found if not _ignored(finding, patterns)}
    return Audit(me.subject, tuple(settings), reports, tuple(sorted(kept, key=_rank)))


def _behaviour(
    conn: psycopg.Connection[Any], me: RoleFact, tables: Guarded, settings: Sequence[str]
) -> Iterator[Finding]:
    usable = {oid: item for oid, item in tables.items() if item[0].usable}
    if not usable:
        return
    if not assume(conn, me.subject):
        message = "its policies were only read, not tried: the session may not SET ROLE to it"
        yield Finding("info", "not-probed", me.subject, message)
        for table, policies in usable.values():
            yield from findings.on_text(table, policies, settings)
        return
    _execute(conn, f"SET LOCAL row_security = on; SET LOCAL statement_timeout = '{TIMEOUT}'")
    bound = not (me.superuser or me.bypassrls)
    visible = {oid for oid, (table, _) in usable.items() if bound and table.binds and table.allows("SELECT")}
    behaviours = Probe(conn, [name.lower() for name in settings]).run(usable, visible)
    for oid, (table, policies) in usable.items():
        tried = list(findings.on_behaviour(me.subject, table, policies, settings, behaviours[oid]))
        yield from tried
        if behaviours[oid].fails("nobody"):  # then holes could not be distinguished from rows meant for all
            said = {(finding.code, finding.subject) for finding in tried}
            for finding in findings.on_text(table, policies, settings):
                if (finding.code, finding.subject) not in said:
                    yield finding


def _choose(known: Mapping[int, Table], names: Sequence[str] | None, path: Sequence[str]) -> dict[int, Table]:
    """Return the tables to audit by oid; raises ConfigError for an unknown name."""
    if names is None:
        return {oid: t for oid, t in known.items() if t.usable and t.granted and not t.extension}
    found = {name: catalog.resolve(name, list(known.values()), path) for name in names}
    if missing := [name for name, table in found.items() if table is None]:
        message = f"no such table: {', '.join(missing)}; name it with its schema, or one in {', '.join(path)}"
        raise ConfigError(message, [Problem(f"tables.{name}", "there is no such table") for name in missing])
    named = {table.oid for table in found.values() if table is not None}
    return {
        oid: table
        for oid, table in known.items()
        if oid in named or (named.intersection(table.ancestors) and table.usable and table.granted)
    }


def _role_facts(conn: psycopg.Connection[Any], role: str | None) -> list[RoleFact]:
    facts = catalog.fetch(conn, RoleFact, catalog.ROLE, role=role)
    if not facts:
        raise ConfigError(f"there is no role {role!r}: name one as in pg_roles", [Problem("role", "unknown")])
    return facts


def _check_settings(settings: Sequence[str]) -> None:
    if not settings:
        raise ConfigError("no setting to audit for: name those that hold the tenant")
    if bad := [name for name in settings if not _SETTING.fullmatch(name)]:
        raise ConfigError(
            f"not the name of a custom setting, like app.current_tenant_id: {', '.join(map(repr, bad))}"
        )


def _report(table: Table, policies: Sequence[Policy]) -> TableReport:
    reports = (
        PolicyReport(
            policy.name, policy.command, policy.permissive, tuple(policy.roles), policy.using, policy.check,
            tuple(sorted(policy.reads(policy.using) | policy.reads(policy.check))),
        )
        for policy in policies
    )  # fmt: skip
    return TableReport(table.name, table.owner, table.enabled, table.forced, tuple(reports))


def _ignored(finding: Finding, patterns: Sequence[str]) -> bool:
    names = finding.code, f"{finding.code}:{finding.subject}"
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _rank(finding: Finding) -> tuple[int, str, str, str]:
    return _ORDER[finding.severity], finding.code, finding.subject, finding.message


def _execute(conn: psycopg.Connection[Any], query: str) -> list[Any]:
    with psycopg.Cursor(conn, row_factory=scalar_row) as cursor:
        cursor.execute(query.encode(), prepare=False)
        return cursor.fetchall() if cursor.description else []


def _flat(expression: str | None) -> str:
    return f"({' '.join((expression or '').split())})"


def _indent(text: str) -> str:
    return textwrap.indent(text, "    ")

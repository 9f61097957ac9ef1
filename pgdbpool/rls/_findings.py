"""The rules of the audit, which turn the results of catalogs and probes into findings.

Source: https://www.postgresql.org/docs/current/ddl-rowsecurity.html,
https://www.postgresql.org/docs/current/sql-createpolicy.html and
https://www.postgresql.org/docs/current/sql-createfunction.html#SQL-CREATEFUNCTION-SECURITY
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ._catalog import COMMANDS, ForeignFact, FunctionFact, Policy, RoleFact, SourceFact, Table, ViewFact
from ._probe import Behaviour, Failure, State

Severity = Literal["error", "warning", "info"]
PARTS = {"using": ("SELECT", "UPDATE", "DELETE"), "check": ("INSERT", "UPDATE")}
WORDS = {"using": "USING", "check": "WITH CHECK"}
OF_PRIVILEGES = {
    "table-owned", "truncate-granted", "references-granted", "trigger-granted", "partition-unprotected",
    "parent-unprotected", "foreign-table-granted",
}  # fmt: skip
STATES: tuple[State, ...] = ("unset", "empty")
# For expressions as the server prints them; NAME stands for `current_setting('the.name'::text`.
TEXTS = (
    (r"NAME(?:, false)?\)", "policy-breaks-unset", "it seems to fail while NAME is unset"),
    (
        r"(?<!NULLIF\()NAME(?:, true)?\)\)::(?!text|character varying|citext|name)",
        "policy-breaks-empty",
        "it seems to fail while NAME is empty",
    ),
    (
        r"NAME, true\)(?:, ''::text\))?\)? (?:IS NULL|= ''::text)|COALESCE\(\(*NAME",
        "policy-opens",
        "it may open while NAME is unset or empty",
    ),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding of the audit; `code` is stable, `remedy` is SQL if any exists."""

    severity: Severity
    code: str
    subject: str
    """The role, table, `policy ON table`, view or function, qualified and quoted as in SQL."""
    message: str
    remedy: str = ""


def on_role(facts: Sequence[RoleFact]) -> Iterator[Finding]:
    """Find facts that let the role past every policy, or past the policies of a table."""
    role = facts[0].subject
    for fact in facts:
        it = fact.subject
        if fact.kind == "owns":
            message = f"{role} has the rights of its owner {fact.through}, whom without FORCE no policy binds"
            yield Finding("error", "table-not-forced", it, message, _force(it))
        elif fact.kind == "becomes":
            owns = "owns tables whose policies are not forced"
            what = "is a superuser" if fact.superuser else "has BYPASSRLS" if fact.bypassrls else owns
            message = f"{role} may SET ROLE to {it}, which {what}"
            yield Finding("warning", "role-can-become", it, message, f"REVOKE {fact.through} FROM {role};")
        elif fact.superuser:
            message = f"{it} is a superuser: no policy binds it"
            yield Finding("error", "role-superuser", it, message, f"ALTER ROLE {it} NOSUPERUSER NOBYPASSRLS;")
        elif fact.bypassrls:
            message = f"{it} has BYPASSRLS: no policy binds it"
            yield Finding("error", "role-bypassrls", it, message, f"ALTER ROLE {it} NOBYPASSRLS;")


def on_table(
    role: str, table: Table, policies: Sequence[Policy], parents: Sequence[str], named: bool
) -> Iterator[Finding]:
    """Find problems of a table, apart from its policies' expressions; `parents` are protected ones."""
    it = table.name
    commands = [command for command in COMMANDS if table.allows(command)]
    rights = f"{role} has {', '.join(commands) or 'no rights'} on it"
    if not table.enabled and parents and commands:
        message = (
            f"{rights}, and policies of {parents[0]} do not apply to queries that name its part instead of it"
        )
        yield Finding("error", "partition-unprotected", it, message, _revoke(role, table, "ALL"))
    elif not table.enabled and not parents and (commands or named):
        but = f", though it has the policies {', '.join(p.name for p in policies)}" if policies else ""
        message = f"row-level security is not enabled{but}; {rights}"
        severity: Severity = "error" if named or policies else "warning"
        remedy = f"ALTER TABLE {it} ENABLE ROW LEVEL SECURITY;\n{_force(it)}"
        yield Finding(severity, "rls-disabled", it, message, remedy)
    if not table.enabled:
        return
    if not table.forced and not table.owned:
        message = f"its policies do not bind its owner {table.owner}, which {role} is not"
        yield Finding("info", "table-not-forced", it, message, _force(it))
    if table.forced and table.owned:
        message = f"{role} has the rights of its owner {table.owner}, so it may switch row-level security off"
        yield Finding("info", "table-owned", it, message)
    yield from _on_rights(role, table)
    yield from _on_coverage(role, table, policies, commands)


def on_parent(role: str, table: Table, children: Sequence[str]) -> Iterator[Finding]:
    """Find a table without policies that shows the rows of children with policies."""
    reads = [command for command in COMMANDS if command != "INSERT" and table.allows(command)]
    if children and reads and not table.enabled:
        message = (
            f"{role} has {', '.join(reads)} on it, and policies of {children[0]} do not apply to queries "
            "that name its parent instead of it"
        )
        yield Finding("error", "parent-unprotected", table.name, message, _revoke(role, table, "ALL"))


def _on_rights(role: str, table: Table) -> Iterator[Finding]:
    """Find rights on a table that no policy restricts."""
    it = table.name
    if table.allows("TRUNCATE"):
        message = f"{role} may TRUNCATE it, which no policy prevents"
        yield Finding("error", "truncate-granted", it, message, _revoke(role, table, "TRUNCATE"))
    for privilege, why in (
        ("REFERENCES", "a foreign key tells which values exist"),
        ("TRIGGER", "a trigger sees the rows that other roles write"),
    ):
        if table.allows(privilege):
            message = f"{role} has {privilege} on it, to which no policy applies: {why}"
            remedy = _revoke(role, table, privilege)
            yield Finding("info", f"{privilege.lower()}-granted", it, message, remedy)


def _on_coverage(
    role: str, table: Table, policies: Sequence[Policy], commands: Sequence[str]
) -> Iterator[Finding]:
    """Find commands that the role has a right to, but for which no policy admits a row."""
    it = table.name
    if not policies:
        yield Finding("info", "no-policy", it, f"it has no policy, so {role} reads and writes no row")
        return
    parts = {command: "check" if command == "INSERT" else "using" for command in commands}
    uncovered = [
        command
        for command, part in parts.items()
        if not any(policy.permissive for policy in applied(policies, command, part))
    ]
    if uncovered:
        message = f"{role} has {', '.join(uncovered)} on it, but no permissive policy allows a row for that"
        remedy = "\n".join(_revoke(role, table, command) for command in uncovered)
        yield Finding("warning", "command-uncovered", it, message, remedy)


def on_policies(table: Table, policies: Sequence[Policy], settings: Sequence[str]) -> Iterator[Finding]:
    """Find permissive policies that no setting and no restrictive policy limits."""
    names = {name.lower() for name in settings}
    open_for: dict[tuple[int, str], list[str]] = defaultdict(list)
    for part, command in table.examined(PARTS):
        those = applied(policies, command, part)
        bound = [policy for policy in those if policy.reads(policy.expression(part)) & names]
        if all(policy.permissive for policy in bound):  # else a restrictive one limits them all
            for policy in those:
                if policy.permissive and policy not in bound:
                    own = "check" if part == "check" and policy.check is not None else "using"
                    open_for[policy.oid, own].append(command)
    for policy in policies:
        for part in PARTS:
            if found := list(dict.fromkeys(open_for[policy.oid, part])):
                code = "policy-ignores-setting" if part == "using" else "check-ignores-setting"
                message = (
                    f"{WORDS[part]} ({policy.expression(part)}) does not read {' or '.join(settings)}, and "
                    f"policies are joined by OR: it opens {', '.join(found)} regardless of the others"
                )
                remedy = f"DROP POLICY {policy.name} ON {table.name};"
                if part == "check" and policy.reads(policy.using) & names:
                    remedy = f"ALTER POLICY {policy.name} ON {table.name} WITH CHECK ({policy.using});"
                yield Finding("error", code, subject(policy, table), message, remedy)


def on_behaviour(
    role: str, table: Table, policies: Sequence[Policy], settings: Sequence[str], found: Behaviour
) -> Iterator[Finding]:
    """Find policies that break or open while the tenant is unset or empty, or admit every tenant."""
    for policy in policies:
        yield from _breaks(table, policy, settings, found)
    openings = list(_openings(table, policies, found))
    for policy in policies:
        mine = [opening for opening in openings if opening.policy is policy]
        certain = [opening for opening in mine if opening.row < 2]
        if mine:
            shown = certain or mine
            states = " or ".join(dict.fromkeys(opening.state for opening in shown))
            commands = ", ".join(dict.fromkeys(opening.command for opening in shown))
            message = (
                f"with {' and '.join(settings)} {states} it lets {role} {commands} a row with "
                f"{_show(table, found.rows[shown[0].row])}, which another tenant may not"
            )
            remedy = _standard(table, policy, settings)
            if certain:
                yield Finding("error", "policy-opens", subject(policy, table), message, remedy)
            else:
                yield Finding("warning", "policy-fallback", subject(policy, table), message, remedy)
        if loose := ", ".join(dict.fromkeys(_loose(table, policies, policy, settings, found))):
            message = (
                f"for a tenant that does not exist it lets {role} {loose} a row with "
                f"{_show(table, found.rows[1])}: so it does for every tenant"
            )
            yield Finding("warning", "policy-any-tenant", subject(policy, table), message)
    yield from _rows(role, table, settings, found, any(opening.command == "SELECT" for opening in openings))


def on_text(table: Table, policies: Sequence[Policy], settings: Sequence[str]) -> Iterator[Finding]:
    """Find problems in the text of policies whose behaviour could not be tried."""
    for policy in policies:
        for expression in filter(None, (policy.using, policy.check)):
            for pattern, code, message in TEXTS:
                for name in settings:
                    if re.search(pattern.replace("NAME", _read_of(name)), expression, re.IGNORECASE):
                        text = f"{message.replace('NAME', name)}: {expression}"
                        remedy = "" if code == "policy-opens" else _with_nullif(table, policy, settings)
                        yield Finding("warning", code, subject(policy, table), text, remedy)


def on_views(role: str, views: Sequence[ViewFact]) -> Iterator[Finding]:
    """Find views and materialized views that show protected rows past the policies."""
    for view in views:
        if view.snapshot:
            message = f"{role} may use it, and it shows rows of {view.table} as when it was refreshed"
            remedy = f"REVOKE ALL ON {view.name} FROM {', '.join(view.grantees) or role};"
            yield Finding("error", "matview-snapshot", view.name, message, remedy)
        else:
            through = "" if view.via == view.name else f"through {view.via} "
            message = f"it reads {view.table} {through}as {view.owner}, whom its policies do not bind"
            remedy = f"ALTER VIEW {view.via} SET (security_invoker = true);"
            yield Finding("error", "view-bypasses-rls", view.name, message, remedy)


def on_functions(role: str, functions: Sequence[FunctionFact]) -> Iterator[Finding]:
    """Find functions that run with the rights of an owner not bound by any policy, or that can be misled."""
    for function in functions:
        it, owner = function.name, function.owner
        if function.why:
            severity: Severity = "info" if function.extension else "warning"
            origin = f" (of the extension {function.extension})" if function.extension else ""
            message = f"{role} may execute it, and it runs as {owner}, who {function.why}{origin}"
            remedy = f"ALTER ROUTINE {it} SECURITY INVOKER;"
            yield Finding(severity, "definer-bypasses-rls", it, message, remedy)
        if function.open_path and not function.extension:
            message = f"it runs as {owner}, but looks names up in its caller's schemas: set its search_path"
            remedy = f"ALTER ROUTINE {it} SET search_path = {function.schema}, pg_temp;"
            yield Finding("warning", "definer-search-path", it, message, remedy)


_CALLS = re.compile(r'([\w$]+)"?\s*\(')
_READS_FROM = re.compile(r'(?:\bfrom|\bjoin|,)\s+(?:"?[\w$]+"?\.)?"?([\w$]+)', re.I)
_READS_ANY = re.compile(r"current_setting\s*\(\s*(?![\s']|e')", re.I)


def on_sources(facts: Sequence[SourceFact], settings: Sequence[str]) -> Iterator[Finding]:
    """Find IMMUTABLE functions that read the tenant, themselves or through functions that they call."""
    names = [name.lower() for name in settings]
    readers = [fact for fact in facts if _reads(fact.source.lower(), names)]
    found = {id(fact) for fact in readers}
    callers: dict[str, list[SourceFact]] = defaultdict(list)
    for fact in facts:
        for name in {*_CALLS.findall(fact.source), *_READS_FROM.findall(fact.source)}:
            callers[name.lower()].append(fact)
    while readers:
        reader = readers.pop()
        if reader.immutable:
            message = (
                f"it is IMMUTABLE and reads {' or '.join(settings)}: a plan that is kept has the tenant that "
                "it was made for, and shows that one's rows to the others"
            )
            if reader.used_by:
                message += f"; used by {', '.join(reader.used_by)}"
            remedy = f"ALTER FUNCTION {reader.name} STABLE;"
            yield Finding("error", "immutable-reads-setting", reader.name, message, remedy)
        for caller in callers[reader.plain.lower()]:
            if id(caller) not in found:
                found.add(id(caller))
                readers.append(caller)


def _reads(source: str, names: Sequence[str]) -> bool:
    return any(name in source for name in names) or _READS_ANY.search(source) is not None


def on_foreign(role: str, tables: Sequence[ForeignFact]) -> Iterator[Finding]:
    """Find foreign tables that the role may use: no policy of this server binds reads through them."""
    for table in tables:
        rights = ", ".join(table.granted)
        message = (
            f"{role} has {rights} on it: a foreign table has no policies, and the server {table.server} "
            "knows no tenant of this session"
        )
        remedy = f"REVOKE ALL ON {table.name} FROM {', '.join(table.grantees) or role};"
        yield Finding("error", "foreign-table-granted", table.name, message, remedy)


def applied(policies: Sequence[Policy], command: str, part: str) -> list[Policy]:
    """Return the policies that apply to the rows that a command of the role reads or writes."""
    return [policy for policy in policies if policy.covers(command, part)]


def subject(policy: Policy, table: Table) -> str:
    """Name a policy."""
    return f"{policy.name} ON {table.name}"


class _Opening(NamedTuple):
    policy: Policy
    command: str
    state: State
    row: int


def _openings(table: Table, policies: Sequence[Policy], found: Behaviour) -> Iterator[_Opening]:
    """Yield each made-up row that a command reaches without a tenant but not in the state `nobody`."""
    for part, command in table.examined(PARTS):
        those = applied(policies, command, part)
        nobody = found.admits("nobody", those, part)
        for state in STATES if nobody else ():
            admitted = found.admits(state, those, part) or []
            for row, (here, there) in enumerate(zip(admitted, nobody or [], strict=False)):
                if here and not there:
                    for policy in those:
                        answers = [found.answer(s, policy.expression(part), row) for s in (state, "nobody")]
                        if answers == [True, False]:
                            yield _Opening(policy, command, state, row)


def _loose(
    table: Table, policies: Sequence[Policy], policy: Policy, settings: Sequence[str], found: Behaviour
) -> Iterator[str]:
    """Yield the commands for which a policy that reads the tenant admits the row of no tenant."""
    names = {name.lower() for name in settings}
    for part, command in table.examined(PARTS):
        those, expression = applied(policies, command, part), policy.expression(part)
        if policy in those and policy.permissive and policy.reads(expression) & names:
            admitted = found.admits("nobody", those, part)
            if admitted and admitted[1] and found.answer("nobody", expression, 1):
                yield command


def _breaks(table: Table, policy: Policy, settings: Sequence[str], found: Behaviour) -> Iterator[Finding]:
    it, names = subject(policy, table), " and ".join(settings)
    for part, expression in (("using", policy.using), ("check", policy.check)):
        answer = found.verdict("nobody", expression)
        if isinstance(answer, Failure):
            # Class 42 is the fault of the policy or the role's rights; another may be that of the values.
            severity: Severity = "warning" if answer.sqlstate.startswith("42") else "info"
            message = f"{WORDS[part]} fails for every value of {names} tried: {answer.message}"
            yield Finding(severity, "policy-fails", it, message)
            continue
        for state in STATES:
            answer = found.verdict(state, expression)
            if isinstance(answer, Failure) and answer.of_the_probe:
                message = f"with {names} {state}, {WORDS[part]} could not be tried: {answer.message}"
                yield Finding("info", "policy-not-probed", it, message)
            elif isinstance(answer, Failure):
                message = f"with {names} {state}, {WORDS[part]} fails: {answer.message}"
                remedy = _with_nullif(table, policy, settings)
                yield Finding("warning", f"policy-breaks-{state}", it, message, remedy)
            elif answer is None and expression is not None:
                message = f"{WORDS[part]} was not tried, since the session has had {names}: use a new one"
                yield Finding("info", "policy-not-probed", it, message)


def _rows(
    role: str, table: Table, settings: Sequence[str], found: Behaviour, explained: bool
) -> Iterator[Finding]:
    nobody = found.visible.get("nobody", 0)
    for state in STATES:
        seen = found.visible.get(state, 0)
        if seen > nobody and not explained:
            message = (
                f"with {' and '.join(settings)} {state}, {role} reads {seen} of its rows, "
                f"and {nobody} as a tenant that does not exist"
            )
            yield Finding("error", "rows-open", table.name, message)
    if nobody:
        message = f"{role} reads {nobody} of its rows as a tenant that does not exist: are they for all?"
        yield Finding("info", "rows-shared", table.name, message)


def _force(table: str) -> str:
    return f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY;"


def _revoke(role: str, table: Table, privilege: str) -> str:
    grants = [those for held, those in table.grantees.items() if privilege in (held, "ALL")]
    holders = sorted({holder for those in grants for holder in those})
    return f"REVOKE {privilege} ON {table.name} FROM {', '.join(holders) or role};"


def _show(table: Table, row: Mapping[str, object]) -> str:
    values = {column.ident: row.get(column.name) for column in table.used}
    shown = (f"{name} = {'NULL' if value is None else value}" for name, value in values.items())
    return ", ".join(shown) or "any values"


def _read_of(name: str) -> str:
    return rf"current_setting\('{re.escape(name)}'::text"


def _with_nullif(table: Table, policy: Policy, settings: Sequence[str]) -> str:
    """Return the ALTER POLICY that turns an unset or empty setting into NULL; '' if it reads none itself."""
    changed = []
    for part, expression in (("using", policy.using), ("check", policy.check)):
        safe = expression
        for name in settings:
            pattern = rf"NULLIF\({_read_of(name)}(?:, \w+)?\), ''::text\)|{_read_of(name)}(?:, \w+)?\)"
            safe = safe and re.sub(pattern, _nullif(name).replace("\\", r"\\"), safe, flags=re.IGNORECASE)
        if safe != expression:
            changed.append(f"{WORDS[part]} ({safe})")
    return f"ALTER POLICY {policy.name} ON {table.name} {' '.join(changed)};" if changed else ""


def _standard(table: Table, policy: Policy, settings: Sequence[str]) -> str:
    """Return the ALTER POLICY that compares the one column it refers to with the one setting; else ''."""
    columns = [column for column in table.columns if column.used]
    if len(columns) != 1 or len(settings) != 1:
        return ""
    condition = f"{columns[0].ident} = {_nullif(settings[0])}::{columns[0].type}"
    clauses = " ".join(
        f"{word} ({condition})"
        for word, text in (("USING", policy.using), ("WITH CHECK", policy.check))
        if text is not None
    )
    return f"ALTER POLICY {policy.name} ON {table.name} {clauses};"


def _nullif(name: str) -> str:
    return f"NULLIF(current_setting('{name}', true), '')"

"""Tries policies without a tenant: each expression is evaluated, not read.

A setting has three states that matter. *Unset*: this session never set it, and
`current_setting(x, true)` is NULL. *Empty*: it was set for a transaction that has ended; the session then
knows its name, the value is '', and nothing makes it unset again, neither RESET nor DISCARD ALL. *Nobody*:
a tenant without rows, with which the other two are compared, so that rows meant for everyone are
not taken for a hole.

An expression is evaluated over rows made up in memory, `jsonb_populate_recordset(NULL::the_table, ...)`: thus
for tables that are empty, for commands that write, and without the role's own policies in the way. For the
unset state the setting's name is replaced in the expression by one that was never set. That works in any
session, but not inside a function or another table's policy: these are evaluated only if the session
itself has not had the setting, so audit on a fresh connection. The unset state comes first, since the
other two end it.

Source: https://www.postgresql.org/docs/current/ddl-rowsecurity.html and
https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-ADMIN-SET
"""

from __future__ import annotations

import itertools
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import psycopg
from psycopg.rows import TupleRow, tuple_row

from ._catalog import Policy, Table

Guarded = Mapping[int, tuple[Table, Sequence[Policy]]]
"""Tables by oid, with the policies that apply to the role."""
State = Literal["unset", "empty", "nobody"]
TIMEOUT = "2s"
NOBODY = (str(uuid.UUID(int=(1 << 128) - 2)), "-32749", "false")
"""Values that no tenant has, to be tried in turn until the policies' casts accept one."""
_NAMED = re.compile(r"current_setting\('((?:[^']|'')+)'::text")
_LITERAL = re.compile(r"'((?:[^']|'')*)'|(?<![\w.$'])(\d+)(?![\w.$'])")


class Failure(NamedTuple):
    """The error that an expression raised instead of an answer."""

    sqlstate: str
    message: str

    @property
    def of_the_probe(self) -> bool:
        """Whether the probe itself forbids the expression to take so long, or to write."""
        return self.sqlstate in ("57014", "25006")


Verdict = list[bool] | Failure | None
"""One answer per row, or an error, or None if it could not be tried."""


@dataclass(slots=True)
class Behaviour:
    """How one table's policies answered; `rows` are the made-up rows, as column and value.

    The first row is null if it may be, the second nowhere; the others hold a constant that a policy
    mentions: the tenant that an expression like `coalesce(current_setting(...), '42')` falls back to.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    verdicts: dict[tuple[State, str], Verdict] = field(default_factory=dict)
    visible: dict[State, int] = field(default_factory=dict)
    """How many of the sampled rows the role could really read."""

    def verdict(self, state: State, expression: str | None) -> Verdict:
        """Return an expression's verdict in a state."""
        return None if expression is None else self.verdicts.get((state, expression))

    def answer(self, state: State, expression: str | None, row: int) -> bool:
        """Return whether an expression is known to have been true of a row."""
        verdict = self.verdict(state, expression)
        return isinstance(verdict, list) and verdict[row]

    def fails(self, state: State) -> bool:
        """Return whether any expression raises an error in a state."""
        return any(isinstance(v, Failure) for (where, _), v in self.verdicts.items() if where == state)

    def admits(self, state: State, policies: Sequence[Policy], part: str) -> list[bool] | None:
        """Return for each row whether these policies together admit it; None if unknown.

        Permissive ones are joined by OR, restrictive ones by AND. An error of any is one of the statement,
        which then admits nothing; but in the state `nobody`, the error may be about the made-up value.
        """
        verdicts = [(policy, self.verdict(state, policy.expression(part))) for policy in policies]
        unknown = (type(None), Failure) if state == "nobody" else (type(None),)
        if any(isinstance(verdict, unknown) for _, verdict in verdicts):
            return None
        admitted = [False] * len(self.rows)
        for policy, verdict in sorted(verdicts, key=lambda item: not item[0].permissive):
            if not isinstance(verdict, list):
                return [False] * len(self.rows)
            for i, answer in enumerate(verdict):
                admitted[i] = (admitted[i] or answer) if policy.permissive else (admitted[i] and answer)
        return admitted


class Probe:
    """Evaluates policies as the current role, in a transaction that the caller rolls back."""

    def __init__(self, conn: psycopg.Connection[Any], settings: Sequence[str]) -> None:
        self._conn = conn
        self._settings = settings
        self._never_set = f"pgdbpool_unset.x{uuid.uuid4().hex}"
        reads = ["pg_catalog.current_setting(%s, true) IS NULL"] * len(settings)
        self.fresh = all(self._execute(f"SELECT {', '.join(reads)}", settings)[0])
        """Whether this session never had the settings."""

    def run(self, tables: Guarded, visible: set[int]) -> dict[int, Behaviour]:
        """Return how the policies of each table behave; of the tables in `visible`, count rows as well."""
        found = {oid: Behaviour(self._rows(*item)) for oid, item in tables.items()}
        empty = [""] * len(self._settings)
        states: list[tuple[State, Sequence[str] | None]] = [("unset", None), ("empty", empty)]
        for state, values in states:
            for oid, (table, policies) in tables.items():
                self._evaluate_all(found[oid], table, policies, state, values)
                if oid in visible and (values is not None or self.fresh):
                    self._count(found[oid], table, state, values)
        for oid, (table, policies) in tables.items():
            for nobody in itertools.islice(itertools.product(NOBODY, repeat=len(self._settings)), 27):
                self._evaluate_all(found[oid], table, policies, "nobody", nobody)
                if not found[oid].fails("nobody"):
                    break
            if any(found[oid].visible.values()):
                self._count(found[oid], table, "nobody", nobody)
        return found

    def _evaluate_all(
        self,
        found: Behaviour,
        table: Table,
        policies: Sequence[Policy],
        state: State,
        values: Sequence[str] | None,
    ) -> None:
        for policy in policies:
            for expression in filter(None, (policy.using, policy.check)):
                if values is not None or self.fresh or not policy.reads_through(expression):
                    found.verdicts[state, expression] = self._evaluate(table, found.rows, expression, values)

    def _evaluate(
        self, table: Table, rows: Sequence[dict[str, Any]], expression: str, values: Sequence[str] | None
    ) -> Verdict:
        if values is None:
            expression = _NAMED.sub(self._rename, expression)
        query = f"SELECT ({_no_placeholders(expression)}) IS TRUE FROM {_record_set(table)}"
        try:
            return [row[0] for row in self._in_state(values, query, [json.dumps(rows)])]
        except psycopg.Error as error:
            return _failure(error)

    def _count(self, found: Behaviour, table: Table, state: State, values: Sequence[str] | None) -> None:
        sample = f" TABLESAMPLE SYSTEM ({table.pages}) REPEATABLE (0)" if table.pages < 100 else ""
        query = f"SELECT count(*) FROM {_no_placeholders(table.name)}{sample}"
        try:
            [(found.visible[state],)] = self._in_state(values, query, [])
        except psycopg.Error as error:
            _failure(error)  # an expression's error is its verdict already, and a timeout is not evidence

    def _rows(self, table: Table, policies: Sequence[Policy]) -> list[dict[str, Any]]:
        text = " ".join(filter(None, itertools.chain.from_iterable((p.using, p.check) for p in policies)))
        constants = {quoted.replace("''", "'") or number for quoted, number in _LITERAL.findall(text)}
        constants = {value for value in constants if value and value.lower() not in self._settings}
        for columns in (table.columns, table.used):  # the others matter to a function of the whole row
            full = {column.name: column.filler for column in columns}
            bare = {column.name: column.filler if column.required else None for column in columns}
            special = [full | {c.name: value} for value in sorted(constants)[:8] for c in table.used[:8]]
            if self._suits(table, [bare, full, *special]):
                return [bare, full, *special]
        # A value does not suit its column's type or domain: that row is left out.
        if not self._suits(table, [full]):
            full = bare
        if not self._suits(table, [bare]):
            bare = full = {}
        return [bare, full, *(row for row in special if self._suits(table, [row]))]

    def _suits(self, table: Table, rows: Sequence[dict[str, Any]]) -> bool:
        try:
            self._in_state(None, f"SELECT count(*) FROM {_record_set(table)}", [json.dumps(rows)])
        except psycopg.Error as error:
            return not _failure(error)
        return True

    def _in_state(self, values: Sequence[str] | None, query: str, params: Sequence[str]) -> list[TupleRow]:
        with self._conn.transaction(force_rollback=True):
            if values is not None:
                calls = ["pg_catalog.set_config(%s, %s, true)"] * len(values)
                pairs = itertools.chain.from_iterable(zip(self._settings, values, strict=True))
                self._execute(f"SELECT {', '.join(calls)}", list(pairs))
            return self._execute(query, params)

    def _execute(self, query: str, params: Sequence[str]) -> list[TupleRow]:
        with psycopg.Cursor(self._conn, row_factory=tuple_row) as cursor:
            return cursor.execute(query.encode(self._conn.info.encoding), params, prepare=False).fetchall()

    def _rename(self, match: re.Match[str]) -> str:
        if match[1].replace("''", "'").lower() not in self._settings:
            return match[0]
        return f"current_setting('{self._never_set}'::text"


def assume(conn: psycopg.Connection[Any], role: str) -> bool:
    """Become a role, named as in SQL, until the transaction's end; return False if that is not allowed."""
    try:
        with conn.transaction(), psycopg.Cursor(conn) as cursor:
            cursor.execute(f"SET LOCAL ROLE {role}".encode(conn.info.encoding))
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.InvalidParameterValue):
        return False
    return True


def _record_set(table: Table) -> str:
    name, alias = _no_placeholders(table.name), _no_placeholders(table.alias)
    return f"pg_catalog.jsonb_populate_recordset(NULL::{name}, %s::pg_catalog.jsonb) AS {alias}"


def _no_placeholders(text: str) -> str:
    return text.replace("%", "%%")


def _failure(error: psycopg.Error) -> Failure:
    """Return the server's error for an expression; raises the error again if it ended the session."""
    if error.sqlstate is None or error.sqlstate.startswith(("08", "57P")):
        raise error
    return Failure(error.sqlstate, error.diag.message_primary or str(error))

"""Facts from a statement's text: how many statements it holds, how it may affect the session.

It reads a text as PostgreSQL's lexer does, so the number of statements is exact: with
`standard_conforming_strings` on, and by `shape_with_escapes` if that is off. It does not parse them: in
doubt it says "alone" or "touches", which costs a round trip or a cleaning and is never wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import psycopg
from psycopg._compat import Template
from psycopg.sql import Composable, Identifier, Literal

from ..errors import as_query_error

# The characters of a name, with `$` or without, and its first one: also any beyond ASCII. So these
# exclude the other ASCII characters; a class up to the last character takes 8 ms to compile.
_IN_NAME = r"[^\x00-\x23\x25-\x2f\x3a-\x40\x5b-\x5e\x60\x7b-\x7f]"
_IN_TAG = r"[^\x00-\x2f\x3a-\x40\x5b-\x5e\x60\x7b-\x7f]"
_FIRST = r"[^\x00-\x40\x5b-\x5e\x60\x7b-\x7f]"


def _opaque(escape: str) -> re.Pattern[str]:
    """Return the pattern of text that holds no code, and of the mark before a string with backslash escapes.

    As PostgreSQL's lexer reads them. A constant that continues on a later line is one; a constant with a
    doubled quote reads as two here, which covers the same text. Without an end it takes the rest, so that no
    text is read twice: PostgreSQL refuses it.
    https://www.postgresql.org/docs/current/sql-syntax-lexical.html
    """
    return re.compile(
        rf"""  {escape}                              # a string with backslash escapes, in all of its lines
              '[^'\\]*(?:\\.[^'\\]*)*(?:'|\\?\Z)
              (?: [ \t\f\v]* (?:--[^\n\r]*)? [\n\r] [ \t\n\r\f\v]* (?:--[^\n\r]*[\n\r][ \t\n\r\f\v]*)*
                  '[^'\\]*(?:\\.[^'\\]*)*(?:'|\\?\Z)
                | '[^'\\]*(?:\\.[^'\\]*)*(?:'|\\?\Z) )*
            | '[^']*(?:'|\Z)                      # a string, or a part of one
            | "[^"]*(?:"|\Z)                      # a quoted name, or a part of one
            | (?<!{_IN_NAME})\$((?:{_FIRST}{_IN_TAG}*)?)\$
              (?:.*?\$\1\$|.*)                      # a dollar-quoted string
            | --[^\n\r]*                            # a comment
            | (?P<comment>/\*)                      # the beginning of one that may hold others
        """,
        re.VERBOSE | re.DOTALL | re.ASCII,
    )


_OPAQUE = _opaque(rf"(?<!{_IN_NAME})[eE]")
# With standard_conforming_strings off, a plain string has backslash escapes too.
_OPAQUE_ESCAPING = _opaque("")
_COMMENT_MARK = re.compile(r"/\*|\*/")

# First words, in upper case.
_ALONE = {"COPY", "CALL", "DO"}
_UTILITY = {
    "VACUUM",
    "CREATE",
    "DROP",
    "ALTER",
    "REINDEX",
    "CLUSTER",
    "CALL",
    "DO",
    "DISCARD",
    "ANALYZE",
    "COPY",
}
_ENDS = {"COMMIT", "END", "ROLLBACK", "ABORT"}
_BEGINS = {"BEGIN", "START"}
# The body of a function in SQL holds statements, with END after the last one; see `statements_of`.
_ATOMIC = re.compile(
    r"\s*CREATE\s+(?:OR\s+REPLACE\s+)?(?:FUNCTION|PROCEDURE)\b.*?\bBEGIN\s+ATOMIC\b(?!\s+END\b)",
    re.I | re.DOTALL,
)
_END = re.compile(r"\s*END\b", re.I)
_PARENTHESIS = re.compile(r"[()]")
_TOUCHES = {
    "SET",
    "RESET",
    "DISCARD",
    "LISTEN",
    "PREPARE",
    "DEALLOCATE",
    "DECLARE",
    "DO",
    "CALL",
    "EXECUTE",
    "LOAD",
}
_READS = {"SELECT", "SHOW", "TABLE", "VALUES", "FETCH"}
_MAY_READ = {"WITH", "EXPLAIN"}
_WRITES = re.compile(r"\b(?:insert|update|delete|merge|analyze)\b", re.I)
_LOCAL = {"LOCAL", "TRANSACTION", "CONSTRAINTS"}
# Anywhere in the text, so that it is also found in a quoted name, a CTE or an EXPLAIN ANALYZE.
# set_limit: pg_trgm. The last ones leave changes that no statement undoes: see _TAINTS.
_REACHES = re.compile(
    r"set_config|pg_settings|advisory|\btemp\b|\btemporary\b|pg_temp|\bset_limit\b|\bwith\s+hold\b"
    r"|dblink_connect|\bsetseed\b|replication_origin_(?:session|xact)_setup"
    r"|(?:create|copy)_(?:logical|physical)_replication_slot|\bisn_weak\b|\bsepgsql_setcon\b",
    re.I,
)
# Each of them contains one of these; searching for these takes a twentieth of the time.
_HINTS = (
    "set_config", "pg_settings", "advisory", "temp", "set_limit", "hold", "dblink_connect", "setseed",
    "replication", "isn_weak", "sepgsql_setcon",
)  # fmt: skip
_PIECE, _OVERLAP = 65_536, 1_000
# A library, connections elsewhere, the state of random() (which RESET ALL leaves), an origin of
# replication, a temporary slot, a mode of contrib/isn, a label.
_TAINTS = re.compile(
    r"\bload\b|dblink_connect|\bsetseed\b|\bseed\b|replication_origin_(?:session|xact)_setup"
    r"|_replication_slot|\bisn_weak\b|\bsepgsql_setcon\b",
    re.I,
)
_PREPARES = re.compile(r"\bprepare\b", re.I)
_TIMEOUT = re.compile(r"statement_timeout", re.I)
# First words of statements in which a setting's name may be a string or quoted.
_NAMES = {"SET", "RESET", "DO", "CALL", "EXECUTE"}
_QUOTES = re.compile(r"set_config|pg_settings", re.I)


@dataclass(frozen=True, slots=True)  # slots are read faster than a tuple's names
class StatementTraits:
    """The facts that a statement's text gives."""

    number: int
    """Statements in the text: the extended protocol, and so a pipeline, takes one."""
    alone: bool
    """It cannot share a pipeline (COPY), or must not (CALL and DO may commit inside)."""
    utility: bool
    """It may be one that PostgreSQL refuses inside a transaction."""
    ends: bool
    """It ends a transaction."""
    commits: bool
    """It asks for a commit."""
    controls: bool
    """It begins or ends a transaction."""
    touches: bool
    """It may leave something behind in the session."""
    prepares: bool
    """It may leave a prepared statement behind."""
    taints: bool
    """It may leave something behind that no statement removes."""
    timeout: bool
    """It may change how long a statement may take."""
    allows: str
    """How long, in PostgreSQL's words, if the text says so."""
    changes: bool
    """It may take effect: it is not one that only reads, as far as its words show."""
    sets: bool
    """It is a SET: that takes no time, and SET TRANSACTION comes before any query of its transaction."""
    escapes: bool
    """It may be read otherwise if `standard_conforming_strings` is off."""
    special: bool
    """Something must be noted before it is sent: it touches, sets a timeout, controls, or has escapes."""
    uncommon: bool
    """It may be one that cannot ride with the preamble, or changes the next preamble."""


@lru_cache(maxsize=2048)
def _known(text: str) -> StatementTraits:
    return _analyse(text)


def _analyse(text: str, escaping: bool = False) -> StatementTraits:
    if "\0" in text:  # psycopg would send only the text before it
        raise as_query_error(
            psycopg.ProgrammingError("the statement's text contains a NUL: nothing was sent")
        )
    code = code_of(text, escaping)
    heads = [head for part in statements_of(code) if (head := _first_words(part))]
    words = [head[0].upper() for head in heads]
    touches = _reaches(text) or any(
        word in _TOUCHES and not (word == "SET" and len(head) > 1 and head[1].upper() in _LOCAL)
        for word, head in zip(words, heads, strict=True)
    )
    timeout = False
    if touches or "SET" in words:
        quoted = not _NAMES.isdisjoint(words) or _QUOTES.search(text) is not None
        timeout = _TIMEOUT.search(text if quoted else code) is not None
    escapes = not escaping and "\\" in text and "'" in text
    alone, utility = not _ALONE.isdisjoint(words), not _UTILITY.isdisjoint(words)
    controls = any(word in _ENDS or word in _BEGINS for word in words)
    return StatementTraits(
        number=max(1, len(words)),
        alone=alone,
        utility=utility,
        ends=any(word in _ENDS for word in words),
        commits=any(word in ("COMMIT", "END") for word in words),
        controls=controls,
        touches=touches,
        prepares=touches and _PREPARES.search(text) is not None,
        taints=touches and _TAINTS.search(text) is not None,
        timeout=timeout,  # SET LOCAL too, which leaves nothing behind
        allows=_allows(text) if timeout and words == ["SET"] else "",
        changes=_changes(words, code),
        sets=words == ["SET"],
        escapes=escapes,
        special=touches or timeout or escapes or controls,
        uncommon=len(words) > 1 or alone or utility or controls,
    )


def _changes(words: list[str], code: str) -> bool:
    """Return whether one of the statements does more than read."""
    others = {word for word in words if word not in _READS}
    return bool(others) and (not others <= _MAY_READ or _WRITES.search(code) is not None)


def code_of(text: str, escaping: bool = False, name: str = " ") -> str:
    """Return the text with a blank in place of each comment and string, and `name` for each quoted name."""
    opaque = _OPAQUE_ESCAPING if escaping else _OPAQUE
    if "/*" not in text and name == " ":
        return opaque.sub(" ", text)
    parts: list[str] = []
    at = 0
    while found := opaque.search(text, at):
        parts += text[at : found.start()], name if found[0][0] == '"' else " "
        at = found.end() if found["comment"] is None else _end_of_comment(text, found.end())
    return "".join((*parts, text[at:]))


def _end_of_comment(text: str, at: int) -> int:
    """Return the end of a comment that began before `at`; it may have others inside."""
    depth = 1
    for mark in _COMMENT_MARK.finditer(text, at):
        depth += 1 if mark[0] == "/*" else -1
        if not depth:
            return mark.end()
    return len(text)


def statements_of(code: str) -> list[str]:
    """Split code at the semicolons between statements.

    Not at those in parentheses (the actions of a rule), nor in the body of a function, if an END that
    follows a semicolon is the body's.
    """
    if ";" not in code:
        return [code]
    statements: list[str] = []
    pending, opened, depth = [], 0, 0
    for part in code.split(";"):
        pending.append(part)
        opened += part.count("(") - part.count(")")
        if opened > 0:
            continue
        statement = pending[0] if len(pending) == 1 else ";".join(pending)
        pending, opened = [], 0
        if not depth:
            statements.append(statement)
        if depth and _END.match(statement):
            depth -= 1
        elif "ATOMIC" in statement.upper() and _ATOMIC.match(_outside_parentheses(statement)):
            depth += 1
    return [*statements, ";".join(pending)] if pending else statements


def _first_words(code: str) -> list[str]:
    """Return the first two words of a statement; nothing if it is empty."""
    return code.lstrip(" \t\r\n\f\v(")[:200].replace("(", " ").split(None, 2)[:2]


def _outside_parentheses(code: str) -> str:
    parts, at, depth = [], 0, 0
    for mark in _PARENTHESIS.finditer(code):
        if not depth:
            parts.append(code[at : mark.start()])
        depth += 1 if mark[0] == "(" else -1
        at = mark.end()
    return " ".join((*parts, code[at:]))


def _reaches(text: str) -> bool:
    """Return whether the text has a word that may leave something in the session, even if only in its data.

    A long text is looked through in pieces, since no other thread can run during a search.
    """
    small = text.lower()
    if not any(hint in small for hint in _HINTS):
        return False
    starts = range(0, len(text), _PIECE)
    return any(_REACHES.search(text, start, start + _PIECE + _OVERLAP) for start in starts)


def _allows(text: str) -> str:
    """Return the value in a SET of statement_timeout; empty if it is none."""
    parts = [part for part in text.replace("=", " = ").split() if part.upper() not in ("LOCAL", "SESSION")]
    if len(parts) > 3 and parts[1].lower() == "statement_timeout" and parts[2].upper() in ("=", "TO"):
        return "".join(parts[3:]).strip("';")
    return ""


UNKNOWN = StatementTraits(
    number=1, alone=False, utility=False, ends=False, commits=False, controls=False,
    touches=True, prepares=False, taints=False, timeout=False, allows="", changes=True, sets=False,
    escapes=False, special=True, uncommon=False,
)  # fmt: skip
"""The traits of an object that is not a statement, which psycopg refuses."""


def shape(query: Any, conn: psycopg.Connection[Any]) -> StatementTraits:
    """Return the traits of a statement's text; remembered, since programs repeat themselves."""
    if not isinstance(query, str):  # first, since it mostly is
        text = text_of(query, conn)
        if text is None:
            return UNKNOWN
        query = text
    # A long text holds its data, so it is not likely to come again, nor worth its memory.
    return _known(query) if len(query) <= 4096 else _analyse(query)


def shape_with_escapes(query: Any, conn: psycopg.Connection[Any]) -> StatementTraits:
    """Return the traits of a statement's text if `standard_conforming_strings` is off."""
    text = text_of(query, conn)
    return UNKNOWN if text is None else _analyse(text, escaping=True)


def text_of(query: Any, conn: psycopg.Connection[Any] | None) -> str | None:
    """Return the text of a statement; None if psycopg refuses it."""
    if isinstance(query, str):
        return query
    if isinstance(query, Composable):
        return query.as_string(conn)
    if isinstance(query, bytes):
        return query.decode("utf-8", "replace")
    if isinstance(query, Template):
        return "".join(_filled(query, conn))
    return None


def _filled(template: Template, conn: psycopg.Connection[Any] | None) -> Iterator[str]:
    """Yield the parts of a template string's statement as psycopg composes it, but for its parameters."""
    for part in template:
        if isinstance(part, str):
            yield part
        elif isinstance(part.value, Template):
            yield from _filled(part.value, conn)
        elif isinstance(part.value, Composable):
            yield part.value.as_string(conn)
        elif part.format_spec == "l":
            yield Literal(part.value).as_string(conn)
        else:  # psycopg refuses a name that is not text
            yield Identifier(str(part.value)).as_string(conn) if part.format_spec == "i" else "$1"

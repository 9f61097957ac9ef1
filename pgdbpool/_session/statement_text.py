"""The text of a statement for people: in logs, errors, traces, and as a comment for the server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from psycopg import sql
from psycopg._compat import Interpolation, Template

LONGEST_STATEMENT = 1000
"""Maximum length of a reported statement."""
_SPACE = re.compile(r"\s+")
_VALUE = re.compile(r"'[^']*(?:'|$)|\$(\w*)\$.*?(?:\$\1\$|$)")


def text_of(statement: Any) -> str | None:
    """Return a statement in one line for people, without values: literals of `psycopg.sql` are left out."""
    if statement is None:
        return None
    if isinstance(statement, (sql.Composable, Template)):
        text = "".join(_parts(statement))
    elif isinstance(statement, bytes):
        text = statement.decode("utf-8", "replace")
    elif isinstance(statement, str):
        text = statement
    else:
        return type(statement).__name__
    text = _SPACE.sub(" ", text[: 4 * LONGEST_STATEMENT]).strip()
    return text if len(text) <= LONGEST_STATEMENT else text[:LONGEST_STATEMENT] + " ..."


class Filled(sql.SQL):
    """A statement with its parameters written into it; only the statement is reported."""

    def __init__(self, text: Any, statement: Any) -> None:
        super().__init__(text)
        self.statement = statement


def _parts(statement: Any) -> Iterator[str]:
    if isinstance(statement, (sql.Composed, Template)):
        for part in statement:
            yield from _parts(part)
    elif isinstance(statement, str):
        yield statement
    elif isinstance(statement, sql.Literal):
        yield "..."
    elif isinstance(statement, Filled):
        yield text_of(statement.statement) or ""
    elif isinstance(statement, sql.Composable):
        yield statement.as_string()
    elif isinstance(statement.value, (sql.Composable, Template)):
        yield from _parts(statement.value)
    else:
        yield _interpolated(statement)


def _interpolated(part: Interpolation[Any]) -> str:
    """Return the name that a template string inserts, or the expression of a value."""
    if part.format_spec == "i":
        return sql.Identifier(str(part.value)).as_string()
    return f"{{{part.expression}}}"


def comment_on(statement: Any, text: str) -> Any:
    """Return the statement with a leading comment, if its type allows one."""
    comment = f"/* {text} */ "
    if isinstance(statement, str):
        return comment + statement
    if isinstance(statement, bytes):
        return comment.encode() + statement
    if isinstance(statement, sql.Composable):
        return sql.SQL(comment) + statement
    return Template(comment, *statement) if isinstance(statement, Template) else statement


def without_values(text: str) -> str:
    """Return a text without the strings in quotes: one that was written into a statement may be a secret."""
    return _VALUE.sub("'...'", text)

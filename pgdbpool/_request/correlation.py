"""Who a block works for: its correlation id; and what is told of a block: its place and its last statement.

A reader asks `in_use` first, a plain attribute: a process that uses nothing of this pays nothing for it.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from psycopg import sql

from .._util.scoped_value import Binding, Scope, Variable, current
from ..errors import Error

if TYPE_CHECKING:
    from .._session.block import Block

in_use = False
"""Whether a correlation id was ever given in this process, or a group has `leak_stack`."""

CONTEXTLIB = vars(contextlib)
"""What a frame of contextlib has as its globals, such as that of `ExitStack.enter_context`."""

LONGEST_ID = 128
LONGEST_STATEMENT = 1000
"""Characters of a statement that are told."""

DEEPEST = 100
"""Frames of a stack that are told."""

_UNSAFE = re.compile(r"[^A-Za-z0-9_.:@=+,-]")
_SPACE = re.compile(r"\s+")

_current: Variable[str] = ContextVar("pgdbpool_correlation", default=None)
_making = threading.RLock()  # a signal handler may come back to it


def correlation(value: Any) -> Scope[str]:
    """Give every block that is entered inside the `with` block this correlation id.

    It is in the log records of the block and in its errors, and at the server where the group has
    `annotate`. It is a context variable: a new thread does not inherit it, `contextvars.copy_context()`
    passes it on.

    :param value: such as a request's id. It is made a string of at most 128 characters, in which others than
        ASCII letters, digits and ``_.:@=+,-`` become ``_``; so it may come from outside.
    """
    return Scope(_current, lambda: clean(value))


def set_current(value: Any) -> None:
    """Give all blocks of the rest of this context the id, such as that of a request."""
    _current.set(Binding(clean(value)))


def current_correlation() -> str | None:
    """Return the current correlation id, or None."""
    return current(_current)


def clean(value: Any) -> str:
    """Return an id that can stand in a log, in `application_name` and in a comment; now there are ids."""
    global in_use
    in_use = True
    return _UNSAFE.sub("_", str(value)[:LONGEST_ID])


def use() -> None:
    """From now on blocks are traced."""
    global in_use
    in_use = True


def forked() -> None:
    """In a child, forget a lock that a thread of its parent may have held."""
    global _making
    _making = threading.RLock()


def begin(block: Block, given: str | None, frame: FrameType | None) -> None:
    """Note of a block that begins its id, and with a frame the stack that leads to it."""
    found = current(_current) if given is None else given
    if found is not None:
        block.own_id = found
    if frame is not None:
        stack: list[tuple[CodeType, int]] = []
        at: FrameType | None = frame
        while at is not None and len(stack) < DEEPEST:
            stack.append((at.f_code, at.f_lasti))  # not the frame, which would keep its variables alive
            at = at.f_back
        block.stack = stack


def caller_of(frame: FrameType) -> FrameType:
    """Return the frame, or the nearest that led to it and is not contextlib's or the package's own."""
    at: FrameType | None = frame
    while at is not None:
        module = str(at.f_globals.get("__name__")).partition(".")[0]
        if module not in ("contextlib", "pgdbpool"):
            return at
        at = at.f_back
    return frame


def id_of(block: Block) -> str:
    """Return the correlation id of a block; one that has none is given one now."""
    found: str | None = getattr(block, "own_id", None)
    if found is None:
        with _making:  # the monitor may ask at the same time
            found = getattr(block, "own_id", None)
            if found is None:
                found = block.own_id = os.urandom(8).hex()
    return found


def mark(error: BaseException, block: Block) -> None:
    """Put the id of the block into an error of the package that leaves it."""
    if not isinstance(error, Error):
        return
    if error.correlation_id is None:
        error.correlation_id = id_of(block)
    if in_use and hasattr(error, "add_note"):  # Python 3.11 and later
        note = f"correlation id: {error.correlation_id}"
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)


def text_of(statement: Any) -> str | None:
    """Return a statement in one line for people, without values: literals of `psycopg.sql` are left out."""
    if statement is None:
        return None
    if isinstance(statement, sql.Composable):
        text = "".join(_parts(statement))
    elif isinstance(statement, bytes):
        text = statement.decode("utf-8", "replace")
    elif isinstance(statement, str):
        text = statement
    elif strings := getattr(statement, "strings", None):  # a template string
        text = "{}".join(strings)
    else:
        return type(statement).__name__
    text = _SPACE.sub(" ", text[: 4 * LONGEST_STATEMENT]).strip()
    return text if len(text) <= LONGEST_STATEMENT else text[:LONGEST_STATEMENT] + " ..."


class Filled(sql.SQL):
    """A statement with its parameters written into it, of which only the statement is told."""

    def __init__(self, text: Any, statement: Any) -> None:
        super().__init__(text)
        self.statement = statement


def _parts(composable: sql.Composable) -> Iterator[str]:
    if isinstance(composable, sql.Composed):
        for part in composable:
            yield from _parts(part)
    elif isinstance(composable, sql.Literal):
        yield "..."
    elif isinstance(composable, Filled):
        yield text_of(composable.statement) or ""
    else:
        yield composable.as_string()


def thread_names() -> dict[int | None, str]:
    """Return the names of the threads that run, by number."""
    return {thread.ident: thread.name for thread in threading.enumerate()}


def told(group: str, endpoint: str, block: Block, seconds: float) -> tuple[str, dict[str, Any]]:
    """Return what is told of a block that has a connection, in words and as fields of a log record."""
    names = thread_names()
    fields = {
        "group": group,
        "endpoint": endpoint,
        "correlation_id": id_of(block),
        "seconds": seconds,
        **_place(block, names),
        "statement": text_of(getattr(block, "statement", None)),
    }
    return describe(block, seconds, names), fields


def _place(block: Block, names: dict[int | None, str]) -> dict[str, Any]:
    code, at = block.place
    stack = getattr(block, "stack", None)
    return {
        "holder": names.get(block.thread, str(block.thread)),
        "file": code.co_filename,
        "line": _line(code, at),
        "function": code.co_name,
        "stack": None if stack is None else [_frame(*at) for at in reversed(stack)],
    }


def describe(block: Block, seconds: float, names: dict[int | None, str]) -> str:
    """Return in words who has a connection, for how long, and what was sent last."""
    place = _place(block, names)
    text = f"thread {place['holder']} for {seconds:.1f} s, from {_frame(*block.place)}"
    if (own_id := getattr(block, "own_id", None)) is not None:
        text += f", correlation id {own_id}"
    if (statement := text_of(getattr(block, "statement", None))) is not None:
        text += f", last statement: {statement}"
    if place["stack"]:
        text += ", stack: " + " > ".join(place["stack"])
    return text


def where(block: Block) -> str:
    """Return the file, line and function in which a block was entered."""
    return _frame(*block.place)


def _frame(code: CodeType, at: int) -> str:
    return f"{code.co_filename}:{_line(code, at)} in {code.co_name}"


def _line(code: CodeType, at: int) -> int:
    """Return the line of an instruction, which a frame takes longer to work out than to name."""
    lines = (line for start, end, line in code.co_lines() if start <= at < end)
    return next(lines, None) or code.co_firstlineno


def comment_on(statement: Any, text: str) -> Any:
    """Return the statement with a comment before it, where it is of a kind that can have one."""
    comment = f"/* {text} */ "
    if isinstance(statement, str):
        return comment + statement
    if isinstance(statement, bytes):
        return comment.encode() + statement
    if isinstance(statement, sql.Composable):
        return sql.SQL(comment) + statement
    return statement


def application_name(base: str, correlation_id: str) -> str:
    """Return an `application_name` with the id at its end, which PostgreSQL does not cut off."""
    room = _NAME_LENGTH - len(correlation_id) - 1
    return f"{base[:room]} {correlation_id}" if base and room > 0 else correlation_id[:_NAME_LENGTH]


_NAME_LENGTH = 63
"""Of NAMEDATALEN 64, which most servers have."""


_VALUE = re.compile(r"'[^']*(?:'|$)|\$(\w*)\$.*?(?:\$\1\$|$)")


def without_values(text: str) -> str:
    """Return a text without the strings in quotes: one that was written into a statement may be a secret."""
    return _VALUE.sub("'...'", text)

"""The description of a block in logs, errors and reports: its id, its entry point, its last statement."""

from __future__ import annotations

import threading
from types import CodeType, FrameType
from typing import Any

from .._request import correlation
from ..errors import Error
from .block import Block
from .statement_text import text_of, without_values

DEEPEST = 100
"""Maximum number of stack frames reported."""


def begin(block: Block, given: str | None, frame: FrameType | None) -> None:
    """Record a new block's id and, given a frame, the stack that leads to it."""
    found = correlation.current_correlation() if given is None else given
    if found is not None:
        block.own_id = found
    if frame is not None:
        stack: list[tuple[CodeType, int]] = []
        at: FrameType | None = frame
        while at is not None and len(stack) < DEEPEST:
            stack.append((at.f_code, at.f_lasti))  # not the frame, which would keep its variables alive
            at = at.f_back
        block.stack = stack


def mark(error: BaseException, block: Block) -> None:
    """Put the block's id into one of the package's errors that leaves the block."""
    if not isinstance(error, Error):
        return
    if error.correlation_id is None:
        error.correlation_id = block.correlation_id
    if correlation.in_use and hasattr(error, "add_note"):  # Python 3.11 and later
        note = f"correlation id: {error.correlation_id}"
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)


def told(group: str, endpoint: str, block: Block, seconds: float) -> tuple[str, dict[str, Any]]:
    """Return the description of a block that has a connection, as text and as fields of a log record."""
    names = thread_names()
    fields = {
        "group": group,
        "endpoint": endpoint,
        "correlation_id": block.correlation_id,
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
        "stack": None if stack is None else [frame(*at) for at in reversed(stack)],
    }


def describe(block: Block, seconds: float, names: dict[int | None, str]) -> str:
    """Return the thread that has a connection, for how long, and the last statement, as text."""
    place = _place(block, names)
    text = f"thread {place['holder']} for {seconds:.1f} s, from {frame(*block.place)}"
    if (own_id := getattr(block, "own_id", None)) is not None:
        text += f", correlation id {own_id}"
    if (statement := text_of(getattr(block, "statement", None))) is not None:
        text += f", last statement: {statement}"
    if place["stack"]:
        text += ", stack: " + " > ".join(place["stack"])
    return text


def brief(block: Block, names: dict[int | None, str]) -> dict[str, Any]:
    """Return the thread that has a connection, the place of its block and the last statement, for a list."""
    statement = text_of(getattr(block, "statement", None))
    return {
        "place": where(block),
        "thread": names.get(block.thread, str(block.thread)),
        "correlation_id": getattr(block, "own_id", None),
        "statement": None if statement is None else without_values(statement),
    }


def where(block: Block) -> str:
    """Return the file, line and function in which a block was entered."""
    return frame(*block.place)


def frame(code: CodeType, at: int) -> str:
    """Return the file, line and function of an instruction."""
    return f"{code.co_filename}:{_line(code, at)} in {code.co_name}"


def _line(code: CodeType, at: int) -> int:
    """Return the line of an instruction; slow, so it is called only for a report."""
    lines = (line for start, end, line in code.co_lines() if start <= at < end)
    return next(lines, None) or code.co_firstlineno


def thread_names() -> dict[int | None, str]:
    """Return the names of the running threads by identifier."""
    return {thread.ident: thread.name for thread in threading.enumerate()}

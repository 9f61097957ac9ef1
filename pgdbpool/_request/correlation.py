"""The correlation id of the current context.

Readers check the plain attribute `in_use` first, so a process without correlation ids pays nothing.
"""

from __future__ import annotations

import contextlib
import re
from contextvars import ContextVar
from types import FrameType
from typing import Any

from .._util.scoped_value import Binding, Scope, Variable, current
from . import special

in_use = False
"""Whether a correlation id was ever given in this process, or a group has `leak_stack`."""

CONTEXTLIB = vars(contextlib)
"""The globals of contextlib's frames, such as that of `ExitStack.enter_context`."""

LONGEST_ID = 128


_UNSAFE = re.compile(r"[^A-Za-z0-9_.:@=+,-]")

_current: Variable[str] = ContextVar("pgdbpool_correlation", default=None)


def correlation(value: Any) -> Scope[str]:
    """Give every block that is entered inside the `with` block this correlation id.

    It appears in the block's log records and errors, and at the server if the group has `annotate`. It is a
    context variable: a new thread does not inherit it, `contextvars.copy_context()` passes it on.

    :param value: such as a request's id. It is converted to a string of at most 128 characters; any except
        ASCII letters, digits and ``_.:@=+,-`` become ``_``. So an untrusted value is safe.
    """
    return Scope(_current, lambda: clean(value))


def set_current(value: Any) -> None:
    """Give all blocks of the rest of this context the id, such as that of a request."""
    _current.set(Binding(clean(value)))


def current_correlation() -> str | None:
    """Return the current correlation id, or None."""
    return current(_current)


def clean(value: Any) -> str:
    """Sanitize an id for logs, `application_name` and SQL comments, and switch tracing on."""
    use()
    return _UNSAFE.sub("_", str(value)[:LONGEST_ID])


def use() -> None:
    """Switch tracing on."""
    global in_use
    in_use = True
    special.use()


def caller_of(frame: FrameType) -> FrameType:
    """Return the nearest frame, from this one outwards, outside contextlib and this package."""
    at: FrameType | None = frame
    while at is not None:
        module = str(at.f_globals.get("__name__")).partition(".")[0]
        if module not in ("contextlib", "pgdbpool"):
            return at
        at = at.f_back
    return frame


def application_name(base: str, correlation_id: str) -> str:
    """Return an `application_name` with the id at its end, which PostgreSQL does not cut off."""
    room = _NAME_LENGTH - len(correlation_id) - 1
    return f"{base[:room]} {correlation_id}" if base and room > 0 else correlation_id[:_NAME_LENGTH]


_NAME_LENGTH = 63
"""From NAMEDATALEN 64, the default."""

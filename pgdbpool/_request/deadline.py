"""The deadline of a request: its remaining time bounds each wait and each statement.

Readers check the plain attribute `in_use` first, so a process without deadlines pays nothing.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from time import monotonic

from .._util.scoped_value import Binding, Scope, Variable, current
from ..errors import DeadlineExceeded
from . import special

in_use = False
"""Whether a deadline was ever set in this process."""

_current: Variable[float] = ContextVar("pgdbpool_deadline", default=None)
"""When the deadline expires, on the monotonic clock."""


def deadline(seconds: float) -> Scope[float]:
    """Limit everything inside the `with` block to this many seconds from now.

    Each wait (for the rate limit, a connection, a connect, a statement's answer) is cut to the remaining
    time, and `statement_timeout` is bound to it at the server in the statement's own round trip. The
    earliest of nested deadlines applies. It is a context variable: a new thread does not inherit it,
    `contextvars.copy_context()` passes it on.

    :raises DeadlineExceeded: by any call after the deadline, before anything is sent.
    :raises ValueError: `seconds` is not a finite number.
    """
    return Scope(_current, lambda: _earlier(seconds))


def set_current(seconds: float) -> None:
    """Set a deadline for the rest of this context, such as a request's own."""
    _current.set(Binding(_earlier(seconds)))


def time_left() -> float | None:
    """Return the seconds left until the current deadline, negative after it; None without a deadline."""
    binding = _current.get()
    if binding is None or binding.over:
        at = current(_current)
        return None if at is None else at - monotonic()
    return binding.value - monotonic()


def check(group: str = "") -> float | None:
    """Refuse to begin anything after the deadline; return the seconds left, or None without a deadline.

    :raises DeadlineExceeded: the deadline has passed.
    """
    left = time_left()
    if left is not None and left <= 0:
        raise DeadlineExceeded(
            f"the deadline passed {-left:.3f} s ago: nothing was sent; give the request more time, "
            "or less to do",
            group=group,
        )
    return left


def earlier(at: float, group: str = "") -> float:
    """Return the earlier of the current deadline and this time of the monotonic clock.

    :raises DeadlineExceeded: the deadline has passed.
    """
    check(group)
    ends = current(_current)
    return at if ends is None else min(at, ends)


def _earlier(seconds: float) -> float:
    global in_use
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
        raise ValueError(f"a deadline is a number of seconds, not {seconds!r}")
    if not in_use:
        in_use = True
        special.use()
    at, outer = monotonic() + seconds, current(_current)
    return at if outer is None else min(at, outer)

"""The deadline of a request: what is left of its time bounds each wait and each statement in it.

A reader asks `in_use` first, a plain attribute: a process that sets no deadline pays nothing for them.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from time import monotonic

from .._util.scoped_value import Binding, Scope, Variable, current
from ..errors import DeadlineExceeded

in_use = False
"""Whether a deadline was ever set in this process."""

_current: Variable[float] = ContextVar("pgdbpool_deadline", default=None)
"""When the time is up, on the monotonic clock."""


def deadline(seconds: float) -> Scope[float]:
    """Bound everything inside the `with` block to so many seconds from now.

    Each wait (for the rate limit, a connection, a connect, a statement's answer) is cut to what is left, and
    `statement_timeout` is bound to it at the server in the statement's own round trip. Of nested
    deadlines the earlier one wins. It is a context variable: a new thread does not inherit it,
    `contextvars.copy_context()` passes it on.

    :raises DeadlineExceeded: by what comes after the time is up, before anything is sent.
    :raises ValueError: `seconds` is not a finite number.
    """
    return Scope(_current, lambda: _earlier(seconds))


def set_current(seconds: float) -> None:
    """Set a deadline for the rest of this context, such as a request's own."""
    _current.set(Binding(_earlier(seconds)))


def time_left() -> float | None:
    """Return the seconds that are left until the current deadline, negative after it; None without one."""
    at = current(_current)
    return None if at is None else at - monotonic()


def check(group: str = "") -> None:
    """Refuse to begin anything when the time is up.

    :raises DeadlineExceeded: it is.
    """
    left = time_left()
    if left is not None and left <= 0:
        raise DeadlineExceeded(
            f"the deadline passed {-left:.3f} s ago: nothing was sent; give the request more time, "
            "or less to do",
            group=group,
        )


def earlier(at: float, group: str = "") -> float:
    """Return the current deadline where it comes before this time of the monotonic clock, else the time.

    :raises DeadlineExceeded: it has passed.
    """
    check(group)
    ends = current(_current)
    return at if ends is None else min(at, ends)


def _earlier(seconds: float) -> float:
    global in_use
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
        raise ValueError(f"a deadline is a number of seconds, not {seconds!r}")
    in_use = True
    at, outer = monotonic() + seconds, current(_current)
    return at if outer is None else min(at, outer)

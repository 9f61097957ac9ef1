"""The first act of a forked child: to begin with new pools."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_begin_anew: Callable[[], None] = lambda: None  # noqa: E731
_noticing = threading.Lock()
UWSGI = "uwsgi" in sys.modules
"""Whether a process may be forked without Python's knowledge."""
_pid = os.getpid()
_parent: int | None = None


def in_child(begin_anew: Callable[[], None]) -> None:
    """Have a forked child call the function once, before it does anything with the pools."""
    global _begin_anew
    _begin_anew = begin_anew
    os.register_at_fork(after_in_child=_forked)


def parent() -> int | None:
    """Return the process that this one was forked from after it imported the package, or None."""
    return _parent


def notice() -> None:
    """Catch up on a fork of which Python was not informed.

    uWSGI forks in C and calls Python's hooks only with its option `py-call-uwsgi-fork-hooks`.
    """
    if _pid != os.getpid():
        with _noticing:  # a thread of the parent never holds it: only a child comes here
            if _pid != os.getpid():
                _forked()


def noticed(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a function to call `notice` first under uWSGI; elsewhere no block pays for it."""
    if not UWSGI:
        return function

    @wraps(function)
    def noticing(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        notice()
        return function(*args, **kwargs)

    return noticing


def _forked() -> None:
    global _parent, _pid
    _begin_anew()
    _parent, _pid = _pid, os.getpid()

"""Waiting under gevent: its monkey patch replaces `select` and `threading`, if it comes early enough.

psycopg and this package decide at import how they wait and which locks they take, so a patch that comes
later leaves waits that stop every greenlet. Nothing of gevent is imported here.
"""

from __future__ import annotations

import select
import sys
import threading
from collections.abc import Callable
from typing import Any

import psycopg
from psycopg import waiting

from ..errors import ThreadingModelError

_Lock = threading.Lock
"""The value at import."""

Poll = Callable[[float | None], list[tuple[int, int]]]

REMEDY = (
    "call gevent.monkey.patch_all() before anything imports psycopg or pgdbpool: in the first lines of the "
    "program, with gunicorn --preload or hooks of pgdbpool in those of gunicorn.conf.py"
)


def patched(module: str) -> bool:
    """Return whether gevent has replaced the module's blocking functions in this process."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched(module))


def check() -> None:
    """Refuse a patch that came too late, or in part, since waiting for the server would stop every greenlet.

    :raises ThreadingModelError: the patch is late or partial; the message says what to patch, and where.
    """
    selects, threads = patched("select"), patched("threading")
    if not selects and not threads:
        return
    if not (selects and threads):
        missing = "select" if threads else "threading"
        raise ThreadingModelError(
            f"gevent has patched this process, but not its module {missing!r}: {REMEDY}"
        )
    driver_waits = waiting.wait is getattr(waiting, "wait_c", None)
    drivers_lock = getattr(psycopg.connection, "Lock", None)
    if driver_waits or _Lock is not threading.Lock or drivers_lock is not threading.Lock:
        raise ThreadingModelError(f"gevent has patched this process after psycopg was imported: {REMEDY}")


def in_hub() -> bool:
    """Return whether this is gevent's hub, which must not wait; signal handlers mostly run there."""
    gevent = sys.modules.get("gevent")
    return gevent is not None and patched("threading") and gevent.getcurrent() is gevent.get_hub()


def poller() -> select.poll:
    """Return a poll object that never lets another greenlet run, for checks that do not wait."""
    if not patched("select"):
        return select.poll()
    monkey = sys.modules["gevent.monkey"]  # its own poll goes through its loop even with a timeout of 0
    return monkey.get_original("select", "poll")()  # type: ignore[no-any-return]


def polls(fd: int) -> tuple[Poll, Poll]:
    """Return two functions that poll the descriptor for input: one checks without waiting, one waits.

    :raises ThreadingModelError: as `check`.
    """
    if not patched("select"):
        looker = select.poll()
        looker.register(fd, select.POLLIN)
        look = looker.poll
        return look, look
    check()
    looker = poller()
    looker.register(fd, select.POLLIN)

    def wait(timeout: float | None) -> Any:
        waiter = select.poll()  # it belongs to the thread that made it
        waiter.register(fd, select.POLLIN)
        return waiter.poll(timeout)

    return looker.poll, wait

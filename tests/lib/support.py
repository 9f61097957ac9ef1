"""What several test modules use: configurations for a server, waiting for a condition, counting."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
import pytest

import pgdbpool


def wait_for(condition: Callable[[], Any], timeout: float = 10.0, what: str = "") -> Any:
    """Poll a condition until it holds; fail after the timeout."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what or condition}"
        time.sleep(0.005)
    return value


class Interruption(BaseException):
    """As KeyboardInterrupt is, no Exception."""


SURVIVES_INTERRUPTIONS = pytest.mark.skipif(
    sys.version_info[:2] == (3, 14),
    reason="Python 3.14 may leave a lock locked if a signal's handler raises in its `with`",
)


@contextmanager
def interruptions() -> Iterator[Callable[[float, Callable[[], object]], bool]]:
    """Yield a function that repeats some work until, after some seconds, a signal's handler raises in it.

    It tells whether the exception came out: Python drops one that is raised in a finalizer.
    """
    fired = False

    def alarm(*_: Any) -> None:
        nonlocal fired
        fired = True
        raise Interruption

    def interrupt(after: float, work: Callable[[], object]) -> bool:
        nonlocal fired
        fired = False
        try:
            signal.setitimer(signal.ITIMER_REAL, after)
            while not fired:
                work()
        except Interruption:
            return True
        return False

    previous = signal.signal(signal.SIGALRM, alarm)
    try:
        yield interrupt
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def interrupt_at(n: int, block: Callable[[], object]) -> bool:
    """Run the block and raise at its n-th point; return False where it has fewer.

    A signal's handler, KeyboardInterrupt or gevent.Timeout raises where a function is entered or a call has
    come back.
    """
    points = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal points
        if event in ("call", "c_return"):
            points += 1
            if points == n:
                sys.setprofile(None)
                raise Interruption

    try:
        sys.setprofile(profile)
        block()
    except Interruption:
        pass
    except psycopg.Error:
        if points < n:  # else it is what the driver has made of the interruption
            raise
    finally:
        sys.setprofile(None)
    return points >= n


def evenness(blocks: list[int], rounds: int = 9, of: int = 500) -> float:
    """Return the least share over the largest, in the middle one of the next rounds of so many blocks.

    In a few of them the system lets one of the threads or backends wait: that is not the pool's doing.
    """
    shares = []
    for _ in range(rounds):
        before = blocks[:]
        wait_for(lambda before=before: sum(blocks) - sum(before) >= of, 60)  # type: ignore[misc]
        done = [now - then for now, then in zip(blocks, before, strict=True)]
        shares.append(min(done) / max(done))
    return statistics.median(shares)


def server(node: Any, **changes: Any) -> dict[str, Any]:
    """Return the `db` entry for a node of the embedded cluster."""
    entry = {"host": node.host, "port": node.port, "name": "postgres", "user": "postgres", **changes}
    return {key: value for key, value in entry.items() if value is not None}


def config(nodes: Any, mode: str = "threaded", **groups: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with those groups over the nodes (or ready `db` entries)."""
    entries = [node if isinstance(node, dict) else server(node) for node in nodes]
    return {"type": mode, "db": entries, "groups": groups}


_taken: list[socket.socket] = []


def closed_port() -> int:
    """Return a loopback port that refuses; it stays bound, so that it is nobody else's in the meantime."""
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    _taken.append(taken)
    return int(taken.getsockname()[1])


def kill_backends(admin: psycopg.Connection[Any], *pids: int) -> None:
    """End backends (all of the pools' where none is given) and wait until they are gone."""
    which = "pid = ANY(%(pids)s)" if pids else "application_name = 'pgdbpool'"
    ended = admin.execute(
        f"SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity WHERE {which}", {"pids": list(pids)}
    ).fetchall()
    gone = "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = ANY(%s)"
    wait_for(lambda: admin.execute(gone, ([pid for pid, _ in ended],)).fetchone()[0], what="backends gone")
    # The server forgets a backend a moment before its process, and with it the socket, has ended.
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid, _ in ended), what="processes gone")
    time.sleep(0.02)  # a busy kernel delivers their last words a moment later, on loopback too


def pools_backends(admin: psycopg.Connection[Any]) -> int:
    """Count the server's sessions that belong to a pool."""
    row = admin.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgdbpool'"
    ).fetchone()
    assert row is not None
    return int(row[0])


def pid_of(db: pgdbpool.Handler) -> int:
    """Return the backend that the block is on."""
    return db.connection.info.backend_pid


def nobody() -> dict[str, Any]:
    """A `db` entry at whose port nobody listens."""
    return {"host": "127.0.0.1", "port": closed_port(), "name": "postgres", "user": "postgres"}


def in_child(function: Callable[[], object], seconds: float = 10.0) -> None:
    """Run the function in a forked child, and fail where it fails or hangs."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(seconds))
        code = 1
        with suppress(BaseException):
            function()
            code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

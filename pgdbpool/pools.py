"""The two pools behind one interface: `ThreadedPool` and `LockFreePool`.

A pool knows connections and slots, not servers. `take` gives an idle connection, or None: then
the caller owns a free slot and opens the connection itself, so that an error is its own at once
and a burst of requests connects side by side. Every slot taken ends in `give` or `vacate`.

`ThreadedPool` is psycopg_pool's ConnectionPool with three things changed: the request that finds
a free slot connects (psycopg_pool grows one connection at a time in a worker, and backs off for
minutes whatever the demand), a slot that becomes free goes to the first in the queue (psycopg_pool
leaves it waiting), and a waiter that is interrupted gives back what it was handed. It relies on
`_pool`, `_waiting`, `_lock`, `_nconns`, `_nconns_min`, `_closed`, `_add_to_pool`, `_close_connection`,
`_start_initial_tasks`, `_add_connection` and `WaitingClient`, so its minor version is pinned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import get_ident
from time import monotonic
from typing import Any, Protocol

import psycopg_pool
from psycopg_pool.pool import AddConnection, Schedule, ShrinkPool, WaitingClient

from .errors import Error, ThreadingModelError
from .session import PooledConnection

Dial = Callable[[], PooledConnection]
"""Opens a connection for a slot in the background; raises `Error` where it cannot."""
Forget = Callable[[PooledConnection], None]
"""Told of each connection that the pool itself closes."""


class NoConnection(Exception):
    """Nothing became free in time; `reason` is one of the class's constants."""

    TIMEOUT, EXHAUSTED, QUEUE_FULL, CLOSED = "timeout", "exhausted", "queue full", "closed"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Pool(Protocol):
    """What a group asks of its pool."""

    @property
    def size(self) -> int:
        """Slots taken: idle, lent, or being connected."""

    @property
    def idle(self) -> int:
        """Connections that wait for a request."""

    @property
    def waiting(self) -> int:
        """Requests that wait for a connection."""

    taken: int
    """How often `take` succeeded, waits included."""
    missing: bool
    """Whether connections are to be opened for `min_size`, by whom the group finds for it."""

    def take(self, timeout: float) -> PooledConnection | None:
        """Take the connection that is idle longest, or None for a slot that the caller fills.

        :raises NoConnection: when neither became free within the timeout (seconds).
        """

    def give(self, conn: PooledConnection) -> None:
        """Hand a connection to the first in the queue, else make it idle."""

    def vacate(self) -> None:
        """Free a slot, whose connection is closed or was never opened."""

    def refill(self) -> None:
        """See to it that there are `min_size` connections again."""

    def claim(self) -> bool:
        """Take a free slot without waiting; False where there is none."""

    def remove(self, unwanted: Callable[[PooledConnection], bool]) -> list[PooledConnection]:
        """Take idle connections out, whose slots the caller then vacates."""

    def close(self, timeout: float) -> None:
        """Close the idle connections and refuse further use; those lent are closed as they come back."""

    def abandon(self) -> None:
        """Forget everything without touching it: the process was forked."""


class _SlotFreed(Exception):
    """Tells a waiter that it owns a free slot."""


class _Abandoned(Exception):
    """Marks a waiter that was interrupted."""


class ThreadedPool(psycopg_pool.ConnectionPool[PooledConnection]):
    """A pool for many threads: a fair queue, and workers that keep `min_size` connections."""

    def __init__(
        self,
        *,
        name: str,
        min_size: int,
        max_size: int,
        max_idle: float,
        max_waiting: int,
        num_workers: int,
        dial: Dial,
        forget: Forget,
    ) -> None:
        self._dial = dial
        self._forget = forget
        self.taken = 0
        self.missing = False  # its worker opens what is
        super().__init__(
            name=f"pgdbpool-{name}",
            connection_class=PooledConnection,
            min_size=min_size,
            max_size=max_size,
            max_idle=max_idle,
            max_waiting=max_waiting,
            num_workers=num_workers,
            open=False,
        )

    # A pool is opened, and its threads started, by the first who asks for a connection.

    def _start_initial_tasks(self) -> None:
        self._nconns = 0
        if self.max_idle:
            self.run_task(Schedule(self, ShrinkPool(self), self.max_idle))

    @property
    def size(self) -> int:
        return self._nconns if self._opened else 0

    @property
    def idle(self) -> int:
        return len(self._pool)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def take(self, timeout: float) -> PooledConnection | None:
        if not self._opened:
            self.open()
        with self._lock:
            if self._closed:
                raise NoConnection(NoConnection.CLOSED)
            self.taken += 1
            if self._pool:
                conn = self._pool.popleft()
                if len(self._pool) < self._nconns_min:  # what psycopg_pool shrinks by
                    self._nconns_min = len(self._pool)
                return conn
            if self._nconns < self._max_size:
                self._nconns += 1
                return None
            self.taken -= 1
            if timeout <= 0:
                raise NoConnection(NoConnection.TIMEOUT)
            if self.max_waiting and len(self._waiting) >= self.max_waiting:
                raise NoConnection(NoConnection.QUEUE_FULL)
            waiter = WaitingClient[PooledConnection]()
            self._waiting.append(waiter)
        try:
            conn = waiter.wait(timeout)
            self.taken += 1
            return conn
        except _SlotFreed:
            self.taken += 1
            return None
        except psycopg_pool.PoolTimeout:
            self._leave_queue(waiter)
            raise NoConnection(NoConnection.TIMEOUT) from None
        except psycopg_pool.PoolClosed:
            raise NoConnection(NoConnection.CLOSED) from None
        except BaseException:
            # Interrupted (KeyboardInterrupt, a signal handler's SystemExit): whatever was handed
            # over in the meantime goes to the next.
            if not waiter.fail(_Abandoned()):
                if waiter.conn:
                    self.give(waiter.conn)
                elif isinstance(waiter.error, _SlotFreed):
                    self.vacate()
            self._leave_queue(waiter)
            raise

    def _leave_queue(self, waiter: WaitingClient[PooledConnection]) -> None:
        with self._lock:
            if waiter in self._waiting:
                self._waiting.remove(waiter)

    def give(self, conn: PooledConnection) -> None:
        self._add_to_pool(conn)

    def vacate(self) -> None:
        with self._lock:
            while self._waiting:
                if self._waiting.popleft().fail(_SlotFreed()):
                    return  # the slot is the waiter's now
            self._nconns -= 1

    def claim(self) -> bool:
        if not self._opened:
            self.open()
        with self._lock:
            if self._closed or self._nconns >= self._max_size:
                return False
            self._nconns += 1
            return True

    def refill(self) -> None:
        if not self._opened or self._closed:
            return
        with self._lock:
            missing = max(0, self._min_size - self._nconns)
            self._nconns += missing
        for _ in range(missing):
            self.run_task(AddConnection(self))

    def _add_connection(self, attempt: Any, growing: bool = False) -> None:
        try:
            conn = self._dial()
        except Error:
            self.vacate()  # the endpoint has noted why; the next request tries again
        except BaseException:
            self.vacate()
            raise
        else:
            self._add_to_pool(conn)

    def remove(self, unwanted: Callable[[PooledConnection], bool]) -> list[PooledConnection]:
        with self._lock:
            removed = [conn for conn in self._pool if unwanted(conn)]
            for conn in removed:
                self._pool.remove(conn)
        return removed

    def _close_connection(self, conn: PooledConnection) -> None:
        conn.close()
        self._forget(conn)

    def close(self, timeout: float = 5.0) -> None:
        if self._opened:
            super().close(timeout)
        else:
            self._opened = True  # `take` then finds it closed

    def abandon(self) -> None:
        # Its lock may be held by a thread that the child does not have, so nothing of it may run:
        # `_closed` keeps psycopg_pool's `__del__` from stopping workers that are not there.
        self._closed = True


class LockFreePool:
    """A pool for one thread: a deque and a counter, no lock, no thread of its own."""

    def __init__(self, *, min_size: int, max_size: int, max_idle: float, forget: Forget) -> None:
        self._idle: deque[PooledConnection] = deque()
        self._size = 0
        self._min_size = min_size
        self._max_size = max_size
        self._max_idle = max_idle
        self._forget = forget
        self.taken = 0
        self.missing = False
        self._owner = 0
        self._closed = False
        self._least_idle = 0
        self._shrink_at = monotonic() + max_idle

    @property
    def size(self) -> int:
        return self._size

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def waiting(self) -> int:
        return 0

    def take(self, timeout: float) -> PooledConnection | None:
        if self._closed:
            raise NoConnection(NoConnection.CLOSED)
        if self._owner != (me := get_ident()):
            if self._size > len(self._idle):
                raise ThreadingModelError(
                    "a lock-free group is used by two threads at once: its pool has no lock. "
                    "Set `type: threaded`, or keep each process to one thread (gunicorn: threads = 1)"
                )
            self._owner = me
        self.taken += 1
        if self._idle:
            conn = self._idle.popleft()
            if len(self._idle) < self._least_idle:
                self._least_idle = len(self._idle)
            return conn
        if self._size < self._max_size:
            self._size += 1
            return None
        self.taken -= 1
        raise NoConnection(NoConnection.EXHAUSTED)  # only this thread could release one

    def give(self, conn: PooledConnection) -> None:
        if self._closed:
            self._drop(conn)
            return
        self._idle.append(conn)
        if self._max_idle and conn.used_at >= self._shrink_at:
            self._shrink(conn.used_at)

    def _shrink(self, now: float) -> None:
        """Close one connection where more than needed were idle all through `max_idle`."""
        if self._least_idle > 0 and self._size > self._min_size:
            self._drop(self._idle.popleft())
        self._least_idle = len(self._idle)
        self._shrink_at = now + self._max_idle

    def _drop(self, conn: PooledConnection) -> None:
        conn.close()
        self._size -= 1
        self._forget(conn)

    def vacate(self) -> None:
        self._size -= 1

    def claim(self) -> bool:
        if self._closed or self._size >= self._max_size:
            return False
        self._size += 1
        self.missing = self.missing and self._size < self._min_size
        return True

    def refill(self) -> None:
        """Ask for what is missing: there is no background, so a later checkout opens it."""
        self.missing = not self._closed and self._size < self._min_size

    def remove(self, unwanted: Callable[[PooledConnection], bool]) -> list[PooledConnection]:
        removed = [conn for conn in self._idle if unwanted(conn)]
        for conn in removed:
            self._idle.remove(conn)
        return removed

    def close(self, timeout: float = 0.0) -> None:
        self._closed = True
        while self._idle:
            self._drop(self._idle.popleft())

    def abandon(self) -> None:
        self._closed = True

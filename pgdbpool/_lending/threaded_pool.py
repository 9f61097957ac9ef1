"""The pool for processes with several threads.

`ThreadedPool` is psycopg_pool's ConnectionPool with three things changed: the request that finds a
free slot connects (psycopg_pool grows one connection at a time in a worker, and backs off for
minutes whatever the demand), a slot that becomes free goes to the first in the queue (psycopg_pool
leaves it waiting), and an interrupted waiter gives its connection back. It relies on
`_pool`, `_waiting`, `_lock` (a re-entrant one), `_tasks`, `_nconns`, `_nconns_min`, `_closed`, `_opened`,
`_close_connection`, `_start_workers`, `_start_initial_tasks` and `MaintenanceTask`, so its minor version is
pinned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from threading import RLock
from typing import Any, cast

import psycopg_pool
from psycopg_pool.pool import MaintenanceTask, Schedule, ShrinkPool

from .._session.connection import PooledConnection
from .._session.slot import Slot
from ..errors import Error, ServerFullError
from .pool import Dial, Drop, NoConnection, take_out
from .queue import Queue, Waiter
from .slots import Slots

LOOK_AFTER = 3600.0
"""Seconds between two checks of whether idle connections are still kept without limit (`max_idle: 0`)."""

RETRY_AFTER = 1.0
"""Seconds until a failed connect in the background is retried."""


class _Open(MaintenanceTask):
    """Opens a connection in a slot, in a worker."""

    def __init__(self, pool: ThreadedPool, slot: Slot) -> None:
        super().__init__(pool)
        self._slot: Slot | None = slot

    def _run(self, pool: Any) -> None:
        slot, self._slot = self._slot, None
        pool.open_in(slot)


class _Retry(MaintenanceTask):
    """Retries, some time after a failed connect, to reach `min_size`."""

    def _run(self, pool: Any) -> None:
        pool.retry()


class _Room(MaintenanceTask):
    """Checks whether a full server has room again."""

    def _run(self, pool: Any) -> None:
        pool.seek_room()


class ThreadedPool(psycopg_pool.ConnectionPool[PooledConnection]):
    """A pool for many threads: a fair queue, and workers that keep `min_size` connections.

    `_lock` guards `_queue` and the slots; it is never held during a wait. It is re-entrant, since
    garbage collection may free a slot anywhere.

    `_pool` is a deque, whose operations are one step each, so `grab` and `give` use it without the lock. They
    take nothing from a waiter: a connection is in it only if no thread waited when it was given back. To
    close the gap, `give` looks at the queue again after it has appended, and a waiter at `_pool` after it
    has queued, so that one of them sees the other.

    The last `reserved` connections go to high-priority callers only. Others wait until more than `reserved`
    are free; this is rechecked on every release.
    """

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
        drop: Drop,
        reserved: int = 0,
    ) -> None:
        self._dial = dial
        self._drop = drop
        self._reserved = reserved
        self.taken = 0
        self._shrinks = max_idle > 0
        self.missing = False  # except just after opening; workers open missing connections
        self._retrying = False
        self._full = False
        """Whether slots are held back, since no server has room for another connection."""
        self._slots = Slots(max_size, self._slot_freed)
        self._queue = Queue()
        super().__init__(
            name=f"pgdbpool-{name}",
            connection_class=PooledConnection,
            min_size=min_size,
            max_size=max_size,
            max_idle=max_idle or LOOK_AFTER,
            max_waiting=max_waiting,
            num_workers=num_workers,
            open=False,
        )
        self._waiting = cast(Any, self._queue)  # psycopg_pool's `close` fails these waiters

    # psycopg_pool counts its connections here; the slots are the truth.

    @property
    def _nconns(self) -> int:
        return len(self._slots.live())

    @_nconns.setter
    def _nconns(self, value: int) -> None:
        pass

    # The first request for a connection opens the pool and starts its threads.

    def _start_workers(self) -> None:
        self._tasks = cast(Any, SimpleQueue())  # queue.Queue too can be left locked by an interruption
        # Since Python 3.12 an interpreter that is shutting down starts no thread. Requests then connect
        # themselves, and the tasks of workers are left undone.
        with suppress(RuntimeError):
            super()._start_workers()

    def _start_initial_tasks(self) -> None:
        self.run_task(Schedule(self, ShrinkPool(self), self.max_idle))
        self.missing = True

    def _shrink_pool(self) -> None:
        if self._shrinks:
            with suppress(IndexError):  # the last idle connection was taken meanwhile
                super()._shrink_pool()

    @property
    def size(self) -> int:
        return self._nconns

    @property
    def idle(self) -> int:
        return len(self._pool)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def slots(self) -> list[Slot]:
        return self._slots.live()

    def lendable(self) -> list[PooledConnection]:
        with self._lock:
            return list(self._pool)

    def grab(self, thread: int) -> PooledConnection | None:
        return None if self._reserved or self._closed else ThreadedPool._pop(self)  # found at once

    def _pop(self) -> PooledConnection | None:
        """Take an idle connection, if there is one."""
        idle = self._pool
        try:
            conn = idle.popleft()
        except IndexError:
            return None
        self.taken += 1
        if (left := len(idle)) < self._nconns_min:  # psycopg_pool shrinks by this number
            self._nconns_min = left
        return conn

    def take(self, timeout: float, high: bool = False) -> PooledConnection | Slot:
        if not self._opened:
            self.open()
        with self._lock:
            if self._closed:
                raise NoConnection(NoConnection.CLOSED)
            if high or not self._reserved or self._free() > self._reserved:
                if (conn := self._pop()) is not None:
                    return conn
                if not self._full and (slot := self._slots.new()):
                    self.taken += 1
                    return slot
            queue, waiter = self._enqueue(timeout, high)
            if not self._reserved and (conn := self._pop()) is not None:  # given back since the look above
                queue.remove(waiter)
                return conn
        return self._await(queue, waiter, timeout)

    def _enqueue(self, timeout: float, high: bool) -> tuple[deque[Waiter], Waiter]:
        """Take a place in the queue; the caller must hold `_lock`."""
        if timeout <= 0:
            raise NoConnection(NoConnection.TIMEOUT)
        if self.max_waiting and len(self._queue) >= self.max_waiting:
            raise NoConnection(NoConnection.QUEUE_FULL)
        waiter = Waiter()
        queue = self._queue.high if high else self._queue.normal
        queue.append(waiter)
        return queue, waiter

    def _await(self, queue: deque[Waiter], waiter: Waiter, timeout: float) -> PooledConnection | Slot:
        """Wait until the waiter is served."""
        try:
            waiter.wake.acquire(timeout=timeout)
        except BaseException:
            self._leave_queue(queue, waiter)
            if isinstance(waiter.got, PooledConnection):
                self.give(waiter.got)  # a slot is free again when the waiter is gone
            raise
        self._leave_queue(queue, waiter)
        if waiter.got is None:
            raise NoConnection(NoConnection.CLOSED if waiter.closed else NoConnection.TIMEOUT)
        self.taken += 1
        return waiter.got

    def _leave_queue(self, queue: deque[Waiter], waiter: Waiter) -> None:
        if waiter.got is not None and not (queue and queue[0] is waiter):
            return  # already taken out when it was served: do not search a long queue
        with self._lock:
            if waiter in queue:
                queue.remove(waiter)

    def _free(self) -> int:
        """Return how many connections could be lent or opened now; the caller must hold `_lock`."""
        return self._slots.limit - self._nconns + len(self._pool)

    def _serve(self, got: PooledConnection | Slot) -> bool:
        """Hand a connection or a slot to the first waiter, if any; the caller must hold `_lock`.

        The order matters, and no Python call may stand between the assignment and the release, since an
        interruption could come in there. A later one leaves a served waiter at the head of the queue, which
        the next call removes; no waiter is forgotten.
        """
        waiting = self._queue
        # The connection handed over counts as lent. A normal waiter gets it only if `reserved` remain free.
        while queue := waiting.high or (
            waiting.normal if not self._reserved or self._free() >= self._reserved else None
        ):
            waiter = queue[0]
            served = waiter.got is None
            if served:
                got.lent = False
                waiter.got = got
            try:
                waiter.wake.release()
            except RuntimeError:
                served = False  # woken before
            queue.popleft()
            if served:
                return True
        return False

    def bring_forward(self, conn: PooledConnection) -> None:
        with self._lock, suppress(ValueError):  # taken already; no caller can begin to wait meanwhile
            self._pool.remove(conn)
            self._pool.appendleft(conn)

    def give(self, conn: PooledConnection) -> None:
        queue = self._queue
        if not (queue.high or queue.normal or self._closed or self._reserved):
            conn.lent = False  # no call between this line and the next: nothing can interrupt
            self._pool.append(conn)
            if not (queue.high or queue.normal or self._closed):
                return
            with self._lock:
                try:
                    self._pool.remove(conn)
                except ValueError:
                    return  # taken already
            conn.lent = True
        with self._lock:
            if not self._closed:
                if not self._serve(conn):
                    conn.lent = False  # no call between this line and the next: nothing can interrupt
                    self._pool.append(conn)
                return
        self._close_connection(conn)

    def _slot_freed(self) -> None:
        with self._lock:
            # Only for a waiter that takes it: an unused slot would be freed and come back here at once.
            wanted = self._queue.high or (
                self._queue.normal and (not self._reserved or self._free() > self._reserved)
            )
            if wanted and not self._closed and not self._full and (slot := self._slots.new()):
                self._serve(slot)

    def free(self, slot: Slot) -> None:
        self._slots.free(slot)

    def claim(self) -> Slot | None:
        if not self._opened:
            self.open()
        with self._lock:
            return None if self._closed else self._slots.new()

    def hold_back(self, pause: float) -> bool:
        if not self._workers:
            return False
        with self._lock:
            looking, self._full = self._full, True
        if not looking:
            self.run_task(Schedule(self, _Room(self), pause))
        return True

    def seek_room(self) -> None:
        """Open connections for waiters in a worker, one by one, until the servers are full again."""
        while self.waiting and (slot := self.claim()):
            try:
                conn = self._dial(slot)
            except ServerFullError as error:
                self.run_task(Schedule(self, _Room(self), error.pause))
                return
            except Error:  # the waiters will get the error from their own connects
                break
            self.give(conn)
        self._full = False
        for _ in range(self.waiting):
            self._slot_freed()

    def refill(self) -> None:
        self.missing = False
        if not self._opened or self._closed or not self._workers:
            return
        with self._lock:
            while self.size < self._min_size and (slot := self._slots.new()):
                self.run_task(_Open(self, slot))

    def open_in(self, slot: Slot) -> bool:
        """Open a connection in a worker; return whether that succeeded."""
        try:
            conn = self._dial(slot)
        except Error:  # noted at the endpoint; a request that needs a connection connects itself
            with self._lock:
                retrying, self._retrying = self._retrying, True
            if not retrying:
                self.run_task(Schedule(self, _Retry(self), RETRY_AFTER))
            return False
        self.give(conn)
        return True

    def retry(self) -> None:
        """Open one missing connection in a worker, and if that succeeded, the others."""
        self._retrying = False
        if self.size < self._min_size and (slot := self.claim()) and self.open_in(slot):
            self.refill()

    def remove(self, unwanted: Callable[[PooledConnection], bool]) -> list[PooledConnection]:
        with self._lock:
            return take_out(self._pool, unwanted)

    def adjust(
        self, *, min_size: int, max_size: int, max_idle: float, max_waiting: int, reserved: int
    ) -> None:
        with self._lock:
            self._min_size, self._max_size, self._slots.limit = min_size, max_size, max_size
            self._shrinks, self.max_idle = max_idle > 0, max_idle or LOOK_AFTER
            self.max_waiting, self._reserved = max_waiting, reserved
            while self.waiting and (conn := self._pop()) is not None:  # that are no longer reserved
                self.taken -= 1
                if not self._serve(conn):
                    self._pool.appendleft(conn)
                    break
        for _ in range(self.waiting):
            self._slot_freed()

    def mine(self) -> bool:
        return True

    def _close_connection(self, conn: PooledConnection) -> None:
        self._drop(conn, "closed" if self._closed else "idle")

    def close(self, timeout: float = 5.0) -> None:
        if self._opened:
            super().close(timeout)
        else:
            self._opened = True  # `take` then finds it closed

    def abandon(self) -> None:
        # A thread that does not exist in the child may hold the lock. In the child only the finalizers of
        # connections and slots call this pool.
        self._lock = RLock()
        self._closed = True

    def __del__(self) -> None:
        """Do nothing: psycopg_pool's would wait for workers, even at exit and in a forked child."""

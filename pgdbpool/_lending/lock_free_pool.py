"""The pool for processes with one thread: no locks and no queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from threading import get_ident
from time import monotonic

from .._session.connection import PooledConnection
from .._session.slot import Slot
from ..errors import ThreadingModelError
from .pool import Drop, NoConnection, take_out
from .slots import Slots


class LockFreePool:
    """A pool for one thread: a deque and slots, without locks and threads."""

    def __init__(
        self, *, min_size: int, max_size: int, max_idle: float, drop: Drop, reserved: int = 0
    ) -> None:
        self._drop = drop
        self._reserved = reserved
        self._idle: deque[PooledConnection] = deque()
        self._slots = Slots(max_size, lambda: None)
        self._min_size = min_size
        self._max_idle = max_idle
        self.taken = 0
        self.missing = min_size > 0
        self._owner = 0
        self._closed = False
        self._least_idle = 0
        self._shrink_at = monotonic() + max_idle

    @property
    def size(self) -> int:
        return len(self._slots.live())

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def waiting(self) -> int:
        return 0

    def slots(self) -> list[Slot]:
        return self._slots.live()

    def lendable(self) -> list[PooledConnection]:
        return list(self._idle)

    def grab(self, thread: int) -> PooledConnection | None:
        if self._owner != thread or self._reserved or self._closed:
            return None
        try:
            conn = self._idle.popleft()
        except IndexError:
            return None
        self.taken += 1
        if self._least_idle and len(self._idle) < self._least_idle:
            self._least_idle = len(self._idle)
        return conn

    def take(self, timeout: float, high: bool = False) -> PooledConnection | Slot:
        if self._closed:
            raise NoConnection(NoConnection.CLOSED)
        if self._owner != (me := get_ident()):
            if sum(not slot.left for slot in self._slots.live()) > len(self._idle):
                raise ThreadingModelError(
                    "a lock-free group is used by two threads at once: its pool has no lock. "
                    "Set `type: threaded`, or keep each process to one thread (gunicorn: threads = 1)"
                )
            self._owner = me
        if self._reserved and not high and self._free() <= self._reserved:
            raise NoConnection(NoConnection.EXHAUSTED)
        if self._idle:
            try:
                conn = self._idle.popleft()
            except IndexError:  # a signal handler took the last one
                return self.take(timeout, high)
            self.taken += 1
            if self._least_idle and len(self._idle) < self._least_idle:
                self._least_idle = len(self._idle)
            return conn
        if slot := self._slots.new():
            self.taken += 1
            return slot
        raise NoConnection(NoConnection.EXHAUSTED)  # only this thread could release one

    def _free(self) -> int:
        return self._slots.limit - self.size + len(self._idle)

    def bring_forward(self, conn: PooledConnection) -> None:
        if self.mine():
            with suppress(ValueError):  # a signal handler took it
                self._idle.remove(conn)
                self._idle.appendleft(conn)

    def give(self, conn: PooledConnection) -> None:
        if self._closed:
            self._drop(conn, "closed")
            return
        conn.lent = False
        self._idle.append(conn)
        if self._max_idle and conn.used_at >= self._shrink_at:
            self._shrink(conn.used_at)

    def _shrink(self, now: float) -> None:
        """Close one connection if more than needed were idle throughout `max_idle`."""
        if self._least_idle > 0 and self.size > self._min_size:
            self._drop(self._idle.popleft(), "idle")
        self._least_idle = len(self._idle)
        self._shrink_at = now + self._max_idle

    def free(self, slot: Slot) -> None:
        self._slots.free(slot)

    def claim(self) -> Slot | None:
        slot = None if self._closed else self._slots.new()
        self.missing = self.missing and slot is not None and self.size < self._min_size
        return slot

    def hold_back(self, pause: float) -> bool:
        return False

    def refill(self) -> None:
        """Note missing connections: without a background, a later checkout opens them."""
        self.missing = not self._closed and self.size < self._min_size

    def remove(self, unwanted: Callable[[PooledConnection], bool]) -> list[PooledConnection]:
        return take_out(self._idle, unwanted)

    def adjust(
        self, *, min_size: int, max_size: int, max_idle: float, max_waiting: int, reserved: int
    ) -> None:
        self._min_size, self._slots.limit, self._reserved = min_size, max_size, reserved
        self._max_idle, self._shrink_at = max_idle, monotonic() + max_idle

    def mine(self) -> bool:
        return self._owner in (0, get_ident())

    def close(self, timeout: float = 0.0) -> None:
        self._closed = True
        while self._idle:
            self._drop(self._idle.popleft(), "closed")

    def abandon(self) -> None:
        self._closed = True

"""Which thread may use a connection now: threads may share a block, as they may share a connection."""

from __future__ import annotations

from contextlib import nullcontext
from threading import Lock, get_ident
from types import TracebackType
from typing import Protocol

_ONCE = (True,)


class Guest(Protocol):
    """An operation of a cursor that the block did not make; see `foreign_cursors`."""

    def end(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End what was opened for the operation."""


class Shared(Protocol):
    """What a turn needs of its connection."""

    turn: Lock
    owner: int
    step: Turn | None
    visit: Guest | None

    def take_back(self) -> None:
        """Give up a turn whose end was interrupted in this thread."""


class Turn:
    """The turn of one thread for several steps, which `alone` gives; it can be given up from outside.

    It is an object, not a generator: the traceback of an exception that came while a generator was entered or
    left would keep the turn for as long as the application keeps the exception.
    """

    __slots__ = ("_conn", "_lock", "thread")

    def __init__(self, conn: Shared) -> None:
        self._conn = conn
        self._lock: Lock
        self.thread: int

    def __enter__(self) -> None:
        conn, self.thread = self._conn, get_ident()
        conn.take_back()
        self._lock = lock = conn.turn
        taken: list[bool] = []
        try:
            # An exception of a signal, or of another thread, comes after a call and not inside it. So the
            # lock is never taken without a note of it.
            taken.extend(map(lock.acquire, _ONCE))
            self._begin(conn)
        except BaseException:
            if conn.step is self:
                self.give_up()
            elif taken:
                lock.release()
            raise

    def _begin(self, conn: Shared) -> None:
        """Note the turn as the thread's own."""
        conn.step, conn.owner = self, self.thread

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.give_up()

    def give_up(self) -> None:
        """End the turn, unless it was ended already: with the connection, or by `take_back`."""
        conn = self._conn
        if conn.step is self:
            conn.step, conn.owner = None, 0
            self._lock.release()


class PsycopgsLock(Turn):
    """What psycopg takes for the lock of a connection: the connection's turn, and the end of a visit."""

    __slots__ = ()

    def locked(self) -> bool:
        """Return whether a thread has the turn."""
        return self._conn.turn.locked()

    def _begin(self, conn: Shared) -> None:
        conn.step = self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if (visit := self._conn.visit) is not None:
                visit.end(kind, error, traceback)
        finally:
            self.give_up()


class HeldLock(nullcontext[None]):
    """What psycopg takes for the lock in the thread that has the connection's turn already."""

    def locked(self) -> bool:
        """Return True."""
        return True

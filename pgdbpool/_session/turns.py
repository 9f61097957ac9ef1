"""The turn of a thread on a connection: threads may share a block, as they may share a connection."""

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
        """Release everything opened for the operation."""


class Shared(Protocol):
    """The attributes of a connection that a turn uses."""

    turn: Lock
    owner: int
    step: Turn | None
    visit: Guest | None

    def take_back(self) -> None:
        """Give up a turn whose end was interrupted in this thread."""


class Turn:
    """One thread's turn for several steps, as returned by `alone`; it can be given up from outside.

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
            # An exception raised by a signal or by another thread arrives after a call, not inside it. So
            # the lock is never taken without being recorded.
            taken.extend(map(lock.acquire, _ONCE))
            self._begin(conn)
        except BaseException:
            if conn.step is self:
                self.give_up()
            elif taken:
                lock.release()
            raise

    def _begin(self, conn: Shared) -> None:
        """Record this thread as the owner of the turn."""
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
    """The lock that psycopg sees: it takes the connection's turn, and ends a visit on release."""

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
    """The lock that psycopg sees in the thread that already has the connection's turn."""

    def locked(self) -> bool:
        """Return True."""
        return True

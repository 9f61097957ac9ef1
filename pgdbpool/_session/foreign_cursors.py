"""A cursor that the block did not make, while it takes part in the block.

That is psycopg's `ClientCursor`, `RawCursor`, `ServerCursor` or a class of the application, made directly or
through `cursor_factory`. Each of its operations holds psycopg's lock from its beginning to its end, a stream
and a COPY too. So what the block needs first goes out, in a round trip of its own, when the cursor starts its
statement, and what was opened for it ends with the lock.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from threading import Lock, get_ident
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg

from .. import errors
from .statement_shape import Shape, shape

if TYPE_CHECKING:
    from .block import Block
    from .connection import PooledConnection

ENDS_INSIDE = (
    "the block has a tenant or settings, which end with the transaction: what follows a COMMIT or ROLLBACK "
    "in the same string or pipeline would run without them; send it by itself"
)
NAMED = (
    "a named cursor of an autocommit block with a tenant or settings needs a transaction to live in: "
    "open one with db.transaction()"
)
_ONCE = (True,)
FAILED = "a statement of this transaction failed: it was rolled back, nothing was committed"


class Asked(NamedTuple):
    """What a cursor of psycopg is about to execute."""

    cursor: Any
    statement: Any
    """None if it is not known: FETCH from a cursor that another one declared."""


def asked_in(frame: FrameType) -> Asked:
    """Return what is asked in the frame of psycopg's `BaseCursor._start_query`, which passes nothing on."""
    statement = frame.f_locals.get("query")
    if statement is None and frame.f_back is not None:  # a COPY
        statement = frame.f_back.f_locals.get("statement")
    return Asked(frame.f_locals.get("self"), statement)


class Turn:
    """The turn of one thread for several steps, which `alone` gives; it can be given up from outside.

    It is an object, not a generator: the traceback of an exception that came while a generator was entered or
    left would keep the turn for as long as the application keeps the exception.
    """

    __slots__ = ("_conn", "_lock", "thread")

    def __init__(self, conn: PooledConnection) -> None:
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

    def _begin(self, conn: PooledConnection) -> None:
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

    def _begin(self, conn: PooledConnection) -> None:
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


class Visit:
    """One operation of a cursor that the block did not make; the cursor's thread has the turn."""

    def __init__(self, conn: PooledConnection, block: Block) -> None:
        self._conn = conn
        self._block = block
        self._cursor: Any = None
        self._what: Shape | None = None
        self._to_end = ExitStack()
        self._in_transaction = True
        self._until = conn.until

    def begin(self, named: bool) -> None:
        """Send what the block needs first; from here on the connection is busy for its own thread too.

        :raises psycopg.NotSupportedError: a named cursor would end with the transaction opened for it.
        """
        conn, block = self._conn, self._block
        conn.end_wrapped()
        if named and block.settings and conn.commits_each:
            raise psycopg.NotSupportedError(NAMED)
        with conn.owning():
            _, autocommit, wrap = conn.send_due()
        self._in_transaction = not autocommit
        self._to_end.enter_context(conn.over(block, autocommit, wrap))
        conn.visit, conn.holder = self, get_ident()

    def note(self, asked: Asked) -> None:
        """Note what the statement may leave in the session and in the transaction, before it is sent."""
        conn, block = self._conn, self._block
        if asked.statement is None:
            return
        self._cursor, block.statement = asked.cursor, asked.statement
        what = shape(asked.statement, conn)
        if what.special:
            what = conn.touch(what, asked.statement)
        self._what = what
        conn.implicit = conn.implicit and not what.controls
        if what.controls and block.settings and (what.number > 1 or (conn._pipeline and what.ends)):
            raise psycopg.NotSupportedError(ENDS_INSIDE)
        if what.ends:
            conn.bound, block.committed = False, block.committed or what.commits
            conn.crossed = False

    def end(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End what was opened for the statement, and note what became of it."""
        conn, block = self._conn, self._block
        conn.visit, conn.holder = None, 0
        if conn.block is not block:
            return  # a generator that was left open: the connection may be another block's
        conn.until = self._until  # what was left early has bounded its own end alone
        if conn.closed and self._in_transaction:
            block.lost = True
        with conn.owning():
            self._to_end.__exit__(kind, error, traceback)
        if self._what is not None:
            self._conclude(self._what, error is None)

    def _conclude(self, what: Shape, well: bool) -> None:
        """Note what the statement did to the transaction, or did by itself."""
        block = self._block
        if what.ends:
            self._conn.bound, block.committed = False, True
            if well and what.commits and what.number == 1 and self._cursor.statusmessage == "ROLLBACK":
                raise errors.TransactionAbortedError(FAILED) from block.failure
        elif well and what.changes and not (what.controls or self._in_transaction):
            block.in_effect = True

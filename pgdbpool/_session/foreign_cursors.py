"""A cursor that the block did not make, while it takes part in the block.

That is psycopg's `ClientCursor`, `RawCursor`, `ServerCursor` or a class of the application, made directly or
through `cursor_factory`. Each of its operations holds psycopg's lock from its beginning to its end, a stream
and a COPY too. So what the block needs first goes out, in a round trip of its own, when the cursor starts its
statement, and what was opened for it ends with the lock.
"""

from __future__ import annotations

from contextlib import ExitStack
from threading import get_ident
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg

from .. import errors
from .statement_shape import Shape, shape
from .transactions import ENDS_INSIDE, FAILED, TransactingConnection

if TYPE_CHECKING:
    from .block import Block

NAMED = (
    "a named cursor of an autocommit block with a tenant or settings needs a transaction to live in: "
    "open one with db.transaction()"
)


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


class Visit:
    """One operation of a cursor that the block did not make; the cursor's thread has the turn."""

    def __init__(self, conn: TransactingConnection, block: Block) -> None:
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

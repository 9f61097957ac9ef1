"""A cursor that the block did not create, while it takes part in the block.

It is psycopg's `ClientCursor`, `RawCursor`, `ServerCursor` or a class of the application, made directly or
through `cursor_factory`. Each of its operations, a stream and a COPY too, holds psycopg's lock from start to
end. So the block's due commands are sent in a separate round trip when the cursor starts its statement, and
anything opened for the statement ends when the lock is released.
"""

from __future__ import annotations

from contextlib import ExitStack
from threading import get_ident
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg

from .. import errors
from .statement_shape import StatementTraits, shape
from .transactions import ENDS_INSIDE, FAILED, TransactingConnection

if TYPE_CHECKING:
    from .block import Block

NAMED = (
    "a named cursor of an autocommit block with a tenant or settings needs a transaction to live in: "
    "open one with db.transaction(), or ask for the cursor with withhold=True"
)


class Asked(NamedTuple):
    """The statement that a psycopg cursor is about to execute."""

    cursor: Any
    statement: Any
    """None if unknown: FETCH from a cursor that another cursor declared."""


def asked_in(frame: FrameType) -> Asked:
    """Read the statement from the frame of psycopg's `BaseCursor._start_query`, which does not pass it on."""
    statement = frame.f_locals.get("query")
    if statement is None and frame.f_back is not None:  # a COPY
        statement = frame.f_back.f_locals.get("statement")
    return Asked(frame.f_locals.get("self"), statement)


class Visit:
    """One operation of a cursor that the block did not create; the cursor's thread has the turn."""

    def __init__(self, conn: TransactingConnection, block: Block) -> None:
        self._conn = conn
        self._block = block
        self._cursor: Any = None
        self._what: StatementTraits | None = None
        self._to_end = ExitStack()
        self._in_transaction = True
        self._until = conn.until

    def begin(self, named: bool) -> None:
        """Send the block's due commands; from here on the connection is busy even for its own thread.

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
        """Note the statement's effects on the session and the transaction, before it is sent."""
        conn, block = self._conn, self._block
        if asked.statement is None:
            return
        self._cursor, block.statement = asked.cursor, asked.statement
        what = shape(asked.statement, conn)
        if what.special:
            what = conn.touch(what, asked.statement)
        self._what = what
        conn.note_definition(what)
        conn.implicit = conn.implicit and not what.controls
        if what.controls and block.settings and (what.number > 1 or (conn._pipeline and what.ends)):
            raise psycopg.NotSupportedError(ENDS_INSIDE)
        if what.ends:
            conn.bound, block.committed = False, block.committed or what.commits
            conn.crossed = False

    def end(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release everything opened for the statement, and note its outcome."""
        conn, block = self._conn, self._block
        conn.visit, conn.holder = None, 0
        if conn.block is not block:
            return  # a generator left open: the connection may belong to another block now
        conn.until = self._until  # an operation left early set a bound for its own end only
        if conn.closed and self._in_transaction:
            block.lost = True
        with conn.owning():
            self._to_end.__exit__(kind, error, traceback)
        if self._what is not None:
            self._conclude(self._what, error is None)

    def _conclude(self, what: StatementTraits, well: bool) -> None:
        """Note the statement's effect on the transaction, or outside one."""
        block = self._block
        if what.ends:
            self._conn.bound, block.committed = False, True
            if well and what.commits and what.number == 1 and self._cursor.statusmessage == "ROLLBACK":
                raise errors.TransactionAbortedError(FAILED) from block.failure
        elif well and what.changes and not (what.controls or self._in_transaction):
            block.in_effect = True

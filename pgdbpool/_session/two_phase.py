"""Two-phase commit: psycopg begins, prepares and ends these transactions.

The tenant comes with the first statement in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .. import errors
from .._request import special
from .block import Block
from .commands import IDLE, INERROR, UNKNOWN
from .state import OUTSIDE
from .transactions import FAILED, TransactingConnection

if TYPE_CHECKING:
    from psycopg import Xid


class TwoPhaseConnection(TransactingConnection):
    """A connection with two-phase transactions."""

    def tpc_begin(self, xid: Xid | str) -> None:
        """Begin a two-phase transaction, as psycopg does it for a connection that is not in autocommit mode.

        :raises psycopg.ProgrammingError: the block is in autocommit mode, or a transaction is open.
        """
        with self._two_phase():
            if self.stale and self.pgconn.transaction_status == IDLE:
                self.run(self.cleaning)
            self._autocommit = self.autocommit
            try:
                super().tpc_begin(xid)
            finally:
                self._autocommit = True

    def tpc_prepare(self) -> None:
        """Prepare the two-phase transaction, which belongs to the server from then on.

        :raises TransactionAbortedError: a statement of it had failed; it is rolled back.
        :raises ConnectionLostError: with `maybe_committed`: it may be prepared, or be rolled back.
        """
        with self._two_phase():
            self._check_failed()
            with self._unknown_if_lost():
                super().tpc_prepare()

    def tpc_commit(self, xid: Xid | str | None = None) -> None:
        """Commit a two-phase transaction, the open one or one that was prepared.

        :raises TransactionAbortedError: it was not prepared, and a statement of it had failed; it is rolled
            back.
        :raises ConnectionLostError: with `maybe_committed`, since the outcome is unknown.
        """
        with self._two_phase() as block:
            self._check_failed()
            with self._unknown_if_lost():
                super().tpc_commit(xid)
            block.committed = True
            if special.in_use:
                self.tell_now()

    def tpc_rollback(self, xid: Xid | str | None = None) -> None:
        """Roll back a two-phase transaction, the open one or one that was prepared.

        :raises ConnectionLostError: with `maybe_executed` if it was prepared: it may still be.
        """
        with self._two_phase():
            prepared = xid is not None or (self._tpc is not None and self._tpc[1])
            try:
                super().tpc_rollback(xid)
            except errors.ConnectionLostError as error:
                error.maybe_executed = error.maybe_executed or prepared
                raise

    def _check_failed(self) -> None:
        """Refuse to prepare or commit a failed transaction: the server would roll it back silently."""
        if self._tpc is not None and self.pgconn.transaction_status == INERROR:
            super().tpc_rollback()
            raise errors.TransactionAbortedError(FAILED)

    @contextmanager
    def _unknown_if_lost(self) -> Iterator[None]:
        """Note that the outcome is unknown if the connection is lost, unless nothing was sent on it."""
        status = self.pgconn.transaction_status
        try:
            yield
        except BaseException as error:
            if status != UNKNOWN:
                self._note_unknown(error)
            raise

    @contextmanager
    def _two_phase(self) -> Iterator[Block]:
        """Take the turn for a step of a two-phase transaction, whose outcome is worth a wait."""
        self.check_free()
        with self.alone():
            if (block := self.block) is None:
                raise errors.BlockClosedError(OUTSIDE)
            self.end_wrapped()
            self.bound, self.ending = False, True
            self.mark(attributes=True)  # it may stay prepared, and nothing else shows that
            try:
                yield block
            finally:
                self.ending = False

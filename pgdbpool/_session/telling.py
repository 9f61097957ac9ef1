"""Reports to a block about its writes: their end, and a commit whose outcome is unknown."""

from __future__ import annotations

from .. import errors
from .._request import special
from . import outcome
from .block import Block
from .commands import IDLE
from .exchange import ExchangingConnection


class TellingConnection(ExchangingConnection):
    """A connection that notes for its block the writes of a statement sent alone, or of a lost commit."""

    def _after_failure(self, block: Block, error: BaseException, autocommit: bool) -> None:
        """Note in the block that its statement failed; a part may be committed."""
        lost = error if isinstance(error, errors.ConnectionLostError) else None
        if lost is not None and autocommit and self.closed:
            lost.maybe_executed = not errors.undone(lost)
        if self.block is not block:
            return
        if lost is not None:
            self.lose_track_after(lost)
        if special.in_use:
            self.tell_of_alone(block, autocommit)
        if isinstance(error, Exception):
            block.failure = errors.without_frames(error)  # the cause, if it is swallowed and the block ends

    def tell_of_alone(self, block: Block, autocommit: bool) -> None:
        """Note the end of the writes of a statement outside a transaction, which could not ride."""
        if self._pipeline or self.learns() is None:  # in a pipeline its outermost end asks
            return
        if self.pipelines:
            if autocommit or block.committed:
                self.tell_now()
            return
        if not autocommit or self.pgconn.transaction_status != IDLE:
            return
        if outcome.may_commit(getattr(block, "statement", None), inside=False):
            self.tell_now()

    def _note_unknown(self, error: BaseException) -> None:
        """Note that a COMMIT was under way when the connection was lost, or its wait interrupted."""
        unknown = True
        if isinstance(error, errors.ConnectionLostError):
            unknown = error.maybe_committed = not errors.undone(error)
        elif not self.closed:
            return
        if (block := self.block) is not None:
            block.lost = False  # or committed: that is unknown, and this error says so
            block.committed = block.committed or unknown
            self.lose_track_after(error)

    def _note_left_by(self, error: BaseException, block: Block, committing: bool) -> None:
        """Note the outcome of a transaction that an error has left, perhaps an error of its COMMIT."""
        if not isinstance(error, errors.ConnectionLostError):
            if committing:
                self._note_unknown(error)
            return
        unknown = committing and not errors.undone(error)
        error.maybe_committed = error.maybe_committed or unknown
        block.committed, block.lost = block.committed or unknown, block.lost and not unknown
        self.lose_track_after(error)

"""Where the writes of a statement outside of a transaction ended, also of one that failed after a commit."""

from __future__ import annotations

from .. import errors
from .._request import special
from . import outcome
from .block import Block
from .commands import IDLE
from .exchange import ExchangingConnection


class TellingConnection(ExchangingConnection):
    """A connection that notes for its block what a statement has written that was sent alone."""

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
        """Tell where the writes ended of a statement outside of a transaction, which could not ride."""
        if self._pipeline or self.learns() is None:  # in a pipeline its outermost end tells
            return
        if self.pipelines:
            if autocommit or block.committed:
                self.tell_now()
            return
        if not autocommit or self.pgconn.transaction_status != IDLE:
            return
        if outcome.may_commit(getattr(block, "statement", None), inside=False):
            self.tell_now()

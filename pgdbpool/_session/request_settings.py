"""Settings that a request adds to a statement's preamble: the time left to it, and its correlation id."""

from __future__ import annotations

from .._request import correlation as tracing
from .._util import bounds
from .commands import IDLE, INTRANS, Command, set_local
from .guarding import GuardedConnection


class RequestConnection(GuardedConnection):
    """A connection that binds the settings of the current request."""

    def limit(self, preamble: tuple[Command, ...], left: float | None) -> tuple[Command, ...]:
        """Add to a statement's preamble the statement_timeout that the seconds left to the deadline allow.

        A little less than the remaining time: the server's answer must be there before the client gives up.
        """
        status = self.pgconn.transaction_status
        if status == IDLE:
            self.limited = False
        if self.own_timeout or status not in (IDLE, INTRANS):
            return preamble
        usual = None if self.patience is None else self.patience - bounds.CLIENT_GRACE
        allowed = usual
        if left is not None and (usual is None or left < usual):
            self.limited, allowed = True, left - min(bounds.MARGIN, left / 2)
        elif not self.limited:
            return preamble
        # 0 means no bound. In a transaction this also undoes the bound of an earlier statement.
        milliseconds = 0 if allowed is None else max(1, round(allowed * 1000))
        return preamble + set_local((("statement_timeout", str(milliseconds)),))

    def annotate(self, preamble: tuple[Command, ...]) -> tuple[Command, ...]:
        """Add the block's correlation id, as a part of application_name, once in each transaction.

        Not to the statement's text, which identifies its plan: with a different comment, each block's
        statement would be parsed and planned again, at the server and in psycopg.
        """
        block, status = self.block, self.pgconn.transaction_status
        if status == IDLE:
            self.annotated = False
        if block is None or self.annotated or status not in (IDLE, INTRANS):
            return preamble
        self.annotated = True
        name = tracing.application_name(self.own_name, block.correlation_id)
        return preamble + set_local((("application_name", name),))

"""Whether an idle connection may be lent: not lost, expired or excluded, and with the wanted role."""

from __future__ import annotations

from time import monotonic

import psycopg

from .._servers.balance import suits
from .._session.connection import PooledConnection
from .._util import bounds
from .fresh_reads import FreshGroup
from .opening import DOWN_AFTER

IN_RECOVERY = b"in_hot_standby"


class CheckingGroup(FreshGroup):
    """A group that checks a connection before it is lent."""

    __slots__ = ()

    def _reason_unusable(self, conn: PooledConnection, now: float, deadline: float) -> str | None:
        """Return why an idle connection must not be lent, or None; a ping only if one is due."""
        endpoint, used_at = conn.endpoint, conn.used_at
        if used_at <= endpoint.condemned_at:
            return "condemned"
        if now >= conn.expires_at:
            return "expired"
        if self._excluded and endpoint in self._excluded:
            return "barred"
        if conn.poll(0) and not conn.alive():
            return "lost"
        if (now - used_at > self._ping_after or used_at <= endpoint.suspected_at) and (
            reason := self._ping(conn, deadline)
        ):
            return reason
        # After the ping, since a changed role is reported with the next message.
        if not self._any_role and conn.pgconn.parameter_status(IN_RECOVERY) != self._wanted:
            return self._unwanted(conn, deadline)
        return None

    def _ping(self, conn: PooledConnection, deadline: float) -> str | None:
        """Ping a connection; return why it must not be lent, or None."""
        limit = self.config.ping_timeout
        timeout = min(limit, max(deadline - monotonic(), bounds.MIN_TIMEOUT))
        if conn.ping(timeout):
            return None
        if conn.closed:
            return "lost"
        if timeout < min(limit, DOWN_AFTER):
            return "ping cut short"
        conn.endpoint.condemn(f"no answer to a ping within {timeout:.3g} s")
        return "ping"

    def _unwanted(self, conn: PooledConnection, deadline: float) -> str | None:
        """Return why a connection whose server may have changed its role must not be lent, or None.

        Its report of the role is as old as its last message. If that differs from the known role, the
        connection is pinged or queried: the server may have been promoted since.
        """
        endpoint, target = conn.endpoint, self.config.target
        if (role := endpoint.heard(conn)) is not None:
            return None if suits(target, role, endpoint.read_only) else "role"
        since = monotonic()
        if conn.asked_role is not None and not endpoint.config.pooler:
            conn.note_role(None)
        elif not endpoint.config.pooler and (reason := self._ping(conn, deadline)):
            return reason
        # The server behind a pooler has to be queried, for no longer than a ping may take.
        try:
            with conn.bounded(min(self.config.ping_timeout, max(deadline - monotonic(), bounds.MIN_TIMEOUT))):
                role = endpoint.note_role(conn, since)
        except psycopg.Error:
            return "lost"
        return None if suits(target, role, endpoint.read_only) else "role"

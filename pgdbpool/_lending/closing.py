"""How a group gives up connections: closed, expired, taken away, or left in a commit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from time import monotonic
from weakref import ref

from .._servers.endpoint import Endpoint
from .._session import describe
from .._session.block import Block
from .._session.connection import PooledConnection
from .._session.slot import Slot
from .._util import log_events as events
from .left_sessions import LeftSession
from .telling import TellingGroup, Warn

EXPIRED = float("-inf")
"""The expiry time of a connection that must be replaced, whatever its age."""


class ClosingGroup(TellingGroup):
    """A group that frees the slot of each connection exactly once."""

    __slots__ = ()

    def _drop(self, conn: PooledConnection, reason: str) -> None:
        self._discarded[reason] += 1
        if reason == "lost":
            conn.endpoint.doubtful = True
        label = conn.endpoint.label
        events.CONNECTION_CLOSED(
            "group %s: connection to %s closed: %s", self.name, label, reason,
            group=self.name, endpoint=label, reason=reason,
        )  # fmt: skip
        slot = conn.slot
        try:
            if self._hooks.on_discard is not None and not self.ending:
                self._hooks.on_discard(conn, reason)
        finally:
            conn.retire()
            if slot is not None:
                self._free(conn, slot)

    def _free(self, conn: PooledConnection, slot: Slot) -> None:
        """Free the slot of a connection at once, even if the traceback of an error still holds it.

        The slot of a session left in a commit stays taken: the server still runs a process for it.
        """
        if not conn.left or self.ending or conn.endpoint.config.pooler:
            self._pool.free(slot)
            return
        slot.left = True
        self.left.append(LeftSession(slot, conn.endpoint, conn.left))
        label = conn.endpoint.label
        events.SESSION_LEFT(
            "group %s: a session was left in a commit at %s: it counts until the server lets it go (pid %d)",
            self.name, label, conn.left,
            group=self.name, endpoint=label, reason=f"pid {conn.left}",
        )  # fmt: skip
        self.on_left()

    def let_go(self, session: LeftSession, reason: str) -> None:
        """Free the slot of a session that was left in a commit."""
        if session not in self.left:
            return
        self.left.remove(session)
        label = session.endpoint.label
        events.SESSION_GONE(
            "group %s: the session that was left at %s (pid %d) counts no longer: %s",
            self.name, label, session.pid, reason,
            group=self.name, endpoint=label, seconds=monotonic() - session.since, reason=reason,
        )  # fmt: skip
        self._pool.free(session.slot)
        self._pool.refill()

    def let_all_go(self, endpoint: Endpoint) -> None:
        """Free the slots of all sessions left at a server that is down."""
        for session in [session for session in self.left if session.endpoint is endpoint]:
            self.let_go(session, "the server is down")

    def drop_idle(self, endpoint: Endpoint, reason: str) -> None:
        """Close and replace the idle connections to an endpoint that must not be used."""
        for conn in self._pool.remove(lambda conn: conn.endpoint is endpoint):
            self._drop(conn, reason)
        self._pool.refill()

    def expire(self, unwanted: Callable[[PooledConnection], bool] = lambda conn: True) -> None:
        """Replace all connections: idle ones now, those in use when their blocks end."""
        self._generation += 1  # first: a connection being opened is either seen below or sees this
        for slot in self._pool.slots():
            conn = slot.conn() if slot.conn is not None else None
            if conn is not None and unwanted(conn):
                conn.expire()
        for conn in self._pool.remove(lambda conn: conn.expires_at == EXPIRED):
            self._drop(conn, "expired")
        self._pool.refill()

    def loosen(self, conn: PooledConnection) -> None:
        """Let a connection in use be garbage-collected, which frees its slot; `tie` before it comes back."""
        if (block := self._lent.pop(conn, None)) is not None:
            self._loose[ref(conn, self._collected)] = block.place

    def tie(self, conn: PooledConnection) -> None:
        """Refer to a loosened connection again."""
        if self._loose.pop(ref(conn), None) is not None and conn.block is not None:
            self._lent[conn] = conn.block

    def _collected(self, conn: ref[PooledConnection]) -> None:
        place = self._loose.pop(conn, None)
        if place is None or self.ending:
            return
        warnings.warn(
            f"a connection of group {self.name!r}, taken at {describe.frame(*place)}, was dropped without "
            "being closed: it was closed and replaced",
            ResourceWarning,
            stacklevel=2,
        )

    def take_away(self, conn: PooledConnection, block: Block, deadline: float) -> Warn | None:
        """Take the connection from a block that has held it for `max_hold`, in any thread.

        A running statement is cancelled within the deadline, unless it may be committing. The connection is
        not closed but cut: its own thread, which may be waiting for it, closes it. Returns the warning to
        log, or None if the block has just given the connection back.
        """
        if self._loose:
            self.tie(conn)
        if self._lent.get(conn) is not block or (owner := self._lent.pop(conn, None)) is None:
            return None
        if owner is not block:  # given back and lent again between the two lines
            self._lent[conn] = owner
            if conn.block is not owner and self._lent.pop(conn, None) is not None:  # and given back again
                self._drop(conn, "interrupted")
            return None
        # The thread that removed it from `_lent` owns it: the end of the block finds nothing to give back.
        conn.take_from_block()
        seconds = monotonic() - block.since
        self.overdue += 1
        self._discarded["max_hold"] += 1
        conn.uses.add(seconds)
        text, fields = describe.told(self.name, conn.endpoint.label, block, seconds)
        conn.cut_from_other_thread(deadline)
        if conn.block is None:
            conn.close()
        slot = conn.leave_slot()
        if slot is not None:
            self._free(conn, slot)
        self._pool.refill()
        return lambda: events.BLOCK_OVERDUE("group %s: connection taken away: %s", self.name, text, **fields)

"""Which servers a group may use now: their state, role, timeline and lag."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._servers.balance import Candidate, suits, worth_moving
from .._servers.endpoint import Endpoint, State
from .._session.commands import IDLE
from .._session.connection import PooledConnection
from .._util import log_events as events
from .closing import ClosingGroup

if TYPE_CHECKING:
    pass


MOVE_EVERY = 0.2
"""Seconds between two connections that are closed at release to even out the endpoints."""

CAUGHT_UP = 0.5
"""Share of `max_lag` at which a standby that was over it is used again."""


class EligibleGroup(ClosingGroup):
    """A group that follows what becomes known of its servers."""

    def has_writer(self) -> bool:
        """Tell whether a server of the group is known to be up and to take writes."""
        return any(map(self._takes_writes, self.endpoints))

    def _takes_writes(self, endpoint: Endpoint) -> bool:
        return (
            endpoint.state is State.UP
            and endpoint.role is not None
            and suits(self.config.target, endpoint.role, endpoint.read_only)
            and endpoint not in self._barred
        )

    def note_writer(self, endpoint: Endpoint) -> None:
        """Tell the hook where this server takes the group's writes, and another one did before."""
        if self._hooks.on_failover is None or not self._takes_writes(endpoint):
            return
        with self._lock:
            old = self._writer
            if old is not None and (old is endpoint or self._takes_writes(old)):
                return
            self._writer = endpoint
        if old is not None and old.label != endpoint.label:
            self._hooks.on_failover(old.label, endpoint.label)

    def note_timelines(self) -> None:
        """Bar the servers that were left behind by a promotion, if the group writes."""
        if not self.writes:
            return
        for endpoint in self.endpoints:
            if endpoint.outdated:
                if endpoint not in self._barred:
                    self._bar(endpoint)
                    self._cut(endpoint)
            else:
                self._barred.discard(endpoint)

    def note_lag(self, endpoint: Endpoint) -> None:
        """Bar a standby that is too far behind; take it back when it has caught up to half of that."""
        limit, lag = self.config.max_lag, endpoint.lag
        if limit is None:
            return
        share = max(
            0.0 if lag is None or limit.bytes is None else lag.bytes / limit.bytes,
            0.0 if lag is None or limit.seconds is None else lag.seconds / limit.seconds,
        )
        if share > 1.0 and endpoint not in self._barred:
            events.GROUP_LAG(
                "group %s: %s is %s behind, more than max_lag", self.name, endpoint.label, lag,
                group=self.name, endpoint=endpoint.label,
                lag_bytes=lag and lag.bytes, lag_seconds=lag and lag.seconds,
            )  # fmt: skip
            self._bar(endpoint)
        elif share <= CAUGHT_UP and endpoint in self._barred:
            events.GROUP_CAUGHT_UP(
                "group %s: %s has caught up", self.name, endpoint.label,
                group=self.name, endpoint=endpoint.label,
                lag_bytes=lag and lag.bytes, lag_seconds=lag and lag.seconds,
            )  # fmt: skip
            self._barred.discard(endpoint)
            self.welcome()

    def _bar(self, endpoint: Endpoint) -> None:
        if endpoint not in self._barred:
            self._barred.add(endpoint)
            self.drop_idle(endpoint, "barred")

    def _cut(self, endpoint: Endpoint) -> None:
        """Cut the connections in use to an endpoint whose writes are lost: no COMMIT there is acknowledged.

        What runs is not cancelled: a COMMIT under way has the outcome that the server gives it, and its block
        the error that it may have happened.
        """
        for slot in self._pool.slots():
            conn = slot.conn() if slot.conn is not None else None
            if conn is not None and conn.endpoint is endpoint and conn not in self._borrowed:
                conn.sever(0.0)

    def part_with(self, endpoint: Endpoint) -> None:
        """Replace the connections to an endpoint whose role has changed to one that the group does not want.

        Those in use end with their blocks; the idle ones would be lent on the word that they were told last.
        """
        role = endpoint.role
        if role is not None and not suits(self.config.target, role, endpoint.read_only):
            self.expire(lambda conn: conn.endpoint is endpoint)

    def welcome(self) -> None:
        """An endpoint is up (again): fill up to `min_size`, and even out at release."""
        self._uneven = True
        self._pool.refill()

    def _moves(self, conn: PooledConnection, now: float) -> str | None:
        """Return why a connection would be better closed: too many there, or too many at all."""
        size = self._pool.size
        if size > self.config.connection_count:
            return "surplus"
        if now < self._move_at or size < self.config.min_size:  # those that are missing even it out
            return None
        candidates = self._candidates()
        held = Candidate(conn.endpoint, self.connections_to(conn.endpoint))
        if worth_moving(held, candidates, self.config.target):
            self._move_at = now + MOVE_EVERY
            return "rebalanced"
        target = self.config.target
        self._uneven = any(worth_moving(c, candidates, target) for c in candidates if c.connections)
        return None

    def borrow(self, endpoint: Endpoint) -> PooledConnection | None:
        """Take an idle connection to the endpoint out of the pool, to ask something; `give_back` it at once.

        None where there is none, or where the pool is another thread's alone.
        """
        found: list[PooledConnection] = []

        def first(conn: PooledConnection) -> bool:
            if found or conn.endpoint is not endpoint or conn.used_at <= endpoint.condemned_at:
                return False
            found.append(conn)
            return True

        if self._pool.mine():
            self._pool.remove(first)
        self._borrowed.update(found)
        return found[0] if found else None

    def give_back(self, conn: PooledConnection, failure: str | None = None) -> None:
        """Put a connection back that was borrowed; one that failed is closed and replaced."""
        self._borrowed.discard(conn)
        if failure is None and conn.endpoint in self._barred:
            failure = "barred"  # meanwhile, when it was spared for the question
        if failure is None and conn.endpoint.state is State.DRAINING:
            failure = conn.endpoint.state.value  # meanwhile, when it was not among the idle ones
        if failure is None and conn.pgconn.transaction_status == IDLE:
            self._pool.give(conn)
        else:
            self._drop(conn, failure or "not idle")
            self._pool.refill()

    def lost_servers(self) -> set[Endpoint]:
        """Close the idle connections that were closed at the other end; return the servers concerned.

        It costs a zero-timeout poll for each. In lock-free mode only the owner's thread looks.
        """
        lost: set[Endpoint] = set()
        if not self._pool.mine():
            return lost
        for conn in self._pool.remove(lambda conn: bool(conn.poll(0))):
            alive = conn.alive()  # not under the pool's lock: it may call a notice handler
            if not alive:
                lost.add(conn.endpoint)
            self.give_back(conn, None if alive else "lost")
        return lost

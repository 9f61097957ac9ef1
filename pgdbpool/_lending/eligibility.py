"""Which servers a group may use now, by state, role, timeline and lag."""

from __future__ import annotations

from .._servers.balance import Candidate, suits, worth_moving
from .._servers.endpoint import Endpoint, State
from .._session.commands import IDLE
from .._session.connection import PooledConnection
from .._util import log_events as events
from .closing import ClosingGroup

REBALANCE_INTERVAL = 0.2
"""Minimum seconds between two connections that are closed at release to rebalance the endpoints."""

CAUGHT_UP = 0.5
"""Share of `max_lag` at which an excluded standby is used again."""


class EligibleGroup(ClosingGroup):
    """A group that keeps track of which of its servers it may use."""

    __slots__ = ()

    def has_writer(self) -> bool:
        """Return whether a server of the group is known to be up and to take writes."""
        return any(map(self._takes_writes, self.endpoints))

    def _takes_writes(self, endpoint: Endpoint) -> bool:
        return (
            endpoint.state is State.UP
            and endpoint.role is not None
            and suits(self.config.target, endpoint.role, endpoint.read_only)
            and endpoint not in self._excluded
        )

    def note_writer(self, endpoint: Endpoint) -> None:
        """Call `on_failover` if this server has taken over the writes of the group."""
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
        """Exclude the servers that were left behind by a promotion, if the group writes."""
        if not self.writes:
            return
        for endpoint in self.endpoints:
            if endpoint.outdated:
                if endpoint not in self._excluded:
                    self._exclude(endpoint)
                    self._cut(endpoint)
            else:
                self._excluded.discard(endpoint)

    def note_lag(self, endpoint: Endpoint) -> None:
        """Exclude a standby that is too far behind; use it again at `CAUGHT_UP` of the limit."""
        limit, lag = self.config.max_lag, endpoint.lag
        if limit is None:
            return
        share = max(
            0.0 if lag is None or limit.bytes is None else lag.bytes / limit.bytes,
            0.0 if lag is None or limit.seconds is None else lag.seconds / limit.seconds,
        )
        if share > 1.0 and endpoint not in self._excluded:
            events.GROUP_LAG(
                "group %s: %s is %s behind, more than max_lag", self.name, endpoint.label, lag,
                group=self.name, endpoint=endpoint.label,
                lag_bytes=lag and lag.bytes, lag_seconds=lag and lag.seconds,
            )  # fmt: skip
            self._exclude(endpoint)
        elif share <= CAUGHT_UP and endpoint in self._excluded:
            events.GROUP_CAUGHT_UP(
                "group %s: %s has caught up", self.name, endpoint.label,
                group=self.name, endpoint=endpoint.label,
                lag_bytes=lag and lag.bytes, lag_seconds=lag and lag.seconds,
            )  # fmt: skip
            self._excluded.discard(endpoint)
            self.on_endpoint_up()

    def _exclude(self, endpoint: Endpoint) -> None:
        if endpoint not in self._excluded:
            self._excluded.add(endpoint)
            self.drop_idle(endpoint, "barred")

    def _cut(self, endpoint: Endpoint) -> None:
        """Cut the connections in use to an endpoint whose writes are lost, so that no COMMIT is acknowledged.

        Nothing is cancelled: the server decides the outcome of a COMMIT in progress, and its block gets the
        error for an unknown outcome.
        """
        for slot in self._pool.slots():
            conn = slot.conn() if slot.conn is not None else None
            if conn is not None and conn.endpoint is endpoint and conn not in self._borrowed:
                conn.cut_from_other_thread(0.0)

    def part_with(self, endpoint: Endpoint) -> None:
        """Replace the connections to an endpoint whose new role does not suit the group.

        Those in use end with their blocks; idle ones would be lent by the role that they last reported.
        """
        role = endpoint.role
        if role is not None and not suits(self.config.target, role, endpoint.read_only):
            self.expire(lambda conn: conn.endpoint is endpoint)

    def on_endpoint_up(self) -> None:
        """Fill up to `min_size` and rebalance at release, since an endpoint is up (again)."""
        self._uneven = True
        self._pool.refill()

    def _reason_to_rebalance(self, conn: PooledConnection, now: float) -> str | None:
        """Return why a connection should be closed at release: surplus, or better placed elsewhere."""
        size = self._pool.size
        if size > self.config.connection_count:
            return "surplus"
        if now < self._move_at or size < self.config.min_size:  # opening the missing ones rebalances too
            return None
        candidates = self._candidates()
        held = Candidate(conn.endpoint, self.connections_to(conn.endpoint))
        if worth_moving(held, candidates, self.config.target):
            self._move_at = now + REBALANCE_INTERVAL
            return "rebalanced"
        target = self.config.target
        self._uneven = any(worth_moving(c, candidates, target) for c in candidates if c.connections)
        return None

    def borrow(self, endpoint: Endpoint) -> PooledConnection | None:
        """Take an idle connection to the endpoint out of the pool for a query; `give_back` it at once.

        Returns None if there is none, or if the pool belongs to another thread.
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
        """Put a borrowed connection back; one that failed is closed and replaced."""
        self._borrowed.discard(conn)
        if failure is None and conn.endpoint in self._excluded:
            failure = "barred"  # meanwhile, when it was not among the idle ones
        if failure is None and conn.endpoint.state is State.DRAINING:
            failure = conn.endpoint.state.value  # meanwhile, when it was not among the idle ones
        if failure is None and conn.pgconn.transaction_status == IDLE:
            self._pool.give(conn)
        else:
            self._drop(conn, failure or "not idle")
            self._pool.refill()

    def lost_servers(self) -> set[Endpoint]:
        """Close idle connections that the server has closed; return the servers concerned.

        It costs a zero-timeout poll for each. In lock-free mode only the owning thread polls.
        """
        lost: set[Endpoint] = set()
        if not self._pool.mine():
            return lost
        for conn in self._pool.remove(lambda conn: conn.has_input()):
            alive = conn.alive()  # without the lock of the pool: it may call a notice handler
            if not alive:
                lost.add(conn.endpoint)
            self.give_back(conn, None if alive else "lost")
        return lost

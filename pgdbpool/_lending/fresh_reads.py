"""Which server serves a read that must see certain writes, once a guard has failed or cannot ride.

The order is: other standbys, the block's own one for `fresh_wait`, the primary if `target` admits it, and a
server for which the pool had no slot left: the block's connection gives its slot up.
Each is asked in a separate round trip, so the statement that follows needs no guard.
"""

from __future__ import annotations

import time
from time import monotonic
from typing import TYPE_CHECKING

import psycopg

from .._request import deadline as deadlines
from .._request.freshness import Seen
from .._servers.endpoint import DialError, Endpoint, Role, State
from .._servers.positions import TIMELINES, Facts, Verdict, history_query, judge
from .._session.block import Block
from .._session.commands import BAD, IDLE
from .._session.connection import PooledConnection
from .._session.slot import Slot
from .._util import bounds
from .._util import log_events as events
from .._util.token import UNKNOWN, Position, lsn_text
from ..errors import HookError, QueryDeadlineError, StaleReadError, one_line
from .pausing import PausingGroup

FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.02
"""Seconds between two questions to a standby that is waited for: they grow by half each time."""

WAITING_SINCE = 190000
"""The version of PostgreSQL with WAIT FOR LSN."""

ADMITS_PRIMARY = ("any", "prefer-standby")


class _Search:
    """One block's search for a server that has the writes it must see."""

    def __init__(self, block: Block, seen: Seen, until: float) -> None:
        self.block, self.seen = block, seen
        self.until = until
        """When the block's own time is up."""
        self.told: dict[Endpoint, str] = {}
        """The progress of each server that was asked."""
        self.lost: list[Position] = []
        self.no_room: list[Endpoint] = []
        """Servers that were not asked, since that takes one more connection."""

    def error(self, group: str) -> StaleReadError:
        """Return the error for a block that no server can serve."""
        servers = {endpoint.label: what for endpoint, what in self.told.items()}
        needed = ", ".join(map(str, self.seen.required()))
        what = (
            "may have been lost in a failover or a crash"
            if self.lost
            else "is not on a server that it reads from"
        )
        error = StaleReadError(
            f"group {group!r}: what the block must see ({needed}) {what}: nothing was read; "
            + "; ".join(f"{label} is {text}" for label, text in servers.items()),
            servers=servers,
        )
        error.lost = bool(self.lost)
        error.correlation_id = self.block.correlation_id
        return error


class FreshGroup(PausingGroup):
    """A group that finds a server which has the writes that a block must see."""

    __slots__ = ()

    if TYPE_CHECKING:

        def checkin(self, conn: PooledConnection) -> None: ...

    def prefer_fresh(self, seen: Seen) -> None:
        """Let the next block have an idle connection, if any, to a standby known to have these writes.

        That block needs no guard, or none that fails. Other standbys are not known to lack the writes.
        """
        if len(self.endpoints) < 2 or (token := seen.token) is None or len(token.positions) != 1:
            return
        lsn, idle = token.positions[0].lsn, self._pool.lendable()
        if idle and idle[0].endpoint.position < lsn:
            for conn in idle:
                if conn.endpoint.position >= lsn and conn.endpoint.role is Role.STANDBY:
                    self._pool.bring_forward(conn)
                    return

    def fresh(self, block: Block, conn: PooledConnection, timeout: float | None) -> PooledConnection:
        """Return a connection, this one or another lent in its place, to a server that has the writes.

        :raises StaleReadError: no server has them in time; the error has the progress of each.
        """
        seen = block.sees()
        if seen is None or self.writes or conn.pgconn.transaction_status != IDLE:
            return conn
        until = monotonic() + (self._timeout if timeout is None else timeout)
        if deadlines.in_use:
            until = deadlines.earlier(until, self.name)
        search = _Search(block, seen, until)
        movable = not (conn.touched or conn.handed_out)
        found = self._on_a_standby(search, conn, movable) or self._awaited(search, conn)
        if found is None and movable:
            found = self._elsewhere(search, conn)
        if found is None:
            self.fresh_refused += 1
            raise search.error(self.name)
        return found

    def _has_it(self, search: _Search, conn: PooledConnection, ask: bool = True) -> bool:
        """Return whether a connection's server has the writes that the block must see.

        :raises StaleReadError: some of these writes are lost.
        """
        try:
            facts = conn.ask_facts() if ask else conn.proven
            verdicts = {p: self._judge(conn, p, facts) for p in search.seen.required() if facts is not None}
        except QueryDeadlineError:
            raise
        except psycopg.Error as error:
            search.told[conn.endpoint] = f"not to be asked: {one_line(error)}"
            return False
        if facts is None:
            search.told[conn.endpoint] = "silent about its write-ahead log"
            return False
        search.told[conn.endpoint] = str(facts)
        for position, verdict in verdicts.items():
            if verdict is Verdict.LOST and not search.seen.forgives(position):
                search.lost.append(position)
        if search.lost:
            self.fresh_refused += 1
            raise search.error(self.name)
        has_it = all(verdict in (Verdict.PASSED, Verdict.LOST) for verdict in verdicts.values())
        if has_it:
            conn.endpoint.behind_at = 0.0
        elif ask:
            conn.endpoint.note_behind(facts)
        return has_it

    def _judge(self, conn: PooledConnection, position: Position, facts: Facts) -> Verdict:
        """Return whether the server has the position, once the history of its timeline is known."""
        timeline = facts.timeline
        later = timeline is not None and timeline > position.timeline and position.timeline > 0
        if later and facts.system == position.system and not TIMELINES.knows(facts.system, timeline or 0):
            self._learn_history(conn, facts.system, timeline or 0)
        return judge(position, facts, TIMELINES)

    def _learn_history(self, conn: PooledConnection, system: int, timeline: int) -> None:
        try:
            if (value := conn.ask(history_query(timeline)).get_value(0, 0)) is not None:
                TIMELINES.note(system, timeline, value.decode("ascii", "replace"))
        except psycopg.errors.InsufficientPrivilege as error:
            TIMELINES.note(system, timeline, None)
            reason = one_line(error)
            events.ENDPOINT_NO_HISTORY(
                "endpoint %s: the history of timeline %d cannot be read: %s", conn.endpoint.label, timeline,
                reason, endpoint=conn.endpoint.label, timeline=timeline, reason=reason,
            )  # fmt: skip

    def _on_a_standby(
        self, search: _Search, conn: PooledConnection, movable: bool
    ) -> PooledConnection | None:
        """Return a connection to a standby that has the writes now: this one, or one to another server."""
        just_asked = conn.endpoint.found_behind() is not None and conn.proven is not None
        if self._has_it(search, conn, ask=not just_asked):
            return conn
        others = self._others(conn.endpoint) if movable else ()
        for endpoint in others:
            if endpoint.role is not Role.PRIMARY and (found := self._ask_there(search, conn, endpoint)):
                return found
        return None

    def _others(self, but: Endpoint) -> list[Endpoint]:
        """Return the group's other servers, those that were seen furthest ahead first."""
        usable = [
            endpoint
            for endpoint in self.endpoints
            if endpoint is not but and endpoint.state is State.UP and endpoint not in self._excluded
        ]
        return sorted(usable, key=lambda endpoint: -endpoint.position)

    def _awaited(self, search: _Search, conn: PooledConnection) -> PooledConnection | None:
        """Wait up to `fresh_wait` for this standby to have the writes; less if it replays nothing."""
        began = monotonic()
        # A question for which the block has too little time would cost the connection.
        until, pause = min(began + self.config.fresh_wait, search.until - bounds.MIN_TIMEOUT), FIRST_PAUSE
        at = None if conn.proven is None else conn.proven.lsn
        if until <= began or conn.closed or (conn.proven is not None and not conn.proven.standby):
            return None
        self.fresh_waits += 1
        while (left := until - monotonic()) > 0:
            self._let_pass(search, conn, min(pause, left), left)
            if self._has_it(search, conn):
                return conn
            if conn.pgconn.status == BAD:
                return None
            pause = min(pause * 1.5, LONGEST_PAUSE)
            stands = conn.proven is None or conn.proven.lsn == at
            if stands and monotonic() - began > self.config.fresh_wait / 2:
                return None  # its replay is paused, or the primary is away
        return None

    def _let_pass(self, search: _Search, conn: PooledConnection, pause: float, left: float) -> None:
        """Let some time pass; PostgreSQL 19 and later ends it when the standby has caught up."""
        system = None if conn.proven is None else conn.proven.system
        needed = [p.lsn for p in search.seen.required() if p.system == system and p.lsn != UNKNOWN]
        if conn.pgconn.server_version < WAITING_SINCE or not needed:
            time.sleep(pause)
            return
        # It looks at no timeline, so the standby is asked for its position all the same.
        within = f"WITH (TIMEOUT '{max(1, int(1000 * left))}ms', NO_THROW)"
        try:
            conn.ask(f"WAIT FOR LSN '{lsn_text(max(needed))}' {within}".encode())
        except psycopg.Error:
            time.sleep(pause)

    def _elsewhere(self, search: _Search, conn: PooledConnection) -> PooledConnection | None:
        """Return a connection to the primary or to a server that was not asked, in place of this one.

        A server that was promoted may be known as a standby until it is asked.
        """
        admits = self.config.target in ADMITS_PRIMARY
        for endpoint in sorted(self._others(conn.endpoint), key=lambda other: other.role is Role.STANDBY):
            primary = admits and endpoint.role is not Role.STANDBY
            if not (primary or endpoint in search.no_room):
                continue
            if found := self._ask_there(search, conn, endpoint, needed=True):
                self.fresh_from_primary += endpoint.role is not Role.STANDBY
                return found
        return None

    def _ask_there(
        self, search: _Search, conn: PooledConnection, endpoint: Endpoint, needed: bool = False
    ) -> PooledConnection | None:
        """Ask another server; if it has the writes, return a connection to it, lent in place of this one.

        :param needed: whether this connection is given up if the pool has no room for both.
        """
        other = self.borrow(endpoint)
        if other is None:
            slot = self._pool.claim()
            if slot is None and (not needed or (slot := self._give_up(conn)) is None):
                search.told.setdefault(
                    endpoint, "not asked: there is no connection to it, and no room for one"
                )
                search.no_room.append(endpoint)
                return None
            other = self._connect_to(endpoint, slot, search)
            if other is None:
                return None
        has_it = False
        try:
            has_it = self._has_it(search, other)
        finally:
            if not has_it:
                self.give_back(other, "lost" if other.closed else None)
        if not has_it:
            return None
        self._borrowed.discard(other)
        self._swap(search.block, conn, other)
        return other

    def _swap(self, block: Block, conn: PooledConnection, other: PooledConnection) -> None:
        """Lend a connection in place of another one, which goes back to the pool.

        :raises HookError: the block keeps the connection that it had.
        """
        other.lend_to(block)
        self._lent[other] = block
        try:
            if self._on_checkout is not None:
                self._on_checkout(other)
        except HookError:
            del self._lent[other]
            other.block = None
            self._drop(other, "on_checkout failed")
            if conn in self._lent:
                conn.lend_to(block)
            raise
        if conn in self._lent:
            self.checkin(conn)
        block.conn = other

    def _give_up(self, conn: PooledConnection) -> Slot | None:
        """Close the block's connection; return its slot, for a connection to another server."""
        slot = conn.slot
        if self._lent.pop(conn, None) is None or slot is None:
            return None
        if conn.block is not None:
            conn.block.conn = None
        conn.block = None
        self._discarded["stale"] += 1
        conn.retire()
        return slot

    def _connect_to(self, endpoint: Endpoint, slot: Slot, search: _Search) -> PooledConnection | None:
        """Open a connection to this server in the slot; return None if that fails."""
        slot.endpoint = endpoint
        budget = max(min(search.until - monotonic(), self._connect_timeout), bounds.MIN_TIMEOUT)
        failures: dict[Endpoint, DialError | None] = {}
        generation = self._generation
        try:
            conn = self._dial(endpoint, budget, 1, failures)
        except BaseException:
            self._pool.free(slot)
            raise
        if conn is None:
            self._pool.free(slot)
            search.told[endpoint] = str(failures.get(endpoint) or "not of the group's target")
            return None
        self._adopt(conn, slot, generation)
        self._uneven = True  # its place is evened out at release
        self._borrowed.add(conn)
        return conn

"""One pool of connections over the endpoints of a group.

Its layers, each of which knows only those below it: `configured`, `telling`, `closing`, `eligibility`,
`opening`, `pausing`, `fresh_reads`, `usability`. This module has `checkout` and `checkin`, which blocks call.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from .._request import deadline as deadlines
from .._servers.endpoint import Endpoint, State
from .._session import describe
from .._session.block import Block
from .._session.commands import IDLE
from .._session.connection import PooledConnection
from .._session.ended import end, succeed
from .._session.slot import Slot
from .._util import greenlets
from .._util.durations import BATCH
from ..errors import (
    DBConnectionError,
    Error,
    HookError,
    PoolExhausted,
    PoolTimeout,
    RateLimitExceeded,
    ServerFullError,
    SettingError,
    TooManyWaiting,
)
from .lock_free_pool import LockFreePool
from .pool import NoConnection, Pool
from .threaded_pool import ThreadedPool
from .usability import IN_RECOVERY, CheckingGroup

if TYPE_CHECKING:
    from .._config.model import GroupConfig


KEYS_FIXED_AT_CONNECT = (
    "target", "row_factory", "prepare_threshold", "sqlprepare", "query_timeout", "connection_class",
    "configure", "tenant", "slow_query", "annotate", "reset",
)  # fmt: skip
"""Keys that are fixed when a connection is opened: if one changes, connections are replaced."""

REFILL_AFTER = 1.0
"""Seconds until a lock-free pool retries to open missing connections at a checkout."""

LEFT_EVERY = 0.01
"""Seconds between two checks of a lock-free checkout for the end of a session left in a commit."""


_UP = State.UP  # looked up once: a member of an enumeration is found slowly


def users_of(endpoint: Endpoint) -> Sequence[Group]:
    """Return the groups that use the server."""
    return cast("Sequence[Group]", endpoint.groups)


class Group(CheckingGroup):
    """One pool of connections over the group's endpoints.

    `_lock` is held while an endpoint is chosen and the slot assigned to it, so that two requests do not
    choose the same endpoint; never during a wait. It is re-entrant, since a signal handler or a finalizer
    may use the group. In lock-free mode it does nothing.
    """

    __slots__ = ()

    def __init__(
        self,
        config: GroupConfig,
        endpoints: Sequence[Endpoint],
        *,
        lock_free: bool,
        row_factory: Any,
        probe: Callable[[], bool] | None = None,
        revive: Callable[[Collection[Endpoint], float], bool] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            config, endpoints, lock_free=lock_free, row_factory=row_factory, probe=probe, revive=revive,
            name=name,
        )  # fmt: skip
        self._probe = self._first_use
        self.on_drop = self._dropped
        size: dict[str, Any] = {
            "min_size": config.min_size,
            "max_size": config.connection_count,
            "max_idle": config.max_idle,
            "drop": self._drop,
            "reserved": config.reserved,
        }
        self._pool: Pool = (
            LockFreePool(**size)
            if lock_free
            else ThreadedPool(
                name=self.name,
                max_waiting=config.max_waiting,
                num_workers=config.num_workers,
                dial=self._connect,
                **size,
            )
        )
        self._grab, self._give = self._pool.grab, self._pool.give

    def admit(self, block: Block) -> None:
        """Wait for the turn of the block, if the group has a rate limit.

        :raises RateLimitExceeded: it would take too long.
        :raises DeadlineExceeded: the current deadline has passed already.
        """
        if (limiter := self.limiter) is None:
            return  # removed a moment ago
        try:
            limiter.acquire()
        except Error as error:
            if isinstance(error, RateLimitExceeded):
                with self._lock:
                    self._rate_limited += 1  # counted here, since a reload may replace the limiter
            describe.mark(error, block)
            raise

    def checkout(self, block: Block, timeout: float | None = None) -> PooledConnection:
        """Lend a working connection to the block, within the timeout (seconds).

        :raises PoolTimeout: none became free in time; the message lists the holders.
        :raises DBOfflineError: none can be opened, since all endpoints are down.
        :raises DBConnectionError: none can be opened, with each endpoint's own reason.
        :raises DeadlineExceeded: the current deadline has passed already.
        """
        if deadlines.in_use:
            deadlines.check(self.name)
        now, probe, pool, grab = monotonic(), self._probe, self._pool, self._grab
        conn: PooledConnection | None = None
        try:
            # Usually a connection is idle, and these comparisons, also made by `_reason_unusable`, suffice.
            idle = None
            if probe is None or (
                probe is self._later_probe and now < self.beat.due_at and not pool.missing
            ):  # fmt: skip
                idle = grab(block.thread)
            if idle is not None:
                used_at, endpoint, poll = idle.used_at, idle.endpoint, idle.poll
                if (
                    used_at > endpoint.condemned_at and used_at > endpoint.suspected_at
                    and now < idle.expires_at and now - used_at <= self._ping_after
                    and not self._excluded and not poll(0)
                    and (self._any_role or idle.pgconn.parameter_status(IN_RECOVERY) == self._wanted)
                ):  # fmt: skip
                    conn = idle
            if conn is None:
                conn, now = self._find(idle, block, now, self._timeout if timeout is None else timeout)
            block.since = now
            conn.lend_to(block)
            self._lent[conn] = block
            if self._on_checkout is not None:
                self._on_checkout(conn)
        except BaseException as error:
            self._undo_checkout(conn, block, error)
            raise
        if pool.missing:
            pool.refill()
        return conn

    def _find(
        self, got: PooledConnection | Slot | None, block: Block, now: float, timeout: float
    ) -> tuple[PooledConnection, float]:
        """Return a working connection within the timeout, and the time; `got` is tried first."""
        deadline = now + timeout
        if deadlines.in_use:
            deadline = deadlines.earlier(deadline, self.name)
        if got is None and self._probe is not None:
            now = self._maintain(now, deadline)
        conn: PooledConnection | None = None
        while conn is None:
            if got is None:
                try:
                    got = self._pool.take(0.0, block.high)
                except NoConnection as none:
                    got = self._queue(none.reason, deadline, now, block.high)
                    now = monotonic()
            # Two cases: a free slot to open a connection in, or an idle connection, perhaps unusable.
            if isinstance(got, Slot):
                conn, now = self._fill(got, deadline, block.high)
            elif (reason := self._reason_unusable(got, now, deadline)) is None:
                conn = got
            else:
                self._drop_unfit(got, reason)
                self._pool.refill()
                now = monotonic()
            got = None
            if self._pause is not None and conn is not None and not self.nested():
                self._pool.give(conn)  # paused while the block waited: it is not open yet
                conn, now = None, self._hold(monotonic(), deadline)
        return conn, now

    def _fill(self, slot: Slot, deadline: float, high: bool) -> tuple[PooledConnection | None, float]:
        """Open a connection in the slot; return it, or None if `take` has to be repeated, and the time."""
        try:
            conn = self._connect_or_wait(slot, deadline)
        except ServerFullError as error:
            return None, self._await_room(error.pause, deadline, high)
        return conn, monotonic()

    def _drop_unfit(self, conn: PooledConnection, reason: str) -> None:
        """Close an idle connection that must not be lent.

        :raises DBConnectionError: the time of the block is up, which is not evidence against the server.
        """
        self._drop(conn, reason)
        if reason == "ping cut short":
            raise self._hurried(conn.endpoint)

    def _undo_checkout(self, conn: PooledConnection | None, block: Block, error: BaseException) -> None:
        """Undo the effects of a checkout that failed."""
        if isinstance(error, SettingError):
            if conn is not None:
                self._pool.give(conn)  # nothing was sent
        elif isinstance(error, HookError):
            assert conn is not None
            block.conn = conn.block = None
            self._lent.pop(conn, None)
            self._drop(conn, "on_checkout failed")
            self._pool.refill()
        elif conn is not None:
            self._lent.pop(conn, None)
            self._drop(conn, "interrupted")
        describe.mark(error, block)

    def checkin(self, conn: PooledConnection) -> None:
        """Take a connection back: if idle and clean it is lent again, else it is closed and replaced."""
        conn.block = None
        try:
            if (block := self._lent.pop(conn, None)) is None:
                self._not_lent(conn)
                return
            block.conn = None
            now = conn.used_at = monotonic()
            reason, give = None, self._give
            # Usually these comparisons, which `_reason_to_close` makes too, find a connection to lend again.
            if (
                conn.pgconn.transaction_status != IDLE or now >= conn.expires_at or conn.turn.locked()
                or conn.touched or conn.altered or conn.endpoint.state is not _UP
                or self._excluded or self._uneven or self._always_clean
            ):  # fmt: skip
                reason = self._reason_to_close(conn, now)
            held = now - block.since
            recent = conn.uses.recent
            recent.append(held)  # `Tally.add`, without a call
            if len(recent) >= BATCH:
                conn.uses.count()
                conn.renew_adapters()
            if self._at_checkin is not None:
                reason = self._at_checkin(conn, reason)
            if reason is None and not conn.handed_out:
                give(conn)
            else:
                reason = self._give_on(conn, reason)
        except BaseException:
            if conn.lent:  # interrupted before the pool took it
                self._drop(conn, "interrupted")
            raise
        if reason is not None:
            self._pool.refill()
        if held >= self._slow_block:  # last, since a log may be kept in a database
            self._note_slow_block(conn, block, held)

    def _not_lent(self, conn: PooledConnection) -> None:
        """Close a connection that was taken away; any other belongs to the parent, or is back already."""
        if conn.taken_away:
            conn.close()

    def _give_on(self, conn: PooledConnection, reason: str | None) -> str | None:
        """Close it, and return why, or move its session to a new object: its block may keep the old one."""
        heir = succeed(conn) if reason is None else None
        if heir is not None:
            self._pool.give(heir)
            return None
        reason = reason or "not clean"
        self._drop(conn, reason)
        if conn.handed_out:
            end(conn)
        return reason

    def _reason_to_close(self, conn: PooledConnection, now: float) -> str | None:
        if conn.pgconn.transaction_status != IDLE:
            return "lost" if conn.closed else "not idle"
        if now >= conn.expires_at:
            return "expired"
        if conn.turn.locked():
            conn.force_close()  # a thread's statement outlasts the block, or a loop is open
            return "not clean"
        if (conn.touched or conn.altered) and not self._restored(conn):
            return "not clean"
        if conn.endpoint.state is not _UP:
            return str(conn.endpoint.state.value)
        if self._excluded and conn.endpoint in self._excluded:
            return "barred"
        if self._uneven and (reason := self._reason_to_rebalance(conn, now)):
            return reason
        if self._always_clean and not conn.local:
            conn.ask_for_cleaning()
        return None

    def _restored(self, conn: PooledConnection) -> bool:
        if self.config.reset == "never":
            conn.keep_touched()
        return conn.restore_attributes()

    def discard(self, conn: PooledConnection, reason: str) -> None:
        """Take a connection back and close it."""
        conn.block = None
        if (block := self._lent.pop(conn, None)) is not None:
            block.conn = None
            conn.uses.add(monotonic() - block.since)
            if self._at_checkin is not None and not self.ending:
                self._at_checkin(conn, reason)
            self._drop(conn, reason)
            self._pool.refill()

    def take_over(self, conn: PooledConnection, heir: PooledConnection) -> None:
        """Note that a connection in use goes on in another object."""
        if (block := self._lent.pop(conn, None)) is not None:
            self._lent[heir] = block

    def _maintain(self, now: float, deadline: float) -> float:
        """Probe, and open missing connections: in threaded mode a thread does this. Return the time."""
        probe = self._probe
        if probe is None:
            return now  # threaded: another thread was the first user, a moment ago
        if probe():
            now = self._hold(now, deadline)
        if self._pool.missing and self.lock_free and now >= self._refill_at and (slot := self._pool.claim()):
            try:
                self._pool.give(self._connect(slot, deadline))
            except DBConnectionError:  # noted at the endpoint; an idle connection may serve
                self._refill_at = now + REFILL_AFTER
                self._pool.refill()
        return now

    def _first_use(self) -> bool:
        """Prepare the first checkout in a process; refuse it if a wait would block all greenlets."""
        greenlets.check()
        self.used = True
        self.on_first_use()  # an order to pause may be in force
        self._set_probe()
        if self._later_probe is not None:
            self._later_probe()
        return self._pause is not None

    def _dropped(self, handler: object) -> None:
        """Take back the connection of a Handler or another owner that was collected without leaving."""
        for conn, block in list(self._lent.items()):
            if block.watch is handler:
                block.open = False
                self.discard(conn, "dropped")
                if self.ending:
                    return  # the process is exiting
                what = "a Handler" if type(block) is Block else "the owner of a connection"
                warnings.warn(
                    f"{what} of group {self.name!r}, entered at {describe.where(block)}, was dropped "
                    "without leaving its block: its connection was closed and replaced",
                    ResourceWarning,
                    stacklevel=2,
                )

    def _queue(self, reason: str, deadline: float, now: float, high: bool) -> PooledConnection | Slot:
        """Wait for a connection or a slot, since nothing was free for the given reason."""
        if reason == NoConnection.CLOSED:
            raise self._was_closed() from None
        if reason == NoConnection.EXHAUSTED and self.left:
            return self._await_left(deadline, now, high)
        if reason == NoConnection.EXHAUSTED or self._mine_alone(high):
            raise self._exhausted(PoolExhausted, 0.0, high) from None
        try:
            got = self._pool.take(deadline - now, high)
        except NoConnection as none:
            if none.reason == NoConnection.CLOSED:
                raise self._was_closed() from None
            queue_full = none.reason == NoConnection.QUEUE_FULL
            kind = TooManyWaiting if queue_full else PoolTimeout
            raise self._exhausted(kind, deadline - now, high) from None
        self._waits.add(monotonic() - now)
        return got

    def _await_room(self, pause: float, deadline: float, high: bool) -> float:
        """Wait while no server has room for another connection; return the time.

        In threaded mode the wait is in the queue, where a returned connection may serve the caller too.

        :raises PoolTimeout: no time is left.
        """
        now = monotonic()
        self._pool.taken -= 1  # the slot was of no use
        if now >= deadline:
            raise self._exhausted(PoolTimeout, 0.0, high) from None
        if not self._pool.hold_back(pause):
            time.sleep(min(pause, deadline - now))
        return monotonic()

    def _await_left(self, deadline: float, now: float, high: bool) -> PooledConnection | Slot:
        """Wait, in lock-free mode, until a server ends a session that was left in a commit."""
        while self.left and monotonic() < deadline:
            time.sleep(LEFT_EVERY)
            if self._probe is not None:
                self._probe()
            with suppress(NoConnection):
                return self._pool.take(0.0, high)
        raise self._exhausted(PoolTimeout, deadline - now, high)

    def apply(self, config: GroupConfig, endpoints: Sequence[Endpoint], row_factory: Any) -> None:
        """Apply a changed configuration; connections that fit it are kept."""
        old, before = self.config, self.endpoints
        self._take_over(config, endpoints, row_factory)
        if old.rate_limit != config.rate_limit:
            self.limiter = self._make_limiter()
        if (old.target, old.max_lag) == (config.target, config.max_lag):
            self._excluded = self._excluded.intersection(self.endpoints)
        else:
            self._excluded = {e for e in self.endpoints if self.writes and e.outdated}
        if any(getattr(old, key) != getattr(config, key) for key in KEYS_FIXED_AT_CONNECT) or (
            config.tenant is not None and old.settings != config.settings  # these may include the role
        ):
            self.expire()
        elif set(before) != set(self.endpoints):
            self.expire(lambda conn: conn.endpoint not in self.endpoints)
        self._pool.adjust(
            min_size=config.min_size,
            max_size=config.connection_count,
            max_idle=config.max_idle,
            max_waiting=config.max_waiting,
            reserved=config.reserved,
        )
        numbers, surplus = count(1), self._pool.size - config.connection_count
        for conn in self._pool.remove(lambda conn: next(numbers) <= surplus):
            self._drop(conn, "surplus")
        self._uneven = True  # connections in use are rebalanced at release
        self._pool.refill()

    def close(self, timeout: float) -> None:
        """Close the pool; connections in use are closed as they come back."""
        self._pause = None  # held blocks go on, and find the pool closed
        self._pool.close(timeout)

    def abandon(self) -> None:
        """Drop the connections of the parent in a forked child, without touching them."""
        self.retired = True
        self._pool.abandon()
        for conn, block in self.held():
            conn.abandon()
            block.open = False
        self._lent, self._loose = {}, {}

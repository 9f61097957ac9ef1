"""A named group: which endpoint the next connection goes to, lending, taking back, deadlines."""

from __future__ import annotations

import random
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Any, cast
from weakref import ref

import psycopg

from .._request import correlation as tracing
from .._request import deadline as deadlines
from .._request.tenant import Bound, bind_settings, bind_tenant, current_tenant, is_uuid, milliseconds
from .._servers.balance import Candidate, order, suits, worth_moving
from .._servers.endpoint import DialError, Endpoint, Look, Role, State
from .._session import describe
from .._session.block import UNBOUND, Binding, Block
from .._session.commands import BEGIN, GRACE, HURRY, IDLE, KEEP, set_local
from .._session.connection import PooledConnection
from .._session.ended import end, succeed
from .._session.slot import Slot
from .._session.slow_statements import TimedConnection
from .._session.statement_text import text_of
from .._util import greenlets
from .._util import log_events as events
from .._util.durations import BATCH, Tally
from ..errors import (
    CredentialError,
    DBConnectionError,
    DBOfflineError,
    Error,
    HookError,
    NotInitializedError,
    PoolExhausted,
    PoolTimeout,
    RateLimitExceeded,
    ServerFullError,
    SettingError,
    TargetUnavailableError,
    TooManyWaiting,
    UnsafeRoleError,
    one_line,
)
from .dialling import connect, dial
from .hooks import Hooks
from .left_sessions import LeftSession
from .pools import LockFreePool, NoConnection, Pool, ThreadedPool
from .rate_limit import RateLimiter

if TYPE_CHECKING:
    from .._config.model import GroupConfig
    from ..stats import GroupStatus

Warn = Callable[[], None]
"""Logs what was found. A handler may hang, or want a connection: so whoever looks for it does it last."""

MOVE_EVERY = 0.2
"""Seconds between two connections that are closed at release to even out the endpoints."""


CONCLUSIVE = 1.0
"""Seconds without an answer to a connect after which a server counts as down, if not less was allowed."""

CAUGHT_UP = 0.5
"""Share of `max_lag` at which a standby that was over it is used again."""

EXPIRED = float("-inf")
"""When a connection has expired that is to be replaced, whatever its age."""

LASTING = (
    "target", "row_factory", "prepare_threshold", "sqlprepare", "query_timeout", "connection_class",
    "configure", "tenant", "slow_query", "annotate", "reset",
)  # fmt: skip
"""Keys that a connection has from when it was opened: where one changes, it is replaced."""

REMEMBERED = 1000
"""Tenants whose binding a group remembers."""

REFILL_AFTER = 1.0
"""Seconds for which a lock-free pool that could not open a connection at a checkout makes do."""

LONG = 1.0
"""Seconds after which the status page tells of a block that has a connection, without `leak_after`."""

LEFT_EVERY = 0.01
"""Seconds between two looks of a lock-free checkout for a session that was left in a commit."""

LOOKED_AT = 5
"""Connections to an endpoint whose sockets tell the time of a round trip."""


def _role_last(settings: Bound) -> Bound:
    """Return the settings with the role at the end, since it may not be allowed to set the others."""
    return tuple(sorted(settings, key=lambda pair: pair[0].lower() in ("role", "session_authorization")))


def _patience(settings: Bound) -> float | None:
    """Return how long the client waits for a statement under these settings."""
    for name, value in settings:
        if name.lower() == "statement_timeout" and (timeout := milliseconds(value)) is not None:
            return timeout / 1000 + GRACE if timeout else None
    return KEEP


def users_of(endpoint: Endpoint) -> Sequence[Group]:
    """Return the groups that use the server."""
    return cast("Sequence[Group]", endpoint.groups)


class Group:
    """One pool of connections over the group's endpoints.

    `_lock` is held from looking at where the connections are to placing one more, so that two
    requests do not choose the same endpoint; never while anything waits. It is re-entrant, since a signal
    handler or a finalizer may use the group. In lock-free mode it does nothing.
    """

    def __init__(
        self,
        config: GroupConfig,
        endpoints: Sequence[Endpoint],
        *,
        lock_free: bool,
        row_factory: Any,
        probe: Callable[[], None] | None = None,
        revive: Callable[[Collection[Endpoint], float], bool] | None = None,
    ) -> None:
        self.name = config.name
        self.lock_free = lock_free
        self._probe: Callable[[], None] | None = self._first_use
        self._later_probe = probe
        self._revive = revive
        self._lock: AbstractContextManager[Any] = nullcontext() if lock_free else threading.RLock()
        self._lent: dict[PooledConnection, Block] = {}
        self._borrowed: set[PooledConnection] = set()
        """Connections over which a server is asked something, for no block."""
        self.on_drop = self._dropped
        self._discarded: Counter[str] = Counter()
        self._opened = 0
        self._timeouts = self._rate_limited = self._past_failovers = 0
        self.retries = self.leaks = self.overdue = self.slow_blocks = self.slow_statements = 0
        self.not_replicated = 0
        self.left: list[LeftSession] = []
        """Sessions that were left in a commit."""
        self._waits = Tally()
        """Of those who waited in the queue; the others took no time."""
        self.uses: dict[Endpoint, Tally] = {}
        self.connects: dict[Endpoint, Tally] = {}
        self.closed_by = ""
        """What has closed the pools."""
        self.ending = False
        """Whether the interpreter is about to exit."""
        self._uneven = False
        self._warned = ""
        self._barred: set[Endpoint] = set()
        """Endpoints that are up, and not to be used: too far behind, or on an older timeline."""
        self._writer: Endpoint | None = None
        """The server that takes the group's writes, where a hook is told when it is another one."""
        self._generation = 0
        """How often connections were expired: one that was being opened meanwhile is of the old sort too."""
        self._move_at = 0.0
        self._refill_at = 0.0
        self.on_first_use: Callable[[], None] = lambda: None
        self.await_writer: Callable[[Group, float], bool] = lambda group, deadline: False
        """Waits until the deadline while a primary is on its way; returns whether there is one."""
        self.on_left: Callable[[], None] = lambda: None
        self.config = config
        self.endpoints: tuple[Endpoint, ...] = ()
        self.limiter = self._make_limiter()
        self._take_over(config, endpoints, row_factory)
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

    def _take_over(self, config: GroupConfig, endpoints: Sequence[Endpoint], row_factory: Any) -> None:
        """Set what follows from the configuration; other threads see one part after the other."""
        gone = set(self.endpoints).difference(endpoints)
        self._past_failovers += sum(endpoint.failovers for endpoint in gone)
        self.uses = {endpoint: self.uses.get(endpoint, Tally()) for endpoint in endpoints}
        self.connects = {endpoint: self.connects.get(endpoint, Tally()) for endpoint in endpoints}
        self.config = config
        self.manual: bool = not config.autocommit
        self.endpoints = tuple(endpoints)
        # Where endpoints tie, processes that have few connections each begin at different ones.
        first = random.randrange(len(self.endpoints))
        self._ring = self.endpoints[first:] + self.endpoints[:first]
        self._row_factory = row_factory
        self._hooks = Hooks(config)
        # What a checkout reads, as plain attributes.
        self._on_checkout, self._at_checkin = self._hooks.on_checkout, self._hooks.at_checkin
        self._timeout = config.timeout
        self._ping_after = {"auto": config.ping_after, "always": -1.0}.get(config.ping, float("inf"))
        self._always_clean = config.reset == "always"
        self._settings = bind_settings(config.settings)
        self._ordered, self._patience = _role_last(self._settings), _patience(self._settings)
        self._plain = config.tenant is None and not self._settings
        self._slow_block = float("inf") if config.slow_block is None else config.slow_block
        self._kind = PooledConnection if config.slow_query is None else TimedConnection
        if config.leak_stack:
            tracing.use()
        trusted = not any(endpoint.config.pooler for endpoint in self.endpoints)
        self._wanted = {"primary": b"off", "standby": b"on"}.get(config.target, b"") if trusted else b""
        self._any_role = config.target in ("any", "prefer-standby")
        self._connect_timeout = max(self._dial_timeout(endpoint) for endpoint in self.endpoints)
        # The last: a block that still found the old settings remembers them in the old dict.
        self._bindings: dict[tuple[type, Any], Binding] = {}
        """What tenants that were seen bind: the same values again cost one look."""

    def _make_limiter(self) -> RateLimiter | None:
        limit = self.config.rate_limit
        return RateLimiter(limit, self.name, lock_free=self.lock_free) if limit else None

    def __repr__(self) -> str:
        pool = self._pool
        return f"<Group {self.name!r} {len(self._lent)} in use, {pool.idle} idle, {pool.waiting} waiting>"

    # Lending.

    def bind(self, tenant: Any, override: bool, settings: Mapping[str, Any] | None) -> Binding:
        """Return what a block binds: its tenant, and its and the group's settings.

        :raises TenantRequiredError: the group requires a tenant and there is none.
        :raises TenantConflictError: another tenant is the current one.
        :raises SettingError: a value or a name that cannot be bound.
        """
        if settings or override:
            return self._bind(tenant, override, settings or {})
        if self._plain and tenant is None:
            return UNBOUND
        current = current_tenant()
        chosen = current if tenant is None else tenant
        kind = type(chosen)
        # No subclass: its values may be equal, and not the same tenant.
        if (kind is not str and kind is not int and not is_uuid(kind)) or (
            tenant is not None and current is not None
        ):
            return self._bind(tenant, override, {})
        key = (kind, chosen)  # 1, True and 1.0 are equal, and not the same
        remembered = self._bindings
        binding = remembered.get(key)
        if binding is None:
            binding = self._bind(tenant, override, {})
            if len(remembered) >= REMEMBERED:
                remembered.clear()
            if len(str(chosen)) <= 100:
                remembered[key] = binding
        return binding

    def _bind(self, tenant: Any, override: bool, settings: Mapping[str, Any]) -> Binding:
        bound = bind_tenant(self.config.tenant, self.name, tenant, override)
        if not settings:
            return Binding(bound + self._ordered, self._patience)
        own = dict(bind_settings(settings))
        if taken := {name.lower() for name, _ in bound}.intersection(map(str.lower, own)):
            raise SettingError(f"{', '.join(taken)} is the tenant's: pass tenant= instead of settings=")
        names = set(map(str.lower, own))
        merged = tuple(pair for pair in self._settings if pair[0].lower() not in names) + tuple(own.items())
        return Binding(bound + _role_last(merged), _patience(merged))

    def admit(self, block: Block) -> None:
        """Wait for the block's turn, where the group has a rate limit.

        :raises RateLimitExceeded: that would take too long.
        :raises DeadlineExceeded: the current deadline has passed already.
        """
        if (limiter := self.limiter) is None:
            return  # since a moment ago
        try:
            limiter.acquire()
        except Error as error:
            if isinstance(error, RateLimitExceeded):
                with self._lock:
                    self._rate_limited += 1  # not the limiter's: a reload may replace that
            describe.mark(error, block)
            raise

    def checkout(self, block: Block, timeout: float | None = None) -> PooledConnection:
        """Lend a working connection to the block, within the timeout (seconds).

        :raises PoolTimeout: none became free in time; names who has them.
        :raises DBOfflineError: none can be opened, since all endpoints are down.
        :raises DBConnectionError: none can be opened, with each endpoint's own reason.
        :raises DeadlineExceeded: the current deadline has passed already.
        """
        now = monotonic()
        deadline = now + (self._timeout if timeout is None else timeout)
        if deadlines.in_use:
            deadline = deadlines.earlier(deadline, self.name)
        conn: PooledConnection | None = None
        discarded = False
        try:
            if self._probe is not None:
                self._maintain(now, deadline)
            while True:
                try:
                    got = self._pool.take(0.0, block.high)
                except NoConnection as none:
                    got = self._queue(none.reason, deadline, now, block.high)
                    now = monotonic()
                if isinstance(got, Slot):
                    try:
                        conn = self._connect_or_wait(got, deadline)
                    except ServerFullError as error:
                        now = self._await_room(error.pause, deadline, block.high)
                        continue
                    now = monotonic()
                    if conn is None:
                        continue
                    break
                reason = self._unfit(got, now, deadline)
                if reason is None:
                    conn = got
                    break
                self._drop(got, reason)
                if reason == "ping cut short":  # its time is up, and that is no evidence against the server
                    raise self._hurried(got.endpoint)
                discarded = True
                now = monotonic()
            block.since = now
            conn.lend_to(block)
            self._lent[conn] = block
            if self._on_checkout is not None:
                self._on_checkout(conn)
        except SettingError as error:
            if conn is not None:
                self._pool.give(conn)  # nothing was sent
            describe.mark(error, block)
            raise
        except HookError as error:
            assert conn is not None
            block.conn = conn.block = None
            self._lent.pop(conn, None)
            self._drop(conn, "on_checkout failed")
            self._pool.refill()
            describe.mark(error, block)
            raise
        except BaseException as error:
            if conn is not None:
                self._lent.pop(conn, None)
                self._drop(conn, "interrupted")
            describe.mark(error, block)
            raise
        if discarded or self._pool.missing:
            self._pool.refill()
        return conn

    def checkin(self, conn: PooledConnection) -> None:
        """Take a connection back: idle and clean it is lent again, else it is closed and replaced."""
        conn.block = None
        try:
            if (block := self._lent.pop(conn, None)) is None:
                if conn.taken_away:
                    conn.close()
                return  # of a parent process, or back already
            block.conn = None
            reason = self._reason_to_close(conn)
            held = conn.used_at - block.since
            recent = conn.uses.recent
            recent.append(held)  # `Tally.add`, without a call
            if len(recent) >= BATCH:
                conn.uses.count()
            if self._at_checkin is not None:
                reason = self._at_checkin(conn, reason)
            if conn.handed_out:
                reason = self._give_on(conn, reason)
            elif reason is None:
                self._pool.give(conn)
            else:
                self._drop(conn, reason)
        except BaseException:
            if conn.lent:  # interrupted before the pool had it
                self._drop(conn, "interrupted")
            raise
        if reason is not None:
            self._pool.refill()
        if held >= self._slow_block:  # last, since a log may be kept in a database
            self._note_slow_block(conn, block, held)

    def _give_on(self, conn: PooledConnection, reason: str | None) -> str | None:
        """Give the session on without the object, which the block may have kept; return why it was closed."""
        heir = succeed(conn) if reason is None else None
        if heir is not None:
            self._pool.give(heir)
            return None
        reason = reason or "not clean"
        self._drop(conn, reason)
        end(conn)
        return reason

    def _reason_to_close(self, conn: PooledConnection) -> str | None:
        now = conn.used_at = monotonic()
        if conn.pgconn.transaction_status != IDLE:
            return "lost" if conn.closed else "not idle"
        if now >= conn.expires_at:
            return "expired"
        if conn.turn.locked():
            conn.cut()  # from another thread's statement, which outlasts the block; or a loop left open
            return "not clean"
        if (conn.touched or conn.altered) and not self._tidied(conn):
            return "not clean"
        if conn.endpoint.state is not State.UP:
            return str(conn.endpoint.state.value)
        if self._barred and conn.endpoint in self._barred:
            return "barred"
        if self._uneven and (reason := self._moves(conn, now)):
            return reason
        if self._always_clean and not conn.local:
            conn.ask_for_cleaning()
        return None

    def _tidied(self, conn: PooledConnection) -> bool:
        if self.config.reset == "never":
            conn.keep_touched()
        return conn.tidy()

    def discard(self, conn: PooledConnection, reason: str) -> None:
        """Take a connection back that is not to be used again."""
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
        self._lent[heir] = self._lent.pop(conn)

    def _maintain(self, now: float, deadline: float) -> None:
        """Do at a checkout what a thread does in threaded mode: probe, and open what is missing."""
        probe = self._probe
        if probe is None:
            return  # threaded: another thread's was the first use, a moment ago
        probe()
        if self._probe is None:
            return  # threaded: that was the first use
        if self._pool.missing and now >= self._refill_at and (slot := self._pool.claim()):
            try:
                self._pool.give(self._connect(slot, deadline))
            except DBConnectionError:  # the endpoint has noted why, and an idle one may serve
                self._refill_at = now + REFILL_AFTER
                self._pool.refill()

    def _first_use(self) -> None:
        """Before the group's first checkout in a process: refuse one where a wait would stop all others."""
        greenlets.check()
        self.on_first_use()
        self._probe = self._later_probe
        if self._probe is not None:
            self._probe()

    def _dropped(self, handler: ref[Any]) -> None:
        """A Handler is gone that did not leave its block: take its connection back."""
        for conn, block in list(self._lent.items()):
            if block.watch is handler:
                block.open = False
                self.discard(conn, "dropped")
                if self.ending:
                    return  # there is nothing to mend
                warnings.warn(
                    f"a Handler of group {self.name!r}, entered at {describe.where(block)}, was dropped "
                    "without leaving its block: its connection was closed and replaced",
                    ResourceWarning,
                    stacklevel=2,
                )

    def _queue(self, reason: str, deadline: float, now: float, high: bool) -> PooledConnection | Slot:
        """Wait for a connection, or for a slot, where nothing was free for that reason."""
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
        """Wait where no server has room for another connection; return the time.

        In threaded mode that is done in the queue, with all others, for a connection that comes back.

        :raises PoolTimeout: there is no time left.
        """
        now = monotonic()
        self._pool.taken -= 1  # that was in vain
        if now >= deadline:
            raise self._exhausted(PoolTimeout, 0.0, high) from None
        if not self._pool.hold_back(pause):
            time.sleep(min(pause, deadline - now))
        return monotonic()

    def _was_closed(self) -> NotInitializedError:
        by = f" by {self.closed_by}" if self.closed_by else ""
        return NotInitializedError(f"group {self.name!r} was closed{by}")

    def _await_left(self, deadline: float, now: float, high: bool) -> PooledConnection | Slot:
        """Wait, in lock-free mode, until a server lets a session go that was left in a commit."""
        while self.left and monotonic() < deadline:
            time.sleep(LEFT_EVERY)
            if self._probe is not None:
                self._probe()
            with suppress(NoConnection):
                return self._pool.take(0.0, high)
        raise self._exhausted(PoolTimeout, deadline - now, high)

    def _unfit(self, conn: PooledConnection, now: float, deadline: float) -> str | None:
        """Return why an idle connection must not be lent, or None: no round trip unless it is due."""
        endpoint = conn.endpoint
        if conn.used_at <= endpoint.condemned_at:
            return "condemned"
        if now >= conn.expires_at:
            return "expired"
        if self._barred and endpoint in self._barred:
            return "barred"
        if conn.poll(0) and not conn.alive():
            return "lost"
        ping_due = now - conn.used_at > self._ping_after or conn.used_at <= endpoint.suspected_at
        if ping_due and (reason := self._ping(conn, deadline)):
            return reason
        # After the ping, since a role that changed is reported with the next message.
        if not self._any_role and conn.pgconn.parameter_status(b"in_hot_standby") != self._wanted:
            return self._unwanted(conn, deadline)
        return None

    def _ping(self, conn: PooledConnection, deadline: float) -> str | None:
        """Return why a connection must not be lent that does not answer, or None."""
        limit = self.config.ping_timeout
        timeout = min(limit, max(deadline - monotonic(), HURRY))
        if conn.ping(timeout):
            return None
        if conn.closed:
            return "lost"
        if timeout < min(limit, CONCLUSIVE):
            return "ping cut short"
        conn.endpoint.condemn(f"no answer to a ping within {timeout:.3g} s")
        return "ping"

    def _unwanted(self, conn: PooledConnection, deadline: float) -> str | None:
        """Return why a connection must not be lent whose server may have another role now, or None.

        Its word is as old as its last message. Where that is not what is known of the server, it is pinged,
        or asked: a server that was promoted, or another connection, may have told otherwise since.
        """
        endpoint, target = conn.endpoint, self.config.target
        if (role := endpoint.heard(conn)) is not None:
            return None if suits(target, role, endpoint.read_only) else "role"
        since = monotonic()
        if conn.asked_role is not None and not endpoint.config.pooler:
            conn.asked_role = None
        elif not endpoint.config.pooler and (reason := self._ping(conn, deadline)):
            return reason
        # A pooler's server has to be asked: for no longer than it would be pinged.
        conn.until = monotonic() + min(self.config.ping_timeout, max(deadline - monotonic(), HURRY))
        try:
            role = endpoint.note_role(conn, since)
        except psycopg.Error:
            return "lost"
        finally:
            conn.until = None
        return None if suits(target, role, endpoint.read_only) else "role"

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
        """Give a connection's slot back at once, whatever error's traceback still holds it.

        Not that of a session which was left in a commit: the server has one process more for it.
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
        """Give back the place of a session that was left in a commit."""
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
        """Give back the places of what was left at a server that is down."""
        for session in [session for session in self.left if session.endpoint is endpoint]:
            self.let_go(session, "the server is down")

    def tolerates(self, conn: PooledConnection) -> bool:
        """Count a commit that did not wait for its standby; return whether a log record of it will do."""
        self.not_replicated += 1
        if self.config.not_replicated != "warn":
            return False
        if (block := conn.block) is not None:
            text, fields = describe.told(self.name, conn.endpoint.label, block, monotonic() - block.since)
            del fields["seconds"]
            events.COMMIT_NOT_REPLICATED(
                "group %s: a commit did not wait for its synchronous standby: %s", self.name, text, **fields
            )
        return True

    # Opening.

    def _connect_or_wait(self, slot: Slot, deadline: float) -> PooledConnection | None:
        """Open a connection in the slot, or return None once there is a primary that had been on its way."""
        try:
            return self._connect(slot, deadline)
        except (DBOfflineError, TargetUnavailableError):
            if not self.writes or not self.await_writer(self, deadline):
                raise
            return None

    def _connect(self, slot: Slot, deadline: float | None = None) -> PooledConnection:
        """Open a connection in the slot, to the first endpoint that answers and suits."""
        budget = monotonic() + self._connect_timeout
        if deadline is not None:
            budget = min(budget, deadline)
        failures: dict[Endpoint, DialError | None] = {}
        spare: PooledConnection | None = None
        generation = self._generation
        try:
            while True:
                endpoint, left = self._reserve(slot, failures)
                if endpoint is None:
                    if spare is None:
                        if self._revived(failures, budget):
                            continue
                        raise self._unreachable(failures)
                    break
                conn = self._dial(endpoint, budget - monotonic(), left, failures)
                if conn is None:
                    continue
                if left > 1 and endpoint.role is Role.PRIMARY and self.config.target == "prefer-standby":
                    spare = conn  # one that was not asked yet may be a standby
                    continue
                if spare is not None:
                    spare.close()
                spare = conn
                break
        except BaseException as error:
            if spare is not None:
                spare.close()
            if isinstance(error, ServerFullError):
                self._pool.hold_back(error.pause)  # first, or the next in the queue would get the slot
            self._pool.free(slot)  # at once: the error's traceback keeps this frame, and the slot, alive
            raise
        finally:
            failures.clear()  # their tracebacks keep this frame, and so the slot, alive in a cycle
        slot.endpoint = spare.endpoint
        spare.keeper, spare.slot, spare.uses = self, slot, self.uses.get(spare.endpoint, Tally())
        if self.config.annotate:
            spare.annotates = True
            spare.own_name = (spare.pgconn.parameter_status(b"application_name") or b"").decode(
                "ascii", "replace"
            )
        if isinstance(spare, TimedConnection) and self.config.slow_query is not None:
            spare.slow_after, spare.on_slow = self.config.slow_query, self.note_slow_statement
        slot.conn = ref(spare)
        if generation != self._generation:
            spare.expires_at = EXPIRED
        if self._barred and spare.endpoint in self._barred and spare.endpoint.outdated:
            spare.sever(0.0)  # since a moment ago, when `_cut` did not find it
        self._opened += 1
        return spare

    def _revived(self, tried: Collection[Endpoint], deadline: float) -> bool:
        """Return whether a server is up again that was down, which a lock-free pool finds out by itself."""
        down = (State.DOWN, State.PROBING)
        lost = [e for e in self.endpoints if e.state in down and e not in tried and e not in self._barred]
        return self._revive is not None and bool(lost) and self._revive(lost, deadline)

    def _dial(
        self, endpoint: Endpoint, budget: float, left: int, failures: dict[Endpoint, DialError | None]
    ) -> PooledConnection | None:
        """Dial one endpoint, within its share of the budget; note why not where it fails."""
        failures[endpoint] = None
        full = self._dial_timeout(endpoint)
        timeout = max(min(budget / left, full), HURRY)
        # A request that has hardly any time left says nothing about the server.
        conclusive = timeout >= 0.9 * min(full / left, CONCLUSIVE)
        look: Look | None = None
        try:
            if endpoint.doubtful and not self.lock_free:
                deadline = monotonic() + timeout
                look = self._look(endpoint, timeout)
                if look is None:
                    if endpoint.state is not State.UP:
                        return None  # that is what the other has found
                    timeout, conclusive = max(deadline - monotonic(), HURRY), False
            began = monotonic()
            conn = dial(
                endpoint, self.config, timeout, conclusive, self._row_factory, self._set_up, self._kind
            )
            took = monotonic() - began
            self.connects.get(endpoint, Tally()).add(took)
            events.CONNECTION_OPENED(
                "group %s: connection to %s opened in %.3f s", self.name, endpoint.label, took,
                group=self.name, endpoint=endpoint.label, seconds=took,
            )  # fmt: skip
        except DialError as error:
            failures[endpoint] = error
            return None
        finally:
            if look is not None:
                endpoint.end_look(look)
        if (
            endpoint.role is not None
            and suits(self.config.target, endpoint.role, endpoint.read_only)
            and endpoint not in self._barred
            and endpoint.state is not State.DRAINING  # as of meanwhile
        ):
            return conn
        conn.close()
        return None

    def _look(self, endpoint: Endpoint, timeout: float) -> Look | None:
        """Be the one who dials an endpoint in doubt, or wait for who does, so that it is dialled once."""
        with self._lock:
            other = endpoint.look()
            if other is None:
                return endpoint.begin_look()
            over = other.over
            del other
        over.wait(timeout)
        return None

    def _set_up(self, conn: PooledConnection) -> None:
        """Do what the group does with each new connection, before it is lent for the first time."""
        if self.config.sqlprepare:
            cursor = psycopg.Cursor(conn)
            cursor.execute('SELECT * FROM "SQLPrepare"."PrepareQueries"()')
            cursor.execute("SELECT name FROM pg_catalog.pg_prepared_statements WHERE from_sql")
            conn.own_statements = tuple(name for (name,) in cursor.fetchall())
        if self._hooks.configure is not None:
            self._hooks.configure(conn)
        if self.config.tenant is not None and self.config.tenant.verify != "off":
            self._verify(conn)

    def _verify(self, conn: PooledConnection) -> None:
        """Refuse, or warn of, a role that row-level security does not hold for."""
        from ..rls import role_findings  # at connect only: a checkout never needs it

        conn.run(BEGIN + set_local(self._settings))  # `role` may be among them
        findings = [finding for finding in role_findings(conn) if finding.severity == "error"]
        conn.rollback()
        if not findings:
            return
        text = "; ".join(f"{finding.message} ({finding.remedy})" for finding in findings)
        if self.config.tenant is not None and self.config.tenant.verify == "error":
            raise UnsafeRoleError(f"tenants of group {self.name!r} are not kept apart: {text}")
        if text != self._warned:
            self._warned = text
            events.GROUP_UNSAFE_ROLE(
                "tenants of group %s are not kept apart: %s", self.name, text, group=self.name, reason=text
            )

    def _reserve(self, slot: Slot, tried: dict[Endpoint, DialError | None]) -> tuple[Endpoint | None, int]:
        """Place the slot on the best endpoint not yet tried; also return how many are left."""
        with self._lock:
            slot.endpoint = None
            best = order(self._candidates(), self.config.target, self.config.balance, monotonic())
            now = monotonic()
            left = [e for e in best if e not in tried and e.full_until <= now]
            # Better one that has answered, and that nobody waits for.
            left.sort(key=lambda endpoint: (endpoint.silent, endpoint.look() is not None))
            if left:
                slot.endpoint = chosen = left[0]
                if chosen.full_pause:  # one asks whether it has room, not all at once
                    chosen.full_until = now + chosen.full_pause
            return slot.endpoint, len(left)

    def _candidates(self) -> list[Candidate]:
        counts = self._counts()
        return [Candidate(e, counts[e]) for e in self._ring if e not in self._barred]

    def _counts(self) -> Counter[Endpoint | None]:
        return Counter(slot.endpoint for slot in self._pool.slots())

    def _dial_timeout(self, endpoint: Endpoint) -> float:
        own = self.config.connect_timeout
        return endpoint.config.connect_timeout if own is None else own

    def connections_to(self, endpoint: Endpoint) -> int:
        """Return how many connections the group has to the endpoint, those being opened included."""
        return self._counts()[endpoint]

    def sockets_to(self, endpoint: Endpoint) -> list[int]:
        """Return the file descriptors of some connections to the endpoint; any may be closed meanwhile."""
        filenos: list[int] = []
        for conn in (*self._pool.lendable(), *list(self._lent)):
            if conn.endpoint is endpoint and len(filenos) < LOOKED_AT:
                with suppress(psycopg.Error):  # it was just closed
                    filenos.append(conn.pgconn.socket)
        return filenos

    def answered(self, endpoint: Endpoint, since: float) -> bool:
        """Return whether a connection to the endpoint was known to work after that moment."""
        conns = [slot.conn() for slot in self._pool.slots() if slot.conn is not None]
        return any(conn and conn.endpoint is endpoint and conn.used_at > since for conn in conns)

    def connect_apart(self) -> psycopg.Connection[Any]:
        """Open a connection that belongs to no pool, to the first endpoint that admits one.

        :raises DBConnectionError: no endpoint is up, or none of several admits one.
        :raises psycopg.Error: the only endpoint does not.
        :raises CredentialError: its user and password could not be had.
        """
        best = order(self._candidates(), self.config.target, self.config.balance, monotonic())
        failures: dict[Endpoint, DialError | None] = {}
        for endpoint in best:
            try:
                return connect(endpoint, self.config)
            except (psycopg.OperationalError, CredentialError) as error:
                if len(best) == 1:
                    raise
                failures[endpoint] = failure = DialError(endpoint, one_line(error), down=False)
                failure.__cause__ = error
        raise self._unreachable(failures)

    # What endpoints report.

    def drop_idle(self, endpoint: Endpoint, reason: str) -> None:
        """Close the idle connections to an endpoint that is not to be used; others take their place."""
        for conn in self._pool.remove(lambda conn: conn.endpoint is endpoint):
            self._drop(conn, reason)
        self._pool.refill()

    @property
    def writes(self) -> bool:
        """Whether the group wants servers that take writes."""
        return self.config.writes

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

    def refusal(self, endpoint: Endpoint, role: Role | None) -> str | None:
        """Return why the group would not use an endpoint that is up and has this role, or None."""
        if endpoint.state is State.DRAINING:
            return "draining"
        if endpoint in self._barred:
            if endpoint.outdated:
                return f"is on timeline {endpoint.timeline}, another was promoted since"
            return f"is {endpoint.lag} behind, more than max_lag"
        if role is None or suits(self.config.target, role, endpoint.read_only):
            return None
        return f"is a {role.value}, the target is {self.config.target}"

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

    # Change.

    def apply(self, config: GroupConfig, endpoints: Sequence[Endpoint], row_factory: Any) -> None:
        """Take over a changed configuration; connections that fit it are kept."""
        old, before = self.config, self.endpoints
        self._take_over(config, endpoints, row_factory)
        if old.rate_limit != config.rate_limit:
            self.limiter = self._make_limiter()
        if (old.target, old.max_lag) == (config.target, config.max_lag):
            self._barred = self._barred.intersection(self.endpoints)
        else:
            self._barred = {e for e in self.endpoints if self.writes and e.outdated}
        if any(getattr(old, key) != getattr(config, key) for key in LASTING) or (
            config.tenant is not None and old.settings != config.settings  # the role may be among them
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
        self._uneven = True  # what is in use still has to follow
        self._pool.refill()

    def expire(self, unwanted: Callable[[PooledConnection], bool] = lambda conn: True) -> None:
        """Replace the connections that there are: idle ones now, those in use when their blocks end."""
        self._generation += 1  # first: one that is being opened is either seen below, or sees this
        for slot in self._pool.slots():
            conn = slot.conn() if slot.conn is not None else None
            if conn is not None and unwanted(conn):
                conn.expires_at = EXPIRED
        for conn in self._pool.remove(lambda conn: conn.expires_at == EXPIRED):
            self._drop(conn, "expired")
        self._pool.refill()

    # Life.

    def open(self, *, needed: bool = False) -> None:
        """Open `min_size` connections, one at least, in the caller.

        :param needed: whether the group has to have a server by now.
        :raises DBConnectionError: not one could be opened, and that will not pass by itself.
        """
        while self._pool.size < max(1, self.config.min_size) and (slot := self._pool.claim()):
            try:
                conn = self._connect(slot)
            except DBConnectionError as error:
                if not self._pool.idle:
                    if needed or error.refused:
                        raise
                    events.GROUP_UNSERVED(
                        "group %s starts without a server: %s", self.name, error,
                        group=self.name, reason=one_line(error),
                    )  # fmt: skip
                    return
                events.GROUP_SHORT(
                    "group %s starts with %d of %d connections: %s",
                    self.name, self._pool.idle, self.config.min_size, error,
                    group=self.name, reason=one_line(error),
                )  # fmt: skip
                return
            self._pool.give(conn)

    def busy(self, but: int = 0) -> bool:
        """Tell whether a block has a connection, or gets one, of any thread but that one."""
        pool = self._pool
        return pool.waiting > 0 or pool.size - pool.idle - len(self.left) > self.held_by(but)

    def held_by(self, thread: int) -> int:
        """Return how many connections blocks of the thread have."""
        return sum(block.thread == thread for block in self._blocks())

    def close(self, timeout: float) -> None:
        """Close the pool; connections in use are closed as they come back."""
        self._pool.close(timeout)

    def lent(self, but: int = 0) -> list[PooledConnection]:
        """Return the connections that are in use, but those of that thread."""
        return [conn for conn, block in self.held() if block.thread != but]

    def abandon(self) -> None:
        """Forget the parent's connections in a forked child, without touching them."""
        self._pool.abandon()
        for conn, block in self._lent.items():
            conn.abandon()
            block.open = False
        self._lent = {}

    def status(self) -> GroupStatus:
        """Return a snapshot."""
        from ..stats import GroupStatus, Histogram  # no block needs it

        pool, counts = self._pool, self._counts()
        waits = Histogram.of([self._waits]).count
        return GroupStatus(
            name=self.name,
            size=pool.size,
            idle=pool.idle,
            in_use=len(self._lent),
            waiting=pool.waiting,
            min_size=self.config.min_size,
            max_size=self.config.connection_count,
            connections={endpoint.label: counts[endpoint] for endpoint in self.endpoints},
            checkouts=pool.taken,
            timeouts=self._timeouts,
            opened=self._opened,
            discarded=dict(self._discarded),
            holders=self._holders(),
            waits=waits,
            retries=self.retries,
            failovers=self._past_failovers + sum(endpoint.failovers for endpoint in self.endpoints),
            rate_limited=self._rate_limited,
            leaks=self.leaks,
            overdue=self.overdue,
            slow_blocks=self.slow_blocks,
            slow_statements=self.slow_statements,
            not_replicated=self.not_replicated,
            left=len(self.left),
            wait=Histogram.of([self._waits], max(0, pool.taken - waits)),
            use={endpoint.label: Histogram.of([tally]) for endpoint, tally in self.uses.items()},
            connect={endpoint.label: Histogram.of([tally]) for endpoint, tally in self.connects.items()},
        )

    # What is told of blocks.

    def held(self) -> list[tuple[PooledConnection, Block]]:
        """Return the connections in use with their blocks."""
        return list(self._lent.items())

    def note_retry(self, block: Block | None, error: Error) -> None:
        """Count a statement that is sent again."""
        self.retries += 1
        events.STATEMENT_RETRIED(
            "group %s: statement sent again: %s", self.name, error, group=self.name,
            correlation_id=None if block is None else block.correlation_id,
            reason=one_line(error), sqlstate=getattr(error, "sqlstate", None),
        )  # fmt: skip

    def note_leak(self, conn: PooledConnection, block: Block, seconds: float) -> Warn:
        """Count a block that has its connection for longer than `leak_after`; return what warns of it."""
        self.leaks += 1
        text, fields = describe.told(self.name, conn.endpoint.label, block, seconds)
        return lambda: events.BLOCK_LEAKED(
            "group %s: a connection is not given back: %s", self.name, text, **fields
        )

    def _note_slow_block(self, conn: PooledConnection, block: Block, seconds: float) -> None:
        self.slow_blocks += 1
        text, fields = describe.told(self.name, conn.endpoint.label, block, seconds)
        events.BLOCK_SLOW("group %s: slow block: %s", self.name, text, **fields)

    def note_slow_statement(self, conn: PooledConnection, statement: Any, seconds: float) -> None:
        """Log a statement that took longer than `slow_query`."""
        block = conn.block
        if block is None:
            return  # not a block's, but the set-up of a connection
        self.slow_statements += 1
        _, fields = describe.told(self.name, conn.endpoint.label, block, seconds)
        fields["statement"] = text = text_of(statement)
        events.STATEMENT_SLOW(
            "group %s: slow statement: %.3f s, from %s: %s", self.name, seconds, describe.where(block), text,
            **fields,
        )  # fmt: skip

    def take_away(self, conn: PooledConnection, block: Block, deadline: float) -> Warn | None:
        """Take the connection from a block that has it for longer than `max_hold`, in any thread.

        What runs is cancelled within the deadline, but what may be committing. The connection is not closed
        but cut: its own thread, which may be waiting for it, closes it. Returns what warns of it; None where
        the block has just given it back.
        """
        if self._lent.get(conn) is not block or (owner := self._lent.pop(conn, None)) is None:
            return None
        if owner is not block:  # given back and lent again, between the two
            self._lent[conn] = owner
            if conn.block is not owner and self._lent.pop(conn, None) is not None:  # and given back again
                self._drop(conn, "interrupted")
            return None
        # Whoever took it out of `_lent` has it: the block's own end finds nothing to give back.
        conn.taken_away = True
        seconds = monotonic() - block.since
        self.overdue += 1
        self._discarded["max_hold"] += 1
        conn.uses.add(seconds)
        text, fields = describe.told(self.name, conn.endpoint.label, block, seconds)
        conn.sever(deadline)
        if conn.block is None:
            conn.close()
        slot, conn.slot = conn.slot, None
        if slot is not None:
            self._free(conn, slot)
        self._pool.refill()
        return lambda: events.BLOCK_OVERDUE("group %s: connection taken away: %s", self.name, text, **fields)

    # Evidence for errors.

    def _mine_alone(self, high: bool) -> bool:
        """Tell whether every connection is held by this thread, so that waiting would be in vain."""
        blocks, me = self._blocks(), threading.get_ident()
        limit = self.config.connection_count - (0 if high else self.config.reserved)
        return len(blocks) >= limit and all(block.thread == me for block in blocks)

    def _blocks(self) -> list[Block]:
        return list(self._lent.values())

    def long_holders(self) -> tuple[str, ...]:
        """Return who has had a connection for `leak_after`, or for a second where there is none."""
        return self._holders(self.config.leak_after or LONG)

    def _holders(self, least: float = 0.0) -> tuple[str, ...]:
        now, names = monotonic(), describe.thread_names()
        return tuple(
            describe.describe(block, now - block.since, names)
            for block in self._blocks()
            if now - block.since >= least
        )

    def _exhausted(self, kind: type[PoolTimeout], waited: float, high: bool) -> PoolTimeout:
        self._timeouts += 1
        pool, holders, limit = self._pool, self._holders(), self.config.connection_count
        what = {
            PoolExhausted: "all connections are held by this thread, so waiting is in vain",
            TooManyWaiting: f"{pool.waiting} requests wait already (max_waiting)",
        }.get(kind, f"no connection became free within {waited:g} s")
        errors = {e.label: e.last_error for e in self.endpoints if e.last_error}
        full = "; ".join(f"{endpoint.label} is full: {endpoint.last_error}" for endpoint in self._full())
        left = f", {len(self.left)} left in a commit" if self.left else ""
        share = "" if high or not self.config.reserved else f" ({self.config.reserved} for high priority)"
        return kind(
            f"group {self.name!r}: {what}; {len(holders)} of {limit}{share} in use, {pool.idle} idle, "
            f"{pool.waiting} waiting{left}; held by "
            + ("; ".join(holders) or "nobody")
            + (f"; {full}" if full else ""),
            group=self.name,
            endpoints=errors,
            in_use=len(holders),
            idle=pool.idle,
            waiting=pool.waiting,
            holders=holders,
        )

    def _hurried(self, endpoint: Endpoint) -> DBConnectionError:
        text = "no answer to a ping in the time that was left"
        self._pool.refill()
        return DBConnectionError(
            f"group {self.name!r}: {endpoint.label}: {text}",
            group=self.name,
            endpoints={endpoint.label: text},
        )

    def _full(self) -> list[Endpoint]:
        """Return the endpoints that would do, if they had room for another connection."""
        return [
            endpoint
            for endpoint in self.endpoints
            if endpoint.full_pause
            and endpoint.state is State.UP
            and endpoint not in self._barred
            and (endpoint.role is None or suits(self.config.target, endpoint.role, endpoint.read_only))
        ]

    def _unreachable(self, failures: dict[Endpoint, DialError | None]) -> DBConnectionError:
        """Make the error for a group none of whose endpoints could be connected to."""
        evidence: dict[str, str] = {}
        full = self._full()
        for endpoint in self.endpoints:
            failure = failures.get(endpoint)
            if endpoint in full:
                evidence[endpoint.label] = f"is full: {endpoint.last_error}"
            elif failure is not None:
                evidence[endpoint.label] = str(failure)
            elif endpoint.state is State.DRAINING:
                evidence[endpoint.label] = "draining: taken out of use by Connection.drain"
            elif endpoint in self._barred and endpoint.outdated:
                evidence[endpoint.label] = f"is on timeline {endpoint.timeline}, another was promoted since"
            elif endpoint in self._barred:
                evidence[endpoint.label] = f"is {endpoint.lag} behind, more than max_lag"
            elif endpoint.state is State.UP and endpoint.role is not None:
                role = endpoint.role.value + (" (read only)" if endpoint.read_only else "")
                evidence[endpoint.label] = f"is a {role}, the target is {self.config.target}"
            else:
                evidence[endpoint.label] = f"{endpoint.state.value}: {endpoint.last_error or 'not asked yet'}"
        dialled = [failure for failure in failures.values() if failure is not None]
        up = [endpoint for endpoint in self.endpoints if endpoint.state is State.UP]
        kind: type[DBConnectionError]
        kind, what = DBOfflineError, "every endpoint is down"
        if full:
            kind, what = ServerFullError, "no server has room for another connection"
        elif up and any(not failure.down for failure in dialled):
            kind, what = DBConnectionError, "no endpoint accepts a connection"
        elif up:
            kind, what = TargetUnavailableError, f"no endpoint that is up is {self.config.target}"
        texts = "; ".join(f"{label}: {text}" for label, text in evidence.items())
        error = kind(
            f"group {self.name!r}: {what}: {texts}",
            group=self.name,
            endpoints=evidence,
        )
        error.refused = any(failure.refused for failure in dialled)
        down = next((e for e in self.endpoints if e.state is not State.UP and e.last_error), None)
        if isinstance(error, ServerFullError):
            error.pause = max(min(endpoint.full_until for endpoint in full) - monotonic(), HURRY / 10)
        if dialled:
            error.__cause__ = dialled[0].__cause__
        elif down is not None:  # what the prober found, which has raised nothing
            error.__cause__ = psycopg.OperationalError(f"{down.label}: {down.last_error}")
        return error

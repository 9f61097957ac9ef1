"""The configuration and the counters of a group, and the settings that its blocks bind."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from time import monotonic
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import psycopg

from .._request import correlation as tracing
from .._request.tenant import Bound, bind_settings, bind_tenant, current_tenant, is_uuid, milliseconds
from .._servers.balance import Candidate
from .._servers.endpoint import Endpoint
from .._session.block import UNBOUND, Binding, Block
from .._session.commands import INHERIT_PATIENCE
from .._session.connection import PooledConnection
from .._session.slow_statements import TimedConnection
from .._util import bounds
from .._util.durations import Tally
from ..errors import SettingError
from .hooks import Hooks
from .left_sessions import LeftSession
from .pool import Pool
from .rate_limit import RateLimiter

if TYPE_CHECKING:
    from .._config.model import GroupConfig


REMEMBERED = 1000
"""The number of tenants whose binding a group remembers."""

SAMPLED_SOCKETS = 5
"""The number of sockets per endpoint that are sampled for the round-trip time."""


def _role_last(settings: Bound) -> Bound:
    """Return the settings with the role last, since the role may not be allowed to set the others."""
    return tuple(sorted(settings, key=lambda pair: pair[0].lower() in ("role", "session_authorization")))


def _patience(settings: Bound) -> float | None:
    """Return the seconds that the client waits for a statement under these settings."""
    for name, value in settings:
        if name.lower() == "statement_timeout" and (timeout := milliseconds(value)) is not None:
            return timeout / 1000 + bounds.CLIENT_GRACE if timeout else None
    return INHERIT_PATIENCE


class Pause(NamedTuple):
    """The source of a pause, and its end on the clock of `monotonic`."""

    by: str
    until: float


class Beat:
    """When there is work to do for the background, on the clock of `monotonic`."""

    due_at = 0.0


class ConfiguredGroup:
    """The configured part of a group: plain attributes, which a reload replaces one by one."""

    # All attributes of a group, in each of its layers: on an instance without a dictionary Python finds
    # methods at once, however many groups a process has.
    __slots__ = (
        "_always_clean", "_any_role", "_at_checkin", "_bindings", "_borrowed", "_connect_timeout",
        "_discarded", "_excluded", "_generation", "_give", "_grab", "_hooks", "_kind", "_later_probe",
        "_lent", "_lock", "_loose", "_move_at", "_on_checkout", "_opened", "_ordered", "_past_failovers",
        "_patience", "_pause", "_ping_after", "_plain", "_pool", "_probe", "_rate_limited", "_refill_at",
        "_revive", "_ring", "_row_factory", "_settings", "_slow_block", "_timeout", "_timeouts", "_uneven",
        "_waits", "_wanted", "_warned", "_writer", "await_writer", "beat", "closed_by", "config", "connects",
        "ending", "endpoints", "fresh_from_primary", "fresh_refused", "fresh_waits", "guards_failed",
        "guards_passed", "held_back", "leaks", "left", "limiter", "lock_free", "look_sooner", "manual",
        "name", "nested", "not_replicated", "on_closed", "on_drop", "on_first_use", "on_left", "overdue",
        "retired", "retries", "slow_blocks", "slow_statements", "used", "uses",
    )  # fmt: skip

    _pool: Pool
    _probe: Callable[[], object] | None
    """Called at the start of the first checkout; of each one in lock-free mode, or while the group is paused.

    It returns whether the block may have to be held.
    """

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
        self.name = config.name if name is None else name
        """Its name in logs, errors and metrics: outside the default set it includes the set's name."""
        self.retired = self.used = False
        """Whether it is no longer in use under its name: a Handler looks for the group that is."""
        self.lock_free = lock_free
        self._later_probe = probe
        self.beat = Beat()
        """Says, in lock-free mode, when a checkout has to call its probe."""
        self._revive = revive
        self._lock: AbstractContextManager[Any] = nullcontext() if lock_free else threading.RLock()
        self._lent: dict[PooledConnection, Block] = {}
        self._loose: dict[ref[PooledConnection], tuple[CodeType, int]] = {}
        """Connections in use that only their borrowers refer to, and the places that took them."""
        self._borrowed: set[PooledConnection] = set()
        """Connections lent to the pool itself for a status query."""
        self._discarded: Counter[str] = Counter()
        self._opened = 0
        self._timeouts = self._rate_limited = self._past_failovers = 0
        self.retries = self.leaks = self.overdue = self.slow_blocks = self.slow_statements = 0
        self.not_replicated = 0
        self.guards_passed = self.guards_failed = 0
        self.fresh_waits = self.fresh_from_primary = self.fresh_refused = 0
        self.left: list[LeftSession] = []
        """Sessions left in a commit."""
        self._waits = Tally()
        """Waiting times of checkouts that had to queue; the others took no time."""
        self.uses: dict[Endpoint, Tally] = {}
        self.connects: dict[Endpoint, Tally] = {}
        self._pause: Pause | None = None
        self.held_back: list[object] = []
        """One entry for each block that waits for the end of a pause."""
        self.closed_by = ""
        """The cause of the closing of the pools, for error messages."""
        self.ending = False
        """Whether the interpreter is about to exit."""
        self._uneven = False
        self._warned = ""
        self._excluded: set[Endpoint] = set()
        """Endpoints that are up but must not be used: too far behind, or on an older timeline."""
        self._writer: Endpoint | None = None
        """The server that takes the writes of the group, if `on_failover` is set."""
        self._generation = 0
        """The number of calls of `expire`: a connection that was being opened meanwhile is outdated too."""
        self._move_at = 0.0
        self._refill_at = 0.0
        self.on_first_use: Callable[[], None] = lambda: None
        self.look_sooner: Callable[[Collection[Endpoint]], None] = lambda endpoints: None
        """Has the servers asked now whether they are up, and for their roles: a connection waits for one."""
        self.await_writer: Callable[[Any, float], bool] = lambda group, deadline: False
        """Waits until the deadline for a primary to be promoted; returns whether one is available."""
        self.on_closed: Callable[[], None] = lambda: None
        """Is called before a block that waits is refused, since the pools were closed."""
        self.on_left: Callable[[], None] = lambda: None
        self.config = config
        self.endpoints: tuple[Endpoint, ...] = ()
        self.limiter = self._make_limiter()
        self._take_over(config, endpoints, row_factory)

    def _take_over(self, config: GroupConfig, endpoints: Sequence[Endpoint], row_factory: Any) -> None:
        """Set the attributes that depend on the configuration; other threads see them change one by one."""
        gone = set(self.endpoints).difference(endpoints)
        self._past_failovers += sum(endpoint.failovers for endpoint in gone)
        self.uses = {endpoint: self.uses.get(endpoint, Tally()) for endpoint in endpoints}
        self.connects = {endpoint: self.connects.get(endpoint, Tally()) for endpoint in endpoints}
        self.config = config
        self.manual: bool = not config.autocommit
        self.endpoints = tuple(endpoints)
        # On a tie, processes with few connections each start at different endpoints.
        first = random.randrange(len(self.endpoints))
        self._ring = self.endpoints[first:] + self.endpoints[:first]
        self._row_factory = row_factory
        self._hooks = Hooks(config)
        # The values that a checkout reads, as plain attributes.
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
        # Must be last: a block that still read the old settings stores them in the old dict.
        self._bindings: dict[tuple[type, Any], Binding] = {}
        """The bindings of known tenants, so that a repeated one costs one lookup."""

    def _make_limiter(self) -> RateLimiter | None:
        limit = self.config.rate_limit
        return RateLimiter(limit, self.name, lock_free=self.lock_free) if limit else None

    def __repr__(self) -> str:
        pool = self._pool
        return f"<Group {self.name!r} {len(self._lent)} in use, {pool.idle} idle, {pool.waiting} waiting>"

    def bind(self, tenant: Any, override: bool, settings: Mapping[str, Any] | None) -> Binding:
        """Return the binding of a block: its tenant, its settings and those of the group.

        :raises TenantRequiredError: the group requires a tenant and none is set.
        :raises TenantConflictError: another tenant is the current one.
        :raises SettingError: a value or a name cannot be bound.
        """
        if settings or override:
            return self._bind(tenant, override, settings or {})
        if self._plain and tenant is None:
            return UNBOUND
        current = current_tenant()
        chosen = current if tenant is None else tenant
        kind = type(chosen)
        # Not a subclass: its values may be equal without being the same tenant.
        if (kind is not str and kind is not int and chosen is not None and not is_uuid(kind)) or (
            tenant is not None and current is not None
        ):
            return self._bind(tenant, override, {})
        key = (kind, chosen)  # 1, True and 1.0 are equal but not the same
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

    @property
    def writes(self) -> bool:
        """Whether the group needs servers that take writes."""
        return self.config.writes

    def _candidates(self) -> list[Candidate]:
        counts = self._counts()
        return [Candidate(e, counts[e]) for e in self._ring if e not in self._excluded]

    def _counts(self) -> Counter[Endpoint | None]:
        return Counter(slot.endpoint for slot in self._pool.slots())

    def doubt_roles(self, but: Endpoint | None = None) -> None:
        """Have a block that finds no server of the group's target ask all once more, except the given one."""
        now = monotonic()
        for endpoint in self.endpoints:
            if endpoint is not but:
                endpoint.role_doubted_at = now

    def _dial_timeout(self, endpoint: Endpoint) -> float:
        own = self.config.connect_timeout
        return endpoint.config.connect_timeout if own is None else own

    def connections_to(self, endpoint: Endpoint) -> int:
        """Return the number of connections to the endpoint, including those being opened."""
        return self._counts()[endpoint]

    def sockets_to(self, endpoint: Endpoint) -> list[int]:
        """Return file descriptors of some connections to the endpoint; they may be closed meanwhile."""
        filenos: list[int] = []
        for conn in (*self._pool.lendable(), *list(self._lent)):
            if conn.endpoint is endpoint and len(filenos) < SAMPLED_SOCKETS:
                with suppress(psycopg.Error):  # it was just closed
                    filenos.append(conn.pgconn.socket)
        return filenos

    def answered(self, endpoint: Endpoint, since: float) -> bool:
        """Return whether a connection to the endpoint has worked since then."""
        conns = [slot.conn() for slot in self._pool.slots() if slot.conn is not None]
        return any(conn and conn.endpoint is endpoint and conn.used_at > since for conn in conns)

    def held(self) -> list[tuple[PooledConnection, Block]]:
        """Return the connections in use with their blocks."""
        held = list(self._lent.items())
        if self._loose:
            loose = [conn for found in list(self._loose) if (conn := found()) is not None]
            held += [(conn, conn.block) for conn in loose if conn.block is not None]
        return held

    def _blocks(self) -> list[Block]:
        return [block for _, block in self.held()]

    def held_by(self, thread: int) -> int:
        """Return the number of connections that the thread's blocks hold."""
        return sum(block.thread == thread for block in self._blocks())

    def busy(self, but: int = 0) -> bool:
        """Return whether a block of any other thread has or is getting a connection."""
        pool = self._pool
        return pool.waiting > 0 or pool.size - pool.idle - len(self.left) > self.held_by(but)

    def lent(self, but: int = 0) -> list[PooledConnection]:
        """Return the connections in use by other threads."""
        return [conn for conn, block in self.held() if block.thread != but]

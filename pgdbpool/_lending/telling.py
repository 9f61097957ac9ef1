"""The reports of a group: its status, log records of blocks, and errors with their evidence."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg

from .._servers.balance import suits
from .._servers.endpoint import DialError, Endpoint, Role, State
from .._session import describe
from .._session.block import Block
from .._session.connection import PooledConnection
from .._session.statement_text import text_of
from .._util import bounds
from .._util import log_events as events
from ..errors import (
    DBConnectionError,
    DBOfflineError,
    Error,
    NotInitializedError,
    PoolExhausted,
    PoolTimeout,
    ServerFullError,
    TargetUnavailableError,
    TooManyWaiting,
    one_line,
)
from .configured import ConfiguredGroup

if TYPE_CHECKING:
    from ..stats import GroupStatus


Warn = Callable[[], None]
"""Logs a warning. A log handler may hang or need a connection, so the caller must call it last."""

LONG = 1.0
"""Seconds after which the status page lists a block as a holder, if `leak_after` is not set."""


class TellingGroup(ConfiguredGroup):
    """A group that reports the holders of its connections, and why none is available."""

    __slots__ = ()

    def status(self) -> GroupStatus:
        """Return a snapshot."""
        from ..stats import GroupStatus, Histogram  # no block needs it

        pool, counts = self._pool, self._counts()
        waits = Histogram.of([self._waits]).count
        return GroupStatus(
            name=self.name,
            size=pool.size,
            idle=pool.idle,
            in_use=len(self._lent) + len(self._loose),
            waiting=pool.waiting + len(self.held_back),
            target=self.config.target,
            paused=self.paused_by,
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
            guards_passed=self.guards_passed,
            guards_failed=self.guards_failed,
            fresh_waits=self.fresh_waits,
            fresh_from_primary=self.fresh_from_primary,
            fresh_refused=self.fresh_refused,
            left=len(self.left),
            wait=Histogram.of([self._waits], max(0, pool.taken - waits)),
            use={endpoint.label: Histogram.of([tally]) for endpoint, tally in self.uses.items()},
            connect={endpoint.label: Histogram.of([tally]) for endpoint, tally in self.connects.items()},
        )

    def listing(self) -> list[dict[str, Any]]:
        """Return a line for each connection that is open: its server process, and its block if it has one."""
        now, names = monotonic(), describe.thread_names()
        conns = [slot.conn() for slot in self._pool.slots() if slot.conn is not None]
        return [
            _line(conn, self._lent.get(conn) or conn.block, now, names) for conn in conns if conn is not None
        ]

    @property
    def paused_by(self) -> str | None:
        """The source of the group's pause; None if it is not paused."""
        pause = self._pause
        return pause.by if pause is not None and monotonic() < pause.until else None

    def discarded(self, reason: str) -> int:
        """Return the number of connections that the pool has closed for the reason."""
        return self._discarded[reason]

    def note_retry(self, block: Block | None, error: Error) -> None:
        """Count and log a statement that is sent again."""
        self.retries += 1
        events.STATEMENT_RETRIED(
            "group %s: statement sent again: %s", self.name, error, group=self.name,
            correlation_id=None if block is None else block.correlation_id,
            reason=one_line(error), sqlstate=getattr(error, "sqlstate", None),
        )  # fmt: skip

    def note_leak(self, conn: PooledConnection, block: Block, seconds: float) -> Warn:
        """Count a block that has held its connection for `leak_after`; return the warning to log."""
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
            return  # sent by the set-up of a connection, not by a block
        self.slow_statements += 1
        _, fields = describe.told(self.name, conn.endpoint.label, block, seconds)
        fields["statement"] = text = text_of(statement)
        events.STATEMENT_SLOW(
            "group %s: slow statement: %.3f s, from %s: %s", self.name, seconds, describe.where(block), text,
            **fields,
        )  # fmt: skip

    def note_guard(self, conn: PooledConnection, passed: bool) -> None:
        """Count a guard."""
        if passed:
            self.guards_passed += 1
        else:
            self.guards_failed += 1

    def tolerates(self, conn: PooledConnection) -> bool:
        """Count a commit that did not wait for its standby; return whether logging it suffices."""
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

    def _mine_alone(self, high: bool) -> bool:
        """Return whether this thread holds every connection, so that waiting would be in vain."""
        blocks, me = self._blocks(), threading.get_ident()
        limit = self.config.connection_count - (0 if high else self.config.reserved)
        return len(blocks) >= limit and all(block.thread == me for block in blocks)

    def long_holders(self) -> tuple[str, ...]:
        """Return the blocks that have held a connection for a second, or for a shorter `leak_after`."""
        return self._holders(min(self.config.leak_after or LONG, LONG))

    def _holders(self, least: float = 0.0) -> tuple[str, ...]:
        now, names = monotonic(), describe.thread_names()
        return tuple(
            describe.describe(block, now - block.since, names)
            for block in self._blocks()
            if now - block.since >= least
        )

    def _was_closed(self) -> NotInitializedError:
        self.on_closed()
        by = f" by {self.closed_by}" if self.closed_by else ""
        return NotInitializedError(f"group {self.name!r} was closed{by}")

    def _exhausted(self, kind: type[PoolTimeout], waited: float, high: bool) -> PoolTimeout:
        self._timeouts += 1
        pool, holders, limit = self._pool, self._holders(), self.config.connection_count
        waited = round(max(waited, 0.0), 3)  # below 0 if the deadline passed on the way
        waiting = pool.waiting + len(self.held_back)
        what = {
            PoolExhausted: "all connections are held by this thread, so waiting is in vain",
            TooManyWaiting: f"{waiting} requests wait already (max_waiting)",
        }.get(kind, f"no connection became free within {waited:g} s")
        errors = {e.label: e.last_error for e in self.endpoints if e.last_error}
        full = "; ".join(f"{endpoint.label} is full: {endpoint.last_error}" for endpoint in self._full())
        if self._pause is not None:
            late = f"not resumed within {waited:g} s" if kind is PoolTimeout else what
            what = f"paused by {self._pause.by}: {late}"
        left = f", {len(self.left)} left in a commit" if self.left else ""
        share = "" if high or not self.config.reserved else f" ({self.config.reserved} for high priority)"
        return kind(
            f"group {self.name!r}: {what}; {len(holders)} of {limit}{share} in use, {pool.idle} idle, "
            f"{waiting} waiting{left}; held by "
            + ("; ".join(holders) or "nobody")
            + (f"; {full}" if full else ""),
            group=self.name,
            endpoints=errors,
            in_use=len(holders),
            idle=pool.idle,
            waiting=waiting,
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

    def refusal(self, endpoint: Endpoint, role: Role | None) -> str | None:
        """Return why the group does not use an endpoint that is up and has this role, or None."""
        if endpoint.state is State.DRAINING:
            return "draining"
        if endpoint in self._excluded:
            return _why_barred(endpoint)
        if role is None or suits(self.config.target, role, endpoint.read_only):
            return None
        return f"is a {role.value}, the target is {self.config.target}"

    def _full(self) -> list[Endpoint]:
        """Return the suitable endpoints that have no room for another connection."""
        return [
            endpoint
            for endpoint in self.endpoints
            if endpoint.full_pause
            and endpoint.state is State.UP
            and endpoint not in self._excluded
            and (endpoint.role is None or suits(self.config.target, endpoint.role, endpoint.read_only))
        ]

    def _unreachable(self, failures: dict[Endpoint, DialError | None]) -> DBConnectionError:
        """Return the error for a group that could not connect to any endpoint."""
        full = self._full()
        evidence = {e.label: self._why_not(e, failures.get(e), e in full) for e in self.endpoints}
        dialled = [failure for failure in failures.values() if failure is not None]
        kind, what = self._what_is_missing(full, dialled)
        texts = "; ".join(f"{label}: {text}" for label, text in evidence.items())
        error = kind(f"group {self.name!r}: {what}: {texts}", group=self.name, endpoints=evidence)
        error.refused = any(failure.refused for failure in dialled)
        if isinstance(error, ServerFullError):
            error.pause = max(
                min(endpoint.full_until for endpoint in full) - monotonic(), bounds.MIN_TIMEOUT / 10
            )
        down = next((e for e in self.endpoints if e.state is not State.UP and e.last_error), None)
        if dialled:
            error.__cause__ = dialled[0].__cause__
        elif down is not None:  # found by the prober, which raises nothing
            error.__cause__ = psycopg.OperationalError(f"{down.label}: {down.last_error}")
        return error

    def _why_not(self, endpoint: Endpoint, failure: DialError | None, full: bool) -> str:
        """Return why the endpoint gave no connection."""
        if full:
            return f"is full: {endpoint.last_error}"
        if failure is not None:
            return str(failure)
        if endpoint.state is State.DRAINING:
            return "draining: taken out of use by Connection.drain"
        if endpoint in self._excluded:
            return _why_barred(endpoint)
        if endpoint.state is State.UP and endpoint.role is not None:
            role = endpoint.role.value + (" (read only)" if endpoint.read_only else "")
            return f"is a {role}, the target is {self.config.target}"
        return f"{endpoint.state.value}: {endpoint.last_error or 'not asked yet'}"

    def _what_is_missing(
        self, full: list[Endpoint], dialled: list[DialError]
    ) -> tuple[type[DBConnectionError], str]:
        """Return the error class, and the text about the lack that all endpoints share."""
        up = any(endpoint.state is State.UP for endpoint in self.endpoints)
        if full:
            return ServerFullError, "no server has room for another connection"
        if up and any(not failure.down for failure in dialled):
            return DBConnectionError, "no endpoint accepts a connection"
        if up:
            return TargetUnavailableError, f"no endpoint that is up is {self.config.target}"
        return DBOfflineError, "every endpoint is down"


def _line(
    conn: PooledConnection, block: Block | None, now: float, names: dict[int | None, str]
) -> dict[str, Any]:
    pid = None
    with suppress(psycopg.Error):  # it has just been closed
        pid = conn.pgconn.backend_pid
    line = {"endpoint": conn.endpoint.label, "server_pid": pid}
    if block is None:
        return {**line, "state": "idle", "seconds": now - conn.used_at}
    return {**line, "state": "in use", "seconds": now - block.since, **describe.brief(block, names)}


def _why_barred(endpoint: Endpoint) -> str:
    """Return why an endpoint that is up must not be used."""
    if endpoint.outdated:
        return f"is on timeline {endpoint.timeline}, another was promoted since"
    return f"is {endpoint.lag} behind, more than max_lag"

"""How a group opens connections: to the first suitable server that answers."""

from __future__ import annotations

from collections.abc import Collection
from time import monotonic
from typing import Any

import psycopg

from .._servers.balance import order, suits
from .._servers.endpoint import DialError, DialInProgress, Endpoint, Role, State
from .._session.commands import BEGIN, set_local
from .._session.connection import PooledConnection
from .._session.slot import Slot
from .._session.slow_statements import TimedConnection
from .._util import bounds
from .._util import log_events as events
from .._util.durations import Tally
from ..errors import (
    CredentialError,
    DBConnectionError,
    DBOfflineError,
    ServerFullError,
    TargetUnavailableError,
    UnsafeRoleError,
    one_line,
)
from .dialling import connect, dial
from .eligibility import EligibleGroup

DOWN_AFTER = 1.0
"""Seconds without an answer to a connect after which a server counts as down, unless less was allowed."""


class OpeningGroup(EligibleGroup):
    """A group that opens connections in its slots."""

    __slots__ = ()

    def open(self, *, needed: bool = False) -> None:
        """Open `min_size` connections, but at least one, in the calling thread.

        :param needed: whether the group must have a server now.
        :raises DBConnectionError: none could be opened, and the cause is not temporary.
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

    def _connect_or_wait(self, slot: Slot, deadline: float) -> PooledConnection | None:
        """Open a connection in the slot, or return None after a pending promotion has finished."""
        try:
            return self._connect(slot, deadline)
        except (DBOfflineError, TargetUnavailableError):
            if not self.writes or not self.await_writer(self, deadline):
                raise
            return None

    def _connect(self, slot: Slot, deadline: float | None = None) -> PooledConnection:
        """Open a connection in the slot, to the first suitable endpoint that answers."""
        budget = monotonic() + self._connect_timeout
        if deadline is not None:
            budget = min(budget, deadline)
        failures: dict[Endpoint, DialError | None] = {}
        generation = self._generation
        try:
            conn = self._first_that_suits(slot, budget, failures)
        except BaseException as error:
            if isinstance(error, ServerFullError):
                self._pool.hold_back(error.pause)  # first, or the next waiter would get the slot
            self._pool.free(slot)  # at once: the traceback of the error keeps this frame, and the slot, alive
            raise
        finally:
            failures.clear()  # their tracebacks keep this frame, and so the slot, alive in a cycle
        self._adopt(conn, slot, generation)
        return conn

    def _first_that_suits(
        self, slot: Slot, budget: float, failures: dict[Endpoint, DialError | None]
    ) -> PooledConnection:
        """Dial one endpoint after the other; with `prefer-standby` a primary is kept as a fallback."""
        spare: PooledConnection | None = None
        try:
            while True:
                endpoint, left = self._reserve(slot, failures)
                if endpoint is None:
                    if spare is not None:
                        return spare
                    if not self._revived(failures, budget):
                        raise self._unreachable(failures)
                elif (conn := self._dial(endpoint, budget - monotonic(), left, failures)) is not None:
                    if spare is not None:
                        spare.close()
                    spare = conn
                    # One of the remaining endpoints, whose role is unknown, may be a standby.
                    if not (left > 1 and self.config.target == "prefer-standby" and _is_primary(endpoint)):
                        return conn
        except BaseException:
            if spare is not None:
                spare.close()
            raise

    def _adopt(self, conn: PooledConnection, slot: Slot, generation: int) -> None:
        """Attach the connection to the group and to its slot; `generation` is from before it was opened."""
        conn.enter_group(self, slot, self.uses.get(conn.endpoint, Tally()), self.config.annotate)
        if isinstance(conn, TimedConnection) and self.config.slow_query is not None:
            conn.report_slow(self.config.slow_query, self.note_slow_statement)
        if generation != self._generation:
            conn.expire()
        if self._excluded and conn.endpoint in self._excluded and conn.endpoint.outdated:
            # Excluded since a moment ago, when `_cut` could not find this connection.
            conn.cut_from_other_thread(0.0)
        self._opened += 1

    def _revived(self, tried: Collection[Endpoint], deadline: float) -> bool:
        """Return whether a server that was down is up again; in lock-free mode the checkout itself probes."""
        down = (State.DOWN, State.PROBING)
        lost = [e for e in self.endpoints if e.state in down and e not in tried and e not in self._excluded]
        return self._revive is not None and bool(lost) and self._revive(lost, deadline)

    def _dial(
        self, endpoint: Endpoint, budget: float, left: int, failures: dict[Endpoint, DialError | None]
    ) -> PooledConnection | None:
        """Dial one endpoint within its share of the budget; note the failure, if any."""
        failures[endpoint] = None
        full = self._dial_timeout(endpoint)
        timeout = max(min(budget / left, full), bounds.MIN_TIMEOUT)
        # A timeout of a request that had hardly any time left is not evidence against the server.
        conclusive = timeout >= 0.9 * min(full / left, DOWN_AFTER)
        in_progress: DialInProgress | None = None
        try:
            if endpoint.doubtful and not self.lock_free:
                deadline = monotonic() + timeout
                in_progress = self._dial_or_wait(endpoint, timeout)
                if in_progress is None:
                    if endpoint.state is not State.UP:
                        return None  # found by the other dial
                    timeout, conclusive = max(deadline - monotonic(), bounds.MIN_TIMEOUT), False
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
            if in_progress is not None:
                endpoint.end_dial(in_progress)
        if (
            endpoint.role is not None
            and suits(self.config.target, endpoint.role, endpoint.read_only)
            and endpoint not in self._excluded
            and endpoint.state is not State.DRAINING  # since a moment ago
        ):
            return conn
        conn.close()
        return None

    def _dial_or_wait(self, endpoint: Endpoint, timeout: float) -> DialInProgress | None:
        """Dial a suspect endpoint, or wait for the thread that already does, so it is dialled only once."""
        with self._lock:
            other = endpoint.dial_in_progress()
            if other is None:
                return endpoint.begin_dial()
            over = other.over
            del other
        over.wait(timeout)
        return None

    def _reserve(self, slot: Slot, tried: dict[Endpoint, DialError | None]) -> tuple[Endpoint | None, int]:
        """Assign the slot to the best endpoint not yet tried; also return how many are left."""
        with self._lock:
            slot.endpoint = None
            best = order(self._candidates(), self.config.target, self.config.balance, monotonic())
            now = monotonic()
            left = [e for e in best if e not in tried and e.full_until <= now]
            # Prefer endpoints that have answered, and that no other thread is dialling.
            left.sort(key=lambda endpoint: (endpoint.silent, endpoint.dial_in_progress() is not None))
            if left:
                slot.endpoint = chosen = left[0]
                if chosen.full_pause:  # one request at a time checks whether it has room
                    chosen.full_until = now + chosen.full_pause
            return slot.endpoint, len(left)

    def _set_up(self, conn: PooledConnection) -> None:
        """Prepare a new connection before it is lent for the first time."""
        if self.config.sqlprepare:
            cursor = psycopg.Cursor(conn)
            cursor.execute('SELECT * FROM "SQLPrepare"."PrepareQueries"()')
            cursor.execute("SELECT name FROM pg_catalog.pg_prepared_statements WHERE from_sql")
            conn.keep_statements(name for (name,) in cursor.fetchall())
        if self._hooks.configure is not None:
            self._hooks.configure(conn)
        if self.config.tenant is not None and self.config.tenant.verify != "off":
            self._verify(conn)

    def _verify(self, conn: PooledConnection) -> None:
        """Refuse, or warn of, a role that bypasses row-level security."""
        from ..rls import role_findings  # imported at a connect, never at a checkout

        conn.run(BEGIN + set_local(self._settings))  # these may include `role`
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

    def would_open(self) -> tuple[str, dict[str, str]]:
        """Open a connection as a block would; return the server's label and libpq's parameters.

        :raises DBConnectionError: none can be opened.
        """
        slot = self._pool.claim()
        assert slot is not None
        conn = self._connect(slot)
        self._pool.give(conn)
        info = psycopg.ConnectionInfo(conn.pgconn)
        return conn.endpoint.label, {**info.get_parameters(), "password": info.password}

    def connect_apart(self) -> psycopg.Connection[Any]:
        """Open a connection outside of the pool, to the first endpoint that admits one.

        :raises DBConnectionError: no endpoint is up, or none of several admits one.
        :raises psycopg.Error: the only endpoint refuses it.
        :raises CredentialError: user and password could not be obtained.
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


def _is_primary(endpoint: Endpoint) -> bool:
    return endpoint.role is Role.PRIMARY

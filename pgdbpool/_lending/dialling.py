"""Opens connections to a server, and judges from a failure whether the server is down."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg import generators, pq, waiting
from psycopg.errors import ConnectionTimeout, _WaitTimeout

from .._servers.credentials import refused
from .._servers.endpoint import PROBE_TIMEOUT, DialError, Endpoint
from .._servers.host_names import UnresolvedError, destination, places
from .._session.commands import FORBID_WRITES
from .._session.connection import PooledConnection, pooled
from .._session.cursors import BlockCursor
from .._session.server_cursor import BlockServerCursor
from .._util import bounds
from .._util import log_events as events
from ..errors import ConnectionLostError, CredentialError, Error, HookError, QueryDeadlineError, one_line

if TYPE_CHECKING:
    from psycopg.abc import PQGenConn

    from .._config.model import GroupConfig

_Opened = TypeVar("_Opened")

_FULL = re.compile(
    r"too many (clients|connections)|connection slots are reserved|no more connections allowed", re.IGNORECASE
)
"""The texts of PostgreSQL and PgBouncer: libpq has no SQLSTATE (53300) for a failed connect."""


def dial(
    endpoint: Endpoint,
    group: GroupConfig,
    timeout: float,
    conclusive: bool,
    row_factory: Any,
    set_up: Callable[[PooledConnection], None] | None = None,
    kind: type[PooledConnection] = PooledConnection,
) -> PooledConnection:
    """Open a connection as the group wants it, within the timeout (seconds).

    :param conclusive: whether no answer within the timeout means that the server is down.
    :param set_up: prepares each new connection for the group.
    :raises DialError: with the message of the server or the network.
    """
    attempt = _Attempt(endpoint, group, timeout, conclusive)
    conn: PooledConnection | None = None
    try:
        conn = attempt.open(kind)
        if set_up is not None:
            set_up(conn)
    except _WaitTimeout:
        error: Exception = ConnectionTimeout(
            f"no answer within {max(attempt.deadline - attempt.began, 0):.1f} s"
        )
        raise _failure(endpoint, error, attempt.silence_counts) from error
    except UnresolvedError as error:
        unknown = endpoint.name is not None and not endpoint.name.known
        raise _failure(endpoint, error, unknown and attempt.silence_counts) from error
    except (psycopg.Error, Error) as error:
        if conn is not None:
            conn.close()
        raise attempt.refusal(error) from error
    attempt.release(conn, row_factory)
    endpoint.opened = next(endpoint.ids)
    endpoint.full_pause = endpoint.full_until = 0.0
    endpoint.mark_up()
    endpoint.on_seen(endpoint)
    return conn


def _open_session(conninfo: str, timeout: float) -> pq.abc.PGconn:
    steps: PQGenConn[pq.abc.PGconn] = generators.connect(conninfo)
    return waiting.wait_conn(steps, interval=0.1, timeout=timeout)


class _Attempt:
    """One dial: its time limit, the set-up of the session, and the verdict on a failure."""

    def __init__(self, endpoint: Endpoint, group: GroupConfig, timeout: float, conclusive: bool) -> None:
        self._endpoint, self._group = endpoint, group
        self._timeout, self._conclusive = timeout, conclusive
        self._statement_timeout = endpoint.statement_timeout(group)
        self.began = monotonic()
        """When the server itself was first asked for something, once address and login are known."""
        self.deadline = self.began + timeout

    def open(self, kind: type[PooledConnection]) -> PooledConnection:
        """Log in and make the session the group's.

        A pooler may have given the new client a session that its server had just ended; another one will do.
        """
        connection_class = pooled(self._group.connection_class, kind)
        once_more = self._endpoint.config.pooler is not None
        while True:
            conn = connection_class(
                _log_in(self._endpoint, self._group, _open_session, self.deadline, self.arrived)
            )
            try:
                self.prepare(conn)
                return conn
            except BaseException as error:
                conn.close()
                lost = isinstance(error, ConnectionLostError) and not isinstance(error, QueryDeadlineError)
                if not (lost and once_more):
                    raise
            once_more = False

    def arrived(self) -> None:
        """Start the server's own time."""
        self.began = monotonic()

    @property
    def silence_counts(self) -> bool:
        """Whether no answer means that the server is down.

        Not if the callable that returns the password has used nearly all the time.
        """
        return self._conclusive and self.deadline - self.began >= 0.9 * min(self._timeout, 1.0)

    def prepare(self, conn: PooledConnection) -> None:
        """Make a new session the group's, before the application's `configure` sees it."""
        endpoint, group = self._endpoint, self._group
        until = max(self.deadline, monotonic() + bounds.MIN_TIMEOUT)
        # psycopg forgets prepared statements by DEALLOCATE ALL, which would drop those of sqlprepare too.
        threshold = None if group.sqlprepare else group.prepare_threshold
        conn.begin_set_up(endpoint, until, autocommit=group.autocommit, prepare_threshold=threshold)
        if endpoint.config.pooler:  # each transaction may be on another session
            conn.bind_always(("statement_timeout", str(self._statement_timeout)))
        endpoint.note_role(conn, self.began)
        if group.target in ("standby", "read-only"):
            _forbid_writes(endpoint, conn)
        if group.writes and len(group.endpoints) > 1:
            endpoint.ask_timeline(conn)

    def release(self, conn: PooledConnection, row_factory: Any) -> None:
        """Lift the limits of the set-up, so that blocks can use the connection."""
        group, milliseconds = self._group, self._statement_timeout
        patience = milliseconds / 1000 + bounds.CLIENT_GRACE if milliseconds else None
        conn.end_set_up(patience, row_factory, BlockCursor, BlockServerCursor)
        conn.snapshot_attributes(group.configure is not None or group.connection_class is not None)
        if group.max_lifetime:
            # Jitter, so that connections opened together are not all replaced together.
            conn.expire(monotonic() + group.max_lifetime * random.uniform(0.95, 1.0))

    def refusal(self, error: psycopg.Error | Error) -> DialError:
        """Return the error for a session that the server, or the application's `configure`, refused."""
        endpoint = self._endpoint
        told = error.__cause__ if isinstance(error, HookError) else error
        by_server = isinstance(told, psycopg.Error)
        if endpoint.config.pooler and isinstance(error, QueryDeadlineError) and self.silence_counts:
            # The pooler let the client in, but no server answers (PAUSE). That is down, unless another
            # connection got an answer since.
            down = not any(group.answered(endpoint, self.began) for group in endpoint.groups)
            endpoint.refuses = False
        else:
            down = isinstance(told, psycopg.Error) and _is_down(
                endpoint, told, self.deadline, self.silence_counts
            )
        failure = _failure(endpoint, error, down)
        failure.refused = endpoint.refuses if by_server else not isinstance(error, CredentialError)
        return failure


def _forbid_writes(endpoint: Endpoint, conn: PooledConnection) -> None:
    """Make the session itself refuse writes: its server may be promoted before the pool learns of it."""
    if endpoint.config.pooler:
        conn.bind_always(("transaction_read_only", "on"))
    else:
        psycopg.Cursor(conn).execute(FORBID_WRITES)
    conn.only_read()


def connect(endpoint: Endpoint, group: GroupConfig) -> psycopg.Connection[Any]:
    """Open a connection of the group's login that belongs to no pool; the caller closes it.

    :raises psycopg.Error: it could not be opened.
    :raises CredentialError: user and password could not be obtained.
    """
    deadline = monotonic() + (group.connect_timeout or endpoint.config.connect_timeout)

    def opening(conninfo: str, timeout: float) -> psycopg.Connection[Any]:
        return psycopg.connect(conninfo, autocommit=True, connect_timeout=max(1, math.ceil(timeout)))

    return _log_in(endpoint, group, opening, deadline)


def _log_in(
    endpoint: Endpoint,
    group: GroupConfig,
    opening: Callable[[str, float], _Opened],
    deadline: float,
    arrived: Callable[[], None] = lambda: None,
) -> _Opened:
    """Open a connection; if its password is refused and has changed meanwhile, try the new one.

    :param arrived: called once the address and the login are known.
    """
    given = endpoint.arrive().within(deadline)
    arrived()
    try:
        return _reach(endpoint, group, opening, deadline, given)
    except psycopg.OperationalError as error:
        if not refused(error):
            raise
        try:
            other = {**given, **endpoint.login.again(deadline)}
        except CredentialError as failure:
            raise error from failure
        if other == given:
            raise
    return _reach(endpoint, group, opening, deadline, other)


def _reach(
    endpoint: Endpoint,
    group: GroupConfig,
    opening: Callable[[str, float], _Opened],
    deadline: float,
    given: Mapping[str, str],
) -> _Opened:
    """Open a connection to the first address that answers; the remaining ones share the time.

    An address that refuses the login ends the search, as in libpq.
    """
    ways = _ways(endpoint, given)
    failures: list[str] = []
    silent = 0
    for number, way in enumerate(ways):
        timeout = (deadline - monotonic()) / (len(ways) - number)
        try:
            opened = opening(endpoint.conninfo(group, {**given, **way}), timeout)
        except (_WaitTimeout, psycopg.OperationalError) as error:
            timed_out = isinstance(error, _WaitTimeout)
            silent += timed_out
            if len(ways) == 1 or silent == len(ways) or (not timed_out and refused(error)):
                raise
            text = f"no answer within {max(timeout, 0):.1f} s" if timed_out else one_line(error)
            failures.append(f"{way.get('hostaddr') or way['host']}: {text}")
        else:
            endpoint.way = way
            if endpoint.name is not None:
                endpoint.name.prefer(way["hostaddr"])
            return opened
    raise psycopg.OperationalError("; ".join(failures))


def _ways(endpoint: Endpoint, given: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the parameters of each possible address of the server, the last working one first."""
    if "hostaddr" in given:  # the addresses of a name
        found = [{"host": given["host"].split(",")[0], "hostaddr": a} for a in given["hostaddr"].split(",")]
    elif endpoint.config.host:
        return [{}]
    else:  # a service file, or PGHOST, may list several
        found = [place._asdict() for place in places(destination(endpoint.config))]
        if len(found) == 1:
            return [{}]
    found.sort(key=lambda way: way != endpoint.way)
    return found


def _failure(endpoint: Endpoint, error: Exception, down: bool) -> DialError:
    message = one_line(error)
    if down:
        endpoint.mark_down(message)
    else:
        if message != endpoint.last_error:
            events.ENDPOINT_REFUSED(
                "endpoint %s: no connection: %s",
                endpoint.label,
                message,
                endpoint=endpoint.label,
                reason=message,
            )
        endpoint.note_error(message)
        if endpoint.config.pooler:
            endpoint.role = None  # the pooler is up; its server may be gone and another one promoted
    return DialError(endpoint, message, down)


def _is_down(endpoint: Endpoint, error: psycopg.Error, deadline: float, conclusive: bool) -> bool:
    """Probe the server for the reason for its refusal: libpq gives no SQLSTATE, and its text is translated.

    :param conclusive: whether no answer means that the server is down, rather than that time was short.
    """
    endpoint.refuses = False
    if _FULL.search(str(error)):  # a probe would take one more session
        endpoint.note_full()
        return False
    probe = endpoint.probe()
    probe.run(min(max(deadline - monotonic(), bounds.MIN_TIMEOUT), PROBE_TIMEOUT))
    if probe.sqlstate == "53300":
        endpoint.note_full()
    else:
        endpoint.refuses = probe.accepting
        endpoint.full_pause = endpoint.full_until = 0.0
    return not probe.accepting and (conclusive or not probe.out_of_time)

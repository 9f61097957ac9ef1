"""One server: its address, its state, and the opening of connections to it.

State changes on evidence only. DOWN: a connect that is refused, reset or past its deadline, a
server that says that it is starting up or shutting down (57P03). Not DOWN: a ping past its deadline,
which is a reason to connect, a wrong password, a missing database, too many clients (53300), anything
a statement raises.
"""

from __future__ import annotations

import enum
import itertools
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import ref

import psycopg
from psycopg import generators, pq, rows, waiting
from psycopg.conninfo import make_conninfo
from psycopg.errors import ConnectionTimeout, _WaitTimeout

from .._config.service_file import service_of
from .._session.block import FORBID_WRITES, GRACE, HURRY
from .._session.connection import PooledConnection, pooled
from .._session.cursors import BlockCursor, BlockServerCursor
from .._util import log_events as events
from .._util.background_call import Gate
from ..errors import CredentialError, Error, HookError, QueryDeadlineError, one_line
from .connect_parameters import Arrival
from .credentials import Login, refused
from .host_names import Name, UnresolvedError, destination, places
from .replication import QUERY, Lag, Sight, read
from .startup_probe import StartupProbe
from .tcp_round_trip import round_trip

if TYPE_CHECKING:
    from psycopg.abc import PQGenConn

    from .._config.model import EndpointConfig, GroupConfig
    from .._lending.group import Group

_Opened = TypeVar("_Opened")

PROBE_AFTER = (0.5, 0.75)
"""Seconds between two probes of a DOWN endpoint, drawn at random: at most two a second."""

PROBE_TIMEOUT = 2.0
"""Seconds that a server has to answer a probe."""

FULL_PAUSE = (0.02, 1.0)
"""Seconds until a full server is dialled again: at first, and at most; twice as long each time."""

_FULL = re.compile(
    r"too many (clients|connections)|connection slots are reserved|no more connections allowed", re.IGNORECASE
)
"""What PostgreSQL and PgBouncer say: libpq does not tell the SQLSTATE of a connect (53300)."""

CHANGING = ("weight", "connect_timeout", "password", "pass_file", "patroni")
"""Keys of a server that may change while its connections stay."""


class State(enum.Enum):
    """What an endpoint is known to be."""

    UP = "up"
    DOWN = "down"
    PROBING = "probing"
    DRAINING = "draining"


class Role(enum.Enum):
    """What a server says it is; see `in_hot_standby`."""

    PRIMARY = "primary"
    STANDBY = "standby"


class DialError(Exception):
    """A connection could not be opened.

    :param down: whether that is evidence of a server gone.
    """

    def __init__(self, endpoint: Endpoint, message: str, down: bool) -> None:
        super().__init__(message)
        self.endpoint = endpoint
        self.down = down
        self.refused = False
        """Whether the server is up and refused what is configured, or the application did."""


class Look:
    """Somebody dials an endpoint that is in doubt; it ends with `Endpoint.end_look`, or with the object.

    So those who wait for an end hold its gate alone: whoever is interrupted on the way ends it too.
    """

    __slots__ = ("__weakref__", "over")

    def __init__(self) -> None:
        self.over = Gate()

    def end(self) -> None:
        """Let those go on who wait."""
        self.over.open()

    __del__ = end


def nobody() -> None:
    """Nobody looks."""


class Endpoint:
    """One PostgreSQL server, shared by the groups that use it.

    The attributes are written by whoever has the evidence and read without a lock: each is one
    assignment, and a reader that is late by one is corrected by its own evidence.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self.config = config
        self.name: Name | None = None
        """Its host name, where that has to be resolved, as it was when somebody last connected."""
        self.login = Login(config)
        self.label = config.label
        self.weight = config.weight
        self.state = State.UP
        self.role: Role | None = None
        self.read_only = False
        self.role_seen_at = 0.0
        self.role_changed_at = 0.0
        """When its role was last found to be another one: a word from before that changes nothing."""
        self.timeline: int | None = None
        """Of a primary, as it was last seen."""
        self.system: str | None = None
        self.outdated = False
        """Whether another server was promoted to a higher timeline: what is written here would be lost."""
        self.lag: Lag | None = None
        """How far a standby is behind, where anybody asks."""
        self.sight_at = 0.0
        self.condemned_at = 0.0
        """When it went down: connections not known to work since then are not lent."""
        self.suspected_at = 0.0
        """When a statement ran into its deadline: connections idle since then are pinged first."""
        self.doubtful = False
        """Whether a connection was lost since it last answered or failed to."""
        self.silent = False
        """Whether a ping was not answered since then: a probe looks whether the server is there."""
        self._refuses = False
        """Whether it refused the last login, for another reason than that it is full."""
        self.full_pause = 0.0
        """Seconds between two connects while it admits no more of them; 0 where it does."""
        self.full_until = 0.0
        """When the next one is due."""
        self.look: Callable[[], Look | None] = nobody
        """Who dials it while it is doubtful, if anybody."""
        self.groups: Sequence[Group] = ()
        self.last_error: str | None = None
        self.last_error_at: float | None = None
        self.down_since: float | None = None
        self.opened = 0
        self.failovers = 0
        """How often it was seen to have been promoted."""
        self.on_down: Callable[[Endpoint], None] = lambda endpoint: None
        self.on_silent: Callable[[Endpoint], None] = lambda endpoint: None
        self.on_up: Callable[[Endpoint], None] = lambda endpoint: None
        self.on_seen: Callable[[Endpoint], None] = lambda endpoint: None
        self.on_role: Callable[[Endpoint], None] = lambda endpoint: None
        self._ids = itertools.count(1)
        self._way: dict[str, str] = {}
        """The parameters of the address that was last found to work, if there are several."""

    def __repr__(self) -> str:
        role = self.role.value if self.role else "role unknown"
        return f"<Endpoint {self.label} {self.state.value} {role}>"

    @property
    def connections(self) -> int:
        """Connections that this process has to the server."""
        return sum(group.connections_to(self) for group in self.groups)

    @property
    def round_trip(self) -> float | None:
        """Seconds of a round trip to the server, by some of the connections; None where unknown."""
        found = [
            seconds
            for group in self.groups
            for fileno in group.sockets_to(self)
            if (seconds := round_trip(fileno)) is not None
        ]
        return min(found, default=None)

    # Evidence.

    def mark_down(self, reason: str) -> None:
        """Take the endpoint out of use until a probe succeeds; its idle connections are dropped."""
        self.note_error(reason)
        self.condemned_at = monotonic()
        self.doubtful = self.silent = False
        if self.state in (State.UP, State.PROBING):
            was_up = self.state is State.UP
            self.state = State.DOWN
            if was_up:
                self.down_since = self.condemned_at
                events.ENDPOINT_DOWN(
                    "endpoint %s is down: %s", self.label, reason, endpoint=self.label, reason=reason
                )
        self.on_down(self)

    def mark_up(self) -> None:
        """Put the endpoint back into use."""
        was_silent = self.silent
        self.doubtful = self.silent = False
        if was_silent and self.state is State.UP:
            self.on_up(self)  # its idle connections were dropped
        if self.state in (State.DOWN, State.PROBING):
            self.state = State.UP
            away = None if self.down_since is None else monotonic() - self.down_since
            self.down_since = None
            events.ENDPOINT_UP("endpoint %s is up again", self.label, endpoint=self.label, seconds=away)
            self.on_up(self)

    def condemn(self, reason: str) -> None:
        """Drop the idle connections, since one gave no answer: the network may have forgotten them.

        Whether the server is there, the next connect tells, and a probe.
        """
        self.note_error(reason)
        self.condemned_at = monotonic()
        self.doubtful = self.silent = True
        self.on_silent(self)

    def note_full(self) -> None:
        """Remember that the server admits no further connection, and when it is asked again."""
        least, most = FULL_PAUSE
        self.full_pause = min(max(self.full_pause * 2, least), most)
        self.full_until = monotonic() + self.full_pause * random.uniform(0.75, 1.25)

    def drain(self) -> None:
        """Take the endpoint out of use until `undrain`: connections in use end with their blocks."""
        if self.state is not State.DRAINING:
            self.state = State.DRAINING
            events.ENDPOINT_DRAIN("endpoint %s is being drained", self.label, endpoint=self.label)
        self.condemned_at = monotonic()
        self.timeline, self.outdated = None, False  # nor does it bar an older primary any more
        self.on_down(self)

    def undrain(self) -> None:
        """Put a drained endpoint back into use; whether it is up, the next to need it finds out."""
        if self.state is State.DRAINING:
            self.state = State.UP
            events.ENDPOINT_UNDRAIN("endpoint %s is in use again", self.label, endpoint=self.label)
            self.on_up(self)

    def fits(self, config: EndpointConfig) -> bool:
        """Tell whether connections made before a change to that configuration are as good as new ones."""
        return replace(config, **{key: getattr(self.config, key) for key in CHANGING}) == self.config

    def apply(self, config: EndpointConfig) -> None:
        """Take over a changed configuration that `fits`: it counts for the next connection."""
        if config != self.config:
            self.config, self.weight, self.login = config, config.weight, Login(config)

    def remove(self) -> None:
        """Take the endpoint out of use for good: it is not in the configuration any more."""
        events.ENDPOINT_REMOVED(
            "endpoint %s was removed, or is another server now", self.label, endpoint=self.label
        )
        self.state = State.DRAINING  # so that no probe, and no connect under way, takes it for up

    def begin_look(self) -> Look:
        """Make the caller the one who finds out what a doubtful endpoint is about."""
        look = Look()
        self.look = ref(look)
        return look

    def end_look(self, look: Look) -> None:
        """Let those go on who wait for what the look has found."""
        self.look = nobody
        look.end()

    def note_error(self, reason: str) -> None:
        """Remember an error as evidence for messages and the status."""
        self.last_error = reason
        self.last_error_at = monotonic()

    def heard(self, conn: PooledConnection) -> Role | None:
        """Return the role that the connection was last told, if it agrees with what is known of the server.

        None if it has other news, or none: whether that is news depends on its age, see `note_role`.
        """
        if self.config.pooler:
            return None
        status = conn.pgconn.parameter_status
        standby = status(b"in_hot_standby")
        if standby is not None:
            role = Role.STANDBY if standby == b"on" else Role.PRIMARY
        elif conn.asked_role is not None:
            role = Role(conn.asked_role)
        else:
            return None
        read_only = status(b"default_transaction_read_only") == b"on"
        return role if role is self.role and (conn.reads or read_only == self.read_only) else None

    def note_role(self, conn: PooledConnection, since: float) -> Role:
        """Learn the server's role from what it reported on the connection, at no round trip.

        :param since: when the connection's last message was asked for, at the earliest.
        :returns: what is known now, which is not what the connection says if that is older.

        `in_hot_standby` is reported by PostgreSQL 14 and later, at connect and when it changes:
        https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-ASYNC
        A pooler hands out what it was told when it first logged in, so that the server is asked: once for
        each connection, and again after a statement that a primary would not have refused.
        """
        status = conn.pgconn.parameter_status
        standby = None if self.config.pooler else status(b"in_hot_standby")
        if self.config.pooler and conn.asked_role and self.role and self.role_seen_at > self.suspected_at:
            return self.role  # the observer may have learned better since this connection asked
        if standby is not None:
            role = Role.STANDBY if standby == b"on" else Role.PRIMARY
        elif conn.asked_role is not None and not self.config.pooler:
            role = Role(conn.asked_role)
        else:
            since = monotonic()
            with conn.unbound(), psycopg.Cursor(conn, row_factory=rows.tuple_row) as cursor:
                (in_recovery,) = cursor.execute("SELECT pg_is_in_recovery()").fetchone() or (False,)
            role = Role.STANDBY if in_recovery else Role.PRIMARY
            conn.asked_role = role.value
        if not conn.reads and since >= self.role_changed_at:  # such a connection is read only by itself
            self.read_only = status(b"default_transaction_read_only") == b"on"
        self._note(role, since)
        return self.role or role

    def _note(self, role: Role, since: float) -> bool:
        """Take over what was said of the role; return whether that is no older than the last change."""
        if role is not self.role:
            if since < self.role_changed_at:
                return False
            self.role_changed_at = monotonic()
            if self.role is not None:
                was = self.role.value
                events.ENDPOINT_ROLE(
                    "endpoint %s was %s and is now %s", self.label, was, role.value,
                    endpoint=self.label, role=role.value, previous=was,
                )  # fmt: skip
                self.failovers += role is Role.PRIMARY
            known, self.role = self.role, role
            if known is not None:
                self.on_role(self)
                self.on_up(self)  # for groups that wait for such a role
        if role is Role.STANDBY:
            self.timeline, self.outdated = None, False
        self.role_seen_at = max(self.role_seen_at, since)
        return True

    def note_sight(self, sight: Sight, since: float) -> None:
        """Learn what the server said of itself when it was asked, at the moment `since`."""
        if not self._note(Role.STANDBY if sight.standby else Role.PRIMARY, since):
            return
        self.sight_at = sight.at
        self.timeline, self.system = sight.timeline, sight.system
        self.on_seen(self)

    def ask_timeline(self, conn: PooledConnection) -> None:
        """Ask the server for its timeline, on a connection that is not in use yet."""
        since = monotonic()
        try:
            with psycopg.Cursor(conn) as cursor:
                cursor.execute(QUERY)
                result = cursor.pgresult
        except psycopg.errors.DatabaseError as error:
            if conn.closed:
                raise
            # Not every server that speaks the protocol has a write-ahead log to tell of.
            reason = one_line(error)
            events.ENDPOINT_SILENT(
                "endpoint %s does not tell its timeline: %s", self.label, reason,
                endpoint=self.label, reason=reason,
            )  # fmt: skip
            return
        assert result is not None
        self.note_sight(read(result, monotonic()), since)

    def refuses_writes(self, conn: PooledConnection) -> bool:
        """Tell whether a statement was refused (SQLSTATE 25006) since the server takes no writes.

        Then its idle connections are asked before they are lent again. It may as well be the
        transaction alone that is read only.
        """
        status = conn.pgconn.parameter_status
        standby = None if self.config.pooler else status(b"in_hot_standby")
        if standby is None:  # before PostgreSQL 14, and behind a pooler: ask again
            conn.asked_role = None
        elif (
            standby == b"on"
            or conn.reads
            or (status(b"default_transaction_read_only") == b"on" and not conn.read_only_by_choice)
        ):
            self.note_role(conn, conn.used_at)
        else:
            return False
        self.suspected_at = monotonic()
        return True

    # Opening connections.

    def dial(
        self,
        group: GroupConfig,
        timeout: float,
        conclusive: bool,
        row_factory: Any,
        set_up: Callable[[PooledConnection], None] | None = None,
        kind: type[PooledConnection] = PooledConnection,
    ) -> PooledConnection:
        """Open a connection as the group wants it, within the timeout (seconds).

        :param conclusive: whether no answer within the timeout means that the server is down.
        :param set_up: what the group does with each new connection.
        :raises DialError: with the server's or the network's own words.
        """
        began = monotonic()
        deadline = began + timeout
        milliseconds = self.statement_timeout(group)
        conn: PooledConnection | None = None

        def arrived() -> None:
            nonlocal began
            began = monotonic()

        def opening(conninfo: str, timeout: float) -> pq.abc.PGconn:
            steps: PQGenConn[pq.abc.PGconn] = generators.connect(conninfo)
            return waiting.wait_conn(steps, interval=0.1, timeout=timeout)

        def telling() -> bool:
            """Tell whether silence is evidence: a function for the password may have left hardly any time."""
            return conclusive and deadline - began >= 0.9 * min(timeout, 1.0)

        try:
            pgconn = self._log_in(group, opening, deadline, arrived)
            conn = pooled(group.connection_class, kind)(pgconn)
            conn.until = max(deadline, monotonic() + HURRY)
            conn.endpoint = self
            conn.watch()
            conn._autocommit, conn.by_itself = True, group.autocommit
            # psycopg forgets what it prepared by DEALLOCATE ALL, and sqlprepare's would go with it.
            conn.prepare_threshold = None if group.sqlprepare else group.prepare_threshold
            if self.config.pooler:  # each transaction may be on another session
                conn.local = (("statement_timeout", str(milliseconds)),)
            self.note_role(conn, began)
            if group.target in ("standby", "read-only"):
                self._forbid_writes(conn)
            if group.writes and len(group.endpoints) > 1:
                self.ask_timeline(conn)
            if set_up is not None:
                set_up(conn)
        except _WaitTimeout:
            error: Exception = ConnectionTimeout(f"no answer within {max(deadline - began, 0):.1f} s")
            raise self._failed(error, telling()) from error
        except UnresolvedError as error:
            stands_for_nothing = self.name is not None and not self.name.known
            raise self._failed(error, stands_for_nothing and telling()) from error
        except (psycopg.Error, Error) as error:
            if conn is not None:
                conn.close()
            told = error.__cause__ if isinstance(error, HookError) else error
            by_server = isinstance(told, psycopg.Error)
            if self.config.pooler and isinstance(error, QueryDeadlineError) and telling():
                # The pooler let it in, and no server answers (PAUSE): down, unless others got an answer.
                down = not any(group.answered(self, began) for group in self.groups)
                self._refuses = False
            else:
                down = isinstance(told, psycopg.Error) and self._is_down(told, deadline, telling())
            failure = self._failed(error, down)
            failure.refused = self._refuses if by_server else not isinstance(error, CredentialError)
            raise failure from error
        conn.until = None
        conn.patience = milliseconds / 1000 + GRACE if milliseconds else None
        conn.row_factory = row_factory
        conn.cursor_factory = BlockCursor
        conn.server_cursor_factory = BlockServerCursor
        conn.settle()
        if group.max_lifetime:
            # Jitter, so that connections opened together are not all replaced together.
            conn.expires_at = monotonic() + group.max_lifetime * random.uniform(0.95, 1.0)
        self.opened = next(self._ids)
        self.full_pause = self.full_until = 0.0
        self.mark_up()
        self.on_seen(self)
        return conn

    def _forbid_writes(self, conn: PooledConnection) -> None:
        """Have the session refuse writes by itself: its server may be promoted before anything tells so."""
        conn.reads = True
        if self.config.pooler:
            conn.local += (("transaction_read_only", "on"),)
        else:
            psycopg.Cursor(conn).execute(FORBID_WRITES)
            conn.cleaning = conn.plain_cleaning

    def connect(self, group: GroupConfig) -> psycopg.Connection[Any]:
        """Open a connection of the group's login that belongs to no pool; the caller closes it.

        :raises psycopg.Error: it could not be opened.
        :raises CredentialError: the user and password could not be had.
        """
        deadline = monotonic() + (group.connect_timeout or self.config.connect_timeout)

        def opening(conninfo: str, timeout: float) -> psycopg.Connection[Any]:
            return psycopg.connect(conninfo, autocommit=True, connect_timeout=max(1, math.ceil(timeout)))

        return self._log_in(group, opening, deadline)

    def arrive(self) -> Arrival:
        """Begin to ask for what a connection needs; see `Arrival`."""
        self.name = Name.of(self.config, self.name)  # a service file may name another
        return Arrival(self.name, self.login)

    def probe(self) -> StartupProbe:
        """Return a probe that asks whether the server accepts sessions."""
        probe = StartupProbe(self.config, self.login.user, self.name)
        self.name = probe.name
        return probe

    def statement_timeout(self, group: GroupConfig) -> int:
        """Return the statement_timeout of the group's connections in milliseconds; 0 is none."""
        return self.config.query_timeout if group.query_timeout is None else group.query_timeout

    def conninfo(self, group: GroupConfig, given: Mapping[str, str]) -> str:
        """Return libpq's connection string for one of the group's connections, with what was asked for."""
        params: dict[str, Any] = self.config.conninfo_params()
        service = service_of(params)
        if service:
            params = dict(self.config.conninfo_params(service))
        params.update(given)
        # Also where it is empty: libpq would send PGOPTIONS otherwise.
        timeout = self.statement_timeout(group)
        params["options"] = self.config.server_options(timeout, service.get("options"))
        return make_conninfo("", **params)

    def _log_in(
        self,
        group: GroupConfig,
        opening: Callable[[str, float], _Opened],
        deadline: float,
        arrived: Callable[[], None] = lambda: None,
    ) -> _Opened:
        """Open a connection; where its password is refused and there is another one by now, with that.

        :param arrived: called once it is known where to connect to, and as whom.
        """
        given = self.arrive().within(deadline)
        arrived()
        try:
            return self._reach(group, opening, deadline, given)
        except psycopg.OperationalError as error:
            if not refused(error):
                raise
            try:
                other = {**given, **self.login.again(deadline)}
            except CredentialError as failure:
                raise error from failure
            if other == given:
                raise
        return self._reach(group, opening, deadline, other)

    def _reach(
        self,
        group: GroupConfig,
        opening: Callable[[str, float], _Opened],
        deadline: float,
        given: Mapping[str, str],
    ) -> _Opened:
        """Open a connection to the first address that answers; those that are left share the time.

        One that has answered with a refusal of the login is the last, as with libpq.
        """
        ways = self._ways(given)
        failures: list[str] = []
        silent = 0
        for number, way in enumerate(ways):
            timeout = (deadline - monotonic()) / (len(ways) - number)
            try:
                opened = opening(self.conninfo(group, {**given, **way}), timeout)
            except (_WaitTimeout, psycopg.OperationalError) as error:
                timed_out = isinstance(error, _WaitTimeout)
                silent += timed_out
                if len(ways) == 1 or silent == len(ways) or (not timed_out and refused(error)):
                    raise
                text = f"no answer within {max(timeout, 0):.1f} s" if timed_out else one_line(error)
                failures.append(f"{way.get('hostaddr') or way['host']}: {text}")
            else:
                self._way = way
                if self.name is not None:
                    self.name.prefer(way["hostaddr"])
                return opened
        raise psycopg.OperationalError("; ".join(failures))

    def _ways(self, given: Mapping[str, str]) -> list[dict[str, str]]:
        """Return the parameters of each address at which the server may be, the one that worked first."""
        if "hostaddr" in given:  # the addresses of a name
            found = [
                {"host": given["host"].split(",")[0], "hostaddr": a} for a in given["hostaddr"].split(",")
            ]
        elif self.config.host:
            return [{}]
        else:  # a service file, or PGHOST, may list several
            found = [place._asdict() for place in places(destination(self.config))]
            if len(found) == 1:
                return [{}]
        found.sort(key=lambda way: way != self._way)
        return found

    def _failed(self, error: Exception, down: bool) -> DialError:
        message = one_line(error)
        if down:
            self.mark_down(message)
        else:
            if message != self.last_error:
                events.ENDPOINT_REFUSED(
                    "endpoint %s: no connection: %s", self.label, message, endpoint=self.label, reason=message
                )
            self.note_error(message)
            if self.config.pooler:
                self.role = None  # the pooler is up; its server may be gone, and another promoted
        return DialError(self, message, down)

    def _is_down(self, error: psycopg.Error, deadline: float, conclusive: bool) -> bool:
        """Ask the server itself why it refused: libpq gives no SQLSTATE and its text is translated.

        :param conclusive: whether no answer says that it is down, and not that there was no time for one.
        """
        self._refuses = False
        if _FULL.search(str(error)):  # one more would be one too many
            self.note_full()
            return False
        probe = self.probe()
        probe.run(min(max(deadline - monotonic(), HURRY), PROBE_TIMEOUT))
        if probe.sqlstate == "53300":
            self.note_full()
        else:
            self._refuses = probe.accepting
            self.full_pause = self.full_until = 0.0
        return not probe.accepting and (conclusive or not probe.out_of_time)

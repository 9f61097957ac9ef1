"""One server: its address, its state and its role.

State changes on evidence only. DOWN: a connect that is refused, reset or past its deadline; a server
that reports that it is starting up or shutting down (57P03). Not DOWN: a ping past its deadline (a
reason to connect), a wrong password, a missing database, too many clients (53300), or any error of a
statement.
"""

from __future__ import annotations

import enum
import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import ref

import psycopg
from psycopg.conninfo import make_conninfo

from .._config.service_file import service_of
from .._util import log_events as events
from .._util.background_call import Latch
from .._util.token import Position
from ..errors import one_line
from .connect_parameters import ConnectParameters
from .credentials import Login
from .host_names import Name
from .positions import TIMELINES, Facts, Verdict, judge
from .replication import QUERY, Lag, ServerReport, read
from .startup_probe import StartupProbe
from .tcp_round_trip import round_trip

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

    from .._config.model import EndpointConfig, GroupConfig

_Opened = TypeVar("_Opened")

PROBE_AFTER = (0.5, 0.75)
"""Seconds between two probes of a DOWN endpoint, drawn at random: at most two a second."""

PROBE_TIMEOUT = 2.0
"""Seconds within which a server must answer a probe."""

FULL_PAUSE = (0.02, 1.0)
"""Seconds until a full server is dialled again: the first pause and the longest; it doubles each time."""

BEHIND_LASTS = 0.02
"""Seconds for which a server that was behind a read is assumed to be at the same position."""

CHANGING = ("weight", "connect_timeout", "password", "pass_file", "patroni")
"""Keys of a server that may change while its connections stay."""


class State(enum.Enum):
    """The known state of an endpoint."""

    UP = "up"
    DOWN = "down"
    PROBING = "probing"
    DRAINING = "draining"


class Role(enum.Enum):
    """The role that a server reports; see `in_hot_standby`."""

    PRIMARY = "primary"
    STANDBY = "standby"


class DialError(Exception):
    """A connection could not be opened.

    :param down: whether the failure is evidence that the server is down.
    """

    def __init__(self, endpoint: Endpoint, message: str, down: bool) -> None:
        super().__init__(message)
        self.endpoint = endpoint
        self.down = down
        self.refused = False
        """Whether the server is up, but it or the application refused the configured session."""


class DialInProgress:
    """A dial in progress to a suspect endpoint; it ends with `Endpoint.end_dial`, or with the object.

    Waiters hold only its latch, so they are released even if the dialling thread is interrupted and this
    object is collected.
    """

    __slots__ = ("__weakref__", "over")

    def __init__(self) -> None:
        self.over = Latch()

    def end(self) -> None:
        """Release the waiters."""
        self.over.open()

    __del__ = end


def no_dial() -> None:
    """No dial is in progress."""


class ServerSession(Protocol):
    """A connection, as the endpoint that it reports on needs it."""

    pgconn: Any
    asked_role: str | None
    reads: bool
    used_at: float

    def note_role(self, role: str | None) -> None:
        """Note the role that the server has answered; None to ask it again."""

    @property
    def closed(self) -> bool:
        """Whether it was closed or lost."""

    @property
    def read_only_by_choice(self) -> bool:
        """Whether a block may have made its transactions read only."""

    def ask(self, query: bytes) -> PGresult:
        """Send a query of the pool itself, not of a block."""


class User(Protocol):
    """A group, as the endpoints that it uses need it."""

    def connections_to(self, endpoint: Endpoint) -> int:
        """Return how many connections the group has to the server."""

    def sockets_to(self, endpoint: Endpoint) -> Iterable[int]:
        """Return the file numbers of some of their sockets."""

    def answered(self, endpoint: Endpoint, since: float) -> bool:
        """Return whether a connection to the server was known to work after that moment."""


class Endpoint:
    """One PostgreSQL server, shared by the groups that use it.

    Any thread with new evidence writes the attributes, and all threads read them without a lock. Each
    write is one assignment, and a reader that just missed one is corrected by its own evidence.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self.config = config
        self.name: Name | None = None
        """Its host name as of the last connect, if the name has to be resolved."""
        self.login = Login(config)
        self.label = config.label
        self.weight = config.weight
        self.state = State.UP
        self.role: Role | None = None
        self.read_only = False
        self.role_seen_at = 0.0
        self.role_doubted_at = 0.0
        """When an event occurred after which its role may be different."""
        self.role_changed_at = 0.0
        """When its role last changed: older evidence is ignored."""
        self.timeline: int | None = None
        """The last known timeline of a primary."""
        self.system: str | None = None
        self.outdated = False
        """Whether another server was promoted to a higher timeline: writes here would be lost."""
        self.lag: Lag | None = None
        """How far a standby is behind, if a group limits that."""
        self.reported_at = 0.0
        self.position = 0
        """The last position seen in its write-ahead log, on any timeline."""
        self.facts: Facts | None = None
        """Its part of the write-ahead log at the last query."""
        self.behind_at = 0.0
        """When that part was last too little for a read."""
        self.condemned_at = 0.0
        """When it went down: connections that have not worked since then are not lent."""
        self.suspected_at = 0.0
        """When a statement ran into its deadline: connections idle since then are pinged first."""
        self.doubtful = False
        """Whether a connection was lost since the last answer or failure of the server."""
        self.silent = False
        """Whether a ping went unanswered since then: a probe checks whether the server is up."""
        self.refuses = False
        """Whether it refused the last login, for a reason other than being full."""
        self.full_pause = 0.0
        """Seconds between two connects while the server is full; 0 if it is not."""
        self.full_until = 0.0
        """When the next connect to the full server is due."""
        self.dial_in_progress: Callable[[], DialInProgress | None] = no_dial
        """Returns the dial in progress while the endpoint is doubtful, if there is one."""
        self.groups: Sequence[User] = ()
        """The groups that use it; see `users_of`."""
        self.last_error: str | None = None
        self.last_error_at: float | None = None
        self.down_since: float | None = None
        self.opened = 0
        self.failovers = 0
        """The number of promotions of it that were seen."""
        self.on_down: Callable[[Endpoint], None] = lambda endpoint: None
        self.on_silent: Callable[[Endpoint], None] = lambda endpoint: None
        self.on_up: Callable[[Endpoint], None] = lambda endpoint: None
        self.on_seen: Callable[[Endpoint], None] = lambda endpoint: None
        self.on_role: Callable[[Endpoint], None] = lambda endpoint: None
        self.ids = itertools.count(1)
        self.way: dict[str, str] = {}
        """The parameters of the last address that worked, if there are several."""

    def __repr__(self) -> str:
        role = self.role.value if self.role else "role unknown"
        return f"<Endpoint {self.label} {self.state.value} {role}>"

    @property
    def connections(self) -> int:
        """The number of connections from this process to the server."""
        return sum(group.connections_to(self) for group in self.groups)

    @property
    def round_trip(self) -> float | None:
        """Seconds of a round trip to the server, measured on some connections; None if unknown."""
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
        """Drop the idle connections after an unanswered ping: the network may have forgotten them.

        The next connect and a probe will show whether the server is up.
        """
        self.note_error(reason)
        self.condemned_at = monotonic()
        self.doubtful = self.silent = True
        self.on_silent(self)

    def note_full(self) -> None:
        """Note that the server admits no further connection, and when to try the next connect."""
        least, most = FULL_PAUSE
        self.full_pause = min(max(self.full_pause * 2, least), most)
        self.full_until = monotonic() + self.full_pause * random.uniform(0.75, 1.25)

    def drain(self) -> None:
        """Take the endpoint out of use until `undrain`: connections in use end with their blocks."""
        if self.state is not State.DRAINING:
            self.state = State.DRAINING
            events.ENDPOINT_DRAIN("endpoint %s is being drained", self.label, endpoint=self.label)
        self.condemned_at = monotonic()
        self.timeline, self.outdated = None, False  # it no longer excludes an older primary
        self.on_down(self)

    def undrain(self) -> None:
        """Put a drained endpoint back into use; the next request shows whether it is up."""
        if self.state is State.DRAINING:
            self.state = State.UP
            events.ENDPOINT_UNDRAIN("endpoint %s is in use again", self.label, endpoint=self.label)
            self.on_up(self)

    def fits(self, config: EndpointConfig) -> bool:
        """Return whether connections opened before a change to that configuration remain valid."""
        return replace(config, **{key: getattr(self.config, key) for key in CHANGING}) == self.config

    def apply(self, config: EndpointConfig) -> None:
        """Apply a changed configuration that `fits`, from the next connection on."""
        if config != self.config:
            self.config, self.weight, self.login = config, config.weight, Login(config)

    def remove(self) -> None:
        """Take the endpoint out of use for good: it is no longer in the configuration."""
        events.ENDPOINT_REMOVED(
            "endpoint %s was removed, or is another server now", self.label, endpoint=self.label
        )
        self.state = State.DRAINING  # so that no probe or connect in progress marks it as up

    def begin_dial(self) -> DialInProgress:
        """Make the caller the one that dials a doubtful endpoint."""
        dial = DialInProgress()
        self.dial_in_progress = ref(dial)
        return dial

    def end_dial(self, dial: DialInProgress) -> None:
        """End a dial and release the threads that wait for its result."""
        self.dial_in_progress = no_dial
        dial.end()

    def note_error(self, reason: str) -> None:
        """Remember an error as evidence for messages and the status."""
        self.last_error = reason
        self.last_error_at = monotonic()

    def heard(self, conn: ServerSession) -> Role | None:
        """Return the role last reported on the connection, if it agrees with the known role.

        None if it differs or was not reported: its age decides which one is right, see `note_role`.
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

    def note_role(self, conn: ServerSession, since: float) -> Role:
        """Learn the server's role from its report on the connection, at no round trip.

        :param since: the earliest time at which the connection's last message may have been requested.
        :returns: the known role, which differs from the connection's if that report is older.

        `in_hot_standby` is reported by PostgreSQL 14 and later, at connect and when it changes:
        https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-ASYNC
        A pooler repeats the report from its own first login, so the server is asked: once for each
        connection, and again after a refusal that only a standby gives.
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
            in_recovery = conn.ask(b"SELECT pg_is_in_recovery()").get_value(0, 0)
            role = Role.STANDBY if in_recovery == b"t" else Role.PRIMARY
            conn.note_role(role.value)
        if not conn.reads and since >= self.role_changed_at:  # a session for reads makes itself read only
            self.read_only = status(b"default_transaction_read_only") == b"on"
        self._note(role, since)
        return self.role or role

    def _note(self, role: Role, since: float) -> bool:
        """Apply a report of the role; return whether it is not older than the last change."""
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

    def note_report(self, report: ServerReport, since: float) -> None:
        """Apply the answer to a status query that was sent at `since`."""
        if not self._note(Role.STANDBY if report.standby else Role.PRIMARY, since):
            return
        self.reported_at = report.at
        self.timeline, self.system = report.timeline, report.system
        self.position = report.position or 0
        self.on_seen(self)

    def note_facts(self, facts: Facts) -> None:
        """Remember the server's part of the write-ahead log."""
        self.facts, self.position = facts, facts.lsn

    def note_behind(self, facts: Facts) -> None:
        """Remember the server's part of the write-ahead log, which was too little for a read."""
        self.note_facts(facts)
        self.behind_at = monotonic()

    def found_behind(self) -> Facts | None:
        """Return the server's part of the write-ahead log, if that was too little a moment ago."""
        return self.facts if monotonic() - self.behind_at < BEHIND_LASTS else None

    def ask_timeline(self, conn: ServerSession) -> None:
        """Query the timeline of the server, on a connection that is not in use yet."""
        since = monotonic()
        try:
            result = conn.ask(QUERY)
        except psycopg.errors.DatabaseError as error:
            if conn.closed:
                raise
            # Not every server that speaks the protocol has a write-ahead log.
            reason = one_line(error)
            events.ENDPOINT_SILENT(
                "endpoint %s does not tell its timeline: %s", self.label, reason,
                endpoint=self.label, reason=reason,
            )  # fmt: skip
            return
        self.note_report(read(result, monotonic()), since)

    def refuses_writes(self, conn: ServerSession) -> bool:
        """Return whether a statement was refused (SQLSTATE 25006) because the server takes no writes.

        If so, its idle connections are pinged before they are lent again. If not, only the transaction
        is read only.
        """
        status = conn.pgconn.parameter_status
        standby = None if self.config.pooler else status(b"in_hot_standby")
        if standby is None:  # before PostgreSQL 14, and behind a pooler: ask again
            conn.note_role(None)
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

    def arrive(self) -> ConnectParameters:
        """Begin to obtain the parameters of a connection; see `ConnectParameters`."""
        self.name = Name.of(self.config, self.name)  # a service file may name another
        return ConnectParameters(self.name, self.login)

    def probe(self) -> StartupProbe:
        """Return a probe of whether the server accepts sessions."""
        probe = StartupProbe(self.config, self.login.user, self.name)
        self.name = probe.name
        return probe

    def statement_timeout(self, group: GroupConfig) -> int:
        """Return the statement_timeout of the group's connections in milliseconds; 0 for none."""
        return self.config.query_timeout if group.query_timeout is None else group.query_timeout

    def conninfo(self, group: GroupConfig, given: Mapping[str, str]) -> str:
        """Return libpq's connection string for a connection of the group, with the given parameters."""
        params: dict[str, Any] = self.config.conninfo_params()
        service = service_of(params)
        if service:
            params = dict(self.config.conninfo_params(service))
        params.update(given)
        # Even if it is empty: libpq would send PGOPTIONS otherwise.
        timeout = self.statement_timeout(group)
        params["options"] = self.config.server_options(timeout, service.get("options"))
        return make_conninfo("", **params)


def has_everywhere(positions: Iterable[Position], endpoints: Iterable[Endpoint]) -> bool:
    """Return whether each server that is not a primary is known to have the writes up to the positions."""
    facts = [endpoint.facts for endpoint in endpoints if endpoint.role is not Role.PRIMARY]
    return all(
        known is not None and judge(position, known, TIMELINES) is Verdict.PASSED
        for position in positions
        for known in facts
    )

"""Queries servers periodically for their role, timeline and replication lag.

Each status query uses a connection outside the pools, in steps that never wait. So it costs requests no
time: in threaded mode the background thread steps it, in lock-free mode a checkout does so in passing.
"""

from __future__ import annotations

import random
import select
from collections.abc import Callable, Generator, Iterable, Mapping
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import generators, pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.waiting import Wait

from .._servers.endpoint import Endpoint, Role, State
from .._servers.replication import QUERY, PrimaryHistory, ServerReport, read
from .._util import greenlets
from .._util import log_events as events
from ..errors import CredentialError, one_line

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

    from .._lending.group import Group
    from .._servers.connect_parameters import ConnectParameters

QUICKLY = (0.2, 0.3)
"""Seconds between two queries of a server while a group has no writer, drawn at random."""

SLOWLY = (10.0, 20.0)
"""Seconds between two queries while it has one: another server may have been promoted all the same."""

LAG_EVERY = (0.4, 0.6)
"""Seconds between two queries of servers whose lag counts."""

STATUS_TIMEOUT = 2.0
"""Seconds that a server has for its answer."""


def _events(wait: int) -> int:
    """Translate psycopg's wait events into those of poll()."""
    return (select.POLLIN if wait & Wait.R else 0) | (select.POLLOUT if wait & Wait.W else 0)


class StatusQuery:
    """One status query, step by step; its connection may serve for the next one.

    :param conninfo: returns the connection string, given address, user and password.
    :param arrive: begins to look these up.
    :param pgconn: an open connection to use instead of both.
    """

    query = QUERY

    def __init__(
        self,
        conninfo: Callable[[Mapping[str, str]], str],
        arrive: Callable[[], ConnectParameters],
        pgconn: pq.abc.PGconn | None = None,
    ) -> None:
        self.pgconn = pgconn
        self._arrive = arrive
        self._arrival: ConnectParameters | None = None
        self.missing = ""
        """The lookup under way, which a poller cannot see: the server's address, user or password."""
        self.report: ServerReport | None = None
        self.failure = ""
        self.asked_at: float | None = None
        """When it had a connection and sent the query."""
        self.answered = False
        """Whether the server answered, if only with an error."""
        self.moves = 0
        """How many steps it took: as long as that grows, the server responds."""
        self._steps = self._look(conninfo)
        self._waits: tuple[int, int] | None = None

    def step(self) -> bool:
        """Go on as far as possible without waiting; return whether it is over."""
        try:
            if self._waits is None:
                if self.pgconn is None:
                    self._arrival = self._arrival or self._arrive()
                    self.missing = self._arrival.missing
                    if self.missing:
                        return False
                self._waits = next(self._steps)
            while ready := self._ready(*self._waits):
                self.moves += 1
                self._waits = self._steps.send(ready)
        except StopIteration:
            return True
        except (psycopg.Error, CredentialError) as error:
            self.failure = one_line(error)
            self.close()
            return True
        return False

    def register(self, poller: select.poll) -> None:
        """Register the event that this waits for."""
        if self._waits is not None:
            fileno, wait = self._waits
            poller.register(fileno, _events(wait))

    def take(self, result: PGresult) -> None:
        """Take the answer to the question."""
        self.report = read(result, monotonic())

    def close(self) -> None:
        """Give up, and close the connection."""
        self._steps.close()
        if self.pgconn is not None:
            self.pgconn.finish()
            self.pgconn = None

    @staticmethod
    def _ready(fileno: int, wait: int) -> int:
        """Return which of the awaited events have occurred."""
        poller = greenlets.poller()
        poller.register(fileno, _events(wait))
        found = poller.poll(0)
        if not found:
            return 0
        event = found[0][1]
        ready = (Wait.R if event & ~select.POLLOUT else 0) | (Wait.W if event & ~select.POLLIN else 0)
        return ready & wait

    def _look(self, conninfo: Callable[[Mapping[str, str]], str]) -> Generator[tuple[int, int], int, None]:
        if self.pgconn is None:
            assert self._arrival is not None
            connecting: Any = generators.connect(conninfo(self._arrival.parameters()))
            self.pgconn = yield from connecting
        pgconn: Any = self.pgconn
        self.asked_at = monotonic()
        pgconn.send_query_params(self.query, None)
        executing: Any = generators.execute(pgconn)
        try:
            wait = next(executing)
            while True:
                wait = executing.send((yield pgconn.socket, wait))
        except StopIteration as end:
            (result,) = end.value
        self.answered = pgconn.status == pq.ConnStatus.OK
        if result.status == pq.ExecStatus.TUPLES_OK:
            self.take(result)
        else:
            self.failure = one_line(psycopg.OperationalError(result.get_error_message()))


class Observer:
    """Queries the servers of groups that write, and of groups that limit lag."""

    def __init__(
        self,
        groups: Iterable[Group],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._writing: dict[Endpoint, list[Group]] = {}
        self._limiting: dict[Endpoint, list[Group]] = {}
        groups = list(groups)
        self.plan = {
            (e, e.config.patroni, g.name, g.writes, g.config.max_lag) for g in groups for e in g.endpoints
        }
        """Which servers it queries, and for which groups."""
        everyone: dict[Endpoint, Group] = {}
        limited = False
        for group in groups:
            for endpoint in group.endpoints:
                everyone.setdefault(endpoint, group)
                if group.writes and len(group.endpoints) > 1:
                    self._writing.setdefault(endpoint, []).append(group)
                if group.config.max_lag is not None:
                    self._limiting.setdefault(endpoint, []).append(group)
                    limited = True
        self._login = everyone if limited else {e: everyone[e] for e in self._writing}
        self._limited = limited
        self._clock = clock
        self._due = dict.fromkeys(self._login, (0.0, 0.0))
        """When to query next: at the latest, and at the earliest, for groups without a writer."""
        self._queries: dict[Endpoint, tuple[StatusQuery, float]] = {}
        """Queries in progress, each with the time by which the server must respond."""
        self._kept: dict[Endpoint, pq.abc.PGconn] = {}
        self._histories: dict[str, PrimaryHistory] = {}
        self._standbys: dict[Endpoint, ServerReport] = {}

    @property
    def writing(self) -> list[Endpoint]:
        """The servers of groups that write to one of several."""
        return list(self._writing)

    @property
    def needed(self) -> bool:
        """Whether there is a server to query."""
        return bool(self._due)

    def hurry(self, endpoint: Endpoint) -> None:
        """Query a server now if it is observed."""
        if endpoint in self._due:
            self._due[endpoint] = (self._clock(),) * 2

    def step(self) -> float:
        """Do the work that is due, without waiting; return the seconds until there may be more to do."""
        now = self._clock()
        for endpoint in list(self._due):
            self._step(endpoint, now)
        if self._queries:
            return 0.01
        return max(0.01, min(map(self._due_at, self._due), default=now + 1.0) - now)

    def close(self) -> None:
        """Stop, and close the connections."""
        self._due.clear()
        for query, _ in self._queries.values():
            query.close()
        for pgconn in self._kept.values():
            pgconn.finish()
        self._queries.clear()
        self._kept.clear()

    def _step(self, endpoint: Endpoint, now: float) -> None:
        if endpoint not in self._queries:
            if now < self._due_at(endpoint):
                return
            if endpoint.state is not State.UP:  # the prober's task
                self._due[endpoint] = (now + random.uniform(*QUICKLY),) * 2
                return
            kept = self._kept.pop(endpoint, None)
            query = StatusQuery(partial(self._conninfo, endpoint), endpoint.arrive, kept)
            self._queries[endpoint] = query, now + STATUS_TIMEOUT
        query, deadline = self._queries[endpoint]
        moves = query.moves
        if not query.step():
            if query.moves > moves:  # in lock-free mode it may be long until the next step
                self._queries[endpoint] = query, now + STATUS_TIMEOUT
                return
            if now < deadline:
                return
        del self._queries[endpoint]
        latest = LAG_EVERY if self._limited else SLOWLY
        self._due[endpoint] = now + random.uniform(*latest), now + random.uniform(*QUICKLY)
        report, pgconn = query.report, query.pgconn
        if report is None or pgconn is None or not self._limited:
            query.close()
        else:
            self._kept[endpoint] = pgconn
        if report is None:
            reason = query.failure or f"no {query.missing or 'answer'}"
            events.ENDPOINT_SILENT(
                "endpoint %s: status query failed: %s",
                endpoint.label,
                reason,
                endpoint=endpoint.label,
                reason=reason,
            )
            return
        endpoint.note_report(report, query.asked_at or report.at)
        if self._limited:
            self._measure(endpoint, report)

    def _conninfo(self, endpoint: Endpoint, given: Mapping[str, str]) -> str:
        own = endpoint.conninfo(self._login[endpoint].config, given)
        name = conninfo_to_dict(own).get("application_name") or "pgdbpool"
        return make_conninfo(own, application_name=f"{name} observer")

    def _due_at(self, endpoint: Endpoint) -> float:
        latest, earliest = self._due[endpoint]
        waits = any(not group.has_writer() for group in self._writing.get(endpoint, ()))
        return earliest if waits else latest

    def _measure(self, endpoint: Endpoint, report: ServerReport) -> None:
        """Recompute replication lag after a new report."""
        history = self._histories.setdefault(report.system, PrimaryHistory())
        if report.standby:
            self._standbys[endpoint] = report
        else:
            self._standbys.pop(endpoint, None)
            endpoint.lag = None
            if report.position is not None and not endpoint.outdated:
                history.note(report.at, report.position)
        for standby, seen in self._standbys.items():
            if seen.system == report.system and standby.role is Role.STANDBY:
                standby.lag = history.lag(seen)
                for group in self._limiting.get(standby, ()):
                    group.note_lag(standby)

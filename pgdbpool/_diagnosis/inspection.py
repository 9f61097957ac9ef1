"""Queries the servers of a configuration once, for the facts that `pgdbpool check` prints.

Every endpoint is dialled as each of its groups would do it. `advice.py` draws conclusions from the facts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.rows import tuple_row

from .. import sizing
from .._lending.dialling import dial
from .._process import patroni
from .._request.tenant import bind_settings
from .._servers.balance import suits
from .._servers.driver import Driver, driver
from .._servers.endpoint import DialError, Endpoint, Role
from .._servers.replication import QUERY, Lag, ServerReport, behind
from .._servers.replication import parse as parse_report
from .._session.commands import BEGIN, set_local
from ..errors import UnsafeRoleError, one_line
from ..rls import Finding, role_findings

if TYPE_CHECKING:
    from .._config.model import Config, GroupConfig
    from .._session.connection import PooledConnection

ROUND_TRIPS = 5
"""Queries whose median is the round-trip time."""

FACTS = b"""
    SELECT pg_catalog.current_setting('server_version'),
           pg_catalog.current_setting('client_connection_check_interval', true),
           pg_catalog.current_setting('idle_in_transaction_session_timeout', true),
           (SELECT sum(numbackends) FROM pg_catalog.pg_stat_database),
           (SELECT timeline_id FROM pg_catalog.pg_control_checkpoint()),
           pg_catalog.pg_backend_pid(),
           (SELECT version || ' ' || cipher FROM pg_catalog.pg_stat_ssl
            WHERE pid = pg_catalog.pg_backend_pid() AND ssl)"""


@dataclass
class ServerFacts:
    """The facts about one endpoint; None for those that could not be queried."""

    label: str
    reachable: bool = False
    error: str | None = None
    down: bool = False
    """Whether the error means that the server cannot be reached, rather than that it refuses this login."""
    tls: str | None = None
    pooler: bool = False
    """Whether a pooler between client and server hands out its own sessions."""
    version: str | None = None
    role: str | None = None
    timeline: int | None = None
    system: str | None = None
    lag_bytes: int | None = None
    lag_seconds: float | None = None
    connect_seconds: float | None = None
    round_trip_seconds: float | None = None
    max_connections: int | None = None
    usable: int | None = None
    """`max_connections` less the reserved connections, or less by a CONNECTION LIMIT."""
    in_use: int | None = None
    """Sessions of all clients."""
    opens: int | None = None
    """Connections that all processes can open to it, with every server up."""
    opens_at_most: int | None = None
    """... and when it is the only one left."""
    patroni: bool | None = None
    """Whether its Patroni answers, if it has one."""
    settings: dict[str, str | None] = field(default_factory=dict)
    limits: sizing.Server | None = None
    demand: sizing.Demand | None = None


@dataclass
class GroupFacts:
    """The facts about one group."""

    name: str
    target: str
    connection_count: int
    served_by: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    """Why its other endpoints do not serve it, by label."""
    rls: list[Finding] = field(default_factory=list)


@dataclass
class Facts:
    """The facts about a configuration."""

    processes: int | None
    endpoints: dict[str, ServerFacts]
    groups: dict[str, GroupFacts]
    driver: Driver = field(default_factory=driver)

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as plain dicts, lists, strings and numbers, as JSON has them."""
        endpoints = {label: asdict(facts) for label, facts in self.endpoints.items()}
        for each in endpoints.values():
            del each["limits"], each["demand"], each["down"]
        groups = {name: asdict(facts) for name, facts in self.groups.items()}
        for every in groups.values():
            del every["rls"]
        return {
            "processes": self.processes,
            "driver": asdict(self.driver),
            "endpoints": endpoints,
            "groups": groups,
        }


def inspect(
    config: Config, *, processes: int | None = None, progress: Callable[[str], None] = lambda text: None
) -> Facts:
    """Connect to every endpoint of every group, one after the other, and return the facts.

    Each connection has its connect timeout, each query the same time.

    :param processes: how many use the configuration, in place of the configured number.
    :param progress: is called with the name of the next step.
    """
    processes = processes or config.processes
    endpoints = {each.label: Endpoint(each) for each in config.endpoints}
    servers = {label: ServerFacts(label) for label in endpoints}
    groups = {g.name: GroupFacts(g.name, g.target, g.connection_count) for g in config.groups.values()}
    reports: dict[str, ServerReport] = {}
    for number, (label, endpoint) in enumerate(endpoints.items(), 1):
        users = [group for group in config.groups.values() if label in group.endpoints]
        for group in users or [next(iter(config.groups.values()))]:  # one that no group uses is asked too
            progress(f"{label} ({number} of {len(endpoints)}), group {group.name}")
            facts = servers[label]
            if facts.down:
                groups[group.name].errors[label] = facts.error or ""
                continue
            error = _visit(endpoint, group, facts, groups[group.name].rls, reports)
            if not users:
                continue
            if error is None and endpoint.role and not suits(group.target, endpoint.role, endpoint.read_only):
                error = f"is a {endpoint.role.value}, the target is {group.target}"
            if error is None:
                groups[group.name].served_by.append(label)
            else:
                groups[group.name].errors[label] = error
        if url := endpoint.config.patroni:
            servers[label].patroni = patroni.ask(url).heard
    _compare(servers, reports)
    if processes is not None:
        roles = {label: facts.role for label, facts in servers.items()}
        for label, need in sizing.demand(config, processes, roles).items():
            facts = servers[label]
            facts.demand, facts.opens, facts.opens_at_most = need, need.usual, need.most
    return Facts(processes, servers, groups)


def _visit(
    endpoint: Endpoint,
    group: GroupConfig,
    facts: ServerFacts,
    findings: list[Finding],
    reports: dict[str, ServerReport],
) -> str | None:
    """Connect as the group does, and ask for missing facts; return why that failed."""
    timeout = group.connect_timeout or endpoint.config.connect_timeout
    began = monotonic()
    try:
        conn = dial(endpoint, group, timeout, True, tuple_row)
    except DialError as error:
        if not facts.reachable:
            facts.error, facts.down = str(error), error.down
        return str(error)
    connected = monotonic() - began
    conn.serve_a_report(max(timeout, 1.0))
    try:
        if not facts.reachable:
            facts.reachable, facts.error = True, None
            facts.connect_seconds = connected
            facts.role = endpoint.role.value if endpoint.role else None
            _ask(conn, facts, reports)
        if group.tenant is not None:
            conn.run(BEGIN + set_local(bind_settings(group.settings)))  # `role` may be among them
            findings += [f for f in role_findings(conn) if f not in findings]
            conn.rollback()
        if group.sqlprepare:
            sizing.answer(conn, b'SELECT count(*) FROM "SQLPrepare"."PrepareQueries"()')
    except (psycopg.Error, UnsafeRoleError) as error:
        return one_line(error)
    finally:
        conn.close()
    return None


def _ask(conn: PooledConnection, facts: ServerFacts, reports: dict[str, ServerReport]) -> None:
    """Ask a server for the facts that do not depend on the group; missing answers are left out."""
    times = []
    for _ in range(ROUND_TRIPS):
        began = monotonic()
        sizing.answer(conn, b"SELECT 1")
        times.append(monotonic() - began)
    facts.round_trip_seconds = statistics.median(times)
    facts.tls = "yes" if conn.pgconn.ssl_in_use else None
    try:
        version, check, idle, in_use, timeline, pid, tls = sizing.answer(conn, FACTS)
        facts.version = (version or "").split(" ")[0]
        facts.settings = {
            "client_connection_check_interval": check,
            "idle_in_transaction_session_timeout": idle,
        }
        facts.in_use = int(in_use or 0)
        facts.timeline = int(timeline or 0) or None
        facts.pooler = int(pid or 0) != conn.pgconn.backend_pid
        if facts.tls and tls:
            facts.tls = tls
        facts.limits = sizing.ask(conn)
        facts.max_connections, facts.usable = facts.limits.max_connections, facts.limits.usable
        report = parse_report(sizing.answer(conn, QUERY), monotonic())
        facts.timeline, facts.system = report.timeline or facts.timeline, report.system
        reports[facts.label] = report
    except psycopg.Error as error:
        if conn.closed:
            raise
        facts.error = one_line(error)


def _compare(servers: dict[str, ServerFacts], reports: dict[str, ServerReport]) -> None:
    """Work out how far each standby is behind its primary."""
    primaries = [report for report in reports.values() if not report.standby]
    for label, report in reports.items():
        if servers[label].role != Role.STANDBY.value:
            continue
        lags: list[Lag] = [lag for primary in primaries if (lag := behind(primary, report)) is not None]
        if lags:
            lag = max(lags)
            servers[label].lag_bytes, servers[label].lag_seconds = lag

"""How many connections servers admit, a configuration can open, and it should open.

>>> found = recommend({"read": ["db"], "write": ["db"]}, {"db": Server(100)}, processes=4, threads=8)
>>> found.groups["read"].connection_count, found.fits
(8, True)
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import generators
from psycopg.pq import ExecStatus

from ._config.check_endpoints import default_label

if TYPE_CHECKING:
    from ._config.model import Config, EndpointConfig, GroupConfig
    from ._session.connection import PooledConnection

__all__ = ["Demand", "GroupSize", "Recommendation", "Server", "demand", "recommend"]

HEADROOM = 0.1
"""Share of a server's connections that is left to others: administrators, backups, migrations."""

BUSY = 0.5
"""Share of a block's time in which the server works for it, unless it is measured."""

LIMITS = b"""
    SELECT pg_catalog.current_setting('max_connections')::int,
           pg_catalog.current_setting('superuser_reserved_connections')::int
               + coalesce(pg_catalog.current_setting('reserved_connections', true), '0')::int,
           (SELECT nullif(rolconnlimit, -1) FROM pg_catalog.pg_roles WHERE rolname = session_user),
           (SELECT nullif(datconnlimit, -1) FROM pg_catalog.pg_database
            WHERE datname = pg_catalog.current_database())"""


@dataclass(frozen=True, slots=True)
class Server:
    """The limits and the cores of a server."""

    max_connections: int
    reserved: int = 3
    """`superuser_reserved_connections` and, from PostgreSQL 16 on, `reserved_connections`."""
    cores: int | None = None
    role_limit: int | None = None
    """The role's ``CONNECTION LIMIT``."""
    database_limit: int | None = None
    """The database's ``CONNECTION LIMIT``."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max_connections", self.max_connections, 1),
            ("reserved", self.reserved, 0),
            ("cores", self.cores, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}={value!r} is not valid for a server: it is at least {least}")

    @property
    def usable(self) -> int:
        """Connections that it admits for the role, if no other client has any."""
        limits = (self.max_connections - self.reserved, self.role_limit, self.database_limit)
        return max(0, min(limit for limit in limits if limit is not None))


@dataclass(frozen=True, slots=True)
class GroupSize:
    """The recommendation for a group in each process, and the reason why it is not higher."""

    connection_count: int
    limited_by: str


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The result of `recommend`; `fits` is false if not even one connection for each group has room."""

    fits: bool
    type: str
    processes: int
    threads: int
    groups: dict[str, GroupSize]
    servers: dict[str, dict[str, int]]
    """For each server, `usable` connections, those `opened` at most, and `max_connections_needed` for
    groups that never wait."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain dicts, strings and numbers, as JSON has them."""
        return asdict(self)


def recommend(
    groups: Mapping[str, Collection[str]],
    servers: Mapping[str, Server],
    *,
    processes: int,
    threads: int = 1,
    headroom: float = HEADROOM,
    busy: float = BUSY,
) -> Recommendation:
    """Recommend each group's `connection_count` for processes with `threads` threads each.

    A group needs no more connections than the process has threads. All connections have room on each server,
    even if it is the only one left. Twice as many connections as cores, plus one, keep a server's cores busy;
    more would only wait for each other.

    :param groups: the servers that each group uses, by name.
    :param servers: the limits of each server, by the same names.
    :param threads: threads of a process, or greenlets, that have a block open at the same time.
    :param headroom: share of a server's connections that is left to others.
    :param busy: share of a block's time in which the server works for it; the rest is the application's.
    :raises ValueError: an invalid number, or a group with an unknown server or with none.
    """
    _check_sizes(groups, servers, processes, threads, headroom, busy)
    room: dict[str, dict[str, int]] = {}
    for name, server in servers.items():
        limits = {f"what {name} admits": math.floor(server.usable * (1 - headroom)) // processes}
        if server.cores is not None:
            limits[f"the cores of {name}"] = math.ceil((2 * server.cores + 1) / busy / processes)
        room[name] = limits
    counts = dict.fromkeys(groups, 1)
    limited: dict[str, str] = {}
    while open_groups := [group for group in groups if group not in limited]:
        for group in open_groups:  # in turn, so that the room is shared evenly
            reason = "threads" if counts[group] >= threads else _full(group, groups, counts, room)
            if reason:
                limited[group] = reason
            else:
                counts[group] += 1
    opened = {
        name: processes * sum(count for group, count in counts.items() if name in groups[group])
        for name in servers
    }
    wanted = {name: processes * threads * sum(name in used for used in groups.values()) for name in servers}
    return Recommendation(
        fits=all(opened[name] <= server.usable * (1 - headroom) for name, server in servers.items()),
        type="threaded" if threads > 1 else "non-threaded",
        processes=processes,
        threads=threads,
        groups={group: GroupSize(counts[group], limited[group]) for group in groups},
        servers={
            name: {
                "usable": server.usable,
                "opened": opened[name],
                "max_connections_needed": math.ceil(wanted[name] / (1 - headroom)) + server.reserved,
            }
            for name, server in servers.items()
        },
    )


def _check_sizes(
    groups: Mapping[str, Collection[str]],
    servers: Mapping[str, Server],
    processes: int,
    threads: int,
    headroom: float,
    busy: float,
) -> None:
    """Refuse invalid numbers, and groups without a known server; raises ValueError."""
    if processes < 1 or threads < 1:
        raise ValueError(f"processes={processes!r} and threads={threads!r} must be at least 1")
    if not 0 <= headroom < 1 or not 0 < busy <= 1:
        raise ValueError(f"headroom={headroom!r} must be from 0 to below 1, busy={busy!r} above 0 to 1")
    if not groups:
        raise ValueError("no group to recommend anything for")
    for group, names in groups.items():
        unknown = ", ".join(sorted(repr(name) for name in names if name not in servers))
        if unknown or not names:
            raise ValueError(f"group {group!r} uses {unknown or 'no server'}; known are {', '.join(servers)}")


def _full(
    group: str,
    groups: Mapping[str, Collection[str]],
    counts: Mapping[str, int],
    room: Mapping[str, Mapping[str, int]],
) -> str:
    """Return the limit that leaves no room for one more connection of the group, if any."""
    for name in groups[group]:
        total = sum(count for other, count in counts.items() if name in groups[other])
        for what, limit in sorted(room[name].items(), key=lambda item: item[1]):
            if total >= limit:
                return what
    return ""


@dataclass(frozen=True, slots=True)
class Demand:
    """How many connections all processes together can have to one server."""

    labels: tuple[str, ...]
    """The endpoints that are this server."""
    usual: int
    """With all servers of each group up and suitable, by weight."""
    most: int
    """With the other servers down, or after a failover to this one."""
    parts: dict[str, int]
    """`connection_count` of the groups that use it, in each process."""

    def verdict(self, server: Server, processes: int) -> str:
        """Return why the connections do not fit into the server, or nothing."""
        if self.most <= server.usable:
            return ""
        parts = " + ".join(f"{count} of {name}" for name, count in self.parts.items())
        when = "" if self.usual > server.usable else ", when it alone is left"
        limits = {"role": server.role_limit, "database": server.database_limit}
        of = "".join(f", CONNECTION LIMIT {limit} of the {what}" for what, limit in limits.items() if limit)
        return (
            f"{processes} processes can open {self.most} connections ({parts} in each){when}, and the server "
            f"admits {server.usable} (max_connections {server.max_connections}, {server.reserved} of them "
            f"reserved{of})"
        )


def demand(
    config: Config, processes: int, roles: Mapping[str, str | None] | None = None
) -> dict[str, Demand]:
    """Return the connections that these processes can open, for each endpoint by label.

    Endpoints with the same address are one server. Those behind a pooler are left out: their
    connections go to the pooler. The observer's connections are included.

    :param roles: `primary` or `standby` by label, if it is known.
    """
    weights = {endpoint.label: endpoint.weight for endpoint in config.endpoints}
    known = roles or {}
    servers: dict[str, list[EndpointConfig]] = {}
    for endpoint in config.endpoints:
        if endpoint.pooler is None:
            servers.setdefault(default_label(endpoint.conninfo_params()), []).append(endpoint)
    found: dict[str, Demand] = {}
    for endpoints in servers.values():
        labels = tuple(endpoint.label for endpoint in endpoints)
        parts: dict[str, int] = {}
        usual = 0
        for group in config.groups.values():
            if set(labels).isdisjoint(group.endpoints):
                continue
            parts[group.name] = group.connection_count
            fitting = _fitting(group, known)
            mine = sum(weights[label] for label in fitting if label in labels)
            usual += math.ceil(group.connection_count * mine / sum(weights[label] for label in fitting))
        if observed := sum(_observed(config, label) for label in labels):
            parts["the observer"] = observed
        each = Demand(labels, (usual + observed) * processes, sum(parts.values()) * processes, parts)
        found.update(dict.fromkeys(labels, each))
    return found


def _fitting(group: GroupConfig, roles: Mapping[str, str | None]) -> list[str]:
    """Return the endpoints whose roles, as far as known, suit the group; all if none does."""
    wanted = "primary" if group.writes else "standby"
    if group.target == "any":
        return list(group.endpoints)
    fitting = [label for label in group.endpoints if roles.get(label, wanted) in (wanted, None)]
    return fitting or list(group.endpoints)


def _observed(config: Config, label: str) -> bool:
    """Return whether each process has a separate connection to observe the endpoint."""
    groups: list[GroupConfig] = list(config.groups.values())
    limited = any(group.max_lag for group in groups)
    return any(
        label in group.endpoints and (limited or (group.writes and len(group.endpoints) > 1))
        for group in groups
    )


def ask(conn: PooledConnection, cores: int | None = None) -> Server:
    """Ask a server for its limits, in one round trip; raises psycopg.Error."""
    most, reserved, role, database = (None if value is None else int(value) for value in answer(conn, LIMITS))
    return Server(most or 0, reserved or 0, cores, role, database)


def answer(conn: PooledConnection, query: bytes) -> list[str | None]:
    """Return the one row of a query as text, on a connection that no block has; raises psycopg.Error."""
    conn.pgconn.send_query_params(query, None)
    (result,) = conn.wait(generators.execute(conn.pgconn))
    if result.status != ExecStatus.TUPLES_OK:
        raise psycopg.OperationalError(result.get_error_message())
    values = (result.get_value(0, column) for column in range(result.nfields))
    return [None if value is None else value.decode() for value in values]

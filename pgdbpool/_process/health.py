"""Whether the groups can be served: every server asked at the same time, within one deadline.

The examination never waits for a single server, so a server that hangs costs the others nothing. A question
goes over an idle connection of the pool, or over a new one if none is idle.
"""

from __future__ import annotations

import os
import select
from collections.abc import Mapping
from functools import partial
from time import monotonic
from typing import Any

from .._lending.group import Group, users_of
from .._lending.opening import DOWN_AFTER
from .._servers.endpoint import Endpoint, Role, State
from .._servers.replication import Lag, ServerReport, behind
from .._session.connection import PooledConnection
from .observer import StatusQuery

ASK_AGAIN = 0.005
"""Seconds between two checks whether a `user` or `pass` callable has returned."""

HEALTHY, DEGRADED, UNHEALTHY = "healthy", "degraded", "unhealthy"


class _Visit:
    """One server's examination, and its result."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.failure = ""
        self.over = False
        self.busy = False
        """Whether it refuses new connections, while the existing ones may still work."""
        self.began = monotonic()
        self._lent = self._borrow()
        self.pooled = self._lent is not None
        pgconn = self._lent[1].pgconn if self._lent else None
        group = users_of(endpoint)[0]
        self.query = StatusQuery(partial(endpoint.conninfo, group.config), endpoint.arrive, pgconn)

    def _borrow(self) -> tuple[Group, PooledConnection] | None:
        for group in users_of(self.endpoint):
            while conn := group.borrow(self.endpoint):
                if not conn.poll(0) or conn.alive():
                    return group, conn
                group.give_back(conn, "lost")
        return None

    @property
    def server_report(self) -> ServerReport | None:
        """The server's report on itself, if it sent one."""
        return self.query.report

    @property
    def role(self) -> Role | None:
        """The current role, or else the last known one."""
        if self.server_report is not None:
            return Role.STANDBY if self.server_report.standby else Role.PRIMARY
        return self.endpoint.role

    @property
    def serves(self) -> bool:
        """Whether blocks can run on it, if a group wants it."""
        return not self.failure or self.busy

    def end(self, waited: float | None, deadline: float) -> None:
        """Note the result, and give the borrowed connection back.

        :param waited: how long the server gave no answer, if time is up.
        """
        self.over = True
        query, endpoint = self.query, self.endpoint
        if waited is not None:
            self.failure = f"no {query.missing or 'answer'} within {waited:.3g} s"
        elif not query.answered:
            self.failure = query.failure or "no answer"
        if self.failure or not self.pooled:
            query.close()
        self._give_back(waited)
        if self.failure:
            # Refused, while blocks have connections: by a server that has no more of them, perhaps.
            if waited is None and endpoint.state is State.UP and endpoint.connections:
                probe = endpoint.probe()
                probe.run(max(deadline - monotonic(), 0.0))
                self.busy = probe.accepting
        elif endpoint.state is not State.DRAINING:
            if self.server_report is not None:
                endpoint.note_report(self.server_report, query.asked_at or self.began)
            endpoint.mark_up()

    def _give_back(self, waited: float | None) -> None:
        """Give back the connection that the question went over."""
        if self._lent is None:
            return
        group, conn = self._lent
        self._lent = None
        if not self.failure:
            conn.used_at = monotonic()
        elif waited is not None and waited >= min(group.config.ping_timeout, DOWN_AFTER):
            self.endpoint.suspected_at = monotonic()  # the next checkout pings before it lends
        group.give_back(conn, "no answer" if self.failure else None)

    def abandon(self) -> None:
        """Give up if the examination was interrupted."""
        if not self.over:
            self.query.close()
            if self._lent is not None:
                self._lent[0].give_back(self._lent[1], "interrupted")

    def report(self, unwanted: str | None, primaries: list[ServerReport]) -> dict[str, Any]:
        """Return the endpoint's part of the report; `unwanted` says why a group does without it."""
        endpoint, report, asked = self.endpoint, self.server_report, self.query.asked_at
        lag: Lag | None = endpoint.lag
        if report is not None and report.standby and lag is None:
            lag = next((found for primary in primaries if (found := behind(primary, report))), None)
        status = UNHEALTHY if not self.serves else DEGRADED if self.failure or unwanted else HEALTHY
        return {
            "status": status,
            "reachable": not self.failure,
            "state": endpoint.state.value,
            "role": self.role.value if self.role else None,
            "latency": _rounded(report.at - asked if report is not None and asked is not None else None),
            "connect_latency": _rounded(None if self.pooled or asked is None else asked - self.began),
            "lag_bytes": lag.bytes if lag else None,
            "lag_seconds": _rounded(lag.seconds if lag else None),
            "connections": endpoint.connections,
            "error": self.failure or unwanted,
        }


def examine(groups: Mapping[str, Group], endpoints: Mapping[str, Endpoint], timeout: float) -> dict[str, Any]:
    """Ask every server that a group uses, within the timeout (seconds), and return the report."""
    if not timeout > 0:
        raise ValueError(f"timeout={timeout!r} must be above 0 seconds")
    began = monotonic()
    visits: dict[str, _Visit] = {}
    try:
        for label, endpoint in endpoints.items():
            if users_of(endpoint):
                visits[label] = _Visit(endpoint)
        _wait(list(visits.values()), began, began + timeout)
    finally:
        for visit in visits.values():
            visit.abandon()
    in_groups = {name: _group(group, visits) for name, group in groups.items()}
    primaries = [
        v.server_report
        for v in visits.values()
        if v.server_report is not None and not v.server_report.standby
    ]
    in_endpoints = {label: visit.report(_unwanted(visit), primaries) for label, visit in visits.items()}
    every = {part["status"] for part in (*in_groups.values(), *in_endpoints.values())}
    served = all(part["status"] != UNHEALTHY for part in in_groups.values())
    return {
        "status": UNHEALTHY if not served else HEALTHY if every <= {HEALTHY} else DEGRADED,
        "pid": os.getpid(),
        "seconds": _rounded(monotonic() - began),
        "groups": in_groups,
        "endpoints": in_endpoints,
    }


def _wait(visits: list[_Visit], began: float, deadline: float) -> None:
    """Go on with all visits until they are over, or time is up."""
    while flying := [visit for visit in visits if not visit.over]:
        for visit in flying:
            if visit.query.step():
                visit.end(None, deadline)
            elif monotonic() >= deadline:
                visit.end(deadline - began, deadline)
        poller = select.poll()  # under gevent, other greenlets run meanwhile
        flying = [visit for visit in flying if not visit.over]
        for visit in flying:
            visit.query.register(poller)
        if flying:
            left = max(deadline - monotonic(), 0.0)
            asking = any(visit.query.missing for visit in flying)
            poller.poll((min(left, ASK_AGAIN) if asking else left) * 1000)


def _unwanted(visit: _Visit) -> str | None:
    """Return why a group does without a server that answers, for a reason other than its role."""
    refusals = (group.refusal(visit.endpoint, None) for group in users_of(visit.endpoint))
    return next((reason for reason in refusals if reason is not None), None)


def _group(group: Group, visits: Mapping[str, _Visit]) -> dict[str, Any]:
    """Return a group's part of the report."""
    serving: list[str] = []
    reasons: dict[str, str] = {}
    asked = [e for e in group.endpoints if e.label in visits]  # not one that was added meanwhile
    for endpoint in asked:
        visit = visits[endpoint.label]
        reason = group.refusal(endpoint, visit.role) if visit.serves else visit.failure
        if reason is None:
            serving.append(endpoint.label)
        else:
            reasons[endpoint.label] = reason
    pool = group.status()
    lost = any(visits[e.label].failure or group.refusal(e, None) for e in asked)
    available = pool.max_size - pool.in_use
    full = available <= 0 and pool.waiting > 0
    return {
        "status": UNHEALTHY if not serving else DEGRADED if lost or full else HEALTHY,
        "target": group.config.target,
        "served_by": serving,
        "not_served_by": reasons,
        "in_use": pool.in_use,
        "idle": pool.idle,
        "waiting": pool.waiting,
        "max_size": pool.max_size,
        "available": max(available, 0),
        "utilization": round(pool.in_use / pool.max_size, 3),
    }


def _rounded(seconds: float | None) -> float | None:
    """Return seconds without more digits than were measured."""
    return None if seconds is None else round(seconds, 6)

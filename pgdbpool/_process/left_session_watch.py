"""Asks servers about sessions that were left in a commit, and tells the groups which ones have ended."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING

from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from .observer import STATUS_TIMEOUT, StatusQuery

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

    from .._lending.group import Group
    from .._lending.left_sessions import LeftSession
    from .._servers.endpoint import Endpoint

ASK_EVERY = (0.2, 0.4)
"""Seconds between two questions to a server, drawn at random."""

UNKNOWN_FOR = 60.0
"""Seconds without an answer after which a session counts as ended."""

NOTHING_LEFT = 3600.0


class _Question(StatusQuery):
    """Asks a server which of these backend processes exist."""

    def __init__(
        self, pids: set[int], conninfo: Callable[[Mapping[str, str]], str], endpoint: Endpoint,
        pgconn: pq.abc.PGconn | None,
    ) -> None:  # fmt: skip
        self.pids = pids
        self.query = (
            "SELECT pid, backend_start FROM pg_catalog.pg_stat_activity "
            f"WHERE pid IN ({', '.join(map(str, sorted(pids)))})"
        ).encode()
        self.processes: dict[int, bytes] | None = None
        super().__init__(conninfo, endpoint.arrive, pgconn)

    def take(self, result: PGresult) -> None:
        self.processes = {
            int(result.get_value(row, 0) or b"0"): result.get_value(row, 1) or b""
            for row in range(result.ntuples)
        }


class LeftSessionWatch:
    """Asks each server about the sessions left there, over a separate connection."""

    def __init__(self, groups: Iterable[Group], clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._due: dict[Endpoint, float] = {}
        self._questions: dict[Endpoint, tuple[_Question, float]] = {}
        self._kept: dict[Endpoint, pq.abc.PGconn] = {}
        self.watch(groups)

    def watch(self, groups: Iterable[Group]) -> None:
        """Ask about the sessions that these groups have left from now on."""
        self._groups = list(groups)

    @property
    def needed(self) -> bool:
        """Whether there is a session to ask about, or a connection to close."""
        return bool(self._kept) or any(group.left for group in self._groups)

    def step(self) -> float:
        """Do the work that is due, without waiting; return the seconds until there may be more to do."""
        if not self.needed:
            return NOTHING_LEFT
        now = self._clock()
        sessions: defaultdict[Endpoint, list[tuple[Group, LeftSession]]] = defaultdict(list)
        for group in self._groups:
            for session in list(group.left):
                sessions[session.endpoint].append((group, session))
        for endpoint in {*self._questions, *self._kept}.difference(sessions):
            self._forget(endpoint)
        for endpoint, left in sessions.items():
            self._step(endpoint, left, now)
        if self._questions:
            return 0.01
        return max(0.01, min(self._due.values(), default=now + NOTHING_LEFT) - now)

    def close(self) -> None:
        """Stop asking, and close the connections."""
        self._groups.clear()
        for endpoint in {*self._questions, *self._kept}:
            self._forget(endpoint)

    def _step(self, endpoint: Endpoint, left: list[tuple[Group, LeftSession]], now: float) -> None:
        if endpoint not in self._questions:
            if now < self._due.get(endpoint, 0.0):
                return
            conninfo = partial(_conninfo, endpoint, left[0][0])
            question = _Question(
                {session.pid for _, session in left}, conninfo, endpoint, self._kept.pop(endpoint, None)
            )
            self._questions[endpoint] = question, now + STATUS_TIMEOUT
        question, deadline = self._questions[endpoint]
        if not question.step() and now < deadline:
            return
        del self._questions[endpoint]
        self._due[endpoint] = now + random.uniform(*ASK_EVERY)
        if question.processes is None or question.pgconn is None:
            question.close()
        else:
            self._kept[endpoint] = question.pgconn
        for group, session in left:
            if question.processes is not None:
                # A session that was left after the question was sent is not part of it.
                if session.pid in question.pids and session.gone(question.processes):
                    group.let_go(session, "it is gone")
            elif now - session.heard_at > UNKNOWN_FOR:
                group.let_go(session, f"the server did not tell for {UNKNOWN_FOR:g} s")

    def _forget(self, endpoint: Endpoint) -> None:
        self._due.pop(endpoint, None)
        if asked := self._questions.pop(endpoint, None):
            asked[0].close()
        if pgconn := self._kept.pop(endpoint, None):
            pgconn.finish()


def _conninfo(endpoint: Endpoint, group: Group, given: Mapping[str, str]) -> str:
    own = endpoint.conninfo(group.config, given)
    name = conninfo_to_dict(own).get("application_name") or "pgdbpool"
    return make_conninfo(own, application_name=f"{name} observer")

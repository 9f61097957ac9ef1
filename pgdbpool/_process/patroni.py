"""Patroni's REST API, for servers with `patroni`: which server to query, and whether to wait for a primary.

It supplements the servers' own evidence and never replaces it: a server counts as the primary only if it says
so itself. Patroni is asked only while a block finds no server to write to, in a bounded number of threads, so
that a Patroni that is unreachable or hangs stops nothing.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .._servers.endpoint import Endpoint, Role, State
from .._util.background_call import BackgroundCall
from ..errors import Error

if TYPE_CHECKING:
    from .._lending.group import Group

EVERY = 0.1
"""Seconds between two questions to the same member."""

ASK_WITHIN = 2.0
"""Seconds that a member has for its answer; it may hang in a restart, which others report after one."""

WANTED_FOR = 1.0
"""Seconds for which members are asked after a block's request."""

SILENT_FOR = 5.0
"""Seconds during which no block waits for a member that did not answer the last time."""

LOOK_EVERY = 0.02
"""Seconds between two checks by a block that waits."""

NOTHING_DUE = 3600.0
_MOST = 1 << 20
_PRIMARY = ("primary", "master")
_LEADER = ("leader", "standby_leader")


@dataclass(frozen=True, slots=True)
class Word:
    """The report of a member's Patroni."""

    heard: bool = False
    """Whether it answered."""
    primary: bool = False
    """Whether its server is the primary and runs."""
    timeline: int | None = None
    moving: bool = False
    """Whether the primary is being stopped, restarted or replaced."""


def understand(own: Mapping[str, Any], cluster: Mapping[str, Any]) -> Word:
    """Return the combined meaning of a member's `/patroni` and `/cluster`."""
    leads, runs = own.get("role") in _PRIMARY, own.get("state") == "running"
    members = [member for member in cluster.get("members") or () if isinstance(member, dict)]
    leaders = [member for member in members if member.get("role") in _LEADER]
    moving = (
        own.get("role") == "demoted"
        or (leads and not runs)
        or (bool(members) and not leaders)
        or any(leader.get("state") != "running" for leader in leaders)
    )
    paused = bool(own.get("pause") or cluster.get("pause"))  # then Patroni promotes no server
    timeline = own.get("timeline")
    return Word(True, leads and runs, timeline if isinstance(timeline, int) else None, moving and not paused)


def ask(url: str) -> Word:
    """Ask a member for its own state and for that of its cluster; it may wait for some seconds."""
    answers = []
    for path in ("/patroni", "/cluster"):
        try:
            found = _get(url, path)
        except (OSError, ValueError, http.client.HTTPException):
            return Word()
        answers.append(found if isinstance(found, dict) else {})
    return understand(*answers)


def _get(url: str, path: str) -> Any:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port or 8008, timeout=ASK_WITHIN)
    try:
        connection.request("GET", parts.path.rstrip("/") + path)
        return json.loads(connection.getresponse().read(_MOST))  # also with 503, of one that does not run
    finally:
        connection.close()


class Patronis:
    """Asks the members while a block waits for a primary; a part of the background.

    :param look: has a server queried, or probed, at once.
    """

    def __init__(
        self,
        endpoints: Iterable[Endpoint],
        look: Callable[[Endpoint], None],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._urls = {endpoint: endpoint.config.patroni or "" for endpoint in endpoints}
        self._look = look
        self._clock = clock
        self._until = 0.0
        self._asked: dict[Endpoint, BackgroundCall[Word]] = {}
        self._words: dict[Endpoint, tuple[float, Word]] = {}
        """The last report of each member, and when it was requested."""
        self._primaries: dict[Endpoint, float] = {}
        """The members that report being the primary, and the time of their first such report."""

    @property
    def needed(self) -> bool:
        """Whether a block waits for a primary."""
        return bool(self._urls) and self._clock() < self._until

    def step(self) -> float:
        """Do the work that is due, without waiting; return the seconds until there may be more to do."""
        if not self.needed:
            return NOTHING_DUE
        now = self._clock()
        for endpoint, url in self._urls.items():
            asking = self._asked.get(endpoint)
            if asking is not None and asking.over:
                del self._asked[endpoint]
                self._note(endpoint, asking)
            elif asking is None and now >= self._words.get(endpoint, (0.0, Word()))[0] + EVERY:
                self._asked[endpoint] = BackgroundCall(partial(ask, url), url, Error)
        return LOOK_EVERY

    def close(self) -> None:
        """Stop asking."""
        self._urls = {}

    def _note(self, endpoint: Endpoint, asking: BackgroundCall[Word]) -> None:
        word = asking.answer() if asking.answered else Word()
        self._words[endpoint] = asking.began, word
        if not word.primary:
            self._primaries.pop(endpoint, None)
            return
        self._primaries.setdefault(endpoint, asking.began)
        behind = (word.timeline or 0) > (endpoint.timeline or 0)
        if behind or endpoint.role is not Role.PRIMARY or endpoint.state is not State.UP:
            self._look(endpoint)

    def moving(self, since: float) -> bool:
        """Return whether a member has reported after that time that a primary is on its way."""
        return any(
            word.moving or (word.primary and self._may_be_there(endpoint))
            for endpoint, (at, word) in self._words.items()
            if at >= since
        )

    def _may_be_there(self, endpoint: Endpoint) -> bool:
        """Return whether a server has not failed since its Patroni began to call it the primary."""
        failed = endpoint.last_error_at or 0.0
        return endpoint.state is State.UP or failed < self._primaries.get(endpoint, 0.0)

    def heard(self, since: float) -> bool:
        """Return whether all members, except those known not to answer, were asked after that time."""
        now = self._clock()
        return all(self._told(endpoint, since, now) for endpoint in self._urls)

    def _told(self, endpoint: Endpoint, since: float, now: float) -> bool:
        at, word = self._words.get(endpoint, (0.0, Word()))
        asking = self._asked.get(endpoint)
        hangs = asking is not None and now >= asking.began + ASK_WITHIN
        return hangs or at >= since or (not word.heard and now < at + SILENT_FOR)

    def await_writer(self, group: Group, deadline: float, step: Callable[[], object]) -> bool:
        """Wait while a primary is on its way; return whether the group has one by then.

        :param step: steps the background, or wakes its thread.
        """
        since = self._clock()
        while (now := self._clock()) < deadline:
            self._until = now + WANTED_FOR
            step()
            time.sleep(min(LOOK_EVERY, deadline - now))
            if group.has_writer():
                return True
            if self.heard(since) and not self.moving(max(since, now - ASK_WITHIN)):
                return False
        return False

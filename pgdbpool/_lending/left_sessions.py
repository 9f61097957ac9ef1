"""A session that was left in a commit: it keeps its slot until the server has ended it."""

from __future__ import annotations

from collections.abc import Mapping
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .._servers.endpoint import Endpoint
    from .._session.slot import Slot


class LeftSession:
    """A session whose connection was closed while the server may have been committing in it."""

    __slots__ = ("endpoint", "heard_at", "pid", "since", "slot", "started")

    def __init__(self, slot: Slot, endpoint: Endpoint, pid: int) -> None:
        self.slot = slot
        """Its slot, which stays taken."""
        self.endpoint = endpoint
        self.pid = pid
        self.started: bytes | None = None
        """When its process began, by the clock of the server: the pid may be reused later."""
        self.since = self.heard_at = monotonic()

    def gone(self, processes: Mapping[int, bytes]) -> bool:
        """Return whether it is not among the processes of the server, given as pids and start times."""
        self.heard_at = monotonic()
        if self.pid not in processes:
            return True
        if self.started is None:
            self.started = processes[self.pid]
        return self.started != processes[self.pid]

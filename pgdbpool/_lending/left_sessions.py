"""A session that was left in a commit: it keeps its place in its group until the server has let it go."""

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
        """Its place, which it keeps."""
        self.endpoint = endpoint
        self.pid = pid
        self.started: bytes | None = None
        """When its process began, as the server says: another one may get the number later."""
        self.since = self.heard_at = monotonic()

    def gone(self, processes: Mapping[int, bytes]) -> bool:
        """Return whether it is not among the server's processes, which are numbers and beginnings."""
        self.heard_at = monotonic()
        if self.pid not in processes:
            return True
        if self.started is None:
            self.started = processes[self.pid]
        return self.started != processes[self.pid]

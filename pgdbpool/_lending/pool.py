"""The interface of the two pools, `ThreadedPool` and `LockFreePool`.

A pool knows connections and slots, not servers. `take` returns an idle connection or a free slot, in
which the caller opens a connection itself. So the caller gets the error of a failed connect at once, and
a burst of requests connects in parallel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from .._session.connection import PooledConnection
from .._session.slot import Slot

Dial = Callable[[Slot], PooledConnection]
"""Opens a connection in a slot in the background; raises `Error` if that fails."""

Drop = Callable[[PooledConnection, str], None]
"""Closes a connection, with a reason, and frees its slot."""


class NoConnection(Exception):
    """Nothing became free in time; `reason` is one of the class's constants."""

    TIMEOUT, EXHAUSTED, QUEUE_FULL, CLOSED = "timeout", "exhausted", "queue full", "closed"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Pool(Protocol):
    """A pool, as its group uses it."""

    taken: int
    """The number of successful calls of `take`, with and without a wait."""
    missing: bool
    """Whether the group has to open connections to reach `min_size`."""

    @property
    def size(self) -> int:
        """The number of taken slots: of idle and lent connections, and of those being opened."""

    @property
    def idle(self) -> int:
        """The number of idle connections."""

    @property
    def waiting(self) -> int:
        """The number of waiters."""

    def slots(self) -> list[Slot]:
        """Return the taken slots."""

    def lendable(self) -> list[PooledConnection]:
        """Return the idle connections."""

    def grab(self, thread: int) -> PooledConnection | None:
        """Take an idle connection without waiting; None leaves it to `take` to decide.

        :param thread: the calling thread.
        """

    def take(self, timeout: float, high: bool = False) -> PooledConnection | Slot:
        """Take the longest idle connection, or a slot in which the caller opens one.

        :param high: whether the caller may use reserved connections, and waits ahead of callers that may not.
        :raises NoConnection: neither became free within the timeout (seconds).
        """

    def bring_forward(self, conn: PooledConnection) -> None:
        """Let the next caller have this idle connection."""

    def give(self, conn: PooledConnection) -> None:
        """Hand a connection to the first waiter; without waiters it becomes idle."""

    def free(self, slot: Slot) -> None:
        """Free a slot at once, even if references to it remain."""

    def claim(self) -> Slot | None:
        """Take a free slot without waiting."""

    def hold_back(self, pause: float) -> bool:
        """Hand out no slots, since the servers are full, until a background connect succeeds.

        :param pause: seconds until the first such connect.
        :returns: whether a background exists; if not, the caller has to retry.
        """

    def refill(self) -> None:
        """Have connections opened until there are `min_size`."""

    def remove(self, unwanted: Callable[[PooledConnection], bool]) -> list[PooledConnection]:
        """Take idle connections out, for the caller to close."""

    def adjust(
        self, *, min_size: int, max_size: int, max_idle: float, max_waiting: int, reserved: int
    ) -> None:
        """Apply new limits. Waiters get added capacity at once; closing the surplus is up to the group."""

    def mine(self) -> bool:
        """Return whether the calling thread may take connections out."""

    def close(self, timeout: float) -> None:
        """Close the idle connections and refuse further use; those lent are closed as they come back."""

    def abandon(self) -> None:
        """Forget everything without touching it: the process was forked."""


def take_out(
    idle: deque[PooledConnection], unwanted: Callable[[PooledConnection], bool]
) -> list[PooledConnection]:
    """Take connections out; a signal handler may do the same meanwhile, in the same thread."""
    removed = []
    for conn in list(idle):
        if unwanted(conn):
            with suppress(ValueError):  # gone already
                idle.remove(conn)
                removed.append(conn)
    return removed

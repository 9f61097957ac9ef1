"""What a group asks of its pool, whichever of the two it is: `ThreadedPool` or `LockFreePool`.

A pool knows connections and slots, not servers. `take` gives an idle connection or a free slot, in
which the caller opens a connection itself, so that an error is its own at once and a burst of
requests connects side by side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from .._session.connection import PooledConnection
from .._session.slot import Slot

Dial = Callable[[Slot], PooledConnection]
"""Opens a connection in a slot in the background; raises `Error` where it cannot."""

Drop = Callable[[PooledConnection, str], None]
"""Closes a connection, for a reason, and gives its slot back."""


class NoConnection(Exception):
    """Nothing became free in time; `reason` is one of the class's constants."""

    TIMEOUT, EXHAUSTED, QUEUE_FULL, CLOSED = "timeout", "exhausted", "queue full", "closed"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Pool(Protocol):
    """What a group asks of its pool."""

    taken: int
    """How often `take` succeeded, waits included."""
    missing: bool
    """Whether connections are to be opened for `min_size`, by whom the group finds for it."""

    @property
    def size(self) -> int:
        """Slots taken: idle, lent, or being connected."""

    @property
    def idle(self) -> int:
        """Connections that wait for a request."""

    @property
    def waiting(self) -> int:
        """Requests that wait for a connection."""

    def slots(self) -> list[Slot]:
        """Return the slots that are taken."""

    def lendable(self) -> list[PooledConnection]:
        """Return the connections that wait for a request."""

    def take(self, timeout: float, high: bool = False) -> PooledConnection | Slot:
        """Take the connection that is idle longest, or a slot for the caller to fill.

        :param high: whether it may be one of those reserved, and goes before those who may not.
        :raises NoConnection: when neither became free within the timeout (seconds).
        """

    def give(self, conn: PooledConnection) -> None:
        """Hand a connection to the first in the queue, else make it idle."""

    def free(self, slot: Slot) -> None:
        """Give a slot back at once, whoever still refers to it."""

    def claim(self) -> Slot | None:
        """Take a free slot without waiting."""

    def hold_back(self, pause: float) -> bool:
        """Hand out no slots, since the servers are full, until one was found to have room, in the background.

        :param pause: seconds until that is worth a try.
        :returns: whether there is a background; else the caller tries.
        """

    def refill(self) -> None:
        """See to it that there are `min_size` connections again."""

    def remove(self, unwanted: Callable[[PooledConnection], bool]) -> list[PooledConnection]:
        """Take idle connections out, for the caller to close."""

    def adjust(
        self, *, min_size: int, max_size: int, max_idle: float, max_waiting: int, reserved: int
    ) -> None:
        """Change the sizes; who waits gets what there is more of, what is too much is left to the group."""

    def mine(self) -> bool:
        """Tell whether the calling thread may take connections out."""

    def close(self, timeout: float) -> None:
        """Close the idle connections and refuse further use; those lent are closed as they come back."""

    def abandon(self) -> None:
        """Forget everything without touching it: the process was forked."""


def take_out(
    idle: deque[PooledConnection], unwanted: Callable[[PooledConnection], bool]
) -> list[PooledConnection]:
    """Take connections out, also where a signal handler does so meanwhile, in the same thread."""
    removed = []
    for conn in list(idle):
        if unwanted(conn):
            with suppress(ValueError):  # gone already
                idle.remove(conn)
                removed.append(conn)
    return removed

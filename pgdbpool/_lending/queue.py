"""The queue of a threaded pool."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from threading import Lock

from .._session.connection import PooledConnection
from .._session.slot import Slot


class Queue:
    """The waiters: first come, first served, but those of high priority before the others."""

    def __init__(self) -> None:
        self.high: deque[Waiter] = deque()
        self.normal: deque[Waiter] = deque()

    def __len__(self) -> int:
        return len(self.high) + len(self.normal)

    def __iter__(self) -> Iterator[Waiter]:
        yield from (*self.high, *self.normal)

    def clear(self) -> None:
        """Remove all; called by psycopg_pool after it has failed each of them."""
        self.high.clear()
        self.normal.clear()


class Waiter:
    """A place in the queue; the lock of the pool guards `got`, and `wake` is held until it is served.

    psycopg_pool's WaitingClient uses a threading.Condition, which stays locked forever if the thread is
    interrupted while it enters. This class needs only two operations of a plain lock.
    """

    __slots__ = ("closed", "got", "wake")

    def __init__(self) -> None:
        self.got: PooledConnection | Slot | None = None
        self.closed = False
        self.wake = Lock()
        self.wake.acquire()

    def fail(self, error: Exception) -> bool:
        """Wake the waiter because the pool is closed; called by psycopg_pool."""
        self.closed = True
        if self.got is None:
            self.wake.release()
        return True

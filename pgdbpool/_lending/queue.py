"""The queue of a threaded pool."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from threading import Lock

from .._session.connection import PooledConnection
from .._session.slot import Slot


class Queue:
    """Those who wait: first come, first served, but those of high priority before the others."""

    def __init__(self) -> None:
        self.high: deque[Waiter] = deque()
        self.normal: deque[Waiter] = deque()

    def __len__(self) -> int:
        return len(self.high) + len(self.normal)

    def __iter__(self) -> Iterator[Waiter]:
        yield from (*self.high, *self.normal)

    def clear(self) -> None:
        """Forget all; called by psycopg_pool, which tells them that the pool is closed."""
        self.high.clear()
        self.normal.clear()


class Waiter:
    """A place in the queue; the pool's lock guards `got`, and `wake` is held until there is news.

    psycopg_pool's WaitingClient is built on threading.Condition, which stays locked for ever when the
    thread is interrupted on its way in. This one is two operations of a plain lock.
    """

    __slots__ = ("closed", "got", "wake")

    def __init__(self) -> None:
        self.got: PooledConnection | Slot | None = None
        self.closed = False
        self.wake = Lock()
        self.wake.acquire()

    def fail(self, error: Exception) -> bool:
        """Tell that the pool is closed; called by psycopg_pool."""
        self.closed = True
        if self.got is None:
            self.wake.release()
        return True

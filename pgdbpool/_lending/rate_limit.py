"""Limits how often blocks of a group may begin: a token bucket with a queue."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from time import monotonic
from typing import TYPE_CHECKING, Any

from .._request import deadline as deadlines
from ..errors import RateLimitExceeded

if TYPE_CHECKING:
    from .._config.model import RateLimit


_NOW = 1e-6
"""Seconds to the next token that count as none: a token taken early is owed, so the rate stays exact."""


class _Turn:
    """A place in the queue; `wake` is held until the waiting time has to be computed again."""

    __slots__ = ("wake",)

    def __init__(self) -> None:
        self.wake = threading.Lock()
        self.wake.acquire()


def _until_woken(turn: _Turn, seconds: float) -> None:
    turn.wake.acquire(timeout=seconds)


class RateLimiter:
    """A token bucket: `per_second` tokens come in, up to `burst` are kept, and a block takes one.

    If the bucket is empty, callers wait in a queue, and a waiter takes its token by leaving the queue. So
    an interrupted waiter has taken none, and those behind it move up. A token that came in for a waiter
    is kept for it beyond `burst`: a thread that wakes late loses nothing, and over time the rate is
    exact.

    `_lock` guards the queue and the level; it is never held during a wait. It is re-entrant, since a signal
    handler or a finalizer may begin a block. In lock-free mode it does nothing, and the queue holds one
    waiter at most.
    """

    def __init__(
        self,
        config: RateLimit,
        group: str,
        *,
        lock_free: bool,
        clock: Callable[[], float] = monotonic,
        wait: Callable[[_Turn, float], None] = _until_woken,
    ) -> None:
        self._config = config
        self._group = group
        self._clock = clock
        self._wait = wait
        self._lock: AbstractContextManager[Any] = nullcontext() if lock_free else threading.RLock()
        self._queue: list[_Turn] = []
        self._level = (float(config.burst), clock())
        """The number of tokens and its time: one attribute, so that both change at once."""

    def acquire(self) -> None:
        """Take a token; wait for it within `max_wait` and the current deadline.

        :raises RateLimitExceeded: it would take longer; this is raised at once, without waiting.
        :raises DeadlineExceeded: the deadline has passed already.
        """
        if deadlines.in_use:
            deadlines.check(self._group)
        turn: _Turn | None = None
        try:
            with self._lock:
                due = self._due(len(self._queue))
                if due <= _NOW:
                    self._take()
                    return
                self._admit(due)
                turn = _Turn()
                self._queue.append(turn)
            while True:
                self._wait(turn, due)
                with self._lock:
                    place = self._queue.index(turn)
                    due = self._due(place)
                    if due <= _NOW:
                        # Out of the queue first: interrupted between the two, it has taken nothing.
                        del self._queue[place]
                        self._take()
                        return
        except BaseException:
            if turn is not None:
                self._leave(turn)
            raise

    def _admit(self, due: float) -> None:
        allowed = self._config.max_wait
        left = deadlines.time_left() if deadlines.in_use else None
        if left is not None:
            allowed = min(allowed, left)
        if due > allowed:
            raise RateLimitExceeded(
                f"group {self._group!r}: the rate limit of {self._config.per_second:g} blocks per second is "
                f"reached; {len(self._queue)} wait already, there is room in {due:.3f} s, and this one may "
                f"wait {max(allowed, 0.0):.3f} s",
                group=self._group,
                retry_after=due,
            )

    # The caller must hold `_lock`.

    def _due(self, place: int) -> float:
        """Update the level; return the seconds until the token for this place."""
        tokens, at = self._level
        now, rate = self._clock(), self._config.per_second
        tokens = min(tokens + (now - at) * rate, float(self._config.burst + len(self._queue)))
        self._level = (tokens, now)
        return (place + 1 - tokens) / rate

    def _take(self) -> None:
        tokens, at = self._level
        self._level = (tokens - 1, at)

    def _leave(self, turn: _Turn) -> None:
        """Take the turn out of the queue, if it is there; the waiters behind it move up."""
        with self._lock:
            if turn not in self._queue:
                return
            place = self._queue.index(turn)
            del self._queue[place]
            for behind in self._queue[place:]:
                if behind.wake.locked():
                    behind.wake.release()

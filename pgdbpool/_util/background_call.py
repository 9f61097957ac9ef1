"""Calls that may hang: each runs in its own thread, and callers wait for it with a bound."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any, Generic, TypeVar

import psycopg

from ..errors import Error

BORN_WITHIN = 5.0
"""Seconds after which a thread that has not started counts as failed."""

AGAIN_AFTER = 60.0
"""Seconds after which a call that has not returned is made again, in another thread."""

AT_MOST = 5
"""Threads that may hang at the same time."""

_Answer = TypeVar("_Answer")


class Latch:
    """Shut until it is opened, and open from then on; an Event could be left locked by an interruption."""

    __slots__ = ("_lock", "opened")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self.opened = False

    def open(self) -> None:
        """Release all waiters, now and later."""
        self.opened = True
        try:  # noqa: SIM105  suppress() would add calls in which an interruption could occur
            self._lock.release()
        except RuntimeError:
            pass  # open already

    def wait(self, timeout: float) -> None:
        """Wait until it is open, at most for the timeout (seconds)."""
        try:
            self._lock.acquire(timeout=max(timeout, 0.0))
        finally:  # for the next waiter, also if this one is interrupted with the lock held
            if self.opened:
                try:  # noqa: SIM105
                    self._lock.release()
                except RuntimeError:
                    pass  # by another


class BackgroundCall(Generic[_Answer]):
    """A call in its own thread; callers go on meanwhile, or wait.

    :param failure: raised by `answer` if the call did not return.
    """

    def __init__(self, ask: Callable[[], _Answer], what: str, failure: type[Exception]) -> None:
        self.began = monotonic()
        self._ask = ask
        self._answer: _Answer | None = None
        self._failure, self._reason = failure, f"{what}: no answer"
        self._begun = False
        self._over = Latch()
        try:
            # Not Thread.start(), which waits for the thread without a bound: an asynchronous exception for
            # the thread that starts another may end that one before it runs.
            _thread.start_new_thread(self._run, ())
        except RuntimeError:  # there are no more threads, or the interpreter is about to end
            self._run()

    @property
    def answered(self) -> bool:
        """Whether it has returned or failed."""
        return self._over.opened

    @property
    def over(self) -> bool:
        """Whether waiting is pointless: the answer has come, or the thread never started."""
        return self.answered or (not self._begun and monotonic() > self.began + BORN_WITHIN)

    @property
    def under_way(self) -> bool:
        """Whether an answer may still come."""
        return not self.over

    def wait(self, deadline: float) -> None:
        """Wait as long as it is under way, at most until the deadline (`monotonic`)."""
        while self.under_way and (left := deadline - monotonic()) > 0:
            self._over.wait(min(left, 0.1))  # asynchronous exceptions come in between

    def answer(self) -> _Answer:
        """Return the result, or raise the error of the call."""
        if self._answer is None:
            raise self._failure(self._reason)
        return self._answer

    def _run(self) -> None:
        self._begun = True
        try:
            self._answer = self._ask()
        except (psycopg.Error, Error) as error:
            self._failure, self._reason = type(error), str(error)
        finally:
            self._over.open()


_Kind = TypeVar("_Kind", bound=BackgroundCall[Any])


class SingleFlight(Generic[_Kind]):
    """Runs one call at a time: callers that come during it share its result."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may come back to it
        self._asked: list[_Kind] = []

    def asking(self, begin: Callable[[], _Kind]) -> _Kind:
        """Return the call in progress, or begin one."""
        with self._lock:
            hanging = [asking for asking in self._asked if not asking.over]
            if hanging and (monotonic() < hanging[-1].began + AGAIN_AFTER or len(hanging) >= AT_MOST):
                return hanging[-1]
            self._asked = [*hanging, begin()]
            return self._asked[-1]

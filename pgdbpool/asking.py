"""Questions that may take long: each is asked in a thread of its own, and waited for within a bound."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import Generic, TypeVar

import psycopg

from .errors import Error

_Answer = TypeVar("_Answer")


class Gate:
    """Shut until it is opened, and open from then on; an Event could be left locked by an interruption."""

    __slots__ = ("_lock", "opened")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self.opened = False

    def open(self) -> None:
        """Let all pass, now and later."""
        self.opened = True
        try:  # noqa: SIM105  suppress() would be calls in which an interruption could come in
            self._lock.release()
        except RuntimeError:
            pass  # open already

    def wait(self, timeout: float) -> None:
        """Wait until it is open, at most for the timeout (seconds)."""
        try:
            self._lock.acquire(timeout=max(timeout, 0.0))
        finally:  # for the next, also where this one is interrupted with the lock in its hand
            if self.opened:
                try:  # noqa: SIM105
                    self._lock.release()
                except RuntimeError:
                    pass  # by another


class Asking(Generic[_Answer]):
    """A question that is asked in a thread of its own: who wants to know goes on meanwhile, or waits.

    :param failure: what `answer` raises where the thread was ended, with what was asked for.
    """

    def __init__(self, ask: Callable[[], _Answer], what: str, failure: type[Exception]) -> None:
        self.began = monotonic()
        self._ask = ask
        self._answer: _Answer | None = None
        self._failure, self._reason = failure, f"what was asked for {what} ended its thread"
        self._over = Gate()
        try:
            threading.Thread(target=self._run, name="pgdbpool-asking", daemon=True).start()
        except RuntimeError:  # there are no more threads, or the interpreter is about to end
            self._run()

    @property
    def under_way(self) -> bool:
        """Whether there is no answer yet, nor a failure."""
        return not self._over.opened

    def wait(self, deadline: float) -> None:
        """Wait until there is one, at most until the deadline (`monotonic`)."""
        self._over.wait(deadline - monotonic())

    def answer(self) -> _Answer:
        """Return what came of it, or raise what failed."""
        if self._answer is None:
            raise self._failure(self._reason)
        return self._answer

    def _run(self) -> None:
        try:
            self._answer = self._ask()
        except (psycopg.Error, Error) as error:
            self._failure, self._reason = type(error), str(error)
        finally:
            self._over.open()

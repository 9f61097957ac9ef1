"""The background of a process: probes DOWN endpoints, looks at roles and lag, and at who holds what.

One daemon thread steps it, or in lock-free mode a checkout in passing. Nothing in it waits for a server, but
for the cancelling of a statement after `max_hold`, which is bounded.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from . import events
from .doubts import Doubts
from .endpoint import PROBE_AFTER, PROBE_TIMEOUT, Endpoint, State
from .errors import one_line
from .holds import Holds
from .observer import Observer
from .probe import StartupProbe

if TYPE_CHECKING:
    from .publisher import Publisher

RETRY_AFTER = 1.0
"""Seconds after which a part that failed is stepped again."""


class _Part(Protocol):
    def step(self) -> float: ...


class Prober:
    """Asks each DOWN endpoint at most twice a second whether it accepts sessions again."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._due: dict[Endpoint, float] = {}
        self._flying: dict[Endpoint, tuple[StartupProbe, float]] = {}

    @property
    def needed(self) -> bool:
        """Whether an endpoint is down."""
        return bool(self._due)

    def watch(self, endpoint: Endpoint) -> None:
        """Probe the endpoint until it is up."""
        self._due.setdefault(endpoint, self._next())

    def step(self) -> float:
        """Do what is due now; return the seconds until there may be more to do."""
        if not self._due:
            return PROBE_TIMEOUT
        now = self._clock()
        for endpoint, due in list(self._due.items()):
            if endpoint.state not in (State.DOWN, State.PROBING):
                self._forget(endpoint)
                continue
            flight = self._flying.get(endpoint)
            if flight is None:
                if now < due:
                    continue
                endpoint.state = State.PROBING
                flight = self._flying[endpoint] = endpoint.probe(), now + PROBE_TIMEOUT
            probe, deadline = flight
            if not probe.step() and now < deadline:
                continue
            probe.close()
            del self._flying[endpoint]
            if probe.accepting:
                self._forget(endpoint)
                endpoint.mark_up()
            else:
                if endpoint.state is State.PROBING:  # and was not drained meanwhile
                    endpoint.state = State.DOWN
                endpoint.note_error(probe.reason)
                self._due[endpoint] = self._next()
        if self._flying:
            return 0.01
        return max(0.01, min(self._due.values(), default=now) - now)

    def close(self) -> None:
        """Stop probing."""
        self._due.clear()

    def _next(self) -> float:
        return self._clock() + random.uniform(*PROBE_AFTER)

    def _forget(self, endpoint: Endpoint) -> None:
        self._due.pop(endpoint, None)
        if flight := self._flying.pop(endpoint, None):
            flight[0].close()


class Monitor:
    """Steps its parts: in a thread while one of them is needed, or when it is called."""

    def __init__(
        self, observer: Observer, holds: Holds, *, threaded: bool, publisher: Publisher | None = None
    ) -> None:
        self.prober = Prober()
        self.doubts = Doubts()
        self.observer = observer
        self.holds = holds
        self._next: Observer | None = None
        """The one to take its place: whoever steps it does that, so that none is closed while it looks."""
        self.publisher = publisher
        self._lock = threading.RLock() if threaded else None  # a signal handler may come back to it
        self._thread: threading.Thread | None = None
        self._closed = False
        self._news = threading.Lock()
        """Held until there is some: an Event could be left locked where a signal handler interrupts it."""
        self._news.acquire()
        self._due_at = 0.0
        self._failed = ""
        """How a step failed last: the same again is no news."""

    def step(self) -> float:
        """Do what is due now, without waiting; return the seconds until there may be more to do."""
        now = monotonic()
        if now < self._due_at:
            return self._due_at - now
        self._due_at = soon = now + 0.01
        if self._next is not None:
            self.observer.close()
            self.observer, self._next = self._next, None
        parts: tuple[_Part, ...] = (self.prober, self.doubts, self.observer, self.holds)
        pause = min(map(self._try, parts))
        if self.publisher is not None:
            pause = min(pause, self._try(self.publisher))
        if self._due_at == soon:  # nobody woke it meanwhile
            self._due_at = now + pause
        return pause

    def _try(self, part: _Part) -> float:
        """Step one part; what goes wrong in it (no file descriptor is left ...) ends none of them."""
        try:
            return part.step()
        except Exception as error:  # noqa: BLE001 - nobody else is there to see it
            reason = f"{type(error).__name__}: {one_line(error)}"
            if reason != self._failed:
                self._failed = reason
                with suppress(Exception):  # of a handler of the log, which may be what has failed
                    events.BACKGROUND_FAILED(
                        "what is done in the background failed, and is tried again: %s", reason,
                        exc_info=error, reason=reason,
                    )  # fmt: skip
            return RETRY_AFTER

    def _tell(self) -> None:
        """Wake the thread, where it waits."""
        with suppress(RuntimeError):  # told already
            self._news.release()

    def wake(self) -> None:
        """There may be something due sooner; in threaded mode, see to it that the thread runs."""
        self._due_at = 0.0
        if self._lock is None:
            return
        self._tell()
        with self._lock:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="pgdbpool-monitor", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError as error:  # the next who wakes it tries again
                    self._thread = None
                    events.BACKGROUND_FAILED("no thread for the background: %s", error, reason=str(error))

    def observe(self, observer: Observer) -> None:
        """Look at what that observer looks at, if it is something else."""
        if observer.plan != (self._next or self.observer).plan:
            self._next = observer
            self.wake()

    def close(self) -> None:
        """Stop; connections of its own are closed."""
        self._closed = True
        self._tell()
        thread = self._thread
        if thread is None:
            self._end()
        elif thread is not threading.current_thread():
            thread.join(1.0)

    def _end(self) -> None:
        self.prober.close()
        self.doubts.close()
        self.observer.close()
        self.holds.close()
        if self.publisher is not None:
            self.publisher.close()

    def _run(self) -> None:
        assert self._lock is not None
        while not self._closed:
            self._news.acquire(timeout=max(self.step(), 0.0))
            with self._lock:
                parts = (self.prober, self.doubts, self.observer, self.holds)
                needed = any(part.needed for part in parts)
                publishing = self.publisher is not None and self.publisher.needed
                if not needed and not publishing and self._next is None:
                    # Under the lock, so that `wake` starts another or is seen here.
                    self._thread = None
                    return
        self._end()

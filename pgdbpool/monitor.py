"""Probes DOWN endpoints: in one daemon thread per process, or in passing where there is no thread."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from time import monotonic

from .endpoint import PROBE_AFTER, PROBE_TIMEOUT, Endpoint, State
from .probe import StartupProbe


class Prober:
    """Asks each DOWN endpoint at most twice a second whether it accepts sessions again.

    `step` never waits. In threaded mode a daemon thread calls it, started by the first endpoint
    that goes down and ended when none is; in lock-free mode a checkout does.
    """

    def __init__(self, *, threaded: bool, clock: Callable[[], float] = monotonic) -> None:
        self._threaded = threaded
        self._clock = clock
        self._due: dict[Endpoint, float] = {}
        self._flying: dict[Endpoint, tuple[StartupProbe, float]] = {}
        self._lock = threading.Lock() if threaded else None
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()

    def watch(self, endpoint: Endpoint) -> None:
        """Probe the endpoint until it is up."""
        self._due.setdefault(endpoint, self._next())
        if self._lock is not None:
            with self._lock:
                if self._thread is None and not self._closed.is_set():
                    self._thread = threading.Thread(target=self._run, name="pgdbpool-prober", daemon=True)
                    self._thread.start()

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
                flight = self._flying[endpoint] = StartupProbe(endpoint.config), now + PROBE_TIMEOUT
            probe, deadline = flight
            if not probe.step() and now < deadline:
                continue
            probe.close()
            del self._flying[endpoint]
            if probe.accepting:
                self._forget(endpoint)
                endpoint.mark_up()
            else:
                endpoint.state = State.DOWN
                endpoint.note_error(probe.reason)
                self._due[endpoint] = self._next()
        if self._flying:
            return 0.01
        return max(0.01, min(self._due.values(), default=now) - now)

    def close(self) -> None:
        """Stop probing."""
        self._closed.set()
        self._due.clear()

    def _next(self) -> float:
        return self._clock() + random.uniform(*PROBE_AFTER)

    def _forget(self, endpoint: Endpoint) -> None:
        self._due.pop(endpoint, None)
        if flight := self._flying.pop(endpoint, None):
            flight[0].close()

    def _run(self) -> None:
        assert self._lock is not None
        while not self._closed.wait(self.step()):
            with self._lock:
                if not self._due:  # under the lock, so that `watch` starts another or is seen here
                    self._thread = None
                    return

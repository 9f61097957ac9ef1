"""Probes the servers whose idle connections were found closed.

A connection that the server has closed is a reason to probe, not evidence: an administrator may have
ended only that session.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from .endpoint import PROBE_TIMEOUT, Endpoint, State

if TYPE_CHECKING:
    from .startup_probe import StartupProbe

SOON = 0.01


class SuspectProbes:
    """Probes each noted server once, in steps that never wait."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._probes: dict[Endpoint, tuple[StartupProbe, float]] = {}

    @property
    def needed(self) -> bool:
        """Whether a probe is in progress."""
        return bool(self._probes)

    def note(self, endpoint: Endpoint) -> None:
        """Probe the server, unless a probe is in progress or the server is not in use."""
        if endpoint.state is State.UP and endpoint not in self._probes:
            self._probes[endpoint] = endpoint.probe(), self._clock() + PROBE_TIMEOUT

    def step(self) -> float:
        """Go on with all probes; return the seconds until the next step."""
        for endpoint, (probe, deadline) in list(self._probes.items()):
            if not probe.step() and self._clock() < deadline:
                continue
            probe.close()
            del self._probes[endpoint]
            if not probe.accepting and endpoint.state is State.UP:
                endpoint.mark_down(probe.reason)
        return SOON if self._probes else PROBE_TIMEOUT

    def finish(self, timeout: float) -> None:
        """Wait for the answers, at most for the timeout (seconds); later answers are dropped."""
        deadline = self._clock() + timeout
        for probe, _ in self._probes.values():
            while not probe.step() and (left := deadline - self._clock()) > 0:
                probe.wait(left)
        self._probes = {e: flight for e, flight in self._probes.items() if flight[0].done}
        self.step()

    def close(self) -> None:
        """Stop probing."""
        for probe, _ in self._probes.values():
            probe.close()
        self._probes.clear()

"""Asks the servers whose idle connections were found closed whether they still accept sessions.

A connection that the server has closed is a reason to look, not evidence: an administrator may have ended
that one alone.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from .endpoint import PROBE_TIMEOUT, Endpoint, State

if TYPE_CHECKING:
    from .startup_probe import StartupProbe

SOON = 0.01


class Doubts:
    """Probes each server that it was told of once, in steps that never wait."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._probes: dict[Endpoint, tuple[StartupProbe, float]] = {}

    @property
    def needed(self) -> bool:
        """Whether a server is being asked."""
        return bool(self._probes)

    def note(self, endpoint: Endpoint) -> None:
        """Ask the server, unless it is being asked already or known not to be in use."""
        if endpoint.state is State.UP and endpoint not in self._probes:
            self._probes[endpoint] = endpoint.probe(), self._clock() + PROBE_TIMEOUT

    def step(self) -> float:
        """Do what is due now; return the seconds until there may be more to do."""
        for endpoint, (probe, deadline) in list(self._probes.items()):
            if not probe.step() and self._clock() < deadline:
                continue
            probe.close()
            del self._probes[endpoint]
            if not probe.accepting and endpoint.state is State.UP:
                endpoint.mark_down(probe.reason)
        return SOON if self._probes else PROBE_TIMEOUT

    def finish(self, timeout: float) -> None:
        """Wait for the answers, at most for the timeout (seconds); what has not come by then is not known."""
        deadline = self._clock() + timeout
        for probe, _ in self._probes.values():
            while not probe.step() and (left := deadline - self._clock()) > 0:
                probe.wait(left)
        self._probes = {e: flight for e, flight in self._probes.items() if flight[0].done}
        self.step()

    def close(self) -> None:
        """Stop asking."""
        for probe, _ in self._probes.values():
            probe.close()
        self._probes.clear()

"""Figures out of measurements: medians with quartiles, percentiles, ratios within a round."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Spread = dict[str, float]
"""A median, and the quartiles below and above it: `median`, `low`, `high`."""


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles."""
    if len(values) < 2:
        return dict.fromkeys(("median", "low", "high"), float(values[0]))
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value that this share of the ordered values does not exceed."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Rounds:
    """The figures of several peers, round by round."""

    def __init__(self) -> None:
        self._figures: dict[str, list[float]] = {}

    def add(self, peer: str, figure: float) -> None:
        """Note a peer's figure of the current round."""
        self._figures.setdefault(peer, []).append(figure)

    def summary(self, reference: str) -> dict[str, dict[str, Any]]:
        """Return each peer's spread, and that of its ratios to the reference in the same round."""
        base = self._figures.get(reference)
        result: dict[str, dict[str, Any]] = {}
        for peer, figures in self._figures.items():
            result[peer] = {"value": spread(figures)}
            if base and all(base):
                result[peer]["ratio"] = spread([f / b for f, b in zip(figures, base, strict=True)])
        return result


def median_of(found: Mapping[str, Any] | None, *keys: str) -> float | None:
    """Follow the keys to a spread, and return its median; None where there is none."""
    here: Any = found
    for key in keys:
        if not isinstance(here, Mapping) or key not in here:
            return None
        here = here[key]
    return here["median"] if isinstance(here, Mapping) else here

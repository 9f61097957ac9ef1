"""Durations, counted by how long they were."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from threading import Lock

BUCKETS = tuple(2**power / 1_000_000 for power in range(4, 27))
"""Upper bounds of the buckets of all histograms, in seconds: 16 microseconds, twice that, up to 67 s."""

BATCH = 256
"""Durations that are kept before they are counted."""


class Tally:
    """A histogram of durations: they are kept in a list, and counted in batches.

    Appending takes a tenth of the time of finding a bucket, and a sorted list needs only one search for each
    bucket.
    """

    __slots__ = ("_counting", "_counts", "_sum", "recent")

    def __init__(self) -> None:
        self.recent: list[float] = []
        """Not counted yet. Code that appends here calls `count` when the list has `BATCH` of them."""
        self._counts = [0] * (len(BUCKETS) + 1)
        self._sum = 0.0
        self._counting = Lock()

    def add(self, seconds: float) -> None:
        """Add a duration."""
        self.recent.append(seconds)
        if len(self.recent) >= BATCH:
            self.count()

    def count(self) -> None:
        """Count the kept durations, unless another thread is doing so."""
        if self._counting.locked():
            return
        with self._counting:
            batch = self.recent[:]
            del self.recent[: len(batch)]  # later appends of other threads come after these
            batch.sort()
            below = 0
            for place, bound in enumerate(BUCKETS):
                up_to = bisect_right(batch, bound, below)
                self._counts[place] += up_to - below
                below = up_to
            self._counts[-1] += len(batch) - below
            self._sum += sum(batch)

    def read(self) -> tuple[list[int], float]:
        """Return how many there are for each bucket, and their sum."""
        self.count()
        return self._counts[:], self._sum


def quantile(counts: Sequence[int], bounds: Sequence[float], share: float) -> float | None:
    """Return the end of the bucket that a quantile is in, in seconds; None if nothing was measured.

    Durations above the last bound count as that bound.
    """
    wanted, seen = share * sum(counts), 0
    for number, bound in zip(counts, (*bounds, *bounds[-1:]), strict=False):
        seen += number
        if number and seen >= wanted:
            return bound
    return None

"""Frozen snapshots of the pools."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ._util.durations import BUCKETS, Tally, quantile


@dataclass(frozen=True, slots=True)
class Histogram:
    """A histogram of durations: their number in each bucket."""

    bounds: ClassVar[tuple[float, ...]] = BUCKETS
    """Upper bounds of the buckets in seconds, the same for all. One more bucket has no bound."""

    counts: tuple[int, ...]
    """The number in each bucket alone; a sum up to a bucket is its cumulative count in metrics."""
    sum: float
    """Seconds in all."""

    @classmethod
    def of(cls, tallies: Iterable[Tally], instant: int = 0) -> Histogram:
        """Return the histogram of tallies and of `instant` more durations of no time."""
        counts, seconds = [instant] + [0] * len(BUCKETS), 0.0
        for tally in tallies:
            more, seconds_more = tally.read()
            counts = [a + b for a, b in zip(counts, more, strict=True)]
            seconds += seconds_more
        return cls(tuple(counts), seconds)

    @property
    def count(self) -> int:
        """The number of all durations."""
        return sum(self.counts)

    def quantile(self, share: float) -> float | None:
        """Return the end of the bucket that the quantile is in, in seconds; None if nothing was measured.

        Durations above the last bound count as that bound.
        """
        return quantile(self.counts, self.bounds, share)


@dataclass(frozen=True, slots=True)
class EndpointStatus:
    """One server as this process knows it."""

    label: str
    state: str
    role: str | None
    weight: int
    timeline: int | None
    """Of a primary that a group with the target `primary` or `read-write` uses."""
    outdated: bool
    """Whether another server was promoted to a higher timeline: no writes go here."""
    lag_bytes: int | None
    """How far a standby is behind, if a group has a `max_lag`."""
    lag_seconds: float | None
    connections: int
    """Connections that the process has to it, over all groups."""
    last_error: str | None
    seconds_since_error: float | None
    round_trip: float | None
    """Seconds to the server and back: the least of the last minutes, as the kernel saw it (Linux, TCP)."""
    failovers: int
    """How many promotions of it were seen."""
    use: Histogram
    """How long blocks held connections to it, over all groups."""
    connect: Histogram
    """How long it took to open one, over all groups."""


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """One group's pool."""

    name: str
    size: int
    """Connections that are open or being opened."""
    idle: int
    in_use: int
    waiting: int
    target: str
    """The `target` of its configuration: the roles that it accepts."""
    paused: str | None
    """The operator whose order holds its new blocks back; see `pgdbpool pause`."""
    min_size: int
    max_size: int
    connections: dict[str, int]
    """Connections by endpoint label."""
    checkouts: int
    timeouts: int
    opened: int
    discarded: dict[str, int]
    """Connections closed by the pool, by reason."""
    holders: tuple[str, ...]
    """The holders of connections in use: thread, seconds, place."""
    waits: int
    """Checkouts that waited in the queue and got a connection."""
    retries: int
    """Statements that were sent again, and attempts that `run` repeated."""
    failovers: int
    """How many promotions of the group's servers were seen."""
    rate_limited: int
    """Blocks that `rate_limit` refused."""
    leaks: int
    """Blocks that held a connection for longer than `leak_after`."""
    overdue: int
    """Blocks whose connection was taken from them after `max_hold`."""
    slow_blocks: int
    slow_statements: int
    not_replicated: int
    """Commits that stopped waiting for their synchronous standby."""
    guards_passed: int
    """Guards of reads that must see a token, whose standby had it."""
    guards_failed: int
    """Guards whose standby did not have it: the read did not run there."""
    fresh_waits: int
    """Reads that waited until a standby had it."""
    fresh_from_primary: int
    """Reads that went to the primary, since no standby had it."""
    fresh_refused: int
    """Reads that raised `StaleReadError`, since no server had it."""
    left: int
    """Sessions that were left in a commit: they count in `size` until their servers have let them go."""
    wait: Histogram
    """How long a checkout waited for a connection or a slot; not for one to be opened."""
    use: dict[str, Histogram]
    """How long blocks held a connection, by endpoint label."""
    connect: dict[str, Histogram]
    """How long it took to open a connection, by endpoint label."""


@dataclass(frozen=True, slots=True)
class Status:
    """The pools of this process at one moment."""

    pid: int
    type: str
    groups: dict[str, GroupStatus]
    endpoints: dict[str, EndpointStatus]
    buckets: tuple[float, ...] = BUCKETS
    """Upper bounds of the buckets of all histograms, in seconds; the last one of each has none."""

    def to_dict(self) -> dict[str, Any]:
        """Return the snapshot as plain dicts, lists, strings and numbers, as JSON has them."""
        return asdict(self)

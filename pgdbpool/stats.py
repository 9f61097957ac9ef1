"""Frozen snapshots of what the pools do; nothing here runs on the hot path."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


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
    """How far a standby is behind, where a group has a `max_lag`."""
    lag_seconds: float | None
    connections: int
    """Connections that the process has to it, over all groups."""
    last_error: str | None
    seconds_since_error: float | None
    round_trip: float | None
    """Seconds to the server and back: the least of the last minutes, as the kernel saw it (Linux, TCP)."""


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """One group's pool."""

    name: str
    size: int
    """Connections that are open or being opened."""
    idle: int
    in_use: int
    waiting: int
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
    """Who has the connections in use: thread, seconds, place."""


@dataclass(frozen=True, slots=True)
class Status:
    """The pools of this process at one moment."""

    pid: int
    type: str
    groups: dict[str, GroupStatus]
    endpoints: dict[str, EndpointStatus]

    def to_dict(self) -> dict[str, Any]:
        """Return the snapshot as plain dicts, lists, strings and numbers, as JSON has them."""
        return asdict(self)

"""Chooses the endpoint of the next connection: a pure function of a snapshot."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from typing import NamedTuple

from .endpoint import Endpoint, Role, State


class Candidate(NamedTuple):
    """An endpoint to choose from."""

    endpoint: Endpoint
    connections: int
    """The number of connections of this group to it."""


def suits(target: str, role: Role, read_only: bool) -> bool:
    """Return whether a server of this role may serve the target, in libpq's terms.

    https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNECT-TARGET-SESSION-ATTRS
    """
    if target == "primary":
        return role is Role.PRIMARY
    if target == "standby":
        return role is Role.STANDBY
    if target == "read-write":
        return role is Role.PRIMARY and not read_only
    if target == "read-only":
        return role is Role.STANDBY or read_only
    return True  # any, prefer-standby


ROLE_LASTS = 0.25
"""Seconds after which the role of an unsuitable endpoint is worth checking again."""


def order(
    candidates: Iterable[Candidate],
    target: str,
    balance: str,
    now: float,
    rand: Callable[[], float] = random.random,
) -> list[Endpoint]:
    """Return the endpoints worth a dial, the best first.

    Only endpoints that are UP count. One of an unsuitable role is included only if no other is left and its
    role was seen longer than `ROLE_LASTS` ago, or before it was doubted, since roles move. `round-robin`
    evens out the connections of the group, `least-connections` those of the whole process, `random` draws;
    each goes by weight.
    """
    up = [c for c in candidates if c.endpoint.state is State.UP]
    fitting = [
        c for c in up if c.endpoint.role is None or suits(target, c.endpoint.role, c.endpoint.read_only)
    ] or [c for c in up if c.endpoint.role_seen_at <= max(now - ROLE_LASTS, c.endpoint.role_doubted_at)]

    def rank(candidate: Candidate) -> float:
        endpoint, connections = candidate
        if balance == "random":  # a weighted draw without replacement: largest u ** (1 / w) first
            return -math.log(max(rand(), 1e-12)) / endpoint.weight
        if balance == "least-connections":
            connections = endpoint.connections
        return (connections + 1) / endpoint.weight

    fitting.sort(key=rank)  # stable: the order of the candidates breaks ties
    if target == "prefer-standby":
        fitting.sort(key=lambda c: c.endpoint.role is Role.PRIMARY)
    return [c.endpoint for c in fitting]


def worth_moving(held: Candidate, candidates: Iterable[Candidate], target: str) -> bool:
    """Return whether a connection would be better placed on another endpoint, by weight."""
    share = (held.connections - 1) / held.endpoint.weight
    if target == "prefer-standby":  # a place on a standby is always better, one on the primary never
        target = "standby"
        if held.endpoint.role is Role.PRIMARY:
            share = math.inf
    return any(
        c.endpoint.state is State.UP
        and c.endpoint is not held.endpoint
        and (c.endpoint.role is None or suits(target, c.endpoint.role, c.endpoint.read_only))
        and (c.connections + 1) / c.endpoint.weight <= share
        for c in candidates
    )

"""How long a block takes: on loopback, and with a network between client and server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.lib.proxy import Proxy

from .bench import Bench, server
from .crew import Crew, pin
from .summary import Rounds, percentile

OPERATIONS = (
    "read",
    "tenant_read",
    "transaction 3",
    "write",
    "fetchval",
    "rows",
    "block_write",
)
DELAYS = (0.5, 2.0)
"""Milliseconds that the network takes for a round trip."""


def measure(bench: Bench) -> dict[str, Any]:
    """Return microseconds by place, operation and peer, with their ratio to the bare connection's."""
    found: dict[str, Any] = {}
    node = bench.cluster.primary
    rounds, count = (5, 60) if bench.quick else (20, 300)
    slow_rounds, slow_count = (3, 12) if bench.quick else (10, 30)
    with bench.crew() as crew:
        for place, (clients, servers) in bench.places.items():
            bench.pin_server(servers)
            crew.open([bench.server], 1)
            _pin(crew, clients)
            found[place] = _rounds(bench, crew, place, rounds, count)
        apart = list(bench.places.values())[-1]
        bench.pin_server(apart[1])
        with Proxy(node.host, node.port) as proxy:
            crew.open([server(node, proxy.port)], 1)
            _pin(crew, apart[0])
            own = _own_delay(bench, crew, proxy)
            for delay in DELAYS:
                place = f"{delay:g} ms"
                proxy.delay = max(0.0, (delay / 1000 - own) / 2)  # in each direction
                found[place] = _rounds(bench, crew, place, slow_rounds, slow_count)
        # Last, since a process that has used a deadline looks for one from then on.
        place, (clients, servers) = next(iter(bench.places.items()))
        bench.pin_server(servers)
        crew.open([bench.server], 1)
        _pin(crew, clients)
        found[place] |= _rounds(bench, crew, place, rounds, count, ("deadline_read",))
    bench.pin_server()
    return found


def _pin(crew: Crew, cores: list[int]) -> None:
    for member in crew:
        pin(member.pid, cores)


def _own_delay(bench: Bench, crew: Crew, proxy: Proxy) -> float:
    """Return the seconds that a round trip takes longer by the proxy alone."""
    member = next(iter(crew))
    through = sorted(member.ask("latency", operation="read", count=300))
    member.ask("open", servers=[bench.server], size=1)
    direct = sorted(member.ask("latency", operation="read", count=300))
    member.ask("open", servers=[server(bench.cluster.primary, proxy.port)], size=1)
    return float(percentile(through, 0.5) - percentile(direct, 0.5)) / 1e9


def _rounds(
    bench: Bench, crew: Crew, place: str, rounds: int, count: int, operations: Sequence[str] = OPERATIONS
) -> dict[str, Any]:
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    found: dict[str, Any] = {}
    bench.progress.steps(len(operations) * (rounds + 1))
    for operation in operations:
        figures = {name: Rounds() for name in shares}
        for number in range(-1, rounds):  # the first one warms up
            bench.progress.step(f"{place}, {operation}, round {number + 1} of {rounds}")
            for member in crew:
                times = member.ask("latency", operation=operation, count=count if number >= 0 else 15)
                if times is None or number < 0:
                    continue
                times.sort()
                for name, share in shares.items():
                    figures[name].add(member.name, percentile(times, share) / 1000)
        summaries = {name: rounds.summary("bare") for name, rounds in figures.items()}
        found[operation] = {
            peer: {
                "ratio": summaries["p50"][peer].get("ratio"),
                **{name: summary[peer]["value"] for name, summary in summaries.items()},
            }
            for peer in summaries["p50"]
        }
    return found

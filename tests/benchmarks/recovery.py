"""What a restart and a promotion cost: time to the first success, and errors that the application sees."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

from pgdbpool.cluster import Cluster

from .bench import VERSION, Bench, create_tables, server
from .peers import PEERS
from .summary import spread

STALE = (10, 40)
AFTER = 100
"""Successes after which a peer counts as recovered from a restart."""


def measure(bench: Bench) -> dict[str, Any]:
    """Return seconds and errors by peer, for restarts with idle connections and for a promotion."""
    bench.pin_server()
    return {
        "restart": {str(stale): _restart(bench, stale) for stale in STALE},
        "promotion": _promotion(bench),
    }


def _restart(bench: Bench, stale: int) -> dict[str, Any]:
    seen: dict[str, list[dict[str, Any]]] = {}
    rounds = bench.rounds(1, 2)
    but = ["bare"]
    if bench.quick:
        but.append("psycopg_pool-check")  # each connection that its check finds dead takes it about a second
    with bench.crew(but) as crew:
        bench.progress.steps(len(rounds) * len(crew.members))
        for _ in rounds:
            crew.open([bench.server], stale, fill=True)
            bench.cluster.primary.restart()
            for member in crew:
                bench.progress.step(f"restart, {stale} stale: {member.label}")
                answer = member.ask("recover", operation="read", after=AFTER, within=60)
                seen.setdefault(member.name, []).append(answer)
    return {
        peer: {
            "first": spread([one["first"] or 60.0 for one in answers]),
            "slowest": spread([one["slowest"] for one in answers]),
            "errors": spread([one["errors"] for one in answers]),
            "recovered": all(one["done"] >= AFTER for one in answers),
            "kinds": sorted({kind for one in answers for kind in one["kinds"]}),
        }
        for peer, answers in seen.items()
    }


def _promotion(bench: Bench) -> dict[str, Any]:
    """Kill the primary and promote the standby, while each peer writes 50 times a second."""
    seconds = 6.0 if bench.quick else 15.0
    seen: dict[str, list[dict[str, Any]]] = {}
    rounds = bench.rounds(1, 2)
    bench.progress.steps(len(rounds))
    for number in rounds:
        bench.progress.step(f"promotion {number + 1} of {len(rounds)}")
        with Cluster(1, VERSION, settings={"max_connections": 200}) as cluster:
            create_tables(cluster.primary, logged=True)
            cluster.wait_in_sync()
            # 1.0.2 takes any server for one that writes.
            with bench.crew(but=["bare", "legacy"]) as crew:
                crew.open([server(node) for node in cluster.nodes], 4)
                for member in crew:
                    member.ask("latency", operation="write", count=8)
                for member in crew:
                    member.send("outage", operation="write", seconds=seconds, every=0.02)
                time.sleep(0.5)
                (standby,) = cluster.standbys
                cluster.primary.kill()
                standby.promote()
                promoted = time.monotonic()
                for member in crew:
                    attempts = member.receive(seconds + 60)["seen"]
                    seen.setdefault(member.name, []).append(_outage(attempts, promoted))
    return {
        peer: {key: spread([one[key] for one in answers]) for key in answers[0]}
        for peer, answers in seen.items()
        if peer in PEERS
    }


def _outage(attempts: list[tuple[float, float, str]], promoted: float) -> dict[str, float]:
    """Return the outage as the application sees it, the part after the promotion, and the errors."""
    # Some are still answered after the kill, so it is the longest time without a success.
    ends = [end for begun, end, error in attempts if not error] + [attempts[-1][1]]
    outage, first = max((later - end, later) for end, later in pairwise(ends))
    errors = [error for begun, end, error in attempts if error]
    return {"outage": outage, "after": first - promoted, "errors": float(len(errors))}

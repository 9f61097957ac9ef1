"""What a checkout with its checkin costs without a query, and how that grows with the pool."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from .bench import Bench
from .crew import HERE, Member, pin
from .summary import Rounds

GROWTH: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    # (number, endpoints, connections, groups)
    "endpoints": ((1, 1, 100, 1), (10, 10, 100, 1), (100, 100, 100, 1)),
    "connections": ((1, 1, 1, 1), (10, 1, 10, 1), (100, 1, 100, 1), (1000, 1, 1000, 1)),
    "groups": ((1, 1, 4, 1), (10, 1, 4, 10), (100, 1, 4, 100)),
}
STEPS = ("checkout", "read", "tenant_read")
WAITERS = (1, 10, 100, 1000)


def measure(bench: Bench) -> dict[str, Any]:
    """Return microseconds and steps by peer, and the growth by what grows."""
    return {**_checkouts(bench), "growth": _growth(bench)}


def _checkouts(bench: Bench) -> dict[str, Any]:
    clients, servers = bench.places["one core"]
    figures = Rounds()
    steps: dict[str, Any] = {operation: {} for operation in STEPS}
    with bench.crew() as crew:
        bench.pin_server(servers)
        crew.open([bench.server], 4)
        rounds = bench.rounds(5, 30)
        bench.progress.steps((len(rounds) + 1) * len(crew.members))
        for member in crew:
            bench.progress.step(f"steps: {member.label}")
            pin(member.pid, clients)
            for operation in STEPS:
                if counted := member.ask("steps", operation=operation):
                    steps[operation][member.name] = counted
        for _ in rounds:
            for member in crew:
                if member.name == "bare":
                    continue
                bench.progress.step(f"checkout: {member.label}")
                # What returns a connection over the network (asyncpg) is not asked so often.
                each = 50 if member.name == "asyncpg" else 500
                times = member.ask("batches", operation="checkout", batches=5, each=each)
                figures.add(member.name, statistics.median(times) / 1000)
    bench.pin_server()
    return {"checkout": figures.summary("psycopg_pool"), "steps": steps}


def _growth(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {}
    rounds = bench.rounds(3, 15)
    with fake_servers(100) as ports:
        for mode in ("threaded", "non-threaded"):
            for what, sizes in GROWTH.items():
                bench.progress.steps(len(rounds) * len(sizes))
                found.setdefault(what, {})[mode] = _grown(bench, mode, what, sizes, ports, rounds)
        found["waiters"] = _waiters(bench, ports, bench.rounds(2, 7))
    return found


def _grown(
    bench: Bench, mode: str, what: str, sizes: Any, ports: list[int], rounds: range
) -> dict[str, dict[str, Any]]:
    figures = Rounds()
    with ExitStack() as stack:
        members = {}
        for number, endpoints, connections, groups in sizes:
            member = members[str(number)] = Member(mode, "growth_worker.py")
            stack.callback(member.close)
            member.ask("open", ports=ports[:endpoints], connections=connections, groups=groups)
            pin(member.pid, bench.places["one core"][0])
        for _ in rounds:
            for number, member in members.items():
                bench.progress.step(f"{mode}, {number} {what}")
                figures.add(number, statistics.median(member.ask("checkouts", batches=5, each=2000)) / 1000)
    return figures.summary("1")


def _waiters(bench: Bench, ports: list[int], rounds: range) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure handing over, and beside it a bare lock that goes round as many threads."""
    figures = {"threaded": Rounds(), "lock": Rounds()}
    seconds = 0.2 if bench.quick else 0.6
    bench.progress.steps(len(rounds) * len(WAITERS))
    member = Member("threaded", "growth_worker.py")
    try:
        member.ask("open", ports=ports[:1], connections=1, groups=1)
        pin(member.pid, bench.places["one core"][0])
        for _ in rounds:
            for waiters in WAITERS:
                bench.progress.step(f"{waiters} waiters")
                for name, command in (("threaded", "handovers"), ("lock", "lock_ring")):
                    taken = member.ask(command, waiters=waiters, seconds=seconds)
                    figures[name].add(str(waiters), taken / 1000)
    finally:
        member.close()
    return {name: rounds.summary("1") for name, rounds in figures.items()}


@contextmanager
def fake_servers(number: int) -> Iterator[list[int]]:
    """Run so many fake servers; yield their ports."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "fake_server.py"), str(number)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.wait(10)

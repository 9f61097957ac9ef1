"""Memory of an idle connection, import time, and what `init` takes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from pgdbpool.cluster import Cluster

from .bench import VERSION, Bench, create_tables, server
from .crew import ROOT, Member
from .summary import Rounds, spread

IMPORTS = {
    "python": "pass",
    "psycopg": "import psycopg",
    "pgdbpool": "import pgdbpool",
    "psycopg_pool": "import psycopg_pool",
    "sqlalchemy": "import sqlalchemy, psycopg",
}


def measure(bench: Bench) -> dict[str, Any]:
    """Return bytes, milliseconds and threads."""
    bench.pin_server()
    return {"memory": _memory(bench), "imports": _imports(bench), "init": _init(bench)}


def _memory(bench: Bench) -> dict[str, float]:
    """Return the bytes above those of a bare connection, by peer."""
    size, few = 100, 10
    found = {}
    names = ["bare", "pgdbpool", "pgdbpool-lock-free", "psycopg_pool", "sqlalchemy"]
    bench.progress.steps(len(names))
    for name in names:
        bench.progress.step(f"memory: {name}")
        totals = []
        for number in (few, size):  # the difference: a pool's own memory is not its connections'
            member = Member(name)
            try:
                totals.append(member.ask("memory", servers=[bench.server], size=number)["bytes"] * number)
            finally:
                member.close()
        found[name] = (totals[1] - totals[0]) / (size - few)
    return {name: value - found["bare"] for name, value in found.items()}


def _imports(bench: Bench) -> dict[str, Any]:
    figures = Rounds()
    rounds = bench.rounds(7, 15)
    bench.progress.steps(len(rounds))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    code = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"
    for number in range(-1, len(rounds)):  # the first one writes the bytecode
        bench.progress.step("import")
        for name, text in IMPORTS.items():
            done = subprocess.run(
                [sys.executable, "-c", code.format(text)],
                env=environment, capture_output=True, text=True, check=True,
            )  # fmt: skip
            if number >= 0:
                figures.add(name, float(done.stdout) * 1000)
    return figures.summary("psycopg")


def _init(bench: Bench) -> dict[str, Any]:
    """Return milliseconds of `init` with three endpoints, and the threads after it and after a checkout."""
    found: dict[str, Any] = {}
    with Cluster(2, VERSION) as cluster:
        create_tables(cluster.primary, logged=True)
        cluster.wait_in_sync()
        servers = [server(node) for node in cluster.nodes]
        for name in ("pgdbpool", "pgdbpool-lock-free"):
            bench.progress.step(f"init: {name}")
            seconds = []
            threads = after = 0
            for _ in bench.rounds(3, 11):
                member = Member(name)
                try:
                    opened = member.ask("open", servers=servers, size=4)
                    seconds.append(opened["seconds"])
                    threads = opened["threads"]
                    after = member.ask("thread_count", operation="read")
                finally:
                    member.close()
                time.sleep(0.01)
            milliseconds = spread([1000 * each for each in seconds])
            found[name] = {"milliseconds": milliseconds, "threads": threads, "threads_in_use": after}
    return found

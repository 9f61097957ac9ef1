"""The command: measure the doors beside the frameworks' own pools.

python -m tests.doors                       # round trips, latency and failover, in about five minutes
python -m tests.doors --only failover       # one part
python -m tests.doors --write               # also put the tables into the documentation
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

from pgdbpool.cluster import Cluster
from tests.benchmarks.bench import create_tables, server
from tests.lib.proxy import Proxy

from . import failover
from .ways import WAYS, environment

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "doc" / "benchmarks"
DELAY = 0.5
"""Milliseconds of the slower network."""


class Member:
    """The process of one way."""

    def __init__(self, way: str, servers: list[dict[str, Any]]) -> None:
        self.way = way
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.doors.worker"], cwd=ROOT, text=True,
            env={**os.environ, **environment(way, servers)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.operations: list[str] = self.ask()

    def ask(self, **what: Any) -> Any:
        """Send a line, and return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"{self.way}: its process has ended")
        return json.loads(line)

    def times(self, operation: str, count: int) -> list[int]:
        """Return the nanoseconds of so many operations."""
        return list(self.ask(operation=operation, count=count))

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


@contextmanager
def members(servers: list[dict[str, Any]]) -> Iterator[list[Member]]:
    """Start the process of each way, and end them."""
    with ExitStack() as stack:
        found = []
        for way in WAYS:
            found.append(Member(way, servers))
            stack.callback(found[-1].close)
        yield found


def round_trips(cluster: Cluster) -> dict[str, dict[str, float]]:
    """Return the round trips of each operation by way, counted by a proxy."""
    found: dict[str, dict[str, float]] = {}
    node = cluster.primary
    with Proxy(node.host, node.port) as proxy, members([server(node, proxy.port)]) as crew:
        for member in crew:
            for operation in member.operations:
                member.times(operation, 12)  # what is prepared, is prepared then
                proxy.reset_counts()
                member.times(operation, 10)
                found.setdefault(operation, {})[member.way] = proxy.round_trips / 10
    return found


def latency(cluster: Cluster, rounds: int = 9) -> dict[str, dict[str, dict[str, float]]]:
    """Return microseconds of each operation by network and way, measured in turn.

    It is the first decile of all: other load on the machine makes some of them longer, and none shorter.
    """
    node = cluster.primary
    found: dict[str, dict[str, dict[str, float]]] = {}
    with Proxy(node.host, node.port) as proxy:
        for place, servers in ("loopback", [server(node)]), (f"{DELAY:g} ms", [server(node, proxy.port)]):
            proxy.delay = DELAY / 2000
            with members(servers) as crew:
                count = 40 if place == "loopback" else 10
                seen: dict[tuple[str, str], list[int]] = {}
                for number in range(rounds + 1):  # the first one warms up
                    for operation in dict.fromkeys(each for member in crew for each in member.operations):
                        for member in crew:
                            if operation in member.operations:
                                times = member.times(operation, count)
                                if number:
                                    seen.setdefault((operation, member.way), []).extend(times)
            for (operation, way), times in seen.items():
                decile = quantiles(times, n=10)[0] / 1000
                found.setdefault(place, {}).setdefault(operation, {})[way] = decile
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in reStructuredText."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in (head, *rows):
        lines += [f"   {'* -' if not place else '  -'} {cell}".rstrip() for place, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def by_way(columns: Mapping[str, Mapping[str, Any]], write: Any) -> str:
    """Return a table with a row for each way and a column for each key."""
    ways = [way for way in WAYS if any(way in column for column in columns.values())]
    rows = [
        [f"``{way}``" if way not in WAYS else WAYS[way].label.replace('"', "``", 1).replace('"', "``")]
        + [write(column[way]) if way in column else "" for column in columns.values()]
        for way in ways
    ]
    return table(["", *columns], rows)


def split(columns: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the columns of each framework."""
    for prefix in ("sqlalchemy", "django"):
        yield {name: ways for name, ways in columns.items() if any(way.startswith(prefix) for way in ways)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, print the tables, and return the exit status."""
    parser = argparse.ArgumentParser("python -m tests.doors", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("round-trips", "latency", "failover"), action="append")
    parser.add_argument("--write", action="store_true", help="put the tables into doc/benchmarks")
    options = parser.parse_args(arguments)
    wanted = options.only or ["round-trips", "latency", "failover"]
    tables: dict[str, str] = {}
    if {"round-trips", "latency"} & set(wanted):
        with Cluster(0, settings={"shared_buffers": "64MB", "autovacuum": "off"}) as cluster:
            create_tables(cluster.primary)
            if "round-trips" in wanted:
                tables["doors-round-trips"] = "\n".join(
                    by_way(part, lambda trips: f"{trips:g}") for part in split(round_trips(cluster))
                )
            if "latency" in wanted:
                tables["doors-latency"] = "\n".join(
                    f"{'Loopback' if place == 'loopback' else f'Network of {place}'}, µs:\n\n"
                    + "\n".join(by_way(part, lambda micros: f"{micros:,.0f}") for part in split(found))
                    for place, found in latency(cluster).items()
                )
    if "failover" in wanted:
        tables["doors-failover"] = by_way(
            failover.measure(),
            lambda one: f"{one['errors']} of {one['requests']}; {one['slowest'] * 1000:,.0f} ms",
        )
        cells = [f"     - {failover.away(event) * 1000:,.0f} ms\n" for event in failover.EVENTS.values()]
        tables["doors-failover"] += f"   * - PostgreSQL alone: no server takes writes for\n{''.join(cells)}"
    for name, text in tables.items():
        print(f"{name}\n\n{text}")
        if options.write:
            (PAGE / f"{name}.inc").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

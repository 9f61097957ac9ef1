"""How many reads stay on standbys if each user is to see its own writes, and what a guard costs.

    python -m tests.benchmarks.own_writes             # measure, into doc/benchmarks/own_writes.json
    python doc/generate_own_writes.py                 # its table and its plot, from these figures

Each user writes, reads at once, as after a redirect, and then nine times with pauses, over and over. The
standbys replay with a delay.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pgdbpool
from pgdbpool import Connection, Handler
from pgdbpool.cluster import Cluster, Node
from tests.lib.proxy import Proxy

RESULTS = Path(__file__).parents[2] / "doc" / "benchmarks" / "own_writes.json"
LAGS = (5, 50, 500)
"""Milliseconds that the standbys are behind."""
USERS, READS, REDIRECT, PAUSE = 40, 10, 0.02, 1.0
"""Users; reads after each write; seconds to the first one; seconds to each other one, on average."""
STICK = 5.0
"""Seconds for which a user's reads stay on the primary after a write, in the usual way."""
INSERT, COUNT = "INSERT INTO t VALUES (%s)", "SELECT count(*) FROM t WHERE i = %s"
_numbers = itertools.count(1)
WAYS = ("token", "token, no wait", "stick")


def server(node: Node, **changes: Any) -> dict[str, Any]:
    return {"host": node.host, "port": node.port, "name": "postgres", "user": "postgres", **changes}


def init(servers: list[dict[str, Any]], **reading: Any) -> None:
    few = {"connection_count": USERS, "min_size": 4}
    groups = {
        "write": {"target": "primary", **few},
        "read": {"target": "prefer-standby", **few, **reading},
    }
    Connection.init({"db": servers, "groups": groups})


class Users:
    """Users in threads, and where they have read."""

    def __init__(self, primary: str, way: str, seconds: float) -> None:
        self.primary, self.way = primary, way
        self.ends = time.monotonic() + seconds
        self.at_primary = self.reads = self.stale = 0
        self.took: list[float] = []
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._use, args=(number,)) for number in range(USERS)]

    def run(self) -> dict[str, float]:
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()
        return {
            "standbys": 1 - self.at_primary / self.reads,
            "median": 1000 * statistics.median(self.took),
            "reads": self.reads,
            "stale": self.stale,
        }

    def _use(self, user: int) -> None:
        random = Random(user)
        time.sleep(random.uniform(0, READS * PAUSE / 2))
        while time.monotonic() < self.ends:
            number = next(_numbers)
            with pgdbpool.read_your_writes() as seen:
                Connection.execute("write", INSERT, (number,))
            wrote = time.monotonic()
            for place in range(READS):
                time.sleep(random.expovariate(1 / PAUSE) if place else REDIRECT)
                self._read(number, None if self.way == "stick" else seen.token, wrote)

    def _read(self, number: int, token: Any, wrote: float) -> None:
        began = time.monotonic()
        sticks = self.way == "stick" and began - wrote < STICK
        with Handler("write" if sticks else "read", after=token) as db:
            found, at = db.fetchval(COUNT, (number,)), db.endpoint
        took = time.monotonic() - began
        with self._lock:
            self.reads += 1
            self.at_primary += at == self.primary
            self.stale += found != 1
            self.took.append(took)


def shares(cluster: Cluster, seconds: float) -> dict[str, Any]:
    """Return the share of reads on standbys by lag and by way."""
    found: dict[str, Any] = {}
    for lag in LAGS:
        for standby in cluster.standbys:
            standby.execute(f"ALTER SYSTEM SET recovery_min_apply_delay = '{lag}ms'")
            standby.execute("SELECT pg_reload_conf()")
        time.sleep(1)
        found[str(lag)] = {}
        for way in WAYS:
            init([server(node) for node in cluster.nodes], fresh_wait=0 if way == "token, no wait" else 0.1)
            found[str(lag)][way] = one = Users(cluster.primary.label, way, seconds).run()
            Connection.reset()
            print(f"{lag} ms, {way}: {one}", flush=True)
    for standby in cluster.standbys:
        standby.execute("ALTER SYSTEM RESET recovery_min_apply_delay")
        standby.execute("SELECT pg_reload_conf()")
    return found


def latency(cluster: Cluster, rounds: int) -> dict[str, Any]:
    """Return microseconds of a block of one read, lower quartiles.

    Without a token, with one that its connection is known to have passed, and with a new one: by a guard.
    """
    found = {}
    with Proxy(cluster.standbys[0].host, cluster.standbys[0].port) as proxy:
        for name, port, delay in (
            ("loopback", None, 0.0),
            ("0.5 ms", proxy.port, 0.25),
            ("2 ms", proxy.port, 1),
        ):
            proxy.delay = delay / 1000
            standby = server(cluster.standbys[0], **({"port": port} if port else {}), label="standby")
            servers = [server(cluster.primary, label="primary"), standby]
            Connection.init(
                {
                    "db": servers,
                    "groups": {
                        "write": {"endpoints": ["primary"]},
                        "read": {"endpoints": ["standby"], "target": "standby", "connection_count": 1},
                    },
                }
            )
            found[name] = _compare(cluster, rounds)
            Connection.reset()
            print(f"{name}: {found[name]}", flush=True)
    return found


def _compare(cluster: Cluster, rounds: int) -> dict[str, float]:
    number = next(_numbers)
    with pgdbpool.read_your_writes() as seen:
        Connection.execute("write", INSERT, (number,))
    token = seen.token
    cluster.wait_in_sync()

    with Handler("read", after=token) as db:
        db.fetchrow(COUNT, (number,))
        conn = db._conn
    assert conn is not None
    assert conn.proven is not None
    earlier = conn.proven._replace(lsn=0)

    def read(after: Any = None, forget: bool = False) -> float:
        if forget:
            conn.proven = earlier  # as if it was the first read with such a token
        began = time.perf_counter()
        with Handler("read", after=after) as db:
            db.fetchrow(COUNT, (number,))
        return 1e6 * (time.perf_counter() - began)

    ways: dict[str, Callable[[], float]] = {
        "without": read,
        "known": lambda: read(token),
        "guarded": lambda: read(token, forget=True),
    }
    random = Random(1)
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 20):
        for name in random.sample(list(ways), len(ways)):  # so that the machine's moods fall on all
            took[name].append(ways[name]())
    return {name: statistics.quantiles(times[20:], n=4)[0] for name, times in took.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="for each share (%(default)s)")
    parser.add_argument("--latency-only", action="store_true", help="leave the shares as they are")
    parser.add_argument("--rounds", type=int, default=2000, help="of reads, for the latency (%(default)s)")
    options = parser.parse_args()
    with Cluster(standbys=2, settings={"max_connections": 300}) as cluster:
        cluster.primary.execute("CREATE TABLE t (i bigint PRIMARY KEY)")
        cluster.wait_in_sync()
        found = json.loads(RESULTS.read_text())
        found["latency"] = latency(cluster, options.rounds)
        if not options.latency_only:
            found["shares"] = shares(cluster, options.seconds)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

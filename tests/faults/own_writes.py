"""Writes, and reads of them in other processes from standbys, while servers lag, die and are promoted.

    python tests/faults/own_writes.py --pairs 100000 --mode both
    python tests/faults/own_writes.py --pairs 5000 --without-tokens

A writer commits a row and gives its number, and the token, to one of the readers. A row that a reader does
not find is stale, unless it was lost in a failover: then the last primary does not have it.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import queue
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import psycopg

sys.path.append(str(Path(__file__).parents[1] / "lib"))

from support import config

import pgdbpool
from pgdbpool import Connection, Handler, StaleReadError
from pgdbpool.cluster import Cluster, ClusterError, Node

MODES = ("threaded", "non-threaded")
READERS = 3
READING = ("standby", "prefer", "any", "transaction", "repeatable")
INSERT, COUNT = "INSERT INTO t VALUES (%s)", "SELECT count(*) FROM t WHERE id = %s"
PATIENCE = 20.0
"""Seconds that a reader tries for, through outages and refusals."""


@dataclass
class Plan:
    """One run."""

    mode: str
    pairs: int
    seconds: float
    seed: int
    tokens: bool = True
    version: int | None = None
    bin_dir: str | None = None


@dataclass
class Report:
    """What came of it."""

    pairs: int = 0
    stale: list[int] = field(default_factory=list)
    """Rows that a reader did not find, though the servers have them."""
    silent: int = 0
    """Rows that a reader did not find, and that were lost, without the error for that."""
    false_alarms: int = 0
    """Rows that were called lost, and are there: a token may include a few bytes that others have written."""
    counts: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {number}" for name, number in sorted(self.counts.items()))
        return (
            f"{self.pairs} pairs, {len(self.stale)} stale, {self.silent} lost in silence, "
            f"{self.false_alarms} false alarms; {counts}"
        )


def groups() -> dict[str, dict[str, Any]]:
    few = {"connection_count": 3, "timeout": 5, "connect_timeout": 2, "fresh_wait": 0.1}
    manual = {**few, "autocommit": False}
    return {
        "write": {"target": "primary", **manual},
        "auto": {"target": "primary", **few},
        "standby": {"target": "standby", **few},
        "prefer": {"target": "prefer-standby", **few},
        "any": {"target": "any", **few},
        "transaction": {"target": "prefer-standby", **manual},
        "repeatable": {
            "target": "prefer-standby",
            **manual,
            "settings": {"default_transaction_isolation": "repeatable read"},
        },
    }


def start(addresses: list[dict[str, Any]], mode: str) -> None:
    logging.getLogger("pgdbpool").setLevel(logging.ERROR)
    Connection.init(config(addresses, mode, **groups()), wait=False)


def write(
    addresses: list[dict[str, Any]], plan: Plan, readers: list[Any], begun: Any, stop: Any, told: Any
) -> None:
    """Write rows until there are enough, or the time is over; tell how many were acknowledged."""
    start(addresses, plan.mode)
    random, written, failed = Random(plan.seed), [], 0
    number = 0
    while len(written) < plan.pairs and not stop.is_set():
        number += 1
        try:
            with pgdbpool.read_your_writes() as seen:
                if random.random() < 0.5:
                    Connection.execute("auto", INSERT, (number,))
                else:
                    with Handler("write") as db:
                        db.query(INSERT, (number,))
        except psycopg.Error:
            failed += 1
            time.sleep(0.02)
            continue
        written.append(number)
        begun.set()
        token = str(seen.token) if plan.tokens else None
        with contextlib.suppress(queue.Full):  # a reader that waits for a standby does not stop the writer
            readers[number % len(readers)].put((number, token), timeout=1)
    for reader in readers:
        reader.put(None)
    told.put(("written", written, failed))
    Connection.close()


def read(addresses: list[dict[str, Any]], plan: Plan, place: int, work: Any, told: Any) -> None:
    """Read the rows that the writer tells of, each after its token."""
    start(addresses, plan.mode)
    random, counts = Random(plan.seed + place), Counter()  # type: ignore[var-annotated]
    missing: list[int] = []
    lost: list[int] = []
    while (pair := work.get()) is not None:
        number, token = pair
        outcome = look(number, token, random.choice(READING), random, counts)
        counts[outcome] += 1
        if outcome == "missing":
            missing.append(number)
        elif outcome == "lost":
            lost.append(number)
    for name, group in Connection.status().groups.items():
        for what in ("guards_passed", "guards_failed", "fresh_waits", "fresh_from_primary"):
            if name in READING:
                counts[what] += getattr(group, what)
    told.put(("read", missing, lost, counts))
    Connection.close()


def look(number: int, token: str | None, group: str, random: Random, counts: Counter[str]) -> str:
    """Read a row, in one of the ways there are, until a server answers."""
    ends = time.monotonic() + PATIENCE
    way = random.choice((in_a_block, by_a_one_shot, in_a_context, out_of_the_pool, through_a_cursor))
    while time.monotonic() < ends:
        try:
            return "found" if way(group, number, token) else "missing"
        except StaleReadError as error:
            if error.lost:
                return "lost"
            counts["refused"] += 1
            time.sleep(0.02)
        except psycopg.Error:
            counts["errors"] += 1
            time.sleep(0.02)
    return "given up"


def in_a_block(group: str, number: int, token: str | None) -> Any:
    with Handler(group, after=token) as db:
        return db.fetchval(COUNT, (number,))


def by_a_one_shot(group: str, number: int, token: str | None) -> Any:
    return Connection.fetchval(group, COUNT, (number,), after=token)


def in_a_context(group: str, number: int, token: str | None) -> Any:
    with pgdbpool.read_your_writes(token), Handler(group) as db:
        return db.fetchval(COUNT, (number,))


def out_of_the_pool(group: str, number: int, token: str | None) -> Any:
    with Connection.getconn(group, after=token) as conn:
        return conn.execute(COUNT, (number,)).fetchone()[0]


def through_a_cursor(group: str, number: int, token: str | None) -> Any:
    with Handler(group, after=token) as db:
        return next(iter(db.cursor().stream(COUNT, (number,))))[0]


class Chaos:
    """Standbys that lag, stand still, die and are restarted; and promotions."""

    def __init__(self, cluster: Cluster, random: Random) -> None:
        self.cluster = cluster
        self.random = random
        self.counts: Counter[str] = Counter()

    def strike(self, promote: bool = False) -> None:
        faults: list[Callable[[], None]] = [self.delay, self.stand_still, self.kill, self.restart]
        fault = self.promote if promote else self.random.choice(faults)
        self.counts[fault.__name__] += 1
        with contextlib.suppress(psycopg.Error):
            fault()

    def standby(self) -> Node:
        return self.random.choice([node for node in self.cluster.standbys if node.running])

    def delay(self) -> None:
        node = self.standby()
        node.execute(f"ALTER SYSTEM SET recovery_min_apply_delay = '{self.random.choice((0, 5, 50, 200))}ms'")
        node.execute("SELECT pg_reload_conf()")

    def stand_still(self) -> None:
        node = self.standby()
        node.execute("SELECT pg_wal_replay_pause()")
        time.sleep(self.random.uniform(0.1, 1.0))
        node.execute("SELECT pg_wal_replay_resume()")

    def kill(self) -> None:
        node = self.standby()
        node.kill()
        time.sleep(self.random.uniform(0.0, 0.3))
        node.start()

    def restart(self) -> None:
        self.standby().restart(self.random.choice(("fast", "immediate")))

    def promote(self) -> None:
        """Kill the primary, promote the standby that has most, or now and then the other; rejoin the rest."""
        old = self.cluster.primary
        old.kill()
        received = "SELECT pg_last_wal_receive_lsn() - '0/0'::pg_lsn"
        order = sorted(self.cluster.standbys, key=lambda node: node.execute(received)[0][0] or 0)
        new = order[-1 if self.random.random() < 0.7 else 0]
        new.promote()
        for node in self.cluster.nodes:
            if node is not new:
                for attempts_left in (2, 1, 0):
                    try:
                        node.rejoin(new)
                        break
                    except ClusterError:
                        if not attempts_left:
                            raise


def run(plan: Plan) -> Report:
    """Run it, and hold what the readers found against the last primary."""
    where: dict[str, Any] = {"bin_dir": plan.bin_dir} if plan.bin_dir else {"version": plan.version}
    settings = {"max_connections": 200, "synchronous_commit": "local"}
    with Cluster(standbys=2, settings=settings, **where) as cluster:
        cluster.primary.execute("CREATE TABLE t (id bigint PRIMARY KEY)")
        cluster.wait_in_sync()
        chaos = Chaos(cluster, Random(plan.seed))
        answers = list(_with_processes(cluster, plan, chaos))
        there = {id for (id,) in cluster.primary.execute("SELECT id FROM t")}
    return _judge(answers, there, chaos.counts)


def _with_processes(cluster: Cluster, plan: Plan, chaos: Chaos) -> Iterator[tuple[Any, ...]]:
    """Let the processes work while servers break; yield what each of them tells."""
    context = multiprocessing.get_context("spawn")
    addresses = [
        {"host": n.host, "port": n.port, "name": "postgres", "user": "postgres"} for n in cluster.nodes
    ]
    told, begun, stop = context.Queue(), context.Event(), context.Event()
    work = [context.Queue(maxsize=50) for _ in range(READERS)]
    processes = [context.Process(target=write, args=(addresses, plan, work, begun, stop, told))]
    processes += [
        context.Process(target=read, args=(addresses, plan, place, work[place], told))
        for place in range(READERS)
    ]
    for process in processes:
        process.start()
    try:
        assert begun.wait(60), "the writer does not begin"
        ends, struck = time.monotonic() + plan.seconds, 0
        # What a process tells may not fit into the pipe, and it ends only when that is read.
        while time.monotonic() < ends and processes[0].is_alive() and told.empty():
            struck += 1
            chaos.strike(promote=struck % 6 == 3)
            time.sleep(chaos.random.uniform(0.1, 0.8))
        stop.set()
        for _ in processes:
            yield told.get(timeout=PATIENCE * 3)
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()


def _judge(answers: list[tuple[Any, ...]], there: set[int], struck: Counter[str]) -> Report:
    report = Report()
    report.counts.update(struck)
    for kind, *rest in answers:
        if kind == "written":
            written, failed = rest
            report.counts.update(written=len(written), failed=failed, gone=len(set(written) - there))
            continue
        missing, lost, counts = rest
        report.counts.update(counts)
        report.pairs += counts["found"] + counts["missing"] + counts["lost"]
        report.stale += [number for number in missing if number in there]
        report.silent += sum(number not in there for number in missing)
        report.false_alarms += sum(number in there for number in lost)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=60.0, help="at most so many, for each mode")
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--version", type=int)
    parser.add_argument("--bin-dir", default=os.environ.get("PGDBPOOL_TEST_PG_BIN"))
    parser.add_argument("--without-tokens", action="store_true")
    options = parser.parse_args()
    plan = Plan(
        "threaded", options.pairs, options.minutes * 60, options.seed, not options.without_tokens,
        options.version, options.bin_dir,
    )  # fmt: skip
    wrong = 0
    for mode in MODES if options.mode == "both" else (options.mode,):
        report = run(replace(plan, mode=mode))
        print(f"{mode}, seed {plan.seed}: {report}", flush=True)
        wrong += len(report.stale)
    return wrong > 0 and plan.tokens


if __name__ == "__main__":
    sys.exit(main())

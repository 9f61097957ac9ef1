"""Mixed work for a long time, with faults: nothing grows.

    python tests/faults/soak.py --minutes 10 --seed 1 --mode both

A process works, the driver breaks servers and network, and every few seconds all work pauses until everything
is mended and the pools are full: then the process has as many file descriptors and threads, and the servers
as many of its connections, as at the first pause, exactly. Its memory is held to a line through the samples.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "lib"))

from nemesis import QUICK, Nemesis
from proxy import Proxy
from support import wait_for

from pgdbpool import Connection, DBConnectionError, DBQueryError, Handler
from pgdbpool.cluster import Cluster, Node

MODES = ("threaded", "non-threaded")
USER = "soak"
SCHEMA = """
    CREATE ROLE soak LOGIN;
    CREATE TABLE notes (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant text, text text);
    INSERT INTO notes (tenant, text) SELECT 'a', repeat('x', 100) FROM generate_series(1, 1000);
    GRANT ALL ON notes TO soak;
"""
SIZES = {"write": 3, "auto": 3, "read": 4}
"""The groups and their connections."""
PAUSES = 3
"""How often it is looked, at most, for a sample in which nothing is under way."""


# The process that works.


class LeaveError(Exception):
    """The application's own reason to leave a block."""


class Worker:
    """One thread that opens blocks of all kinds."""

    def __init__(self, number: int, seed: str) -> None:
        self.random = Random(f"{seed} {number}")
        self.events: Counter[str] = Counter()
        self.quiet = False

    def run(self, paused: threading.Event, ended: threading.Event) -> None:
        while not ended.is_set():
            self.quiet = paused.is_set()
            if self.quiet:
                time.sleep(0.005)
                continue
            self.once()

    def once(self) -> None:
        step = self.random.choice(STEPS)
        try:
            step(self)
            self.events["blocks"] += 1
        except (DBQueryError, DBConnectionError, LeaveError) as error:
            self.events[type(error).__name__] += 1
            if isinstance(error, DBConnectionError):
                time.sleep(0.01)

    def reads(self) -> None:
        with Handler("read") as db:
            for row in db.query("SELECT id, text FROM notes WHERE id > %s LIMIT 20", (1,)):
                assert row["id"] == row[0]

    def reads_what_nobody_has_read(self) -> None:
        """Statements without end: what is remembered of a statement's text has a bound."""
        with Handler("read") as db:
            db.query(f"SELECT {self.random.randrange(10**12)} AS x, %s::int", (1,)).fetchall()

    def reads_by_a_named_cursor(self) -> None:
        with Handler("write") as db, db.connection.cursor("named") as cursor:
            cursor.execute("SELECT text FROM notes LIMIT 300")
            cursor.fetchmany(150)

    def streams(self) -> None:
        with Handler("read") as db:
            for row in db.connection.cursor().stream("SELECT text FROM notes LIMIT 200"):
                assert row

    def copies(self) -> None:
        with Handler("read") as db:
            with db.connection.cursor().copy("COPY (SELECT * FROM notes LIMIT 200) TO STDOUT") as copy:
                assert all(copy)

    def writes(self) -> None:
        with Handler("write", settings={"soak.tenant": f"t{self.random.randrange(1000)}"}) as db:
            db.query("INSERT INTO notes (tenant) VALUES (current_setting('soak.tenant')) RETURNING id")
            db.query("DELETE FROM notes WHERE id > 1000")

    def writes_and_leaves(self) -> None:
        with Handler("write") as db:
            db.query("INSERT INTO notes (text) VALUES ('gone')")
            raise LeaveError

    def fails(self) -> None:
        with Handler(self.random.choice(("auto", "write"))) as db:
            db.query("SELECT 1 / %s", (0,))

    def runs_into_its_timeout(self) -> None:
        with Handler("auto", settings={"statement_timeout": "10ms"}) as db:
            db.query("SELECT pg_sleep(0.1)")

    def leaves_the_session_unclean(self) -> None:
        with Handler("auto") as db:
            db.query("SET work_mem = '5MB'")
            db.query("CREATE TEMP TABLE IF NOT EXISTS scratch (id int)")
            db.query(f"PREPARE p{self.random.randrange(10**9)} AS SELECT 1")

    def changes_the_connection(self) -> None:
        with Handler("auto") as db:
            db.connection.add_notice_handler(lambda notice: None)
            db.query("DO $$ BEGIN RAISE NOTICE 'heard'; END $$")

    def nests(self) -> None:
        with Handler("write") as outer, Handler("read") as inner:
            outer.query("SELECT 1")
            inner.query("SELECT 1")

    def drops_its_handler(self) -> None:
        """A Handler that never leaves its block."""
        Handler("auto").__enter__().query("SELECT 1")

    def is_in_a_hurry(self) -> None:
        with Handler("write", timeout=0.001) as db:
            db.query("SELECT 1")


STEPS = (
    *[Worker.reads] * 5,
    *[Worker.writes] * 5,
    Worker.reads_what_nobody_has_read,
    Worker.reads_what_nobody_has_read,
    Worker.reads_by_a_named_cursor,
    Worker.streams,
    Worker.copies,
    Worker.writes_and_leaves,
    Worker.fails,
    Worker.runs_into_its_timeout,
    Worker.leaves_the_session_unclean,
    Worker.changes_the_connection,
    Worker.nests,
    Worker.drops_its_handler,
    Worker.is_in_a_hurry,
)


def full() -> bool:
    """Tell whether every group is idle and has all its connections, after one checkout of each."""
    for name in SIZES:
        try:
            with Handler(name) as db:
                db.query("SELECT 1")
        except (DBQueryError, DBConnectionError):
            return False
    groups = Connection.status().groups.values()
    return all(group.idle == group.size == group.max_size and not group.in_use for group in groups)


def asked(timeout: float) -> str:
    """Return what the driver asks for, if anything: `p`ause, `w`ork or, by closing standard input, `end`."""
    if not select.select([0], [], [], timeout)[0]:
        return ""
    return os.read(0, 1).decode() or "end"


def work(task: dict[str, Any]) -> None:
    """Work until the driver ends it; at a pause, say so once all is quiet and the pools are full."""
    Connection.init(task["config"])
    workers = [Worker(number, task["seed"]) for number in range(task["workers"])]
    paused, ended = threading.Event(), threading.Event()
    threads = [threading.Thread(target=worker.run, args=(paused, ended)) for worker in workers[1:]]
    for thread in threads:
        thread.start()
    try:
        # The first worker's thread, which is a lock-free pool's only one, looks up between two blocks.
        while (command := asked(0.0)) != "end":
            if not command:
                workers[0].once()
                continue
            paused.set()
            wait_for(lambda: all(worker.quiet for worker in workers[1:]), 30, "all workers are quiet")
            try:
                wait_for(full, 20, "all pools are full")
            except AssertionError as error:
                raise AssertionError(f"{error}: {Connection.status()}") from None
            print(json.dumps(sum((worker.events for worker in workers), Counter[str]())), flush=True)
            if asked(60) != "w":
                return
            paused.clear()
    finally:
        ended.set()
        for thread in threads:
            thread.join()
        Connection.close()


# The driver.


@dataclass
class Sample:
    """What the process has, and the servers have of it, at a pause."""

    at: float
    rss: float
    """MiB"""
    files: int
    threads: int
    backends: int

    @property
    def exact(self) -> tuple[int, int, int]:
        return self.files, self.threads, self.backends


@dataclass
class Plan:
    """One run."""

    mode: str
    seconds: float
    seed: int


@dataclass
class Report:
    """What came of a run."""

    samples: list[Sample] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)

    @property
    def changed(self) -> list[Sample]:
        """The samples that differ from the first in what is to be the same."""
        return [sample for sample in self.samples if sample.exact != self.samples[0].exact]

    @property
    def enough(self) -> bool:
        """Whether so much has happened that the report says something, also of a slow machine."""
        return len(self.samples) > 4 and len(self.faults) > 1 and self.events["blocks"] > 500

    @property
    def settled(self) -> list[Sample]:
        """The samples after the first third, in which caches fill."""
        return self.samples[len(self.samples) // 3 :]

    @property
    def growth(self) -> float:
        """MiB by which the line through the settled samples of memory rises from its start to its end."""
        times, sizes = [s.at for s in self.settled], [s.rss for s in self.settled]
        slope: float = statistics.linear_regression(times, sizes).slope
        return slope * (times[-1] - times[0])

    def __str__(self) -> str:
        first, last = self.samples[0], self.samples[-1]
        sizes = [f"{sample.rss:.1f}" for sample in self.samples[:: max(1, len(self.samples) // 12)]]
        lines = [
            f"{len(self.samples)} pauses in {last.at - first.at:.0f} s: {first.files} files, {first.threads} "
            f"threads, {first.backends} backends at the first, {len(self.changed)} pauses differ",
            f"memory in MiB: {', '.join(sizes)}, {last.rss:.1f}; after warm-up {self.growth:+.2f}",
            "blocks: " + ", ".join(f"{count} {name}" for name, count in self.events.most_common()),
            "faults: " + ", ".join(f"{count} {name}" for name, count in self.faults.most_common()),
        ]
        return "\n".join(f"  {line}" for line in [*lines, *map(str, self.changed[:5])])


def configuration(mode: str, proxies: list[Proxy]) -> dict[str, Any]:
    """Return what the process is given: pools that are always full, with connections that end soon."""
    entry = {"name": "postgres", "user": USER, "connect_timeout": 1, "query_timeout": 2000}
    servers = [{"host": Node.host, "port": proxy.port, **entry} for proxy in proxies]
    groups: dict[str, dict[str, Any]] = {
        name: {"connection_count": size, "timeout": 2, "max_lifetime": 20, "ping_after": 1, "ping_timeout": 1}
        for name, size in SIZES.items()
    }
    groups["write"] |= {"target": "primary", "autocommit": False}
    groups["auto"] |= {"target": "primary"}
    return {"type": mode, "db": servers, "groups": groups}


def run(plan: Plan) -> Report:
    """Have a process work and be disturbed for a while, and return what it had at its pauses."""
    report = Report()
    random = Random(f"{plan.seed} {plan.mode}")
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(standbys=1, settings={"max_connections": 200}))
        cluster.primary.execute(SCHEMA)
        cluster.wait_in_sync()
        proxies = {node: stack.enter_context(Proxy(node.host, node.port)) for node in cluster.nodes}
        task = {
            "config": configuration(plan.mode, list(proxies.values())),
            "workers": 6 if plan.mode == "threaded" else 1,
            "seed": f"{plan.seed} {plan.mode}",
        }
        log = stack.enter_context(tempfile.TemporaryFile())
        command = [sys.executable, __file__, "--work", json.dumps(task)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        stack.callback(process.kill)

        def note(kind: str, **fields: Any) -> None:
            if kind == "fault":
                report.faults[fields["fault"]] += 1

        nemesis = Nemesis(cluster, proxies, USER, random, note)
        until = time.monotonic() + plan.seconds
        at_last = until + 4 * plan.seconds
        try:
            while (now := time.monotonic()) < until or (now < at_last and not report.enough):
                time.sleep(random.uniform(0.5, 2.0))
                sample_at_pause(report, process, cluster)
                nemesis.strike(random.choice(QUICK))
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(30) == 0
        except (AssertionError, BrokenPipeError) as error:
            log.seek(0)
            raise AssertionError(f"{error}; its log ends: {log.read()[-30000:].decode()}") from error
    return report


def sample_at_pause(report: Report, process: subprocess.Popen[bytes], cluster: Cluster) -> None:
    """Have the process pause, note what it has, and let it go on."""
    # A lock-free process that pauses while it asks a server something has that connection until it goes on.
    # So two pauses must agree on the first sample, which the others are compared with.
    expected = report.samples[0].exact if report.samples else None
    for again in range(PAUSES if expected else 2 * PAUSES):
        if again:
            time.sleep(0.5)
        sample, settled = look_at_pause(report, process, cluster, expected)
        if settled and expected:
            break
        if not report.samples:
            expected = sample.exact
    report.samples.append(sample)


def look_at_pause(
    report: Report, process: subprocess.Popen[bytes], cluster: Cluster, expected: tuple[int, int, int] | None
) -> tuple[Sample, bool]:
    """Have the process pause and go on; return what it had, and whether that was as expected."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"p")
    process.stdin.flush()
    answer = process.stdout.readline()
    assert answer, "the process has ended"
    report.events = Counter(json.loads(answer))
    sample = look_at(process.pid, cluster)

    def settled() -> bool:
        nonlocal sample
        sample = look_at(process.pid, cluster)
        return sample.exact == expected if expected else sample.backends == sum(SIZES.values())

    # What was closed a moment ago ends a moment later: a thread, a backend.
    as_expected = False
    with suppress(AssertionError):
        as_expected = wait_for(settled, 30 / PAUSES)
    process.stdin.write(b"w")
    process.stdin.flush()
    return sample, as_expected


def look_at(pid: int, cluster: Cluster) -> Sample:
    """Return what a process has now."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    query = "SELECT count(*) FROM pg_stat_activity WHERE usename = %s"
    return Sample(
        at=time.monotonic(),
        rss=int(status["VmRSS"].split()[0]) / 1024,
        files=len(os.listdir(f"/proc/{pid}/fd")),
        threads=int(status["Threads"]),
        backends=sum(node.execute(query, (USER,))[0][0] for node in cluster.nodes),
    )


def main() -> int:
    """Run as a command; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="in each mode (10)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of what is random (the time)")
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both")
    parser.add_argument("--growth", type=float, default=4.0, help="how much memory may grow, in MiB (4)")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(json.loads(options.work))
        return 0
    failed = False
    for mode in MODES if options.mode == "both" else (options.mode,):
        report = run(Plan(mode, options.minutes * 60, options.seed))
        failed = failed or bool(report.changed) or report.growth > options.growth
        print(f"{mode}: seed {options.seed}\n{report}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Many random blocks of many tenants at once, with killed backends and exceptions at any moment.

    python tests/lib/isolation.py --blocks 100000 --threads 8 --tenants 20 --seed 1 --mode both

The oracle: every answer says under which tenant the server gave it, and a superuser reads afterwards what was
written, by whom and under which tenant. Besides, a transaction is there as a whole or not at all, and the
pools' counts are exact at the end. A lock-free pool has one thread, so there each worker is a process.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from random import Random
from typing import Any

import psycopg
from isolation_steps import (
    INTERRUPTS,
    SESSION,
    STEPS,
    ApplicationError,
    Companion,
    Leave,
    Scene,
    Unit,
    mistakes,
)
from support import config, wait_for

import pgdbpool
from pgdbpool import Connection, DBQueryError, Handler
from pgdbpool.cluster import Cluster, Node

HOST = Node.host

SCHEMA = """
    DROP TABLE IF EXISTS docs, journal CASCADE;
    DROP SCHEMA IF EXISTS shadow;
    DROP SCHEMA IF EXISTS shape_1, shape_2, shape_3 CASCADE;
    DROP TABLE IF EXISTS changing;
    DROP FUNCTION IF EXISTS note_tenant, remember, forget;
    DROP ROLE IF EXISTS app, peeker;
    CREATE ROLE peeker BYPASSRLS;
    CREATE ROLE app LOGIN IN ROLE peeker;
    GRANT peeker TO app WITH INHERIT FALSE;
    CREATE TABLE docs (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
                       tenant text, writer text, seen text);
    CREATE TABLE journal (seen text DEFAULT current_setting('app.tenant', true), writer text, unit bigint);
    CREATE FUNCTION note_tenant() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN NEW.seen := current_setting('app.tenant', true); RETURN NEW; END $$;
    CREATE TRIGGER note_tenant BEFORE INSERT OR UPDATE ON docs FOR EACH ROW EXECUTE FUNCTION note_tenant();
    CREATE FUNCTION remember(text) RETURNS text LANGUAGE sql AS
        $$ SELECT set_config('app.tenant', $1, false) $$;
    CREATE FUNCTION forget() RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$;
    ALTER TABLE docs ENABLE ROW LEVEL SECURITY;
    ALTER TABLE docs FORCE ROW LEVEL SECURITY;
    CREATE POLICY own ON docs USING (tenant = NULLIF(current_setting('app.tenant', true), ''));
    CREATE SCHEMA shadow;
    CREATE VIEW shadow.docs AS SELECT * FROM docs;
    GRANT USAGE ON SCHEMA shadow TO app, peeker;
    GRANT ALL ON docs, journal, shadow.docs TO app, peeker;
    CREATE SCHEMA shape_1;
    CREATE TABLE shape_1.shapes AS SELECT 1 AS a, 1 AS b;
    CREATE SCHEMA shape_2;
    CREATE TABLE shape_2.shapes AS SELECT 2 AS a, 2 AS b, 2 AS c;
    CREATE SCHEMA shape_3;
    CREATE TABLE shape_3.shapes AS SELECT 3 AS a, 3 AS b, 3 AS c, 3 AS d;
    GRANT USAGE ON SCHEMA shape_1, shape_2, shape_3 TO app, peeker;
    CREATE TABLE changing AS SELECT 1 AS id, 7 AS value;
    GRANT SELECT ON changing, shape_1.shapes, shape_2.shapes, shape_3.shapes TO app, peeker;
"""

# What an application must expect, and goes on or ends its block after.
EXPECTED = (
    ApplicationError,
    pgdbpool.ConnectionLostError,
    pgdbpool.TransactionAbortedError,
    psycopg.errors.InFailedSqlTransaction,
    psycopg.errors.PipelineAborted,
    psycopg.transaction.OutOfOrderTransactionNesting,  # interrupted on the way into a transaction()
)
# What psycopg says where it was interrupted on the way into or out of a transaction(), pipeline() ... It says
# so, and the connection is closed, so nothing comes of it.
INTERRUPTED_INSIDE = (
    "another command is already in progress",
    "within a Transaction context",
    "cannot exit pipeline mode",
    "failed to enter pipeline mode",
)


@dataclass
class Plan:
    """One run: what is asked of it, and what came of it."""

    mode: str
    blocks: int
    workers: int = 8
    tenants: int = 20
    seed: int = 0
    first: int = 0
    """Number of the first worker, so that those of several processes differ."""
    port: int = 0
    """The server's."""
    pooler: int = 0
    """Port of a transaction pooler before the server, which has fewer sessions than clients; 0 is none."""


@dataclass
class Report:
    """What came of a run."""

    events: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    units: list[tuple[int, int, str, str]] = field(default_factory=list)
    """Of each transaction its number, how many rows it wrote, its outcome, and what its block did."""
    seconds: float = 0.0

    def add(self, other: Report) -> None:
        self.events.update(other.events)
        self.violations += other.violations
        self.units += other.units
        self.seconds = max(self.seconds, other.seconds)


class Worker:
    """One thread that opens blocks; `fire` interrupts it at any moment of a block, once in each at most."""

    def __init__(self, plan: Plan, number: int) -> None:
        self.plan = plan
        self.number = number
        self.random = Random(f"{plan.seed} {plan.mode} {number}")
        self.events: Counter[str] = Counter()
        self.violations: list[str] = []
        self.units: list[Unit] = []
        self.trail: list[str] = []
        """The steps of the block that is open, or was last."""
        self.weights = {s: weight for s, weight in STEPS.items() if not (plan.pooler and s in SESSION)}
        self.tenants = [f"tenant {i}" + "'é€"[: i % 4] for i in range(plan.tenants)]
        self.companion = Companion()
        self.ident = 0
        self.timed = False
        self.chance = Random(f"{plan.seed} signals")
        self.exposed = False
        self.fired = False
        self.gate = threading.Lock()  # so that nothing is fired once a block is over

    def run(self, blocks: int) -> None:
        self.ident = threading.get_ident()
        for number in range(blocks):
            try:
                self.exposed, self.fired = True, False
                try:
                    self.arm()
                    self.block()
                finally:
                    self.calm()
            except INTERRUPTS:
                self.events["blocks ended by an interrupt"] += 1
            except EXPECTED as error:
                self.events[f"blocks ended by {type(error).__name__}"] += 1
            except psycopg.errors.QueryCanceled as error:
                self.note_cancel(error)
            except (psycopg.ProgrammingError, psycopg.OperationalError) as error:
                if self.fired and any(words in str(error) for words in INTERRUPTED_INSIDE):
                    self.events["blocks ended by psycopg, interrupted"] += 1
                else:
                    self.violate(number)
            except Exception:  # noqa: BLE001  whatever else it is, it is a finding
                self.violate(number)
            self.events["blocks"] += 1
            if (left := pgdbpool.current_tenant()) is not None:
                self.violations.append(
                    f"worker {self.number} block {number}: it left the tenant {left!r} behind"
                )
        self.companion.finish()
        place = f"worker {self.number} of seed {self.plan.seed} {self.plan.mode}"
        self.violations += [f"{place}: {violation}" for violation in self.companion.violations]

    def violate(self, number: int) -> None:
        """Report the exception that is being handled."""
        place = f"worker {self.number} block {number} of seed {self.plan.seed} {self.plan.mode}"
        self.violations.append(f"{place}: {', '.join(self.trail)}: {traceback.format_exc()}")

    def note_cancel(self, error: psycopg.Error) -> None:
        """Tell a cancel that was asked for from a timeout that nobody has set."""
        if "user request" in str(error):
            self.events["statements cancelled"] += 1
        else:
            self.violations.append(f"worker {self.number}: {error}")

    # Interrupts.

    def fire(self, kind: type[BaseException]) -> None:
        """Have the thread raise, at whatever it does, if it is in a block; called by another thread."""
        with self.gate:
            if self.exposed:
                self.exposed, self.fired = False, True
                self.events["interrupts by thread"] += 1
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), ctypes.py_object(kind))

    @contextmanager
    def timer(self) -> Iterator[None]:
        """Have signals interrupt the main thread, which this worker is, when `arm` asks for one."""

        def interrupt(*_: object) -> None:
            if self.exposed:
                self.exposed, self.fired = False, True
                self.events["interrupts by signal"] += 1
                raise self.chance.choice(INTERRUPTS)

        previous = signal.signal(signal.SIGALRM, interrupt)
        self.timed = True
        try:
            yield
        finally:
            self.timed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)

    def arm(self) -> None:
        """Ask for a signal at some moment of the block, in a tenth of the blocks."""
        if self.timed and self.chance.random() < 0.1:
            signal.setitimer(signal.ITIMER_REAL, self.chance.uniform(0.0001, 0.01))

    def calm(self) -> None:
        """End the time in which the thread is interrupted; take what is under way."""
        while True:
            try:
                with self.gate:
                    self.exposed = False
                # What another thread has asked for is raised here, where the interpreter looks for it. To
                # take it back would leave it looking for ever: Python 3.11 hangs where a profile is set.
                for _ in range(2):
                    pass
                return
            except INTERRUPTS:
                continue

    # Blocks.

    def new_unit(self) -> Unit:
        unit = Unit((self.plan.first + self.number) * 10**9 + len(self.units), self.trail)
        self.units.append(unit)
        return unit

    def block(self, nested: bool = False) -> None:
        """Open a block of some tenant in some group, and take some steps in it."""
        random = self.random
        manual, required = random.random() < 0.5, random.random() < 0.8
        group = ("manual" if manual else "auto") + ("" if required else "_open")
        tenant, other = random.sample(self.tenants, 2)
        if random.random() < 0.02:
            mistakes(group if required else group.removesuffix("_open"), tenant, other)
        current: Any = pgdbpool.tenant(None)
        use: dict[str, Any] = {"tenant": tenant}
        if not required and random.random() < 0.5:
            tenant, use = "", {}
        elif random.random() < 0.4:
            current, use = pgdbpool.tenant(tenant), random.choice(({}, use))
        elif random.random() < 0.2:
            current, use = pgdbpool.tenant(other), {**use, "tenant_override": True}
        if random.random() < 0.2:
            use["settings"] = {"work_mem": "5MB"}
        schema = random.choice((None, None, 1, 2, 3))
        if schema is not None:
            use["settings"] = {**use.get("settings", {}), "search_path": f"public, shape_{schema}"}
        if nested:
            use["timeout"] = 0.05
        self.trail = [*(self.trail if nested else []), f"{group} of {tenant!r}"]
        with current:
            handler = Handler(group, **use)
            scene: Scene | None = None
            try:
                with handler as db:
                    scene = Scene(db, tenant, manual, random, self.events, self.new_unit, self.companion)
                    scene.schema = schema
                    self.steps(scene, nested)
                    if scene.unit is not None:
                        scene.unit.outcome = "unknown"
                if scene.unit is not None:
                    scene.unit.outcome = "committed"
            except DBQueryError as error:
                if scene is not None and scene.unit is not None and not error.maybe_committed:
                    scene.unit.outcome = "none"
                raise

    def steps(self, scene: Scene, nested: bool) -> None:
        """Take some steps; errors end the block, or are swallowed and the block goes on."""
        steps, weights = list(self.weights), list(self.weights.values())
        for step in self.random.choices(steps, weights, k=self.random.randint(1, 6)):
            unit = scene.unit
            self.trail.append(step.__name__)
            try:
                scene.hazard()
                # A block that waits for a session inside one that has a session would wait for itself.
                if not nested and not self.plan.pooler and self.random.random() < 0.05:
                    self.nested_block()
                step(scene)
            except INTERRUPTS:
                if self.random.random() < 0.5:
                    raise
                self.events["interrupts swallowed"] += 1
                self.trail.append("interrupted")
                self.companion.begin(lambda: None).acquire(timeout=30)  # it may still use the connection
                for touched in (unit, scene.unit):
                    if touched is not None:
                        touched.counted = False
            except EXPECTED as error:
                if isinstance(error, Leave) or self.random.random() < 0.5:
                    raise
                self.events[f"{type(error).__name__} swallowed"] += 1
                self.trail.append(type(error).__name__)

    def nested_block(self) -> None:
        """Open a block in the open one; it may find no connection in the little time that it waits."""
        self.events["nested blocks"] += 1
        try:
            self.block(nested=True)
        except Leave:
            self.trail.append("left")
        except pgdbpool.DBOfflineError:
            raise
        except pgdbpool.DBConnectionError:
            self.events["nested blocks without a connection"] += 1


class Nemesis(threading.Thread):
    """Kills backends, changes a table, cancels statements and interrupts threads until its block ends."""

    def __init__(self, node: Node, seed: int) -> None:
        super().__init__(name="nemesis", daemon=True)
        self.node = node
        self.workers: list[Worker] = []
        """Those of this process whose threads are to be interrupted."""
        self.random = Random(f"{seed} nemesis")
        self.events: Counter[str] = Counter()
        self.stopped = threading.Event()

    def run(self) -> None:
        # Not one that is being opened: that would be a server that refuses, which is another test's.
        victim = """SELECT {}(pid) FROM pg_stat_activity WHERE usename = 'app'
                    AND backend_start < now() - interval '0.2 s' ORDER BY random() LIMIT 1"""
        with self.node.connect() as admin:
            admin.execute("SET lock_timeout = '20ms'")
            while not self.stopped.wait(self.random.uniform(0.001, 0.01)):
                chance = self.random.random()
                if chance < 0.1:
                    found = admin.execute(victim.format("pg_terminate_backend").encode()).fetchone()
                    self.events["backends killed"] += found is not None
                elif chance < 0.2:
                    admin.execute(victim.format("pg_cancel_backend").encode())
                elif chance < 0.3:
                    kind = self.random.choice(("int", "text", "bigint"))
                    with suppress(psycopg.errors.LockNotAvailable):
                        admin.execute(
                            f"ALTER TABLE changing ALTER value TYPE {kind} USING value::{kind}".encode()
                        )
                        self.events["tables changed"] += 1
                elif self.workers:
                    self.random.choice(self.workers).fire(self.random.choice(INTERRUPTS))

    def __enter__(self) -> Nemesis:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self.join(10)


# Running.


def configuration(plan: Plan, name: str) -> dict[str, Any]:
    """Return a configuration with four groups: autocommit or not, with a tenant required or not."""
    entry: dict[str, Any] = {
        "host": HOST,
        "port": plan.pooler or plan.port,
        "name": "postgres",
        "user": "app",
    }
    entry["application_name"] = name
    common = {"connection_count": plan.workers // 2 + 2, "min_size": 1, "timeout": 10}
    if plan.pooler:
        entry |= {"pooler": "transaction", "connect_timeout": 10}  # a new client waits for a session
    else:
        common["prepare_threshold"] = 2
    groups = {
        kind + suffix: {
            **common,
            "autocommit": kind == "auto",
            # The role may take another that bypasses row-level security: some blocks do, and leave it so.
            "tenant": {"setting": "app.tenant", "required": not suffix, "verify": "off"},
        }
        for kind in ("auto", "manual")
        for suffix in ("", "_open")
    }
    return config([entry], plan.mode, **groups)


def work(plan: Plan, victims: list[Worker]) -> Report:
    """Run the plan's workers in this process, the first of them in this thread, the others as victims."""
    workers = [Worker(plan, number) for number in range(plan.workers)]
    name = f"isolation {plan.first}"
    Connection.init(configuration(plan, name))
    share = plan.blocks // plan.workers
    threads = [threading.Thread(target=worker.run, args=(share,)) for worker in workers[1:]]
    began = time.monotonic()
    try:
        for thread in threads:
            thread.start()
        victims += workers[1:]
        with workers[0].timer():
            workers[0].run(plan.blocks - share * len(threads))
        for thread in threads:
            thread.join()
        report = Report(seconds=time.monotonic() - began, violations=check_counts(name, plan.port))
    finally:
        Connection.close()
    for worker in workers:
        units = [(u.number, u.rows if u.counted else -1, u.outcome, ", ".join(u.trail)) for u in worker.units]
        report.add(Report(worker.events, worker.violations, units))
    return report


def work_in_processes(plan: Plan) -> Report:
    """Run each of the plan's workers in a process of its own."""
    report = Report()
    share = plan.blocks // plan.workers
    children = []
    for number in range(plan.workers):
        blocks = plan.blocks - share * (plan.workers - 1) if number == 0 else share
        part = asdict(replace(plan, workers=1, first=number, blocks=blocks))
        command = [sys.executable, __file__, "--part", json.dumps(part)]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    for child in children:
        output, _ = child.communicate()
        if child.returncode != 0:
            report.violations.append(f"a process ended with exit status {child.returncode}")
            continue
        found = json.loads(output)
        report.add(Report(Counter(found.pop("events")), **found))
    return report


# The verdict.


def check_counts(name: str, port: int) -> list[str]:
    """Return what is wrong with the pools' counts, now that nobody has a block."""

    def wrong() -> list[str]:
        groups = Connection.status().groups.values()
        found = [
            f"group {group.name}: {group}"
            for group in groups
            if group.in_use
            or group.waiting
            # A lock-free pool finds at a checkout that the server has let go a session left in a commit.
            or not group.idle + group.left == group.size == sum(group.connections.values()) <= group.max_size
        ]
        row = admin.execute(
            """SELECT count(*), count(*) FILTER (WHERE state <> 'idle')
               FROM pg_stat_activity WHERE application_name = %s""",
            (name,),
        ).fetchone()
        assert row is not None
        (backends, busy), idle = row, sum(group.idle for group in groups)
        if backends > idle:
            found.append(f"{backends} backends of {idle} idle connections")
        if busy:
            found.append(f"{busy} backends are in a transaction")
        return found

    gc.collect()  # a Handler that was interrupted on its way out, and that an error leads to
    options: Any = {"host": HOST, "port": port, "user": "postgres", "dbname": "postgres"}
    with psycopg.connect(**options, autocommit=True) as admin:
        # Connections are being replaced, and what was closed a moment ago ends a moment later at the server.
        with suppress(AssertionError):
            wait_for(lambda: not wrong(), timeout=10)
        return wrong()


def verdict(admin: psycopg.Connection[Any], units: list[tuple[int, int, str, str]]) -> list[str]:
    """Return what a superuser finds wrong in what was written."""
    found = []
    for table, clean in (("docs", "tenant = writer AND tenant = seen"), ("journal", "writer = seen")):
        query = f"SELECT * FROM {table} WHERE ({clean}) IS NOT TRUE LIMIT 5"
        found += [f"{table} has {row}" for row in admin.execute(query.encode())]
    query = "SELECT unit, count(*) FROM journal WHERE unit IS NOT NULL GROUP BY unit"
    there = dict(admin.execute(query.encode()).fetchall())
    for number, rows, outcome, trail in units:
        allowed = {"committed": {rows}, "none": {0}, "unknown": {0, rows}}[outcome]
        if rows >= 0 and (count := there.get(number, 0)) not in allowed:
            found.append(f"transaction {number}: {outcome}, {rows} written, {count} are there: {trail}")
    return found


def run(plan: Plan, node: Node) -> Report:
    """Run a plan against a server, and hold what came of it against the oracle."""
    plan = replace(plan, port=node.port)
    with node.connect() as admin:
        admin.execute(SCHEMA.encode())
        with Nemesis(node, plan.seed) as nemesis:
            if plan.mode == "threaded" or plan.workers == 1:
                report = work(plan, nemesis.workers)
            else:
                report = work_in_processes(plan)
        report.add(Report(nemesis.events, verdict(admin, report.units)))
    return report


def main() -> int:
    """Run as a command; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--blocks", type=int, default=100_000, help="in each mode (100000)")
    parser.add_argument("--threads", type=int, default=8, help="threads, or processes if lock-free (8)")
    parser.add_argument("--tenants", type=int, default=20, help="(20)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of what is random (the time)")
    parser.add_argument("--mode", choices=("threaded", "non-threaded", "both"), default="both")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(vars(work(Plan(**json.loads(options.part)), []))))
        return 0
    logging.disable(logging.WARNING)  # psycopg tells of each interrupted rollback
    sys.unraisablehook = lambda _: None  # interrupts arrive in finalizers too
    failed = False
    modes = ("threaded", "non-threaded") if options.mode == "both" else (options.mode,)
    with Cluster(standbys=0, settings={"max_connections": 300}) as cluster:
        for mode in modes:
            plan = Plan(mode, options.blocks, options.threads, options.tenants, options.seed)
            report = run(plan, cluster.primary)
            failed = failed or bool(report.violations)
            rate = report.events["blocks"] / report.seconds
            print(f"{mode}: seed {plan.seed}, {report.seconds:.0f} s, {rate:.0f} blocks/s")
            for what, count in report.events.most_common():
                print(f"  {count:9} {what}")
            print(f"  {len(report.violations):9} violations")
            for violation in report.violations[:20]:
                print(f"\n{violation}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

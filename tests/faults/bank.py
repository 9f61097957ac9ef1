"""A bank on a primary with a synchronous standby: tellers in several processes, and everything goes wrong.

    python tests/faults/bank.py --minutes 10 --seed 1 --mode both

Each transfer has an id of its own, written in its transaction. What its client was told goes to a history,
which `bank_checker.py` holds against the database at the end: what was acknowledged is there exactly once,
what has an unknown outcome at most once, what was refused never, and the sum holds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "lib"))

from bank_checker import Verdict, check
from bank_client import Desk
from nemesis import Nemesis
from proxy import Proxy

from pgdbpool.cluster import Cluster, Node

HERE = Path(__file__).parent
MODES = ("threaded", "non-threaded")

SCHEMA = """
    CREATE ROLE teller LOGIN;
    CREATE TABLE accounts (id int PRIMARY KEY, balance bigint NOT NULL) WITH (fillfactor = 50);
    CREATE TABLE entries (id text NOT NULL, source int NOT NULL, target int NOT NULL, amount int NOT NULL);
    INSERT INTO accounts SELECT number, {balance} FROM generate_series(0, {accounts} - 1) number;
    GRANT ALL ON accounts, entries TO teller;
"""
# No key on entries.id: one that is there twice is to be seen, not prevented.

SETTINGS = {
    "max_connections": 300,
    "deadlock_timeout": "200ms",
    "log_line_prefix": "%m [%p] %v %x ",
    "synchronous_standby_names": "ANY 1 (node1, node2)",  # each one's only standby is the other
}
CHECKOUT, QUERY, CLIENT_GRACE = 4.0, 2.0, 1.0
"""The groups' `timeout` and `query_timeout`, and what the pool waits longer than that, in seconds."""
SLACK = 3.0
"""What a busy machine may take longer."""
ANSWER = QUERY + CLIENT_GRACE
BOUNDS = {
    "checkout": CHECKOUT,
    "query": ANSWER + CHECKOUT + ANSWER,  # the first of a transaction may go to another connection
    "commit": ANSWER,
    "transaction": 5 * ANSWER,
}
"""How long a call may take, in seconds, without the slack."""
LEAVING = sum(BOUNDS.values()) + 2 * BOUNDS["query"] + SLACK
"""How long a process may take to end, in seconds: a transfer has a few calls, each within its bound."""


@dataclass
class Plan:
    """One run."""

    mode: str
    seconds: float
    seed: int
    balance: int = 1000
    accounts: int = 50
    version: int | None = int(os.environ.get("PGDBPOOL_TEST_PG_VERSION", "0")) or None
    """PostgreSQL's, if not the newest."""
    log_statements: bool = False
    """Whether the servers log every statement, with its transaction."""

    @property
    def shape(self) -> tuple[int, int]:
        """How many processes there are, and tellers in each."""
        return (3, 3) if self.mode == "threaded" else (6, 1)


class History:
    """The file that all write to, as its reader: who had the last success when."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        self.writer = os.open(path, os.O_WRONLY | os.O_APPEND)
        self.reader = path.open("rb")
        self.partial = b""
        self.successes: dict[int, float] = {}

    def close(self) -> None:
        os.close(self.writer)
        self.reader.close()

    def note(self, kind: str, **fields: Any) -> None:
        os.write(self.writer, json.dumps({"type": kind, **fields}).encode() + b"\n")

    def follow(self) -> None:
        """Read what is new."""
        *lines, self.partial = (self.partial + self.reader.read()).split(b"\n")
        for line in map(json.loads, lines):
            if line["type"] == "transfer" and line["outcome"] == "ok":
                self.successes[line["process"]] = line["end"]


def configuration(plan: Plan, nodes: list[Any], tellers: int, random: Random) -> dict[str, Any]:
    """Return what a process is given: both servers in any order, and what is a matter of taste at random."""
    servers = [
        {"host": Node.host, "port": node.port, "name": "postgres", "user": "teller", "connect_timeout": 1}
        for node in random.sample(nodes, len(nodes))
    ]
    writable = random.choice(("primary", "read-write"))
    common = {
        "connection_count": max(2, tellers - 1),
        "min_size": random.choice((0, 1, 2)),
        "timeout": CHECKOUT,
        "query_timeout": int(QUERY * 1000),
        "ping_after": random.choice((0.05, 1, 30)),
        "ping_timeout": 1,
        "prepare_threshold": random.choice((None, 0, 5)),
        "max_lifetime": random.choice((5, 3600)),
    }
    groups = {
        "write": {**common, "target": writable, "autocommit": False},
        "auto": {**common, "target": writable},
        "read": {**common, "target": "prefer-standby"},
    }
    return {"type": plan.mode, "db": servers, "groups": groups}


def run(plan: Plan, directory: Path) -> Verdict:
    """Open a bank for a while, leave history and final state in the directory, and return the verdict."""
    random = Random(f"{plan.seed} {plan.mode}")
    settings: dict[str, object] = {
        **SETTINGS,
        "synchronous_commit": random.choice(("on", "remote_apply")),
        "log_statement": "all" if plan.log_statements else "none",
    }
    processes, tellers = plan.shape
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(standbys=1, version=plan.version, settings=settings))
        cluster.primary.execute(SCHEMA.format(balance=plan.balance, accounts=plan.accounts))
        proxies = {node: stack.enter_context(Proxy(node.host, node.port)) for node in cluster.nodes}
        history = History(directory / "history.jsonl")
        stack.callback(history.close)
        desks = []
        for number in range(processes):
            # One has no proxy: it sees the servers refuse by themselves.
            before: list[Any] = list(cluster.nodes if number == 0 else proxies.values())
            desks.append(
                Desk(
                    number=number,
                    generation=0,
                    patience=random.choice((0.1, 0.5, ANSWER)),
                    seed=f"{plan.seed} {plan.mode}",
                    tellers=tellers,
                    accounts=plan.accounts,
                    history=str(history.path),
                    config=configuration(plan, before, tellers, random),
                )
            )
        clients = Clients(desks, directory, random, history.note)
        stack.callback(clients.end, 0.0)
        began = time.monotonic()
        clients.start()

        def recovered(since: float) -> bool:
            history.follow()
            return all(history.successes.get(number, 0.0) >= since for number in range(processes))

        recovery = BOUNDS["query"] + SLACK
        nemesis = Nemesis(cluster, proxies, "teller", random, history.note, clients.replace_one)
        try:
            while not recovered(began) and time.monotonic() < began + 20:
                time.sleep(0.02)
            nemesis.run(began + plan.seconds, recovered, recovery)
            until = time.monotonic()
            clients.end(LEAVING)
        finally:
            for node in cluster.nodes:
                if node.log.exists():
                    shutil.copy(node.log, directory)
        history.note(
            "plan",
            **asdict(plan),
            processes=processes,
            until=until,
            recovery=recovery,
            bounds={kind: seconds + SLACK for kind, seconds in BOUNDS.items()},
        )
        write_final(cluster.primary, directory / "final.jsonl")
    return check(directory)


class Clients:
    """The processes of the bank, one for each desk; one that was ended has a successor."""

    def __init__(self, desks: list[Desk], directory: Path, random: Random, note: Callable[..., None]) -> None:
        self.desks = desks
        self.directory = directory
        self.random = random
        self.note = note
        self.running: dict[int, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        for desk in self.desks:
            self._start(desk)

    def _start(self, desk: Desk) -> None:
        command = [sys.executable, str(HERE / "bank_client.py"), json.dumps(asdict(desk))]
        with (self.directory / f"process{desk.number}.log").open("a") as log:
            self.running[desk.number] = subprocess.Popen(command, stdout=log, stderr=log)

    def replace_one(self) -> None:
        """End one of the processes with SIGTERM, whatever it is doing, and start its successor."""
        number = self.random.randrange(len(self.desks))
        self.running[number].send_signal(signal.SIGTERM)
        self._wait(number, time.monotonic() + LEAVING)
        desk = self.desks[number] = replace(self.desks[number], generation=self.desks[number].generation + 1)
        self._start(desk)

    def end(self, patience: float) -> None:
        """Have the processes end, within the time."""
        deadline = time.monotonic() + patience
        for client in self.running.values():
            client.send_signal(signal.SIGTERM)
        for number in list(self.running):
            self._wait(number, deadline)

    def _wait(self, number: int, deadline: float) -> None:
        client = self.running.pop(number)
        try:
            code = client.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            client.kill()
            code = client.wait(10)
        if code:
            self.note("unexpected", text=f"exit code of process {number}: {code}")


def write_final(node: Node, path: Path) -> None:
    """Write down what is in the database, once nobody of the bank is connected any more."""
    busy = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'teller'"
    deadline = time.monotonic() + 30
    while node.execute(busy) != [(0,)]:
        assert time.monotonic() < deadline, "a backend of the bank does not end"
        time.sleep(0.05)
    with path.open("w", encoding="utf-8") as file:
        for number, balance in node.execute("SELECT id, balance FROM accounts"):
            file.write(json.dumps({"type": "account", "id": number, "balance": balance}) + "\n")
        for row in node.execute("SELECT id, source, target, amount FROM entries"):
            entry = dict(zip(("id", "source", "target", "amount"), row, strict=True))
            file.write(json.dumps({"type": "entry", **entry}) + "\n")


def main() -> int:
    """Run as a command; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="in each mode (10)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of what is random (the time)")
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both")
    parser.add_argument("--directory", type=Path, help="where the histories go, and stay (a temporary one)")
    parser.add_argument("--log-statements", action="store_true", help="have the servers log all")
    options = parser.parse_args()
    directory = options.directory or Path(tempfile.mkdtemp(prefix="bank-"))
    failed = False
    for mode in MODES if options.mode == "both" else (options.mode,):
        plan = Plan(mode, options.minutes * 60, options.seed, log_statements=options.log_statements)
        place = directory / mode
        place.mkdir(parents=True)
        verdict = run(plan, place)
        failed = failed or bool(verdict.violations)
        print(f"{mode}: seed {plan.seed}, history in {place}\n{verdict}", flush=True)
    if not failed and options.directory is None:
        shutil.rmtree(directory)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

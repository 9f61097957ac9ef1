"""The demo's tour: faults of the cluster, and how the application must behave during them."""

from __future__ import annotations

import http.client
import os
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from types import TracebackType
from typing import Any

from ..cluster import Cluster, ClusterError, Node
from ..cluster._watchdog import processes, tree
from .demo import DATABASE, Answer, DemoError, Gunicorn, Options, say, started

CLIENTS = 8
TRANSFERS = 200
READS = 400
BACK_WITHIN = 10.0
"""Seconds within which a restarted standby must get its share of the reads."""


class StepFailed(AssertionError):
    """A step did not show the expected result."""


def expect(holds: object, failure: str) -> None:
    """Raise StepFailed with the observation, unless it holds."""
    if not holds:
        raise StepFailed(failure)


def wait_for(condition: Callable[[], bool], timeout: float, failure: Callable[[], str]) -> float:
    """Wait until the condition holds and return the seconds; raises StepFailed after the timeout."""
    began = time.monotonic()
    while not condition():
        expect(time.monotonic() - began < timeout, f"{failure()} within {timeout:g} s")
        time.sleep(0.005)
    return time.monotonic() - began


@dataclass(frozen=True)
class Read:
    """One read of a client: when it was sent, the server that answered, and the error, if any."""

    at: float
    server: str
    total: Decimal
    error: str


class Readers:
    """Clients that read the accounts without a pause, within a `with` block."""

    def __init__(self, server: Gunicorn, clients: int = CLIENTS) -> None:
        self.reads: list[Read] = []
        self._server = server
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._read, daemon=True) for _ in range(clients)]

    def __enter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(30)

    def since(self, moment: float) -> list[Read]:
        """Return the reads that were sent at that moment or later."""
        return [read for read in self.reads.copy() if read.at >= moment]

    def _read(self) -> None:
        while not self._end.is_set():
            self.reads.append(read_accounts(self._server))


def read_accounts(server: Gunicorn) -> Read:
    """Read all accounts."""
    at = time.monotonic()
    try:
        answer = server.request("GET", "/accounts")
    except (OSError, http.client.HTTPException) as error:
        return Read(at, "", Decimal(), f"{type(error).__name__}: {error}")
    if answer.status != 200:
        return Read(at, "", Decimal(), f"{answer.status}: {answer.text}")
    body = answer.json
    return Read(at, body["server"], sum_of(body), "")


def sum_of(accounts: dict[str, Any]) -> Decimal:
    """Return the sum of the balances."""
    return sum((Decimal(account["balance"]) for account in accounts["accounts"]), Decimal())


def by_server(reads: Iterable[Read]) -> Counter[str]:
    """Count the reads by the server that answered."""
    return Counter(read.server for read in reads)


def in_words(counts: Counter[str]) -> str:
    """Return counts as text."""
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


class Tour:
    """The steps, in order; each returns its result or raises StepFailed."""

    def __init__(self, cluster: Cluster, server: Gunicorn) -> None:
        self.cluster = cluster
        self.server = server
        self.primary = cluster.primary.name
        self.standbys = {node.name for node in cluster.standbys}
        self.victim: Node = cluster.standbys[-1]
        self.readers_left = self.standbys - {self.victim.name} or {self.primary}
        self.total = read_accounts(server).total
        self._directory = cluster.directory
        self._pids: set[int] = set()
        self._note_processes()

    def steps(self) -> list[tuple[str, Callable[[], str]]]:
        """Return the steps with their names."""
        return [
            ("transfers", self.transfers),
            ("reads", self.reads),
            ("refusals", self.refusals),
            ("repeat", self.repeat),
            ("kill", self.kill),
            ("health", self.health),
            ("back", self.back),
        ]

    def introduce(self, seconds: float) -> str:
        """Print the started programs."""
        [(version,)] = self.cluster.primary.execute("SHOW server_version")
        return (
            f"PostgreSQL {version}: {self.primary} primary, {', '.join(sorted(self.standbys))} standby; "
            f"gunicorn: {self.server.description}; {seconds:.1f} s"
        )

    def transfers(self) -> str:
        """Transfer between all accounts from several clients at once."""
        began = time.monotonic()

        def transfer(number: int) -> Answer:
            source = number % 8 + 1
            target = (number * 3 + number // 8) % 8 + 1
            form = {
                "source": source,
                "target": target if target != source else source % 8 + 1,
                "amount": "1.25",
            }
            return self.server.request("POST", "/transfers", form)

        with ThreadPoolExecutor(CLIENTS) as clients:
            answers = list(clients.map(transfer, range(TRANSFERS)))
        seconds = time.monotonic() - began
        failed = [answer for answer in answers if answer.status != 201]
        expect(not failed, f"{len(failed)} of {TRANSFERS} failed, first: {failed[:1]}")
        servers = {answer.json["server"] for answer in answers}
        expect(servers == {self.primary}, f"not on the primary alone: {servers}")
        acknowledged = {answer.json["id"] for answer in answers}
        with self.cluster.primary.connect(dbname=DATABASE) as connection:
            stored = {number for (number,) in connection.execute("SELECT id FROM transfers")}
            [(total,)] = connection.execute("SELECT sum(balance) FROM accounts").fetchall()
        expect(
            acknowledged == stored and len(stored) == TRANSFERS,
            f"{len(acknowledged)} of {TRANSFERS} have a number of their own, {len(stored)} are in the table",
        )
        expect(total == self.total, f"the sum was {self.total} and is {total}")
        return (
            f"{TRANSFERS} by {CLIENTS} clients in {seconds:.1f} s, all on {self.primary}; "
            f"each is stored once, the sum is {total} as before"
        )

    def reads(self) -> str:
        """Read from all standbys."""
        self.cluster.wait_in_sync()
        with ThreadPoolExecutor(CLIENTS) as clients:
            reads = list(clients.map(lambda _: read_accounts(self.server), range(READS)))
        self._expect_right(reads)
        counts = by_server(reads)
        expect(set(counts) == self.standbys, f"not from all standbys and them alone: {in_words(counts)}")
        return f"{READS} by {CLIENTS} clients: {in_words(counts)}; the sum is {self.total} in each"

    def refusals(self) -> str:
        """Send requests that must be refused."""
        wanted: list[tuple[int, str, dict[str, Any]]] = [
            (409, "too little money", {"source": 1, "target": 2, "amount": "99999"}),
            (404, "unknown account", {"source": 1, "target": 99, "amount": "1"}),
            (400, "negative amount", {"source": 1, "target": 2, "amount": "-1"}),
        ]
        for status, what, form in wanted:
            answer = self.server.request("POST", "/transfers", form)
            expect(answer.status == status, f"{what} was answered {answer.status}: {answer.text}")
        self._expect_sum()
        said = ", ".join(f"{what} {status}" for status, what, _ in wanted)
        return f"{said}; the sum is {self.total} as before"

    def repeat(self) -> str:
        """Send the same transfer twice."""
        form = {"source": 1, "target": 2, "amount": "1"}
        headers = {"Idempotency-Key": "tour"}
        first, second = (self.server.request("POST", "/transfers", form, headers) for _ in range(2))
        expect((first.status, second.status) == (201, 200), f"{first}, {second}")
        expect(first.json["id"] == second.json["id"], f"two transfers: {first.text}, {second.text}")
        expect(first.json["source_balance"] == second.json["source_balance"], f"{first.text}, {second.text}")
        self._expect_sum()
        return "the same request with one Idempotency-Key twice: 201, then 200, and one transfer"

    def kill(self) -> str:
        """Kill a standby while clients read."""
        with Readers(self.server) as readers:
            wait_for(lambda: len(readers.reads) >= 200, 10, lambda: f"only {len(readers.reads)} reads")
            self.victim.kill()
            dead = time.monotonic()
            wait_for(
                lambda: len(readers.since(dead)) >= READS,
                15,
                lambda: f"only {len(readers.since(dead))} reads",
            )
        self._expect_right(readers.reads)
        counts = by_server(readers.since(dead))
        expect(set(counts) == self.readers_left, f"after the kill from {in_words(counts)}")
        return (
            f"SIGKILL to {self.victim.name} during {len(readers.reads)} reads by {CLIENTS} clients: "
            f"0 errors; since then {in_words(counts)}"
        )

    def health(self) -> str:
        """Check that the application notices the killed standby, and goes on."""
        seen: dict[str, Any] = {}

        def known() -> bool:
            answer = self.server.request("GET", "/health")
            expect(answer.status == 200, f"{answer.status}: {answer.text}")
            seen.update(answer.json["pools"]["endpoints"][self.victim.name])
            return bool(seen["state"] in ("down", "probing"))

        wait_for(known, 10, lambda: f"{self.victim.name} not down but {seen}")
        reason = textwrap.shorten(seen["last_error"] or "", 80, placeholder=" ...")
        return f"200, {self.victim.name} is {seen['state']}: {reason}"

    def back(self) -> str:
        """Restart the standby, and check that it gets its share."""
        window = 200

        def share(reads: list[Read]) -> float:
            return by_server(reads)[self.victim.name] / max(1, len(reads))

        fair = 1 / len(self.standbys)
        with Readers(self.server) as readers:
            self.victim.start()
            up = time.monotonic()

            def got_share() -> bool:
                last = readers.reads[-window:]
                return len(last) == window and last[0].at >= up and share(last) >= fair / 2

            seconds = wait_for(
                got_share,
                BACK_WITHIN,
                lambda: f"of the last {window}: {in_words(by_server(readers.reads[-window:]))}",
            )
            last = readers.reads[-window:]
        self._expect_right(readers.reads)
        self._note_processes()
        return (
            f"{self.victim.name} was started and had its share of the reads {seconds:.1f} s later: "
            f"{in_words(by_server(last))}; 0 errors in {len(readers.reads)}"
        )

    def ended(self) -> str:
        """Check that nothing is left; to be called once everything has stopped."""
        left = [
            process.pid
            for process in processes()
            if process.pid in self._pids or any(str(self._directory) in word for word in process.args)
        ]
        expect(not left, f"still running: {left}")
        expect(not os.path.exists(self._directory), f"still there: {self._directory}")
        return "no process and no file is left"

    def _note_processes(self) -> None:
        for root in (self.server.pid, *(node.pid for node in self.cluster.nodes)):
            self._pids.update(tree(root))

    def _expect_right(self, reads: list[Read]) -> None:
        wrong = [read.error for read in reads if read.error]
        expect(not wrong, f"{len(wrong)} of {len(reads)} reads failed, first: {wrong[:1]}")
        sums = {read.total for read in reads} - {self.total}
        expect(not sums, f"the sum was {self.total} and reads say {sums}")

    def _expect_sum(self) -> None:
        with self.cluster.primary.connect(dbname=DATABASE) as connection:
            [(total,)] = connection.execute("SELECT sum(balance) FROM accounts").fetchall()
        expect(total == self.total, f"the sum was {self.total} and is {total}")


def check(options: Options) -> bool:
    """Run the tour and print a line for each step; return whether all passed."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as log:
        name = "start"
        try:
            with started(options, log) as (cluster, server):
                tour = Tour(cluster, server)
                say_step("ok", name, tour.introduce(time.monotonic() - began))
                for name, step in tour.steps():
                    say_step("ok", name, step())
            name = "stop"  # outside the block, which has stopped everything
            say_step("ok", name, tour.ended())
        except (StepFailed, ClusterError, DemoError, OSError, http.client.HTTPException) as error:
            say_step("FAILED", name, f"{error}")
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4000))
            if text := log.read().decode(errors="replace").strip():
                say(f"\nThe end of gunicorn's log:\n{text}")
            return False
    say(f"All steps done in {time.monotonic() - began:.1f} s.")
    return True


def say_step(outcome: str, name: str, text: str) -> None:
    """Print the line of a step."""
    word = f"{outcome:6}"
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        word = f"\033[{32 if outcome == 'ok' else 31}m{word}\033[0m"
    say(f"{word} {name:10} {text}")

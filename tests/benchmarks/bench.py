"""What every part of the benchmarks gets: the server, the peers, how much to do, and who listens."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from pgdbpool.cluster import Cluster, Node

from .crew import Crew, pin_family
from .peers import PEERS, ROWS, TENANT

VERSION = 18
CONNECTIONS = 500
SCHEMA = f"""
CREATE ROLE bench LOGIN;
CREATE UNLOGGED TABLE items (id int PRIMARY KEY, name text NOT NULL, hits int NOT NULL)
    WITH (fillfactor = 50);
INSERT INTO items SELECT i, 'item ' || i, 0 FROM generate_series(1, {ROWS}) i;
CREATE UNLOGGED TABLE tenant_items (
    tenant_id int NOT NULL, id int NOT NULL, name text NOT NULL, hits int NOT NULL,
    PRIMARY KEY (id, tenant_id)
) WITH (fillfactor = 50);
INSERT INTO tenant_items SELECT {TENANT}, i, 'item ' || i, 0 FROM generate_series(1, {ROWS}) i;
ALTER TABLE tenant_items ENABLE ROW LEVEL SECURITY;
CREATE POLICY own_rows ON tenant_items
    USING (tenant_id = NULLIF(current_setting('app.tenant_id', true), '')::int);
GRANT SELECT, UPDATE ON items, tenant_items TO bench;
"""


def server(node: Any, port: int | None = None) -> dict[str, Any]:
    """Return a server as the peers are told of it."""
    return {"host": node.host, "port": port or node.port, "name": "postgres", "user": "bench"}


def create_tables(node: Node, *, logged: bool = False) -> None:
    """Create the role and the tables that the peers use; `logged` where a standby is to have them."""
    with node.connect() as connection:
        connection.execute(SCHEMA.replace("UNLOGGED", "") if logged else SCHEMA)
        connection.execute("VACUUM ANALYZE")


class Progress:
    """Tells on standard error how far a part is: a line that is written over, on a terminal."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._began = self._part_began = time.monotonic()
        self._part, self._steps, self._done = "", 1, 0

    def part(self, name: str) -> None:
        """Begin a part."""
        self._part, self._steps, self._done = name, 1, 0
        self._part_began = time.monotonic()
        self._write("begins", end=not self._terminal)

    def steps(self, number: int) -> None:
        """Say how many more steps there are."""
        self._steps, self._done = max(1, number), 0

    def step(self, text: str) -> None:
        """Note that a step begins."""
        self._done += 1
        if self._terminal:
            share = min(1.0, (self._done - 1) / self._steps)
            bar = "#" * round(20 * share)
            self._write(f"[{bar:20}] {share:4.0%}  {text}")

    def end(self) -> None:
        """Note that the part has ended."""
        self._write(f"done in {time.monotonic() - self._part_began:.0f} s", end=True)

    def note(self, text: str) -> None:
        """Say something that is to stay on the screen."""
        self._write(text, end=True)

    def _write(self, text: str, end: bool = False) -> None:
        seconds = int(time.monotonic() - self._began)
        line = f"{seconds // 60}:{seconds % 60:02} {self._part:13} {text}"
        sys.stderr.write((f"\r\033[K{line[:110]}" if self._terminal else line) + ("\n" if end else ""))
        sys.stderr.flush()


class Bench:
    """One run of the benchmarks; a context manager that ends all that it started."""

    def __init__(self, *, quick: bool, peers: Iterable[str] = PEERS) -> None:
        self.quick = quick
        self.progress = Progress()
        self._peers = tuple(peers)
        self._stack = ExitStack()
        self._cluster: Cluster | None = None
        self._rotation = 0
        cores = sorted(os.sched_getaffinity(0))
        self.places = {"one core": (cores[:1], cores[:1])}
        """Where client and server run: the cores of each."""
        if len(cores) > 1:
            self.places["two cores"] = (cores[:1], cores[1:2])
        self.cores = cores

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()

    @property
    def cluster(self) -> Cluster:
        """A server without standbys, started by the first part that needs it."""
        if self._cluster is None:
            settings = {
                "max_connections": CONNECTIONS,
                "shared_buffers": "64MB",
                "autovacuum": "off",
            }
            self._cluster = self._stack.enter_context(Cluster(0, VERSION, settings=settings))
            create_tables(self._cluster.primary)
        return self._cluster

    @property
    def server(self) -> dict[str, Any]:
        """That server, as the peers are told of it."""
        return server(self.cluster.primary)

    def names(self, but: Iterable[str] = ()) -> list[str]:
        """Return the peers of this run but those."""
        return [name for name in self._peers if name not in set(but)]

    def crew(self, but: Iterable[str] = ()) -> Crew:
        """Make processes for the peers of this run but those."""
        return Crew(self.names(but))

    def pin_server(self, cores: Iterable[int] | None = None) -> None:
        """Let the server, and what it starts from now on, run on these cores only; on all without any."""
        pin_family(self.cluster.primary.pid, self.cores if cores is None else cores)

    def rounds(self, quick: int, full: int) -> range:
        """Return the rounds of a measurement."""
        return range(quick if self.quick else full)


Part = Callable[[Bench], dict[str, Any]]

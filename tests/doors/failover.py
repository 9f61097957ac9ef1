"""Each way under gunicorn, driven by HTTP while servers fail."""

from __future__ import annotations

import http.client
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg

from pgdbpool.cluster import Cluster, Node
from tests.benchmarks.bench import create_tables, server
from tests.benchmarks.web import serving

from .ways import INTERRUPTED, WAYS, environment

CLIENTS = 6
EVERY = 0.01
"""Clients, and seconds that each waits between two requests."""


def kill_a_standby(cluster: Cluster) -> None:
    """Kill a standby, which stays away."""
    cluster.standbys[0].kill()


def restart_all_standbys(cluster: Cluster) -> None:
    """Restart all standbys at once."""
    standbys = cluster.standbys
    for node in standbys:
        node.stop()
    for node in standbys:
        node.start()


def restart_the_primary(cluster: Cluster) -> None:
    """Restart the primary."""
    cluster.primary.restart()


def promote_a_standby(cluster: Cluster) -> None:
    """Kill the primary and promote a standby."""
    standby = cluster.standbys[0]
    cluster.primary.kill()
    standby.promote()


EVENTS: dict[str, Callable[[Cluster], None]] = {
    "a standby killed": kill_a_standby,
    "all standbys restarted": restart_all_standbys,
    "the primary restarted": restart_the_primary,
    "primary killed, standby promoted": promote_a_standby,
}


class Site:
    """A way under gunicorn, at a port."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, path: str) -> tuple[int, float]:
        """Send a request; return its status, 0 for none, and the seconds that it took."""
        begun = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("GET", path)
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException):
            status = 0
        finally:
            connection.close()
        return status, time.monotonic() - begun


@contextmanager
def running(way: str, servers: list[dict[str, Any]], log: Any) -> Iterator[Site]:
    """Serve a way; return its site once all of its workers are likely to have answered."""
    application, directory = f"tests.doors.{WAYS[way].site}:application", Path(__file__).parents[2]
    variables = environment(way, servers)
    with serving(application, variables, threads=3, directory=directory, log=log) as port:
        site = Site(port)
        deadline = time.monotonic() + 30
        for path in ("/read", "/write") * 4:
            while site.ask(path)[0] != 200:
                if time.monotonic() > deadline:
                    raise RuntimeError("the site does not answer")
                time.sleep(0.05)
        yield site


def under(site: Site, event: Callable[[], None], before: float, after: float) -> list[tuple[int, float]]:
    """Return what each request was answered, from before an event to some seconds after it."""
    answers: list[tuple[int, float]] = []
    end = threading.Event()

    def client(number: int) -> None:
        while not end.is_set():
            answers.append(site.ask("/write" if number % 2 else "/read"))
            time.sleep(EVERY)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for each in clients:
        each.start()
    try:
        time.sleep(before)
        event()
        time.sleep(after)
    finally:
        end.set()
        for each in clients:
            each.join()
    return answers


def away(event: Callable[[Cluster], None]) -> float:
    """Return the longest time, in seconds, in which no server took writes: no pool can be faster."""
    with Cluster(2, settings={"max_connections": 60}) as cluster:
        cluster.wait_in_sync()
        nodes, end, longest = cluster.nodes, threading.Event(), [0.0]

        def dial() -> None:
            last = time.monotonic()
            while not end.wait(0.005):
                if any(_takes_writes(node) for node in nodes):
                    longest[0] = max(longest[0], time.monotonic() - last)
                    last = time.monotonic()

        thread = threading.Thread(target=dial)
        thread.start()
        try:
            time.sleep(0.5)
            event(cluster)
            time.sleep(2.0)
        finally:
            end.set()
            thread.join()
        return longest[0]


def _takes_writes(node: Node) -> bool:
    with suppress(psycopg.Error), node.connect() as admin:
        return bool(admin.execute("SELECT NOT pg_is_in_recovery()").fetchone()[0])  # type: ignore[index]
    return False


def measure(
    ways: tuple[str, ...] = INTERRUPTED, after: float = 4.0
) -> dict[str, dict[str, dict[str, float]]]:
    """Return requests, errors and the slowest request, by event and way."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for title, event in EVENTS.items():
        for way in ways:
            # A cluster for each, since some of the events leave another one behind.
            with Cluster(2, settings={"max_connections": 60}) as cluster:
                create_tables(cluster.primary, logged=True)
                cluster.wait_in_sync()
                with running(way, [server(node) for node in cluster.nodes], subprocess.DEVNULL) as site:
                    answers = under(site, lambda: event(cluster), 1.0, after)  # noqa: B023
            found.setdefault(title, {})[way] = {
                "requests": len(answers),
                "errors": sum(status != 200 for status, _ in answers),
                "slowest": max(seconds for _, seconds in answers),
            }
            print(f"{title}, {WAYS[way].label}: {found[title][way]}", file=sys.stderr, flush=True)
    return found

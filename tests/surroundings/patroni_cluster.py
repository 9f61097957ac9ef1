"""Three real members of a Patroni cluster on free ports of the loopback, with raft and no other service.

Patroni is the one of the virtual environment in PGDBPOOL_TEST_PATRONI, or of this Python. For root all of it
runs as an unprivileged user, who may have to take the system's Python of the same version.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psycopg
import pytest
import yaml
from support import wait_for

from pgdbpool.cluster._installation import Installation, find_installation

VARIABLE = "PGDBPOOL_TEST_PATRONI"
TTL = 20
"""Seconds after which a leader that says nothing loses its place: the least that Patroni takes."""


def free_ports(number: int) -> list[int]:
    """Return ports that nobody has now."""
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in taken]
    for each in taken:
        each.close()
    return ports


def packages() -> Path:
    """Return the directory that has Patroni; skip the test without one."""
    prefix = Path(os.environ.get(VARIABLE, sys.prefix))
    found = next(prefix.glob(f"lib/python3.{sys.version_info.minor}/site-packages/patroni"), None)
    if found is None or not (found.parent / "pysyncobj").exists():
        pytest.skip(
            f"no Patroni in {prefix}: pip install 'patroni[raft]' there, or name another in {VARIABLE}"
        )
    return found.parent


class Member:
    """One server and its Patroni."""

    def __init__(self, cluster: Patroni, name: str, ports: tuple[int, int, int]) -> None:
        self.name, self.host = name, "127.0.0.1"
        self.port, self.rest_port, self.raft_port = ports
        self.url = f"http://127.0.0.1:{self.rest_port}"
        self._cluster = cluster
        self._process: subprocess.Popen[bytes] | None = None
        self.log = cluster.place / f"{name}.log"

    def write_settings(self, partners: list[Member], dcs: dict[str, Any]) -> None:
        place = self._cluster.place / self.name
        place.mkdir()
        rest = f"127.0.0.1:{self.rest_port}"
        settings = {
            "scope": "shop",
            "name": self.name,
            "restapi": {"listen": rest, "connect_address": rest},
            "raft": {
                "data_dir": str(place / "raft"),
                "self_addr": f"127.0.0.1:{self.raft_port}",
                "partner_addrs": [f"127.0.0.1:{partner.raft_port}" for partner in partners],
            },
            "bootstrap": {
                "dcs": dcs,
                "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, "data-checksums"],
            },
            "postgresql": {
                "listen": f"127.0.0.1:{self.port}",
                "connect_address": f"127.0.0.1:{self.port}",
                "data_dir": str(place / "data"),
                "bin_dir": str(self._cluster.installation.bin_dir),
                "pgpass": str(place / "pgpass"),
                "pg_hba": ["host all all 127.0.0.1/32 trust", "host replication all 127.0.0.1/32 trust"],
                "authentication": {
                    "superuser": {"username": "postgres", "password": "postgres"},
                    "replication": {"username": "replicator", "password": "replicator"},
                },
                "parameters": {
                    "unix_socket_directories": "", "fsync": "off", "max_connections": 60,
                    "shared_buffers": "16MB", "hot_standby": "on", "wal_keep_size": "64MB",
                },
            },
        }  # fmt: skip
        (place / "patroni.yml").write_text(yaml.safe_dump(settings))

    def start(self) -> None:
        settings = self._cluster.place / self.name / "patroni.yml"
        with self.log.open("ab") as output:
            self._process = self._cluster.popen("patroni", str(settings), output=output)

    def pids(self) -> list[int]:
        """Return Patroni's process and the server's first one."""
        assert self._process is not None
        pid = self._cluster.place / self.name / "data" / "postmaster.pid"
        try:
            return [self._process.pid, int(pid.read_text().split("\n")[0])]
        except FileNotFoundError:
            return [self._process.pid]

    def signal(self, number: int) -> None:
        """Send all processes of the member a signal: what happens to its host."""
        for pid in self.pids():
            for each in (pid, *_children(pid)):
                try:
                    os.kill(each, number)
                except ProcessLookupError:
                    continue

    def stop(self) -> None:
        """Kill Patroni and its server."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait(20)
            self._process = None

    def ask(self, path: str = "/patroni") -> dict[str, Any]:
        """Return what Patroni's REST API says; empty if it does not answer."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=2) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            return json.loads(error.read() or b"{}")  # type: ignore[no-any-return]
        except (OSError, ValueError):
            return {}

    def tell(self, path: str, body: dict[str, Any], method: str = "POST") -> str:
        """Send a command to Patroni's REST API."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.read().decode()  # type: ignore[no-any-return]
        except urllib.error.HTTPError as error:
            return f"{error.code} {error.read().decode()}"

    def connect(self) -> psycopg.Connection[Any]:
        """Return a connection without anything of the pools."""
        return psycopg.connect(
            host=self.host, port=self.port, user="postgres", dbname="postgres", autocommit=True,
            connect_timeout=2,
        )  # fmt: skip


class Patroni:
    """A context manager: a leader and two replicas."""

    def __init__(self, **dcs: Any) -> None:
        self._packages = packages()
        self.installation: Installation = find_installation(None, os.environ.get("PGDBPOOL_TEST_PG_BIN"))
        self.place = Path(tempfile.mkdtemp(prefix="patroni-", dir="/tmp"))
        ports = free_ports(9)
        self.members = [
            Member(self, f"pg{number + 1}", (ports[3 * number], ports[3 * number + 1], ports[3 * number + 2]))
            for number in range(3)
        ]
        settings = {"ttl": TTL, "loop_wait": 1, "retry_timeout": 3, "maximum_lag_on_failover": 1 << 30, **dcs}
        for member in self.members:
            member.write_settings([other for other in self.members if other is not member], settings)
        if account := self.installation.account:
            for path in (self.place, *self.place.rglob("*")):
                os.chown(path, account.pw_uid, account.pw_gid)

    def popen(self, module: str, *arguments: str, output: Any) -> subprocess.Popen[bytes]:
        options: dict[str, Any] = {}
        python = sys.executable
        if account := self.installation.account:
            options = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
            python = f"/usr/bin/python3.{sys.version_info.minor}"
            if not os.path.exists(python):
                pytest.skip(f"{python} is not installed, and {sys.executable} is root's alone")
        return subprocess.Popen(
            [python, "-m", module, *arguments],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=self.place, start_new_session=True,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(self._packages), "LC_ALL": "C",
                 "HOME": str(self.place)},
            **options,
        )  # fmt: skip

    def __enter__(self) -> Patroni:
        try:
            for member in self.members:
                member.start()
            wait_for(self.settled, 90, "a leader and two replicas")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for member in self.members:
            member.stop()
        shutil.rmtree(self.place, ignore_errors=True)

    def settled(self) -> bool:
        """Whether there is a leader, and two replicas stream from it."""
        told = [member.ask() for member in self.members]
        roles = sorted(each.get("role", "") for each in told)
        states = {each.get("replication_state") for each in told if each.get("role") == "replica"}
        return roles in (["primary", "replica", "replica"], ["master", "replica", "replica"]) and states == {
            "streaming"
        }

    @property
    def leader(self) -> Member:
        """The member that says that it is the leader."""
        return next(m for m in self.members if m.ask().get("role") in ("primary", "master"))

    def switchover(self) -> None:
        """Move the leader to the member that Patroni chooses, and wait for its answer."""
        old = self.leader
        answer = old.tell("/switchover", {"leader": old.name})
        assert answer.startswith("Successfully"), answer


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


class FirstWrite:
    """A thread that finds out when a fresh connection can write to another member than the old leader."""

    def __init__(self, cluster: Patroni, old: Member) -> None:
        self.at = 0.0
        self.leader: Member | None = None
        self._members = [member for member in cluster.members if member is not old]
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        for member in itertools.cycle(self._members):
            try:
                with member.connect() as conn:
                    conn.execute("SET statement_timeout = '2s'")
                    conn.execute("INSERT INTO first VALUES (1)")
            except psycopg.Error:
                sleep(0.01)
                continue
            self.at, self.leader = monotonic(), member
            return

    def wait(self, timeout: float) -> Member:
        """Wait for it, and return the new leader."""
        self._thread.join(timeout)
        assert self.leader is not None, f"no new leader within {timeout} s"
        return self.leader


@contextmanager
def cluster(**dcs: Any) -> Iterator[Patroni]:
    with Patroni(**dcs) as started:
        with started.leader.connect() as conn:
            conn.execute("CREATE TABLE done (n int)")
            conn.execute("CREATE TABLE first (n int)")
        tables = "SELECT count(*) FROM pg_class WHERE relname IN ('done', 'first')"

        def known(member: Member) -> bool:
            with member.connect() as conn:
                (found,) = conn.execute(tables).fetchone() or (0,)
            return bool(found == 2)

        wait_for(lambda: all(map(known, started.members)), 20, "the tables are on all members")
        yield started

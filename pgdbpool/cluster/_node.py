"""One server of an embedded cluster."""

from __future__ import annotations

import itertools
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.rows import TupleRow

from pgdbpool.cluster import _watchdog as watchdog
from pgdbpool.cluster._installation import ClusterError, Home

HOST = "127.0.0.1"
SUPERUSER = "postgres"
StopMode = Literal["smart", "fast", "immediate"]
STOP_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}


class PortTakenError(ClusterError):
    """Another program bound the port between our choice and the server's start."""


class Node:
    """A server, its data and its place in the replication; made by the cluster."""

    host = HOST
    user = SUPERUSER
    dbname = "postgres"
    _promotions = itertools.count(1)

    def __init__(self, home: Home, name: str, upstream: Node | None) -> None:
        self.name = name
        self.data = home.directory / name
        self.log: Path = home.directory / f"{name}.log"
        self.promotion = 0
        self._home = home
        self._upstream = upstream
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False
        # To clients, a bound port without a listener is as closed as any other. But no other program gets it
        # while the server is down, and no client connects to itself. Only Linux lets the server bind it then.
        self._reservation = socket.socket()
        self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reservation.bind((HOST, 0))
        self.port: int = self._reservation.getsockname()[1]
        if sys.platform != "linux":
            self._reservation.close()

    def __repr__(self) -> str:
        state = "paused" if self.paused else "running" if self.running else "stopped"
        return f"<Node {self.name} {self.label} {self.role} {state}>"

    @property
    def label(self) -> str:
        """The address as `host:port`."""
        return f"{self.host}:{self.port}"

    @property
    def role(self) -> Literal["primary", "standby"]:
        """The role that the node was given last, by start, promote or rejoin."""
        return "primary" if self._upstream is None else "standby"

    @property
    def upstream(self) -> Node | None:
        """The node that this standby streams from; None for a primary."""
        return self._upstream

    @property
    def running(self) -> bool:
        """Whether the server's process exists, even if it is paused."""
        return self._process is not None and self._process.poll() is None

    @property
    def paused(self) -> bool:
        """Whether the server is stopped by `pause`."""
        return self._paused and self.running

    @property
    def pid(self) -> int:
        """The process id of the server's postmaster; raises ClusterError if the server does not run."""
        if self._process is None or not self.running:
            raise ClusterError(f"{self.name} does not run: start it first")
        return self._process.pid

    # Clients

    def conninfo(self, **override: Any) -> str:
        """Return a connection string for the superuser, with the password if the cluster asks for one."""
        parts: dict[str, Any] = {"host": HOST, "port": self.port, "user": self.user, "dbname": self.dbname}
        if self._home.password is not None:
            parts["password"] = self._home.password
        return make_conninfo("", **parts | override)

    def connect(self, **kwargs: Any) -> psycopg.Connection[TupleRow]:
        """Return an autocommit connection, which the caller closes; raises psycopg.OperationalError."""
        return psycopg.connect(self.conninfo(), **{"autocommit": True, "connect_timeout": 5} | kwargs)

    def execute(self, sql: str, params: Sequence[Any] | Mapping[str, Any] | None = None) -> list[TupleRow]:
        """Run one statement on a separate connection, for a minute at most, and return its rows, if any."""
        with self.connect(options="-c statement_timeout=60s") as connection:
            cursor = connection.execute(sql.encode(), params)
            return cursor.fetchall() if cursor.description else []

    # The server's life

    def launch(self) -> None:
        """Start the server without waiting for it; raises ClusterError if it runs."""
        if self.running:
            raise ClusterError(f"{self.name} runs already")
        self._write_settings()
        self._process = self._home.start("postgres", "-D", self.data, log=self.log)
        self._paused = False

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Wait until the server accepts connections; raises ClusterError, with the end of its log."""
        deadline = time.monotonic() + timeout
        cause = "it has not finished its recovery"
        while time.monotonic() < deadline:
            if not self.running:
                log = self.log_tail()
                kind = PortTakenError if "could not bind" in log else ClusterError
                raise kind(f"{self.name} does not run, its log ends:\n{log}")
            if self._reports_ready():
                try:
                    with self.connect(connect_timeout=max(2, int(deadline - time.monotonic()))):
                        return
                except psycopg.OperationalError as error:
                    cause = str(error)
            time.sleep(0.005)
        log = self.log_tail()
        raise ClusterError(f"{self.name} not ready in {timeout:g} s: {cause}; its log ends:\n{log}")

    def start(self, timeout: float = 30.0) -> None:
        """Start the server and wait until it accepts connections; raises ClusterError."""
        self.launch()
        self.wait_ready(timeout)

    def stop(self, mode: StopMode = "fast", timeout: float = 30.0) -> None:
        """Shut the server down and wait for its end; raises ClusterError if that does not come in time."""
        if self._process is None or not self.running:
            return
        self.resume()
        self._process.send_signal(STOP_SIGNALS[mode])
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ClusterError(f"{self.name} not down in {timeout:g} s: try mode='immediate'") from None

    def restart(self, mode: StopMode = "fast", timeout: float = 30.0) -> None:
        """Stop the server, if it runs, and start it; raises ClusterError."""
        self.stop(mode, timeout)
        self.start(timeout)

    def kill(self) -> None:
        """SIGKILL all processes of the server at once and wait for their end."""
        if self._process is not None and self.running:
            watchdog.kill_tree(self._process.pid)
            self._process.wait(10)

    def pause(self) -> None:
        """SIGSTOP all processes of the server: it holds connections, takes new ones, and never answers."""
        watchdog.freeze(self.pid)
        self._paused = True

    def resume(self) -> None:
        """Resume a paused server."""
        if self.paused:
            watchdog.send(signal.SIGCONT, watchdog.tree(self.pid))
        self._paused = False

    def log_tail(self, lines: int = 10) -> str:
        """Return the last lines of the server's log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    # Replication

    def promote(self, timeout: float = 30.0) -> None:
        """Make this standby a primary, the cluster's from now on, and wait until it accepts writes.

        The old primary is left as it is and the other standbys go on following it, until `Cluster.follow`.
        Raises ClusterError if this is a primary already or does not become one in time.
        """
        if self._upstream is None:
            raise ClusterError(f"{self.name} is a primary already")
        if not self.execute("SELECT pg_promote(true, %s)", (max(1, int(timeout)),))[0][0]:
            raise ClusterError(f"{self.name} not promoted in {timeout:g} s, its log ends:\n{self.log_tail()}")
        self._upstream = None
        self.promotion = next(self._promotions)

    def follow(self, upstream: Node) -> None:
        """Make this standby stream from `upstream`, now or when it is started; raises ClusterError."""
        if self._upstream is None or upstream is self:
            raise ClusterError(f"{self.name} cannot follow {upstream.name}: a primary has to rejoin()")
        self._upstream = upstream
        self._write_settings()
        if self.running:
            watchdog.send(signal.SIGHUP, [self.pid])

    def rejoin(self, primary: Node, timeout: float = 30.0) -> None:
        """Make this node, in any role, a running standby of `primary`; raises ClusterError.

        Its writes that `primary` does not know are lost: by pg_rewind, or by a base backup if that fails.
        """
        if primary is self:
            raise ClusterError(f"{self.name} cannot become a standby of itself")
        self.stop(timeout=timeout)
        source = f"{primary.replication_conninfo(self.name)} dbname={self.dbname}"
        try:
            primary.execute("CHECKPOINT")  # pg_rewind reads the timeline from the last checkpoint
            self._home.run("pg_rewind", "-D", self.data, f"--source-server={source}", "--no-sync")
        except ClusterError as error:
            with self.log.open("a") as log:
                log.write(f"taking a base backup of {primary.name}: {error}\n")
            self._home.make_data(self.data)
            self._home.run("pg_basebackup", "-D", self.data, "-d", source, "-c", "fast", "--no-sync")
        self._upstream = primary
        self.start(timeout)

    def position(self) -> tuple[str, int]:
        """Return how far this primary has written, and on which timeline."""
        lsn, file = self.execute("SELECT lsn::text, pg_walfile_name(lsn) FROM pg_current_wal_lsn() lsn")[0]
        return lsn, int(file[:8], 16)

    def wait_replayed(self, lsn: str, timeline: int, timeout: float = 30.0) -> None:
        """Wait until this standby streams `timeline` from its upstream and has replayed `lsn`.

        Raises ClusterError if it does not get there in time. It never will if it has replayed records that
        its upstream never had, as after the promotion of a standby that was behind: let it rejoin.
        """
        deadline = time.monotonic() + timeout
        self.wait_ready(timeout)
        query = b"""
            SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn, pg_last_wal_replay_lsn(),
                   (SELECT format('%%s timeline %%s from port %%s', status, received_tli, sender_port)
                    FROM pg_stat_wal_receiver)"""
        upstream = self._upstream or self
        streaming = f"streaming timeline {timeline} from port {upstream.port}"
        with self.connect() as connection:
            while True:
                [(replayed, position, state)] = connection.execute(query, (lsn,)).fetchall()
                if replayed and state == streaming:
                    return
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"{self.name} is at {position}, {state}, and not at {lsn}, {streaming}, after "
                        f"{timeout:g} s; if it is ahead of the primary, rejoin() it; its log ends:\n"
                        f"{self.log_tail()}"
                    )
                time.sleep(0.005)

    def replication_conninfo(self, name: str) -> str:
        """Return the connection string, free of a password, by which the standby `name` streams from here."""
        parts: dict[str, Any] = {"host": HOST, "port": self.port, "user": self.user, "application_name": name}
        if self._home.password is not None:
            parts["passfile"] = self._home.passfile
        return make_conninfo("", **parts)

    # For the cluster

    def initialize(self, auth: str) -> None:
        """Make the data of a new primary; raises ClusterError."""
        options = [f"--username={SUPERUSER}", f"--auth={auth}", "--encoding=UTF8", "--no-locale", "--no-sync"]
        if self._home.password is not None:
            secret = self._home.directory / "password"
            self._home.write(secret, self._home.password + "\n")
            options.append(f"--pwfile={secret}")
        self._home.make_data(self.data)
        self._home.run("initdb", "-D", self.data, *options)
        rules = "".join(f"host {database} all {HOST}/32 {auth}\n" for database in ("all", "replication"))
        self._home.write(self.data / "pg_hba.conf", rules)

    def copy_data(self, source: Node) -> None:
        """Take over the data of a node that was shut down: a base backup in a tenth of the time."""
        self._home.make_data(self.data)
        self._home.run(shutil.which("cp") or "cp", "-R", f"{source.data}/.", self.data)

    def release(self) -> None:
        """Reap the server, which has ended, and give up its port."""
        self._reservation.close()
        if self._process is not None:
            self._process.wait(10)

    def _reports_ready(self) -> bool:
        try:
            status = (self.data / "postmaster.pid").read_text().split("\n")
        except FileNotFoundError:
            return False
        # The pid, since the file of a server that was killed stays behind.
        return len(status) > 7 and status[0] == str(self.pid) and status[7].strip() == "ready"

    def _write_settings(self) -> None:
        settings = {**self._home.settings, "port": self.port, "cluster_name": self.name}
        standby_signal = self.data / "standby.signal"
        if self._upstream is None:
            standby_signal.unlink(missing_ok=True)
        else:
            settings["primary_conninfo"] = self._upstream.replication_conninfo(self.name)
            self._home.write(standby_signal, "")
        self._home.write(self.data / "postgresql.conf", "".join(map(_setting_line, settings.items())))


def _setting_line(setting: tuple[str, object]) -> str:
    name, value = setting
    text = ("on" if value else "off") if isinstance(value, bool) else str(value)
    return f"{name} = '" + text.replace("\\", "\\\\").replace("'", "''") + "'\n"

"""An embedded PostgreSQL cluster for tests and demos: a primary and standbys on free loopback ports.

It belongs to the process that started it and ends with it, even if that is killed. It is made to be thrown
away (`fsync=off`). With the default `auth="trust"`, every user of this machine may connect as superuser, and
a superuser may run programs as the user that the servers run as: use `scram-sha-256` if that matters.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from pgdbpool.cluster import _watchdog as watchdog
from pgdbpool.cluster._installation import ClusterError, Home, find_installation, give, make_directory
from pgdbpool.cluster._node import HOST, SUPERUSER, Node, PortTakenError

__all__ = ["Cluster", "ClusterError", "Node", "config_yaml", "main"]

SETTINGS: dict[str, object] = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "dynamic_shared_memory_type": "mmap",  # in the data directory: a kill -9 leaves nothing in /dev/shm
    "max_connections": 100,
    "shared_buffers": "16MB",
    "fsync": False,
    "wal_level": "replica",
    "wal_log_hints": True,  # for pg_rewind
    "wal_keep_size": "512MB",  # instead of slots, which a promoted standby does not have
    "wal_retrieve_retry_interval": "100ms",
    "wal_sender_timeout": "10s",  # bounds how long a paused standby delays its primary's shutdown
    "wal_receiver_timeout": "10s",
    "hot_standby": True,
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] ",
}


class Cluster:
    """A primary and `standbys` streaming standbys; a context manager, or `start()` and `stop()`.

    The programs are those in `bin_dir`, else of `version` (`pgdbpool[demo]` brings 16 and 18), else those in
    the directory that the variable PGDBPOOL_TEST_PG_BIN names, else of version 18. `settings` go into each
    server's postgresql.conf. With `synchronous`, a commit waits until one standby has applied it. `auth` is
    `trust` or `scram-sha-256`, with `password` or one made up. `tls` gives the servers a certificate, see
    `tls_certificate`. Raises ClusterError.
    """

    def __init__(
        self,
        standbys: int = 2,
        version: int | None = None,
        *,
        bin_dir: str | os.PathLike[str] | None = None,
        synchronous: bool = False,
        settings: Mapping[str, object] | None = None,
        auth: str = "trust",
        password: str | None = None,
        tls: bool = False,
    ) -> None:
        if auth not in ("trust", "scram-sha-256"):
            raise ClusterError(f"auth={auth!r} is not known: use 'trust' or 'scram-sha-256'")
        if synchronous and standbys < 1:
            raise ClusterError("synchronous=True needs a standby: no commit would ever end")
        self.nodes: list[Node] = []
        self.password = None if auth == "trust" else password or secrets.token_urlsafe(16)
        self._names = [f"node{number}" for number in range(1, standbys + 2)]
        self._programs = (version, bin_dir)
        self._auth = auth
        self._tls = tls
        self._settings = dict(SETTINGS)
        if synchronous:
            self._settings["synchronous_standby_names"] = f"ANY 1 ({', '.join(self._names)})"
            self._settings["synchronous_commit"] = "remote_apply"
        self._settings |= settings or {}
        self._owner: int | None = None  # the process that started the cluster and must end it
        self._directory: Path | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<Cluster {self.nodes}>"

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def primary(self) -> Node:
        """The primary, of several the one promoted last; raises ClusterError if there is none."""
        primaries = [node for node in self.nodes if node.role == "primary"]
        if not primaries:
            raise ClusterError(f"no node is a primary: {self.nodes}")
        return max(primaries, key=lambda node: node.promotion)

    @property
    def standbys(self) -> list[Node]:
        """The nodes that are standbys, running or not."""
        return [node for node in self.nodes if node.role == "standby"]

    @property
    def directory(self) -> Path:
        """The private directory that holds everything; raises ClusterError before the start."""
        if self._directory is None:
            raise ClusterError("the cluster is not started")
        return self._directory

    @property
    def tls_certificate(self) -> Path:
        """The servers' certificate, which is its own root: for a client's `sslrootcert`."""
        return self.directory / "server.crt"

    def start(self) -> None:
        """Start all nodes and wait until they answer and stream; raises ClusterError, and leaves nothing."""
        if self._owner is not None:
            raise ClusterError("the cluster is started already")
        for attempts_left in (2, 1, 0):
            try:
                self._start()
                return
            except BaseException as error:
                self.stop()
                if not isinstance(error, PortTakenError) or not attempts_left:
                    raise

    def stop(self) -> None:
        """End all servers and remove their data; does nothing in a forked child, or if nothing runs.

        Raises ClusterError if the data cannot be removed.
        """
        if self._owner != os.getpid() or self._directory is None:
            return
        watchdog.remove_cluster(str(self._directory), self._uid)
        for node in self.nodes:
            node.release()
        if self._watchdog is not None:  # ended last: if we are killed before that, it completes the removal
            self._watchdog.kill()
            self._watchdog.wait(10)
        self._owner = None
        if self._directory.exists():
            raise ClusterError(f"cannot remove {self._directory}: remove it by hand")

    def follow(self, primary: Node) -> None:
        """Make every other standby stream from `primary`, now or when it is started."""
        for node in self.standbys:
            if node is not primary:
                node.follow(primary)

    def wait_in_sync(self, timeout: float = 30.0) -> None:
        """Wait until each running standby streams and has replayed everything the primary has written so far.

        Paused standbys are left out. Raises ClusterError, or psycopg.OperationalError if the primary is down.
        """
        position = self.primary.position()
        for node in self.standbys:
            if node.running and not node.paused:
                node.wait_replayed(*position, timeout)

    def _start(self) -> None:
        installation = find_installation(*self._programs)
        directory = self._directory = make_directory(installation)
        self._uid = installation.uid
        self._owner = os.getpid()
        arguments = [watchdog.__file__, str(directory), str(self._uid), str(self._owner)]
        python = sys.executable or shutil.which("python3") or "python3"  # an embedded interpreter has no name
        self._watchdog = subprocess.Popen(
            [python, "-I", "-S", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        home = Home(installation, directory, self._settings, self.password)
        if self.password is not None:
            escaped = self.password.replace("\\", "\\\\").replace(":", "\\:")
            home.write(home.passfile, f"{HOST}:*:*:{SUPERUSER}:{escaped}\n")
        if self._tls:
            self._make_certificate(home)
        primary = Node(home, self._names[0], None)
        self.nodes = [primary, *(Node(home, name, primary) for name in self._names[1:])]
        primary.initialize(self._auth)
        primary.start()  # its data then say which max_connections a standby needs
        primary.stop()
        for node in self.standbys:
            node.copy_data(primary)
        for node in self.nodes:
            node.launch()
        for node in self.nodes:
            node.wait_ready()
        self.wait_in_sync()

    def _make_certificate(self, home: Home) -> None:
        key = home.directory / "server.key"
        command = "openssl req -x509 -nodes -days 2 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1"
        names = ["-subj", "/CN=localhost", "-addext", f"subjectAltName=DNS:localhost,IP:{HOST}"]
        files = ["-keyout", str(key), "-out", str(self.tls_certificate)]
        try:
            subprocess.run([*command.split(), *names, *files], check=True, capture_output=True, timeout=60)
        except FileNotFoundError:
            raise ClusterError("tls=True needs the program openssl: install it") from None
        for path in (key, self.tls_certificate):
            path.chmod(0o600)
            give(path, home.installation.account)
        self._settings |= {"ssl": True, "ssl_cert_file": self.tls_certificate, "ssl_key_file": key}


def config_yaml(cluster: Cluster) -> str:
    """Return a pgdbpool configuration in YAML for a cluster, with a group for reads and one for writes."""
    lines = ["db:"]
    for node in cluster.nodes:
        lines += [f"  - host: {node.host}", f"    port: {node.port}", f"    name: {node.dbname}"]
        lines += [f"    user: {node.user}"]
        if cluster.password is not None:
            lines.append("    pass: '" + cluster.password.replace("'", "''") + "'")
    lines += ["groups:", "  read:", "    connection_count: 10", "    target: prefer-standby"]
    lines += ["  write:", "    connection_count: 5", "    autocommit: false", "    target: primary"]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a cluster, print how to reach it, and stop it on Ctrl-C or SIGTERM; return the exit status."""
    parser = argparse.ArgumentParser("python -m pgdbpool.cluster", description="Run a PostgreSQL cluster.")
    parser.add_argument("--standbys", type=int, default=2, help="how many (2)")
    parser.add_argument("--version", type=int, help="PostgreSQL's major version (18)")
    parser.add_argument("--auth", choices=("trust", "scram-sha-256"), default="trust")
    options = parser.parse_args(argv)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        with Cluster(options.standbys, options.version, auth=options.auth) as cluster:
            for node in cluster.nodes:
                sys.stdout.write(f"# {node.role} {node.label}: psql '{node.conninfo()}'\n")
            sys.stdout.write(f"{config_yaml(cluster)}# Ctrl-C stops the cluster and removes its data.\n")
            sys.stdout.flush()
            while True:
                signal.pause()
    except KeyboardInterrupt:
        return 0
    except ClusterError as error:
        sys.stderr.write(f"pgdbpool.cluster: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""A real PgBouncer in transaction mode in front of a server, where the program is installed."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import psycopg
from support import wait_for

from pgdbpool.cluster import Node

HOST = "127.0.0.1"
PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

SETTINGS = """
[databases]
* = host={node.host} port={node.port}

[pgbouncer]
listen_addr = {host}
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {directory}/users
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 200
server_login_retry = 0.1
logfile = {directory}/log
"""


class PgBouncer:
    """A context manager; each pair of user and database has at most `pool_size` sessions at the server.

    For root it runs as an unprivileged user. Nothing else is set than what it needs: in particular it does
    not take `options` at start-up, and does not reset a session between two clients.

    :param settings: further settings of its section `pgbouncer`.
    """

    def __init__(self, node: Node, users: tuple[str, ...], pool_size: int, **settings: object) -> None:
        assert PROGRAM is not None, "PgBouncer is not installed"
        self.host = HOST
        self.pool_size = pool_size
        # Bound for as long as this lives, so that nobody else gets the port while it is down.
        self._reservation = socket.socket()
        self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reservation.bind((HOST, 0))
        self.port: int = self._reservation.getsockname()[1]
        self._user = users[0]
        self._account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        self._directory = Path(tempfile.mkdtemp(prefix="pgbouncer-", dir="/tmp"))
        text = SETTINGS.format(
            node=node, host=HOST, port=self.port, directory=self._directory, pool_size=pool_size
        )
        text += "".join(f"{name} = {value}\n" for name, value in settings.items())
        (self._directory / "ini").write_text(text)
        (self._directory / "users").write_text("".join(f'"{user}" ""\n' for user in users))
        self._process: subprocess.Popen[bytes] | None = None
        if self._account is not None:
            for path in (self._directory, *self._directory.iterdir()):
                os.chown(path, self._account.pw_uid, self._account.pw_gid)

    def __enter__(self) -> PgBouncer:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._reservation.close()
        shutil.rmtree(self._directory)

    def start(self) -> None:
        """Start the program and wait until it serves."""
        options: dict[str, Any] = {}
        if self._account is not None:
            options = {"user": self._account.pw_uid, "group": self._account.pw_gid, "extra_groups": []}
        self._process = subprocess.Popen(
            [str(PROGRAM), "--quiet", str(self._directory / "ini")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self._directory,
            **options,
        )
        wait_for(self._serves, what="PgBouncer serves")

    def stop(self) -> None:
        """End the program at once, with all of its connections."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(10)
            self._process = None

    def restart(self) -> None:
        """Stop and start, on the same port."""
        self.stop()
        self.start()

    def connect(self, user: str | None = None) -> psycopg.Connection[Any]:
        """Return a client's connection, in autocommit mode, without anything of the pool's."""
        return psycopg.connect(
            host=HOST,
            port=self.port,
            user=user or self._user,
            dbname="postgres",
            autocommit=True,
            prepare_threshold=None,
        )

    def log(self) -> str:
        """Return what it has logged."""
        path = self._directory / "log"
        return path.read_text() if path.exists() else "nothing logged"

    def has_failed(self) -> bool:
        """Return whether it has ended itself, at a fault of its own.

        1.18 may, when a client that asks for a cancel is gone before that is sent:
        https://github.com/pgbouncer/pgbouncer/pull/846
        """
        return self._process is not None and self._process.poll() is not None and "FATAL @" in self.log()

    def _serves(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        try:
            self.connect().close()
        except psycopg.OperationalError:
            return False
        return True

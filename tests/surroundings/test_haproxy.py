"""HAProxy with a role check before three members of Patroni: one address, behind which the primary moves."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import psycopg
from patroni_cluster import FirstWrite, Member, Patroni, cluster, free_ports
from programs import program
from support import wait_for

from pgdbpool import Connection, Handler

SETTINGS = """
defaults
    mode tcp
    timeout connect 1s
    timeout client 30m
    timeout server 30m
    option httpchk
    http-check send meth GET uri {path}
    http-check expect status 200
    default-server inter 200ms fall 2 rise 1 on-marked-down shutdown-sessions
listen pg
    bind 127.0.0.1:{port}
{servers}
"""


@contextmanager
def haproxy(patroni: Patroni, path: str) -> Iterator[int]:
    """Run HAProxy before the members whose Patroni answers the path with 200; yield its port."""
    (port,) = free_ports(1)
    servers = "\n".join(
        f"    server {m.name} 127.0.0.1:{m.port} check port {m.rest_port}" for m in patroni.members
    )
    file = patroni.place / "haproxy.cfg"
    file.write_text(SETTINGS.format(port=port, path=path, servers=servers))
    running = subprocess.Popen(
        [program("haproxy", "haproxy"), "-db", "-f", str(file)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield port
    finally:
        os.kill(running.pid, signal.SIGKILL)
        running.wait(10)


def test_blocks_follow_the_primary_through_the_role_check(mode: str) -> None:
    with cluster() as patroni, haproxy(patroni, "/primary") as port:
        servers = [{"label": "pg", "host": "127.0.0.1", "port": port, "name": "postgres", "user": "postgres"}]
        groups: dict[str, Any] = {
            "write": {"target": "primary", "autocommit": False, "connection_count": 2, "timeout": 5}
        }

        def written() -> Member | None:
            try:
                with Handler("write") as db:
                    db.query("INSERT INTO done VALUES (1)")
                    number = db.fetchval("SELECT inet_server_port()")
            except psycopg.Error:
                return None
            return next(member for member in patroni.members if member.port == number)

        Connection.init({"type": mode, "db": servers, "groups": groups}, wait=False)
        try:
            old = wait_for(written, 20, "the first block")
            first = FirstWrite(patroni, old)
            patroni.switchover()
            new = first.wait(30)
            found = wait_for(lambda: member if (member := written()) is not old else None, 10, "the new one")
            assert found is new
            # HAProxy asks five times a second, and a server that was down is probed twice a second.
            assert monotonic() - first.at < 5
            assert Connection.status().endpoints["pg"].state == "up"
        finally:
            Connection.reset()

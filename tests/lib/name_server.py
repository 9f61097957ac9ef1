"""A program with a name server of its own, which may be silent; for tests of what the pools do then.

    python name_server.py scenario mode port address

It runs as root in a mount namespace whose /etc/resolv.conf names the address: the resolver is the system's.
It prints what it found, as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from proxy import Proxy
from support import wait_for

import pgdbpool
from pgdbpool import Connection, Handler

RESOLV_CONF = "nameserver {}\noptions timeout:1 attempts:2\n"
NO_SUCH_NAME, SILENT = "", None


class NameServer:
    """Says of every name that it is `address`, or that there is none, or nothing at all."""

    def __init__(self, at: str) -> None:
        self.address: str | None = "127.0.0.1"
        """Several are separated by commas."""
        self.proxy: Proxy
        """In front of the server that the name stands for."""
        self.config: dict[str, Any]
        """What the pools were given."""
        self.silent: socket.socket
        """Takes connections at the proxy's port of another address, and says nothing."""
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((at, 53))
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            query, client = self._socket.recvfrom(512)
            if self.address is not SILENT:
                self._socket.sendto(self._reply(query, self.address), client)

    def _reply(self, query: bytes, address: str) -> bytes:
        """Return the reply to a question; https://www.rfc-editor.org/rfc/rfc1035#section-4."""
        end = query.index(b"\0", 12) + 5
        (kind,) = struct.unpack("!H", query[end - 4 : end - 2])
        addresses = address.split(",") if kind == 1 and address != NO_SUCH_NAME else []
        code = 3 if address == NO_SUCH_NAME else 0
        head = struct.pack("!HHHLH", 0xC00C, 1, 1, 0, 4)
        records = b"".join(head + socket.inet_aton(each) for each in addresses)
        return (
            query[:2] + struct.pack("!5H", 0x8180 | code, 1, len(addresses), 0, 0) + query[12:end] + records
        )


class Pulse:
    """A thread that measures how long it was kept from going on."""

    def __init__(self) -> None:
        self.longest = 0.0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        last = time.monotonic()
        while True:
            time.sleep(0.005)
            now = time.monotonic()
            self.longest, last = max(self.longest, now - last), now


def timed(block: Callable[[], Any]) -> tuple[float, str]:
    """Return the seconds that it took, and the class and text of what it raised."""
    began, error = time.monotonic(), ""
    try:
        block()
    except pgdbpool.Error as raised:
        error = f"{type(raised).__name__}: {raised}"
    return time.monotonic() - began, error


def state() -> str:
    return Connection.status().endpoints["db"].state


def use() -> None:
    with Handler("g") as db:
        db.query("SELECT 1")


def silent_later(server: NameServer) -> dict[str, Any]:
    """A connection is open, and a second and a third are wanted when the name server is silent."""
    use()
    pulse = Pulse()
    server.address = SILENT
    with Handler("g") as held:
        second = timed(use)
        with Handler("g"):
            third = timed(use)
        held.query("SELECT 1")
    return {"second": second, "third": third, "pulse": pulse.longest, "state": state()}


def silent_first(server: NameServer) -> dict[str, Any]:
    """The name server is silent from the start; then it answers."""
    server.address = SILENT
    pulse = Pulse()
    first = timed(use)
    then = timed(use)
    found = {"first": first, "then": then, "pulse": pulse.longest, "state": state()}
    server.address = "127.0.0.1"
    wait_for(lambda: not timed(use)[1])
    return found


def forked(server: NameServer) -> dict[str, Any]:
    """A child wants its first connection when the name server is silent."""
    use()
    server.address = SILENT
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, json.dumps(timed(use)).encode())
        os._exit(0)
    os.wait()
    return {"first": json.loads(os.read(reading, 1000))}


def gone(server: NameServer) -> dict[str, Any]:
    """There is no such name any more when a second connection is wanted."""
    use()
    server.address = NO_SUCH_NAME
    with Handler("g"):
        second = timed(use)
    return {"second": second, "state": state()}


def away(server: NameServer) -> dict[str, Any]:
    """The server is away and comes back; the network takes 20 ms each way."""
    use()
    server.proxy.delay = 0.02
    server.proxy.stop()
    refused = timed(use)
    server.proxy.start()
    time.sleep(
        0.8
    )  # longer than between two probes, and without a thread nothing takes their steps meanwhile
    if server.config["type"] == "threaded":  # there a request does not wait for the probe
        wait_for(lambda: state() == "up")
    return {"refused": refused, "then": timed(use), "state": state()}


def silent_address(server: NameServer) -> dict[str, Any]:
    """The name has two addresses, and the first of them takes connections and says nothing."""
    first, second = "127.0.0.1", "127.0.0.2"  # in the order that the system gives them in
    with server.silent:
        server.address = f"{first},{second}"
        names = [address[0] for *_, address in socket.getaddrinfo("db.test", 1, type=socket.SOCK_STREAM)]
        began = timed(lambda: Connection.init(server.config))
        server.proxy.stop()
        refused = timed(use)
        server.proxy.start()
        wait_for(lambda: not timed(use)[1])
        server.proxy.reset_all()
        return {"names": names, "began": began, "refused": refused, "then": timed(use), "state": state()}


def port_of_both(server: NameServer, port: int) -> None:
    """Give the server a silent socket and a proxy that listen on the same port of two addresses."""
    while True:
        server.proxy = Proxy("127.0.0.1", port, at="127.0.0.2")
        server.silent = socket.socket()
        try:
            server.silent.bind(("127.0.0.1", server.proxy.port))
        except OSError:  # another program has it there
            server.silent.close()
            server.proxy.close()
        else:
            server.silent.listen()
            return


def main() -> None:
    scenario, mode, port, address = sys.argv[1:]
    server = NameServer(address)
    if scenario == "silent-address":
        port_of_both(server, int(port))
    else:
        server.proxy = Proxy("127.0.0.1", int(port))
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pgdbpool").addHandler(handler)
    db: dict[str, Any] = {
        "label": "db",
        "host": "db.test",
        "port": server.proxy.port,
        "name": "postgres",
        "user": "postgres",
    }
    group = {"connection_count": 4, "min_size": 0, "timeout": 5}
    db["connect_timeout"] = 0.5 if scenario == "silent-first" else 3
    server.config = {"type": mode, "db": db, "groups": {"g": group}}
    Connection.init(server.config, wait=False)
    scenarios = {
        "silent-later": silent_later,
        "silent-first": silent_first,
        "forked": forked,
        "gone": gone,
        "away": away,
        "silent-address": silent_address,
    }
    found = scenarios[scenario](server)
    print(json.dumps({**found, "warnings": warnings}))
    Connection.close()


if __name__ == "__main__":
    main()

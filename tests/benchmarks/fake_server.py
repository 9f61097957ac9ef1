"""Servers that take connections as PostgreSQL does, and answer no more than an empty query: cheap and many.

python fake_server.py 100        # prints the ports, and ends with its standard input
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import sys

SSL_REQUEST, GSS_REQUEST = 80877103, 80877104
PARAMETERS = {
    "server_version": "18.0",
    "server_encoding": "UTF8",
    "client_encoding": "UTF8",
    "in_hot_standby": "off",
    "default_transaction_read_only": "off",
    "integer_datetimes": "on",
    "standard_conforming_strings": "on",
    "DateStyle": "ISO, MDY",
    "TimeZone": "UTC",
}


def message(kind: bytes, body: bytes) -> bytes:
    """Return a message of the protocol."""
    return kind + struct.pack("!i", len(body) + 4) + body


READY = message(b"Z", b"I")
WELCOME = (
    message(b"R", struct.pack("!i", 0))
    + b"".join(message(b"S", f"{name}\0{value}\0".encode()) for name, value in PARAMETERS.items())
    + message(b"K", struct.pack("!ii", 1, 1))
    + READY
)


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Talk to one client."""
    try:
        while True:
            length, code = struct.unpack("!ii", await reader.readexactly(8))
            if code not in (SSL_REQUEST, GSS_REQUEST):
                break
            writer.write(b"N")
        await reader.readexactly(length - 8)
        writer.write(WELCOME)
        while True:
            kind, length = struct.unpack("!ci", await reader.readexactly(5))
            await reader.readexactly(length - 4)
            if kind == b"X":
                break
            if kind == b"Q":
                writer.write(message(b"I", b"") + READY)
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main(number: int) -> None:
    """Listen on so many ports until standard input ends."""
    servers = [await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024) for _ in range(number)]
    sys.stdout.write(json.dumps([server.sockets[0].getsockname()[1] for server in servers]) + "\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    os._exit(0)  # with all that is open


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))

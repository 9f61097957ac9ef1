"""Whether a server accepts sessions, asked without logging in and without waiting."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from time import monotonic
from typing import TYPE_CHECKING, Any

from .names import Name, Resolving, UnresolvedError, destination

if TYPE_CHECKING:
    from .config import EndpointConfig

_NOT_YET = {errno.ENOTCONN, errno.EINPROGRESS, errno.EALREADY}


class StartupProbe:
    """Asks a server for a session without logging in, to learn whether it accepts sessions.

    The postmaster answers a start-up packet with an authentication request, or with an error
    whose SQLSTATE tells a server that starts or stops (57P03) from one that only refuses this
    client. https://www.postgresql.org/docs/current/protocol-message-formats.html

    It never blocks: `step()` does what can be done now, so that a lock-free pool probes a server
    in passing. For the same reason a function that gives the user is not called here.

    :param user: the user as it was last known; any will do, the server answers before it looks.
    :param before: the server's name, where somebody has it.
    """

    def __init__(
        self,
        config: EndpointConfig,
        user: str | None = None,
        before: Name | None = None,
    ) -> None:
        params = destination(config)
        self._user = str(user or params.get("user") or "postgres")
        self._dbname = params.get("dbname") or self._user
        self._host, self._port = params["host"], int(params.get("port") or 5432)
        self._hostaddr = params.get("hostaddr")
        self.name = Name.at(params, config.label, before)
        self._resolving: Resolving | None = None
        self._addresses: list[tuple[int, Any]] = []
        self._socket: socket.socket | None = None
        self._sent = False
        self._reply = b""
        self.done = False
        self.accepting = False
        self.reason = "no answer"
        self.out_of_time = False
        """Whether `run` gave up before there was an answer."""

    def _find(self) -> bool:
        """Find where to connect to; return whether that is known."""
        if self.name is None:
            addresses: tuple[str, ...] = (self._hostaddr or self._host,)
        else:
            if self._resolving is None:
                self._resolving = self.name.asking()
            if self._resolving.under_way:
                self.reason = f"host {self._host!r} is not resolved yet"
                return False
            addresses = self._resolving.answer()
        for address in addresses:
            if address.startswith(("/", "@")):
                path = f"{address}/.s.PGSQL.{self._port}"
                found: Any = socket.AF_UNIX, "\0" + path[1:] if path.startswith("@") else path
            else:
                found = socket.AF_INET6 if ":" in address else socket.AF_INET, (address, self._port)
            self._addresses.append(found)
        return True

    def _next(self) -> None:
        """Begin to connect to the next address."""
        family, address = self._addresses.pop(0)
        self._sent, self._reply = False, b""
        try:
            self._socket = socket.socket(family, socket.SOCK_STREAM)
            self._socket.setblocking(False)
            self._socket.connect(address)
        except BlockingIOError:
            pass  # under way
        except OSError as error:
            self._failed(str(error))

    def _failed(self, reason: str) -> None:
        """Go on to the next address, as libpq does; after the last one, that was it."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._addresses:
            self._next()
        else:
            self._finish(False, reason)

    def step(self) -> bool:
        """Go on as far as possible without waiting; return whether the answer is known."""
        if self._socket is None and not self.done:
            try:
                if not self._find():
                    return False
            except UnresolvedError as error:
                self._finish(False, str(error))
                return True
            self._next()
        if self.done or self._socket is None:
            return True
        try:
            if not self._sent:
                if code := self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    raise OSError(code, os.strerror(code))
                self._socket.getpeername()  # ENOTCONN while the connect is under way
                self._socket.send(self._packet())
                self._sent = True
            while data := self._socket.recv(4096):
                self._reply += data
                if self._read():
                    return True
            self._failed("the server closed the connection at once")
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _NOT_YET:
                return False
            self._failed(str(error))
        return self.done

    def run(self, timeout: float) -> None:
        """Wait for the answer, at most for the timeout (seconds)."""
        deadline = monotonic() + timeout
        while not self.step():
            left = deadline - monotonic()
            if left <= 0:
                self.out_of_time = True
                self._finish(False, f"no answer within {timeout:.1f} s")
                return
            self.wait(left)

    def wait(self, timeout: float) -> None:
        """Sleep until there is something to do, at most for the timeout (seconds)."""
        if self._socket is None and self._resolving is not None:
            self._resolving.wait(monotonic() + timeout)
        elif self._socket is not None and not self.done:
            poller = select.poll()
            poller.register(self._socket, select.POLLIN if self._sent else select.POLLOUT)
            poller.poll(max(timeout, 0.0) * 1000)

    def close(self) -> None:
        """Give up."""
        if not self.done:
            self._finish(False, self.reason)

    def _packet(self) -> bytes:
        fields = b"".join(part.encode() + b"\0" for part in ("user", self._user, "database", self._dbname))
        body = struct.pack("!i", 196608) + fields + b"\0"  # protocol 3.0
        return struct.pack("!i", len(body) + 4) + body

    def _read(self) -> bool:
        kind = self._reply[:1]
        if kind != b"E":
            self._finish(True, "accepting sessions")
            return True
        if len(self._reply) < 5 or len(self._reply) < 1 + int(struct.unpack("!i", self._reply[1:5])[0]):
            return False
        fields = {part[:1]: part[1:].decode("utf-8", "replace") for part in self._reply[5:].split(b"\0")}
        self._finish(fields.get(b"C") != "57P03", fields.get(b"M", "an error without a message"))
        return True

    def _finish(self, accepting: bool, reason: str) -> None:
        self.done, self.accepting, self.reason = True, accepting, reason
        if self._socket is not None:
            self._socket.close()
            self._socket = None

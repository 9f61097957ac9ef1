"""Probes whether a server accepts sessions, without logging in and without waiting."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Generator
from time import monotonic
from typing import TYPE_CHECKING

import psycopg

from .host_names import Name, Place, Resolving, UnresolvedError, destination, is_address, places

if TYPE_CHECKING:
    import ssl

    from .._config.model import EndpointConfig

_NOT_YET = {errno.ENOTCONN, errno.EINPROGRESS, errno.EALREADY}
_SSL_REQUEST = struct.pack("!ii", 8, 80877103)
_ROOT_CERTIFICATE = "~/.postgresql/root.crt"

RESOLVING_AGAIN = 0.005
"""Seconds between two checks of whether a name has been resolved."""

Answer = tuple[bool, str]
"""Whether the server accepts sessions, and its own message."""


class _Terms:
    """The start-up packet and its transport: plain, TLS if the server supports it, or TLS only.

    :param params: libpq's parameters.
    """

    def __init__(self, params: dict[str, str], user: str | None) -> None:
        self._params = params
        self.mode = params.get("sslmode") or "prefer"
        self.direct = params.get("sslnegotiation") == "direct" and self.mode not in ("disable", "allow")
        self.asks = self.mode not in ("disable", "allow")
        self.needs = self.mode not in ("disable", "allow", "prefer")
        names = user or params.get("user") or "postgres"
        parts = ("user", names, "database", params.get("dbname") or names)
        body = struct.pack("!i", 196608) + b"".join(part.encode() + b"\0" for part in parts) + b"\0"
        self.packet = struct.pack("!i", len(body) + 4) + body
        """The start-up packet of protocol 3.0."""

    def wrap(self, sock: socket.socket, host: str) -> ssl.SSLSocket:
        """Return the socket wrapped in TLS, configured as by libpq; raises OSError or ValueError."""
        import ssl  # most configurations do not need it

        root = self._params.get("sslrootcert") or os.path.expanduser(_ROOT_CERTIFICATE)
        verifies = self.mode.startswith("verify-") or (self.mode == "require" and os.path.exists(root))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = self.mode == "verify-full"
        context.verify_mode = ssl.CERT_REQUIRED if verifies else ssl.CERT_NONE
        if verifies and root == "system":
            context.load_default_certs()
        elif verifies:
            context.load_verify_locations(root)
        if self.direct:
            context.set_alpn_protocols(["postgresql"])
        named = context.check_hostname or not (is_address(host) or self._params.get("sslsni") == "0")
        return context.wrap_socket(
            sock, server_hostname=host if named else None, do_handshake_on_connect=False
        )


class _Dialogue:
    """The exchange with one address until it has answered; it never waits.

    :param host: the host name, for the certificate.
    """

    def __init__(self, address: str, place: Place, terms: _Terms) -> None:
        self.address = address
        self._host, self._terms = place.host, terms
        if address.startswith(("/", "@")):
            path = f"{address}/.s.PGSQL.{place.port}"
            self._family, self._at = socket.AF_UNIX, "\0" + path[1:] if path.startswith("@") else path
        else:
            self._family = socket.AF_INET6 if ":" in address else socket.AF_INET
            self._at = (address, int(place.port))  # type: ignore[assignment]
        self._socket: socket.socket | None = None
        self._steps = self._talk(terms.asks and self._family != socket.AF_UNIX)
        self.waits_for = select.POLLOUT
        self.moves = 0
        """The number of steps that made progress."""
        self.over = False
        self.accepting = False
        self.reason = "no answer"
        self.sqlstate = ""

    @property
    def fileno(self) -> int:
        """The file descriptor of the socket, or -1."""
        return -1 if self._socket is None else self._socket.fileno()

    def step(self) -> bool:
        """Go on as far as possible without waiting; return whether it is over."""
        if not self.over:
            try:
                self.waits_for = next(self._steps)
            except StopIteration as end:
                self._end(*end.value)
            except OSError as error:
                self._end(False, str(error))
        return self.over

    def close(self) -> None:
        """Give up."""
        self._end(self.accepting, self.reason)

    def _end(self, accepting: bool, reason: str) -> None:
        self.over, self.accepting, self.reason = True, accepting, reason
        self._steps.close()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _talk(self, encrypted: bool) -> Generator[int, None, Answer]:
        """Send the same messages as libpq up to the authentication.

        https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-SSL
        """
        yield from self._connect()
        if encrypted and not self._terms.direct:
            yield from self._send(_SSL_REQUEST)
            answer = yield from self._receive(1)
            if answer == b"E":
                return (yield from self._hear(answer))
            encrypted = answer == b"S"
            if not encrypted and self._terms.needs:
                return True, "the server speaks no TLS"
        if encrypted:
            refusal = yield from self._encrypt()
            if refusal and not self._terms.needs:
                return (yield from self._talk(False))
            if refusal:
                return True, refusal
        yield from self._send(self._terms.packet)
        return (yield from self._hear((yield from self._receive(1))))

    def _connect(self) -> Generator[int, None, None]:
        if self._socket is not None:
            self._socket.close()
        self._socket = socket.socket(self._family, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        try:
            self._socket.connect(self._at)
        except BlockingIOError:
            yield select.POLLOUT
        while True:
            if code := self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(code, os.strerror(code))
            try:
                self._socket.getpeername()  # ENOTCONN while the connect is under way
            except OSError as error:
                if error.errno not in _NOT_YET:
                    raise
                yield select.POLLOUT
            else:
                self.moves += 1
                return

    def _encrypt(self) -> Generator[int, None, str]:
        """Begin TLS; return why either side refused it, or an empty string.

        A server that refuses TLS is up all the same; the next connect reports its reason.
        """
        import ssl

        assert self._socket is not None
        try:
            wrapped = self._terms.wrap(self._socket, self._host)
        except (OSError, ValueError) as error:
            return f"TLS: {error}"
        self._socket = wrapped
        while True:
            try:
                wrapped.do_handshake()
            except ssl.SSLWantReadError:
                yield select.POLLIN
            except ssl.SSLWantWriteError:
                yield select.POLLOUT
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError):
                if self._terms.needs:
                    raise
                return "TLS: the server closed the connection"
            except ssl.SSLError as error:
                return f"TLS: {error}"
            else:
                self.moves += 1
                return ""

    def _send(self, data: bytes) -> Generator[int, None, None]:
        assert self._socket is not None
        while True:
            try:
                self._socket.send(data)
            except OSError as error:
                yield _would_block(error) or select.POLLOUT
            else:
                self.moves += 1
                return

    def _receive(self, count: int) -> Generator[int, None, bytes]:
        """Return `count` bytes; raises ConnectionError if the server closes the connection first."""
        assert self._socket is not None
        data = b""
        while len(data) < count:
            try:
                more = self._socket.recv(count - len(data))
            except OSError as error:
                yield _would_block(error) or select.POLLIN
                continue
            if not more:
                raise ConnectionError("the server closed the connection at once")
            self.moves += 1
            data += more
        return data

    def _hear(self, kind: bytes) -> Generator[int, None, Answer]:
        """Interpret the first message of the server: anything but an error asks for authentication."""
        if kind != b"E":
            return True, "accepting sessions"
        (length,) = struct.unpack("!i", (yield from self._receive(4)))
        body = yield from self._receive(max(min(length - 4, 10_000), 0))
        fields = {part[:1]: part[1:].decode("utf-8", "replace") for part in body.split(b"\0")}
        self.sqlstate = fields.get(b"C", "")
        return self.sqlstate != "57P03", fields.get(b"M", "an error without a message")


def _would_block(error: OSError) -> int:
    """Return the poll event to wait for before retrying; raise any other error."""
    if isinstance(error, BlockingIOError):
        return 0
    name = type(error).__name__
    if name in ("SSLWantReadError", "SSLWantWriteError"):
        return select.POLLIN if name == "SSLWantReadError" else select.POLLOUT
    raise error


class StartupProbe:
    """Begins a session without logging in, to learn whether the server accepts sessions.

    The postmaster answers a start-up packet with an authentication request, or with an error whose
    SQLSTATE distinguishes a server that starts or stops (57P03) from one that only refuses this client.
    https://www.postgresql.org/docs/current/protocol-message-formats.html
    It uses TLS as libpq would, according to `sslmode` and `sslnegotiation`, and tries all addresses at the
    same time, so that a silent one costs nothing.

    It never blocks: `step()` does only the possible work, so that a lock-free pool can probe a server
    during a checkout. For the same reason a callable for the user is not called here.

    :param user: the last known user; any user will do, since the server answers before it checks.
    :param before: the known name of the server, if any.
    """

    def __init__(
        self,
        config: EndpointConfig,
        user: str | None = None,
        before: Name | None = None,
    ) -> None:
        params = destination(config)
        self._terms = _Terms(params, user)
        self.name = Name.at(params, config.label, before)
        self.done = False
        self.accepting = False
        self.reason = "no answer"
        self.sqlstate = ""
        """SQLSTATE of the error with which the server answered."""
        self.out_of_time = False
        """Whether `run` gave up before an answer arrived."""
        self._found = 0
        self._dialogues: list[_Dialogue] = []
        self._resolving: list[tuple[Place, Resolving]] = []
        try:
            for place in places(params):
                self._begin(place, config.label)
        except (psycopg.Error, ValueError) as error:
            self._finish(True, str(error))  # not a server's answer: libpq reports the same

    def _begin(self, place: Place, label: str) -> None:
        if not place.named:
            self._dialogues.append(_Dialogue(place.hostaddr or place.host, place, self._terms))
        else:
            name = self.name or Name(place.host, place.port, label)
            self._resolving.append((place, name.asking()))

    @property
    def moves(self) -> int:
        """The number of steps that made progress: while it grows, the server is up."""
        return self._found + sum(dialogue.moves for dialogue in self._dialogues)

    def _find(self) -> None:
        """Contact the addresses of names that were resolved in the meantime."""
        for place, resolving in list(self._resolving):
            if resolving.under_way:
                self.reason = f"host {place.host!r} is not resolved yet"
                continue
            self._resolving.remove((place, resolving))
            try:
                found = resolving.answer()
            except UnresolvedError as error:
                self.reason = str(error)
                continue
            self._found += 1
            self._dialogues += [_Dialogue(address, place, self._terms) for address in found]

    def step(self) -> bool:
        """Go on as far as possible without waiting; return whether the answer is known."""
        if self.done:
            return True
        if self._resolving:
            self._find()
        for dialogue in self._dialogues:
            if dialogue.step() and dialogue.accepting:
                if self.name is not None:
                    self.name.prefer(dialogue.address)
                self.sqlstate = dialogue.sqlstate
                self._finish(True, dialogue.reason)
                return True
        if not self._resolving and all(dialogue.over for dialogue in self._dialogues):
            reasons = dict.fromkeys(dialogue.reason for dialogue in self._dialogues)
            self._finish(False, "; ".join(reasons) or self.reason)
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

    def register(self, poller: select.poll) -> bool:
        """Register the sockets with the poller; return whether no name resolution is pending besides."""
        for dialogue in self._dialogues:
            if not dialogue.over and dialogue.fileno >= 0:
                poller.register(dialogue.fileno, dialogue.waits_for)
        return not self._resolving

    def wait(self, timeout: float) -> None:
        """Sleep until the next step can make progress, at most for the timeout (seconds)."""
        if not self._dialogues and self._resolving:
            self._resolving[0][1].wait(monotonic() + timeout)
        else:
            poller = select.poll()
            if not self.register(poller):
                timeout = min(timeout, RESOLVING_AGAIN)
            poller.poll(max(timeout, 0.0) * 1000)

    def close(self) -> None:
        """Give up."""
        if not self.done:
            self._finish(False, self.reason)

    def _finish(self, accepting: bool, reason: str) -> None:
        self.done, self.accepting, self.reason = True, accepting, reason
        for dialogue in self._dialogues:
            dialogue.close()

"""A TCP proxy between a client and PostgreSQL that counts round trips and breaks the network on demand.

    with Proxy(node.host, node.port) as proxy:
        connection = psycopg.connect(node.conninfo(port=proxy.port))

One thread owns all sockets; other threads hand it work. What is counted is counted before it is passed on, so
a client that has its answer finds it in the counters.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from types import TracebackType

HOST = "127.0.0.1"
SSL_REQUEST, GSS_REQUEST = 80877103, 80877104
WAITS = b"QSF"  # Query, Sync, FunctionCall: each is answered by exactly one ReadyForQuery
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of no time: close() sends RST
HIGH_WATER = 1 << 20


class Frontend:
    """Counts a client's messages that make it wait for ReadyForQuery, however TCP cuts the stream."""

    def __init__(self) -> None:
        self._rest = b""
        self._skip = 0
        self._started = False
        self._encryption_asked = False
        self._opaque = False

    def feed(self, data: bytes) -> int:
        """Return how many such messages begin in `data`."""
        if self._opaque:
            return 0
        stream = self._rest + data
        position, waits = self._skip, 0
        # A start-up packet has no type: length and code; any other message: type and length.
        while len(stream) - position >= (5 if self._started else 8):
            if self._started:
                kind, length = struct.unpack_from("!Bi", stream, position)
                waits += kind in WAITS
                position += 1 + length
            else:
                length, code = struct.unpack_from("!ii", stream, position)
                self._encryption_asked = code in (SSL_REQUEST, GSS_REQUEST)
                self._started = not self._encryption_asked
                position += length
        self._skip = max(0, position - len(stream))
        self._rest = stream[position:]
        return waits

    def answered(self, data: bytes) -> None:
        """Note the server's answer: after a yes to encryption nothing can be read any more."""
        if self._encryption_asked and not self._started:
            self._opaque = data[:1] in (b"S", b"G")
            self._encryption_asked = False


class Flow:
    """One direction of a link: what was read and is not yet due or taken. `b""` is the end of the stream."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source = source
        self.target = target
        self.queue: deque[tuple[float, bytes]] = deque()
        self.size = 0
        self.ended = False
        self.blocked = False

    def put(self, data: bytes, due: float) -> None:
        self.queue.append((max(due, self.queue[-1][0]) if self.queue else due, data))
        self.size += len(data)
        self.ended = not data

    def send_due(self) -> None:
        """Pass on what is due, as far as the target takes it."""
        self.blocked = False
        while self.queue and self.queue[0][0] <= time.monotonic():
            due, data = self.queue.popleft()
            if not data:
                self.target.shutdown(socket.SHUT_WR)
                return
            try:
                sent = self.target.send(data)
            except BlockingIOError:
                sent = 0
            self.size -= sent
            if sent < len(data):
                self.queue.appendleft((due, data[sent:]))
                self.blocked = True
                return


class Link:
    """A client's connection and the one to the server that it is passed on to."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.sockets = (client, server)
        self.up = Flow(client, server)
        self.down = Flow(server, client)
        self.flows = (self.up, self.down)
        self.frontend = Frontend()
        self.cut = False  # at the server's next word
        self.asked = False  # the client has sent something that the server has not begun to answer
        self.open = True
        self.forgotten = False


class Proxy:
    """A proxy on a free loopback port; a context manager.

    `connections` counts accepted connections. `round_trips` counts how often the server began to answer after
    the client had sent something: how often a client waited, whatever the protocol, the handshake included
    (without TLS and password two: the question for TLS, and the start-up). If the server answers a part of a
    burst before the client has sent the rest, that is one more. `syncs` counts the messages Query and Sync,
    each answered by one ReadyForQuery: without COPY, how often psycopg waits, and always exact; the handshake
    has none, and none are seen under TLS. `bytes_up` and `bytes_down` were read from client and server.

    `cut_before(text)` resets the next connection on which the client sends the text, and the server never
    gets it; `cut_after(text)` passes it on, and resets the connection when the server has answered, so that
    what was asked is done and the client does not know. `cuts` counts both.

    `lose_after(count)` passes on so many bytes more of what servers send, and nothing after that.

    `rename(old, new)` writes another name of the same length wherever the server sends the one.
    """

    def __init__(self, host: str, port: int, at: str = HOST) -> None:
        self.target = (host, port)
        self._at = at
        self.delay = 0.0  # seconds that each direction takes, order kept
        self.connections = self.round_trips = self.syncs = self.bytes_up = self.bytes_down = 0
        self.cuts = 0
        self._cut: tuple[bytes, bool] | None = None
        self._renamed = b"\0", b"\0"
        self._passes: int | None = None
        self._links: set[Link] = set()
        self._stalled = False
        self._closing = False
        self._selector = selectors.SelectSelector()  # the others round delays up to milliseconds
        self._tasks: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._waker, self._wake = socket.socketpair()
        self._waker.setblocking(False)
        self._selector.register(self._waker, selectors.EVENT_READ, self._work)
        # Bound for as long as the proxy lives: a port that is stopped is refused, and is still ours.
        self._reservation = self._bind(0)
        self.port: int = self._reservation.getsockname()[1]
        self._listener: socket.socket | None = None
        self._listen()
        self._thread = threading.Thread(target=self._run, name=f"proxy-{self.port}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Reset all connections, give the port up and end the thread; safe to repeat."""
        if self._closing:
            return
        self._call(self._stop)
        self._closing = True
        self._wake.send(b".")
        self._thread.join(10)
        assert not self._thread.is_alive(), "the proxy's thread did not end"
        for each in (self._selector, self._waker, self._wake, self._reservation):
            each.close()

    @property
    def open_connections(self) -> int:
        """How many connections are open now."""
        return len(self._links)

    def reset_counts(self) -> None:
        """Set all counters to zero."""
        self._call(self._reset_counts)

    def stop(self) -> None:
        """Reset all connections and refuse new ones, as a server that crashed does."""
        self._call(self._stop)

    def start(self) -> None:
        """Accept connections again after `stop`."""
        self._call(self._listen)

    def stall(self) -> None:
        """Take new connections but pass nothing on and notice nothing, as a dead network does."""
        self._call(partial(self._stall, True))

    def resume(self) -> None:
        """Pass on again after `stall`, beginning with what was held."""
        self._call(partial(self._stall, False))

    def forget(self) -> None:
        """Pass nothing on over the connections that there are, as a firewall that has forgotten them."""
        self._call(self._forget)

    def reset_all(self) -> None:
        """End all connections with RST, on both sides."""
        self._call(self._reset_all)

    def close_all(self) -> None:
        """End all connections with FIN, on both sides."""
        self._call(self._close_all)

    def cut_before(self, text: bytes) -> None:
        """Reset the next connection that sends the text, in place of passing it on."""
        self._cut = text, False

    def cut_after(self, text: bytes) -> None:
        """Reset the next connection that sends the text, in place of the server's answer to it."""
        self._cut = text, True

    def lose_after(self, count: int) -> None:
        """Pass on so many bytes more of what servers send; what they send after that is lost."""
        self._passes = count

    def rename(self, old: bytes, new: bytes) -> None:
        """Write another name of the same length wherever the server sends the one."""
        assert len(old) == len(new)
        self._renamed = old, new

    # From here on in the proxy's own thread, but for _call and what __init__ does before that starts

    def _call(self, task: Callable[[], None]) -> None:
        assert not self._closing, "the proxy is closed"
        done: Future[None] = Future()
        self._tasks.append((task, done))
        self._wake.send(b".")
        done.result(timeout=10)

    def _work(self, mask: int) -> None:
        self._waker.recv(4096)
        while self._tasks:
            task, done = self._tasks.popleft()
            try:
                task()
            except OSError as error:
                done.set_exception(error)
            else:
                done.set_result(None)

    def _run(self) -> None:
        while not self._closing:
            for key, mask in self._selector.select(self._until_next_due()):
                key.data(mask)
            for link in list(self._links):
                self._advance(link)

    def _until_next_due(self) -> float | None:
        if self._stalled:
            return None
        links = [link for link in self._links if not link.forgotten]
        dues = [f.queue[0][0] for link in links for f in link.flows if f.queue and not f.blocked]
        return max(0.0, min(dues) - time.monotonic()) if dues else None

    def _bind(self, port: int) -> socket.socket:
        bound = socket.socket()
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((self._at, port))
        return bound

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = self._bind(self.port)
            self._listener.listen(128)
            self._listener.setblocking(False)
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def _accept(self, mask: int) -> None:
        if self._listener is None:
            return
        try:
            client = self._listener.accept()[0]
        except OSError:
            return  # it has gone again
        self.connections += 1
        server = socket.socket()
        link = Link(client, server)
        for each in link.sockets:
            each.setblocking(False)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.connect_ex(self.target)  # whether it worked shows when it is read or written
        self._links.add(link)
        self._watch(link)

    def _watch(self, link: Link) -> None:
        """Wait for what can happen next: a flow's source is read unless it has ended or is far ahead."""
        for flow, opposite in ((link.up, link.down), (link.down, link.up)):
            mask = 0
            if link.open and not self._stalled and not link.forgotten:
                mask |= selectors.EVENT_READ if not flow.ended and flow.size < HIGH_WATER else 0
                mask |= selectors.EVENT_WRITE if opposite.blocked else 0
            watched = self._selector.get_map().get(flow.source)
            if watched is None:
                if mask:
                    self._selector.register(flow.source, mask, partial(self._ready, link, flow, opposite))
            elif not mask:
                self._selector.unregister(flow.source)
            elif watched.events != mask:
                self._selector.modify(flow.source, mask, watched.data)

    def _ready(self, link: Link, flow: Flow, opposite: Flow, mask: int) -> None:
        """Read from a flow's source, and let the opposite flow, whose target that is, try again if it can."""
        if mask & selectors.EVENT_WRITE:
            opposite.blocked = False
        if not mask & selectors.EVENT_READ or not link.open:
            return
        try:
            data = flow.source.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            self._drop(link, reset=True)
            return
        if self._cuts(link, flow, data):
            return
        if flow is link.up:
            self.bytes_up += len(data)
            self.syncs += link.frontend.feed(data)
            link.asked = link.asked or bool(data)
        else:
            self.bytes_down += len(data)
            link.frontend.answered(data)
            self.round_trips += link.asked and bool(data)
            link.asked = link.asked and not data
            data = data.replace(*self._renamed)
            if self._passes is not None:
                data = data[: self._passes]
                self._passes -= len(data)
                if not data:
                    return
        flow.put(data, time.monotonic() + self.delay)

    def _cuts(self, link: Link, flow: Flow, data: bytes) -> bool:
        """Reset the link where that was asked for; return whether it was."""
        now = link.cut and flow is link.down
        if self._cut is not None and flow is link.up and self._cut[0] in data:
            link.cut, self._cut = self._cut[1], None
            now = not link.cut
        if now:
            self.cuts += 1
            self._drop(link, reset=True)
        return now

    def _advance(self, link: Link) -> None:
        """Pass on what is due in both directions and end the link when both have ended."""
        if self._stalled or link.forgotten:
            return
        try:
            for flow in link.flows:
                if not flow.blocked:
                    flow.send_due()
        except OSError:
            self._drop(link, reset=True)
            return
        if all(flow.ended and not flow.queue for flow in link.flows):
            self._drop(link, reset=False)
        else:
            self._watch(link)

    def _drop(self, link: Link, *, reset: bool) -> None:
        link.open = False
        self._watch(link)
        self._links.discard(link)
        for each in link.sockets:
            if reset:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            else:
                with contextlib.suppress(OSError):  # the peer may have ended it already
                    each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _reset_counts(self) -> None:
        self.connections = self.round_trips = self.syncs = self.bytes_up = self.bytes_down = 0

    def _reset_all(self) -> None:
        for link in list(self._links):
            self._drop(link, reset=True)

    def _close_all(self) -> None:
        for link in list(self._links):
            self._drop(link, reset=False)

    def _stop(self) -> None:
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
        self._reset_all()

    def _forget(self) -> None:
        for link in self._links:
            link.forgotten = True
            self._watch(link)

    def _stall(self, stalled: bool) -> None:
        self._stalled = stalled
        for link in self._links:
            self._watch(link)

"""A front that ends TLS before a server, as load balancers and managed databases have one."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from pathlib import Path
from typing import Any

SSL_REQUEST = struct.pack("!ii", 8, 80877103)


class TlsFront:
    """Takes TLS connections and passes them on in clear; it answers nothing else.

    :param direct: whether TLS begins at once, or after an SSLRequest.
    """

    def __init__(self, target: tuple[str, int], certificate: Path, key: Path, *, direct: bool) -> None:
        self._target, self._direct = target, direct
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._context.set_alpn_protocols(["postgresql"])
        self.in_clear: list[bytes] = []
        """What was sent without TLS."""
        self.open = True
        """Whether connections are taken; else they are reset."""
        self._links: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        """End all connections, and take no more."""
        self.open = False
        for link in list(self._links):
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the port up."""
        self.stop()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _run(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: Any) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(client.close)
            if not self.open:
                return
            if not self._direct:
                asked = client.recv(8)
                if asked != SSL_REQUEST:
                    self.in_clear.append(asked)
                    return
                client.sendall(b"S")
            client = stack.enter_context(self._context.wrap_socket(client, server_side=True))
            server = stack.enter_context(socket.create_connection(self._target))
            self._links |= {client, server}
            threading.Thread(target=self._pass, args=(server, client), daemon=True).start()
            self._pass(client, server)

    def _pass(self, source: Any, sink: Any) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for link in (source, sink):
            self._links.discard(link)
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)

"""The host names of servers, and the addresses that they stand for.

A name is resolved here, with each new connection, and not by libpq: it does so while psycopg holds the
interpreter's lock, and as long as a name server is silent no other thread would go on.
"""

from __future__ import annotations

import os
import socket
import threading
from time import monotonic
from typing import TYPE_CHECKING

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.pq import Conninfo, PGconn

from . import events
from .asking import Asking

if TYPE_CHECKING:
    from .config import EndpointConfig

PATIENCE = 0.5
"""Seconds that the system's resolver has where an earlier answer can take the place of its own."""

_NO_SUCH_NAME = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
_SOCKET_DIRECTORY = next((d for d in ("/var/run/postgresql", "/run/postgresql") if os.path.isdir(d)), "/tmp")


class UnresolvedError(psycopg.OperationalError):
    """A server's host name cannot be resolved."""


def destination(config: EndpointConfig) -> dict[str, str]:
    """Return libpq's parameters of a server, with what is left out: from PGHOST and its like, or a service.

    `host` is always there, and `hostaddr` where the host is not to be resolved.
    """
    defaults = Conninfo.get_defaults()
    params = {option.keyword.decode(): option.val.decode() for option in defaults if option.val}
    given = {key: str(value) for key, value in config.conninfo_params().items()}
    params.update(given)
    if "service" in params:
        params.update(_service(given))  # libpq's defaults come after a service's
    params.setdefault("host", params.get("hostaddr", _SOCKET_DIRECTORY))
    if is_address(params["host"]):
        params.setdefault("hostaddr", params["host"])
    return params


def is_address(host: str) -> bool:
    """Tell whether a host is an IP address, and not a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host.partition("%")[0])
        except (OSError, ValueError):
            continue
        return True
    return False


def _service(params: dict[str, str]) -> dict[str, str]:
    """Return the parameters with those of the service file, which libpq reads when it is to connect."""
    # It reads all parameters before it refuses one, and connects to nothing.
    pgconn = PGconn.connect_start(make_conninfo("", **{**params, "sslmode": "nothing"}).encode())
    try:
        found = {option.keyword.decode(): option.val.decode() for option in pgconn.info if option.val}
    finally:
        pgconn.finish()
    found.pop("sslmode", None)
    return found


class Name:
    """A server's host name.

    Several threads may ask at a time: each attribute is written in one assignment.
    """

    def __init__(self, host: str, port: str, label: str) -> None:
        self.host = host
        self._port = port
        self._label = label
        self.known: tuple[str, ...] = ()
        """The addresses that it stands for, as far as the resolver could last tell."""
        self._asking: Resolving | None = None
        self._lock = threading.RLock()  # a signal handler may come back to it
        self._warned = ""

    @classmethod
    def of(cls, config: EndpointConfig) -> Name | None:
        """Return that of a server, or None where there is nothing to resolve."""
        params = destination(config)
        host = params["host"]
        if "hostaddr" in params or host.startswith(("/", "@")) or "," in host:  # a service may list several
            return None
        return cls(host, params.get("port", "5432"), config.label)

    def ask(self) -> tuple[str, ...]:
        """Resolve it; where the resolver cannot tell, return what it last said.

        :raises UnresolvedError: there is no such name, or no answer, and none to remember.
        """
        try:
            found = socket.getaddrinfo(self.host, int(self._port), type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            if isinstance(error, UnicodeError) or error.errno in _NO_SUCH_NAME:
                self.known = ()
            if not self.known:
                raise UnresolvedError(f"failed to resolve host {self.host!r}: {error}") from error
            return self.remember(str(error))
        self.known = tuple(dict.fromkeys(str(address[0]) for *_, address in found))
        self._warned = ""
        return self.known

    def asking(self) -> Resolving:
        """Resolve it in a thread of its own; where that is under way already, that is the one."""
        with self._lock:
            if self._asking is None or self._asking.over:
                self._asking = Resolving(self)
            return self._asking

    def remember(self, reason: str) -> tuple[str, ...]:
        """Return the last answer in place of one that there is not, which is logged once."""
        if not self._warned:
            self._warned = reason
            text = "endpoint %s: its last addresses are used: host %r is not resolved: %s"
            events.ENDPOINT_NAME(text, self._label, self.host, reason, endpoint=self._label, reason=reason)
        return self.known


class Resolving(Asking[tuple[str, ...]]):
    """A name that is being resolved: with an earlier answer at hand, one waits for a moment only."""

    def __init__(self, name: Name) -> None:
        self._name = name
        super().__init__(name.ask, f"the addresses of {name.host!r}", UnresolvedError)

    @property
    def over(self) -> bool:
        """Whether the resolver has answered, or has failed."""
        return not super().under_way

    @property
    def under_way(self) -> bool:
        """Whether there is no answer to go by."""
        return not self.over and not (self._name.known and monotonic() >= self.began + PATIENCE)

    def wait(self, deadline: float) -> None:
        """Wait until there is one, at most until the deadline (`monotonic`)."""
        super().wait(min(deadline, self.began + PATIENCE) if self._name.known else deadline)

    def answer(self) -> tuple[str, ...]:
        """Return the addresses.

        :raises UnresolvedError: there are none.
        """
        if not self.over:
            return self._name.remember(f"no answer within {PATIENCE:.3g} s")
        return super().answer()

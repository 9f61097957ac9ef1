"""Resolves the host names of servers.

Names are resolved here, for each new connection, and not by libpq, which would do it while psycopg holds
the interpreter's lock: a silent name server would stop all threads.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

import psycopg
from psycopg.pq import Conninfo

from .._config.service_file import decoded, with_service
from .._util import log_events as events
from .._util.background_call import BackgroundCall, SingleFlight

if TYPE_CHECKING:
    from .._config.model import EndpointConfig

PATIENCE = 0.25
"""Seconds to wait for the system's resolver if an earlier answer can be used instead."""

_NO_SUCH_NAME = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
_SOCKET_DIRECTORY = next((d for d in ("/var/run/postgresql", "/run/postgresql") if os.path.isdir(d)), "/tmp")


class UnresolvedError(psycopg.OperationalError):
    """A server's host name cannot be resolved."""


class Place(NamedTuple):
    """One possible address of a server: a service file can list several."""

    host: str
    hostaddr: str
    port: str

    @property
    def named(self) -> bool:
        """Whether its host has to be resolved."""
        return not self.hostaddr and is_name(self.host)


def places(params: Mapping[str, str]) -> list[Place]:
    """Return the places of a `destination` in order, as libpq reads them.

    :raises UnresolvedError: the numbers of hosts, addresses and ports differ.
    """
    hosts, addresses, ports = (params.get(key, "").split(",") for key in ("host", "hostaddr", "port"))
    count = len(addresses) if params.get("hostaddr") else len(hosts)
    for what, found in (("hosts", hosts), ("addresses", addresses), ("port numbers", ports)):
        if len(found) not in (1, count):
            raise UnresolvedError(f"{len(found)} {what} are given, and {count} hosts")
    for port in ports:
        if port and not (port.isdigit() and 0 < int(port) < 65536):
            raise UnresolvedError(f"{port!r} is not a port number: it must be between 1 and 65535")
    lists = (found * (count if len(found) == 1 else 1) for found in (hosts, addresses, ports))
    return [
        Place(host or address or _SOCKET_DIRECTORY, address, port or "5432")
        for host, address, port in zip(*lists, strict=True)
    ]


def destination(config: EndpointConfig) -> dict[str, str]:
    """Return libpq's parameters of a server, with what is left out: from PGHOST and its like, or a service.

    `host` is always there, and `hostaddr` where the host is not to be resolved.
    """
    defaults = Conninfo.get_defaults()
    params = decoded(defaults)
    given = {key: str(value) for key, value in config.conninfo_params().items()}
    params.update(given)
    if "service" in params:
        params.update(with_service(given))  # libpq's defaults come after a service's
    params["host"] = params.get("host") or params.get("hostaddr") or _SOCKET_DIRECTORY
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


def is_name(host: str) -> bool:
    """Tell whether a host has to be resolved: it is neither an address nor a Unix socket."""
    return not host.startswith(("/", "@")) and not is_address(host)


class Name:
    """A server's host name.

    Several threads may ask at a time: each attribute is written in one assignment.

    :param known: the addresses that it stood for when somebody else asked.
    """

    def __init__(self, host: str, port: str, label: str, known: tuple[str, ...] = ()) -> None:
        self.host = host
        self.port = port
        self.known = known
        """The addresses that it stands for, as far as the resolver could last tell."""
        self.late = ""
        """Why they had to be used the last time, if the resolver did not tell in time."""
        self._label = label
        self._best = ""
        """The address that was last found to work."""
        self._one: SingleFlight[Resolving] = SingleFlight()

    @classmethod
    def of(cls, config: EndpointConfig, before: Name | None = None) -> Name | None:
        """Return that of a server, the one from before where it is the same; None if it has none."""
        if config.host and not is_name(config.host):
            return None
        return cls.at(destination(config), config.label, before)

    @classmethod
    def at(cls, params: dict[str, str], label: str, before: Name | None = None) -> Name | None:
        """Return that of a `destination`, as `of` does."""
        host, port = params["host"], params.get("port") or "5432"
        if "hostaddr" in params or not is_name(host) or "," in host or not port.isdigit():
            return None  # a service may list several; a port that is none is libpq's to refuse
        if before is not None and (before.host, before.port) == (host, port):
            return before
        return cls(host, port, label)

    def again(self) -> Name:
        """Return the name with what is known of it, for a forked child."""
        name = Name(self.host, self.port, self._label, self.known)
        name._best = self._best
        return name

    def prefer(self, address: str) -> None:
        """Remember an address that works: it is tried first."""
        if self._best != address:
            self._best = address
            self.known = self._ordered(self.known)

    def _ordered(self, addresses: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(dict.fromkeys(addresses), key=lambda address: address != self._best))

    def ask(self) -> tuple[str, ...]:
        """Resolve it; where the resolver cannot tell, return what it last said.

        :raises UnresolvedError: there is no such name, or no answer, and none to remember.
        """
        began = monotonic()
        try:
            found = socket.getaddrinfo(self.host, int(self.port), type=socket.SOCK_STREAM)
        except (OSError, ValueError) as error:
            known = self.known
            if not isinstance(error, OSError) or error.errno in _NO_SUCH_NAME:
                self.known = known = ()
            if not known:
                raise UnresolvedError(f"failed to resolve host {self.host!r}: {error}") from error
            self.note_late(str(error))
            return known
        self.known = known = self._ordered(str(address[0]) for *_, address in found)
        if monotonic() < began + PATIENCE:
            self.late = ""
        return known

    def asking(self) -> Resolving:
        """Resolve it in a thread of its own; where that is under way already, that is the one."""
        return self._one.asking(lambda: Resolving(self))

    def note_late(self, reason: str) -> None:
        """Remember, and log once, that the last answer is used in place of one that there is not."""
        if not self.late:
            self.late = reason
            text = "endpoint %s: its last addresses are used: host %r is not resolved: %s"
            events.ENDPOINT_NAME(text, self._label, self.host, reason, endpoint=self._label, reason=reason)


class Resolving(BackgroundCall[tuple[str, ...]]):
    """A name that is being resolved: with an earlier answer at hand, one waits for a moment only.

    Or not at all, where the resolver was late the last time.
    """

    def __init__(self, name: Name) -> None:
        self._name = name
        self._patience = 0.0 if name.late else PATIENCE
        super().__init__(name.ask, f"the addresses of {name.host!r}", UnresolvedError)

    @property
    def under_way(self) -> bool:
        """Whether there is nothing to go by yet."""
        return not self.over and not (self._name.known and monotonic() >= self.began + self._patience)

    def wait(self, deadline: float) -> None:
        """Wait as long as it is under way, at most until the deadline, or halfway with addresses at hand."""
        super().wait((monotonic() + deadline) / 2 if self._name.known else deadline)

    def answer(self) -> tuple[str, ...]:
        """Return the addresses.

        :raises UnresolvedError: there are none.
        """
        known = self._name.known
        if self.answered or not known:
            return super().answer()
        self._name.note_late("no answer in time")
        return known

"""Resolves the host names of servers.

Names are resolved here, for each new connection, and not by libpq. It would resolve them while psycopg holds
the interpreter's lock, so a silent name server would stop all threads.
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
    """Return libpq's parameters of a server, completed from a service or the environment (PGHOST and others).

    `host` is always set, `hostaddr` only if the host need not be resolved.
    """
    defaults = Conninfo.get_defaults()
    params = decoded(defaults)
    given = {key: str(value) for key, value in config.conninfo_params().items()}
    params.update(given)
    if "service" in params:
        params.update(with_service(given))  # a service overrides libpq's defaults
    params["host"] = params.get("host") or params.get("hostaddr") or _SOCKET_DIRECTORY
    if is_address(params["host"]):
        params.setdefault("hostaddr", params["host"])
    return params


def is_address(host: str) -> bool:
    """Return whether a host is an IP address, not a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host.partition("%")[0])
        except (OSError, ValueError):
            continue
        return True
    return False


def is_name(host: str) -> bool:
    """Return whether a host has to be resolved: it is neither an address nor a Unix socket."""
    return not host.startswith(("/", "@")) and not is_address(host)


class Name:
    """The host name of a server.

    Several threads may use it at a time: each attribute is written in one assignment.

    :param known: the addresses from an earlier resolution.
    """

    def __init__(self, host: str, port: str, label: str, known: tuple[str, ...] = ()) -> None:
        self.host = host
        self.port = port
        self.known = known
        """The addresses from the last successful resolution."""
        self.late = ""
        """Why the last resolution was late or failed; empty if it was neither."""
        self._label = label
        self._best = ""
        """The last address that worked."""
        self._one: SingleFlight[Resolving] = SingleFlight()

    @classmethod
    def of(cls, config: EndpointConfig, before: Name | None = None) -> Name | None:
        """Return the name of a server, `before` if it has not changed; None if the server has none."""
        if config.host and not is_name(config.host):
            return None
        return cls.at(destination(config), config.label, before)

    @classmethod
    def at(cls, params: dict[str, str], label: str, before: Name | None = None) -> Name | None:
        """Return the name of a `destination`, as `of` does."""
        host, port = params["host"], params.get("port") or "5432"
        if "hostaddr" in params or not is_name(host) or "," in host or not port.isdigit():
            return None  # a service may list several hosts; libpq refuses an invalid port
        if before is not None and (before.host, before.port) == (host, port):
            return before
        return cls(host, port, label)

    def again(self) -> Name:
        """Return a copy with the known addresses, for a forked child."""
        name = Name(self.host, self.port, self._label, self.known)
        name._best = self._best
        return name

    def prefer(self, address: str) -> None:
        """Note an address that works: it is tried first."""
        if self._best != address:
            self._best = address
            self.known = self._ordered(self.known)

    def _ordered(self, addresses: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(dict.fromkeys(addresses), key=lambda address: address != self._best))

    def ask(self) -> tuple[str, ...]:
        """Resolve the name; if the resolver fails, return the last known addresses.

        :raises UnresolvedError: the name does not exist, or the resolver failed and no address is known.
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
        """Resolve the name in a separate thread; a resolution in progress is shared."""
        return self._one.asking(lambda: Resolving(self))

    def note_late(self, reason: str) -> None:
        """Note, and log once, that the last known addresses are used for want of an answer."""
        if not self.late:
            self.late = reason
            text = "endpoint %s: its last addresses are used: host %r is not resolved: %s"
            events.ENDPOINT_NAME(text, self._label, self.host, reason, endpoint=self._label, reason=reason)


class Resolving(BackgroundCall[tuple[str, ...]]):
    """A resolution in progress. If addresses are known, callers wait only for a moment.

    If the resolver was late the last time, they do not wait at all.
    """

    def __init__(self, name: Name) -> None:
        self._name = name
        self._patience = 0.0 if name.late else PATIENCE
        super().__init__(name.ask, f"the addresses of {name.host!r}", UnresolvedError)

    @property
    def under_way(self) -> bool:
        """Whether callers have to wait: no answer, and no known addresses to use instead."""
        return not self.over and not (self._name.known and monotonic() >= self.began + self._patience)

    def wait(self, deadline: float) -> None:
        """Wait while it is in progress, until the deadline, or only halfway there if addresses are known."""
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

"""The parameters that must be obtained before a connection to a server can be opened."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from ..errors import CredentialError
from .host_names import UnresolvedError

if TYPE_CHECKING:
    from .credentials import Login
    from .host_names import Name


class ConnectParameters:
    """The addresses of the server, the user and the password for one connection.

    :param name: the host name of the server, if it has to be resolved.
    """

    def __init__(self, name: Name | None, login: Login) -> None:
        self._name, self._login = name, login
        self._resolving = name.asking() if name else None
        self._asking = login.asking() if login.calls else None

    @property
    def missing(self) -> str:
        """The parameters that are still missing; empty if everything is known."""
        if self._resolving is not None and self._resolving.under_way:
            return "address"
        return "user and password" if self._asking is not None and self._asking.under_way else ""

    def parameters(self) -> dict[str, str]:
        """Return everything as parameters of libpq.

        :raises UnresolvedError: the name of the server cannot be resolved.
        :raises CredentialError: user and password could not be obtained.
        """
        given: dict[str, str] = {}
        if self._name is not None and self._resolving is not None:
            addresses = self._resolving.answer()
            given["host"] = ",".join([self._name.host] * len(addresses))
            given["hostaddr"] = ",".join(addresses)
        given.update(self._login.ask() if self._asking is None else self._asking.answer())
        return given

    def within(self, deadline: float) -> dict[str, str]:
        """Wait for all parameters, at most until the deadline (`monotonic`), and return them.

        :raises UnresolvedError: as `parameters`, or the deadline has passed.
        :raises CredentialError: as `parameters`, or the deadline has passed.
        """
        timeout = max(deadline - monotonic(), 0.0)
        if self._name is not None and self._resolving is not None:
            self._resolving.wait(deadline)
            if not self._resolving.over and not self._name.known:
                raise UnresolvedError(f"host {self._name.host!r}: no address within {timeout:.1f} s")
        if self._asking is not None:
            self._asking.wait(deadline)
            if self._asking.under_way:
                raise CredentialError(f"no user and password within {timeout:.1f} s")
        return self.parameters()

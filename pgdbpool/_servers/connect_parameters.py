"""What has to be asked for before a connection to a server can be opened."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from ..errors import CredentialError
from .host_names import UnresolvedError

if TYPE_CHECKING:
    from .credentials import Login
    from .host_names import Name


class Arrival:
    """The server's addresses, the user and the password, for one connection.

    :param name: of the server, if it has one.
    """

    def __init__(self, name: Name | None, login: Login) -> None:
        self._name, self._login = name, login
        self._resolving = name.asking() if name else None
        self._asking = login.asking() if login.calls else None

    @property
    def missing(self) -> str:
        """What there is no answer to yet; empty where everything is known."""
        if self._resolving is not None and self._resolving.under_way:
            return "address"
        return "user and password" if self._asking is not None and self._asking.under_way else ""

    def parameters(self) -> dict[str, str]:
        """Return it all as parameters of libpq.

        :raises UnresolvedError: the server's name stands for nothing.
        :raises CredentialError: user and password could not be had.
        """
        given: dict[str, str] = {}
        if self._name is not None and self._resolving is not None:
            addresses = self._resolving.answer()
            given["host"] = ",".join([self._name.host] * len(addresses))
            given["hostaddr"] = ",".join(addresses)
        given.update(self._login.ask() if self._asking is None else self._asking.answer())
        return given

    def within(self, deadline: float) -> dict[str, str]:
        """Wait for what is missing, at most until the deadline (`monotonic`), and return the parameters.

        :raises UnresolvedError: as `parameters`, or time is up.
        :raises CredentialError: as `parameters`, or time is up.
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

"""Who logs in at a server: what is not fixed is asked for with each new connection.

No password is in a message here, nor is the text of what a function of the application raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import psycopg

from .._config.declarations import Refused
from .._config.password_file import read_password
from .._config.value_types import is_text
from .._util import log_events as events
from .._util.background_call import BackgroundCall, SingleFlight
from ..errors import CredentialError

if TYPE_CHECKING:
    from .._config.model import EndpointConfig


class Login:
    """User and password of one server.

    Several threads may ask at a time: each attribute is written in one assignment.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self._config = config
        self.user = config.user if isinstance(config.user, str) else None
        """The user's name as it was last given, for who asks the server without logging in."""
        self._read: tuple[object, str | None] = None, None
        """The state of `pass_file` when it was last read, and the password in it."""
        self._warned = ""
        self._one: SingleFlight[BackgroundCall[dict[str, str]]] = SingleFlight()
        self._other: SingleFlight[BackgroundCall[dict[str, str]]] = SingleFlight()

    @property
    def calls(self) -> bool:
        """Whether a function of the application is called for it, which may not return."""
        return callable(self._config.user) or callable(self._config.password)

    def asking(self) -> BackgroundCall[dict[str, str]]:
        """Ask in a thread of its own; where one that was begun before has not returned, that is the one."""
        return self._one.asking(partial(self._begin, self.ask))

    def again(self, deadline: float) -> dict[str, str]:
        """Return what `ask` gives now that a password was refused, within the deadline (`monotonic`).

        :raises CredentialError: as `ask`, or time is up.
        """
        ask = partial(self.ask, anew=True)
        if not self.calls:
            return ask()
        # Not the one that was begun before: it may know no better.
        asking = self._other.asking(partial(self._begin, ask))
        asking.wait(deadline)
        return asking.answer()

    @staticmethod
    def _begin(ask: Callable[[], dict[str, str]]) -> BackgroundCall[dict[str, str]]:
        return BackgroundCall(ask, "user and password", CredentialError)

    def ask(self, *, anew: bool = False) -> dict[str, str]:
        """Return libpq's `user` and `password` for one connection, where they are not libpq's to find.

        :param anew: read `pass_file` again whether or not it has changed.
        :raises CredentialError: a function failed, or returned something else than text.
        """
        config, given = self._config, {}
        if config.user is not None:
            given["user"] = self.user = self._value("user", config.user)
        if config.pass_file is not None:
            given["password"] = self._from_file(config.pass_file, anew)
        elif config.password is not None:
            given["password"] = self._value("pass", config.password)
        return given

    def _value(self, key: str, source: str | Callable[[], str]) -> str:
        if isinstance(source, str):
            return source
        name = f"the function for `{key}` of {self._config.label}"
        failure = ""
        try:
            value = source()
        except Exception as error:  # noqa: BLE001 - the application's function may raise anything
            failure = f"{name} raised {type(error).__name__}{_place(error)}"
        # Not in the handler: the error would have the function's as its context, and that any text.
        if failure:
            raise CredentialError(failure)
        if not isinstance(value, str):
            raise CredentialError(f"{name} returned a value of type {type(value).__name__}, not a string")
        if not value or not is_text(value):
            raise CredentialError(f"{name} returned {'NUL or no text' if value else 'an empty string'}")
        return value

    def _from_file(self, path: str, anew: bool) -> str:
        """Return the password of the file; the last one where it cannot be read, as while it is replaced."""
        read, password = self._read
        try:
            now = os.stat(path)  # of what a link points to, which is how Kubernetes replaces secrets
            state = (now.st_ino, now.st_mtime_ns, now.st_ctime_ns, now.st_size)
            if anew or state != read or password is None:
                password = read_password(path)
                self._read = state, password
                self._warned = ""
        except (OSError, Refused) as error:
            problem = error.strerror if isinstance(error, OSError) else error.problems[0][1]
            if problem != self._warned:
                self._warned = str(problem)
                label, text = self._config.label, "endpoint %s: pass_file is not read: %s"
                events.ENDPOINT_PASS_FILE(text, label, problem, endpoint=label, reason=self._warned)
            if password is None:
                password = str(self._config.password)  # as it was when the configuration was read
        return password


def refused(error: psycopg.Error) -> bool:
    """Tell whether a login failed after a password was sent, such as with SQLSTATE 28P01.

    libpq does not tell the SQLSTATE of a connect, and the text is in the server's language.
    """
    pgconn = error.pgconn
    return pgconn is not None and bool(pgconn.used_password)


def _place(error: BaseException) -> str:
    """Return where an error was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""

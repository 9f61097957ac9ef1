"""The login at a server: user and password, obtained again for each connection if they may change.

No message contains a password, nor the text of an exception that a callable of the application raised.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import psycopg

from .._config.declarations import Refused
from .._config.password_file import read_password
from .._config.text_types import is_text
from .._util import log_events as events
from .._util.background_call import BackgroundCall, SingleFlight
from ..errors import CredentialError

if TYPE_CHECKING:
    from .._config.model import EndpointConfig


class Login:
    """User and password of one server.

    Several threads may use it at a time: each attribute is written in one assignment.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self._config = config
        self.user = config.user if isinstance(config.user, str) else None
        """The last known user, for probes, which do not log in."""
        self._read: tuple[object, str | None] = None, None
        """The state of `pass_file` at the last read, and the password in it."""
        self._warned = ""
        self._one: SingleFlight[BackgroundCall[dict[str, str]]] = SingleFlight()
        self._other: SingleFlight[BackgroundCall[dict[str, str]]] = SingleFlight()

    @property
    def calls(self) -> bool:
        """Whether a callable of the application is involved, which may hang."""
        return callable(self._config.user) or callable(self._config.password)

    def asking(self) -> BackgroundCall[dict[str, str]]:
        """Obtain them in a separate thread; an earlier call that has not returned yet is shared."""
        return self._one.asking(partial(self._begin, self.ask))

    def again(self, deadline: float) -> dict[str, str]:
        """Return the result of `ask` after a refused password, within the deadline (`monotonic`).

        :raises CredentialError: as `ask`, or the deadline has passed.
        """
        ask = partial(self.ask, anew=True)
        if not self.calls:
            return ask()
        # Not a call that began before the refusal: it may return the old password.
        asking = self._other.asking(partial(self._begin, ask))
        asking.wait(deadline)
        return asking.answer()

    @staticmethod
    def _begin(ask: Callable[[], dict[str, str]]) -> BackgroundCall[dict[str, str]]:
        return BackgroundCall(ask, "user and password", CredentialError)

    def ask(self, *, anew: bool = False) -> dict[str, str]:
        """Return `user` and `password` for one connection, unless libpq has to find them itself.

        :param anew: read `pass_file` even if it has not changed.
        :raises CredentialError: a callable failed, or did not return text.
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
        # Outside the handler: otherwise the callable's exception, with any text, would be the context.
        if failure:
            raise CredentialError(failure)
        if not isinstance(value, str):
            raise CredentialError(f"{name} returned a value of type {type(value).__name__}, not a string")
        if not value or not is_text(value):
            raise CredentialError(f"{name} returned {'NUL or no text' if value else 'an empty string'}")
        return value

    def _from_file(self, path: str, anew: bool) -> str:
        """Return the password in the file, or the last one if the file cannot be read at the moment."""
        read, password = self._read
        try:
            now = os.stat(path)  # follows links: Kubernetes replaces secrets by switching one
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
                password = str(self._config.password)  # as of the reading of the configuration
        return password


def refused(error: psycopg.Error) -> bool:
    """Return whether a login failed after a password was sent, such as with SQLSTATE 28P01.

    libpq has no SQLSTATE for a failed connect, and the text is in the language of the server.
    """
    pgconn = error.pgconn
    return pgconn is not None and bool(pgconn.used_password)


def _place(error: BaseException) -> str:
    """Return the file and line that raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""

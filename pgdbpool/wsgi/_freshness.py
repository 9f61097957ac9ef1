"""The next request of a browser or a client sees what this one has written: it brings the token."""

from __future__ import annotations

import hmac
import re
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable, Iterator
from contextvars import copy_context
from time import time
from typing import TYPE_CHECKING, Any

from .._api.connection import Connection
from .._request.freshness import Seen, set_current
from .._util.token import Token
from ._context import in_context

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

SHORTEST = 16
"""Characters that the secret has at least."""
SIGNATURE = 22
"""Characters of the signature: 128 bits of it."""
_SIGNED = re.compile(r"([\w-]{27,1000})\.([0-9a-f]{1,16})\.([\w-]{22})", re.ASCII)
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


class ReadYourWritesMiddleware:
    """Lets each client read what it has written, though the reads come from standbys and other processes.

    A request that writes gives its client a signed token, in a cookie or a header; the next requests bring
    it, and their reads see the writes. A value that is forged, cut, too old, or of other servers counts
    as none.

    :param app: the WSGI application.
    :param secret: what signs the tokens: the same in all processes, 16 characters or bytes at least.
    :param max_age: seconds for which a token counts.
    :param cookie: the cookie's name. It is HttpOnly, SameSite=Lax, and Secure over https, and is dropped once
        each standby is known to have replayed the token.
    :param header: the header of requests and responses that carries the token, in place of a cookie.
    :param path: the cookie's path.
    :raises ValueError: a name is not one of a cookie or header, or the secret is too short.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *,
        secret: str | bytes,
        max_age: float = 60,
        cookie: str = "pgdbpool_seen",
        header: str | None = None,
        path: str = "/",
    ) -> None:
        self._secret = secret.encode() if isinstance(secret, str) else bytes(secret)
        if len(self._secret) < SHORTEST:
            raise ValueError(f"the secret has {len(self._secret)} characters: give {SHORTEST} at least")
        if isinstance(max_age, bool) or not 0 < max_age < 10**7:
            raise ValueError(f"max_age={max_age!r} is not a number of seconds: give the longest lag there is")
        for name in filter(None, (cookie, header)):
            if not _TOKEN.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of a cookie or header: use letters, digits and -")
        if re.search(r"[;,\s]", path):
            raise ValueError(f"path={path!r} is not the path of a cookie, such as '/'")
        self._app = app
        self._max_age = max_age
        self._cookie, self._header, self._path = cookie, header, path

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        token = self._read(environ)
        seen = Seen(token)
        seen.forgiving = True
        context = copy_context()
        context.run(set_current, seen)
        response = _Response(start_response, lambda: self._headers(environ, seen, token))
        body = in_context(context, self._app, environ, response.start)
        response.decide()  # the application is through, unless it is a generator
        return _Deferred(body, response)

    def _read(self, environ: WSGIEnvironment) -> Token | None:
        """Return the token that a request brings; None if it has none that counts."""
        if self._header is not None:
            given = environ.get("HTTP_" + self._header.upper().replace("-", "_"), "")
        else:
            given = _cookie(environ.get("HTTP_COOKIE", ""), self._cookie)
        if (found := _SIGNED.fullmatch(given)) is None:
            return None
        text, at, signature = found.groups()
        if not hmac.compare_digest(signature, self._sign(f"{text}.{at}")):
            return None
        if not -self._max_age <= time() - int(at, 16) <= self._max_age:
            return None
        try:
            return Token.parse(text)
        except ValueError:
            return None

    def _sign(self, text: str) -> str:
        digest = hmac.digest(self._secret, b"pgdbpool " + text.encode(), "sha256")
        return urlsafe_b64encode(digest).decode()[:SIGNATURE]

    def _headers(self, environ: WSGIEnvironment, seen: Seen, token: Token | None) -> list[tuple[str, str]]:
        """Return what the response has to say of the token."""
        if seen.written is not None and (now := seen.token) is not None:
            text = f"{now}.{int(time()):x}"
            return [self._set(environ, f"{text}.{self._sign(text)}", self._max_age)]
        if token is None or self._header is not None:
            return []
        gone = seen.token is None or Connection.is_everywhere(token)
        return [self._set(environ, "", 0)] if gone else []

    def _set(self, environ: WSGIEnvironment, value: str, max_age: float) -> tuple[str, str]:
        if self._header is not None:
            return self._header, value
        secure = "; Secure" if environ.get("wsgi.url_scheme") == "https" else ""
        attributes = f"Path={self._path}; Max-Age={int(max_age)}; HttpOnly; SameSite=Lax{secure}"
        return "Set-Cookie", f"{self._cookie}={value}; {attributes}"


def _cookie(text: str, name: str) -> str:
    """Return the value of a cookie, or nothing."""
    for part in text.split(";"):  # the others may be anything: a strict parser drops all for one of them
        key, _, value = part.partition("=")
        if key.strip() == name:
            return value.strip(' \t"')
    return ""


class _Response:
    """A response whose headers wait until the application has done its work, as far as that can be seen."""

    def __init__(self, start_response: StartResponse, headers: Callable[[], list[tuple[str, str]]]) -> None:
        self._start_response = start_response
        self._more = headers
        self._held: tuple[str, list[tuple[str, str]], Any] | None = None
        self._write: Callable[[bytes], object] | None = None

    def start(
        self, status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        """Hold the beginning back; an error after it was sent is passed on, as a server wants it."""
        if self._write is not None and exc_info is not None:
            return self._start_response(status, headers, exc_info)
        if self._held is not None and exc_info is None:
            raise AssertionError("start_response is called twice")
        self._held = status, headers, exc_info
        return self._send_first

    def _send_first(self, data: bytes) -> None:
        self.decide()
        assert self._write is not None
        self._write(data)

    def decide(self) -> None:
        """Send the beginning, if there is one and it was not sent."""
        if self._held is None or self._write is not None:
            return
        status, headers, exc_info = self._held
        whole = [*headers, *self._more()]
        self._write = (
            self._start_response(status, whole, exc_info) if exc_info else self._start_response(status, whole)
        )


class _Deferred:
    """A body whose first piece decides over the headers."""

    def __init__(self, body: Iterable[bytes], response: _Response) -> None:
        self._body = body
        self._steps: Iterator[bytes] = iter(body)
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            piece = next(self._steps)
        except StopIteration:
            self._response.decide()
            raise
        self._response.decide()
        return piece

    def close(self) -> None:
        if close := getattr(self._body, "close", None):
            close()

"""The next request of a browser or another client brings a token, and so sees the writes of this one."""

from __future__ import annotations

import hmac
import random
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
"""The least number of characters of the secret."""
SIGNATURE = 22
"""Characters of the signature: 128 bits of it."""
PLACES = 32
"""The most cookies of a client: one for each token that no later request of the client has taken over."""
_SIGNED = re.compile(r"([\w-]{27,1000})\.([0-9a-f]{1,16})\.([\w-]{22})", re.ASCII)
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


class ReadYourWritesMiddleware:
    """Lets each client read its own writes, although standbys and other processes serve the reads.

    A request that writes gives its client a signed token, in a cookie or a header; the next requests bring
    it, and their reads see the writes. A value that is forged, cut, too old, or of other servers counts
    as none.

    :param app: the WSGI application.
    :param secret: the key that signs the tokens: the same in all processes, at least 16 characters or bytes.
    :param max_age: seconds for which a token counts.
    :param cookie: the first part of the cookies' names: one, and more if requests that write overlap. They
        are HttpOnly, SameSite=Lax, and Secure over https, and are dropped once each standby is known to have
        replayed the token.
    :param header: the header of requests and responses that carries the token, in place of cookies; a
        request may bring several values, with commas between them.
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
        brought = self._read(environ)
        seen = Seen(_joined(brought))
        seen.forgiving = True
        context = copy_context()
        context.run(set_current, seen)
        response = _Response(start_response, lambda: self._headers(environ, seen, brought))
        body = in_context(context, self._app, environ, response.start)
        response.decide()  # the application is through, unless it is a generator
        return _Deferred(body, response)

    def _read(self, environ: WSGIEnvironment) -> dict[str, Token]:
        """Return the tokens that a request brings and that count, by the names of their cookies."""
        if self._header is not None:
            given = environ.get("HTTP_" + self._header.upper().replace("-", "_"), "")
            values = [(str(place), value.strip()) for place, value in enumerate(given.split(","))]
        else:
            values = list(_cookies(environ.get("HTTP_COOKIE", ""), self._cookie + "_"))
        found = ((name, self._verified(value)) for name, value in values)
        return {name: token for name, token in found if token is not None}

    def _verified(self, value: str) -> Token | None:
        """Return the token of a signed value; None if it does not count."""
        if (found := _SIGNED.fullmatch(value)) is None:
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

    def _headers(
        self, environ: WSGIEnvironment, seen: Seen, brought: dict[str, Token]
    ) -> list[tuple[str, str]]:
        """Return the response's headers for the token.

        Another request of the client may have written meanwhile, and its response may have come first. So
        only cookies that this request brought are dropped, and a new one takes another name if one is free.
        """
        if seen.written is not None and (now := seen.token) is not None:
            text = f"{now}.{int(time()):x}"
            value = f"{text}.{self._sign(text)}"
            if self._header is not None:
                return [(self._header, value)]
            free = [name for name in (f"{self._cookie}_{n}" for n in range(PLACES)) if name not in brought]
            name = random.choice(free or list(brought))
            dropped = [self._set(environ, other, "", 0) for other in brought if other != name]
            return [*dropped, self._set(environ, name, value, self._max_age)]
        if self._header is not None or (token := _joined(brought)) is None:
            return []
        if seen.token is None or Connection.is_everywhere(token):
            return [self._set(environ, name, "", 0) for name in brought]
        return []

    def _set(self, environ: WSGIEnvironment, name: str, value: str, max_age: float) -> tuple[str, str]:
        secure = "; Secure" if environ.get("wsgi.url_scheme") == "https" else ""
        attributes = f"Path={self._path}; Max-Age={int(max_age)}; HttpOnly; SameSite=Lax{secure}"
        return "Set-Cookie", f"{name}={value}; {attributes}"


def _joined(tokens: dict[str, Token]) -> Token | None:
    """Return one token for all of the tokens; None for none."""
    return Token([p for token in tokens.values() for p in token.positions]) if tokens else None


def _cookies(text: str, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the cookies whose names begin so, with their values."""
    for part in text.split(";"):  # the others may be anything: a strict parser drops all for one of them
        name, _, value = part.partition("=")
        if (name := name.strip()).startswith(prefix):
            yield name, value.strip(' \t"')


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
        """Hold the beginning back; that of an error is passed on if the server already has another."""
        if self._write is not None and exc_info is not None:
            return self._start_response(status, [*headers, *self._more()], exc_info)
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
    """A body whose first piece releases the headers."""

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

"""Access to the pages about an application's pools: by a token, or from this machine only."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

Permission = Callable[["WSGIEnvironment"], bool]

TOKEN_LENGTH = 16
"""The least number of characters of a token."""

PROXIED = ("HTTP_FORWARDED", "HTTP_X_FORWARDED_FOR", "HTTP_X_FORWARDED_HOST", "HTTP_X_REAL_IP", "HTTP_VIA")


class HTTPResponse(Exception):
    """Ends a request with this status and text."""

    def __init__(
        self, status: HTTPStatus, text: str, *headers: tuple[str, str], kind: str = "text/plain"
    ) -> None:
        super().__init__(text)
        self.status = status
        self.headers = headers
        self.kind = kind


class AccessCheck:
    """Admits requests that a function of the environ admits, or that bring a token, or local ones.

    :raises ValueError: `authorize` and `token` are both given, or the token is too short.
    """

    def __init__(self, authorize: Permission | None, token: str | None) -> None:
        if authorize is not None and token is not None:
            raise ValueError("give authorize or token: with both it is not clear which decides")
        if token is not None and len(token) < TOKEN_LENGTH:
            raise ValueError(f"the token has {len(token)} characters: give {TOKEN_LENGTH} at least")
        self._authorize = authorize
        self._token = token

    def admit(self, environ: WSGIEnvironment) -> None:
        """Let the request pass, or raise the answer that refuses it."""
        if self._token is not None:
            if not hmac.compare_digest(_given_token(environ).encode(), self._token.encode()):
                ask = ("WWW-Authenticate", 'Basic realm="pgdbpool", charset="UTF-8"')
                raise HTTPResponse(HTTPStatus.UNAUTHORIZED, "the token is missing or wrong", ask)
        elif self._authorize is not None:
            if not self._authorize(environ):
                raise HTTPResponse(HTTPStatus.FORBIDDEN, "you may not see this")
        elif not is_local(environ):
            raise HTTPResponse(
                HTTPStatus.FORBIDDEN,
                "this answers only its own machine: give the application a token or authorize",
            )


def is_local(environ: WSGIEnvironment) -> bool:
    """Return whether a request comes from this machine, and not through a proxy that a header reveals.

    The name in `Host` has to be a local one too: otherwise any web site could point its own name here.
    """
    host = environ.get("HTTP_HOST", "").lower()
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return (
        _is_loopback(environ.get("REMOTE_ADDR", ""))
        and (name == "localhost" or _is_loopback(name))
        and not any(environ.get(header) for header in PROXIED)
    )


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _given_token(environ: WSGIEnvironment) -> str:
    header: str = environ.get("HTTP_AUTHORIZATION", "")
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""

"""For WSGI: a request's tenant, deadline and token, bound for all of its code, and answers to probes."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterable
from contextvars import copy_context
from time import monotonic
from typing import TYPE_CHECKING, Any

from .._api.connection import Connection
from .._api.pools import Pools
from .._request import deadline as deadlines
from .._request.tenant import set_current
from ..errors import NotInitializedError
from ._context import in_context
from ._freshness import ReadYourWritesMiddleware
from ._status_page import StatusApp

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = [
    "DeadlineMiddleware",
    "HealthApp",
    "ReadYourWritesMiddleware",
    "StatusApp",
    "TenantMiddleware",
    "TenantRefused",
    "from_header",
    "from_host",
    "from_path",
    "mount",
]

Extractor = Callable[["WSGIEnvironment"], Any]


class TenantRefused(Exception):
    """Raised by an extractor: the request names a tenant that it may not have.

    :param status: the answer's status line, in place of the middleware's `refused`.
    """

    def __init__(self, message: str = "tenant refused", status: str | None = None) -> None:
        super().__init__(message)
        self.status = status


class TenantMiddleware:
    """Binds the tenant that the extractor finds, for the request and its response body.

    The application runs in a copy of the context, and so do each step of a streamed body and its
    `close()`: nothing is left in the thread, or greenlet, for the next request.

    :param app: the WSGI application.
    :param extractor: takes the environ and returns the tenant, or None if the request has none;
        it raises `TenantRefused` for one that is not allowed.
    :param missing: the status line of the answer to a request without a tenant; None lets it pass, and
        a group that requires a tenant then refuses its blocks.
    :param refused: the status line of the answer if the extractor raises `TenantRefused`.
    """

    def __init__(
        self,
        app: WSGIApplication,
        extractor: Extractor,
        *,
        missing: str | None = "400 Bad Request",
        refused: str = "403 Forbidden",
    ) -> None:
        for name, status in (("missing", missing), ("refused", refused)):
            if status is not None and not re.fullmatch(r"4[0-9]{2} .+", status):
                raise ValueError(f"{name}={status!r} is not a 4xx status line, such as '403 Forbidden'")
        self._app = app
        self._extractor = extractor
        self._missing = missing
        self._refused = refused

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            tenant = self._extractor(environ)
        except TenantRefused as refusal:
            return _answer(start_response, refusal.status or self._refused, str(refusal))
        if tenant is None and self._missing is not None:
            return _answer(start_response, self._missing, "this request needs a tenant")
        context = copy_context()
        context.run(set_current, tenant)
        return in_context(context, self._app, environ, start_response)


class DeadlineMiddleware:
    """Limits the time of each request, its response body included; see `pgdbpool.deadline`.

    :param app: the WSGI application. It answers `DeadlineExceeded` itself, as any error of the database.
    :param seconds: the time of a request, or a function of the environ that returns it, None for no
        deadline.
    """

    def __init__(
        self, app: WSGIApplication, seconds: float | Callable[[WSGIEnvironment], float | None]
    ) -> None:
        if not callable(seconds) and not seconds > 0:
            raise ValueError(f"seconds={seconds!r} is not a time for a request")
        self._app = app
        self._seconds = seconds

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        seconds = self._seconds(environ) if callable(self._seconds) else self._seconds
        if seconds is None:
            return self._app(environ, start_response)
        context = copy_context()
        context.run(deadlines.set_current, seconds)
        return in_context(context, self._app, environ, start_response)


def mount(app: WSGIApplication, path: str, mounted: WSGIApplication) -> WSGIApplication:
    """Return an application that answers with the mounted one below the path, and with the other elsewhere.

    :param path: such as ``/-/pools``; it begins with a slash and does not end with one.
    :raises ValueError: it does not.
    """
    if not re.fullmatch(r"(/[^/]+)+", path):
        raise ValueError(f"path={path!r} is not a path to mount at: write it as '/-/pools'")

    def both(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        asked = environ.get("PATH_INFO", "")
        if asked != path and not asked.startswith(f"{path}/"):
            return app(environ, start_response)
        script = environ.get("SCRIPT_NAME", "") + path
        return mounted({**environ, "SCRIPT_NAME": script, "PATH_INFO": asked[len(path) :]}, start_response)

    return both


class HealthApp:
    """Answers probes of an orchestrator or a load balancer with 200 or 503 and JSON, see :doc:`guide/health`.

    A path that ends in `/live` asks whether the process is worth keeping, and no server is asked. Any other
    asks whether it can serve requests. Servers are asked, at most once in `max_age` seconds for all probes.

    :param timeout: seconds that all servers together have for their answers.
    :param groups: the groups that must be served for a 200; None means all.
    :param max_age: seconds for which an answer is reused.
    :param details: whether the answer includes the report of `Connection.health`: labels of servers, and
        errors. Leave it out if the path is public.
    :param pools: the set of pools to ask about, instead of the default one.
    """

    def __init__(
        self,
        *,
        timeout: float = 2.0,
        groups: Iterable[str] | None = None,
        max_age: float = 1.0,
        details: bool = False,
        pools: Pools | None = None,
    ) -> None:
        if isinstance(groups, str):
            raise ValueError(f"groups={groups!r} is one name: give a list of them")
        if not timeout > 0 or max_age < 0:
            raise ValueError(f"timeout={timeout!r} must be above 0, max_age={max_age!r} not below")
        self._timeout = timeout
        self._groups = None if groups is None else tuple(groups)
        self._max_age = max_age
        self._details = details
        self._pools: Pools | type[Connection] = Connection if pools is None else pools
        self._asking = threading.Lock()
        self._last: tuple[int, float, bool, dict[str, Any]] | None = None

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _answer(
                start_response, "405 Method Not Allowed", "only GET and HEAD", ("Allow", "GET, HEAD")
            )
        live = environ.get("PATH_INFO", "").rstrip("/").endswith("/live")
        good, report = self._live() if live else self._ready()
        body = json.dumps(report).encode()
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
        ]
        start_response("200 OK" if good else "503 Service Unavailable", headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _live(self) -> tuple[bool, dict[str, Any]]:
        ended = self._pools.is_closing()
        return not ended, {"status": "ended" if ended else "alive", "pid": os.getpid()}

    def _ready(self) -> tuple[bool, dict[str, Any]]:
        last = self._fresh()
        if last is None:
            with self._asking:  # one request asks the servers, and the others take its answer
                last = self._fresh()
                if last is None:
                    good, report = self._ask()
                    self._last = last = (os.getpid(), monotonic(), good, report)
        return last[2], last[3]

    def _fresh(self) -> tuple[int, float, bool, dict[str, Any]] | None:
        last = self._last
        if last is None or last[0] != os.getpid() or monotonic() - last[1] > self._max_age:
            return None
        return None if self._pools.is_closing() else last

    def _ask(self) -> tuple[bool, dict[str, Any]]:
        try:
            report = self._pools.health(self._timeout)
        except NotInitializedError as error:
            return False, {"status": "unhealthy", "pid": os.getpid(), "error": str(error)}
        parts = report["groups"]
        wanted = parts if self._groups is None else self._groups
        good = all(name in parts and parts[name]["status"] != "unhealthy" for name in wanted)
        if self._details:
            return good, report
        states = {name: part["status"] for name, part in parts.items()}
        return good, {"status": report["status"], "pid": report["pid"], "groups": states}


def _answer(start_response: StartResponse, status: str, text: str, *headers: tuple[str, str]) -> list[bytes]:
    body = text.encode()
    start_response(
        status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body))), *headers]
    )
    return [body]


def from_header(name: str) -> Extractor:
    """Return an extractor that takes the tenant from a request header.

    Use it only behind a proxy that sets the header itself: a client can send any value.
    """
    key = "HTTP_" + name.upper().replace("-", "_")
    return lambda environ: environ.get(key) or None


def from_host(pattern: str) -> Extractor:
    """Return an extractor that takes the pattern's first group, matched against the whole host name."""
    return _from(
        pattern, lambda environ: re.sub(r":[0-9]+$", "", environ.get("HTTP_HOST", "").lower()), whole=True
    )


def from_path(pattern: str) -> Extractor:
    """Return an extractor that takes the first group of the pattern, matched at the start of the path."""
    return _from(pattern, lambda environ: environ.get("PATH_INFO", ""), whole=False)


def _from(pattern: str, text: Callable[[WSGIEnvironment], str], *, whole: bool) -> Extractor:
    compiled = re.compile(pattern)
    if compiled.groups < 1:
        raise ValueError(f"the pattern {pattern!r} has no group to take the tenant from")

    def extract(environ: WSGIEnvironment) -> str | None:
        match = compiled.fullmatch(text(environ)) if whole else compiled.match(text(environ))
        return match[1] or None if match else None

    return extract

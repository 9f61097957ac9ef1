"""The status page as a WSGI application: access, its addresses, drain and undrain."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Iterable
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from .._status.runtime_dir import RuntimeDir
from ..errors import NotInitializedError, RuntimeDirError
from ..overview import gather, own_runtime_dir, stranded
from ..wsgi import _status_html as statushtml
from ._access import AccessCheck, HTTPResponse, Permission

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

BODY_LIMIT = 4096
FORM_LIFETIME = 12 * 3600
"""Seconds for which a page's buttons work; a page that is open gets new ones."""

HEADERS = [
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
]
ASSETS = {"status.css": "text/css", "status.js": "text/javascript"}


class StatusApp:
    """The status page of all processes that publish in the `runtime_dir`; without it, of this one only.

    It shows all sets of pools of these processes: ``reports/read`` is a group of the set ``reports``.

    Mount it with `pgdbpool.wsgi.mount`, or by a framework's own means. Its addresses are the
    page itself, `status.json` with the same for programs, and `drain` and `undrain`.

    Without `authorize` and `token` it answers only requests from this machine, and none whose headers show
    a proxy: give one of the two before others can reach it.

    :param authorize: takes the environ and returns whether the request may see the page.
    :param token: the password that a browser asks for, with any user name; a program sends it as
        ``Authorization: Bearer ...``. At least 16 characters.
    :param actions: whether endpoints can be drained from the page: true, or a function of the environ.
        That needs the `runtime_dir`.
    :param runtime_dir: the directory to read, in place of that of the process's configuration.
    :raises ValueError: `authorize` and `token` are both given, or the token is too short.
    """

    def __init__(
        self,
        *,
        authorize: Permission | None = None,
        token: str | None = None,
        actions: bool | Permission = False,
        runtime_dir: str | None = None,
    ) -> None:
        self._access = AccessCheck(authorize, token)
        self._actions = actions
        self._runtime_dir = runtime_dir

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            self._access.admit(environ)
            self._route(environ)
        except HTTPResponse as found:
            answer = found
        except (RuntimeDirError, NotInitializedError, OSError) as error:
            answer = HTTPResponse(HTTPStatus.SERVICE_UNAVAILABLE, f"no status to show: {error}")
        body = str(answer).encode()
        headers = [
            *HEADERS,
            ("Content-Type", f"{answer.kind}; charset=utf-8"),
            ("Content-Length", str(len(body))),
            *answer.headers,
        ]
        start_response(f"{answer.status.value} {answer.status.phrase}", headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _may_act(self, environ: WSGIEnvironment) -> bool:
        return self._actions(environ) if callable(self._actions) else self._actions

    # The pages by path.

    def _route(self, environ: WSGIEnvironment) -> None:
        """Raise the answer."""
        path, method = environ.get("PATH_INFO", ""), environ["REQUEST_METHOD"]
        if not path and environ.get("SCRIPT_NAME"):
            # Links on the page are relative, so that no proxy in front can break them.
            here = environ["SCRIPT_NAME"].rpartition("/")[2]
            raise HTTPResponse(HTTPStatus.FOUND, "", ("Location", f"{here}/"))
        name = path.lstrip("/")
        wanted = "POST" if name in ("drain", "undrain") else "GET"
        if name not in ("", "status.json", "page.json", "drain", "undrain", *ASSETS):
            raise HTTPResponse(HTTPStatus.NOT_FOUND, "there is nothing at this address")
        if method != wanted and not (method == "HEAD" and wanted == "GET"):
            raise HTTPResponse(
                HTTPStatus.METHOD_NOT_ALLOWED, f"{method} is not allowed here", ("Allow", wanted)
            )
        if name in ASSETS:
            raise HTTPResponse(HTTPStatus.OK, asset(name), kind=ASSETS[name])
        if wanted == "POST":
            self._act(environ, drain=name == "drain")
        view = gather(self._runtime_dir)
        if name == "status.json":
            raise HTTPResponse(HTTPStatus.OK, json.dumps(view), kind="application/json")
        directory = self._directory()
        form = self._form_token(directory) if directory is not None and self._may_act(environ) else None
        if name == "page.json":
            sections = statushtml.sections(view, form, alone=directory is None)
            raise HTTPResponse(HTTPStatus.OK, json.dumps(sections), kind="application/json")
        text = statushtml.page(view, form, alone=directory is None)
        raise HTTPResponse(HTTPStatus.OK, text, kind="text/html")

    def _directory(self) -> str | None:
        return self._runtime_dir or own_runtime_dir()

    # Drain and undrain.

    def _act(self, environ: WSGIEnvironment, *, drain: bool) -> None:
        directory = self._directory()
        if directory is None or not self._may_act(environ):
            raise HTTPResponse(HTTPStatus.FORBIDDEN, "endpoints cannot be drained here: see `actions`")
        form = _form(environ)
        if environ.get("HTTP_SEC_FETCH_SITE", "same-origin") != "same-origin" or not self._is_ours(
            directory, form.get("form", "")
        ):
            raise HTTPResponse(HTTPStatus.FORBIDDEN, "this did not come from the page: load it again")
        label = form.get("endpoint", "")
        view = gather(self._runtime_dir)
        if label not in (endpoint["label"] for endpoint in view["endpoints"]):
            raise HTTPResponse(HTTPStatus.NOT_FOUND, f"there is no endpoint {label!r}")
        if drain and (why := stranded(view, label)):
            raise HTTPResponse(
                HTTPStatus.CONFLICT,
                f"{label} is not drained: {why}",
            )
        with RuntimeDir(directory) as room:
            room.order("drain" if drain else "undrain", endpoint=label, by="the status page")
        raise HTTPResponse(HTTPStatus.SEE_OTHER, "", ("Location", "./"))

    def _form_token(self, directory: str, at: int | None = None) -> str:
        """Return the secret of the page's forms, which only a reader of the page knows."""
        hour = int(time.time() // 3600 * 3600) if at is None else at
        with RuntimeDir(directory) as room:
            secret = room.secret()
        return f"{hour}.{hmac.new(secret, str(hour).encode(), hashlib.sha256).hexdigest()}"

    def _is_ours(self, directory: str, given: str) -> bool:
        hour = given.partition(".")[0]
        if not (hour.isascii() and hour.isdecimal() and len(hour) < 12):
            return False
        recent = 0 <= time.time() - int(hour) < FORM_LIFETIME
        return recent and hmac.compare_digest(self._form_token(directory, int(hour)).encode(), given.encode())


def _form(environ: WSGIEnvironment) -> dict[str, str]:
    length = environ.get("CONTENT_LENGTH") or "0"
    if not length.isdecimal() or int(length) > BODY_LIMIT:
        raise HTTPResponse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "this did not come from the page")
    try:
        text = environ["wsgi.input"].read(int(length)).decode("ascii")
    except UnicodeDecodeError:
        raise HTTPResponse(HTTPStatus.BAD_REQUEST, "this did not come from the page") from None
    return {name: values[0] for name, values in parse_qs(text).items()}


@cache
def asset(name: str) -> str:
    """Return the text of a file of the page."""
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")

"""An extension for Flask: pools with the application, a tenant and a deadline for each request.

    from pgdbpool.contrib.flask import PgDbPool

    pool = PgDbPool(tenant=lambda: current_user.tenant_id)

    def create_app():
        app = Flask(__name__)
        app.config["PGDBPOOL"] = "pgdbpool.yaml"
        pool.init_app(app)
        return app

It needs the extra `flask`. Blocks are opened as everywhere, with `Handler` in the view.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from contextvars import copy_context
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click
from flask import Flask, jsonify
from flask.cli import AppGroup, with_appcontext
from flask.globals import current_app, request

from .._api.connection import Connection
from .._cli import main as cli
from .._error_categories import Category
from .._request import deadline as deadlines
from .._request.tenant import set_current, tenant
from ..errors import (
    DBQueryError,
    Error,
    RateLimitExceeded,
    TenantConflictError,
    TenantRequiredError,
    classify,
)
from ..wsgi import HealthApp, StatusApp, mount
from ..wsgi._context import in_context

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment
    from flask.typing import ResponseReturnValue

__all__ = ["PgDbPool"]

_OWN_CONTEXT = "pgdbpool.context"
"""Key of the environ: the request runs in a separate context."""
_STACK = "pgdbpool.stack"
"""Key of the environ: the scopes to leave at the end of a request without a separate context."""
_PRESERVED = "werkzeug.debug.preserve_context"
"""Key of the environ: the test's client enters the request in the test's context again."""

_BUSY = (Category.UNAVAILABLE, Category.CONNECTION_LOST, Category.RESOURCE, Category.RETRYABLE)


class PgDbPool:
    """The pools of a Flask application.

    Its keys in `app.config`, all but the first optional:

    - `PGDBPOOL`: the argument of `Connection.init`: a mapping, a file's path, or None for the environment.
    - `PGDBPOOL_DEADLINE`: seconds that each request has, its streamed body included; see
      `pgdbpool.deadline`.
    - `PGDBPOOL_HEALTH`: the path at which probes are answered, such as ``/-/health``; see
      `pgdbpool.wsgi.HealthApp`.
    - `PGDBPOOL_STATUS`: the path of the status page, such as ``/-/pools``; see `pgdbpool.wsgi.StatusApp`.
    - `PGDBPOOL_STATUS_TOKEN`: the page's password. Without it the page answers only this machine.
    - `PGDBPOOL_ERRORS`: true to answer errors of the pool, and those that SQLAlchemy has wrapped, with JSON:
      503 and ``Retry-After`` if a retry helps, 504 if the time was up, 400 or 403 for a tenant, 429
      above a rate limit. An error that says that a statement or COMMIT may have taken effect stays a 500,
      since a client must not simply repeat it.

    :param app: the application; leave it out and call `init_app` later, in an application factory.
    :param tenant: returns the request's tenant, or None for none. It is called before the view, after the
        `before_request` functions that the application registered before `init_app`; if one of these
        answers the request, it is not called.
    :raises ConfigError: by `init_app`: the configuration is not valid.
    """

    def __init__(self, app: Flask | None = None, *, tenant: Callable[[], Any] | None = None) -> None:
        self._tenant = tenant
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Open the pools and attach the extension to the application.

        A later application's pools replace those of an earlier one in the same process, as in tests.

        :raises KeyError: `PGDBPOOL` is missing from `app.config`.
        :raises ValueError: a path or the deadline is not valid.
        :raises ConfigError: the configuration is not valid.
        :raises DBConnectionError: as `Connection.init` does.
        """
        config = app.config
        if "PGDBPOOL" not in config:
            raise KeyError(
                "app.config has no 'PGDBPOOL': set it to a mapping, to the path of a pgdbpool.yaml, "
                "or to None for the environment, before init_app"
            )
        seconds = config.get("PGDBPOOL_DEADLINE")
        if seconds is not None and (type(seconds) not in (int, float) or not seconds > 0):
            raise ValueError(f"PGDBPOOL_DEADLINE={seconds!r} is not a time: give seconds above 0")
        app.wsgi_app = self._wrapped(app)  # type: ignore[assignment, method-assign]
        app.before_request(self._begin)
        app.teardown_request(self._end)
        if config.get("PGDBPOOL_ERRORS"):
            app.register_error_handler(Error, _answer)
            if find_spec("sqlalchemy"):
                from sqlalchemy.exc import OperationalError

                app.register_error_handler(OperationalError, _answer_of_engine)
        app.cli.add_command(_commands)
        app.extensions["pgdbpool"] = self
        Connection.init(config["PGDBPOOL"])

    @staticmethod
    def _wrapped(app: Flask) -> WSGIApplication:
        """Return the application, each request in a separate context, with the pages beside it."""
        inner, config = app.wsgi_app, app.config

        def own_context(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            context = copy_context()
            if (seconds := config.get("PGDBPOOL_DEADLINE")) is not None:
                context.run(deadlines.set_current, seconds)
            body = in_context(context, inner, {**environ, _OWN_CONTEXT: True}, start_response)
            if _PRESERVED in environ:  # so a body of `stream_with_context` leaves the request in its context
                with closing(body):
                    return list(body)
            return body

        wrapped: WSGIApplication = own_context
        if path := config.get("PGDBPOOL_HEALTH"):
            wrapped = mount(wrapped, path, HealthApp())
        if path := config.get("PGDBPOOL_STATUS"):
            wrapped = mount(wrapped, path, StatusApp(token=config.get("PGDBPOOL_STATUS_TOKEN")))
        return wrapped

    def _begin(self) -> None:
        """Make the request's tenant the current one."""
        if self._tenant is None:
            return
        value = self._tenant()
        if _OWN_CONTEXT in request.environ:
            set_current(value)
            return
        # A request of `app.test_request_context()` runs in the caller's context and must leave nothing there.
        # Such contexts share `g` if one is inside another.
        request.environ.setdefault(_STACK, ExitStack()).enter_context(tenant(value))

    @staticmethod
    def _end(error: BaseException | None) -> None:
        stack = request.environ.pop(_STACK, None)  # none if an earlier function answered the request
        if stack is not None:
            stack.close()


def _answer_of_engine(error: Any) -> ResponseReturnValue:
    """Answer an error of the pool that SQLAlchemy has wrapped."""
    if not isinstance(error.orig, Error):
        raise error
    try:
        return _answer(error.orig)
    except Error:
        raise error from error.orig


def _answer(error: Error) -> ResponseReturnValue:
    """Answer an error of the pool, or raise it again if a client cannot act on it."""
    if isinstance(error, DBQueryError) and (error.maybe_executed or error.maybe_committed):
        raise error
    category = classify(error)
    if isinstance(error, RateLimitExceeded):
        status, headers = 429, {"Retry-After": str(max(1, round(error.retry_after)))}
    elif isinstance(error, TenantRequiredError):
        status, headers = 400, {}
    elif isinstance(error, TenantConflictError):
        status, headers = 403, {}
    elif category in _BUSY:
        status, headers = 503, {"Retry-After": "1"}
    elif category is Category.TIMEOUT:
        status, headers = 504, {}
    else:
        raise error
    current_app.logger.warning("%s", error)
    return jsonify(error=category.value), status, headers


_commands = AppGroup("pgdbpool", help="Look at the application's pools and their servers.")


def _command(name: str, place: str, brief: str) -> None:
    @_commands.command(
        name, help=brief, context_settings={"ignore_unknown_options": True}, add_help_option=False
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    @with_appcontext
    def command(arguments: tuple[str, ...]) -> None:
        def configured(options: argparse.Namespace) -> None:
            # the configuration that the command would be given
            setattr(options, place, current_app.config["PGDBPOOL"])

        raise SystemExit(cli.main([name, *arguments], adjust=configured))


_command(
    "check", "config", "Check the configuration and its servers: `pgdbpool check`, on the application's own."
)
_command("ping", "config", "Ask whether every group can be served: `pgdbpool ping`.")
_command("status", "place", "Show the pools of the running processes: `pgdbpool status`.")

"""An application and its response, run in the context of a request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextvars import Context
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


def in_context(
    context: Context, app: WSGIApplication, environ: WSGIEnvironment, start_response: StartResponse
) -> _Body:
    """Run the application, each step of its streamed body and its `close()` in the context."""
    return _Body(context, context.run(app, environ, start_response))


class _Body:
    """A response body, each step of which runs in the request's context."""

    def __init__(self, context: Context, body: Iterable[bytes]) -> None:
        self._context = context
        self._body = body
        self._steps: Iterator[bytes] | None = None

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._steps is None:
            self._steps = self._context.run(iter, self._body)
        return self._context.run(next, self._steps)

    def close(self) -> None:
        if close := getattr(self._body, "close", None):
            self._context.run(close)

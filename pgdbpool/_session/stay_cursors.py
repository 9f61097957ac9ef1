"""The cursors of a connection that is out of its pool: a unit of work begins with their statement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import psycopg

from .cursors import BlockClientCursor, BlockCursor
from .server_cursor import BlockServerCursor


class _Following:
    """A cursor whose connection may go on with another session."""

    __slots__ = ()
    _conn: Any
    _pgconn: Any
    _last_query: Any

    def _follow(self) -> None:
        """Go on with the session that the connection has now."""
        if self._pgconn is not (pgconn := vars(self._conn)["pgconn"]):
            self._pgconn, self._last_query = pgconn, None

    def _begin_alone(self) -> None:
        """Begin a unit of work for a statement that cannot ride."""
        self._conn.renew_alone()
        self._follow()


class StayCursor(_Following, BlockCursor):
    """A cursor whose statements begin units of work, each with the tenant that is current then."""

    __slots__ = ()
    _conn: Any

    def execute(
        self, query: Any, params: Any = None, *, prepare: bool | None = None, binary: bool | None = None
    ) -> StayCursor:
        """Execute a statement; it is sent again, once, if it was lost and can have had no effect."""
        attempt = partial(super().execute, query, params, prepare=prepare, binary=binary)
        self._conn.again(self._follow, attempt)
        return self

    def executemany(self, query: Any, params_seq: Iterable[Any], *, returning: bool = False) -> None:
        """Execute the statement for each of the parameter sets, as `execute` does for one."""
        sets = params_seq if isinstance(params_seq, (list, tuple)) else list(params_seq)
        attempt = partial(super().executemany, query, sets, returning=returning)
        self._conn.again(self._follow, attempt)

    def stream(self, query: Any, params: Any = None, **kwargs: Any) -> Iterator[Any]:
        """Iterate row by row over a result that the client does not hold as a whole."""
        self._begin_alone()
        yield from super().stream(query, params, **kwargs)

    @contextmanager
    def copy(self, statement: Any, params: Any = None, *, writer: Any = None) -> Iterator[psycopg.Copy]:
        """Start a COPY."""
        self._begin_alone()
        with super().copy(statement, params, writer=writer) as copy:
            yield copy


class StayClientCursor(StayCursor, BlockClientCursor):
    """Such a cursor that binds parameters at the client."""

    __slots__ = ()


class StayServerCursor(_Following, BlockServerCursor):
    """Such a cursor at the server."""

    __slots__ = ()
    _conn: Any

    def execute(self, query: Any, params: Any = None, **kwargs: Any) -> StayServerCursor:
        """Declare the cursor for the query."""
        self._begin_alone()
        super().execute(query, params, **kwargs)
        return self

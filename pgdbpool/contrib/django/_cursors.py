"""Django's cursors over connections of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.db.backends.postgresql.base import CursorMixin
from psycopg.client_cursor import ClientCursorMixin

from ..._session.stay_cursors import StayClientCursor, StayCursor, StayServerCursor
from . import schemas


class Reporting:
    """A cursor that reports its closing, and whose statements use the schema current at their execution."""

    at_close: Callable[[Any], None] | None = None
    _conn: Any

    def _begin_alone(self) -> None:
        schemas.follow(self._conn)
        super()._begin_alone()  # type: ignore[misc]

    def close(self) -> None:
        """Close the cursor."""
        super().close()  # type: ignore[misc]
        if self.at_close is not None:
            self.at_close(self)


class Riding(Reporting):
    """Such a cursor whose statements begin a unit of work by riding in it."""

    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        """Execute a statement in the current schema."""
        schemas.follow(self._conn)
        return super().execute(query, params, **options)  # type: ignore[misc]

    def executemany(self, query: Any, params_seq: Any, **options: Any) -> None:
        """Execute the statement for each of the parameter sets in the current schema."""
        schemas.follow(self._conn)
        super().executemany(query, params_seq, **options)  # type: ignore[misc]


class Cursor(Riding, CursorMixin, StayClientCursor):  # type: ignore[misc]
    """The cursor of the ORM, which binds parameters at the client."""


class ServerBindingCursor(Riding, CursorMixin, StayCursor):  # type: ignore[misc]
    """The cursor of the ORM with the option `server_side_binding`."""


class ServerSideCursor(Reporting, CursorMixin, ClientCursorMixin[Any], StayServerCursor):  # type: ignore[misc]
    """A named cursor that binds parameters at the client."""


class ServerBindingServerSideCursor(Reporting, StayServerCursor):
    """A named cursor with the option `server_side_binding`."""

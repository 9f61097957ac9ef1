"""Django's cursors over connections of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.db.backends.postgresql.base import CursorMixin
from psycopg.client_cursor import ClientCursorMixin

from ..._session.stay_cursors import StayClientCursor, StayCursor, StayServerCursor


class Reporting:
    """A cursor that says when it is closed."""

    at_close: Callable[[Any], None] | None = None

    def close(self) -> None:
        """Close the cursor."""
        super().close()  # type: ignore[misc]
        if self.at_close is not None:
            self.at_close(self)


class Cursor(Reporting, CursorMixin, StayClientCursor):  # type: ignore[misc]
    """The cursor of the ORM, which binds parameters at the client."""


class ServerBindingCursor(Reporting, CursorMixin, StayCursor):  # type: ignore[misc]
    """The cursor of the ORM with the option `server_side_binding`."""


class ServerSideCursor(Reporting, CursorMixin, ClientCursorMixin[Any], StayServerCursor):  # type: ignore[misc]
    """A named cursor that binds parameters at the client."""


class ServerBindingServerSideCursor(Reporting, StayServerCursor):
    """A named cursor with the option `server_side_binding`."""

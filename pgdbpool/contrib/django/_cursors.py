"""Django's cursors over connections of a group."""

from __future__ import annotations

from typing import Any

from django.db.backends.postgresql.base import CursorMixin
from psycopg.client_cursor import ClientCursorMixin

from ..._session.stay_cursors import StayClientCursor, StayCursor, StayServerCursor


class Cursor(CursorMixin, StayClientCursor):  # type: ignore[misc]
    """The cursor of the ORM, which binds parameters at the client."""


class ServerBindingCursor(CursorMixin, StayCursor):  # type: ignore[misc]
    """The cursor of the ORM with the option `server_side_binding`."""


class ServerSideCursor(CursorMixin, ClientCursorMixin[Any], StayServerCursor):  # type: ignore[misc]
    """A named cursor that binds parameters at the client."""

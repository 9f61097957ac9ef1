"""The backend: Django's own for PostgreSQL, with connections from a group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db.backends.postgresql import base
from django.db.backends.postgresql.psycopg_any import IsolationLevel
from django.db.utils import DatabaseError
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from ..._api.connection import Connection
from . import _checks, _groups, schemas
from ._adapters import overlay
from ._client import DatabaseClient
from ._cursors import (
    Cursor,
    Reporting,
    ServerBindingCursor,
    ServerBindingServerSideCursor,
    ServerSideCursor,
)
from ._hold import Holding


class Lent(base.DatabaseWrapper):  # type: ignore[misc]
    """A database whose connections come from a group of the pools."""

    client_class = DatabaseClient
    validation_class = _checks.DatabaseValidation
    group: str | None = None
    """The group from which the last connection came."""

    def __init__(self, settings_dict: dict[str, Any], alias: str = "default") -> None:
        if settings_dict["OPTIONS"].get("config") is not None and settings_dict["NAME"] == "":
            settings_dict["NAME"] = _groups.named_database(settings_dict) or ""
        super().__init__(settings_dict, alias)
        self._settled: tuple[dict[str, Any], dict[str, Any]] = {}, {}
        """Settings, and the parameters of a connection that were made of them."""

    @property
    def pool(self) -> None:
        """None: this backend's pool is not one of Django's."""
        return None

    def close_pool(self) -> None:
        """Close the idle connections to the database, which may be dropped then."""
        if database := self.settings_dict["NAME"]:
            _groups.forget(database)

    def get_connection_params(self) -> dict[str, Any]:
        """Return the settings of a connection: cursors, adapters, when statements are prepared."""
        given = self.settings_dict
        if self._settled[0] != given:  # tests and migrations change them
            params = self._make_params()
            self._settled = {**given, "OPTIONS": dict(given["OPTIONS"])}, params
        return dict(self._settled[1])

    def _make_params(self) -> dict[str, Any]:
        if problems := _checks.contradictions(self.settings_dict):
            raise ImproperlyConfigured("\n".join(f"{what} {remedy}" for what, remedy in problems))
        params: dict[str, Any] = super().get_connection_params()
        if params["cursor_factory"] is base.Cursor:
            params["cursor_factory"] = Cursor
        elif params["cursor_factory"] is base.ServerBindingCursor:
            params["cursor_factory"] = ServerBindingCursor
        own = _groups.own_options(self.settings_dict["OPTIONS"])
        return {name: value for name, value in params.items() if name not in own}

    def get_new_connection(self, conn_params: Mapping[str, Any]) -> Any:
        """Take a connection out of the group."""
        level = self._isolation_level()
        self.group = self.find_group()
        connection = Connection.getconn(self.group, skip=("django",))
        try:
            connection.row_factory = tuple_row
            connection.cursor_factory = conn_params["cursor_factory"]
            connection.server_cursor_factory = ServerBindingServerSideCursor
            connection.prepare_threshold = conn_params["prepare_threshold"]
            self._adapt(connection)
            connection.belong_to(self)
            if level is not None:
                connection.isolation_level = level
        except BaseException:
            connection.close()
            raise
        return connection

    def find_group(self) -> str:
        """Return the name of the group, which is added if it is missing.

        :raises django.core.exceptions.ImproperlyConfigured: the settings are not valid; says what to change.
        """
        return _groups.group_of(self.alias, self.settings_dict, self.timezone_name)

    def _adapt(self, connection: Any) -> None:
        """Register Django's adapters, over those that the group's `configure` has registered."""
        template = base.get_adapters_template(base.settings.USE_TZ, self.timezone)
        if connection.settled.attributes["_adapters"] is None:
            connection._adapters = template
            connection.mark(attributes=True)
        else:
            overlay(connection.adapters, template)

    def _isolation_level(self) -> Any:
        given = self.settings_dict["OPTIONS"].get("isolation_level")
        try:
            level = None if given is None else IsolationLevel(given)
        except ValueError:
            raise ImproperlyConfigured(
                f"Invalid transaction isolation level {given} specified. Use one of the "
                "psycopg.IsolationLevel values."
            ) from None
        self.isolation_level = IsolationLevel.READ_COMMITTED if level is None else level
        return level

    def close_if_health_check_failed(self) -> None:
        """Check a connection that outlasts a request; the group lends working connections only."""
        if self.settings_dict["CONN_MAX_AGE"] != 0:
            super().close_if_health_check_failed()

    def is_usable(self) -> bool:
        """Return whether the connection works, as the group finds out: without a round trip."""
        held = self.connection
        failed = held is None or held.closed or held.pgconn.transaction_status == TransactionStatus.INERROR
        return not failed and bool(held.alive())

    def create_cursor(self, name: str | None = None) -> Any:
        """Return a cursor; with a name it is one at the server."""
        if name and self.settings_dict["OPTIONS"].get("server_side_binding") is not True:
            cursor: Any = ServerSideCursor(
                self.connection, name=name, scrollable=False, withhold=self.connection.autocommit
            )
            self._set_timezone(cursor)
            return cursor
        cursor = super().create_cursor(name)
        if not isinstance(cursor, Reporting):  # of the `cursor_factory` of the settings
            schemas.follow(self.connection)
        return cursor

    # Otherwise an outer `atomic()` would silently give up a transaction that was lost in an inner one.

    def _savepoint_rollback(self, sid: str) -> None:
        """Roll back to a savepoint; if the transaction is lost, its commit raises."""
        try:
            super()._savepoint_rollback(sid)
        except DatabaseError:
            if not self.connection.stay.lost:
                raise

    def _savepoint_commit(self, sid: str) -> None:
        """Release a savepoint, unless it was lost with its transaction."""
        if not self.connection.stay.lost:
            super()._savepoint_commit(sid)

    def _set_timezone(self, cursor: Any) -> None:
        loader = self.connection.adapters.get_loader(base.TIMESTAMPTZ_OID, base.Format.TEXT)
        if self.timezone != loader.timezone:
            base.register_tzloader(self.timezone, cursor)


class DatabaseWrapper(Holding, Lent):
    """A database of Django's settings, as a group of the pools."""

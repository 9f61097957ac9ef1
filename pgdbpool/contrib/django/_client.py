"""`manage.py dbshell`."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

from django.db.backends.postgresql import client


class DatabaseClient(client.DatabaseClient):  # type: ignore[misc]
    """psql at the server to which the group has just lent a connection."""

    def runshell(self, parameters: Iterable[str]) -> None:
        """Open the shell."""
        with self.connection.temporary_connection():
            info = self.connection.connection.info
            found = {
                "HOST": info.host,
                "PORT": info.port,
                "USER": info.user,
                "PASSWORD": info.password,
                "NAME": info.dbname,
                "OPTIONS": info.get_parameters(),
            }
        client.DatabaseClient(SimpleNamespace(settings_dict=found)).runshell(parameters)

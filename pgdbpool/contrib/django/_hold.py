"""How long a database holds its connection: for a request, or only for each transaction or cursor."""

from __future__ import annotations

from functools import partial
from threading import get_ident
from typing import Any
from weakref import ref

from django.db.backends.postgresql import base

from ._cursors import Reporting

HOLDS = ("request", "transaction")
"""The values of `OPTIONS["hold"]`."""


class Holding(base.DatabaseWrapper):  # type: ignore[misc]
    """A database that gives its connection back between units of work, with `"hold": "transaction"`."""

    def __init__(self, settings_dict: dict[str, Any], alias: str = "default") -> None:
        super().__init__(settings_dict, alias)
        self._shortly = settings_dict["OPTIONS"].get("hold") == "transaction"
        self._open: set[ref[Any]] = set()
        """The cursors that are open, or the database itself while it connects."""

    def connect(self) -> None:
        """Connect; calls on the way there do not give the connection back."""
        self._open = {ref(self)}
        try:
            super().connect()
        finally:
            self._open.discard(ref(self))

    def get_autocommit(self) -> bool:
        """Return whether each statement is a separate transaction."""
        if self._shortly and self.connection is None and not self.in_atomic_block:
            return bool(self.settings_dict["AUTOCOMMIT"])
        return bool(super().get_autocommit())

    def set_autocommit(self, autocommit: bool, *arguments: Any, **options: Any) -> None:
        """End or begin autocommit mode; at the end of a transaction the connection is given back."""
        try:
            super().set_autocommit(autocommit, *arguments, **options)
        finally:  # a function of on_commit may have raised
            if self._shortly and autocommit and self.autocommit:
                self._let_go()

    def create_cursor(self, name: str | None = None) -> Any:
        """Return a cursor; when the last one is closed the connection is given back."""
        cursor = super().create_cursor(name)
        if self._shortly:
            self._open.add(ref(cursor, partial(_collected, ref(self), get_ident())))
            if isinstance(cursor, Reporting):
                cursor.at_close = self._closed
        return cursor

    def _closed(self, cursor: Any) -> None:
        self._ended(ref(cursor))

    def _ended(self, cursor: ref[Any]) -> None:
        """Give the connection back after its last cursor, outside a transaction."""
        self._open.discard(cursor)
        if self.autocommit and not self.in_atomic_block:
            self._let_go()

    def _let_go(self) -> None:
        """Give the connection back, if nothing is open on it."""
        if not self._open and self.connection is not None:
            self.close()


def _collected(database: ref[Holding], thread: int, cursor: ref[Any]) -> None:
    """End a cursor that was garbage-collected while it was open."""
    holder = database()
    if holder is None:
        return
    if get_ident() == thread:
        holder._ended(cursor)
    else:  # the database is another thread's, and gives the connection back after its next cursor
        holder._open.discard(cursor)

"""Reads from one database, writes to another."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.db import transaction


class ReadWriteRouter:
    """Read from the alias in `settings.PGDBPOOL_REPLICA` (``replica``), and write to ``default``.

    A read inside a transaction of ``default`` stays there, so that it sees its own writes.
    """

    def db_for_read(self, model: Any, **hints: Any) -> str:
        """Return the alias for a read."""
        if transaction.get_connection("default").in_atomic_block:
            return "default"
        return str(getattr(settings, "PGDBPOOL_REPLICA", "replica"))

    def db_for_write(self, model: Any, **hints: Any) -> str:
        """Return the alias for a write."""
        return "default"

    def allow_relation(self, one: Any, other: Any, **hints: Any) -> bool:
        """Allow all: both aliases are one database."""
        return True

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool:
        """Migrate only ``default``."""
        return db == "default"


__all__ = ["ReadWriteRouter"]

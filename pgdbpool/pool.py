"""The import path of 1.x: ``from pgdbpool import pool as dbpool``."""

from __future__ import annotations

from .connection import Connection
from .errors import DBConnectionError, DBOfflineError, DBQueryError, UnconfiguredGroupError
from .handler import Handler, Query

__all__ = [
    "Connection",
    "DBConnectionError",
    "DBOfflineError",
    "DBQueryError",
    "Handler",
    "Query",
    "UnconfiguredGroupError",
]

"""The import path of 1.x: ``from pgdbpool import pool as dbpool``."""

from __future__ import annotations

from ._api.connection import Connection
from ._api.handler import Handler, Query
from .errors import DBConnectionError, DBOfflineError, DBQueryError, UnconfiguredGroupError

__all__ = [
    "Connection",
    "DBConnectionError",
    "DBOfflineError",
    "DBQueryError",
    "Handler",
    "Query",
    "UnconfiguredGroupError",
]

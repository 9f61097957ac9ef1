"""A multi-endpoint PostgreSQL connection pool on psycopg 3 for WSGI and process-per-request servers.

>>> import pgdbpool as dbpool
>>> dbpool.Connection.init("pgdbpool.yaml")                             # doctest: +SKIP
>>> with dbpool.Handler("read") as db:                                  # doctest: +SKIP
...     rows = db.query("SELECT id, name FROM users").fetchall()
"""

from __future__ import annotations

from .connection import Connection
from .errors import (
    BlockClosedError,
    ConfigError,
    ConnectionLostError,
    DBConnectionError,
    DBOfflineError,
    DBQueryError,
    Error,
    NotInitializedError,
    PoolExhausted,
    PoolTimeout,
    QueryDeadlineError,
    TargetUnavailableError,
    ThreadingModelError,
    TooManyWaiting,
    TransactionAbortedError,
    UnconfiguredGroupError,
)
from .handler import Handler, Query
from .rows import Row

__version__ = "2.0.0.dev0"

__all__ = [
    "BlockClosedError",
    "ConfigError",
    "Connection",
    "ConnectionLostError",
    "DBConnectionError",
    "DBOfflineError",
    "DBQueryError",
    "Error",
    "Handler",
    "NotInitializedError",
    "PoolExhausted",
    "PoolTimeout",
    "Query",
    "QueryDeadlineError",
    "Row",
    "TargetUnavailableError",
    "ThreadingModelError",
    "TooManyWaiting",
    "TransactionAbortedError",
    "UnconfiguredGroupError",
    "__version__",
]

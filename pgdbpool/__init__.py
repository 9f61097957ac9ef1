"""A multi-endpoint PostgreSQL connection pool on psycopg 3 for WSGI and process-per-request servers.

>>> import pgdbpool as dbpool
>>> dbpool.Connection.init("pgdbpool.yaml")                             # doctest: +SKIP
>>> with dbpool.Handler("read") as db:                                  # doctest: +SKIP
...     rows = db.query("SELECT id, name FROM users").fetchall()
"""

from __future__ import annotations

from .categories import Category
from .connection import Connection
from .deadlines import deadline, time_left
from .errors import (
    BlockClosedError,
    ConfigError,
    ConnectionLostError,
    CredentialError,
    DBConnectionError,
    DBOfflineError,
    DBQueryError,
    DeadlineExceeded,
    Error,
    HoldExceededError,
    HookError,
    IdleInTransactionTimeoutError,
    IdleSessionTimeoutError,
    NotCleanError,
    NotInitializedError,
    NotReplicatedError,
    PoolExhausted,
    PoolTimeout,
    QueryDeadlineError,
    RateLimitExceeded,
    ReadOnlyServerError,
    ResultError,
    SettingError,
    TargetUnavailableError,
    TenantConflictError,
    TenantRequiredError,
    ThreadingModelError,
    TooManyWaiting,
    TransactionAbortedError,
    TransactionTimeoutError,
    UnconfiguredGroupError,
    UnknownEndpointError,
    UnsafeRoleError,
    classify,
)
from .handler import Handler, Query
from .retry import retrying, run
from .rows import Row
from .tenant import current_tenant, tenant
from .tracing import correlation, current_correlation

__version__ = "2.0.0.dev0"

__all__ = [
    "BlockClosedError",
    "Category",
    "ConfigError",
    "Connection",
    "ConnectionLostError",
    "CredentialError",
    "DBConnectionError",
    "DBOfflineError",
    "DBQueryError",
    "DeadlineExceeded",
    "Error",
    "Handler",
    "HoldExceededError",
    "HookError",
    "IdleInTransactionTimeoutError",
    "IdleSessionTimeoutError",
    "NotCleanError",
    "NotInitializedError",
    "NotReplicatedError",
    "PoolExhausted",
    "PoolTimeout",
    "Query",
    "QueryDeadlineError",
    "RateLimitExceeded",
    "ReadOnlyServerError",
    "ResultError",
    "Row",
    "SettingError",
    "TargetUnavailableError",
    "TenantConflictError",
    "TenantRequiredError",
    "ThreadingModelError",
    "TooManyWaiting",
    "TransactionAbortedError",
    "TransactionTimeoutError",
    "UnconfiguredGroupError",
    "UnknownEndpointError",
    "UnsafeRoleError",
    "__version__",
    "classify",
    "correlation",
    "current_correlation",
    "current_tenant",
    "deadline",
    "retrying",
    "run",
    "tenant",
    "time_left",
]

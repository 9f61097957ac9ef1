"""A multi-endpoint PostgreSQL connection pool on psycopg 3 for WSGI and process-per-request servers.

>>> import pgdbpool as dbpool
>>> dbpool.Connection.init("pgdbpool.yaml")                             # doctest: +SKIP
>>> with dbpool.Handler("read") as db:                                  # doctest: +SKIP
...     rows = db.query("SELECT id, name FROM users").fetchall()
"""

from ._api.connection import Connection
from ._api.copy import CopyInOptions, CopyOptions, CopyOutOptions
from ._api.handler import Handler, Query
from ._api.pools import Pools
from ._api.retry import retrying, run
from ._error_categories import Category
from ._request.correlation import correlation, current_correlation
from ._request.deadline import deadline, time_left
from ._request.freshness import Seen, read_your_writes
from ._request.tenant import current_tenant, tenant
from ._session.rows import Row
from ._util.token import Token
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
    StaleReadError,
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

__version__ = "2.0.0.dev0"

__all__ = [
    "BlockClosedError",
    "Category",
    "ConfigError",
    "Connection",
    "ConnectionLostError",
    "CopyInOptions",
    "CopyOptions",
    "CopyOutOptions",
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
    "Pools",
    "Query",
    "QueryDeadlineError",
    "RateLimitExceeded",
    "ReadOnlyServerError",
    "ResultError",
    "Row",
    "Seen",
    "SettingError",
    "StaleReadError",
    "TargetUnavailableError",
    "TenantConflictError",
    "TenantRequiredError",
    "ThreadingModelError",
    "Token",
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
    "read_your_writes",
    "retrying",
    "run",
    "tenant",
    "time_left",
]

"""The errors of the package: one hierarchy under `Error`, and what an error says about its connection.

An error raised by a statement is both `DBQueryError` and psycopg's own class, so that
``except psycopg.errors.UniqueViolation`` and ``except DBQueryError`` both catch it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import psycopg
from psycopg import errors as pg

from ._error_categories import Category, by_class, by_sqlstate


class Error(Exception):
    """The base class of the package's own errors."""

    category: Category | None = Category.USAGE
    """The result of `classify` for the class; None if the SQLSTATE decides it."""
    correlation_id: str | None = None
    """The id of the block that raised it; see `correlation`."""


class Problem(NamedTuple):
    """One problem of a configuration: the path of the key, and a message with the remedy."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ConfigError(Error, ValueError):
    """The configuration is not valid; `problems` lists every problem."""

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems: tuple[Problem, ...] = tuple(problems)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, tuple[Problem, ...]]]:
        return type(self), (str(self), self.problems)


class NotInitializedError(Error, RuntimeError):
    """`Connection.init()` was not called, or `close`, `terminate` or a signal has ended the pools."""


class UnconfiguredGroupError(Error, LookupError):
    """The configuration has no group of that name."""


class UnknownEndpointError(Error, LookupError):
    """The configuration has no endpoint of that label."""


class ThreadingModelError(Error, RuntimeError):
    """Two threads used a lock-free pool at once, or the process's threads do not suit the pools.

    Examples: gevent's monkey patch came too late, or `install_signal_handlers` ran outside the main thread.
    """


class SettingError(Error, ValueError):
    """A tenant or a local setting has a name or a value that cannot be bound."""


class TenantRequiredError(Error):
    """The group requires a tenant, and the block has none: nothing was sent."""

    category = Category.PERMISSION


class TenantConflictError(Error):
    """The block names a tenant that is not the current one: nothing was sent."""

    category = Category.PERMISSION


class UnsafeRoleError(Error):
    """The role that logs in bypasses row-level security, so tenants would not be kept apart.

    It arrives as the reason, and the cause, of a `DBConnectionError`.
    """

    category = Category.PERMISSION


class CredentialError(Error):
    """The function that gives a server's user or password failed: nothing was sent.

    It arrives as the reason, and the cause, of a `DBConnectionError`. The function's exception is given
    only by its class and place, since its text may hold a secret.
    """

    category = Category.UNAVAILABLE


class HookError(Error, RuntimeError):
    """A hook of a group failed: `configure` of a new connection, or `on_checkout` of a block.

    From `configure` it is the reason, and the cause, of a `DBConnectionError`. Its own cause is the hook's
    exception.
    """


class BlockClosedError(Error, psycopg.InterfaceError):
    """A Handler, a cursor or a connection was used outside its `with` block."""


class DBConnectionError(Error, psycopg.OperationalError):
    """No connection could be opened; `endpoints` gives each endpoint's own last error by label."""

    category = Category.UNAVAILABLE

    def __init__(
        self, *args: Any, group: str = "", endpoints: Mapping[str, str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.group = group
        self.endpoints: dict[str, str] = dict(endpoints or {})
        self.refused = False
        """Whether a server that is up refused the configuration, which does not pass by itself."""


class DBOfflineError(DBConnectionError):
    """Every endpoint of the group is known to be down, or went down during the request."""


class TargetUnavailableError(DBOfflineError):
    """Endpoints answer, but none has the role that the group's `target` asks for: worth a retry."""


class ServerFullError(DBConnectionError):
    """The servers admit no further connection (SQLSTATE 53300): a block waits within its `timeout`."""

    category = Category.RESOURCE
    pause = 0.0
    """Seconds until the next connect is worth a try."""


class PoolTimeout(DBConnectionError):
    """No connection became free within `timeout`; `holders` describes the blocks that have them."""

    category = Category.RESOURCE

    def __init__(
        self,
        *args: Any,
        in_use: int = 0,
        idle: int = 0,
        waiting: int = 0,
        holders: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.in_use = in_use
        self.idle = idle
        self.waiting = waiting
        self.holders: tuple[str, ...] = tuple(holders)


class PoolExhausted(PoolTimeout):
    """Every connection of a lock-free group is in use, by the one thread that could release one."""


class TooManyWaiting(PoolTimeout):
    """`max_waiting` requests are in the group's queue already."""


class RateLimitExceeded(DBConnectionError):
    """The group's `rate_limit` is reached; after `retry_after` seconds there is room for this one."""

    category = Category.RESOURCE

    def __init__(self, *args: Any, retry_after: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.retry_after = retry_after


class DeadlineExceeded(DBConnectionError, TimeoutError):
    """The time of `deadline()` is up, so nothing was sent."""

    category = Category.TIMEOUT


class RuntimeDirError(Error):
    """The `runtime_dir` cannot be used; the message says why, and how to fix it."""


class DBQueryError(Error):
    """A statement failed; the instance is also psycopg's own class, with `sqlstate` and `diag`.

    `maybe_executed`: the connection was lost while an autocommit statement was in progress,
    so it may or may not have taken effect. `maybe_committed`: the same for a COMMIT.
    """

    category: Category | None = None
    maybe_executed: bool = False
    maybe_committed: bool = False
    unsent: bool = False
    """Whether the driver refused the statement or its parameters, so that nothing was sent."""
    repeatable: bool = False
    """Whether the statement can be sent again: the first of its transaction, or a read-only server's."""

    def __reduce__(self) -> tuple[Any, ...]:
        reduced = super().__reduce__()  # psycopg's, which makes the server's fields picklable
        assert isinstance(reduced, tuple)
        own, driver = _parts(type(self))
        if driver is None:
            return reduced
        # A mixed class has no importable name: rebuild it from its two parts.
        _, args, state = reduced
        return _rebuild, (own, driver, args, state)


class ConnectionLostError(DBQueryError, psycopg.OperationalError):
    """The connection was lost during the block; the next block, or statement, gets another."""

    category = Category.CONNECTION_LOST


class TransactionTimeoutError(ConnectionLostError):
    """The transaction took longer than the server's `transaction_timeout` (SQLSTATE 25P04).

    The server ended the session. The statement is not sent again: it would take as long.
    """

    category = Category.TIMEOUT


class IdleInTransactionTimeoutError(ConnectionLostError):
    """The block left its transaction idle beyond `idle_in_transaction_session_timeout` (SQLSTATE 25P03).

    The server rolled it back and ended the session.
    """

    category = Category.TIMEOUT


class IdleSessionTimeoutError(ConnectionLostError):
    """The block left its connection idle beyond the server's `idle_session_timeout` (SQLSTATE 57P05).

    The server ended the session outside a transaction, and did not execute the statement.
    """


class NotCleanError(ConnectionLostError):
    """An earlier block's changes to the session could not be undone: nothing was sent after that."""

    repeatable = True


class NotReplicatedError(ConnectionLostError):
    """The transaction is committed on its server, and perhaps nowhere else: a failover may lose it.

    The wait for the synchronous standby was cancelled, for example by an administrator's `pg_cancel_backend`.
    The connection stays usable. Do not repeat the work: it is on its server.
    """

    maybe_committed = True


class ResultError(DBQueryError, psycopg.DataError):
    """A one-shot's statement was executed and committed, but Python cannot hold its result.

    Its cause is the exception of a loader or the row factory. Do not repeat it: it would take effect twice.
    """

    maybe_executed = True
    maybe_committed = True


class StaleReadError(DBQueryError, psycopg.OperationalError):
    """No server that the group reads from has replayed the writes that the block must see: nothing was read.

    `servers` has, by label, the position of each server that was asked. If `lost` is set, the writes may have
    been lost in a failover or a crash: they are beyond the point from which the new primary went on.
    """

    category = Category.UNAVAILABLE
    lost: bool = False

    def __init__(self, *args: Any, servers: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.servers: dict[str, str] = dict(servers or {})


class ReadOnlyServerError(DBQueryError, pg.ReadOnlySqlTransaction):
    """The server takes no writes (it is a standby now, or read only): worth a retry in another block.

    Nothing of the transaction was committed. The next block of a group with the target `primary` or
    `read-write` gets a connection to a server that takes writes.
    """


class TransactionAbortedError(DBQueryError, pg.InFailedSqlTransaction):
    """COMMIT of a transaction that had failed: it is rolled back, nothing was committed."""


class QueryDeadlineError(ConnectionLostError):
    """The server gave no answer within the statement's deadline: the connection was closed.

    The deadline is `query_timeout` and a second of grace, in which the server's own
    `statement_timeout` would have answered.
    """

    category = Category.TIMEOUT


class HoldExceededError(QueryDeadlineError):
    """The block had its connection for longer than the group's `max_hold`: it was taken away.

    Its statement was cancelled. An open transaction was rolled back; an autocommit statement that was
    under way may have taken effect.
    """


_mixed_classes: dict[tuple[type[DBQueryError], type[psycopg.Error]], type[DBQueryError]] = {}


def _mixed(own: type[DBQueryError], driver: type[psycopg.Error]) -> type[DBQueryError]:
    mixed = _mixed_classes.get((own, driver))
    if mixed is None:
        names = {"__module__": driver.__module__, "__mixed__": (own, driver)}
        mixed = _mixed_classes[own, driver] = type(driver.__name__, (own, driver), names)
    return mixed


def _parts(cls: type[DBQueryError]) -> tuple[type[DBQueryError], type[psycopg.Error] | None]:
    return getattr(cls, "__mixed__", (cls, None))


def _rebuild(
    own: type[DBQueryError], driver: type[psycopg.Error], args: tuple[Any, ...], state: dict[str, Any]
) -> DBQueryError:
    make: Callable[..., DBQueryError] = _mixed(own, driver)
    error = make(*args)
    error.__dict__.update(state)
    return error


def as_query_error(error: psycopg.Error, own: type[DBQueryError] = DBQueryError) -> DBQueryError:
    """Make a psycopg error also a `DBQueryError`, in place: traceback, cause and `diag` stay."""
    if not isinstance(error, DBQueryError):
        # Both are plain Python subclasses of Exception, so the layout is the same.
        error.__class__ = _mixed(own, type(error))  # type: ignore[assignment]
    return error  # type: ignore[return-value]


def without_frames(error: Exception) -> Exception:
    """Return a copy of an error to keep for later, without the frames of its traceback.

    A block that kept the error itself would hold its own Handler, which could not be dropped then.
    """
    try:
        twin = type(error).__new__(type(error), *error.args)
    except TypeError:  # an application's class, with another constructor
        return psycopg.Error(f"{type(error).__name__}: {error}")
    twin.__dict__.update(error.__dict__)
    return twin


def ends_session(error: psycopg.Error) -> bool:
    """Return whether the server ended the session with this error (severity FATAL or PANIC, class 08).

    Source: https://www.postgresql.org/docs/current/protocol-error-fields.html (field V).
    """
    return is_last_word(error.diag.severity_nonlocalized, error.sqlstate)


def is_last_word(severity: str | None, sqlstate: str | None) -> bool:
    """Return whether fields of an error say that the server ended the session; see `ends_session`."""
    if severity is not None:  # decides: an ERROR of class 08 comes from a foreign server
        return severity in ("FATAL", "PANIC")
    return (sqlstate or "").startswith("08")


_OWN_ENDS: dict[str | None, type[ConnectionLostError]] = {
    "25P03": IdleInTransactionTimeoutError,
    "25P04": TransactionTimeoutError,
    "57P05": IdleSessionTimeoutError,
}
_UNDONE = ("25P03", "40001", "57P05")
"""Ends of a session that say that its transaction was rolled back. 40001 is a standby's recovery conflict."""

_POOLERS_REFUSALS = ("query_wait_timeout", "server login has been failing")
"""Messages of PgBouncer, under SQLSTATE 08P01: it found no server for the statement."""


def end_of_session(error: psycopg.Error) -> type[ConnectionLostError]:
    """Return the class of an error with which a session has ended."""
    return _OWN_ENDS.get(error.sqlstate, ConnectionLostError)


def is_poolers_refusal(error: psycopg.Error) -> bool:
    """Return whether a pooler never passed the statement on: it had no server for it."""
    return error.sqlstate == "08P01" and str(error).startswith(_POOLERS_REFUSALS)


def undone(error: psycopg.Error) -> bool:
    """Return whether an end of the session says that nothing of the statement or COMMIT took effect."""
    return error.sqlstate in _UNDONE or is_poolers_refusal(error)


def classify(error: BaseException) -> Category:
    """Return the category of a failure: by the package's own class, else by SQLSTATE, else by class.

    A `TransactionAbortedError` or `HookError` has the category of its cause.
    """
    if isinstance(error, (TransactionAbortedError, HookError)) and isinstance(error.__cause__, psycopg.Error):
        return classify(error.__cause__)
    if isinstance(error, Error) and error.category is not None:
        return error.category
    sqlstate = error.sqlstate if isinstance(error, psycopg.Error) else None
    return by_sqlstate(sqlstate) if sqlstate else by_class(error)


def one_line(error: BaseException) -> str:
    """Return an error's text without line breaks, for messages that list several."""
    return " ".join(str(error).split()) or type(error).__name__

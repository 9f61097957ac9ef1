"""The categories of failures by SQLSTATE, for code that has to act on an error."""

from __future__ import annotations

import enum

import psycopg


class Category(enum.Enum):
    """A sort of failure, by the program's possible reaction."""

    CONNECTION_LOST = "connection lost"
    """The session ended during the work: ask again, if that can do no harm."""
    UNAVAILABLE = "unavailable"
    """No server can serve now: starting, stopping, down, or none of the right role. Come back later."""
    RETRYABLE = "retryable"
    """The server undid the transaction for another's sake: repeat it as a whole."""
    READ_ONLY = "read only"
    """A write reached a server, or a transaction, that takes none."""
    TIMEOUT = "timeout"
    """A time limit was exceeded: of a statement, a lock, the request."""
    RESOURCE = "resource"
    """A resource is used up: connections, queue, rate, memory, disk. Less load is the remedy."""
    CONSTRAINT = "constraint"
    """The data violate a constraint: unique, foreign key, check, not null, exclusion."""
    DATA = "data"
    """A value is not valid: out of range, malformed, division by zero."""
    PERMISSION = "permission"
    """Not allowed: login, privilege, row-level security, a missing or contradicting tenant."""
    SYNTAX = "syntax"
    """The statement is wrong: its grammar, a name that does not exist, an unsupported feature."""
    STATE = "state"
    """Not possible in this state of the transaction, the cursor or the object."""
    RAISED = "raised"
    """Raised by code in the database (`RAISE`, a routine, a trigger), or a user-defined SQLSTATE."""
    SERVER = "server"
    """The server or its files are broken: internal error, input and output, corruption."""
    USAGE = "usage"
    """The program uses the package or the driver wrongly: configuration, a closed block, parameters."""
    OTHER = "other"
    """Not an error of a database, or an unknown one."""


_C = Category

# https://www.postgresql.org/docs/current/errcodes-appendix.html
# The first two characters are the class; the entry of a code goes before that of its class.
_BY_CLASS: dict[str, Category] = {
    "02": _C.DATA, "03": _C.STATE, "08": _C.CONNECTION_LOST, "09": _C.RAISED, "0A": _C.SYNTAX, "0B": _C.STATE,
    "0F": _C.STATE, "0L": _C.PERMISSION, "0P": _C.PERMISSION, "0Z": _C.RAISED, "10": _C.SYNTAX,
    "20": _C.RAISED, "21": _C.DATA, "22": _C.DATA, "23": _C.CONSTRAINT, "24": _C.STATE, "25": _C.STATE,
    "26": _C.STATE, "27": _C.STATE, "28": _C.PERMISSION, "2B": _C.STATE, "2D": _C.STATE, "2F": _C.RAISED,
    "34": _C.STATE, "38": _C.RAISED, "39": _C.RAISED, "3B": _C.STATE, "3D": _C.SYNTAX, "3F": _C.SYNTAX,
    "40": _C.RETRYABLE, "42": _C.SYNTAX, "44": _C.CONSTRAINT, "53": _C.RESOURCE, "54": _C.RESOURCE,
    "55": _C.STATE, "57": _C.UNAVAILABLE, "58": _C.SERVER, "72": _C.STATE, "F0": _C.SERVER,
    "HV": _C.SERVER, "P0": _C.RAISED, "XX": _C.SERVER,
}  # fmt: skip
_BY_CODE: dict[str, Category] = {
    "25006": _C.READ_ONLY,  # read_only_sql_transaction
    "25P03": _C.TIMEOUT,  # idle_in_transaction_session_timeout
    "25P04": _C.TIMEOUT,  # transaction_timeout
    "40002": _C.CONSTRAINT,  # transaction_integrity_constraint_violation
    "40003": _C.CONNECTION_LOST,  # statement_completion_unknown
    "42501": _C.PERMISSION,  # insufficient_privilege
    "55P03": _C.TIMEOUT,  # lock_not_available: lock_timeout, or NOWAIT
    "57014": _C.TIMEOUT,  # query_canceled: statement_timeout, or a user's request
    "57P01": _C.CONNECTION_LOST,  # admin_shutdown
    "57P02": _C.CONNECTION_LOST,  # crash_shutdown
    "57P04": _C.CONNECTION_LOST,  # database_dropped
    "57P05": _C.CONNECTION_LOST,  # idle_session_timeout
}


def by_sqlstate(sqlstate: str) -> Category:
    """Return the category of an SQLSTATE, by the code itself or by its class."""
    # A code that PostgreSQL's list does not have was made up by a routine.
    return _BY_CODE.get(sqlstate) or _BY_CLASS.get(sqlstate[:2], Category.RAISED)


# psycopg's own errors have no SQLSTATE; the first matching class counts.
_BY_DRIVER: tuple[tuple[type[Exception], Category], ...] = (
    (psycopg.errors.ConnectionTimeout, Category.TIMEOUT),
    (psycopg.errors.CancellationTimeout, Category.TIMEOUT),
    (psycopg.OperationalError, Category.CONNECTION_LOST),
    (psycopg.IntegrityError, Category.CONSTRAINT),
    (psycopg.DataError, Category.DATA),
    (psycopg.Error, Category.USAGE),
    (TimeoutError, Category.TIMEOUT),
    (ConnectionError, Category.CONNECTION_LOST),
)


def by_class(error: BaseException) -> Category:
    """Return the category of an error that has no SQLSTATE, by its class."""
    return next((category for kind, category in _BY_DRIVER if isinstance(error, kind)), Category.OTHER)

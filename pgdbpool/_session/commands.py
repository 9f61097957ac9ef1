"""The commands that go before a statement, as text and parameters, and the states that decide which.

They are a cleaning if the last borrower may have changed the session, `BEGIN` in a manual-commit group,
and the tenant and local settings, always with `set_config(name, value, is_local => true)`. They travel in
one pipeline with the statement, without a Sync in between. So they cost no round trip, and if one of them
fails, PostgreSQL skips the rest up to the Sync and the statement does not run. A local setting ends with
its transaction, so no tenant is left in a session for the next block.
"""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import pq, sql

from .._request.tenant import Bound
from ..errors import SettingError

# libpq returns its states as plain numbers, which compare faster than an enumeration.
IDLE = int(pq.TransactionStatus.IDLE)
INTRANS = int(pq.TransactionStatus.INTRANS)
UNKNOWN = int(pq.TransactionStatus.UNKNOWN)
ACTIVE = int(pq.TransactionStatus.ACTIVE)
INERROR = int(pq.TransactionStatus.INERROR)
OPEN = (INTRANS, INERROR)
OVER = (IDLE, UNKNOWN)
BAD = int(pq.ConnStatus.BAD)
TUPLES_OK = int(pq.ExecStatus.TUPLES_OK)  # the states below it are successes too
FATAL = int(pq.ExecStatus.FATAL_ERROR)

Command = tuple[bytes, Sequence[bytes | None] | None]
"""A statement of the preamble with its parameters in text format."""

NOTHING: tuple[Command, ...] = ()
EMPTY: tuple[Command, ...] = ((b"", None),)
BEGIN: tuple[Command, ...] = ((b"BEGIN", None),)
COMMIT: tuple[Command, ...] = ((b"COMMIT", None),)

# The steps of DISCARD ALL, which is refused in a pipeline; plans and psycopg's prepared statements stay.
# A separate transaction: a rollback by the borrower must not undo the cleaning, and the borrower's BEGIN
# must not take its modes from default_transaction_* settings of the previous borrower.
CLEANING: tuple[Command, ...] = (
    (b"BEGIN", None),
    (b"SET SESSION AUTHORIZATION DEFAULT", None),
    (b"RESET ROLE", None),
    (b"RESET ALL", None),
    (b"CLOSE ALL", None),
    (b"UNLISTEN *", None),
    (b"SELECT pg_catalog.pg_advisory_unlock_all()", None),
    (b"DISCARD TEMP", None),
    (b"DISCARD SEQUENCES", None),
    (b"COMMIT", None),
)

FORBID_WRITES = b"SET default_transaction_read_only = on"
"""The first command in sessions of read-only groups, since their standby may be promoted meanwhile."""

CLEANING_TO_READ: tuple[Command, ...] = (*CLEANING[:-1], (FORBID_WRITES, None), CLEANING[-1])
"""The cleaning of a read-only session: RESET ALL alone would allow writes."""

INHERIT_PATIENCE = -1.0
"""The patience of a block without a statement_timeout: the connection's own applies."""


def set_local(settings: Bound, encoding: str = "utf-8") -> tuple[Command, ...]:
    """Return the command that binds the settings to the transaction; all are parameters."""
    if not settings:
        return NOTHING
    calls = ",".join(f"pg_catalog.set_config(${2 * i + 1},${2 * i + 2},true)" for i in range(len(settings)))
    try:
        values = [part.encode(encoding) for pair in settings for part in pair]
    except UnicodeEncodeError:
        raise _unencodable(settings, encoding) from None
    return ((f"SELECT {calls}".encode(), values),)


def _unencodable(settings: Bound, encoding: str) -> SettingError:
    """Return the error for settings that the session's encoding cannot represent."""
    for name, value in settings:
        try:
            f"{name}{value}".encode(encoding)
        except UnicodeEncodeError:
            break
    shown = repr(value) if len(value) <= 60 else repr(value[:57]) + "..."
    return SettingError(
        f"setting {name!r}: {shown} cannot be written in the session's encoding ({encoding}): use a value of "
        "its characters, or sessions in UTF8 (client_encoding in the server's options)"
    )


def begins(commands: Sequence[Command]) -> bool:
    """Return whether they begin a transaction: then no earlier part of it is lost with their statement."""
    return any(text.startswith(b"BEGIN") for text, _ in commands)


def deallocate(keep: Sequence[str]) -> bytes:
    """Return the statement that drops statements made by PREPARE; psycopg's, made by the protocol, stay."""
    kept = "".join(f" AND name <> {_literal(name)}" for name in keep)
    body = (
        "DECLARE n text; BEGIN FOR n IN SELECT name FROM pg_catalog.pg_prepared_statements "
        f"WHERE from_sql{kept} LOOP EXECUTE pg_catalog.format('DEALLOCATE %I', n); END LOOP; END"
    )
    return f"DO {_literal(body)}".encode()


def _literal(text: str) -> str:
    return sql.Literal(text).as_string()

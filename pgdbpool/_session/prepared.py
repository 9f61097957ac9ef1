"""Prepared statements that the server no longer has, or whose result has other columns now.

They are forgotten, and a statement outside of a transaction is sent once more. The server finds the fault
when it takes up the statement or its plan, before it executes it. So all that was done is what rode before
it, and that was rolled back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import psycopg
from psycopg import pq

from .block import BEGIN, COMMIT, IDLE, NOTHING, Command

if TYPE_CHECKING:
    from .connection import PooledConnection

ROLLBACK: tuple[Command, ...] = ((b"ROLLBACK", None),)

_INERROR = int(pq.TransactionStatus.INERROR)
# The texts are translated, the names of the server's functions are not.
# https://www.postgresql.org/docs/current/protocol-error-fields.html
_RAISED_BY = {
    "0A000": "RevalidateCachedQuery",  # cached plan must not change result type
    "26000": "FetchPreparedStatement",  # prepared statement does not exist
    "42P05": "StorePreparedStatement",  # prepared statement already exists
}


def is_stale(error: psycopg.Error) -> bool:
    """Return whether the session's prepared statements are not what the client takes them for."""
    function = _RAISED_BY.get(error.sqlstate or "")
    return function is not None and error.diag.source_function == function


def before_resending(
    conn: PooledConnection, error: psycopg.Error, preamble: Sequence[Command]
) -> tuple[Command, ...] | None:
    """Forget the session's prepared statements after such an error and return what is sent first then.

    It is None if the statement must not be sent again: in a transaction that was open before, and after any
    other error.
    """
    if not is_stale(error):
        return None
    conn.forget_statements()
    status, undo = conn.pgconn.transaction_status, NOTHING
    if status == _INERROR and any(text.startswith(b"BEGIN") for text, _ in preamble):
        undo = ROLLBACK  # the transaction began with this statement, so nothing else is lost with it
    elif status != IDLE:
        return None
    dropping, conn.dropping = conn.dropping, NOTHING
    return (*undo, *dropping, *preamble)


def dropping(names: Iterable[bytes]) -> tuple[Command, ...]:
    """Return the commands that drop those of the prepared statements that there are.

    In a transaction of their own, as a cleaning is.
    """
    listed = b", ".join(b"'%s'" % name for name in names)
    body = (
        b"DO $$DECLARE n text; BEGIN FOR n IN SELECT name FROM pg_catalog.pg_prepared_statements "
        b"WHERE name IN (%s) LOOP EXECUTE pg_catalog.format('DEALLOCATE %%I', n); END LOOP; END$$"
    )
    return (*BEGIN, (body % listed, None), *COMMIT)

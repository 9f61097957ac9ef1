"""Prepared statements that the server no longer has, or whose result has other columns now.

They are forgotten, and a statement outside a transaction is sent once more. The server detects the fault
when it looks up the statement or its plan, before executing it. So only the commands sent ahead of it have
run, and they were rolled back.
"""

from __future__ import annotations

from collections.abc import Iterable

import psycopg

from .commands import BEGIN, COMMIT, Command

ROLLBACK: tuple[Command, ...] = ((b"ROLLBACK", None),)

# The texts are translated, the names of the server's functions are not.
# https://www.postgresql.org/docs/current/protocol-error-fields.html
_RAISED_BY = {
    "0A000": "RevalidateCachedQuery",  # cached plan must not change result type
    "26000": "FetchPreparedStatement",  # prepared statement does not exist
    "42P05": "StorePreparedStatement",  # prepared statement already exists
}


def is_stale(error: psycopg.Error) -> bool:
    """Return whether the server's prepared statements differ from the client's record of them."""
    function = _RAISED_BY.get(error.sqlstate or "")
    return function is not None and error.diag.source_function == function


def dropping(names: Iterable[bytes]) -> tuple[Command, ...]:
    """Return the commands that drop these prepared statements, skipping any that do not exist.

    They run in a separate transaction, as a cleaning does.
    """
    listed = b", ".join(b"'%s'" % name for name in names)
    body = (
        b"DO $$DECLARE n text; BEGIN FOR n IN SELECT name FROM pg_catalog.pg_prepared_statements "
        b"WHERE name IN (%s) LOOP EXECUTE pg_catalog.format('DEALLOCATE %%I', n); END LOOP; END$$"
    )
    return (*BEGIN, (body % listed, None), *COMMIT)

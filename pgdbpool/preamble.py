"""What a block needs before a statement: its preamble, made of plain commands.

That is a cleaning where the last borrower may have left something in the session, `BEGIN` in a
manual-commit group, and the tenant and local settings, always with `set_config(name, value,
is_local => true)`. It travels in one pipeline with the statement, with no Sync between. So it costs no
round trip, and when any part of it fails PostgreSQL skips the rest up to the Sync: the statement did
not run. And since a local setting ends with its transaction, no tenant is ever left in a session for
the next block to find.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import get_ident
from types import CodeType
from typing import TYPE_CHECKING, Any
from weakref import ref

from psycopg import pq, sql

from .tenant import Bound

if TYPE_CHECKING:
    from .session import PooledConnection

IDLE = pq.TransactionStatus.IDLE
INTRANS = pq.TransactionStatus.INTRANS

Command = tuple[bytes, Sequence[bytes | None] | None]
"""A statement of the preamble with its parameters in text format."""

NOTHING: tuple[Command, ...] = ()
BEGIN: tuple[Command, ...] = ((b"BEGIN", None),)

# DISCARD ALL without what may stay (plans, psycopg's prepared statements): it is refused in a pipeline.
# In a transaction of its own, so that nothing of it is undone with the borrower's, and so that the
# borrower's BEGIN takes no default_transaction_* of the last one's.
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

GRACE = 1.0
"""Seconds that the client waits beyond the server's own statement_timeout."""


KEEP = -1.0
"""The patience of a block that does not set a statement_timeout: the connection's own."""


def set_local(settings: Bound, encoding: str = "utf-8") -> tuple[Command, ...]:
    """Return the command that binds the settings to the transaction; all are parameters."""
    if not settings:
        return NOTHING
    calls = ",".join(f"pg_catalog.set_config(${2 * i + 1},${2 * i + 2},true)" for i in range(len(settings)))
    values = [part.encode(encoding) for pair in settings for part in pair]
    return ((f"SELECT {calls}".encode(), values),)


class Block:
    """One `with` block: what its statements need first, and who opened it where."""

    __slots__ = (
        "_all", "_set", "committed", "conn", "failure", "high", "lost", "manual", "open", "own_settings",
        "patience", "place", "settings", "since", "thread", "watch",
    )  # fmt: skip

    def __init__(
        self,
        manual: bool,
        settings: Bound,
        place: tuple[CodeType, int],
        patience: float | None = KEEP,
    ) -> None:
        self.open = True
        self.watch: ref[Any] | None = None
        """Tells when its Handler is dropped."""
        self.conn: PooledConnection | None = None
        """The connection that is lent to it."""
        self.failure: Exception | None = None
        """The last error of a statement: the cause, where the transaction cannot be committed."""
        self.lost = False
        """Whether an open transaction was lost with its connection, and not yet given up."""
        self.committed = False
        """Whether a part of it was committed, or may have been; of a manual-commit block only."""
        self.high = False
        """Whether it may take the group's reserved connections."""
        self.manual = manual
        self.settings = self.own_settings = settings
        self.patience = patience
        self._set: tuple[Command, ...] | None = None
        self._all: tuple[Command, ...] = NOTHING
        self.since = 0.0
        self.thread = get_ident()
        self.place = place

    def preamble(self, conn: PooledConnection) -> tuple[Command, ...]:
        """Return what must be sent before the next statement on the connection; mostly nothing."""
        status = conn.pgconn.transaction_status
        if status == IDLE:
            conn.bound = False
            if self.manual and conn.altered:  # psycopg's isolation_level, read_only and deferrable
                commands = ((conn._get_tx_start_command(), None), *(self._encode(conn)[1:]))
            elif not self.settings:
                commands = BEGIN if self.manual else NOTHING
            else:
                commands = self._encode(conn) if conn.touched or not self._all else self._all
            return conn.cleaning + commands if conn.stale else commands
        if conn.bound or status != INTRANS or not self.settings:
            return NOTHING
        # A transaction that the block did not begin itself, or one chained to the last.
        return self._encode(conn)[-1:] if conn.touched or not self._set else self._set

    def lend(self, conn: PooledConnection) -> None:
        """Take over a connection: what it must bind by itself goes before the block's settings."""
        if conn.local or self.settings is not self.own_settings:
            self.settings = conn.local + self.own_settings
            self._set, self._all = None, NOTHING
        if self.patience != KEEP:
            conn.patience, conn.altered = self.patience, True
        conn.lent = True
        conn.block = self
        self.conn = conn

    def _encode(self, conn: PooledConnection) -> tuple[Command, ...]:
        """Return BEGIN and the settings, in the encoding that the session has now."""
        self._set = set_local(self.settings, conn.pgconn._encoding)
        self._all = BEGIN + self._set if self.manual else self._set
        return self._all


def deallocate(keep: Sequence[str]) -> bytes:
    """Return the statement that removes what PREPARE made; psycopg's are made by the protocol."""
    kept = "".join(f" AND name <> {_literal(name)}" for name in keep)
    body = (
        "DECLARE n text; BEGIN FOR n IN SELECT name FROM pg_catalog.pg_prepared_statements "
        f"WHERE from_sql{kept} LOOP EXECUTE pg_catalog.format('DEALLOCATE %I', n); END LOOP; END"
    )
    return f"DO {_literal(body)}".encode()


def _literal(text: str) -> str:
    return sql.Literal(text).as_string()

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

from .._request.tenant import Bound
from .._util.client_settings import REPORT, is_reported
from .._util.transaction_modes import modes_of
from ..errors import ConnectionLostError, SettingError

if TYPE_CHECKING:
    from .connection import PooledConnection

IDLE = int(pq.TransactionStatus.IDLE)
INTRANS = int(pq.TransactionStatus.INTRANS)
UNKNOWN = int(pq.TransactionStatus.UNKNOWN)

Command = tuple[bytes, Sequence[bytes | None] | None]
"""A statement of the preamble with its parameters in text format."""

NOTHING: tuple[Command, ...] = ()
BEGIN: tuple[Command, ...] = ((b"BEGIN", None),)
COMMIT: tuple[Command, ...] = ((b"COMMIT", None),)

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

FORBID_WRITES = b"SET default_transaction_read_only = on"
"""What sessions of groups that only read begin with, since a standby may be promoted under them."""

CLEANING_TO_READ: tuple[Command, ...] = (*CLEANING[:-1], (FORBID_WRITES, None), CLEANING[-1])
"""The cleaning of such a session: RESET ALL would let it write."""

GRACE = 1.0
"""Seconds that the client waits beyond the server's own statement_timeout."""

HURRY = 0.05
"""Seconds that a connect, ping or probe may take in any case, also where a request has no time to wait."""


KEEP = -1.0
"""The patience of a block that does not set a statement_timeout: the connection's own."""


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
    """Return the error for settings of which the session's encoding has no form."""
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


_REPORT: tuple[Command, ...] = ((REPORT, ()),)


class Binding:
    """What a block binds, and the command that does it; shared by all blocks of the same tenant."""

    __slots__ = ("begin_and_set", "modes", "patience", "report", "set", "settings", "special")

    def __init__(self, settings: Bound, patience: float | None = KEEP) -> None:
        self.settings = settings
        self.patience = patience
        """Seconds that the client waits for a statement; None for no bound."""
        self.modes = modes_of(settings)
        """What the settings say of a transaction's modes, which its BEGIN has to say."""
        self.report = _REPORT if is_reported(name for name, _ in settings) else NOTHING
        """What asks for the settings that values are read by, if the block binds one of them."""
        self.special = patience != KEEP or bool(self.report)
        """Whether the connection's own attributes change for the block."""
        self.set = set_local(settings) + self.report
        self.begin_and_set = BEGIN + self.set


UNBOUND = Binding(())


class Block:
    """One `with` block: what its statements need first, and who opened it where."""

    __slots__ = (
        "_all", "_set", "binding", "chosen", "committed", "conn", "failure", "high", "in_effect", "lost",
        "manual", "open", "own_id", "place", "settings", "since", "stack", "statement", "thread", "watch",
    )  # fmt: skip

    # Not set before there is one, so that a block without costs nothing; see `tracing`.
    own_id: str
    stack: list[tuple[CodeType, int]]
    statement: Any
    """The last one, under way or not."""
    chosen: bool
    """Set if the block has chosen `autocommit` itself, and so wants transactions as psycopg has them."""
    in_effect: bool
    """Whether a statement has taken effect by itself since the last commit() or rollback()."""

    def __init__(self, manual: bool, binding: Binding, place: tuple[CodeType, int]) -> None:
        self.open = True
        self.watch: ref[Any] | None = None
        """Tells when its Handler is dropped."""
        self.conn: PooledConnection | None = None
        """The connection that is lent to it."""
        self.lost = False
        """Whether an open transaction was lost with its connection, and not yet given up."""
        self.committed = False
        """Whether a part of it was committed, or may have been; of a manual-commit block only."""
        self.high = False
        """Whether it may take the group's reserved connections."""
        self.manual = manual
        """Whether it has transactions that end with it, with commit() or with rollback()."""
        self.binding = binding
        self.settings = binding.settings
        """What is bound: the connection's own settings, where it has any, and the block's."""
        self._set = binding.set
        self._all = binding.begin_and_set if manual else binding.set
        self.failure: Exception | None = None
        """The last error of a statement: the cause, where the transaction cannot be committed."""
        self.since = 0.0
        self.thread = get_ident()
        self.place = place
        """The code and the instruction that entered it; its line is worked out when it is told."""

    def preamble(self, conn: PooledConnection) -> tuple[Command, ...]:
        """Return what must be sent before the next statement on the connection; mostly nothing.

        :raises ConnectionLostError: it was lost before.
        """
        status = conn.pgconn.transaction_status
        if status == IDLE:
            conn.bound = False
            if conn.stale and conn.misleads():
                with conn.owning():
                    conn.clean_what_shows()
            if (self.manual and conn.altered) or (self.settings and conn.touched):
                commands = self._encode(conn)  # its isolation_level, its encoding may be others by now
            else:
                commands = self._all
            return conn.cleaning + commands if conn.stale else commands
        if status == INTRANS:
            if conn.bound or not self.settings:
                return NOTHING
            # A transaction that the block did not begin itself, or one chained to the last.
            return self._local(conn) if conn.touched else self._set
        if status == UNKNOWN:
            self.lost = self.lost or self.manual  # an autocommit block has no open transaction in it
            raise ConnectionLostError(
                "the connection was lost before: nothing was sent; the block gets another"
            )
        return NOTHING

    def explicit(self, conn: PooledConnection) -> tuple[Command, ...]:
        """Return BEGIN and the settings, after a cleaning if one is due, to wrap a statement in."""
        cleaning = conn.cleaning if conn.stale else NOTHING
        return cleaning + conn.begin(self) + self._local(conn)

    @property
    def nests(self) -> bool:
        """Whether `transaction()` is a savepoint also if nothing is open: the block's own is opened first."""
        return self.manual and not hasattr(self, "chosen")

    def choose(self, autocommit: bool) -> None:
        """Go on in autocommit mode, or with transactions, whatever the group says."""
        if not autocommit and not self.manual and hasattr(self, "statement"):
            self.committed = True  # as far as it has come, which is not to be repeated
        self.chosen, self.manual = True, not autocommit
        if self.conn is not None:
            self._all = self._encode(self.conn)

    def spans(self) -> bool:
        """Return whether its transaction goes on after the statement that is under way."""
        owner = self.watch() if self.watch is not None else None
        return self.manual and not getattr(owner, "commits_at_once", False)

    def lend(self, conn: PooledConnection) -> None:
        """Take over a connection: what it must bind by itself goes before the block's settings."""
        binding = self.binding
        if not conn.plain or binding.modes is not None:
            self.settings = conn.local + binding.settings
            self._set, self._all = self._local(conn), self._encode(conn)
        if binding.special:
            conn.altered = True
            if binding.patience != KEEP:
                conn.patience = binding.patience
            if binding.report:
                conn.follow_settings()
        conn.lent, conn.wrapped = True, False
        conn.block = self
        self.conn = conn

    def part(self) -> None:
        """Forget the connection, which was lost, with what its attributes say of a BEGIN."""
        self.conn, self.settings, self._set = None, self.binding.settings, self.binding.set
        self._all = self.binding.begin_and_set if self.manual else self._set

    def _local(self, conn: PooledConnection) -> tuple[Command, ...]:
        """Return what binds the settings, in the encoding that the session has now."""
        return set_local(self.settings, conn.pgconn._encoding) + self.binding.report

    def _encode(self, conn: PooledConnection) -> tuple[Command, ...]:
        """Return BEGIN, or the modes of an implicit transaction, and what binds the settings."""
        return (conn.begin(self) if self.manual else conn.modes_of_implicit(self)) + self._local(conn)


def is_high(priority: str) -> bool:
    """Tell whether a block of that priority may take the group's reserved connections.

    :raises ValueError: there is no such priority.
    """
    if priority not in ("normal", "high"):
        raise ValueError(f"priority={priority!r} is neither 'high' nor 'normal'")
    return priority == "high"


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

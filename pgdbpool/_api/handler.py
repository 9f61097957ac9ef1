"""The `with` block: one connection, its statements, and how it ends."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from weakref import proxy

import psycopg
from psycopg import rows

from .._process.fork import UWSGI
from .._request import correlation as tracing
from .._request import freshness, special
from .._servers.positions import written
from .._session import describe
from .._session.block import Block, is_high
from .._session.commands import IDLE, INTRANS
from .._session.connection import PooledConnection
from .._session.cursors import BlockClientCursor, BlockCursor
from .._session.liveness import LEAVE
from .._session.resending import resends
from .._session.riding import checked_parameters
from .._session.statement_shape import shape
from .._util import log_events as events
from .._util.token import Token
from ..errors import (
    BlockClosedError,
    DBQueryError,
    Error,
    QueryDeadlineError,
    TransactionAbortedError,
    as_query_error,
    one_line,
)
from .connection import Connection, PoolSet
from .one_statement import begin_special
from .queries import Queries

if TYPE_CHECKING:
    from psycopg.abc import Params
    from psycopg.abc import Query as Statement

_ACTIVE = int(psycopg.pq.TransactionStatus.ACTIVE)
_BAD = int(psycopg.pq.ConnStatus.BAD)
_OPEN = (INTRANS, int(psycopg.pq.TransactionStatus.INERROR))

_COMMITTED = (
    "group {!r}: rollback() comes too late: in an autocommit block each statement commits by itself, and "
    "nothing was undone; give the group `autocommit: false`, or put what belongs together into "
    "`with db.transaction():`"
)
_ROLL_BACK = "call rollback() to begin another in this block, or leave the block"


class Handler(Queries):
    """A unit of work on one connection of a group.

    >>> with Handler("read") as db:                                     # doctest: +SKIP
    ...     for row in db.query("SELECT id, name FROM users WHERE active = %s", (True,)):
    ...         print(row["id"], row[1])

    The connection is checked out on entering the block. In a group with `autocommit: false` the
    first statement opens a transaction; a clean end of the block commits it, an exception rolls it
    back. A Handler opens one block.

    :param group: the name of the group.
    :param timeout: seconds to wait for a connection, in place of the group's `timeout`.
    :param tenant: the tenant's value, or a mapping if the group has several tenant settings; left
        out, the current one of `pgdbpool.tenant()`.
    :param tenant_override: allow a tenant that is not the current one.
    :param settings: server settings for this block, over those of the group: name to value.
    :param priority: ``high`` goes before other waiters, and may take the group's `reserved` connections.
    :param correlation_id: the id in the block's log records and errors, in place of the current one of
        `pgdbpool.correlation()`; it takes the same values.
    :param after: a token, or its text: the block sees the writes up to it, besides those of the current
        `pgdbpool.read_your_writes()`.
    :raises UnconfiguredGroupError: no such group.
    :raises NotInitializedError: `Connection.init` was not called.

    Entering the block raises `TenantRequiredError`, `TenantConflictError` or `SettingError` before
    anything is sent, `PoolTimeout` if no connection became free, and `DBConnectionError`
    (`DBOfflineError` if every endpoint is down) if none could be opened; `RateLimitExceeded`
    if the group is above its `rate_limit`, and `DeadlineExceeded` after the current deadline.
    """

    __slots__ = (
        "__weakref__", "_after", "_block", "_conn", "_correlation_id", "_group", "_high", "_override",
        "_settings", "_tenant", "_timeout",
    )  # fmt: skip
    _home: ClassVar[type[PoolSet]] = Connection
    """The set of pools that its group belongs to."""

    def __init__(
        self,
        group: str,
        *,
        timeout: float | None = None,
        tenant: Any = None,
        tenant_override: bool = False,
        settings: Mapping[str, Any] | None = None,
        priority: Literal["high", "normal"] = "normal",
        correlation_id: Any = None,
        after: Token | str | None = None,
    ) -> None:
        self._block: Block | None = None
        self._conn: PooledConnection | None = None
        try:
            self._group = self._home._pools.groups[group]  # type: ignore[union-attr]
        except (AttributeError, KeyError, TypeError):
            self._group = self._home.group(group)  # which says what is wrong
        self._timeout = timeout
        self._tenant = tenant
        self._override = tenant_override
        self._settings = settings
        self._high = priority != "normal" and is_high(priority)
        if correlation_id is not None:
            self._correlation_id = tracing.clean(correlation_id)
        if after is not None:
            self._after = freshness.Seen(after)  # its text is checked here, before anything is opened

    def __enter__(self) -> Handler:
        if self._block is not None:
            raise BlockClosedError("a Handler opens one block: make another Handler for the next")
        group = self._group
        if group.retired or UWSGI:  # the process was forked, the pools replaced
            group = self._group = self._home.group(group.config.name)
        caller = sys._getframe(1)
        if caller.f_globals is tracing.CONTEXTLIB:
            caller = tracing.caller_of(caller)
        binding = group.bind(self._tenant, self._override, self._settings)
        block = Block(group.manual, binding, (caller.f_code, caller.f_lasti), self._high)
        if special.in_use and (tracing.in_use or freshness.in_use):
            given, after = getattr(self, "_correlation_id", None), getattr(self, "_after", None)
            begin_special(block, group, caller, given, after)
        if group.limiter is not None:
            group.admit(block)
        # Dropped without leaving the block, or interrupted on the way in or out of it, the Handler
        # still gives its connection back: by a weak reference and not by __del__, which would run at
        # the end of each block and swallow an interruption there. A proxy is made in half the time.
        block.watch = proxy(self, group.on_drop)
        self._block = block
        self._conn = group.checkout(block, self._timeout)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        block, conn = self._block, self._conn
        if block is None or not block.open:
            return  # never entered, or of the parent process
        try:
            if block.lost or (conn is not None and conn.pgconn.transaction_status != IDLE):
                self._end(block, conn, failed=exc is not None)
            if exc is not None:
                describe.mark(exc, block)
        except Error as error:
            describe.mark(error, block)
            raise
        finally:
            if block.conn is not None:
                self._group.checkin(block.conn)
            block.open = False
            block.watch = block.failure = self._conn = None

    def __repr__(self) -> str:
        state = "open" if self._block is not None and self._block.open else "closed"
        return f"<Handler {self._group.name!r} {state}>"

    # Statements.

    def query(self, statement: Statement, params: Params | None = None) -> psycopg.Cursor[Any]:
        """Execute a statement and return its cursor: iterate, `fetchone`, `fetchall`, `rowcount` ...

        Rows can be read by index and by column name. Empty parameters count as none, as in 1.x, so
        that a lone `%` needs no doubling.

        :raises DBQueryError: also psycopg's own class (`psycopg.errors.UniqueViolation` ...).
        :raises ConnectionLostError: the connection was lost; `maybe_executed` says whether the
            statement may have taken effect. The first statement of a transaction, and a statement of
            an autocommit group whose target is `standby` or `read-only`, is sent again on another
            connection instead, once; connections that the same event ends do not count.
        :raises TransactionAbortedError: an open transaction was lost before; `rollback()` first.
        """
        conn = self._conn
        if conn is None or conn.pgconn.status == _BAD:
            conn = self._live()
        make = BlockCursor
        if params is not None:
            if not params:
                params = checked_parameters(params)
            elif (not isinstance(statement, str) or ";" in statement) and shape(statement, conn).number > 1:
                make = BlockClientCursor
        try:
            return make(conn).execute(statement, params)
        except DBQueryError as error:
            if not resends(self._group, self._block, error):
                raise
        return self._again(partial(_execute, make, statement, params))

    def query_prepared(self, params: Sequence[Any]) -> Any:
        """Call `"SQLPrepare"."ExecuteQuery"` with the parameters and return its value (1.x).

        :raises DBQueryError: the call failed.
        """
        marks = ", ".join(["%s"] * len(params))
        cursor = BlockCursor(self._live(), row_factory=rows.tuple_row)
        row = cursor.execute(f'SELECT * FROM "SQLPrepare"."ExecuteQuery"({marks})', params).fetchone()
        return None if row is None else row[0]

    # The transaction.

    def commit(self) -> None:
        """Commit the open transaction, if any; the next statement opens another.

        In an autocommit block there is none, and its statements are committed already: nothing happens.

        :raises TransactionAbortedError: a statement had failed, or the transaction was lost with
            its connection: nothing was committed.
        :raises ConnectionLostError: with `maybe_committed`: the connection was lost on the way.
        :raises DBQueryError: the server refused (a deferred constraint ...): nothing was committed.
        """
        block, conn = self._opened(), self._conn
        if block.lost:
            self._live()  # raises
        if conn is not None and conn.pgconn.status != _BAD:
            try:
                conn.commit()
            except TransactionAbortedError as error:
                raise error from block.failure
        if not block.manual:
            block.in_effect = False  # the commit was asked for

    def rollback(self) -> None:
        """Roll the open transaction back, if any; after a lost connection, go on with another.

        :raises psycopg.ProgrammingError: an autocommit block has committed its statements already, each by
            itself, since it began or since the last `commit()`: nothing was undone. Or this is the inside of
            a `transaction()`.
        """
        block, conn = self._opened(), self._conn
        if conn is not None:
            conn.check_left()
        ended = conn is None or conn.pgconn.transaction_status not in _OPEN
        if ended and getattr(block, "in_effect", False) and not (block.lost or block.manual):
            raise as_query_error(psycopg.ProgrammingError(_COMMITTED.format(self._group.name)))
        self._undo()

    def _undo(self) -> None:
        """Roll back an open transaction, and forget a lost one."""
        self._opened().lost = False
        if self._conn is not None and not self._conn.closed:
            self._conn.rollback()

    @contextmanager
    def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> Iterator[psycopg.Transaction]:
        """Open a transaction, or a savepoint within an open one (always in a manual-commit group).

        See https://www.psycopg.org/psycopg3/docs/basic/transactions.html#transaction-contexts
        """
        with self._live().transaction(savepoint_name, force_rollback) as transaction:
            yield transaction

    # The connection.

    @property
    def connection(self) -> PooledConnection:
        """The psycopg connection; its statements take part in the block as `query` does.

        Since anything can be done with it, its session is cleaned before the next block's first
        statement, in the same round trip, unless the group says `reset: never`.
        """
        return self._handed_out()

    @property
    def conn_ref(self) -> PooledConnection:
        """The psycopg connection, under its 1.x name."""
        return self._handed_out()

    @property
    def endpoint(self) -> str:
        """The label of the server that the block is on."""
        return self._live().endpoint.label

    @property
    def token(self) -> Token | None:
        """The end of the block's writes, for `after` or `read_your_writes`; None if it has none.

        Inside `read_your_writes`, and with `after`, it is known once the block has committed, at no round
        trip. Otherwise the server is asked, for which the block must still be open.

        :raises BlockClosedError: the server would have to be asked, and the block has ended.
        """
        block = self._block
        if block is not None and (seen := block.sees()) is not None:
            return seen.written
        self._opened()
        facts = self._live().ask_facts()
        position = None if facts is None else written(facts)
        return None if position is None else Token([position])

    @property
    def correlation_id(self) -> str:
        """The correlation id of the block's log records and errors; made now if none was given."""
        return (self._block if self._block is not None else self._opened()).correlation_id

    def _handed_out(self) -> PooledConnection:
        try:
            return self._live().expose()
        except DBQueryError as error:
            if self._conn is None or not self._conn.closed or isinstance(error, QueryDeadlineError):
                raise
        return self._live().expose()  # lost while it was being cleaned: nothing of the block was sent

    def _opened(self) -> Block:
        block = self._block
        if block is None or not block.open:
            raise BlockClosedError(
                f"Handler({self._group.name!r}) is used outside its block: "
                f"write `with Handler({self._group.name!r}) as db:` and use db inside"
            )
        return block

    def _live(self) -> PooledConnection:
        """Return the block's connection, or another one if it was lost outside a transaction."""
        block, conn = self._opened(), self._conn
        if conn is not None and conn.closed:
            with conn.replacing:  # by one of the threads that share the block
                if self._conn is conn:
                    self._group.discard(conn, "lost")
                    block.part()
                    self._check_not_lost(block)
                    self._conn = self._group.checkout(block, self._timeout)
            conn = self._conn
        self._check_not_lost(block)
        if conn is None:
            conn = self._conn = self._group.checkout(block, self._timeout)
        if special.in_use and (seen := block.sees()) is not None and conn.lacking(seen.required()):
            conn = self._conn = self._group.fresh(block, conn, self._timeout)
        return conn

    def _check_not_lost(self, block: Block) -> None:
        if block.lost:
            conn = self._conn
            raise TransactionAbortedError(
                "the connection was lost with an open transaction: nothing of it was committed; "
                + (LEAVE if conn is not None and conn.has_contexts else _ROLL_BACK)
            ) from block.failure

    def _end(self, block: Block, conn: PooledConnection | None, *, failed: bool) -> None:
        """End an open transaction: commit at a clean end, roll back after an exception."""
        if block.lost:
            if not failed:
                raise TransactionAbortedError(
                    "the block ends, but its transaction was lost with the connection: nothing was committed"
                ) from block.failure
            return
        if conn is None or conn.pgconn.status == _BAD:
            return
        if conn.pgconn.transaction_status == _ACTIVE or conn.turn.locked():
            conn.force_close()  # interrupted in a statement, or in a loop: its state is unknown
            if not failed:
                raise TransactionAbortedError("the block ends with a statement under way: connection closed")
        elif failed:
            try:
                conn.give_up()
            except psycopg.Error as error:
                # The block's own exception is the one to report; the server rolls back by itself.
                events.BLOCK_ROLLBACK_FAILED(
                    "group %s: rollback failed: %s", self._group.name, error, group=self._group.name,
                    endpoint=conn.endpoint.label, correlation_id=block.correlation_id, reason=one_line(error),
                    sqlstate=error.sqlstate,
                )  # fmt: skip
                conn.close()
        else:
            self.commit()


class Query:
    """The static methods of 1.x, on a Handler."""

    @staticmethod
    def execute(
        db: Handler, sql_statement: Statement, sql_params: Params | None = None
    ) -> psycopg.Cursor[Any]:
        """Execute a statement: `db.query`."""
        return db.query(sql_statement, sql_params)

    @staticmethod
    def execute_prepared(db: Handler, sql_params: Sequence[Any]) -> Any:
        """Execute a system-prepared query: `db.query_prepared`."""
        return db.query_prepared(sql_params)


def _execute(
    make: type[BlockCursor], statement: Statement, params: Params | None, conn: PooledConnection
) -> BlockCursor:
    return make(conn).execute(statement, params)

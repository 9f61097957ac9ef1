"""Blocks of one statement: `Connection.fetch(group, ...)` and its siblings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypedDict
from weakref import proxy

from .._request import correlation as tracing
from .._request import freshness, special
from .._session import describe, outcome
from .._session.block import Block, guard, is_high
from .._session.commands import IDLE
from .._session.cursors import BlockClientCursor, BlockCursor, CommittingCursor, commits_with, plain_row
from .._session.resending import resends, send_again
from .._session.riding import checked_parameters
from .._session.statement_shape import shape
from .._util.token import Token
from ..errors import DBQueryError, Error, ResultError, one_line
from .queries import all_rows, command_tag, first_row, rows_of_all, value_in

if TYPE_CHECKING:
    from psycopg.abc import Params, QueryNoTemplate
    from psycopg.abc import Query as Statement
    from psycopg.rows import RowFactory
    from typing_extensions import Unpack

    from .._lending.group import Group
    from .._session.connection import PooledConnection
    from .queries import CommandTag, T


class BlockOptions(TypedDict, total=False):
    """The options of a block besides its group; see `Handler`."""

    tenant: Any
    tenant_override: bool
    settings: Mapping[str, Any] | None
    timeout: float | None
    priority: Literal["high", "normal"]
    correlation_id: Any
    after: Token | str | None


def begin_special(
    block: Block, group: Group, caller: FrameType, correlation_id: str | None, after: freshness.Seen | None
) -> None:
    """Give a new block its context's correlation id, and the writes that its reads must see."""
    if tracing.in_use:
        describe.begin(block, correlation_id, caller if group.config.leak_stack else None)
    if freshness.in_use and (seen := freshness.for_block(after)) is not None:
        guard(block, seen)
        group.prefer_fresh(seen)


class OneShots:
    """The methods of `Connection` that open a block for one statement."""

    if TYPE_CHECKING:

        @classmethod
        def group(cls, name: str) -> Group: ...

    @classmethod
    def fetch(
        cls,
        group: str,
        statement: Statement,
        params: Params | None = None,
        *,
        row_factory: RowFactory[T] | None = None,
        **block: Unpack[BlockOptions],
    ) -> list[T]:
        """Execute one statement in its own block, and return its rows.

        In a manual-commit group, `BEGIN`, the tenant, the statement and the COMMIT take one round trip;
        if any of them fails, nothing is committed. It raises the errors of entering a `Handler`, `query` and
        `commit`.

        :param row_factory: makes the rows, in place of the group's.
        :param block: `tenant`, `tenant_override`, `settings`, `timeout`, `priority`, `correlation_id` and
            `after`, as for a `Handler`.
        :raises ConnectionLostError: with `maybe_executed` in an autocommit group, `maybe_committed` in
            another: the statement may or may not have taken effect.
        :raises ResultError: Python cannot hold the result, or the row factory failed; the effect
            of the statement is committed. After a statement that only reads, the original error is raised.
        """
        with _OneShot(cls.group(group), **block) as one:
            return all_rows(one.execute(statement, params), row_factory)

    @classmethod
    def fetchrow(
        cls,
        group: str,
        statement: Statement,
        params: Params | None = None,
        *,
        row_factory: RowFactory[T] | None = None,
        **block: Unpack[BlockOptions],
    ) -> T | None:
        """Execute one statement in its own block, and return its first row, or None; see `fetch`."""
        with _OneShot(cls.group(group), **block) as one:
            row: T | None = first_row(one.execute(statement, params), row_factory)
            return row

    @classmethod
    def fetchval(
        cls,
        group: str,
        statement: Statement,
        params: Params | None = None,
        column: int | str = 0,
        **block: Unpack[BlockOptions],
    ) -> Any:
        """Execute one statement in its own block, and return a value of its first row; see `fetch`.

        :raises LookupError: no such column; the effect of the statement is committed.
        """
        with _OneShot(cls.group(group), **block) as one:
            row = plain_row(one.execute(statement, params))
        return value_in(row, column)

    @classmethod
    def execute(
        cls, group: str, statement: Statement, params: Params | None = None, **block: Unpack[BlockOptions]
    ) -> CommandTag:
        """Execute one statement in its own block, and return its command tag; see `fetch`."""
        with _OneShot(cls.group(group), **block) as one:
            return command_tag(one.execute(statement, params))

    @classmethod
    def executemany(
        cls,
        group: str,
        statement: QueryNoTemplate,
        params_seq: Iterable[Params],
        **block: Unpack[BlockOptions],
    ) -> int:
        """Execute a statement once for each set of parameters, in one transaction; return the row count."""
        sets = params_seq if isinstance(params_seq, Sequence) else list(params_seq)
        with _OneShot(cls.group(group), **block) as one:
            return one.executemany(statement, sets).rowcount

    @classmethod
    def fetchmany(
        cls,
        group: str,
        statement: QueryNoTemplate,
        params_seq: Iterable[Params],
        *,
        row_factory: RowFactory[T] | None = None,
        **block: Unpack[BlockOptions],
    ) -> list[T]:
        """Execute a statement once for each set of parameters, in one transaction; return all of their rows.

        If the answer to the COMMIT is lost, so are the rows; see `fetch`.
        """
        sets = params_seq if isinstance(params_seq, Sequence) else list(params_seq)
        with _OneShot(cls.group(group), **block) as one:
            return rows_of_all(one.executemany(statement, sets, returning=True), row_factory)


class _OneShot:
    """A block of one statement, without the parts of a Handler that only several statements need."""

    __slots__ = ("__weakref__", "answered", "block", "conn", "group", "timeout")
    commits_at_once = True
    """Its statement's transaction ends with it."""

    def __init__(
        self,
        group: Group,
        tenant: Any = None,
        tenant_override: bool = False,
        settings: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        priority: Literal["high", "normal"] = "normal",
        correlation_id: Any = None,
        after: Token | str | None = None,
    ) -> None:
        self.group, self.timeout, self.answered = group, timeout, False
        caller = sys._getframe(2)
        binding = group.bind(tenant, tenant_override, settings)
        high = priority != "normal" and is_high(priority)
        self.block = block = Block(group.manual, binding, (caller.f_code, caller.f_lasti), high)
        if special.in_use or correlation_id is not None or after is not None:
            given = None if correlation_id is None else tracing.clean(correlation_id)
            seen = None if after is None else freshness.Seen(after)
            begin_special(block, group, caller, given, seen)
        if group.limiter is not None:
            group.admit(block)
        block.watch = proxy(self, group.on_drop)  # for an interruption on the way in, as in a Handler

    def __enter__(self) -> _OneShot:
        self.conn = self.group.checkout(self.block, self.timeout)
        return self

    def execute(self, statement: Any, params: Any) -> BlockCursor:
        """Execute the statement, with its COMMIT in the same round trip if possible."""
        if params is not None and not params:
            params = checked_parameters(params)
        try:
            cursor = self._cursor(statement, params).execute(statement, params)
        except DBQueryError as error:
            if not resends(self.group, self.block, error):
                raise
            cursor = None
        if cursor is None:
            cursor = self._again(partial(self._attempt, statement, params))
        self.answered = True
        return cursor

    def executemany(self, statement: Any, sets: Sequence[Any], returning: bool = False) -> BlockCursor:
        """Execute the statement for each of the parameter sets, with the COMMIT if possible."""
        attempt, cursor = partial(self._attempt_all, statement, sets, returning), None
        try:
            cursor = attempt(self.conn)
        except DBQueryError as error:
            if not resends(self.group, self.block, error):
                raise
        if cursor is None:
            cursor = self._again(attempt)
        self.answered = True
        return cursor

    def _attempt(self, statement: Any, params: Any, _: PooledConnection) -> BlockCursor:
        return self._cursor(statement, params).execute(statement, params)

    def _attempt_all(
        self, statement: Any, sets: Sequence[Any], returning: bool, _: PooledConnection
    ) -> BlockCursor:
        cursor = self._cursor(statement, None)
        cursor.executemany(statement, sets, returning=returning)
        return cursor

    def _again(self, attempt: Callable[[PooledConnection], BlockCursor]) -> BlockCursor:
        return send_again(self.group, self.block, self._begun_anew, attempt)

    def _cursor(self, statement: Any, params: Any) -> BlockCursor:
        conn = self.conn
        if self.block.manual and commits_with(shape(statement, conn)):
            return CommittingCursor(conn)
        several = params is not None and (not isinstance(statement, str) or ";" in statement)
        return (BlockClientCursor if several and shape(statement, conn).number > 1 else BlockCursor)(conn)

    def _begun_anew(self) -> PooledConnection:
        """Return the connection on which to begin again: another one if this one is lost."""
        self.block.lost = False
        self.conn.undo()
        if self.conn.closed:
            self.group.discard(self.conn, "lost")
            self.block.part()
            self.conn = self.group.checkout(self.block, self.timeout)
        if (seen := self.block.sees()) is not None and self.conn.lacking(seen.required()):
            self.conn = self.group.fresh(self.block, self.conn, self.timeout)
        return self.conn

    def _explain(self, error: Exception) -> None:
        """Say in the error for an unreadable result that its statement is committed, unless it only reads."""
        if outcome.may_commit(self.block.statement, inside=False):
            raise ResultError(
                f"the statement is committed, but its result cannot be read: {one_line(error)}"
            ) from error

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        block, conn = self.block, self.conn
        try:
            if conn.pgconn.transaction_status != IDLE:
                # The COMMIT did not ride, or the statement failed.
                if exc is None:
                    conn.commit()
                else:
                    conn.undo()
            elif self.answered and isinstance(exc, Exception):
                self._explain(exc)
            if exc is not None:
                describe.mark(exc, block)
        except Error as error:
            describe.mark(error, block)
            raise
        finally:
            if block.conn is not None:
                self.group.checkin(block.conn)
            block.open = False
            block.watch = block.failure = None

"""The cursors of a block: they send its preamble with their statements, and end with it.

`BlockCursor._ride` is psycopg's own execution of one statement with the preamble sent before it. It
uses these private parts of psycopg, for which the minor version is pinned: `Cursor._reset`, `_tx`,
`_last_query`, `_convert_query`, `_execute_send`, `_send_prepare`, `_send_query_prepared`, `_check_results`,
`_set_results`, `_get_prepared`, `_execmany_returning` and `Connection._prepared`. `BlockCursor.__init__` sets
`Cursor._conn`, `_pgconn`, `_adapters`, `_row_factory`, `_closed` and `_last_query` itself, and `adapters`
uses `Cursor._loaders_changed` and `AdaptersMap._register_loader_callback`. `has_rows` uses
`Cursor._fetch_pipeline` and `_results`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

import psycopg
from psycopg._preparing import Prepare
from psycopg._queries import PostgresClientQuery
from psycopg.adapt import AdaptersMap, Transformer

from .. import errors
from .._request import deadline as deadlines
from .block import Block
from .commands import ACTIVE, COMMIT, IDLE, NOTHING, Command
from .connection import PooledConnection
from .foreign_cursors import NAMED
from .pooler_safety import CURSOR, refusal
from .state import OUTSIDE
from .statement_shape import Shape, shape
from .statement_text import comment_on
from .transactions import ENDS_INSIDE, FAILED

if TYPE_CHECKING:
    from psycopg._queries import PostgresQuery
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGresult

MOST_PARAMETERS = 65_535
"""What the protocol takes for one statement: libpq refuses more, in the midst of what is being sent."""

FLUSH_EVERY = 4
"""Statements of `executemany` after which their answers are asked for: the server keeps them otherwise."""

RECOVERY_CONFLICT = "40001"
"""SQLSTATE of a statement that a standby cancelled since its replay could wait no longer."""

# Looked up once: a member of an enumeration is found slowly.
_SHOULD, _YES, _NO = Prepare.SHOULD, Prepare.YES, Prepare.NO
_TEXT = psycopg.pq.Format.TEXT
_TUPLES_OK = psycopg.pq.ExecStatus.TUPLES_OK
_COPY_IN = psycopg.pq.ExecStatus.COPY_IN
_NO_ROWS = (psycopg.pq.ExecStatus.COMMAND_OK, psycopg.pq.ExecStatus.EMPTY_QUERY)
_ENDED = "this cursor belongs to a `with Handler(...)` block that has ended"


def _gone(block: Block) -> errors.Error:
    """Return the error for a cursor whose block no longer has its connection."""
    if not block.open:
        return errors.BlockClosedError(_ENDED)
    error = errors.ConnectionLostError("the connection was lost in a statement of another thread")
    error.repeatable = not block.lost
    return error


def _goes_on(conn: PooledConnection, error: psycopg.Error) -> bool:
    """Return whether the connection is in a pipeline, which takes answers while it sends what follows."""
    refused = error.sqlstate is None and not isinstance(error, psycopg.errors.PipelineAborted)
    return conn._pipeline is not None and (not refused or getattr(error, "unsent", False))


def _refuse(query: PostgresQuery, number: int) -> None:
    """Refuse so many parameters of one statement, unless they are written into its text."""
    if not isinstance(query, PostgresClientQuery):
        raise psycopg.ProgrammingError(
            f"the statement has {number} parameters, and can have {MOST_PARAMETERS}: nothing was sent; "
            "pass an array (= ANY(%s), unnest(%s)), use executemany or COPY"
        )


class _Context:
    """What psycopg's adaptation asks of a cursor, without handing its connection out."""

    __slots__ = ("adapters", "connection")

    def __init__(self, adapters: AdaptersMap, connection: PooledConnection) -> None:
        self.adapters = adapters
        self.connection = connection


class _Declared:
    """A cursor whose statements its block knows of, also those that psycopg begins."""

    __slots__ = ()
    _conn: PooledConnection

    def _start_query(self, query: Any = None) -> PQGen[None]:
        self._conn.declared = True
        yield from super()._start_query(query)  # type: ignore[misc]


class BlockCursor(_Declared, psycopg.Cursor[Any]):
    """A cursor that sends the block's preamble with its statements and closes with the block."""

    __slots__ = ("block",)
    _conn: PooledConnection
    after: tuple[Command, ...] = NOTHING
    """What follows the statement in its pipeline."""

    def __init__(self, connection: PooledConnection, *, row_factory: Any = None) -> None:
        block = connection.block
        if block is None:
            raise errors.BlockClosedError(OUTSIDE)
        self.block = block
        if connection.altered:
            super().__init__(connection, row_factory=row_factory or connection.row_factory)
            return
        # As psycopg's, but for a copy of the adapters, which takes most of its time; see `adapters`.
        self._conn, self._pgconn = connection, connection.pgconn
        self._adapters = connection.adapters_shared or connection.share_adapters()
        self._row_factory = row_factory or connection.row_factory
        self.format, self.arraysize, self._closed, self._last_query = _TEXT, 1, False, None
        self._reset()

    @property
    def adapters(self) -> AdaptersMap:
        """The cursor's own adapters, copied from the connection's when they are first asked for."""
        if self._adapters._register_loader_callback is None:  # it shares them
            self._adapters = own = AdaptersMap(self._adapters)
            own._register_loader_callback = partial(self._loaders_changed, ref(self))
            self._last_query = None  # the next execution converts by these
        return self._adapters

    @property
    def closed(self) -> bool:
        """True once the cursor was closed or its block has ended."""
        return self._closed or not self.block.open

    def execute(
        self, query: Any, params: Any = None, *, prepare: bool | None = None, binary: bool | None = None
    ) -> BlockCursor:
        """Execute a statement, with the preamble of the block where one is due."""
        conn, block = self._conn, self.block
        what = shape(query, conn)
        if conn.step is not None:
            conn.take_back()
        # From here on no other thread's statement comes between what is due, what is sent and what is noted.
        with conn.turn:
            if conn.block is not block:
                raise _gone(block)
            block.statement = query
            touched = conn.touched
            if what.special:
                what = conn.touch(what, query)
            if what.controls:
                self._begin_control(what)
            if conn.wrapped:
                conn.end_wrapped()
            autocommit = not block.manual and conn.pgconn.transaction_status == IDLE
            first = preamble = NOTHING if conn._pipeline else conn.preamble(block)
            if deadlines.in_use or conn.annotates:
                preamble = self._extended(preamble, what, autocommit)
            rode = False
            if what.ends:
                # Also where it is interrupted at its end: what it chains to has no tenant yet.
                conn.bound, block.committed = False, block.committed or what.commits
                conn.crossed = False
            try:
                if conn._pipeline:
                    conn.implicit = conn.implicit and not what.controls
                    with conn.owning():
                        super().execute(query, params, prepare=prepare, binary=binary)
                elif not preamble and what.number == 1:
                    self._ride(NOTHING, query, params, prepare, binary)
                elif what.number > 1 or what.alone or (what.utility and autocommit and not block.settings):
                    with conn.owning(), conn.ready(), conn.waiting_for(what.number):
                        prepare = prepare if what.number == 1 else False
                        self._ride(NOTHING, self._commented(query), params, prepare, binary)
                else:
                    rode = first != NOTHING
                    self._ride(preamble, query, params, prepare, binary)
                    if rode and not what.ends:
                        conn.bound = conn.pgconn.transaction_status != IDLE
                if what.changes:
                    if what.controls and not conn._pipeline:
                        conn.explicit = conn.pgconn.transaction_status != IDLE
                    if what.ends:
                        conn.bound = False
                        block.committed = True
                        if what.commits and what.number == 1 and self.statusmessage == "ROLLBACK":
                            raise errors.TransactionAbortedError(FAILED) from block.failure
                    elif (autocommit or conn.wrapped) and not what.controls:
                        block.in_effect = True
            except errors.ConnectionLostError as error:
                single = what.number == 1 and not conn._pipeline
                block.committed = block.committed or what.ends
                implicit = conn._pipeline is not None and conn.implicit
                self._note_loss(error, autocommit or implicit, what.ends, rode, touched, single)
                raise
            except psycopg.Error as error:
                block.failure = errors.without_frames(error)
                block.committed = block.committed or (what.ends and what.number > 1)
                if error.sqlstate == RECOVERY_CONFLICT:
                    self._note_conflict(error, autocommit, rode, touched, what.number == 1)
                if conn.pgconn.transaction_status == ACTIVE and not _goes_on(conn, error):
                    # psycopg leaves a COPY that it refuses under way: where that ends is not known.
                    conn.close()
                    block.lost = not autocommit
                raise
        return self

    def _begin_control(self, what: Shape) -> None:
        """Before a statement that begins or ends a transaction: what was known of the open one may end."""
        conn, block = self._conn, self.block
        if block.settings and (what.number > 1 or (conn._pipeline and what.ends)):
            raise errors.as_query_error(psycopg.NotSupportedError(ENDS_INSIDE))
        conn.explicit = False
        if what.ends and (conn._pipeline or conn._num_transactions):
            conn.unsure = conn.altered = True

    def _extended(self, preamble: tuple[Command, ...], what: Shape, autocommit: bool) -> tuple[Command, ...]:
        """Add to the preamble what a deadline and `annotate` bind, where the statement can ride with it."""
        conn = self._conn
        if deadlines.in_use:
            deadlines.check()
        if what.ends or conn.pgconn.transaction_status == IDLE:
            conn.limited = conn.annotated = False
        if (
            what.number > 1 or conn._pipeline or what.alone or what.controls or what.sets
            or (what.utility and autocommit and not self.block.settings)
        ):  # fmt: skip
            return preamble
        if deadlines.in_use:
            preamble = conn.limit(preamble)
        return conn.annotate(preamble) if conn.annotates else preamble

    def _commented(self, query: Any) -> Any:
        """Return what cannot ride, with the correlation id in a comment: no plan of it is kept."""
        if not self._conn.annotates:
            return query
        return comment_on(query, f"correlation_id={self.block.correlation_id}")

    def _note_loss(
        self,
        error: errors.ConnectionLostError,
        autocommit: bool,
        ends: bool,
        rode: bool,
        touched: bool,
        single: bool,
    ) -> None:
        """Note in the block, and in the error, what was lost with the connection."""
        block = self.block
        block.failure = errors.without_frames(error)
        if isinstance(error, errors.NotReplicatedError):
            return  # it says itself what there is to say, and the connection is there
        block.lost = block.lost or not autocommit
        if error.repeatable:
            return
        if not errors.undone(error):
            error.maybe_executed = error.maybe_executed or autocommit
            error.maybe_committed = error.maybe_committed or ends
        if isinstance(error, errors.TransactionTimeoutError) or errors.is_poolers_refusal(error):
            return  # it would take as long again
        idle = isinstance(error, errors.IdleSessionTimeoutError) and not self._conn._pipeline
        error.repeatable = self._may_repeat(autocommit, rode, touched, single) or (
            idle and autocommit and not touched
        )

    def _may_repeat(self, autocommit: bool, rode: bool, touched: bool, single: bool) -> bool:
        """Return whether nothing of the statement can have taken effect, nor anything be lost before it."""
        # Rode with its own BEGIN: nothing of it can have been committed. But a session that the
        # block had made its own (a lock, a temporary table) is gone, and it should know.
        # Nor can a server that takes no writes have done any.
        return not touched and ((rode and self.block.manual) or (autocommit and self._conn.reads and single))

    def _note_conflict(
        self, error: psycopg.Error, autocommit: bool, rode: bool, touched: bool, single: bool
    ) -> None:
        """Note in the error whether a statement that a standby cancelled for its replay can be sent again."""
        if self._conn.reads and isinstance(error, errors.DBQueryError):
            error.repeatable = self._may_repeat(autocommit, rode, touched, single)

    def executemany(self, query: Any, params_seq: Iterable[Any], *, returning: bool = False) -> None:
        """Execute the statement once for each of the parameter sets, in one pipeline with the preamble."""
        sets = params_seq if isinstance(params_seq, Sequence) else list(params_seq)
        self._conn.check_free()
        with self._conn.alone():
            self._execute_many(query, sets, returning)

    def _execute_many(self, query: Any, sets: Sequence[Any], returning: bool) -> None:
        """Do what `executemany` does; the caller has the turn."""
        block, touched = self.block, self._conn.touched
        conn, what = self._conn, self._own(query)
        autocommit = not block.manual and conn.pgconn.transaction_status == IDLE
        alone = what.number > 1 or what.alone or what.controls
        if conn._pipeline or alone or (what.utility and autocommit and not block.settings):
            with conn.ready(), conn.waiting_for(len(sets)), conn.preparing():
                super().executemany(query, sets, returning=returning)
            self._took_effect(what.changes and autocommit)
            return
        first = preamble = conn.preamble(block) if sets else NOTHING
        if deadlines.in_use:
            deadlines.check()
            preamble = conn.limit(preamble) if sets else NOTHING
        if conn.annotates and sets:
            preamble = conn.annotate(preamble)
        try:
            self._ride(preamble, query, None, None, None, many=(sets, returning))
            if first:
                conn.bound = conn.pgconn.transaction_status != IDLE
            self._took_effect(what.changes and autocommit)
        except errors.ConnectionLostError as error:
            self._note_loss(error, autocommit, False, bool(first), touched, single=False)
            raise
        except psycopg.Error as error:
            block.failure = errors.without_frames(error)
            if error.sqlstate == RECOVERY_CONFLICT:
                self._note_conflict(error, autocommit, bool(first), touched, single=False)
            raise

    def stream(self, query: Any, params: Any = None, **kwargs: Any) -> Iterator[Any]:
        """Iterate row by row over a result that the client does not hold as a whole."""
        conn = self._conn
        conn.check_free()
        with conn.alone():
            self._own(query)
            alone = conn.commits_each
            with conn.ready(), conn.held():
                conn.streamed = True
                yield from super().stream(query, params, **kwargs)
            self._took_effect(alone and shape(query, conn).changes)

    @contextmanager
    def copy(self, statement: Any, params: Any = None, *, writer: Any = None) -> Iterator[psycopg.Copy]:
        """Start a COPY; what the block needs first is sent before, since COPY cannot ride."""
        conn = self._conn
        conn.check_free()
        with conn.alone():
            self._own(statement)
            alone = conn.commits_each
            with (
                conn.ready(),
                conn.held(),
                super().copy(self._commented(statement), params, writer=writer) as copy,
            ):
                alone = alone and self.pgresult is not None and self.pgresult.status == _COPY_IN
                yield copy
            self._took_effect(alone)

    def _took_effect(self, changed: bool) -> None:
        """Note, if it did, that a statement has taken effect by itself: no rollback undoes it."""
        if changed:
            self.block.in_effect = True

    # As psycopg's, but for the block.

    def _fetch_pipeline(self) -> None:
        if not self.pgresult:
            if not self.block.open:
                raise errors.BlockClosedError(_ENDED)
            super()._fetch_pipeline()

    def _check_result_for_fetch(self) -> PGresult:
        result = self.pgresult
        if result and result.status == _TUPLES_OK and self.block.open and not self._closed:
            return result
        if not self.block.open:
            raise errors.BlockClosedError(_ENDED)
        return super()._check_result_for_fetch()

    @property
    def connection(self) -> PooledConnection:
        """The connection, which may then do anything: its session is cleaned after the block."""
        # psycopg itself asks for it too, and does nothing to it.
        if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] == "psycopg":
            return self._conn
        return self._conn.hand_out()

    def _own(self, query: Any) -> Shape:
        """Return what a statement is, once it may be sent; the caller has the turn."""
        conn = self._conn
        if conn.block is not self.block:
            raise _gone(self.block)
        self.block.statement = query
        what = shape(query, conn)
        if what.special:
            what = conn.touch(what, query)
        if what.controls and self.block.settings:
            raise errors.as_query_error(psycopg.NotSupportedError(ENDS_INSIDE))
        conn.end_wrapped()
        return what

    def _convert_query(self, query: Any, params: Any = None) -> PostgresQuery:
        """Convert a statement as psycopg does; what cannot be sent is refused before anything is."""
        converted = self._query_cls(self._tx)
        try:
            converted.convert(query, params)
            if (values := converted.params) and len(values) > MOST_PARAMETERS:
                _refuse(converted, len(values))
        except psycopg.Error as error:
            errors.as_query_error(error).unsent = True
            raise
        except Exception as error:
            if not self._conn._pipeline:
                raise
            # Raised in psycopg's wait as it is, it would end the pipeline's connection as an interruption.
            refused = errors.as_query_error(psycopg.DataError(f"{type(error).__name__}: {error}"))
            refused.unsent = True
            raise refused from error
        return converted

    def _ride(
        self,
        preamble: Sequence[Command],
        query: Any,
        params: Any,
        prepare: bool | None,
        binary: bool | None,
        many: tuple[Sequence[Any], bool] | None = None,
        again: bool = False,
    ) -> None:
        """Send the statement as psycopg sends it alone, after the preamble; the caller has the turn."""
        conn = self._conn
        first: tuple[Command, ...] | None = None
        try:
            self._begin(query)
            if many is None:
                converted = self._convert_query(query, params)
                preparing, name = conn._prepared.get(converted, prepare)
                if preamble or self.after or preparing is _SHOULD:
                    self._exchange(preamble, converted, preparing, name, binary)
                else:
                    self._send(converted, preparing, name, binary)
                    self._take(converted, preparing, name, conn.receive())
            else:
                self._exchange_many(preamble, query, *many)
        except psycopg.Error as error:
            if not again and self._may_resend(query):
                first = conn.before_resending(error, preamble)
            if first is None:
                raise conn.own_error(error)  # noqa: B904  it is the same object
        if first is not None:
            BlockCursor._ride(self, first, query, params, prepare, binary, many, again=True)
            return
        self._last_query = query
        if conn._prepared._to_flush:
            conn.wait(conn._prepared.maintain_gen(conn))

    def _may_resend(self, query: Any) -> bool:
        """Return whether the server executes the statement as a whole or not at all, in one transaction."""
        what = shape(query, self._conn)
        return not (what.number > 1 or what.alone or what.utility or what.controls)

    def _begin(self, query: Any) -> None:
        """Do what psycopg's `_start_query` does for a connection in autocommit mode, which sends nothing."""
        if self._closed or not self.block.open:
            raise psycopg.InterfaceError("the cursor is closed")
        self._reset()
        if not self._last_query or self._last_query is not query:
            self._last_query = None
            self._tx = Transformer(_Context(self._adapters, self._conn))

    def _exchange(
        self,
        preamble: Sequence[Command],
        query: PostgresQuery,
        preparing: Prepare,
        name: bytes,
        binary: bool | None,
    ) -> None:
        def send() -> None:
            if preparing is _SHOULD:
                self._send_prepare(name, query)
            self._send(query, preparing, name, binary, extended=True)

        number = 2 if preparing is _SHOULD else 1
        answers = self._conn.exchange(preamble, send, self.after)
        if number > 1:
            self._check_results(answers[0])
        self._take(query, preparing, name, answers[number - 1])
        if self.after or len(answers) > number:
            self._check_after(answers[number:])

    def _send(
        self,
        query: PostgresQuery,
        preparing: Prepare,
        name: bytes,
        binary: bool | None,
        extended: bool = False,
    ) -> None:
        if preparing is _NO:
            self._execute_send(query, force_extended=extended, binary=binary)
        else:
            self._send_query_prepared(name, query, binary=binary)

    def _take(self, query: PostgresQuery, preparing: Prepare, name: bytes, answer: list[PGresult]) -> None:
        """Take the answer to the statement over as the cursor's result, or raise its error."""
        if preparing is not _SHOULD:
            self._check_results(answer)
        # Only now: a statement that was skipped is not prepared, whatever psycopg would note.
        prepared = self._conn._prepared
        if (key := prepared.maybe_add_to_cache(query, preparing, name)) is not None:
            prepared.validate(key, preparing, name, answer)
        if preparing is _SHOULD:  # it is prepared also where it fails itself
            self._check_results(answer)
        self._set_results(answer)

    def _exchange_many(
        self, preamble: Sequence[Command], query: Any, sets: Sequence[Any], returning: bool
    ) -> None:
        self._execmany_returning, self._rowcount = returning, 0
        if not sets:
            return
        prepared = self._conn._prepared
        names: dict[Any, tuple[Prepare, bytes]] = {}
        plan = []
        for params in sets:  # before anything is sent, since this is where a parameter may be refused
            converted = self._convert_query(query, params)
            key = converted.query, converted.types
            how, name = names.get(key) or self._get_prepared(converted, True)
            names[key] = _YES if how is _SHOULD else how, name
            plan.append((converted, how, name))
        self._query = converted

        def send() -> None:
            for place, (converted, how, name) in enumerate(plan, 1):
                if how is _SHOULD:
                    self._send_prepare(name, converted)
                self._send(converted, how, name, None, extended=True)
                if place % FLUSH_EVERY == 0:
                    self._pgconn.send_flush_request()

        many = min(len(plan), FLUSH_EVERY)
        answers = iter(self._conn.exchange(preamble, send, self.after, many))
        for converted, how, name in plan:
            if how is _SHOULD:
                self._check_results(next(answers))
            answer = next(answers)
            self._check_results(answer)
            if how is _SHOULD and (entry := prepared.maybe_add_to_cache(converted, how, name)):
                prepared.validate(entry, how, name, answer)
            self._set_results(answer)
        self._check_after(list(answers))

    def _check_after(self, answers: list[list[PGresult]]) -> None:
        """Raise where what followed the statement failed: a COMMIT, or the one that a Sync implies."""
        for answer in answers:
            self._check_results(answer)


class BlockServerCursor(_Declared, psycopg.ServerCursor[Any]):
    """A named cursor of the block; its DECLARE comes after the preamble."""

    __slots__ = ("block",)
    _conn: PooledConnection

    def _convert_query(self, query: Any, params: Any = None) -> PostgresQuery:
        """Convert a statement as psycopg does; what cannot be sent is refused before anything is."""
        converted = super()._convert_query(query, params)
        if (values := converted.params) and len(values) > MOST_PARAMETERS:
            _refuse(converted, len(values))
        return converted

    def __init__(self, connection: PooledConnection, name: str, **kwargs: Any) -> None:
        if connection.block is None:
            raise errors.BlockClosedError(OUTSIDE)
        super().__init__(connection, name, **kwargs)
        self.block = connection.block

    @property
    def closed(self) -> bool:
        """True once the cursor was closed or its block has ended."""
        return self._closed or not self.block.open

    def execute(self, query: Any, params: Any = None, **kwargs: Any) -> BlockServerCursor:
        """Declare the cursor for the query, after the preamble of the block."""
        conn, block = self._conn, self.block
        conn.check_free()
        with conn.alone():
            if conn.block is not block:
                raise _gone(block)
            conn.end_wrapped()
            if block.settings and not block.manual and conn.pgconn.transaction_status == IDLE:
                raise errors.as_query_error(psycopg.NotSupportedError(NAMED))
            block.statement = query
            what = shape(query, conn)
            if what.special:
                what = conn.touch(what, query)
            if self.withhold and conn.local:
                wrong = refusal("a cursor WITH HOLD", CURSOR)
                raise errors.as_query_error(psycopg.NotSupportedError(wrong))
            if self.withhold:
                conn.touched = True  # it outlives its transaction, and may outlive the block
            with conn.ready():
                super().execute(query, params, **kwargs)
        return self

    # psycopg's methods, which would wait for the server.

    def fetchone(self) -> Any:
        """Return the next row, or None."""
        self._check_block()
        return super().fetchone()

    def fetchmany(self, size: int = 0) -> list[Any]:
        """Return the next rows, `arraysize` of them by default."""
        self._check_block()
        return super().fetchmany(size)

    def fetchall(self) -> list[Any]:
        """Return all the rows that are left."""
        self._check_block()
        return super().fetchall()

    def __next__(self) -> Any:
        self._check_block()
        return super().__next__()

    def scroll(self, value: int, mode: str = "relative") -> None:
        """Move the cursor."""
        self._check_block()
        super().scroll(value, mode)

    def _check_block(self) -> None:
        if self._conn.block is not self.block:
            raise _gone(self.block)

    def close(self) -> None:
        """Close the cursor at the server too, while its block has the connection."""
        if self._conn.block is self.block:
            super().close()
        else:
            self._close()


class BlockClientCursor(psycopg.ClientCursor[Any], BlockCursor):
    """A block's cursor that binds parameters at the client: several statements may share them."""

    __slots__ = ()


class CommittingCursor(BlockCursor):
    """A cursor whose one statement is committed in its own round trip, for a block of no other.

    PostgreSQL skips the COMMIT where anything before it failed, since there is no Sync between.
    """

    __slots__ = ()
    after = COMMIT

    def execute(
        self, query: Any, params: Any = None, *, prepare: bool | None = None, binary: bool | None = None
    ) -> CommittingCursor:
        """Execute and commit a statement that can ride; nothing is committed where it fails.

        :raises ConnectionLostError: with `maybe_committed`, since the COMMIT was under way.
        """
        with self._committing():
            super().execute(query, params, prepare=prepare, binary=binary)
        return self

    def executemany(self, query: Any, params_seq: Iterable[Any], *, returning: bool = False) -> None:
        """Execute a statement for each of the parameter sets and commit, as `execute` does."""
        with self._committing():
            super().executemany(query, params_seq, returning=returning)

    def _ride(
        self,
        preamble: Sequence[Command],
        query: Any,
        params: Any,
        prepare: bool | None,
        binary: bool | None,
        many: tuple[Sequence[Any], bool] | None = None,
        again: bool = False,
    ) -> None:
        with self._conn.waiting_for(2):  # for the COMMIT as well
            super()._ride(preamble, query, params, prepare, binary, many, again)

    @contextmanager
    def _committing(self) -> Iterator[None]:
        try:
            yield
        except errors.NotCleanError:
            raise  # all that followed was skipped
        except errors.ConnectionLostError as error:
            if not errors.undone(error):
                error.maybe_committed, error.repeatable = True, False
            self.block.lost = False  # or committed: this error says that nobody knows
            raise

    def _check_after(self, answers: list[list[PGresult]]) -> None:
        super()._check_after(answers)
        if [result.command_status for result in answers[-1]] != [b"COMMIT"]:
            raise errors.TransactionAbortedError(FAILED)


def commits_with(what: Shape) -> bool:
    """Tell whether a COMMIT can ride with the statement."""
    return what.number == 1 and not (what.alone or what.controls)


def has_rows(cursor: psycopg.Cursor[Any]) -> bool:
    """Go to the last statement's result, waiting for it in a pipeline, and tell whether it has rows."""
    cursor._fetch_pipeline()
    if cursor._execmany_returning is None and len(cursor._results) > 1:
        cursor.set_result(-1)
    # Of one that failed it says yes: fetching then raises.
    return cursor.pgresult is None or cursor.pgresult.status not in _NO_ROWS

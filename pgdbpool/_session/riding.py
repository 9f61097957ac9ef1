"""How one statement is sent as psycopg sends it alone, with the preamble of its block before it.

`RidingCursor._ride` is psycopg's own execution of one statement with the preamble sent before it. It
uses these private parts of psycopg, for which the minor version is pinned: `Cursor._reset`, `_tx`,
`_last_query`, `_query`, `_convert_query`, `_execute_send`, `_send_prepare`, `_send_query_prepared`,
`_check_results`, `_set_results`, `_get_prepared`, `_execmany_returning` and `Connection._prepared`.
`__init__` and `_show_known` set the attributes of a cursor themselves, and `adapters` uses
`Cursor._loaders_changed` and `AdaptersMap._register_loader_callback`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

import psycopg
from psycopg import _column
from psycopg._preparing import Prepare
from psycopg._queries import PostgresClientQuery, PostgresQuery
from psycopg.adapt import AdaptersMap, Transformer

from .. import errors
from .block import Block
from .commands import NOTHING, TUPLES_OK, Command
from .connection import PooledConnection
from .rows import row as make_rows
from .short_way import MOST_KEPT, Context, Plan, reader_for, remember
from .state import OUTSIDE
from .statement_shape import shape

if TYPE_CHECKING:
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGresult

MOST_PARAMETERS = 65_535
"""The protocol's limit for one statement: libpq refuses more while it is already sending."""

FLUSH_EVERY = 4
"""Statements of `executemany` after which their answers are asked for: the server keeps them otherwise."""

# Looked up once: a member of an enumeration is found slowly.
_SHOULD, _YES, _NO = Prepare.SHOULD, Prepare.YES, Prepare.NO
_TEXT = psycopg.pq.Format.TEXT
_ENCODING, _UTF8 = b"client_encoding", b"UTF8"
_COLUMNS = vars(_column)
_new_query, _new_tuple = PostgresQuery.__new__, tuple.__new__
ENDED = "this cursor belongs to a `with Handler(...)` block that has ended"


def gone(block: Block) -> errors.Error:
    """Return the error for a cursor whose block no longer has its connection."""
    if not block.open:
        return errors.BlockClosedError(ENDED)
    error = errors.ConnectionLostError("the connection was lost in a statement of another thread")
    error.repeatable = not block.lost
    return error


def refuse_parameters(query: PostgresQuery, number: int) -> None:
    """Refuse too many parameters for one statement, unless they are written into its text."""
    if not isinstance(query, PostgresClientQuery):
        raise psycopg.ProgrammingError(
            f"the statement has {number} parameters, and can have {MOST_PARAMETERS}: nothing was sent; "
            "pass an array (= ANY(%s), unnest(%s)), use executemany or COPY"
        )


def wrong_parameters(params: Any) -> TypeError | None:
    """Return the error for parameters that are neither a sequence nor a mapping; None for valid ones."""
    if params is None or (isinstance(params, (Sequence, Mapping)) and not isinstance(params, (str, bytes))):
        return None
    return TypeError(
        f"the parameters are a sequence or a mapping, and not of type {type(params).__name__}: "
        "for one parameter write [value] or (value,)"
    )


def checked_parameters(params: Any) -> Any:
    """Return the parameters, or None for empty ones, so that a lone `%` needs no doubling.

    :raises TypeError: they are neither a sequence nor a mapping.
    """
    if (wrong := wrong_parameters(params)) is not None:
        raise wrong
    return params or None


class Declared:
    """A cursor that declares its statements to its block, including those that psycopg begins."""

    __slots__ = ()
    _conn: PooledConnection

    def _start_query(self, query: Any = None) -> PQGen[None]:
        self._conn.declared = True
        yield from super()._start_query(query)  # type: ignore[misc]


class RidingCursor(Declared, psycopg.Cursor[Any]):
    """A cursor that sends commands in the pipeline of its statement, and closes with its block."""

    __slots__ = ("block",)
    _conn: PooledConnection
    after: tuple[Command, ...] = NOTHING
    """The commands after the statement in its pipeline."""

    def __init__(self, connection: PooledConnection, *, row_factory: Any = None) -> None:
        block = connection.block
        if block is None:
            raise errors.BlockClosedError(OUTSIDE)
        # As psycopg's, but for a copy of the adapters, which takes most of its time; see `adapters`.
        shared = None if connection.altered else connection.adapters_shared
        self._adapters = shared or connection.share_adapters()
        self.block, self._conn, self._pgconn = block, connection, connection.pgconn
        self._row_factory = row_factory or connection.row_factory
        self.format, self.arraysize, self._closed, self._last_query = _TEXT, 1, False, None
        self._results, self._pos, self._iresult, self._rowcount = [], 0, 0, -1
        self.pgresult = self._statusmessage = self._execmany_returning = self._query = None

    @property
    def adapters(self) -> AdaptersMap:
        """The cursor's own adapters, copied from the connection's when they are first asked for."""
        if sys._getframe(1).f_globals is _COLUMNS:
            return self._adapters  # psycopg describes a result, and looks types up
        if self._adapters._register_loader_callback is None:  # it shares them
            self._adapters = own = AdaptersMap(self._adapters)
            own._register_loader_callback = partial(self._loaders_changed, ref(self))
            self._last_query = None  # the next execution converts by these
        return self._adapters

    @property
    def closed(self) -> bool:
        """True once the cursor was closed or its block has ended."""
        return self._closed or not self.block.open

    # As psycopg's, but for the block.

    def _fetch_pipeline(self) -> None:
        if not self.pgresult:
            if not self.block.open:
                raise errors.BlockClosedError(ENDED)
            super()._fetch_pipeline()

    def _check_result_for_fetch(self) -> PGresult:
        result = self.pgresult
        if result and result.status == TUPLES_OK and self.block.open and not self._closed:
            return result
        if not self.block.open:
            raise errors.BlockClosedError(ENDED)
        return super()._check_result_for_fetch()

    def _convert_query(self, query: Any, params: Any = None) -> PostgresQuery:
        """Convert a statement as psycopg does; before anything is sent, refuse one that cannot be."""
        converted = self._query_cls(self._tx)
        try:
            converted.convert(query, params)
            if (values := converted.params) and len(values) > MOST_PARAMETERS:
                refuse_parameters(converted, len(values))
        except psycopg.Error as error:
            errors.as_query_error(error).unsent = True
            raise
        except Exception as error:
            found = wrong_parameters(params) or error
            if not self._conn._pipeline:
                raise found  # noqa: B904  it is the same object, or the error is its context
            # Raised in psycopg's wait as it is, it would end the pipeline's connection as an interruption.
            refused = errors.as_query_error(psycopg.DataError(f"{type(found).__name__}: {found}"))
            refused.unsent = True
            raise refused from error
        return converted

    def fetchone(self) -> Any:
        """Return the next row, or None."""
        result, pos = self.pgresult, self._pos
        if not result or result.status != TUPLES_OK or self._closed or not self.block.open:
            return super().fetchone()  # which says what is wrong
        if pos >= result.ntuples:
            return None
        row = self._tx.load_row(pos, self._make_row)
        self._pos = pos + 1
        return row

    def _ride(
        self,
        preamble: Sequence[Command],
        query: Any,
        params: Any,
        prepare: bool | None,
        binary: bool | None,
        plan: Plan | None = None,
        many: tuple[Sequence[Any], bool] | None = None,
        again: bool = False,
    ) -> None:
        """Send the statement as psycopg sends it alone, after the preamble; the caller has the turn."""
        conn = self._conn
        first: tuple[Command, ...] | None = None
        name = b""
        try:
            if (
                plan is not None and prepare is None and binary is None
                and self._ride_known(plan, preamble, params)
            ):  # fmt: skip
                return
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
            if (
                again
                or not self._may_resend(query)
                or (first := conn.before_resending(error, preamble)) is None
            ):
                raise conn.own_error(error)  # noqa: B904  it is the same object
        except BaseException as interruption:
            conn.stop_unwaited(interruption)
            raise
        if first is not None:
            RidingCursor._ride(self, first, query, params, prepare, binary, None, many, again=True)
            return
        self._last_query = query
        if plan is None and many is None and (name or conn._prepared.prepare_threshold is None):
            remember(query, conn)
        if conn._prepared._to_flush:
            conn.wait(conn._prepared.maintain_gen(conn))

    def _ride_known(self, plan: Plan, preamble: Sequence[Command], params: Any) -> bool:
        """Send a known statement; return False, with nothing sent, if psycopg has to convert it."""
        conn, pgconn, adapters = self._conn, self._pgconn, self._adapters
        utf8 = pgconn.parameter_status(_ENCODING) == _UTF8
        readable = utf8 or (params is None and plan.ascii)
        if adapters is not conn.adapters_shared or self._closed or not readable:
            return False
        values = formats = None
        key: tuple[bytes, tuple[int, ...]] = plan.bare
        if params is not None:
            given = params if type(params) is tuple and len(params) == plan.places else plan.values(params)
            if given is None:
                return False
            tx = conn.dumps or Transformer(Context(adapters, conn))
            try:
                values = tx.dump_sequence(given, plan.formats)
            except Exception:  # noqa: BLE001 - psycopg refuses it too, or adapts it by the session's state
                return False
            key, formats = (plan.query, tx.types or ()), tx.formats
        prepared = conn._prepared
        try:
            name = prepared._names[key] if prepared.prepare_threshold is not None else b""
        except KeyError:
            return False
        if self._results or self._query is not None:
            self._reset()
        more: list[list[PGresult]] | None = None
        if name and not (preamble or self.after):
            pgconn.send_query_prepared(name, values, formats, self.format)
            answer = conn.receive()
        else:
            answer, *more = self._send_known(key, name, values, formats, preamble)
        self._show_known(answer, name if utf8 and self.format is _TEXT else b"")
        if name:
            prepared._names.move_to_end(key)
        if more:
            self._check_after(more)
        return True

    def _send_known(
        self,
        key: tuple[bytes, tuple[int, ...]],
        name: bytes,
        values: Sequence[Any] | None,
        formats: Any,
        preamble: Sequence[Command],
    ) -> list[list[PGresult]]:
        """Send a statement as psycopg does, and wait; return its answer and those after it."""
        conn, pgconn, rides = self._conn, self._pgconn, preamble or self.after
        if name:
            send = partial(pgconn.send_query_prepared, name, values, formats, self.format)
        else:
            sent = self._query = _new_query(PostgresQuery)
            (sent.query, sent.types), sent.params, sent.formats = key, values, formats
            send = partial(self._execute_send, sent, force_extended=bool(rides))
        if rides:
            return conn.exchange(preamble, send, self.after)
        send()
        return [conn.receive()]

    def _show_known(self, answer: list[PGresult], name: bytes) -> None:
        """Set the answer as the cursor's result, as psycopg's `_set_results` does, or raise its error.

        :param name: of the prepared statement, if its reader may be used.
        """
        if len(answer) != 1:
            self._check_results(answer)
        result = answer[0]
        if (status := result.status) > TUPLES_OK:
            self._check_results(answer)  # raises, unless a COPY or an empty statement
        self._results, self.pgresult = answer, result
        self._execmany_returning, self._statusmessage = None, result.command_status
        self._last_query = None  # no later execution may go on with the reader's transformer
        conn, factory = self._conn, self._row_factory
        if status == TUPLES_OK:
            self._rowcount = result.ntuples
            if (reader := conn.readers.get(name)) and reader.read(result, self, self._pgconn):
                self._tx = reader.tx
            else:
                self._read_anew(result, name)
        else:
            changed = result.command_tuples
            self._rowcount = -1 if changed is None else changed
            self._tx = Transformer(_new_tuple(Context, (self._adapters, conn)))
            self._tx.set_pgresult(result)
        if factory is not make_rows or not name:
            self._make_row = factory(self)
        elif maker := conn.makers.get(name):
            self._make_row = maker
        else:
            if len(conn.makers) >= MOST_KEPT:
                conn.makers.clear()
            self._make_row = conn.makers[name] = factory(self)

    def _read_anew(self, result: PGresult, name: bytes) -> None:
        """Make the reader of a result, and keep it for a prepared statement that comes again."""
        readers = self._conn.readers
        if name and name not in readers:
            if len(readers) >= MOST_KEPT:
                readers.clear()
            readers[name] = None
        elif name and readers[name] is not False:
            readers[name] = reader = reader_for(self, result, self._adapters, self._pgconn)
            if reader:
                self._tx = reader.tx
                return
        self._tx = Transformer(_new_tuple(Context, (self._adapters, self._conn)))
        self._tx.set_pgresult(result)

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
            self._tx = Transformer(Context(self._adapters, self._conn))

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
        """Take over the answer to the statement as the cursor's result, or raise its error."""
        if preparing is not _SHOULD:
            self._check_results(answer)
        # Only now: a statement that was skipped is not prepared, whatever psycopg would note.
        prepared = self._conn._prepared
        if (key := prepared.maybe_add_to_cache(query, preparing, name)) is not None:
            prepared.validate(key, preparing, name, answer)
        if preparing is _SHOULD:  # it is prepared even if its execution fails
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
        for params in sets:  # before anything is sent, since a parameter may be refused
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
        """Raise if a command after the statement failed: a COMMIT, or the one that a Sync implies."""
        try:
            for answer in answers:
                self._check_results(answer)
        except psycopg.Error:
            self._reset(reset_query=False)  # its result is not in effect
            raise

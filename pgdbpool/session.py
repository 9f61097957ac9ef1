"""The connection as a block sees it: the preamble, what can ride with it, and who may use it when.

What a block needs before a statement (`BEGIN`, later the tenant and local settings) is the
*preamble*. It travels in one pipeline with the statement, with no Sync between, so it costs no
round trip, and PostgreSQL skips the statement when a part of the preamble fails.

`BlockCursor._maybe_prepare_gen` is psycopg's own sending of one statement with the preamble sent
before it. It uses these private parts of psycopg, for which the minor version is pinned:
`Cursor._execute_send`, `_send_prepare`, `_send_query_prepared`, `_check_results`, `_set_results` and
`Connection._prepared`. `Connection.pipeline()` does the same at five times the cost on the client.
"""

from __future__ import annotations

import re
import select
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from threading import get_ident
from time import monotonic
from types import CodeType
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import generators, pq
from psycopg._preparing import Prepare
from psycopg.errors import _WaitTimeout
from psycopg.sql import Composable

from . import errors

if TYPE_CHECKING:
    from psycopg._queries import PostgresQuery
    from psycopg.abc import PQGen

    from .endpoint import Endpoint

IDLE = pq.TransactionStatus.IDLE
_ACTIVE = pq.TransactionStatus.ACTIVE
_BAD = pq.ConnStatus.BAD
_FATAL = pq.ExecStatus.FATAL_ERROR

Command = tuple[bytes, Sequence[bytes | None] | None]
"""A statement of the preamble with its parameters in text format."""

BEGIN: tuple[Command, ...] = ((b"BEGIN", None),)


NOTHING: tuple[Command, ...] = ()


class Block:
    """One `with` block: what its statements need first, and who opened it where."""

    __slots__ = ("failure", "lost", "manual", "open", "place", "since", "thread")

    def __init__(self, manual: bool, place: tuple[CodeType, int]) -> None:
        self.open = True
        self.failure: Exception | None = None
        """The last error of a statement: the cause, where the transaction cannot be committed."""
        self.lost = False
        """Whether an open transaction was lost with its connection, and not yet given up."""
        self.manual = manual
        self.since = 0.0
        self.thread = get_ident()
        self.place = place

    def preamble(self, conn: PooledConnection) -> Sequence[Command]:
        """Return what must be sent before the next statement: BEGIN where no transaction is open."""
        return BEGIN if self.manual and conn.pgconn.transaction_status == IDLE else NOTHING


class PooledConnection(psycopg.Connection[Any]):
    """A psycopg connection that belongs to an endpoint and, while it is lent, to one block.

    It is in autocommit mode always: the block owns the transaction. Statements reach the server
    only while a block has the connection, whether through the Handler or through the connection.
    """

    endpoint: Endpoint
    block: Block | None = None
    patience: float | None = None
    """Seconds that one wait for the server may take; None for no bound."""
    used_at: float = 0.0
    """When the connection was last known to work, on the monotonic clock."""
    expires_at: float = float("inf")
    asked_role: str | None = None
    """The role of a server that does not report it (before PostgreSQL 14), asked once."""

    _pool: Any = None  # set: psycopg then does not warn when the interpreter drops it open

    def watch(self) -> None:
        """Prepare `poll`; to be called once, when the connection is open."""
        poller = select.poll()
        poller.register(self.pgconn.socket, select.POLLIN)
        self.poll: Callable[[float], list[tuple[int, int]]] = poller.poll
        self.used_at = monotonic()

    def alive(self) -> bool:
        """Tell, without a round trip, whether the server still holds the other end.

        A server that closed, restarted or was killed has sent FIN or RST. Readable is not dead:
        a notice, a parameter status (after a promotion) or a TLS ticket is consumed first.
        """
        pgconn = self.pgconn
        try:
            for _ in range(100):  # a flood of notifications is alive
                if not self.poll(0):
                    break
                pgconn.consume_input()
                pgconn.is_busy()  # parses what was read
        except psycopg.OperationalError:
            return False
        return pgconn.status != _BAD

    def ping(self, timeout: float) -> bool:
        """Tell whether the server answers an empty query within the timeout (seconds)."""
        pgconn = self.pgconn
        deadline = monotonic() + timeout
        try:
            pgconn.send_query(b"")
            pgconn.flush()
            while pgconn.is_busy():
                if not self.poll(max(0.0, deadline - monotonic()) * 1000):
                    return False
                pgconn.consume_input()
            while pgconn.get_result():
                pass
        except psycopg.OperationalError:
            return False
        self.used_at = monotonic()
        return True

    # psycopg comes through here whenever it waits for the server: statements, COMMIT, COPY ...

    def wait(self, gen: PQGen[Any], interval: float = 0.1, timeout: float | None = None) -> Any:
        """Run psycopg's generator within the deadline; errors are raised as `DBQueryError`."""
        patience = self.patience if timeout is None else timeout
        try:
            return super().wait(gen, interval, patience)
        except _WaitTimeout:
            if timeout is not None:
                raise  # the caller's own deadline, not the statement's
            self.close()
            self.endpoint.suspected_at = monotonic()
            raise errors.QueryDeadlineError(
                f"{self.endpoint.label} gave no answer within {patience:g} s: connection closed"
            ) from None
        except psycopg.Error as error:
            if errors.ends_session(error):
                self.close()
            own = errors.ConnectionLostError if self.closed else errors.DBQueryError
            raise errors.as_query_error(error, own)  # noqa: B904  it is the same object

    def send_preamble(self) -> None:
        """Send what the block needs first in a round trip of its own, where anything is due."""
        block = self.block
        if block is None:
            raise errors.BlockClosedError(_OUTSIDE)
        for sql, params in block.preamble(self) if not self._pipeline else ():
            psycopg.Cursor(self).execute(sql, params)

    def commit(self) -> None:
        """Commit the open transaction, if any; a failed one is rolled back and raises.

        :raises TransactionAbortedError: a statement of the transaction had failed.
        :raises ConnectionLostError: with `maybe_committed`, since the outcome is unknown.
        """
        if self.pgconn.transaction_status == pq.TransactionStatus.INERROR:
            self.rollback()
            raise errors.TransactionAbortedError(
                "a statement of this transaction failed: it was rolled back, nothing was committed"
            )
        try:
            super().commit()
        except errors.ConnectionLostError as error:
            error.maybe_committed = True
            raise

    @contextmanager
    def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> Iterator[psycopg.Transaction]:
        """Open a transaction, or a savepoint where the block has one open already."""
        self.send_preamble()
        outermost = self.pgconn.transaction_status == IDLE
        body_ended = False
        try:
            with super().transaction(savepoint_name, force_rollback) as transaction:
                yield transaction
                body_ended = not self.closed
        except errors.ConnectionLostError as error:
            error.maybe_committed = error.maybe_committed or (body_ended and outermost)
            raise

    @contextmanager
    def pipeline(self) -> Iterator[psycopg.Pipeline]:
        """Switch to pipeline mode; what the block needs first is sent before."""
        self.send_preamble()
        with super().pipeline() as pipeline:
            yield pipeline

    def notifies(self, **kwargs: Any) -> Generator[psycopg.Notify]:
        """Yield notifications; waiting for them is no statement, so it has no deadline of its own."""
        patience, self.patience = self.patience, None
        try:
            yield from super().notifies(**kwargs)
        finally:
            self.patience = patience


_OUTSIDE = "this connection is back in its pool: use it inside its `with Handler(...)` block only"
_ENDED = "this cursor belongs to a `with Handler(...)` block that has ended"


class BlockCursor(psycopg.Cursor[Any]):
    """A cursor that sends the block's preamble with its statements and closes with the block."""

    __slots__ = ("_preamble", "block")
    _conn: PooledConnection

    def __init__(self, connection: PooledConnection, *, row_factory: Any = None) -> None:
        if connection.block is None:
            raise errors.BlockClosedError(_OUTSIDE)
        super().__init__(connection, row_factory=row_factory or connection.row_factory)
        self.block = connection.block
        self._preamble: Sequence[Command] = NOTHING

    @property
    def closed(self) -> bool:
        """True once the cursor was closed or its block has ended."""
        return self._closed or not self.block.open

    def execute(
        self, query: Any, params: Any = None, *, prepare: bool | None = None, binary: bool | None = None
    ) -> BlockCursor:
        """Execute a statement, with the preamble of the block where one is due."""
        conn = self._conn
        if conn.block is not self.block:
            raise errors.BlockClosedError(_ENDED)
        preamble = self.block.preamble(conn)
        autocommit = not preamble and conn.pgconn.transaction_status == IDLE
        try:
            if preamble and not conn._pipeline:
                if rides(query, conn):
                    self._preamble = preamble
                else:
                    conn.send_preamble()
            super().execute(query, params, prepare=prepare, binary=binary)
        except errors.ConnectionLostError as error:
            self.block.failure = error
            self.block.lost = not autocommit
            error.maybe_executed = autocommit
            error.maybe_committed = _COMMITS(_text(query, conn)) is not None
            # Rode with its own BEGIN: nothing of it can have been committed.
            error.repeatable = bool(self._preamble)
            raise
        except psycopg.Error as error:
            self.block.failure = error
            if conn.pgconn.transaction_status == _ACTIVE:
                # psycopg leaves a COPY that it refuses under way: where that ends is not known.
                conn.close()
                self.block.lost = not autocommit
            raise
        finally:
            self._preamble = NOTHING
        return self

    def executemany(self, query: Any, params_seq: Iterable[Any], *, returning: bool = False) -> None:
        """Execute the statement once for each of the parameter sets, in one pipeline."""
        params = params_seq if isinstance(params_seq, Sequence) else list(params_seq)
        conn = self._guarded()
        patience = conn.patience
        if patience is not None:  # the server's statement_timeout holds for each one
            conn.patience = patience * max(1, len(params))
        try:
            super().executemany(query, params, returning=returning)
        finally:
            conn.patience = patience

    def stream(self, query: Any, params: Any = None, **kwargs: Any) -> Iterator[Any]:
        """Iterate row by row over a result that the client does not hold as a whole."""
        self._guarded()
        yield from super().stream(query, params, **kwargs)

    @contextmanager
    def copy(self, statement: Any, params: Any = None, *, writer: Any = None) -> Iterator[psycopg.Copy]:
        """Start a COPY; what the block needs first is sent before, since COPY cannot ride."""
        self._guarded()
        with super().copy(statement, params, writer=writer) as copy:
            yield copy

    def _guarded(self) -> PooledConnection:
        if self._conn.block is not self.block:
            raise errors.BlockClosedError(_ENDED)
        self._conn.send_preamble()
        return self._conn

    def _maybe_prepare_gen(
        self, pgq: PostgresQuery, *, prepare: bool | None = None, binary: bool | None = None
    ) -> PQGen[None]:
        """Send the statement, as psycopg does, and in the same round trip what goes before it.

        That is the preamble, and preparing the statement where psycopg takes a round trip for it.
        """
        conn, pgconn, prepared = self._conn, self._conn.pgconn, self._conn._prepared
        preparing, name = prepared.get(pgq, prepare)
        if conn._pipeline or not (self._preamble or preparing is Prepare.SHOULD):
            yield from super()._maybe_prepare_gen(pgq, prepare=prepare, binary=binary)
            return
        before = len(self._preamble)
        pgconn.enter_pipeline_mode()
        try:
            for sql, values in self._preamble:
                pgconn.send_query_params(sql, values)
            if preparing is Prepare.NO:
                self._execute_send(pgq, force_extended=True, binary=binary)
            else:
                if preparing is Prepare.SHOULD:
                    self._send_prepare(name, pgq)
                    before += 1
                self._send_query_prepared(name, pgq, binary=binary)
            pgconn.pipeline_sync()
            yield from generators.send(pgconn)
            failed = None
            for _ in range(before):
                for result in (yield from generators.fetch_many(pgconn)):
                    if failed is None and result.status == _FATAL:
                        failed = result
            results = yield from generators.fetch_many(pgconn)
            yield from generators.fetch_many(pgconn)  # the Sync's
            pgconn.exit_pipeline_mode()
        except BaseException:
            # Interrupted between send and Sync: where the session stands is unknown.
            pgconn.finish()
            raise
        if failed is not None:
            raise psycopg.errors.error_from_result(failed, encoding=self._encoding)
        # Only now: a statement that was skipped is not prepared, whatever psycopg would note.
        key = prepared.maybe_add_to_cache(pgq, preparing, name)
        if key is not None:
            prepared.validate(key, preparing, name, results)
        self._check_results(results)
        self._set_results(results)


class BlockServerCursor(psycopg.ServerCursor[Any]):
    """A named cursor of the block; its DECLARE comes after the preamble."""

    __slots__ = ("block",)
    _conn: PooledConnection

    def __init__(self, connection: PooledConnection, name: str, **kwargs: Any) -> None:
        if connection.block is None:
            raise errors.BlockClosedError(_OUTSIDE)
        super().__init__(connection, name, **kwargs)
        self.block = connection.block

    @property
    def closed(self) -> bool:
        """True once the cursor was closed or its block has ended."""
        return self._closed or not self.block.open

    def execute(self, query: Any, params: Any = None, **kwargs: Any) -> BlockServerCursor:
        """Declare the cursor for the query, after the preamble of the block."""
        if self._conn.block is not self.block:
            raise errors.BlockClosedError(_ENDED)
        self._conn.send_preamble()
        super().execute(query, params, **kwargs)
        return self

    def close(self) -> None:
        """Close the cursor at the server too, while its block has the connection."""
        if self._conn.block is self.block:
            super().close()
        else:
            self._close()


class BlockClientCursor(psycopg.ClientCursor[Any], BlockCursor):
    """A block's cursor that binds parameters at the client: several statements may share them."""

    __slots__ = ()


# What can ride.

_NOT_CODE = re.compile(
    r"""  (?<![\w$])[eE]'(?:[^'\\]|\\.|'')*'            # a string with backslash escapes
        | '(?:[^']|'')*'                    # a string
        | "(?:[^"]|"")*"                    # a quoted name
        | \$([A-Za-z_]\w*)?\$.*?\$\1\$      # a dollar-quoted string, with a tag
        | \$\$.*?\$\$                       # a dollar-quoted string
        | --[^\n]*                          # a comment
        | /\*.*?\*/                         # a comment (a nested one leaves its tail: see below)
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMITS = re.compile(r"\b(?:commit|end)\b", re.IGNORECASE).search


@lru_cache(maxsize=1024)
def statements(sql: str) -> int:
    """Count the statements in the text; where in doubt, one too many rather than one too few."""
    code = _NOT_CODE.sub(" ", sql)
    return max(1, sum(1 for part in code.split(";") if part.strip()))


@lru_cache(maxsize=1024)
def _is_copy(sql: str) -> bool:
    return _NOT_CODE.sub(" ", sql).lstrip(" \t\r\n\f\v(").upper().startswith("COPY")


def _text(query: Any, conn: psycopg.Connection[Any]) -> str:
    if isinstance(query, str):
        return query
    if isinstance(query, bytes):
        return query.decode("utf-8", "replace")
    if isinstance(query, Composable):
        return query.as_string(conn)
    return ""  # a template string: psycopg binds it at the server, one statement


def rides(query: Any, conn: psycopg.Connection[Any]) -> bool:
    """Tell whether a statement can travel in a pipeline.

    Several statements in one string cannot (the extended protocol takes one), nor can COPY.
    https://www.postgresql.org/docs/current/libpq-pipeline-mode.html
    """
    sql = _text(query, conn)
    return not _is_copy(sql) and (";" not in sql or statements(sql) == 1)

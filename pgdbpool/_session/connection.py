"""The connection as a block sees it: it reaches the server only while a block has it.

Each layer uses only the layers below it: `state` (attributes, and the thread that may use them), `cleaning`
(changes to the session), `liveness` (waits and losses), `guarding` (reads that must not be stale),
`request_settings`, `exchange` (pipelines), `telling`, `transactions` and `two_phase`. This module hooks into
psycopg's own cursors and pipelines.

`restore_attributes` resets attributes that psycopg has no public setter for, and `pipeline` replaces a
pipeline's `result_queue`. The minor version of psycopg is pinned for that.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import TYPE_CHECKING, Any

import psycopg

from .. import errors
from .._request import deadline as deadlines
from .._request import special
from .block import Block
from .commands import ACTIVE, IDLE
from .foreign_cursors import Visit, asked_in
from .state import BUSY, OUTSIDE
from .two_phase import TwoPhaseConnection

if TYPE_CHECKING:
    from types import FrameType

    from psycopg import ConnectionInfo
    from psycopg.abc import PQGen


class _Answers(deque[Any]):
    """The results psycopg waits for in a pipeline; a failing COMMIT implied by its Sync adds one."""

    def popleft(self) -> Any:
        """Return the entry to which the next answer belongs, or None if it belongs to no cursor."""
        return super().popleft() if self else None


_start_query = psycopg.Connection._start_query  # by name: `super()` would look through each of the layers


class PooledConnection(TwoPhaseConnection):
    """A psycopg connection that belongs to an endpoint and, while it is lent, to one block.

    To psycopg it is in autocommit mode always: the block owns the transaction, and `autocommit` is the
    block's. Statements reach the server only while a block has the connection, whether through the Handler
    or through the connection.
    """

    @property
    def info(self) -> ConnectionInfo:
        """psycopg's connection info; `error_message` is kept after a failure in a pipeline.

        :raises ConnectionLostError: the session had to be cleaned first; see `expose`.
        """
        if self.stale and self.block is not None:  # in `on_checkout`
            self.clean_what_shows()
        failed, text = self.failed
        statement = None if self.block is None else getattr(self.block, "statement", None)
        return _Info(self, text if failed is not None and failed is statement else "")

    def _start_query(self) -> PQGen[None]:
        """Admit a cursor that the block did not create; every psycopg cursor calls this first."""
        block = self.block
        if self.declared:
            self.declared = False
        else:
            self.explicit, self.undeclared = False, getattr(block, "statement", None)
            if self._pipeline is not None:
                self.unsure = True
                self.mark(attributes=True)
        if self.settled is not None and not self.riding:
            if block is None:
                raise errors.BlockClosedError(OUTSIDE)
            self._welcome(block, sys._getframe(1))
        if self._pipeline and block is not None and block.manual and self.pgconn.transaction_status == IDLE:
            return self._begin_in_pipeline()
        return _start_query(self)

    def _welcome(self, block: Block, frame: FrameType) -> None:
        mine = self.owner == get_ident()
        if mine and not self.holder and self.step is None:
            return  # the block's own cursor has already sent the preamble
        asked = asked_in(frame)
        if mine and not self.holder:
            if not hasattr(asked.cursor, "block"):
                # The end of this thread's turn was interrupted: the statement would go without the tenant.
                self.force_close()
                self._note_loss(psycopg.OperationalError(BUSY), ACTIVE)
                self._check_connection_ok()
            return
        if mine:
            if not hasattr(asked.cursor, "block"):
                self.check_free()  # the block's own stream or COPY is still open
            return
        visit: Any = self.visit or Visit(self, block)
        if self.visit is None and not self._pipeline:
            visit.begin(isinstance(asked.cursor, psycopg.ServerCursor) and not asked.cursor.withhold)
        visit.note(asked)

    @contextmanager
    def _pipeline_nolock(self) -> Iterator[psycopg.Pipeline]:
        """Send the block's due commands before `executemany` opens its pipeline."""
        if self.block is not None and self.owner != get_ident() and not self.riding:
            Visit(self, self.block).begin(named=False)
        with super()._pipeline_nolock() as pipeline:
            yield pipeline

    @contextmanager
    def _wrapped_pipeline(self) -> Iterator[None]:
        """Send the block's due commands; other threads may take part in the body."""
        counted = False
        try:
            with self.alone():
                self.end_wrapped()
                self.pipelines, counted = self.pipelines + 1, True
                block, autocommit, wrap = self._send_due_of_pipeline()
                if not self._pipeline:
                    self.implicit = autocommit and not wrap
            with self.over(block, autocommit, wrap):
                yield
        finally:
            if counted:
                self.pipelines -= 1

    def _send_due_of_pipeline(self) -> tuple[Block, bool, bool]:
        """Send the block's due commands before a pipeline; a BEGIN alone waits for the first statement in it.

        This applies to a block that has set `autocommit` itself: as in psycopg, the connection stays
        idle, and its attributes can still be set.
        """
        block = self.block
        if (
            block is not None and block.manual and not (block.nests or block.settings or self.stale)
            and self.pgconn.transaction_status == IDLE and not (special.in_use or self.annotates)
        ):  # fmt: skip
            return block, False, False
        return self.send_due()

    @contextmanager
    def pipeline(self) -> Iterator[psycopg.Pipeline]:
        """Switch to pipeline mode, after sending the block's due commands."""
        if self.settled is None:
            with super().pipeline() as pipeline:
                yield pipeline  # of `configure`
            return
        self.check_free()
        with self._wrapped_pipeline(), self.preparing():
            try:
                with super().pipeline() as pipeline:
                    self.mark(attributes=True, kept=True)  # a Pipeline reaches it, and may be left open
                    if not isinstance(pipeline.result_queue, _Answers):
                        pipeline.result_queue = _Answers(pipeline.result_queue)
                    yield pipeline
            except psycopg.Error as error:
                if isinstance(error, errors.ConnectionLostError) and self.unsure:
                    self._note_unknown(error)
                if isinstance(error, errors.DBQueryError):
                    raise
                if not self.pgconn.pipeline_status and not self.closed:
                    raise self.own_error(error)  # noqa: B904  it is the same object
                # psycopg cannot leave the pipeline: its end was interrupted.
                self.close()
                self._note_loss(error, ACTIVE)
                if error.__context__ is not None and not isinstance(error.__context__, psycopg.Error):
                    raise error.__context__ from None
                if isinstance(error.__context__, psycopg.Error) and error.__context__.sqlstate:
                    # The server's error at the end of an implicit transaction (a deferred constraint).
                    raise errors.as_query_error(error.__context__) from None
                raise self.own_error(error)  # noqa: B904  it is the same object

    def notifies(self, **kwargs: Any) -> Generator[psycopg.Notify]:
        """Yield notifications; waiting for them is not a statement, so `patience` does not apply."""
        self.check_free()
        left = deadlines.time_left() if deadlines.in_use else None
        if left is not None:  # the request's deadline acts as a timeout
            given = kwargs.get("timeout")
            kwargs["timeout"] = max(0.0, left if given is None else min(given, left))
        with self.alone():
            if self.stale and self.pgconn.transaction_status == IDLE:
                self.run(self.cleaning)  # drop the last block's LISTEN
            block, patience = self.block, self.patience
            self.patience, self.holder = None, get_ident()
            try:
                yield from super().notifies(**kwargs)
            finally:
                if self.block is block:  # a generator left open may end when another block has the connection
                    self.patience, self.holder = patience, 0


drivers: set[str] = set()
"""Modules of psycopg and of this package that have asked for the connection of libpq."""


def asked_by_driver(asker: FrameType) -> bool:
    """Return whether psycopg or this package asks for libpq's connection: these note their own effects."""
    name: str = asker.f_globals.get("__name__", "")
    if name not in drivers:
        if not name.startswith(("psycopg", "pgdbpool.")):
            return False
        drivers.add(name)
    return True


class _Info(psycopg.ConnectionInfo):
    """psycopg's connection info, with the error that libpq forgets when a pipeline ends."""

    def __init__(self, conn: PooledConnection, failure: str) -> None:
        self._conn = conn
        super().__init__(conn.pgconn)
        self._failure = failure

    @property
    def pgconn(self) -> Any:
        """libpq's connection; if the application uses it, the session is cleaned after the block."""
        if not asked_by_driver(sys._getframe(1)):
            self._conn.mark(session=True)
        return self._pgconn

    @pgconn.setter
    def pgconn(self, value: Any) -> None:
        self._pgconn = value

    @property
    def error_message(self) -> str:
        """The server's message about the last statement, if that failed."""
        return super().error_message or self._failure


_classes: dict[tuple[type[Any], type[PooledConnection]], type[PooledConnection]] = {}


def pooled(
    cls: type[psycopg.Connection[Any]] | None, base: type[PooledConnection] = PooledConnection
) -> type[PooledConnection]:
    """Return the class of a group's connections, combined with the application's class, if any."""
    if cls is None:
        return base
    if issubclass(cls, base):
        return cls
    if (cls, base) not in _classes:
        # Its methods come first, and their `super()` is the pool's connection.
        _classes[cls, base] = type(cls.__name__, (cls, base), {"__module__": cls.__module__})
    return _classes[cls, base]

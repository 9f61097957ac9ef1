"""The cursors of a block: they send its preamble with their statements, and end with it.

`has_rows` and `plain_row` use psycopg's private `Cursor._fetch_pipeline`, `_results`, `_tx`, `_make_row` and
`_row_factory`, for which its minor version is pinned.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql
from psycopg._compat import Template

from .. import errors
from .._request import deadline as deadlines
from .._request import freshness, special
from . import outcome
from .commands import ACTIVE, COMMIT, EMPTY, IDLE, NOTHING, TUPLES_OK, Command, begins
from .connection import PooledConnection
from .riding import RidingCursor, checked_parameters, gone
from .rows import Row
from .rows import row as make_rows
from .short_way import Plan, plans
from .statement_shape import StatementTraits, shape
from .statement_text import comment_on
from .transactions import ENDS_INSIDE, FAILED

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

RECOVERY_CONFLICT = "40001"
"""SQLSTATE of a statement that a standby cancelled because its replay could wait no longer."""

_NO_PLACE = (
    "executemany() binds sets of parameters, and a template string has its values already: give the "
    "statement as text with %s, or execute a template string for each set"
)
_COPY_IN = psycopg.pq.ExecStatus.COPY_IN
_NO_ROWS = (int(psycopg.pq.ExecStatus.COMMAND_OK), int(psycopg.pq.ExecStatus.EMPTY_QUERY))


def _goes_on(conn: PooledConnection, error: psycopg.Error) -> bool:
    """Return whether the connection is in a pipeline, which takes answers while it goes on sending."""
    refused = error.sqlstate is None and not isinstance(error, psycopg.errors.PipelineAborted)
    return conn._pipeline is not None and (not refused or getattr(error, "unsent", False))


class BlockCursor(RidingCursor):
    """A cursor that sends the block's preamble with its statements and closes with the block."""

    __slots__ = ()

    def execute(
        self, query: Any, params: Any = None, *, prepare: bool | None = None, binary: bool | None = None
    ) -> BlockCursor:
        """Execute a statement, with the preamble of the block if one is due."""
        conn, block = self._conn, self.block
        try:
            plan = plans[query] if type(query) is str else None
        except KeyError:
            plan = None
        what = shape(query, conn) if plan is None else plan.what
        if conn.step is not None:
            conn.take_back()
        # From here on no other thread's statement comes between the preamble, the statement and its notes.
        with conn.turn:
            if conn.block is not block or conn.wrapped:
                self._take_up()
            block.statement = query
            touched = conn.touched
            if what.special:
                what = self._note(what, query)
            autocommit = not block.manual and conn.pgconn.transaction_status == IDLE
            first = preamble = NOTHING if conn._pipeline else conn.preamble(block)
            if special.in_use or conn.annotates:
                preamble = self._extended(preamble, what, autocommit)
            try:
                if what.uncommon or conn._pipeline:
                    self._execute_uncommon(what, preamble, autocommit, query, params, prepare, binary)
                else:
                    self._ride(preamble, query, params, prepare, binary, plan)
                    if first:
                        conn.bound = conn.pgconn.transaction_status != IDLE
                if what.changes and (autocommit or conn.wrapped) and not what.controls:
                    block.in_effect = True
            except psycopg.Error as error:
                rode = begins(first) and self._rides(what, preamble, autocommit)
                self._note_failure(error, what, autocommit, rode, touched)
                raise
        return self

    def _take_up(self) -> None:
        """Refuse a cursor without a connection; end a transaction whose end was interrupted."""
        if self._conn.block is not self.block:
            raise gone(self.block)
        self._conn.end_wrapped()

    def _note(self, what: StatementTraits, query: Any) -> StatementTraits:
        """Note the effects of a statement before it is sent; return its traits in this session."""
        what = self._conn.touch(what, query)
        if what.controls:
            self._begin_control(what)
        return what

    def _rides(self, what: StatementTraits, preamble: tuple[Command, ...], autocommit: bool) -> bool:
        """Return whether the statement goes with its preamble, which may be empty, in one round trip."""
        if what.number == 1 and not preamble:
            return True
        refused_in_transaction = what.utility and autocommit and not self.block.settings
        return not (what.number > 1 or what.alone or refused_in_transaction)

    def _execute_uncommon(
        self, what: StatementTraits, preamble: tuple[Command, ...], autocommit: bool, query: Any, params: Any,
        prepare: bool | None, binary: bool | None,
    ) -> None:  # fmt: skip
        """Execute in a pipeline, or a statement that cannot ride, or that begins or ends a transaction."""
        conn, block = self._conn, self.block
        conn.note_definition(what)
        if what.ends:
            # Also if it is interrupted at its end: the chained transaction has no tenant yet.
            conn.bound, block.committed = False, block.committed or what.commits
            conn.crossed = False
        if conn._pipeline:
            conn.implicit = conn.implicit and not what.controls
            with conn.owning():
                super().execute(query, params, prepare=prepare, binary=binary)
        elif self._rides(what, preamble, autocommit):
            if what.controls and autocommit and preamble:
                preamble = self._before_begin()
            try:
                self._ride(preamble, query, params, prepare, binary)
            finally:
                if not preamble and special.in_use:  # with one `_ride` asks; CALL commits before it fails
                    with conn.owning():
                        conn.tell_of_alone(block, autocommit)
            if preamble and not what.ends:
                conn.bound = conn.pgconn.transaction_status != IDLE
        else:
            with conn.owning(), conn.ready(), conn.waiting_for(what.number):
                if what.number > 1:
                    prepare = False
                    if params is None and isinstance(query, Template):  # the server binds for one statement
                        query = sql.as_bytes(query, conn)
                self._ride(NOTHING, self._commented(query), params, prepare, binary)
        if what.controls:
            self._end_control(what)

    def _before_begin(self) -> tuple[Command, ...]:
        """Return the commands before a BEGIN that is a statement of an autocommit block.

        Its modes must come before any query, so the settings are bound with the statement after it.
        """
        conn, modes = self._conn, self.block.binding.modes
        first = [] if modes is None else conn.allowed(modes).before_begin()
        cleaning = conn.cleaning if conn.stale else NOTHING
        return cleaning + self.block.guards() + tuple((text, None) for text in first)

    def _end_control(self, what: StatementTraits) -> None:
        """After a statement that began or ended a transaction."""
        conn, block = self._conn, self.block
        if not conn._pipeline:
            conn.explicit = conn.pgconn.transaction_status != IDLE
        conn.bound = False
        if what.ends:
            block.committed = True
            if what.commits and special.in_use and not conn._pipeline:
                with conn.owning():
                    conn.tell_now()
            if what.commits and what.number == 1 and self.statusmessage == "ROLLBACK":
                raise errors.TransactionAbortedError(FAILED) from block.failure

    def _note_failure(
        self, error: psycopg.Error, what: StatementTraits, autocommit: bool, rode: bool, touched: bool
    ) -> None:
        """Note the consequences of a failed statement in the block and in the error."""
        conn, block = self._conn, self.block
        conn.telling = False
        if isinstance(error, errors.ConnectionLostError):
            single = what.number == 1 and not conn._pipeline
            block.committed = block.committed or what.ends
            implicit = conn._pipeline is not None and conn.implicit
            commits = what.commits or (what.ends and what.number > 1)  # those after a ROLLBACK, at the end
            self._note_loss(error, autocommit or implicit, commits, rode, touched, single)
            return
        block.failure = errors.without_frames(error)
        block.committed = block.committed or (what.ends and what.number > 1)
        if what.ends and what.number > 1 and special.in_use:
            with conn.owning():
                conn.tell_now()
        if error.sqlstate == RECOVERY_CONFLICT:
            self._note_conflict(error, autocommit, rode, touched, what.number == 1)
        if conn.pgconn.transaction_status == ACTIVE and not _goes_on(conn, error):
            # psycopg leaves a COPY that it refuses under way: its end is not known.
            conn.close()
            block.lost = not autocommit

    def _begin_control(self, what: StatementTraits) -> None:
        """Before a statement that begins or ends a transaction: the open one may end."""
        conn, block = self._conn, self.block
        if block.settings and (what.number > 1 or (conn._pipeline and what.ends)):
            raise errors.as_query_error(psycopg.NotSupportedError(ENDS_INSIDE))
        conn.explicit = False
        if what.ends and (conn._pipeline or conn._num_transactions):
            conn.unsure = True
            conn.mark(attributes=True)

    def _extended(
        self, preamble: tuple[Command, ...], what: StatementTraits, autocommit: bool
    ) -> tuple[Command, ...]:
        """Add a deadline's and `annotate`'s settings to the preamble, if the statement can ride with it."""
        conn = self._conn
        left = deadlines.check() if deadlines.in_use else None
        # A common one always rides: for it `limit` and `annotate` reset the settings of an ended transaction.
        if what.uncommon or what.sets or conn._pipeline:
            if what.ends or conn.pgconn.transaction_status == IDLE:
                conn.limited = conn.annotated = False
            if (
                what.number > 1 or conn._pipeline or what.alone or what.controls or what.sets
                or (what.utility and autocommit and not self.block.settings)
            ):  # fmt: skip
                return preamble
        if deadlines.in_use:
            preamble = conn.limit(preamble, left)
        if conn.annotates:
            preamble = conn.annotate(preamble)
        return self._to_tell(preamble, autocommit) if freshness.in_use else preamble

    def _to_tell(self, preamble: tuple[Command, ...], autocommit: bool) -> tuple[Command, ...]:
        """Have the statement report the end of its writes, if it may have any and ends its transaction."""
        conn = self._conn
        if not (autocommit or self.after) or conn.learns() is None:
            return preamble
        if not self.after and not outcome.may_commit(self.block.statement, inside=False):
            return preamble
        conn.tell_next()
        return preamble or EMPTY

    def _commented(self, query: Any) -> Any:
        """Return a statement that cannot ride, with the id in a comment: no plan of it is kept."""
        if not self._conn.annotates:
            return query
        return comment_on(query, f"correlation_id={self.block.correlation_id}")

    def _note_loss(
        self,
        error: errors.ConnectionLostError,
        autocommit: bool,
        commits: bool,
        rode: bool,
        touched: bool,
        single: bool,
    ) -> None:
        """Note the loss of the connection in the block and in the error."""
        block = self.block
        block.failure = errors.without_frames(error)
        if isinstance(error, errors.NotReplicatedError):
            return  # the error itself says everything, and the connection is there
        block.lost = block.lost or not autocommit
        if error.repeatable:
            return
        if not errors.undone(error):
            error.maybe_executed = error.maybe_executed or autocommit
            error.maybe_committed = error.maybe_committed or commits
        self._conn.lose_track_after(error)
        if isinstance(error, errors.TransactionTimeoutError) or errors.is_poolers_refusal(error):
            return  # it would take as long again
        idle = isinstance(error, errors.IdleSessionTimeoutError) and not self._conn._pipeline
        error.repeatable = self._may_repeat(autocommit, rode, touched, single) or (
            idle and autocommit and not touched
        )

    def _may_repeat(self, autocommit: bool, rode: bool, touched: bool, single: bool) -> bool:
        """Return whether nothing of the statement can have taken effect, nor anything be lost before it."""
        # Rode with its own BEGIN: nothing of it can have been committed. But a session that the
        # block had made its own (a lock, a temporary table) is gone, and the block should know.
        # Nor can a server that takes no writes have done any.
        return not touched and (
            (rode and self.block.manual) or (autocommit and self._conn.reads_only and single)
        )

    def _note_conflict(
        self, error: psycopg.Error, autocommit: bool, rode: bool, touched: bool, single: bool
    ) -> None:
        """Note in the error whether a statement that a standby cancelled for its replay can be sent again."""
        if self._conn.reads_only and isinstance(error, errors.DBQueryError):
            error.repeatable = self._may_repeat(autocommit, rode, touched, single)

    def executemany(self, query: Any, params_seq: Iterable[Any], *, returning: bool = False) -> None:
        """Execute the statement once for each of the parameter sets, in one pipeline with the preamble."""
        if isinstance(query, Template):
            raise TypeError(_NO_PLACE)
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
            left = deadlines.check()
            preamble = conn.limit(preamble, left) if sets else NOTHING
        if conn.annotates and sets:
            preamble = conn.annotate(preamble)
        if freshness.in_use and sets:
            self._to_tell(preamble, autocommit)
        try:
            self._ride(preamble, query, None, None, None, many=(sets, returning))
            if first:
                conn.bound = conn.pgconn.transaction_status != IDLE
            self._took_effect(what.changes and autocommit)
        except errors.ConnectionLostError as error:
            conn.telling = False
            self._note_loss(error, autocommit, False, begins(first), touched, single=False)
            raise
        except psycopg.Error as error:
            conn.telling = False
            block.failure = errors.without_frames(error)
            if error.sqlstate == RECOVERY_CONFLICT:
                self._note_conflict(error, autocommit, begins(first), touched, single=False)
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
        """Start a COPY; the block's due commands are sent before, since COPY cannot ride."""
        conn, params = self._conn, checked_parameters(params)
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
        """Note that a statement has taken effect by itself, if it did: no rollback undoes it."""
        if changed:
            self.block.in_effect = True

    @property
    def connection(self) -> PooledConnection:
        """The connection; since its user may do anything, the session is cleaned after the block."""
        # psycopg itself asks for it too, and does nothing to it.
        if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] == "psycopg":
            return self._conn
        return self._conn.expose()

    def _own(self, query: Any) -> StatementTraits:
        """Return a statement's traits, once it may be sent; the caller has the turn."""
        conn = self._conn
        if conn.block is not self.block:
            raise gone(self.block)
        self.block.statement = query
        what = shape(query, conn)
        if what.special:
            what = conn.touch(what, query)
        conn.note_definition(what)
        if what.controls and self.block.settings:
            raise errors.as_query_error(psycopg.NotSupportedError(ENDS_INSIDE))
        conn.end_wrapped()
        return what


class BlockClientCursor(psycopg.ClientCursor[Any], BlockCursor):
    """A block's cursor that binds parameters at the client: several statements may share them."""

    __slots__ = ()

    def _ride_known(self, *known: Any) -> bool:
        """Leave its statements to psycopg, which writes the parameters into them."""
        return False


class CommittingCursor(BlockCursor):
    """A cursor whose one statement is committed in its own round trip, for a block of that one alone.

    PostgreSQL skips the COMMIT if anything before it failed, since no Sync comes between.
    """

    __slots__ = ()
    after = COMMIT

    def execute(
        self, query: Any, params: Any = None, *, prepare: bool | None = None, binary: bool | None = None
    ) -> CommittingCursor:
        """Execute and commit a statement that can ride; nothing is committed if it fails.

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
        plan: Plan | None = None,
        many: tuple[Sequence[Any], bool] | None = None,
        again: bool = False,
    ) -> None:
        with self._conn.waiting_for(2):  # for the COMMIT as well
            super()._ride(preamble, query, params, prepare, binary, plan, many, again)

    @contextmanager
    def _committing(self) -> Iterator[None]:
        try:
            yield
        except errors.NotCleanError:
            raise  # all that followed was skipped
        except errors.ConnectionLostError as error:
            if not errors.undone(error):
                error.maybe_committed, error.repeatable = True, False
            self.block.lost = False  # or committed: this error says that the outcome is unknown
            raise

    def _check_after(self, answers: list[list[PGresult]]) -> None:
        super()._check_after(answers)
        if [result.command_status for result in answers[-1]] != [b"COMMIT"]:
            raise errors.TransactionAbortedError(FAILED)


def commits_with(what: StatementTraits) -> bool:
    """Return whether a COMMIT can ride with the statement."""
    return what.number == 1 and not (what.alone or what.controls)


def plain_row(cursor: psycopg.Cursor[Any]) -> Row | None:
    """Return the first row of the last statement's result, or None, whatever the row factory."""
    result = cursor.pgresult
    if result is not None and result.status == TUPLES_OK and len(cursor._results) == 1:
        if not result.ntuples:
            return None
        own = cursor._row_factory is make_rows
        return cursor._tx.load_row(0, cursor._make_row if own else make_rows(cursor))  # type: ignore[no-any-return]
    if not has_rows(cursor):
        return None
    cursor.row_factory = make_rows
    row: Row | None = cursor.fetchone()
    return row


def has_rows(cursor: psycopg.Cursor[Any]) -> bool:
    """Go to the last statement's result, waiting for it in a pipeline; return whether it has rows."""
    if cursor.pgresult is None or len(cursor._results) != 1:
        cursor._fetch_pipeline()
        if cursor._execmany_returning is None and len(cursor._results) > 1:
            cursor.set_result(-1)
    # The answer for a failed one is yes: fetching then raises.
    return cursor.pgresult is None or cursor.pgresult.status not in _NO_ROWS

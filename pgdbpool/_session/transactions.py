"""The transactions of a block: to psycopg the connection is in autocommit mode, and the block sends BEGIN."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import get_ident
from types import NoneType
from typing import TYPE_CHECKING

import psycopg
from psycopg.transaction import OutOfOrderTransactionNesting

from .. import errors
from .._request import deadline as deadlines
from .._request import special
from .._util.transaction_modes import Modes
from .block import Block, implicit
from .commands import (
    ACTIVE,
    COMMIT,
    FATAL,
    IDLE,
    INERROR,
    INHERIT_PATIENCE,
    INTRANS,
    NOTHING,
    OVER,
    UNKNOWN,
    Command,
    set_local,
)
from .state import BUSY, OUTSIDE
from .telling import TellingConnection

if TYPE_CHECKING:
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGresult

ENDS_INSIDE = (
    "the block has a tenant or settings, which end with the transaction: what follows a COMMIT or ROLLBACK "
    "in the same string or pipeline would run without them; send it by itself"
)
FAILED = "a statement of this transaction failed: it was rolled back, nothing was committed"
_CROSSED = (
    "contexts of this transaction were left in the wrong order: it was rolled back, nothing was committed"
)


class TransactingConnection(TellingConnection):
    """A connection whose transactions are its block's."""

    @property
    def autocommit(self) -> bool:
        """Whether each statement is its own transaction: as the group says, until the block sets it."""
        return self.by_itself if self.block is None else not self.block.manual

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        self.set_autocommit(value)

    @property
    def commits_each(self) -> bool:
        """Whether the next statement is its own transaction."""
        return self.autocommit and self.pgconn.transaction_status == IDLE

    def set_autocommit(self, value: bool) -> None:
        """Go on in autocommit mode, or with transactions, to the end of the block; nothing is sent for it.

        :raises psycopg.ProgrammingError: a transaction is open.
        """
        at_rest = self.block is not None and self.pgconn.transaction_status == IDLE
        at_rest = at_rest and not (self.turn.locked() or self.wrapped or self._pipeline)
        with nullcontext() if at_rest else self.alone():
            if not at_rest:
                self._change(self._check_intrans_gen("autocommit"), alters=False)
            if self.block is None:  # while `configure` has it
                self._autocommit = self.by_itself = bool(value)
            elif self.block.manual is bool(value) or self.block.nests:
                self.block.choose(bool(value))
                self.block.at_begin = self._encode(self.block)

    def set_isolation_level(self, value: psycopg.IsolationLevel | None) -> None:
        """Set the isolation level of the transactions to come, to the end of the block."""
        with self.alone():
            self._change(self._set_isolation_level_gen(value))

    def set_read_only(self, value: bool | None) -> None:
        """Set whether the transactions to come are read only, to the end of the block."""
        with self.alone():
            self._change(self._set_read_only_gen(value))

    def set_deferrable(self, value: bool | None) -> None:
        """Set whether the transactions to come are deferrable, to the end of the block."""
        with self.alone():
            self._change(self._set_deferrable_gen(value))

    def _change(self, steps: PQGen[None], alters: bool = True) -> None:
        """Run psycopg's steps to change an attribute, which is refused inside a transaction."""
        if self.block is None and self.settled is not None:
            raise errors.BlockClosedError(OUTSIDE)
        self.end_wrapped()
        self.mark(attributes=alters and self.block is not None)
        try:
            if self._pipeline:
                self.wait(steps)
            else:  # nothing is sent, so it is never too late for it
                deque(steps, 0)
        except psycopg.Error as error:
            raise self.own_error(error)  # noqa: B904  it is the same object

    def begin(self, block: Block) -> tuple[Command, ...]:
        """Return the BEGIN of a transaction of the block."""
        return ((self._begin_with(block.binding.modes), None),)

    def _get_tx_start_command(self) -> bytes:
        """Return BEGIN for psycopg, which sends it in `transaction()` outside of a transaction."""
        return self._begin_with(None if self.block is None else self.block.binding.modes)

    def _begin_with(self, modes: Modes | None) -> bytes:
        """Return BEGIN; each mode is that of the connection's attribute if set, or else of the settings."""
        if modes is None:
            return super()._get_tx_start_command()
        level, modes = self._isolation_level, self.allowed(modes)
        return Modes(
            isolation=modes.isolation if level is None else level.name.replace("_", " "),
            read_only=modes.read_only if self._read_only is None else self._read_only,
            deferrable=modes.deferrable if self._deferrable is None else self._deferrable,
        ).begin()

    def allowed(self, modes: Modes) -> Modes:
        """Leave READ WRITE out on a standby: a default has no effect there, while a BEGIN is refused."""
        role = self.endpoint.role
        if modes.read_only is False and role is not None and role.value == "standby":
            return modes._replace(read_only=None)
        return modes

    def _begin_in_pipeline(self) -> PQGen[None]:
        """Begin a transaction if the last one was ended in a pipeline, or autocommit switched off in it."""
        yield from self._exec_command(self._get_tx_start_command())
        if self._pipeline:
            yield from self._pipeline._sync_gen()

    def lend_to(self, block: Block) -> None:
        """Lend the connection to the block: its own local settings go before the block's."""
        binding = block.binding
        if not self.plain or binding.by_role:
            block.settings = self.local + binding.settings
            block.in_transaction, block.at_begin = self._local(block), self._encode(block)
        if binding.special:
            self.mark(attributes=True)
            if binding.patience != INHERIT_PATIENCE:
                self.patience = binding.patience
            if binding.report:
                self.follow_settings()
        self.lent, self.wrapped = True, False
        self.block = block
        block.conn = self

    def preamble(self, block: Block) -> tuple[Command, ...]:
        """Return the commands that must be sent before the next statement on the connection; mostly none.

        :raises ConnectionLostError: it was lost before.
        """
        status = self.pgconn.transaction_status
        if status == IDLE:
            self.bound = False
            if self.stale and self.misleads():
                with self.owning():
                    self.clean_what_shows()
            if (block.manual and self.altered) or (block.settings and self.touched):
                block.at_begin = self._encode(block)  # its isolation_level or encoding may have changed
            commands = block.at_begin
            return self.cleaning + commands if self.stale else commands
        if status == INTRANS:
            if self.bound or not block.settings:
                return NOTHING
            # A transaction that the block did not begin itself, or one chained to the last.
            return self._local(block) if self.touched else block.in_transaction
        if status == UNKNOWN:
            block.lost = block.lost or block.manual  # an autocommit block has no open transaction in it
            raise errors.ConnectionLostError(
                "the connection was lost before: nothing was sent; the block gets another"
            )
        return NOTHING

    def begin_and_bind(self, block: Block) -> tuple[Command, ...]:
        """Return BEGIN and the settings, after a cleaning if one is due, to wrap a statement in."""
        cleaning = self.cleaning if self.stale else NOTHING
        return cleaning + block.guards() + self.begin(block) + self._local(block)

    def _local(self, block: Block) -> tuple[Command, ...]:
        """Return the commands that bind the settings, in the encoding that the session has now."""
        return set_local(block.settings, self.pgconn._encoding) + block.binding.report

    def _encode(self, block: Block) -> tuple[Command, ...]:
        """Return BEGIN, or the modes of an implicit transaction, and the commands that bind the settings."""
        if block.manual:
            return self.begin(block) + self._local(block)
        modes = block.binding.modes
        allowed = None if modes is None else self.allowed(modes)
        return implicit(allowed, block.settings, self.pgconn._encoding) + block.binding.report

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Send the block's due commands in a separate round trip, for a statement that cannot ride.

        In an autocommit block with settings a transaction is opened for it, and committed after it. Other
        threads wait until it is over.
        """
        with self.alone():
            block, autocommit, wrap = self.send_due()
            with self.over(block, autocommit, wrap):
                yield

    def send_due(self) -> tuple[Block, bool, bool]:
        """Send the block's due commands; the caller has the turn.

        :returns: the block, whether it autocommits outside a transaction, and whether one was opened for it.
        """
        block = self.block
        if block is None:
            raise errors.BlockClosedError(OUTSIDE)
        left = deadlines.check() if deadlines.in_use else None
        if self._pipeline:
            return block, False, False
        autocommit = not block.manual and self.pgconn.transaction_status == IDLE
        wrap = bool(block.settings) and autocommit
        commands = self.begin_and_bind(block) if wrap else self.preamble(block)
        if commands and deadlines.in_use:
            commands = self.limit(commands, left)
        if commands and self.annotates:
            commands = self.annotate(commands)
        if commands:
            self.wrapped = wrap
            self.run(commands)
            self.bound = self.pgconn.transaction_status != IDLE
        return block, autocommit, wrap

    @contextmanager
    def over(self, block: Block, autocommit: bool, wrap: bool) -> Iterator[None]:
        """End the transaction that was opened for the body, and note in the block what went wrong."""
        if not wrap:
            try:
                yield
                if special.in_use and self.block is block:
                    self.tell_of_alone(block, autocommit)
            except (Exception, GeneratorExit) as error:  # the latter of a stream that is left early
                self._after_failure(block, error, autocommit)
                raise
            return
        try:
            yield
        except BaseException:
            # A generator that was left open ends here later, when the connection may be another block's.
            if self.block is block:
                self.undo()
            raise
        if self.block is block:
            self.commit()

    def undo(self) -> None:
        """Roll back after an error, which is the one to report; if that fails, close."""
        try:
            if self.pgconn.transaction_status == ACTIVE or self.holder or self._is_anothers():
                self.force_close()
            elif not self.closed:
                self.rollback()
        except psycopg.Error:
            self.close()

    def end_wrapped(self) -> None:
        """End a transaction around one statement whose end was interrupted; the caller has the turn.

        Later statements would run in it, with its changed settings.

        :raises ConnectionLostError: it could not be ended; nothing was sent.
        """
        if not self.wrapped or self.pipelines:
            return
        if self.pgconn.transaction_status != IDLE:
            with self.owning():
                self.undo()
        self.wrapped = False
        if self.closed:
            error = errors.ConnectionLostError("a transaction whose end was interrupted cannot be ended")
            error.repeatable = True
            raise error

    def commit(self) -> None:
        """Commit the open transaction, if any; a failed one is rolled back and raises.

        :raises TransactionAbortedError: a statement of the transaction had failed.
        :raises ConnectionLostError: with `maybe_committed`, since the outcome is unknown.
        """
        me = get_ident()
        if self.owner == me and not self.holder:
            self._commit()
            return
        if self.step is not None:
            self.take_back()
        with self.turn:
            self.owner = me
            try:
                self._commit()
            finally:
                self.owner = 0

    def _commit(self) -> None:
        if self._pipeline and self.block is not None and self.block.settings:
            raise errors.as_query_error(psycopg.NotSupportedError(ENDS_INSIDE))
        self.bound = self.explicit = False
        block, status = self.block, self.pgconn.transaction_status
        if self.taken_away and status != IDLE:
            raise self.own_error(psycopg.OperationalError("the connection was taken away"), status)
        if status == INERROR or self.crossed:
            why = _CROSSED if self.crossed else FAILED
            self.rollback()
            raise errors.TransactionAbortedError(why)
        if deadlines.in_use and status != IDLE:
            self._check_deadline()
        self.ending = True
        try:
            if self._pipeline or self._num_transactions or self._tpc or status == IDLE:
                self.wait(self._commit_gen())  # psycopg's commit(), but for the lock
            else:
                self._send_commit(status)
        except BaseException as error:
            if status != UNKNOWN:  # else it was lost before, and nothing is committed now
                self._note_unknown(error)
            raise
        finally:
            self.ending = False
        if block is not None and status != IDLE:
            block.committed = True

    def _send_commit(self, status: int) -> None:
        """Send COMMIT and wait for its answer."""
        if status == UNKNOWN:
            self._check_connection_ok()  # raises
        if special.in_use and self.learns() is not None:
            answer = self._commit_and_tell(status)
        else:
            answer = self.run_alone(b"COMMIT", status)
        if answer.status == FATAL:
            error = psycopg.errors.error_from_result(answer, encoding=self.pgconn._encoding)
            raise self.own_error(error, status)

    def _commit_and_tell(self, status: int) -> PGresult:
        """Commit, and learn the end of the block's writes in the same round trip; return the answer."""
        self.tell_next()
        try:
            return self.exchange(NOTHING, lambda: None, COMMIT)[-1][-1]
        except psycopg.Error as error:
            raise self.own_error(error, status)  # noqa: B904  it is the same object

    def rollback(self) -> None:
        """Roll the open transaction back, if any."""
        self.check_free()
        if self.pgconn.transaction_status == IDLE and not (
            self._pipeline or self._num_transactions or self._tpc or self.turn.locked()
        ):
            self.bound = self.crossed = self.explicit = False
            return
        with self.alone():
            if self._pipeline and self.block is not None and self.block.settings:
                raise errors.as_query_error(psycopg.NotSupportedError(ENDS_INSIDE))
            self.bound = self.crossed = self.explicit = False
            self.ending = True
            try:
                super().rollback()
            finally:
                self.ending = False

    def _check_deadline(self) -> None:
        """Roll back instead of a COMMIT that would begin after the deadline."""
        try:
            deadlines.check()
        except errors.DeadlineExceeded:
            self.rollback()
            raise

    def give_up(self) -> None:
        """Roll back after an exception; a prepared transaction belongs to the server, and stays."""
        if self._tpc is None:
            self.rollback()
        elif self._tpc[1]:
            self.close()
        else:
            self.tpc_rollback()

    @contextmanager
    def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> Iterator[psycopg.Transaction]:
        """Open a transaction, or a savepoint if the block has one open already."""
        block = self.block
        if block is None:
            if self.settled is not None:
                raise errors.BlockClosedError(OUTSIDE)
            with super().transaction(savepoint_name, force_rollback) as transaction:
                yield transaction  # of `configure`
            return
        if deadlines.in_use:
            deadlines.check()
        self.check_free()
        self.mark(attributes=True, kept=True)  # psycopg's Transaction has the connection as an attribute
        contexts = self._num_transactions
        outermost, body_ended = self._send_due_of_transaction(block), False
        try:
            with super().transaction(savepoint_name, force_rollback) as transaction:
                outermost = transaction._outer_transaction  # another thread may have ended one meanwhile
                try:
                    yield transaction
                finally:
                    self.ending = True
                    if self.holder == get_ident():
                        # An exception has left a loop, and keeps its generator alive.
                        self.force_close()
                        self._note_loss(psycopg.OperationalError(BUSY), ACTIVE)
                if deadlines.in_use:
                    deadlines.check()  # it is rolled back then
                if self.closed or (outermost and self.pgconn.transaction_status == INERROR):
                    # psycopg would end it in silence: COMMIT of a failed transaction is a ROLLBACK.
                    raise errors.TransactionAbortedError(FAILED) from block.failure
                body_ended = True
            self._note_left(block, outermost)
        except OutOfOrderTransactionNesting as error:
            self._note_crossed(block, error, outermost)
            raise
        except BaseException as error:
            self._note_left_by(error, block, body_ended and outermost)
            raise
        finally:
            self.ending = False
            self._leave(block, outermost, contexts)

    def _leave(self, block: Block, outermost: bool, contexts: int) -> None:
        """Undo contexts and transactions that psycopg leaves open after an interruption or a loss."""
        if self.closed:
            self._num_transactions = contexts
            if outermost and not block.manual:
                block.lost = False  # it is over, and its caller has the error
        left_open = self.pgconn.transaction_status not in OVER
        if left_open and outermost and not block.nests and not self.crossed:
            self._undo_left_open(block)

    def _note_left(self, block: Block, outermost: bool) -> None:
        """Note that psycopg has committed a transaction, or released a savepoint."""
        block.committed = block.committed or outermost
        if special.in_use and outermost and not self._pipeline:  # else the pipeline's end asks
            self.tell_now()

    def _send_due_of_transaction(self, block: Block) -> bool:
        """Send the block's due commands before psycopg's transaction; return whether it is the outermost."""
        with self.alone():
            self.end_wrapped()
            self.implicit = False
            commands = self.preamble(block)
            if self.pgconn.transaction_status == IDLE and not block.nests:
                # psycopg sends BEGIN; the settings go with the first statement after it.
                commands = (self.cleaning if self.stale else NOTHING) + block.guards()
            if commands and not self._pipeline:
                # Before the savepoint, so that rolling back to it does not undo the settings.
                self.run(commands)
                self.bound = self.pgconn.transaction_status != IDLE
            return self.pgconn.transaction_status == IDLE

    def _note_crossed(self, block: Block, error: OutOfOrderTransactionNesting, outermost: bool) -> None:
        """Note that contexts of transactions were left in the wrong order.

        psycopg leaves the transaction open with its changes, which must not be committed just because
        the block ends. If one was interrupted on its way in, the block goes on with another.
        """
        self.crossed = self.block is block
        if self.crossed and not outermost and not isinstance(error.__context__, (Exception, NoneType)):
            self.close()
            self._note_loss(error, ACTIVE)

    def _undo_left_open(self, block: Block) -> None:
        """Roll back a transaction if psycopg was interrupted while ending it."""
        with self.alone():
            # It may be another thread's by now.
            ended = self.pgconn.transaction_status in OVER or self._num_transactions
            if not ended and self.block is block:
                self.wrapped = True
                self.undo()

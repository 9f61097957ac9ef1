"""Whether the server still answers: bounded waits for it, and the consequences of a lost connection."""

from __future__ import annotations

import os
import select
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import inf
from threading import Lock, get_ident
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.errors import _WaitTimeout

from .. import errors
from .._request import deadline as deadlines
from .._util import bounds, greenlets
from . import outcome
from .cleaning import CleanedConnection
from .commands import ACTIVE, BAD, IDLE, OPEN, OVER
from .prepared import is_stale

if TYPE_CHECKING:
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGresult

INTERRUPTIONS = (KeyboardInterrupt, SystemExit)
"""The exceptions for which psycopg cancels, and waits for five seconds."""
_PARENTS = "this connection belongs to the parent process: open a Handler in this one"
_SEVERED = "the connection was cut under the block"
_NOT_REPLICATED = (
    "the transaction is committed on {}, and perhaps nowhere else: its wait for the synchronous standby was "
    "cancelled; do not repeat it"
)

# psycopg's own, by name: `super()` would look through each of the layers for it.
_wait = psycopg.Connection.wait
_check_ok = psycopg.Connection._check_connection_ok
_OK = int(psycopg.pq.ConnStatus.OK)

LEAVE = "leave its `with ... transaction():` first: what follows in there would take effect by itself"


class LiveConnection(CleanedConnection):
    """A connection whose waits are bounded, and which notes losses in its block."""

    def alive(self) -> bool:
        """Return, without a round trip, whether the server still holds the other end.

        A server that closed, restarted or was killed has sent FIN or RST. Readable is not dead:
        a notice, a parameter status (after a promotion) or a TLS ticket is consumed first.
        """
        pgconn = self.pgconn
        try:
            for _ in range(100):  # a flood of notifications is alive
                if not self.poll(0):
                    break
                pgconn.consume_input()
                pgconn.is_busy()  # parses the input
        except psycopg.OperationalError:
            return False
        # The server's last message may be there a moment before the end of the stream.
        return pgconn.status != BAD and not self.ended_by_server

    def has_input(self) -> bool:
        """Return whether something has arrived; for a thread that does not have the connection.

        A poll object serves one thread at a time, and another may take the connection at any moment.
        """
        try:
            return bool(greenlets.polls(self.pgconn.socket)[0](0))
        except (psycopg.OperationalError, ValueError):
            return False  # it was closed meanwhile

    def ping(self, timeout: float) -> bool:
        """Return whether the server answers an empty query within the timeout (seconds)."""
        pgconn = self.pgconn
        deadline = monotonic() + timeout
        try:
            pgconn.send_query(b"")
            pgconn.flush()
            while True:
                # Before each result: get_result waits in C, with the interpreter's lock and without a bound.
                while pgconn.is_busy():
                    left = deadline - monotonic()
                    if left <= 0 or not self.wait_readable(left * 1000):
                        return False
                    pgconn.consume_input()
                if pgconn.get_result() is None:
                    break
        except psycopg.OperationalError:
            return False
        self.used_at = monotonic()
        return True

    def ask(self, query: bytes) -> PGresult:
        """Ask the server something for the pool itself, not for a block, and return the answer."""
        with self.unbound(), psycopg.Cursor(self) as cursor:
            result = cursor.execute(query).pgresult
        assert result is not None
        return result

    def wait(self, gen: PQGen[Any], interval: float = 0.1, timeout: float | None = None) -> Any:
        """Run psycopg's generator within the deadline; errors are raised as `DBQueryError`."""
        if self.unusable:
            self._refuse_use()
        patience = timeout
        if timeout is None:
            patience = self.patience
            if deadlines.in_use or self.until is not None:
                patience = self._within_deadline(patience)
        status = self.pgconn.transaction_status
        if patience is not None and patience <= 0 and timeout is None:
            raise self._too_late(status)
        try:
            result = _wait(self, gen, interval, patience)
        except _WaitTimeout:
            if timeout is not None:
                raise  # the caller's own deadline, not the statement's
            raise self._unanswered(status) from None
        except BaseException as error:
            found = self._loss_behind(error) or error
            if isinstance(found, psycopg.Error):
                raise self.own_error(found, status)  # noqa: B904  it is the same object, or caused by it
            self._interrupted(error, status)
            raise
        if self.not_replicated or self.pgconn.status == BAD:
            self._look_back(status)
        return result

    def _loss_behind(self, error: BaseException) -> psycopg.Error | None:
        """Return the loss of the connection behind one of psycopg's own errors; None if there is none.

        A pooler sends its own message after the one with which the server ends a session, and psycopg takes
        only one answer to COPY, and to the commands that it sends itself.
        """
        refused = isinstance(error, (psycopg.ProgrammingError, psycopg.InternalError, ValueError))
        if not refused or self.pgconn.status != BAD or getattr(error, "sqlstate", None):
            return None
        lost = psycopg.OperationalError(self.pgconn.get_error_message())
        lost.__cause__ = error
        return lost

    def _too_late(self, status: int) -> psycopg.Error:
        """Return the error for a wait that would begin after its deadline."""
        if self.until is not None and self.closed:  # psycopg asks all the same; the loss is noted
            return psycopg.OperationalError("the connection was lost when a stream or COPY was left early")
        # psycopg would still take data that has arrived, and a stream that flows would never end.
        return self._unanswered(status)

    def _interrupted(self, interruption: BaseException, status: int) -> None:
        """Stop a statement whose wait was interrupted: its state is not known."""
        if self.pgconn.transaction_status == ACTIVE:
            self._cancel_and_close()
        self._note_loss(interruption, status)

    def stop_unwaited(self, interruption: BaseException, status: int = ACTIVE) -> None:
        """Stop a statement that was sent, if the interruption came before the wait for it."""
        if self.pgconn.transaction_status == ACTIVE:
            self._interrupted(interruption, status)

    def _look_back(self, status: int) -> None:
        """Look for events that the answer itself does not show."""
        if self.closed:
            # psycopg hides an error that comes while it rolls back to a savepoint.
            self._note_loss(psycopg.OperationalError("the connection was lost in a rollback"), status)
        if self.not_replicated:
            self._check_replicated()

    def _check_replicated(self) -> None:
        """Raise for a commit that did not wait for its standby, unless its group wants a log record.

        :raises NotReplicatedError: it is committed all the same.
        """
        self.not_replicated = False
        block = self.block
        if block is not None:
            block.committed = True
        # After the pool's own cancel the record would not do: that is not a success.
        if self.keeper is not None and self.keeper.tolerates(self) and not self.severed:
            return
        error = errors.NotReplicatedError(_NOT_REPLICATED.format(self.endpoint.label))
        error.maybe_executed = block is None or not block.manual
        if block is not None:
            error.correlation_id = block.correlation_id
        raise error

    def _refuse_use(self) -> None:
        if self.abandoned:
            raise errors.BlockClosedError(_PARENTS)
        status = self.pgconn.transaction_status
        self._cancel_and_close()  # the thread that cuts it may not have cancelled the statement yet
        raise self.own_error(psycopg.OperationalError(_SEVERED), status)

    def may_commit(self) -> bool:
        """Return whether the current statement may be committing, so that it must not be cancelled.

        A read that commits nothing may be cancelled, and so may a statement inside a transaction.
        """
        block = self.block
        if self.ending or self.unsure or self._tpc is not None:
            return True
        if block is None:
            return False  # it is the pool's own, such as a ping
        statement = getattr(block, "statement", None)
        inside = self.explicit or self.wrapped or self._num_transactions > 0 or block.spans()
        if statement is self.undeclared or (self._pipeline is not None and not inside):
            return True
        return outcome.may_commit(statement, inside)

    def _within_deadline(self, patience: float | None) -> float | None:
        """Return how long a wait may take under the deadline, given its limit without one."""
        if self.until is not None:
            left = self.until - monotonic()
            patience = left if patience is None else min(patience, left)
        rest = deadlines.time_left()
        if rest is None or self.block is None:  # opening a connection has a bound that includes it
            return patience
        if (least := bounds.CLIENT_GRACE if self.ending else 0.0) > rest:
            rest = least
        return rest if patience is None or rest < patience else patience

    def _unanswered(self, status: int = IDLE) -> errors.QueryDeadlineError:
        self.close()
        self.endpoint.suspected_at = monotonic()
        left = deadlines.time_left() if deadlines.in_use and self.block is not None else None
        cut = left is not None and left <= 0
        if cut:
            within = "before the deadline"
        elif self.until is not None or self.patience is None:
            within = "in time"
        else:
            within = f"within {self.patience:g} s"
        error = errors.QueryDeadlineError(f"{self.endpoint.label} gave no answer {within}: connection closed")
        if self.block is not None:
            error.correlation_id = self.block.correlation_id
        self._note_loss(error, status)
        return error

    def own_error(self, error: psycopg.Error, status: int = IDLE) -> errors.DBQueryError:
        """Make an error a `DBQueryError` too, and close the connection if the session has ended."""
        if errors.ends_session(error) or self.taken_away:
            self.close()
        if is_stale(error):
            self.forget_statements()
        if self._pipeline:
            self.spoilt = True
        self._note_loss(error, status)
        kind = self._kind_of(error)
        if self.cut_by and not isinstance(error, errors.DBQueryError):  # it may come here twice
            error.args = (f"the pools were closed by {self.cut_by}, with this block open: {error}",)
        own = errors.as_query_error(error, kind)
        if (block := self.block) is not None:
            if own.correlation_id is None:
                own.correlation_id = block.correlation_id
            if error.sqlstate:
                statement = getattr(block, "statement", None)
                if isinstance(statement, str):  # another object, since the next execution may be well
                    block.statement = statement = statement[:1] + statement[1:]
                self.failed = statement, f"{error.diag.severity}:  {error}\n"  # as libpq words it
        return own

    @property
    def read_only_by_choice(self) -> bool:
        """Whether it may be the block that has made its transactions read only, and not the server."""
        return self.touched or self._block_reads

    @property
    def reads_only(self) -> bool:
        """Whether the statements of the block cannot write: by the group's target, or by its settings."""
        return self.reads or self._block_reads

    @property
    def _block_reads(self) -> bool:
        modes = None if self.block is None else self.block.binding.modes
        return modes is not None and bool(modes.read_only)

    def _kind_of(self, error: psycopg.Error) -> type[errors.DBQueryError]:
        """Return the package's class for an error, by the state of the connection."""
        if self.taken_away:
            return errors.HoldExceededError
        if self.closed:
            return errors.end_of_session(error)
        if error.sqlstate == "25006" and self.endpoint.refuses_writes(self):
            return errors.ReadOnlyServerError
        return errors.DBQueryError

    def _note_loss(self, error: BaseException, status: int) -> None:
        """If the connection was lost, note the consequences in the block."""
        block = self.block
        if block is None or not self.closed or status in OVER:  # unknown: it was lost before
            return
        # In COPY or a pipeline the status shows only that something is under way.
        if status != ACTIVE or block.manual or self.bound or self._num_transactions:
            block.lost = True
            block.failure = errors.without_frames(error) if isinstance(error, Exception) else None

    @property
    def has_contexts(self) -> bool:
        """Whether a `transaction()` is open, perhaps of a transaction that was lost."""
        return self._num_transactions > 0

    def check_left(self) -> None:
        """Refuse to forget a lost transaction in the middle of its `transaction()`.

        :raises psycopg.ProgrammingError: this is the middle of one.
        """
        if self.closed and self.has_contexts:
            raise errors.as_query_error(psycopg.ProgrammingError(f"the connection was lost; {LEAVE}"))

    def _cancel_and_close(self) -> None:
        """Close the connection; a statement that is under way is cancelled if it cannot be a commit."""
        if not self.abandoned and self.pgconn.transaction_status == ACTIVE and not self.may_commit():
            with suppress(psycopg.Error):
                self.cancel_safe(timeout=1.0)
        self.close()

    def _try_cancel(self, *, timeout: float = 5.0) -> None:
        """Cancel a stream or COPY that is left early. psycopg then reads pending data, for a second.

        A possible commit is not cancelled: a stream or COPY may end in that second, else it is closed.
        """
        left = self._within_deadline(self.patience)
        try:
            if not self.may_commit():
                allowed = min(timeout, bounds.CLIENT_GRACE, timeout if left is None else left)
                self.cancel_safe(timeout=max(bounds.MIN_TIMEOUT, allowed))
            elif not self.holder or issubclass(sys.exc_info()[0] or Exception, INTERRUPTIONS):
                self.close()
        except (psycopg.Error, OSError) as error:
            status, self.until = self.pgconn.transaction_status, 0.0
            self.close()
            self._note_loss(error, status)
        else:
            if self.holder:  # which puts it back
                self.until = min(monotonic() + bounds.CLIENT_GRACE, self.until or inf)

    def _check_connection_ok(self) -> None:
        """Raise if nothing can be sent; psycopg asks before it makes a cursor or sends its own commands.

        :raises ConnectionLostError: the connection is lost, or was closed by its block; nothing was sent.
        """
        if (status := self.pgconn.status) == _OK:
            return
        if status == BAD and self.block is not None:
            raise self.own_error(psycopg.OperationalError("the connection is lost: nothing was sent"))
        _check_ok(self)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Note the thread that has the connection's lock for longer than a statement."""
        self.holder, until = get_ident(), self.until
        try:
            yield
        finally:
            self.holder, self.until = 0, until
            if self.pgconn.transaction_status == ACTIVE and not self._pipeline:
                # Interrupted again, while psycopg was ending the operation.
                self.close()
                self._note_loss(psycopg.OperationalError("interrupted in a stream or COPY"), ACTIVE)

    def close(self) -> None:
        """Close the connection, and with it a transaction of its block; one of the parent's is left alone."""
        if self.abandoned:
            return
        status = self.pgconn.transaction_status
        if self.block is not None and status in OPEN:
            self.block.lost = True  # by the block itself: it must not commit its later work alone
        elif status == ACTIVE and not self.left and self.may_commit():
            self.left = self.pgconn.backend_pid
        super().close()

    def retire(self) -> None:
        """Close the connection and give its slot back."""
        if self._is_anothers():
            self.force_close()
        else:
            self.close()
        self.slot = None

    def force_close(self) -> None:
        """End the connection, whatever loop is open over it and holds psycopg's lock for good.

        Another thread that is in a statement finds the connection lost, and closes it: psycopg reads
        freed memory if the connection is closed under a wait.
        """
        if self._is_anothers():
            self.cut_from_other_thread(monotonic())
            self.expires_at = -inf
            return
        self.close()
        if (step := self.step) is not None:
            self.holder = 0
            step.give_up()  # threads that wait for it find the connection closed, or the block ended
        elif self.turn.locked():
            self.turn, self.holder, self.owner = Lock(), 0, 0

    def refuse_from_now_on(self) -> bool:
        """Let the block begin nothing more on the connection; return whether it may be committing.

        Before anything is cancelled: a statement sent after this is refused before its outcome is reported.
        """
        self.severed = self.unusable = True
        return not self.abandoned and self.pgconn.transaction_status == ACTIVE and self.may_commit()

    def cut_from_other_thread(self, deadline: float) -> None:
        """Cut the connection under its block, from any thread, within the deadline; the block finds it lost.

        A running statement is cancelled. A possible commit is waited for, and then left to the server.
        Closing the connection would free its socket's number under a wait for it.
        """
        self.refuse_from_now_on()
        if self.abandoned:
            return
        with suppress(psycopg.Error, OSError):
            number = self.pgconn.socket
            with socket.socket(fileno=os.dup(number)) as own:
                stopped = self._stop_statement(own, deadline)
                if self.pgconn.socket == number:  # raises if it was closed: the number may be another's
                    own.shutdown(socket.SHUT_WR)
                    if not stopped:  # the block may have sent one meanwhile, which is the last
                        self._stop_statement(own, deadline)
                    own.shutdown(socket.SHUT_RDWR)

    def _stop_statement(self, own: socket.socket, deadline: float) -> bool:
        """Cancel the statement that runs, or wait for it if it may be a commit; return whether one runs."""
        if self.pgconn.transaction_status != ACTIVE:
            return False
        if self.may_commit():
            self._await_commit(own, deadline)
        elif (left := deadline - monotonic()) > 0:
            with suppress(psycopg.Error):
                self.cancel_safe(timeout=left)
        return True

    def _await_commit(self, own: socket.socket, deadline: float) -> None:
        """Wait until a possible commit is over; at the deadline note the session that stays at the server."""
        block = self.block
        # A signal handler may have come between its thread and the answer, which then stays in the socket.
        here = block is not None and block.thread == get_ident()
        poller = select.poll()
        poller.register(own, select.POLLIN)
        while self.pgconn.transaction_status == ACTIVE and not (here and poller.poll(0)):
            if monotonic() >= deadline or greenlets.in_hub():
                self.left = self.left or self.pgconn.backend_pid
                return
            sleep(0.005)

    def abandon(self) -> None:
        """In a forked child: never touch the socket or the lock again, which are the parent's."""
        self.abandoned = self.unusable = True
        self.block, self.step, self.turn = None, None, Lock()

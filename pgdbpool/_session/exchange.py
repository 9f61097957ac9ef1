"""Commands and a statement in one pipeline, and the wait for their answers."""

from __future__ import annotations

import itertools
import select
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

import psycopg
from psycopg import pq, waiting
from psycopg.generators import execute

from .. import errors
from .._request import deadline as deadlines
from .._servers.positions import Facts, facts_of, query
from .._util import bounds
from .._util.client_settings import InForce
from . import outcome
from .commands import ACTIVE, BAD, EMPTY, FATAL, IDLE, NOTHING, TUPLES_OK, Command
from .guarding import SYNC, XID
from .liveness import INTERRUPTIONS
from .prepared import ROLLBACK
from .request_settings import RequestConnection

if TYPE_CHECKING:
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGresult

_SYNC = int(pq.ExecStatus.PIPELINE_SYNC)
_COPYING = tuple(map(int, (pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_BOTH)))
MOST_NAMES = 20
"""How often a session prepares a preamble: again after a block that touched it; nothing removes the old."""
MOST_LEFT = 100
"""The maximum number of answers that are taken from a lost connection."""
_NONE_KNOWN: dict[bytes, bytes] = {}
_names = itertools.count(1)


Own = TypeVar("Own", bound="ExchangingConnection")


class ExchangingConnection(RequestConnection):
    """A connection that sends pending commands together with a statement."""

    def run(self, commands: Sequence[Command]) -> None:
        """Send commands in a separate round trip; the first failure is raised.

        :raises NotCleanError: a cleaning failed, and so the connection was closed.
        """
        again: tuple[Command, ...] | None = None
        with self.lock:
            try:
                self.exchange(commands)
            except psycopg.Error as error:
                if (again := self.before_resending(error, commands)) is None:
                    raise self.own_error(error)  # noqa: B904  it is the same object
            if again is not None:
                try:
                    self.exchange(again)
                except psycopg.Error as error:
                    raise self.own_error(error)  # noqa: B904  it is the same object

    def ask_facts(self) -> Facts | None:
        """Ask the server how much of the write-ahead log it has, in a round trip; None if it does not say.

        :raises DBQueryError: it could not be asked.
        """
        with self.lock:
            try:
                send = partial(self.pgconn.send_query_params, query(self.proven), None)
                ((result,),) = self.exchange(NOTHING, send)
                if result.status == FATAL:
                    raise psycopg.errors.error_from_result(result, encoding=self.pgconn._encoding)
            except psycopg.Error as error:
                raise self.own_error(error)  # noqa: B904  it is the same object
        if (facts := facts_of(result)) is not None:
            self.prove(facts)
        return facts

    def tell_now(self) -> None:
        """Ask for the end of writes in a separate round trip, if the question could not ride."""
        if self.learns() is None:
            return
        facts = None
        with suppress(psycopg.Error):  # the writes are there: their block must not fail for the question
            facts = self.ask_facts()
        self.note_written(facts)

    def receive(self, began_in: int = ACTIVE) -> list[PGresult]:
        """Wait for the answer to a statement that was sent alone, as psycopg's `wait` does for its cursors.

        :param began_in: the transaction's status to which a loss is attributed.
        :raises DBQueryError: the server did not answer in time, or the connection was lost.
        """
        if self.unusable:
            self._refuse_use()
        pgconn, late = self.pgconn, 0.0
        results: list[PGresult] = []
        try:
            deadline = self._await_first(1)
            while True:
                if pgconn.is_busy():
                    late = self._await_answer(deadline, late)
                if (result := pgconn.get_result()) is None:
                    break
                results.append(result)
                if result.status in _COPYING:  # whose end is not waited for
                    break
        except BaseException as error:
            if not self._is_lost_after(results, error, began_in):
                raise
        if (notify := pgconn.notifies()) is not None:
            self._hear(notify)
        if self.not_replicated or pgconn.status == BAD:
            self._look_back(began_in)
        return results

    def run_alone(self, sql: bytes, began_in: int) -> PGresult:
        """Send a command alone, and return its answer; raises what `receive` does."""
        try:
            self.pgconn.send_query(sql)
            return ExchangingConnection.receive(self, began_in)[-1]
        except BaseException as interruption:
            self.stop_unwaited(interruption, began_in)
            raise

    def _is_lost_after(self, results: list[PGresult], error: BaseException, status: int) -> bool:
        """Return whether libpq found the connection lost after the server's message that it ends the session.

        After any other error nothing is left under way. As in psycopg, the session can be used again after
        Ctrl-C.
        """
        if isinstance(error, psycopg.Error):
            if any(result.status == FATAL for result in results):
                return True
            raise self.own_error(error, status)
        if isinstance(error, INTERRUPTIONS) and self.pgconn.transaction_status == ACTIVE:
            try:
                self._try_cancel(timeout=5.0)
                waiting.wait(execute(self.pgconn), self.pgconn.socket, interval=0.1, timeout=5.0)
            except BaseException as another:
                self.pgconn.finish()
                if not isinstance(another, Exception):
                    raise
        self._interrupted(error, status)
        return False

    def exchange(
        self,
        commands: Sequence[Command],
        send: Callable[[], None] | None = None,
        after: Sequence[Command] = NOTHING,
        many: int = 1,
    ) -> list[list[PGresult]]:
        """Send commands, and a statement after them, and wait; return the statement's answers.

        They travel in a pipeline. One loop does the work of psycopg's generators, which are half of a
        statement's cost at the client. The caller must hold `lock` and pass errors through `own_error`.

        :param send: sends the statement.
        :param after: commands without parameters that follow the statement; their answers follow its own.
        :param many: the number of statements whose answers the server may keep back: each has its own time.
        :raises psycopg.Error: the error of the first failed command; the statement was skipped then.
        """
        pgconn = self.pgconn
        if self.unusable or self.streamed:
            if self.telling and send is not None:
                return self._exchange_and_tell(commands, send, after, many)
            commands = self._before_sending(commands)
        began_in = pgconn.transaction_status
        cleaning = len(self.cleaning) if self.stale else 0
        outcomes: list[list[PGresult]] = []
        try:
            before = self._send_all(commands, send, after)
            if not self._take_answers(outcomes, self._await_first(many), many, cleaning):
                return outcomes[-1:]
            pgconn.exit_pipeline_mode()
        except BaseException as error:
            self._end_exchange(error, outcomes, began_in)
            raise
        if (notify := pgconn.notifies()) is not None:
            self._hear(notify)
        if self.not_replicated:
            self._check_replicated()
        if commands and (self.stale or self.follows or outcomes[before - 1][-1].status > TUPLES_OK):
            self._check(outcomes[:before])  # after a failure all the others are skipped
        return outcomes[before:]

    def _exchange_and_tell(
        self, commands: Sequence[Command], send: Callable[[], None], after: Sequence[Command], many: int
    ) -> list[list[PGresult]]:
        """Send commands and a statement as `exchange` does, and learn the end of its writes."""
        self.telling, self.syncs = False, 0 if after else 1
        end = *(after or (SYNC,)), (query(self.proven), None)  # after a COMMIT, or a Sync, which implies one
        try:
            outcomes = ExchangingConnection.exchange(self, commands, send, (XID, *end), many)
        except BaseException as error:
            self.syncs = 0
            if self.closed or isinstance(error, errors.NotReplicatedError):
                self.lose_track()
            raise
        return self.tell(outcomes)

    def _before_sending(self, commands: Sequence[Command]) -> Sequence[Command]:
        """Refuse an unusable connection; after a stream, have a first command that returns no rows."""
        if self.unusable:
            self._refuse_use()
        self.streamed = False
        return commands if commands and commands[0][1] is None else (*EMPTY, *commands)

    def _end_exchange(self, error: BaseException, outcomes: list[list[PGresult]], began_in: int) -> None:
        """Close the connection: the state of its session is not known.

        As psycopg does, do not leave a statement running. Raises the server's last error, if it sent one.
        """
        if not isinstance(error, psycopg.Error):
            self._cancel_and_close()
        if (answer := self._last_words(error, outcomes)) is not None:
            raise self._ended_by(answer, began_in) from None
        self.pgconn.finish()
        self._note_loss(error, began_in)

    def _hear(self, notify: pq.misc.PGnotify | None) -> None:
        """Pass on the notifications that came with the answers."""
        pgconn = self.pgconn
        while notify:
            if pgconn.notify_handler:
                pgconn.notify_handler(notify)
            notify = pgconn.notifies()

    def _send_all(
        self, commands: Sequence[Command], send: Callable[[], None] | None, after: Sequence[Command]
    ) -> int:
        """Queue everything for the pipeline; return how many answers the commands will have."""
        pgconn, before = self.pgconn, len(commands)
        known = _NONE_KNOWN if self.touched else self._known
        pgconn.enter_pipeline_mode()
        for sql, values in commands:
            if values is None:
                pgconn.send_query_params(sql, None)
            elif (name := known.get(sql)) is not None:
                pgconn.send_query_prepared(name, values)
            else:
                before += self._send_bound(sql, values)
        if send is not None:
            send()
        for sql, _ in after:
            if sql:
                pgconn.send_query_params(sql, None)
            else:
                pgconn.pipeline_sync()
        pgconn.pipeline_sync()
        return before

    def _take_answers(
        self, outcomes: list[list[PGresult]], deadline: float | None, many: int, cleaning: int
    ) -> bool:
        """Take the answers to all that was sent, each with its results, up to the Sync's.

        :param cleaning: how many of the first answers are those of a cleaning.
        :returns: False if a COPY is under way, which the caller refuses: it has no end to wait for.
        """
        pgconn, late = self.pgconn, 0.0
        while True:
            if pgconn.is_busy():
                late = self._await_answer(deadline, late)
            if (result := pgconn.get_result()) is None:
                if pgconn.status == BAD:
                    raise psycopg.OperationalError("the connection is lost")
                continue
            if (status := result.status) == _SYNC:
                if not self.syncs:
                    return True
                self.syncs -= 1  # the next part has its own Sync
                continue
            outcomes.append(answer := [result])
            if status in _COPYING:
                return False
            while (result := pgconn.get_result()) is not None:  # in a pipeline, its end comes with an answer
                answer.append(result)
            if cleaning and len(outcomes) == cleaning:
                self._forget_notifications()
            deadline = self._deadline(many) if many > 1 else deadline

    def _await_first(self, many: int) -> float | None:
        """Read the first input from the server; return the time until which to wait for more."""
        pgconn, patience, wait_readable = self.pgconn, self.patience, self.wait_readable
        if many > 1 or deadlines.in_use or self.until is not None:
            patience = self._patience_for(many)
        deadline = None if patience is None else monotonic() + patience
        if pgconn.flush():
            return self._flush(deadline, many)
        if not wait_readable(None if patience is None else patience * 1000 if patience > 0 else 0):
            raise self._unanswered()
        pgconn.consume_input()  # nothing was read before, and mostly this is all
        return deadline

    def _await_answer(self, deadline: float | None, late: float) -> float:
        """Read the server's input until an answer is there, at most until the deadline.

        :param late: when the deadline was first found to have passed, 0 if it has not.
        :returns: the same for the next answer.
        """
        pgconn = self.pgconn
        while True:
            if deadline is None:
                self.wait_readable(None)
            else:
                left = deadline - monotonic()
                if not self.wait_readable(max(0.0, left) * 1000):
                    raise self._unanswered()
                if left <= 0:  # this process may have stood still while the answer came
                    late = late or monotonic()
                    if monotonic() > late + bounds.CLIENT_GRACE:  # it does not stop sending
                        raise self._unanswered()
            pgconn.consume_input()
            if not pgconn.is_busy():
                return late

    def _last_words(self, error: BaseException, outcomes: Iterable[list[PGresult]]) -> PGresult | None:
        """Return the answer with which the server ended the session; None if it sent none.

        libpq finds the end of the stream while answers that arrived ahead of it are not taken yet.
        """
        if type(error) is not psycopg.OperationalError:  # not libpq's error for a lost connection
            return None
        answers = [answer for answers in outcomes for answer in answers]
        with suppress(psycopg.OperationalError):
            for _ in range(MOST_LEFT):
                if self.pgconn.is_busy():
                    break
                if (answer := self.pgconn.get_result()) is not None:
                    answers.append(answer)
        failed = (answer for answer in answers if answer.status == FATAL)  # a pooler's own comes second
        return next(filter(outcome.ends_session, failed), None)

    def _ended_by(self, answer: PGresult, status: int) -> psycopg.Error:
        """Close the connection, and return the error that the server ended it with."""
        error = psycopg.errors.error_from_result(answer, encoding=self.pgconn._encoding)
        self.pgconn.finish()
        self._note_loss(error, status)
        return error

    def _forget_notifications(self) -> None:
        """Drop notifications for the LISTEN of an earlier block, now that this has ended.

        libpq has read no further than to the answer that was taken last.
        """
        while self.pgconn.notifies():
            pass
        self.backlog = ()

    def _send_bound(self, sql: bytes, values: Sequence[bytes | None]) -> int:
        """Queue a command that has parameters, prepared if the session keeps statements; count extra answers.

        It is the same for every block, and parsing it would be half of its cost for the server.
        """
        unprepared = self.touched or self.local or self._prepared.prepare_threshold is None
        if unprepared or self.named >= MOST_NAMES:
            self.pgconn.send_query_params(sql, values)
            return 0
        self._known[sql] = name = b"_pgdbpool_%d" % next(_names)
        self.named += 1
        self.pgconn.send_prepare(name, sql)
        self.pgconn.send_query_prepared(name, values)
        return 1

    def _deallocate(self, name: bytes | None) -> PQGen[None]:
        if name is None:  # psycopg forgets all that is prepared, after a ROLLBACK or DROP
            self._known.clear()
            self._prepared._names.clear()  # in a pipeline, later prepared statements go too
        return super()._deallocate(name)

    def _check(self, outcomes: list[list[PGresult]]) -> None:
        """Raise the first failure of a preamble."""
        for results in outcomes:
            for result in results:
                if result.status == FATAL:
                    raise self._refused(result, outcomes.index(results))
        self.stale = False
        if self.follows:
            answers = [result for results in outcomes for result in results]
            if self.guarding:
                self.note_passed(answers)
            if self.follows:
                self.in_force = next(filter(None, map(InForce.of, answers)), self.in_force)

    def _refused(self, result: PGresult, number: int) -> Exception:
        """Return the error for the part of a preamble that failed."""
        self._known.clear()
        error = psycopg.errors.error_from_result(result, encoding=self.pgconn._encoding)
        if self.stale and number < len(self.cleaning):
            # Not clean, which is only the last borrower's fault: another connection will do.
            self.pgconn.finish()
            return errors.as_query_error(error, errors.NotCleanError)
        self.stale = False  # the cleaning has its own transaction
        if self.guarding and (behind := self.note_failed(error)) is not None:
            if self.pgconn.transaction_status != IDLE:
                self.exchange(ROLLBACK)  # of the guards' own transaction, or the one that they began
            return behind
        return error

    def _patience_for(self, many: int) -> float | None:
        """Return the seconds to wait for the next of this many answers."""
        return self._within_deadline(None if self.patience is None else self.patience * many)

    def _deadline(self, many: int) -> float | None:
        """Return the time until which to wait for the next of this many answers."""
        patience = self._patience_for(many)
        return None if patience is None else monotonic() + patience

    def _flush(self, deadline: float | None, many: int) -> float | None:
        """Send the data that does not fit into the socket's buffer, and take the server's input meanwhile.

        :returns: the deadline of the next wait.
        """
        poller = select.poll()
        poller.register(self.pgconn.socket, select.POLLIN | select.POLLOUT)
        while self.pgconn.flush():
            if not poller.poll(None if deadline is None else max(0.0, deadline - monotonic()) * 1000):
                raise self._unanswered()
            self.pgconn.consume_input()
            if many > 1:
                deadline = self._deadline(many)
        return deadline

    @contextmanager
    def waiting_for(self, statements: int) -> Iterator[None]:
        """Wait for this many statements: the server's statement_timeout applies to each one."""
        patience = self.patience
        if patience is not None:
            self.patience = patience * max(1, statements)
        try:
            yield
        finally:
            self.patience = patience

    def expose(self: Own) -> Own:
        """Give the connection itself to the block, which may then do anything with it.

        :raises ConnectionLostError: the session was to be cleaned first, and the connection is closed now.
        """
        if self.stale:
            self.clean_what_shows()
        self.prepares = True
        self.mark(session=True, attributes=True, kept=True)
        return self

    def clean_what_shows(self) -> None:
        """Clean the session now, not with the first statement, if the client shows settings that need it.

        Programs rely on them for SET TIME ZONE, or the form of a date. It takes a round trip, after a
        block that has changed such a setting.
        """
        with self.alone():
            if self.stale and self._shown() != self.shown:
                self.run(self.cleaning)
                self.shown = self._shown()  # the server's defaults may have changed by now

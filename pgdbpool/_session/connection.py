"""The connection as a block sees it: it reaches the server only while a block has it.

`PooledConnection.tidy` resets what psycopg has no public setter for, and `pipeline` replaces a pipeline's
`result_queue`; the minor version of psycopg is pinned for that.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from math import inf
from threading import Lock, RLock, get_ident
from time import monotonic, sleep
from types import NoneType
from typing import TYPE_CHECKING, Any, Protocol
from weakref import ref

import psycopg
from psycopg import pq
from psycopg.adapt import AdaptersMap
from psycopg.errors import _WaitTimeout
from psycopg.generators import execute
from psycopg.transaction import OutOfOrderTransactionNesting

from .. import errors
from .._request import correlation as tracing
from .._request import deadline as deadlines
from .._request.tenant import Bound, milliseconds
from .._session import outcome
from .._util import greenlets
from .._util.client_settings import InForce
from .._util.durations import Tally
from .._util.transaction_modes import Modes
from .block import (
    CLEANING,
    CLEANING_TO_READ,
    GRACE,
    HURRY,
    IDLE,
    INTRANS,
    NOTHING,
    UNKNOWN,
    Block,
    Command,
    deallocate,
    set_local,
)
from .foreign_cursors import ENDS_INSIDE, FAILED, HeldLock, PsycopgsLock, Turn, Visit, asked_in
from .pooler_safety import left_in_session
from .prepared import before_resending, dropping, is_stale
from .statement_shape import Shape, shape_with_escapes, text_of

if TYPE_CHECKING:
    from types import FrameType

    from psycopg import ConnectionInfo, Xid
    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGresult

    from .._servers.endpoint import Endpoint

# As plain numbers, which is what libpq gives: an enumeration is slower to compare with.
ACTIVE = int(pq.TransactionStatus.ACTIVE)
_BAD = int(pq.ConnStatus.BAD)
_INERROR = int(pq.TransactionStatus.INERROR)
_OPEN = (INTRANS, _INERROR)
_OVER = (IDLE, UNKNOWN)
_FATAL = int(pq.ExecStatus.FATAL_ERROR)
_SYNC = int(pq.ExecStatus.PIPELINE_SYNC)
_COPYING = tuple(map(int, (pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_BOTH)))

_WRITTEN_BY = (b"IntervalStyle", b"standard_conforming_strings")
"""Settings that the client writes intervals and literals by."""
_SHOWN = (
    *_WRITTEN_BY, b"TimeZone", b"DateStyle", b"search_path", b"application_name", b"session_authorization",
    b"is_superuser", b"default_transaction_read_only",
)  # fmt: skip
"""Settings that the server reports. If `client_encoding` has changed, the connection is closed anyway."""

MARGIN = 0.1
"""Seconds that the server's statement_timeout comes before the deadline of the request, at most."""

MOST_NAMES = 20
"""How often a session prepares a preamble: anew after a block that touched it; nothing removes the old."""

MOST_LEFT = 100
"""Answers that are taken at most from a connection that was lost."""

INTERRUPTIONS = (KeyboardInterrupt, SystemExit)
"""What psycopg takes for a reason to cancel, and to wait for five seconds."""

OUTSIDE = "this connection is back in its pool: use it inside its `with Handler(...)` block only"

_BUSY = "a stream, COPY or notifies() of this connection is still open in this thread: end it first"
_PARENTS = "this connection belongs to the parent process: open a Handler in this one"

_EMPTY: Command = (b"", None)
_HELD = HeldLock()
_CROSSED = (
    "contexts of this transaction were left in the wrong order: it was rolled back, nothing was committed"
)
_SEVERED = "the connection was cut under the block"
_NOT_REPLICATED = (
    "the transaction is committed on {}, and perhaps nowhere else: its wait for the synchronous standby was "
    "cancelled; do not repeat it"
)

_names = itertools.count(1)

_ATTRIBUTES = (
    "patience", "row_factory", "cursor_factory", "server_cursor_factory", "prepare_threshold", "prepared_max",
    "own_timeout", "_adapters", "_isolation_level", "_read_only", "_deferrable", "_begin_statement",
)  # fmt: skip


class Keeper(Protocol):
    """What a connection tells the group that it belongs to."""

    def tolerates(self, conn: PooledConnection) -> bool:
        """Count a commit that did not wait for its standby; return whether a log record of it will do."""


class Slot:
    """The right to one connection of a pool, taken for as long as the object lives."""

    __slots__ = ("__weakref__", "conn", "endpoint", "left", "lent")

    def __init__(self) -> None:
        self.left = False
        """Whether its connection is closed, and the server may still be in a commit of the session."""
        self.conn: ref[PooledConnection] | None = None
        """Its connection, whoever has that."""
        self.endpoint: Endpoint | None = None
        """Where its connection is, or is being opened to."""
        self.lent = False


class _Answers(deque[Any]):
    """What psycopg waits for in a pipeline; a COMMIT implied by its Sync that fails is one answer more."""

    def popleft(self) -> Any:
        """Return what the next answer is for, None for an answer of no cursor."""
        return super().popleft() if self else None


class PooledConnection(psycopg.Connection[Any]):
    """A psycopg connection that belongs to an endpoint and, while it is lent, to one block.

    To psycopg it is in autocommit mode always: the block owns the transaction, and `autocommit` is the
    block's. Statements reach the server only while a block has the connection, whether through the Handler
    or through the connection.
    """

    # What every connection has. In its dictionary these would be too many for the form in which instances
    # share their keys: 1,300 bytes for each connection, and slower to read.
    __slots__ = (
        "_known", "abandoned", "adapters_shared", "altered", "annotates", "block", "bound", "by_itself",
        "client_encoding", "crossed", "ending", "endpoint", "expires_at", "follows", "handed_out", "holder",
        "lent", "local", "named", "not_replicated", "own_handlers", "owner", "patience", "plain", "poll",
        "reads", "replacing", "riding", "settled", "shown", "slot", "speaks_utf8", "stale", "step",
        "streamed", "taken_away", "touched", "turn", "until", "unusable", "used_at", "uses",
        "wait_readable", "wrapped",
    )  # fmt: skip

    endpoint: Endpoint
    slot: Slot | None
    lent: bool
    """Whether it is neither the pool's nor in the hands of who takes it from there."""
    block: Block | None
    handed_out: bool
    """Whether its block may keep a reference to it, which is not to reach the next one; see `ended`."""
    patience: float | None
    """Seconds that one wait for the server may take; None for no bound."""
    until: float | None
    """When it ends in any case, on the clock of `monotonic`: while it is opened, asked, or left early."""
    own_timeout: bool = False
    """Whether the block has set a statement_timeout by itself."""
    limited: bool = False
    """Whether a deadline has bound a statement_timeout in the open transaction."""
    annotates: bool
    """Whether its group shows the blocks' correlation ids at the server."""
    annotated: bool = False
    """Whether that was done in the open transaction."""
    own_name: str = ""
    """The session's application_name."""
    cut_by: str = ""
    """What has closed the pools under its block."""
    taken_away: bool
    """Whether it was taken from its block, which finds it lost; see `max_hold`."""
    ending: bool
    """Whether a COMMIT or ROLLBACK is under way, whose outcome is worth a wait."""
    explicit: bool = False
    """Whether a statement of an autocommit block began the open transaction."""
    declared: bool = False
    """Whether the statement that psycopg begins is the one that its block knows of."""
    undeclared: Any = NOTHING
    """The statement that the block knew of when a cursor of another kind executed one."""
    unsure: bool = False
    """Whether a transaction may have ended that the block still takes for open."""
    not_replicated: bool
    """Whether the server has just said that a commit did not wait for its standby."""
    severed: bool = False
    """Whether another thread cuts it under its block, which can begin nothing more."""
    left: int = 0
    """The process of its server, where that may still be committing after the connection was closed."""
    keeper: Keeper | None = None
    """Its group, once it is open."""
    used_at: float
    """When the connection was last known to work, on the monotonic clock."""
    expires_at: float
    uses: Tally
    """Where its group counts how long blocks have it."""
    times_lent: int = 0
    """Blocks that it was lent to, where anybody counts."""
    asked_role: str | None = None
    """The role of a server that does not report it (before PostgreSQL 14), asked once."""
    local: Bound
    """Settings that every transaction binds, where the session itself can keep none (a pooler)."""
    bound: bool
    """Whether the block's settings are bound in the open transaction."""
    reads: bool
    """Whether its group is one of servers that take no writes."""
    conforms: bool = True
    """Whether a backslash in a plain string is one, when the session begins."""
    touched: bool
    """Whether the block may have left something in the session."""
    altered: bool
    """Whether the connection's own attributes may have changed."""
    tainted: bool = False
    """Whether something may be left that cannot be cleaned."""
    stale: bool
    """Whether the session is to be cleaned before the next statement."""
    cleaning: tuple[Command, ...] = CLEANING
    in_force: InForce | None = None
    """What values of the last transaction were written by, if the block binds such a setting."""
    follows: bool
    """Whether the block does."""
    _following: AdaptersMap | None = None
    dropping: tuple[Command, ...] = NOTHING
    """What drops the prepared statements that were forgotten, in a transaction of its own."""
    spoilt: bool = False
    """Whether a statement of the pipeline that is open has failed: the server skips what follows."""
    prepares: bool = False
    named: int
    """How often a preamble was prepared in the session."""
    own_statements: tuple[str, ...] = ()
    """Prepared statements that belong to the session itself (`sqlprepare`)."""

    abandoned: bool
    unusable: bool
    """Whether it is abandoned or severed."""
    riding: bool
    """Whether statements go through that are the pool's own, not a block's."""
    streamed: bool
    """Whether libpq may give the first result of a pipeline row by row, as it did in a stream."""
    pipelines: int = 0
    """Psycopg's pipelines that are open over it, or are being opened or ended."""
    wrapped: bool
    """Whether the open transaction is there for one statement of an autocommit block, and ends with it."""
    implicit: bool = False
    """Whether the statements of the open pipeline are in no transaction but those that its Syncs end."""
    failed: tuple[Any, str] = None, ""
    """The statement of the block that failed last, and what the server said."""
    crossed: bool
    """Whether the open transaction had contexts that were left in the wrong order."""
    visit: Visit | None = None
    """The operation of a cursor that the block did not make, while it takes part."""
    holder: int
    """The thread that has a stream, COPY or notifies() open, which holds psycopg's lock."""
    turn: Lock
    """Held from looking at what is due before a statement to the end of the statement; see `alone`."""
    owner: int
    """The thread that holds it for several steps."""
    step: Turn | None
    """How a thread holds it, if not for one statement of a cursor of the block."""
    replacing: AbstractContextManager[Any]
    """Held while a block that has lost it takes another in its place."""
    settled: dict[str, Any] | None
    own_handlers: tuple[tuple[Any, ...], tuple[Any, ...]]
    """The notice and notify handlers that `configure` has added."""
    shown: tuple[bytes | None, ...]
    """What the server reports of a clean session's settings."""
    by_itself: bool
    """What `autocommit` says outside of a block: what the group does."""
    adapters_shared: AdaptersMap | None
    """A copy of the adapters, while nobody can have changed them, for the cursors that change none."""
    client_encoding: bytes | None
    speaks_utf8: bool
    plain: bool
    """Whether a block finds nothing of the connection's own that its BEGIN or settings must say."""
    _pool: Any = None  # set: psycopg then does not warn when the interpreter drops it open

    def __init__(self, pgconn: Any, *args: Any, **kwargs: Any) -> None:
        self.owner, self.holder, self.step, self.replacing = 0, 0, None, RLock()
        self.abandoned = self.unusable = self.taken_away = self.not_replicated = False
        before = len(vars(self))
        super().__init__(pgconn, *args, **kwargs)
        own_names.update(list(vars(self))[before:])
        pgconn.notice_handler = partial(_notice, ref(self))
        self.slot = self.block = self.settled = self.client_encoding = None
        self.lent = self.bound = self.reads = self.riding = self.wrapped = self.streamed = False
        self.handed_out = self.touched = self.altered = self.stale = self.annotates = self.ending = False
        self.crossed = self.follows = False
        self.local = ()
        self.patience = self.until = self.adapters_shared = None
        self.speaks_utf8 = self.plain = self.by_itself = True
        self.shown, self.own_handlers = (), ((), ())
        self.used_at, self.expires_at, self.named = 0.0, float("inf"), 0

    def watch(self) -> None:
        """Prepare `poll` and `wait_readable`; to be called once, when the connection is open."""
        self._known: dict[bytes, bytes] = {}
        """The preamble's commands that are prepared, by text."""
        # One and the same but under gevent: `poll` looks and never waits.
        self.poll, self.wait_readable = greenlets.polls(self.pgconn.socket)
        self.used_at = monotonic()

    # Threads may share a block, as they may share a connection of psycopg. What is due before a statement is
    # decided, sent and noted without another thread's statement in between.

    @property  # type: ignore[override]
    def lock(self) -> AbstractContextManager[Any]:
        """What psycopg holds during each of its steps: nothing more where its thread has the turn already."""
        return _HELD if self.owner == get_ident() else PsycopgsLock(self)

    @lock.setter
    def lock(self, lock: Lock) -> None:
        self.turn = lock

    def alone(self) -> AbstractContextManager[Any]:
        """Have the connection for several steps; other threads wait. May be nested."""
        return _HELD if self.owner == get_ident() else Turn(self)

    def take_back(self) -> None:
        """Give up a turn whose end was interrupted in this thread, before the thread waits for another.

        :raises DBQueryError: a stream, COPY or notifies() of this thread has it.
        """
        self.check_free()
        if (step := self.step) is not None and step.thread == get_ident():
            step.give_up()

    @contextmanager
    def owning(self) -> Iterator[None]:
        """Let psycopg's own methods through, which take the lock; to be called with the turn."""
        before, self.owner = self.owner, get_ident()
        try:
            yield
        finally:
            self.owner = before

    def retire(self) -> None:
        """Close the connection and give its slot back."""
        if self._is_anothers():
            self.cut()
        else:
            self.close()
        self.slot = None

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

    @property
    def plain_cleaning(self) -> tuple[Command, ...]:
        """What cleans the session where nothing that was prepared in it has to go."""
        return CLEANING_TO_READ if self.reads else CLEANING

    def keep_touched(self) -> None:
        """Leave the session as a block left it (`reset: never`): only what it may have removed is noted."""
        if self.touched:
            self._known.clear()
        self.touched = self.prepares = self.tainted = False
        self.dropping = NOTHING

    def touch(self, what: Shape, query: Any) -> Shape:
        """Note what a statement may leave behind, or in its transaction; return what it is in this session.

        :raises NotSupportedError: it would leave something in a session that a pooler gives to others.
        """
        if what.escapes and not self._strings_conform():
            what = shape_with_escapes(query, self)
        if self.local and what.touches and (text := text_of(query, self)) and (kept := left_in_session(text)):
            raise errors.as_query_error(psycopg.NotSupportedError(kept))
        self.touched = self.touched or what.touches
        self.prepares = self.prepares or what.prepares
        if what.prepares:
            self.explicit = False  # it may be PREPARE TRANSACTION
        self.tainted = self.tainted or what.taints
        if what.timeout:
            # How long a statement may take is the server's to say from here on: no less than that, and where
            # it is not known there is no bound.
            self.own_timeout = self.altered = True
            allowed = milliseconds(what.allows) or 0.0
            if allowed < 1 or self.patience is None:  # less than a millisecond rounds to 0: no limit
                self.patience = None
            else:
                self.patience = max(self.patience, allowed / 1000 + GRACE)
        return what

    def _strings_conform(self) -> bool:
        """Return whether a backslash in a plain string is one, when the next statement is read."""
        if self.stale:
            return self.conforms  # after the cleaning it is as at the beginning
        return self.pgconn.parameter_status(b"standard_conforming_strings") == b"on"

    def hand_out(self) -> PooledConnection:
        """Give the connection itself to the block, which may then do anything with it.

        :raises ConnectionLostError: the session was to be cleaned first, and the connection is closed now.
        """
        if self.stale:
            self.clean_what_shows()
        self.touched = self.altered = self.prepares = self.handed_out = True
        return self

    def clean_what_shows(self) -> None:
        """Clean the session now, not with the first statement, if the client shows what is to be cleaned.

        Code decides by it: whether to send SET TIME ZONE, how to write a date. It takes a round trip, after a
        block that has changed such a setting.
        """
        with self.alone():
            if self.stale and self._shown() != self.shown:
                self.run(self.cleaning)
                self.shown = self._shown()  # the server's defaults may be others by now

    def misleads(self) -> bool:
        """Return whether a parameter would be written by what a cleaning that rides before it undoes."""
        return tuple(map(self.pgconn.parameter_status, _WRITTEN_BY)) != self.shown[: len(_WRITTEN_BY)]

    def _shown(self) -> tuple[bytes | None, ...]:
        """Return what the server has reported of the session's settings."""
        return tuple(map(self.pgconn.parameter_status, _SHOWN))

    def tidy(self) -> bool:
        """After a block: put the connection's own attributes back, and ask for a cleaning.

        :returns: False where something may be left that cannot be cleaned.
        """
        # What is sent with a cleaning is in the encoding of before it, so that must be the same after it.
        if self.pgconn.parameter_status(b"client_encoding") != self.client_encoding:
            return False
        # A generator left open (`notifies`, `stream`) still holds the lock.
        if self.turn.locked() or self.tainted or self._tpc or self._num_transactions or self._pipeline:
            return False
        if self.altered:
            for name in [name for name in vars(self) if name not in own_names]:
                delattr(self, name)  # of the block, or of `configure`, whose value comes back
            for name, value in (self.settled or {}).items():
                setattr(self, name, value)
            self._own_adapters()
            self._notice_handlers, self._notify_handlers = map(list, self.own_handlers)
            self._notifies_backlog = deque()
            self.unsure = False
        self.follows, self.in_force = False, None
        if self.touched and not self.local:
            self._known.clear()
        if (self.touched or self.dropping) and not self.local:
            self.ask_for_cleaning()
        self.touched = self.altered = self.prepares = False
        return True

    def follow_settings(self) -> None:
        """Read values by what the block binds; see `decoding`."""
        from .decoding import adapters_for

        if self._following is None:
            self._following = adapters_for(self)
        self._adapters, self.follows, self.in_force = AdaptersMap(self._following), True, None

    def ask_for_cleaning(self) -> None:
        """Have the session cleaned before its next statement."""
        plain = self.plain_cleaning
        if self.stale and plain[1] in self.cleaning and not (self.prepares or self.dropping):
            return  # that is due already
        own = ((deallocate(self.own_statements), None),) if self.prepares else NOTHING
        self.cleaning = (*self.dropping, *plain[:-1], *own, plain[-1])
        self.stale, self.dropping = True, NOTHING

    def forget_statements(self, since: int = 0) -> None:
        """Forget what is prepared in the session, and have it dropped before the next block.

        :param since: psycopg's number of the first statement to forget; 0 is all, also the preamble's own.
        """
        prepared = self._prepared
        stale = {key: name for key, name in prepared._names.items() if int(name[5:]) >= since}
        names = list(stale.values())
        for key in stale:
            del prepared._names[key]
        if not since:
            prepared._counts.clear()
            names += self._known.values()
            self._known.clear()
        if not names or self.local:
            return  # a pooler's names are its own
        # Not as a part of the cleaning: that ends a transaction, and this one may go on after a savepoint.
        self.dropping += dropping(names)
        self.altered = True

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Around a pipeline of psycopg, which takes for prepared what the server skips after a failure."""
        since, outer, self.spoilt = self._prepared._prepared_idx, self.spoilt, False
        try:
            yield
        except BaseException:
            self.spoilt = True
            raise
        finally:
            if self.spoilt:
                self.forget_statements(since)
            self.spoilt = self.spoilt or outer

    def settle(self) -> None:
        """Remember the connection's attributes as those that every block finds; once, when it is opened."""
        self.client_encoding = self.pgconn.parameter_status(b"client_encoding")
        self.speaks_utf8 = self.client_encoding == b"UTF8"
        self.conforms = self._strings_conform()
        self.settled = {name: getattr(self, name) for name in _ATTRIBUTES}
        self.settled |= {name: value for name, value in vars(self).items() if name not in own_names}
        self.shown = self._shown()
        self.own_handlers = tuple(self._notice_handlers), tuple(self._notify_handlers)
        # An isolation_level, read_only or deferrable that `configure` has set is part of each BEGIN.
        self.plain = not self.local and self.speaks_utf8 and self._get_tx_start_command() == b"BEGIN"
        self._own_adapters()
        # `vars` has made of the values a dictionary that shares its keys with others, in which every look at
        # an attribute is a search. A dictionary with keys of its own is read by their place.
        self.__dict__ = {**vars(self)}

    def _own_adapters(self) -> None:
        """Give the next block a copy of what `configure` registered, so that what it adds ends with it."""
        self.adapters_shared = None
        if self._adapters is not None:
            self._adapters = AdaptersMap(self._adapters)

    def share_adapters(self) -> AdaptersMap:
        """Return the adapters for cursors that have none of their own, made for the first of these."""
        self.adapters_shared = shared = AdaptersMap(self.adapters)
        return shared

    # psycopg comes through here whenever it waits for the server: statements, COMMIT, COPY ...

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
            if self.until is not None and self.closed:  # psycopg asks all the same; what was lost is noted
                raise psycopg.OperationalError(
                    "the connection was lost where a stream or COPY was left early"
                )
            # psycopg would still take what has arrived, and a stream that flows would never end.
            raise self._unanswered(status)
        try:
            result = super().wait(gen, interval, patience)
        except _WaitTimeout:
            if timeout is not None:
                raise  # the caller's own deadline, not the statement's
            raise self._unanswered(status) from None
        except psycopg.Error as error:
            raise self.own_error(error, status)  # noqa: B904  it is the same object
        except BaseException as interruption:
            if self.pgconn.transaction_status == ACTIVE:
                # What was under way was not ended: where it stands is not known, and it is not to run on.
                self._cancel_and_close()
            self._note_loss(interruption, status)
            raise
        if self.not_replicated or self.pgconn.status == _BAD:
            self._look_back(status)
        return result

    def _look_back(self, status: int) -> None:
        """Find out what an answer leaves behind that is not in it."""
        if self.closed:
            # psycopg keeps to itself what goes wrong while it rolls back to a savepoint.
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
        # After a cancel of the pool's own the record would not do: that is no success.
        if self.keeper is not None and self.keeper.tolerates(self) and not self.severed:
            return
        error = errors.NotReplicatedError(_NOT_REPLICATED.format(self.endpoint.label))
        error.maybe_executed = block is None or not block.manual
        if block is not None:
            error.correlation_id = tracing.id_of(block)
        raise error

    def _refuse_use(self) -> None:
        if self.abandoned:
            raise errors.BlockClosedError(_PARENTS)
        status = self.pgconn.transaction_status
        self.close()
        raise self.own_error(psycopg.OperationalError(_SEVERED), status)

    def may_commit(self) -> bool:
        """Return whether what is under way may be committing, so that it must not be cancelled.

        A read of which nothing is to be committed may be cancelled, and a statement inside of a transaction.
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

    def _cancel_and_close(self) -> None:
        """Close the connection in the middle of a statement, which is cancelled if it cannot be a commit."""
        if not self.unusable and not self.may_commit():
            with suppress(psycopg.Error):
                self.cancel_safe(timeout=1.0)
        self.close()

    def _note_loss(self, error: BaseException, status: int) -> None:
        """Where the connection was lost, note in the block what was lost with it."""
        block = self.block
        if block is None or not self.closed or status in _OVER:  # unknown: it was lost before
            return
        # In COPY or a pipeline the status tells only that something is under way.
        if status != ACTIVE or block.manual or self.bound or self._num_transactions:
            block.lost = True
            block.failure = errors.without_frames(error) if isinstance(error, Exception) else None

    def _try_cancel(self, *, timeout: float = 5.0) -> None:
        """Cancel what is left early: a stream, COPY. psycopg then takes what is on its way, for a second.

        What may be a commit is not cancelled: a stream or COPY may end in that second, else it is closed.
        """
        left = self._within_deadline(self.patience)
        try:
            if not self.may_commit():
                self.cancel_safe(timeout=max(HURRY, min(timeout, GRACE, GRACE if left is None else left)))
            elif not self.holder or issubclass(sys.exc_info()[0] or Exception, INTERRUPTIONS):
                self.close()
        except (psycopg.Error, OSError) as error:
            status, self.until = self.pgconn.transaction_status, 0.0
            self.close()
            self._note_loss(error, status)
        else:
            if self.holder:  # which puts it back
                self.until = min(monotonic() + GRACE, self.until or inf)

    def _check_connection_ok(self) -> None:
        """Raise if nothing can be sent; psycopg asks before it makes a cursor or sends a command of its own.

        :raises ConnectionLostError: the connection is lost, or was closed by its block; nothing was sent.
        """
        if self.pgconn.status == _BAD and self.block is not None:
            raise self.own_error(psycopg.OperationalError("the connection is lost: nothing was sent"))
        super()._check_connection_ok()

    def close(self) -> None:
        """Close the connection, and with it a transaction of its block; one of the parent's is left alone."""
        if self.abandoned:
            return
        status = self.pgconn.transaction_status
        if self.block is not None and status in _OPEN:
            self.block.lost = True  # by the block itself: it must not commit what it does from now on alone
        elif status == ACTIVE and not self.left and self.may_commit():
            self.left = self.pgconn.backend_pid
        super().close()

    def begin_sever(self) -> bool:
        """Let the block begin nothing more on the connection; return whether it may be committing.

        Before anything is cancelled: what is sent after this is refused before its outcome is told.
        """
        self.severed = self.unusable = True
        return not self.abandoned and self.pgconn.transaction_status == ACTIVE and self.may_commit()

    def sever(self, deadline: float) -> None:
        """Cut the connection under its block, from any thread, within the deadline; the block finds it lost.

        What runs is cancelled. What may be committing is waited for instead, and then left to the server. To
        close the connection would take its socket's number from under a wait for it.
        """
        committing = self.begin_sever()
        if self.abandoned:
            return
        with suppress(psycopg.Error, OSError):
            number = self.pgconn.socket
            with socket.socket(fileno=os.dup(number)) as own:
                if committing:
                    self._await_commit(own, deadline)
                elif self.pgconn.transaction_status == ACTIVE and (left := deadline - monotonic()) > 0:
                    with suppress(psycopg.Error):
                        self.cancel_safe(timeout=left)
                if self.pgconn.socket == number:  # raises where it was closed: the number may be another's
                    own.shutdown(socket.SHUT_RDWR)

    def _await_commit(self, own: socket.socket, deadline: float) -> None:
        """Wait until what may be committing is over; at the deadline note what it leaves at the server."""
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

    # An exception is never kept in a local variable of a frame that it passes: that would be a cycle, and
    # keep the connection with its slot until the next collection of garbage.

    def own_error(self, error: psycopg.Error, status: int = IDLE) -> errors.DBQueryError:
        """Make an error a `DBQueryError` too, and close the connection where the session has ended."""
        if errors.ends_session(error) or self.taken_away:
            self.close()
        if is_stale(error):
            self.forget_statements()
        if self._pipeline:
            self.spoilt = True
        self._note_loss(error, status)
        kind: type[errors.DBQueryError] = errors.end_of_session(error) if self.closed else errors.DBQueryError
        if error.sqlstate == "25006" and not self.closed and self.endpoint.refuses_writes(self):
            kind = errors.ReadOnlyServerError
        if self.taken_away:
            kind = errors.HoldExceededError
        if self.cut_by and not isinstance(error, errors.DBQueryError):  # it may come by twice
            error.args = (f"the pools were closed by {self.cut_by}, with this block open: {error}",)
        own = errors.as_query_error(error, kind)
        if (block := self.block) is not None:
            if own.correlation_id is None:
                own.correlation_id = tracing.id_of(block)
            if error.sqlstate:
                statement = getattr(block, "statement", None)
                if isinstance(statement, str):  # another object, since the next execution may be well
                    block.statement = statement = statement[:1] + statement[1:]
                self.failed = statement, f"{error.diag.severity}:  {error}\n"  # as libpq says it
        return own

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
            error.correlation_id = tracing.id_of(self.block)
        self._note_loss(error, status)
        return error

    # The deadline of the request. Where it has passed, what would begin is refused (`deadlines.check`), and
    # what is under way ends with its connection.

    def _within_deadline(self, patience: float | None) -> float | None:
        """Return how long a wait may take that would have this long without a deadline."""
        if self.until is not None:
            left = self.until - monotonic()
            patience = left if patience is None else min(patience, left)
        rest = deadlines.time_left()
        if rest is None or self.block is None:  # opening a connection has a bound that knows of it
            return patience
        rest = max(rest, GRACE if self.ending else 0.0)
        return rest if patience is None else min(patience, rest)

    def limit(self, preamble: tuple[Command, ...]) -> tuple[Command, ...]:
        """Add the statement_timeout that the current deadline leaves to what goes before a statement.

        A little less than what is left, so that the server's answer is there before the client gives up.
        """
        status = self.pgconn.transaction_status
        if status == IDLE:
            self.limited = False
        left = deadlines.time_left()
        if self.own_timeout or status not in (IDLE, INTRANS):
            return preamble
        usual = None if self.patience is None else self.patience - GRACE
        allowed = usual
        if left is not None and (usual is None or left < usual):
            self.limited, allowed = True, left - min(MARGIN, left / 2)
        elif not self.limited:
            return preamble
        # 0 is no bound. In a transaction what an earlier statement has bound is put back.
        milliseconds = 0 if allowed is None else max(1, round(allowed * 1000))
        return preamble + set_local((("statement_timeout", str(milliseconds)),))

    def annotate(self, preamble: tuple[Command, ...]) -> tuple[Command, ...]:
        """Add the block's correlation id, as a part of application_name, once in each transaction.

        Not to the statement's text, since that is what plans are known by: with a comment of its own, each
        block's would be parsed and planned anew, at the server and in psycopg.
        """
        block, status = self.block, self.pgconn.transaction_status
        if status == IDLE:
            self.annotated = False
        if block is None or self.annotated or status not in (IDLE, INTRANS):
            return preamble
        self.annotated = True
        name = tracing.application_name(self.own_name, tracing.id_of(block))
        return preamble + set_local((("application_name", name),))

    @property
    def info(self) -> ConnectionInfo:
        """What psycopg tells of the connection; `error_message` also after a failure in a pipeline.

        :raises ConnectionLostError: the session was to be cleaned first; see `hand_out`.
        """
        if self.stale and self.block is not None:  # in `on_checkout`
            self.clean_what_shows()
        failed, text = self.failed
        statement = None if self.block is None else getattr(self.block, "statement", None)
        return _Info(self.pgconn, text if failed is not None and failed is statement else "")

    # Transactions: to psycopg the connection is in autocommit mode, and the block sends BEGIN.

    @property
    def autocommit(self) -> bool:
        """Whether each statement is a transaction of its own: as the group says, until the block sets it."""
        return self.by_itself if self.block is None else not self.block.manual

    @autocommit.setter
    def autocommit(self, value: bool) -> None:
        self.set_autocommit(value)

    @property
    def commits_each(self) -> bool:
        """Whether the next statement is a transaction of its own."""
        return self.autocommit and self.pgconn.transaction_status == IDLE

    def set_autocommit(self, value: bool) -> None:
        """Go on in autocommit mode, or with transactions, to the end of the block; nothing is sent for it.

        :raises psycopg.ProgrammingError: a transaction is open.
        """
        with self.alone():
            self._change(self._check_intrans_gen("autocommit"))
            if self.block is None:  # while `configure` has it
                self._autocommit = self.by_itself = bool(value)
            elif self.block.manual is bool(value) or self.block.nests:
                self.block.choose(bool(value))

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

    def _change(self, steps: PQGen[None]) -> None:
        """Run psycopg's steps to change an attribute, which is refused inside a transaction."""
        if self.block is None and self.settled is not None:
            raise errors.BlockClosedError(OUTSIDE)
        self.end_wrapped()
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

    def modes_of_implicit(self, block: Block) -> tuple[Command, ...]:
        """Return what gives an implicit transaction of the block the modes that its settings ask for."""
        modes = block.binding.modes
        return NOTHING if modes is None else tuple((sql, None) for sql in self._allowed(modes).of_implicit())

    @property
    def read_only_by_choice(self) -> bool:
        """Whether it may be the block that has made its transactions read only, and not the server."""
        modes = None if self.block is None else self.block.binding.modes
        return self.touched or (modes is not None and bool(modes.read_only))

    def _get_tx_start_command(self) -> bytes:
        """Return BEGIN for psycopg, which sends it in `transaction()` outside of a transaction."""
        return self._begin_with(None if self.block is None else self.block.binding.modes)

    def _begin_with(self, modes: Modes | None) -> bytes:
        """Return BEGIN as the connection's attributes say, and where these say nothing as the settings do."""
        if modes is None:
            return super()._get_tx_start_command()
        level, modes = self._isolation_level, self._allowed(modes)
        return Modes(
            isolation=modes.isolation if level is None else level.name.replace("_", " "),
            read_only=modes.read_only if self._read_only is None else self._read_only,
            deferrable=modes.deferrable if self._deferrable is None else self._deferrable,
        ).begin()

    def _allowed(self, modes: Modes) -> Modes:
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

    def _start_query(self) -> PQGen[None]:
        """Let a cursor take part that the block did not make; every cursor of psycopg comes through here."""
        block = self.block
        if self.declared:
            self.declared = False
        else:
            self.explicit, self.undeclared = False, getattr(block, "statement", None)
            if self._pipeline is not None:
                self.unsure = self.altered = True
        if self.settled is not None and not self.riding:
            if block is None:
                raise errors.BlockClosedError(OUTSIDE)
            self._welcome(block, sys._getframe(1))
        if self._pipeline and block is not None and block.manual and self.pgconn.transaction_status == IDLE:
            return self._begin_in_pipeline()
        return super()._start_query()

    def _welcome(self, block: Block, frame: FrameType) -> None:
        mine = self.owner == get_ident()
        if mine and not self.holder and self.step is None:
            return  # a cursor of the block, which has seen to it
        asked = asked_in(frame)
        if mine and not self.holder:
            if not hasattr(asked.cursor, "block"):
                # The end of this thread's turn was interrupted: the statement would go without the tenant.
                self.cut()
                self._note_loss(psycopg.OperationalError(_BUSY), ACTIVE)
                self._check_connection_ok()
            return
        if mine:
            if not hasattr(asked.cursor, "block"):
                self.check_free()  # it comes into the block's own stream or COPY
            return
        visit = self.visit or Visit(self, block)
        if self.visit is None and not self._pipeline:
            visit.begin(isinstance(asked.cursor, psycopg.ServerCursor) and not asked.cursor.withhold)
        visit.note(asked)

    @contextmanager
    def _pipeline_nolock(self) -> Iterator[psycopg.Pipeline]:
        """Send what the block needs first for `executemany`, which makes a pipeline of its own."""
        if self.block is not None and self.owner != get_ident() and not self.riding:
            Visit(self, self.block).begin(named=False)
        with super()._pipeline_nolock() as pipeline:
            yield pipeline

    @contextmanager
    def unbound(self) -> Iterator[None]:
        """Let statements through that are the pool's own, not a block's."""
        self.riding = True
        try:
            yield
        finally:
            self.riding = False

    def check_free(self) -> None:
        """Refuse what would wait for ever on psycopg's lock, which this thread holds itself."""
        if self.holder == get_ident():
            raise errors.as_query_error(psycopg.ProgrammingError(_BUSY))

    def end_wrapped(self) -> None:
        """End a transaction around one statement whose end was interrupted; the caller has the turn.

        What follows would run in it, with what was done to its settings.

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

    def cut(self) -> None:
        """End the connection, whatever loop is open over it and holds psycopg's lock for good.

        Another thread that is in a statement finds the connection lost, and closes it: psycopg reads what
        is freed where it is closed under a wait.
        """
        if self._is_anothers():
            self.sever(monotonic())
            self.expires_at = -inf
            return
        self.close()
        if (step := self.step) is not None:
            self.holder = 0
            step.give_up()  # threads that wait for it find the connection closed, or the block ended
        elif self.turn.locked():
            self.turn, self.holder, self.owner = Lock(), 0, 0

    def _is_anothers(self) -> bool:
        """Return whether another thread has the turn."""
        if not self.turn.locked() or self.owner == get_ident():
            return False
        return (step := self.step) is None or step.thread != get_ident()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Note who has the connection's lock for longer than a statement."""
        self.holder, until = get_ident(), self.until
        try:
            yield
        finally:
            self.holder, self.until = 0, until
            if self.pgconn.transaction_status == ACTIVE and not self._pipeline:
                # Interrupted again, while psycopg was ending what was under way.
                self.close()
                self._note_loss(psycopg.OperationalError("interrupted in a stream or COPY"), ACTIVE)

    @contextmanager
    def waiting_for(self, statements: int) -> Iterator[None]:
        """Wait for so many statements: the server's statement_timeout holds for each one."""
        patience = self.patience
        if patience is not None:
            self.patience = patience * max(1, statements)
        try:
            yield
        finally:
            self.patience = patience

    def run(self, commands: Sequence[Command]) -> None:
        """Send commands in one round trip of their own; the first that fails is raised.

        :raises NotCleanError: a cleaning failed, and so the connection was closed.
        """
        again: tuple[Command, ...] | None = None
        with self.lock:
            try:
                self.exchange(commands)
            except psycopg.Error as error:
                if (again := before_resending(self, error, commands)) is None:
                    raise self.own_error(error)  # noqa: B904  it is the same object
            if again is not None:
                try:
                    self.exchange(again)
                except psycopg.Error as error:
                    raise self.own_error(error)  # noqa: B904  it is the same object

    def receive(self) -> list[PGresult]:
        """Wait for the answer to a statement that was sent alone; psycopg does it in C, with its own wait."""
        return self.wait(execute(self.pgconn))  # type: ignore[no-any-return]

    def exchange(
        self,
        commands: Sequence[Command],
        send: Callable[[], None] | None = None,
        after: Sequence[Command] = NOTHING,
        many: int = 1,
    ) -> list[list[PGresult]]:
        """Send commands, and a statement after them, and wait; return the statement's answers.

        They travel in a pipeline. This is what psycopg's generators do, in one loop: half of what a
        statement costs at the client is theirs. The caller must hold `lock` and make errors its own.

        :param send: sends the statement.
        :param after: commands without parameters that follow the statement; their answers follow its own.
        :param many: how many statements the server may keep the answers of: each has its time.
        :raises psycopg.Error: the first that failed of the commands; the statement was skipped then.
        """
        pgconn = self.pgconn
        if self.unusable:
            self._refuse_use()
        began_in = pgconn.transaction_status
        patience = self.patience
        if self.streamed:
            self.streamed = False
            if not commands or commands[0][1] is not None:
                commands = (_EMPTY, *commands)  # it has no rows
        if many > 1:
            deadline = self._deadline(many)
        else:
            if deadlines.in_use or self.until is not None:
                patience = self._within_deadline(patience)
            deadline = None if patience is None else monotonic() + patience
        before, late = len(commands), 0.0
        cleaning = len(self.cleaning) if self.stale else 0
        outcomes: list[list[PGresult]] = []
        current: list[PGresult] = []
        try:
            pgconn.enter_pipeline_mode()
            for sql, values in commands:
                if values is None:
                    pgconn.send_query_params(sql, None)
                else:
                    before += self._send_bound(sql, values)
            if send is not None:
                send()
            for sql, _ in after:
                pgconn.send_query_params(sql, None)
            pgconn.pipeline_sync()
            if pgconn.flush():
                deadline = self._flush(deadline, many)
            while True:
                while pgconn.is_busy():
                    if self._await(self.wait_readable, deadline):
                        late = late or monotonic()
                        if monotonic() > late + GRACE:  # it does not stop sending
                            raise self._unanswered()
                    pgconn.consume_input()
                result = pgconn.get_result()
                if result is not None:
                    status = result.status
                    if status == _SYNC:
                        break
                    current.append(result)
                    if status in _COPYING:  # the caller refuses it; there is no end to wait for
                        return [current]
                    continue
                if not current and pgconn.status == _BAD:
                    raise psycopg.OperationalError("the connection is lost")
                outcomes.append(current)
                if cleaning and len(outcomes) == cleaning:
                    self._forget_notifications()
                current = []
                if many > 1:
                    deadline = self._deadline(many)
            pgconn.exit_pipeline_mode()
        except BaseException as error:
            # Where the session stands is not known. As psycopg does, do not leave a statement running.
            if not isinstance(error, psycopg.Error):
                self._cancel_and_close()
            if (answer := self._last_words(error, (*outcomes, current))) is not None:
                raise self._ended_by(answer, began_in) from None
            pgconn.finish()
            self._note_loss(error, began_in)
            raise
        while notify := pgconn.notifies():
            if pgconn.notify_handler:
                pgconn.notify_handler(notify)
        if self.not_replicated:
            self._check_replicated()
        if commands:
            self._check(outcomes[:before])
        return outcomes[before:]

    def _last_words(self, error: BaseException, outcomes: Iterable[list[PGresult]]) -> PGresult | None:
        """Return the answer with which the server ended the session; None if it sent none.

        libpq finds the end of the stream while answers that arrived ahead of it are not taken yet.
        """
        if type(error) is not psycopg.OperationalError:  # not libpq's word for a lost connection
            return None
        answers = [answer for answers in outcomes for answer in answers]
        with suppress(psycopg.OperationalError):
            for _ in range(MOST_LEFT):
                if self.pgconn.is_busy():
                    break
                if (answer := self.pgconn.get_result()) is not None:
                    answers.append(answer)
        return next((answer for answer in reversed(answers) if _ends_session(answer)), None)

    def _ended_by(self, answer: PGresult, status: int) -> psycopg.Error:
        """Close the connection, and return the error that the server ended it with."""
        error = psycopg.errors.error_from_result(answer, encoding=self.pgconn._encoding)
        self.pgconn.finish()
        self._note_loss(error, status)
        return error

    def _forget_notifications(self) -> None:
        """Drop what came for the LISTEN of an earlier block, now that this has ended.

        libpq has read no further than to the answer that was taken last.
        """
        while self.pgconn.notifies():
            pass
        self._notifies_backlog = deque()

    def _send_bound(self, sql: bytes, values: Sequence[bytes | None]) -> int:
        """Queue a command that has parameters, prepared where the session keeps what is; count extra answers.

        It is the same for every block, and parsing it would be half of what it costs the server.
        """
        if self.touched or self.local or self.prepare_threshold is None:
            self.pgconn.send_query_params(sql, values)
            return 0
        if name := self._known.get(sql):
            self.pgconn.send_query_prepared(name, values)
            return 0
        if self.named >= MOST_NAMES:
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
            self._prepared._names.clear()  # in a pipeline, what it has prepared since goes too
        return super()._deallocate(name)

    def _check(self, outcomes: list[list[PGresult]]) -> None:
        """Raise the first failure of a preamble."""
        for number, results in enumerate(outcomes):
            for result in results:
                if result.status == _FATAL:
                    raise self._refused(result, number)
        self.stale = False
        if self.follows:
            found = [InForce.of(result) for results in outcomes for result in results]
            self.in_force = next(filter(None, found), self.in_force)

    def _refused(self, result: PGresult, number: int) -> Exception:
        """Return the error for the part of a preamble that failed."""
        self._known.clear()
        error = psycopg.errors.error_from_result(result, encoding=self.pgconn._encoding)
        if self.stale and number < len(self.cleaning):
            # Not clean, and nobody's fault but the last borrower's: another will do.
            self.pgconn.finish()
            return errors.as_query_error(error, errors.NotCleanError)
        self.stale = False  # the cleaning has a transaction of its own
        return error

    def _await(self, poll: Callable[[float | None], Any], deadline: float | None) -> bool:
        """Wait until the server has sent something, at most to the deadline; tell whether that had passed."""
        if deadline is None:
            poll(None)
            return False
        left = deadline - monotonic()
        if not poll(max(0.0, left) * 1000):
            raise self._unanswered()
        return left <= 0  # this process may have stood still while the answer came

    def _deadline(self, many: int) -> float | None:
        """Return until when to wait for the next of so many answers."""
        patience = self._within_deadline(None if self.patience is None else self.patience * many)
        return None if patience is None else monotonic() + patience

    def _flush(self, deadline: float | None, many: int) -> float | None:
        """Send what does not fit into the socket's buffer, and take what the server sends meanwhile.

        :returns: the deadline of what is waited for next.
        """
        poller = select.poll()
        poller.register(self.pgconn.socket, select.POLLIN | select.POLLOUT)
        while self.pgconn.flush():
            self._await(poller.poll, deadline)
            self.pgconn.consume_input()
            if many > 1:
                deadline = self._deadline(many)
        return deadline

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Send what the block needs first in a round trip of its own, for what cannot ride.

        In an autocommit block with settings a transaction is opened for it, and committed after it. Other
        threads wait until it is over.
        """
        with self.alone():
            block, autocommit, wrap = self.send_due()
            with self.over(block, autocommit, wrap):
                yield

    def send_due(self) -> tuple[Block, bool, bool]:
        """Send what the block needs first; the caller has the turn.

        :returns: the block, whether it is in no transaction of its own, and whether one was opened for it.
        """
        block = self.block
        if block is None:
            raise errors.BlockClosedError(OUTSIDE)
        if deadlines.in_use:
            deadlines.check()
        if self._pipeline:
            return block, False, False
        autocommit = not block.manual and self.pgconn.transaction_status == IDLE
        wrap = bool(block.settings) and autocommit
        commands = block.explicit(self) if wrap else block.preamble(self)
        if commands and deadlines.in_use:
            commands = self.limit(commands)
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
            except Exception as error:
                if autocommit and self.closed and isinstance(error, errors.ConnectionLostError):
                    error.maybe_executed = not errors.undone(error)
                if self.block is block:
                    block.failure = errors.without_frames(
                        error
                    )  # the cause, where it is swallowed and the block then ends
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
        """Roll back after an error, which is the one to see; where that fails, close."""
        try:
            if self.pgconn.transaction_status == ACTIVE or self.holder or self._is_anothers():
                self.cut()
            elif not self.closed:
                self.rollback()
        except psycopg.Error:
            self.close()

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
        if status == _INERROR or self.crossed:
            why = _CROSSED if self.crossed else FAILED
            self.rollback()
            raise errors.TransactionAbortedError(why)
        if deadlines.in_use and status != IDLE:
            self._check_deadline()
        self.ending = True
        try:
            self.wait(self._commit_gen())  # psycopg's commit(), but for the lock
        except errors.ConnectionLostError as error:
            if status == UNKNOWN:
                raise  # it was lost before, and nothing is committed now
            self._note_unknown(error)
            raise
        finally:
            self.ending = False
        if block is not None and status != IDLE:
            block.committed = True

    def _note_unknown(self, error: errors.ConnectionLostError) -> None:
        """Note in the error, and in the block, that a COMMIT was under way when the connection was lost."""
        error.maybe_committed = not errors.undone(error)
        if (block := self.block) is not None:
            block.lost = False  # or committed: nobody knows, and this error says so
            block.committed = block.committed or error.maybe_committed

    def rollback(self) -> None:
        """Roll the open transaction back, if any."""
        self.check_free()
        with self.alone():
            if self._pipeline and self.block is not None and self.block.settings:
                raise errors.as_query_error(psycopg.NotSupportedError(ENDS_INSIDE))
            self.bound = self.crossed = self.explicit = False
            self.ending = True
            try:
                super().rollback()
            finally:
                self.ending = False

    # Two-phase commit: psycopg begins, prepares and ends these transactions; the tenant comes with the first
    # statement in them.

    def tpc_begin(self, xid: Xid | str) -> None:
        """Begin a two-phase transaction, as psycopg does it for a connection that is not in autocommit mode.

        :raises psycopg.ProgrammingError: the block is in autocommit mode, or a transaction is open.
        """
        with self._two_phase():
            if self.stale and self.pgconn.transaction_status == IDLE:
                self.run(self.cleaning)
            self._autocommit = self.autocommit
            try:
                super().tpc_begin(xid)
            finally:
                self._autocommit = True

    def tpc_prepare(self) -> None:
        """Prepare the two-phase transaction, which is the server's from then on.

        :raises ConnectionLostError: with `maybe_committed`: it may be prepared, or be rolled back.
        """
        with self._two_phase():
            try:
                super().tpc_prepare()
            except errors.ConnectionLostError as error:
                self._note_unknown(error)
                raise

    def tpc_commit(self, xid: Xid | str | None = None) -> None:
        """Commit a two-phase transaction, the open one or one that was prepared.

        :raises ConnectionLostError: with `maybe_committed`, since the outcome is unknown.
        """
        with self._two_phase() as block:
            try:
                super().tpc_commit(xid)
            except errors.ConnectionLostError as error:
                self._note_unknown(error)
                raise
            block.committed = True

    def tpc_rollback(self, xid: Xid | str | None = None) -> None:
        """Roll back a two-phase transaction, the open one or one that was prepared."""
        with self._two_phase():
            super().tpc_rollback(xid)

    def give_up(self) -> None:
        """Roll back what is open, after an exception; what was prepared is the server's, and stays."""
        if self._tpc is None:
            self.rollback()
        elif self._tpc[1]:
            self.close()
        else:
            self.tpc_rollback()

    @contextmanager
    def _two_phase(self) -> Iterator[Block]:
        """Have the turn for a step of a two-phase transaction, whose outcome is worth a wait."""
        self.check_free()
        with self.alone():
            if (block := self.block) is None:
                raise errors.BlockClosedError(OUTSIDE)
            self.end_wrapped()
            self.bound, self.ending = False, True
            try:
                yield block
            finally:
                self.ending = False

    def _check_deadline(self) -> None:
        """Roll back instead of a COMMIT that would begin after the deadline."""
        try:
            deadlines.check()
        except errors.DeadlineExceeded:
            self.rollback()
            raise

    @contextmanager
    def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> Iterator[psycopg.Transaction]:
        """Open a transaction, or a savepoint where the block has one open already."""
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
        self.altered = self.handed_out = True  # psycopg's Transaction has the connection as an attribute
        with self.alone():
            self.end_wrapped()
            self.implicit = False
            commands = block.preamble(self)
            if self.pgconn.transaction_status == IDLE and not block.nests:
                # psycopg sends BEGIN; the settings go with the first statement after it.
                commands = self.cleaning if self.stale else NOTHING
            if commands and not self._pipeline:
                # Before the savepoint, so that rolling back to it does not undo the settings.
                self.run(commands)
                self.bound = self.pgconn.transaction_status != IDLE
            outermost = self.pgconn.transaction_status == IDLE
        body_ended = False
        try:
            with super().transaction(savepoint_name, force_rollback) as transaction:
                outermost = transaction._outer_transaction  # another thread may have ended one meanwhile
                try:
                    yield transaction
                finally:
                    self.ending = True
                    if self.holder == get_ident():
                        # An exception has left a loop, and keeps its generator alive.
                        self.cut()
                        self._note_loss(psycopg.OperationalError(_BUSY), ACTIVE)
                if deadlines.in_use:
                    deadlines.check()  # it is rolled back then
                if self.closed or (outermost and self.pgconn.transaction_status == _INERROR):
                    # psycopg would end it in silence: COMMIT of a failed transaction is a ROLLBACK.
                    raise errors.TransactionAbortedError(FAILED) from block.failure
                body_ended = True
            block.committed = block.committed or outermost
        except errors.ConnectionLostError as error:
            unknown = body_ended and outermost and not errors.undone(error)
            error.maybe_committed = error.maybe_committed or unknown
            raise
        except OutOfOrderTransactionNesting as error:
            # psycopg leaves the transaction open with what was done in it, which must not be committed just
            # because the block ends. If one was interrupted on its way in, the block goes on with another.
            self.crossed = self.block is block
            cause = error.__context__
            if self.crossed and not outermost and not isinstance(cause, (Exception, NoneType)):
                self.close()
                self._note_loss(error, ACTIVE)
            raise
        finally:
            self.ending = False
            left_open = self.pgconn.transaction_status not in _OVER
            if left_open and outermost and not block.nests and not self.crossed:
                self._undo_left_open(block)

    def _undo_left_open(self, block: Block) -> None:
        """Roll back a transaction that psycopg was interrupted in while it ended it."""
        with self.alone():
            # It may be another thread's by now.
            ended = self.pgconn.transaction_status in _OVER or self._num_transactions
            if not ended and self.block is block:
                self.wrapped = True
                self.undo()

    @contextmanager
    def _wrapped_pipeline(self) -> Iterator[None]:
        """Send what the block needs first; other threads may take part in the body."""
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
        """Send what the block needs before a pipeline; a BEGIN alone comes with the first statement in it.

        It is so for a block that has chosen to have transactions as psycopg has them: the connection stays
        idle, and its attributes can still be set.
        """
        block = self.block
        if (
            block is not None and block.manual and not (block.nests or block.settings or self.stale)
            and self.pgconn.transaction_status == IDLE and not (deadlines.in_use or self.annotates)
        ):  # fmt: skip
            return block, False, False
        return self.send_due()

    @contextmanager
    def pipeline(self) -> Iterator[psycopg.Pipeline]:
        """Switch to pipeline mode; what the block needs first is sent before."""
        if self.settled is None:
            with super().pipeline() as pipeline:
                yield pipeline  # of `configure`
            return
        self.check_free()
        with self._wrapped_pipeline(), self.preparing():
            try:
                with super().pipeline() as pipeline:
                    self.handed_out = True  # psycopg's Pipeline reaches it
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
                # psycopg cannot leave the pipeline, which is how an interruption of its end shows.
                self.close()
                self._note_loss(error, ACTIVE)
                if error.__context__ is not None and not isinstance(error.__context__, psycopg.Error):
                    raise error.__context__ from None
                if isinstance(error.__context__, psycopg.Error) and error.__context__.sqlstate:
                    # What the server says at the end of an implicit transaction (a deferred constraint).
                    raise errors.as_query_error(error.__context__) from None
                raise self.own_error(error)  # noqa: B904  it is the same object

    def notifies(self, **kwargs: Any) -> Generator[psycopg.Notify]:
        """Yield notifications; waiting for them is no statement, so it has no deadline of its own."""
        self.check_free()
        left = deadlines.time_left() if deadlines.in_use else None
        if left is not None:  # it ends with the request's time, as with a timeout of its own
            given = kwargs.get("timeout")
            kwargs["timeout"] = max(0.0, left if given is None else min(given, left))
        with self.alone():
            if self.stale and self.pgconn.transaction_status == IDLE:
                self.run(self.cleaning)  # what the last block listened to is not this one's
            block, patience = self.block, self.patience
            self.patience, self.holder = None, get_ident()
            try:
                yield from super().notifies(**kwargs)
            finally:
                if self.block is block:  # left open, it ends when another may have the connection
                    self.patience, self.holder = patience, 0


class _Info(psycopg.ConnectionInfo):
    """What psycopg tells of a connection, and the failure that libpq forgets with the end of a pipeline."""

    def __init__(self, pgconn: Any, failure: str) -> None:
        super().__init__(pgconn)
        self._failure = failure

    @property
    def error_message(self) -> str:
        """The server's message about the last statement, if that failed."""
        return super().error_message or self._failure


def _ends_session(answer: PGresult) -> bool:
    """Return whether an answer is the server's word that it ends the session, not libpq's own."""
    return answer.status == _FATAL and errors.ends_session(psycopg.errors.error_from_result(answer))


own_names = {"_pool", "_created_at", "_expire_at", *PooledConnection.__annotations__}
"""Attributes in a connection's dictionary that are psycopg's, psycopg_pool's and this class's own."""


def _notice(wself: ref[PooledConnection], notice: PGresult) -> None:
    """Take a notice; note that of a commit which did not wait for its standby."""
    conn = wself()
    if conn is not None and outcome.stopped_waiting(notice):
        conn.not_replicated = True
    psycopg.Connection._notice_handler(wself, notice)  # type: ignore[arg-type]


_classes: dict[tuple[type[Any], type[PooledConnection]], type[PooledConnection]] = {}


def pooled(
    cls: type[psycopg.Connection[Any]] | None, base: type[PooledConnection] = PooledConnection
) -> type[PooledConnection]:
    """Return the class of a group's connections: with what a class of the application adds."""
    if cls is None:
        return base
    if issubclass(cls, base):
        return cls
    if (cls, base) not in _classes:
        # Its methods come first, and their `super()` is the pool's connection.
        _classes[cls, base] = type(cls.__name__, (cls, base), {"__module__": cls.__module__})
    return _classes[cls, base]

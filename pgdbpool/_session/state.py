"""The state of a connection, the block it is lent to, and the thread that may use it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from math import inf
from threading import Lock, RLock, get_ident
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol
from weakref import ref

import psycopg
from psycopg.adapt import AdaptersMap

from .. import errors
from .._request.tenant import Bound
from .._util import greenlets
from .._util.client_settings import InForce
from .._util.durations import Tally
from . import outcome
from .commands import CLEANING, NOTHING, Command
from .turns import Guest, HeldLock, PsycopgsLock, Turn

if TYPE_CHECKING:
    from psycopg.abc import Transformer
    from psycopg.pq.abc import PGresult

    from .._servers.endpoint import Endpoint
    from .._servers.positions import Facts
    from .block import Block
    from .short_way import Reader
    from .slot import Slot

OUTSIDE = "this connection is back in its pool: use it inside its `with Handler(...)` block only"
BUSY = "a stream, COPY or notifies() of this connection is still open in this thread: end it first"
_HELD = HeldLock()


class Keeper(Protocol):
    """The part of a group that its connections report to."""

    @property
    def writes(self) -> bool:
        """Whether the group requires servers that take writes."""

    def tolerates(self, conn: Any) -> bool:
        """Count a commit that did not wait for its standby; return whether a log record of it will do."""

    def note_guard(self, conn: Any, passed: bool) -> None:
        """Count a guard."""


class Settled(NamedTuple):
    """The attributes that every block begins with."""

    patience: float | None
    prepare_threshold: int | None
    prepared_max: int | None
    attributes: dict[str, Any]
    """Those in the connection's dictionary."""


class ConnectionState(psycopg.Connection[Any]):
    """A psycopg connection with the state that its group, its block and its threads share."""

    # The attributes that every connection has. With them, its dictionary would be too large for the form in
    # which instances share their keys: 1,300 bytes for each connection, and slower to read. Python gives that
    # form up for an instance whose dictionary is asked for; see `own_dictionary`.
    __slots__ = (
        "_known", "abandoned", "adapters_shared", "altered", "annotated", "annotates", "asked_role",
        "backlog", "block", "bound", "by_itself", "cleaning", "client_encoding", "conforms", "crossed",
        "declared", "defines", "dropping", "dumps", "ended_by_server", "ending", "endpoint", "expires_at",
        "explicit", "failed", "follows", "guarding", "handed_out", "holder", "implicit", "in_force", "keeper",
        "lent", "limited", "local", "makers", "named", "not_replicated", "opened_at", "own_handlers",
        "owner", "patience", "plain", "poll", "prepares", "private", "proven", "readers", "reads",
        "replacing", "riding", "settled", "shown", "slot", "speaks_utf8", "stale", "step", "streamed",
        "syncs", "tainted", "taken_away", "telling", "touched", "turn", "undeclared", "unsure", "until",
        "unusable", "used_at", "uses", "wait_readable", "wrapped",
    )  # fmt: skip

    endpoint: Endpoint
    slot: Slot | None
    lent: bool
    """Whether it is checked out: not idle in the pool and not being taken from it."""
    block: Block | None
    private: bool
    """Whether its dictionary shares its keys with no other; see `own_dictionary`."""
    backlog: deque[psycopg.Notify] | tuple[()] | None
    handed_out: bool
    """Whether its block may keep a reference to it, which must not reach the next block; see `ended`."""
    patience: float | None
    """Seconds that one wait for the server may take; None for no bound."""
    until: float | None
    """Latest end of a wait on the clock of `monotonic`: while opening, pinging, or leaving a result early."""
    own_timeout: bool = False
    """Whether the block has changed statement_timeout itself."""
    limited: bool
    """Whether a deadline has bound a statement_timeout in the open transaction."""
    annotates: bool
    """Whether its group shows the blocks' correlation ids at the server."""
    annotated: bool
    """Whether that was done in the open transaction."""
    own_name: str = ""
    """The session's application_name."""
    cut_by: str = ""
    """The event that closed the pools during its block."""
    taken_away: bool
    """Whether it was taken from its block, which will see it as lost; see `max_hold`."""
    ending: bool
    """Whether a COMMIT or ROLLBACK is running, whose outcome is worth waiting for."""
    explicit: bool
    """Whether a statement of an autocommit block began the open transaction."""
    declared: bool
    """Whether the statement psycopg starts is the one recorded in the block."""
    undeclared: Any
    """The statement recorded in the block when a foreign cursor executed another."""
    defines: bool
    """Whether a statement since the last rollback may have changed objects that prepared statements use."""
    unsure: bool
    """Whether a transaction may have ended that the block still considers open."""
    proven: Facts | None
    """How much of the write-ahead log its server is known to have: it cannot have less in this session."""
    guarding: bool
    """Whether guards were among the commands that were sent last, or are about to be."""
    one_snapshot: bool = False
    """Whether a guard has found that transactions have one snapshot for all statements, unasked."""
    telling: bool
    """Whether the next statement's exchange is to ask for the end of its writes."""
    syncs: int
    """Syncs to come before the last one of the pipeline."""
    not_replicated: bool
    """Whether the server has just said that a commit did not wait for its standby."""
    ended_by_server: bool
    """Whether the server has said, while the connection was idle, that it ends the session."""
    severed: bool = False
    """Whether another thread closes it during its block, which cannot begin anything more."""
    left: int = 0
    """The server process that may still be committing after the connection was closed, or 0."""
    keeper: Keeper | None
    """Its group, once it is open."""
    opened_at: float
    """When it was opened, on the monotonic clock."""
    used_at: float
    """When the connection was last known to work, on the monotonic clock."""
    expires_at: float
    uses: Tally
    """The group's tally of how long blocks have connections."""
    times_lent: int = 0
    """Number of blocks it was lent to, if counted."""
    asked_role: str | None
    """The role of a server that does not report it (before PostgreSQL 14), asked once."""
    local: Bound
    """Settings bound in every transaction, because a pooler's session cannot keep them."""
    bound: bool
    """Whether the block's settings are bound in the open transaction."""
    reads: bool
    """Whether its group is read-only."""
    conforms: bool
    """Whether plain strings keep their backslashes when the session begins."""
    touched: bool
    """Whether the block may have left something in the session."""
    altered: bool
    """Whether the connection's own attributes may have changed."""
    tainted: bool
    """Whether something may be left that cannot be cleaned."""
    stale: bool
    """Whether the session must be cleaned before the next statement."""
    cleaning: tuple[Command, ...]
    in_force: InForce | None
    """The format settings in force in the last transaction, if the block binds one of them."""
    follows: bool
    """Whether the answers to a preamble must be read: for such a setting, or for guards."""
    _following: AdaptersMap | None = None
    dropping: tuple[Command, ...]
    """The commands that drop forgotten prepared statements, in a separate transaction."""
    spoilt: bool = False
    """Whether a statement of the open pipeline has failed, so that the server skips the rest."""
    prepares: bool
    named: int
    """How often a preamble was prepared in the session."""
    own_statements: tuple[str, ...] = ()
    """Prepared statements that belong to the session itself (`sqlprepare`)."""

    abandoned: bool
    unusable: bool
    """Whether it is abandoned or severed."""
    riding: bool
    """Whether the pool's own statements are admitted, without a block."""
    streamed: bool
    """Whether libpq may give the first result of a pipeline row by row, as it did in a stream."""
    pipelines: int = 0
    """Number of psycopg pipelines that are open, opening or ending."""
    wrapped: bool
    """Whether the open transaction serves, and ends with, one statement of an autocommit block."""
    implicit: bool
    """Whether the open pipeline's statements run in the implicit transactions that its Syncs end."""
    failed: tuple[Any, str]
    """The block's last failed statement, and the server's message."""
    crossed: bool
    """Whether contexts of the open transaction were exited in the wrong order."""
    visit: Guest | None = None
    """The operation of a foreign cursor, while it takes part."""
    holder: int
    """The thread that has a stream, COPY or notifies() open, which holds psycopg's lock."""
    turn: Lock
    """Held from computing a statement's due commands to the end of the statement; see `alone`."""
    owner: int
    """The thread that holds the turn for several steps."""
    step: Turn | None
    """The turn object, unless the turn is held for one statement of the block's cursor."""
    replacing: AbstractContextManager[Any]
    """Held while a block replaces the connection after losing it."""
    settled: Settled | None
    own_handlers: tuple[tuple[Any, ...], tuple[Any, ...]]
    """The notice and notify handlers that `configure` has added."""
    shown: tuple[bytes | None, ...]
    """The settings of a clean session as reported by the server."""
    by_itself: bool
    """The value of `autocommit` outside a block: the group's mode."""
    adapters_shared: AdaptersMap | None
    """Copies of the adapters, while they are unchanged, for cursors that register none."""
    client_encoding: bytes | None
    speaks_utf8: bool
    dumps: Transformer | None
    """The transformer for parameters of known statements; None if each statement needs its own."""
    readers: dict[bytes, Reader | Literal[False] | None]
    """The readers of prepared statements' results, by name; None if it came once, False if none can."""
    makers: dict[bytes, Any]
    """The makers of prepared statements' rows, by name: their columns cannot change."""
    plain: bool
    """Whether the connection adds nothing to a block's BEGIN or settings."""
    _pool: Any = None  # defined, so that psycopg does not warn when an open connection is garbage-collected

    def __init__(self, pgconn: Any, *args: Any, **kwargs: Any) -> None:
        self.owner, self.holder, self.step, self.replacing = 0, 0, None, RLock()
        self.abandoned = self.unusable = self.taken_away = self.not_replicated = False
        self.ended_by_server = False
        super().__init__(pgconn, *args, **kwargs)
        pgconn.notice_handler = partial(_notice, ref(self))
        self.slot = self.block = self.settled = self.client_encoding = self.keeper = None
        self.lent = self.bound = self.reads = self.riding = self.wrapped = self.streamed = False
        self.handed_out = self.touched = self.altered = self.stale = self.annotates = self.ending = False
        self.crossed = self.follows = self.guarding = self.telling = self.explicit = self.private = False
        self.limited = self.annotated = self.declared = self.defines = self.unsure = False
        self.tainted = self.prepares = self.implicit = False
        self.cleaning, self.undeclared, self.failed = CLEANING, NOTHING, (None, "")
        self.proven, self.asked_role, self.in_force, self.syncs = None, None, None, 0
        self.local = self.dropping = ()
        self.patience = self.until = self.adapters_shared = self.dumps = None
        self.readers, self.makers = {}, {}
        self.speaks_utf8 = self.plain = self.by_itself = self.conforms = True
        self.shown, self.own_handlers = (), ((), ())
        self.used_at, self.expires_at, self.named = 0.0, float("inf"), 0

    def watch(self) -> None:
        """Prepare `poll` and `wait_readable`; to be called once, when the connection is open."""
        self._known: dict[bytes, bytes] = {}
        """Prepared preamble commands by text."""
        # The same object except under gevent: `poll` checks and never waits.
        self.poll, self.wait_readable = greenlets.polls(self.pgconn.socket)
        self.opened_at = self.used_at = monotonic()

    # The operations of its group alone.

    def begin_set_up(
        self, endpoint: Endpoint, until: float, *, autocommit: bool, prepare_threshold: int | None
    ) -> None:
        """Make a new session one of the endpoint's; the set-up must end by a time of `monotonic`."""
        self.endpoint, self.until = endpoint, until
        self.watch()
        self._autocommit, self.by_itself = True, autocommit
        self.prepare_threshold = prepare_threshold

    def bind_always(self, *settings: tuple[str, str]) -> None:
        """Bind settings in every transaction, since a pooler's session cannot keep them."""
        self.local += settings

    def stay_in_autocommit(self) -> None:
        """Undo the mode that `configure` may have set in psycopg: the block sends BEGIN itself."""
        self._autocommit = True

    def end_set_up(
        self, patience: float | None, row_factory: Any, cursor_factory: Any, server_cursor_factory: Any
    ) -> None:
        """Lift the limits of the set-up, and take the attributes that blocks begin with."""
        self.until, self.patience = None, patience
        self.row_factory, self.cursor_factory = row_factory, cursor_factory
        self.server_cursor_factory = server_cursor_factory

    def serve_a_report(self, patience: float) -> None:
        """Serve a report in place of blocks, so that psycopg's own cursors may be used."""
        self.patience, self.settled = patience, None

    def enter_group(self, keeper: Keeper, slot: Slot, uses: Tally, annotates: bool) -> None:
        """Belong to a group and its slot from now on; `annotates` shows its blocks' ids at the server."""
        self.keeper, self.slot, self.uses, self.annotates = keeper, slot, uses, annotates
        slot.endpoint, slot.conn = self.endpoint, ref(self)
        if annotates:
            self.own_name = (self.pgconn.parameter_status(b"application_name") or b"").decode(
                "ascii", "replace"
            )

    def keep_statements(self, names: Iterable[str]) -> None:
        """Keep prepared statements that belong to the session itself in every cleaning."""
        self.own_statements = tuple(names)

    def expire(self, at: float = -inf) -> None:
        """Have the connection replaced at that time, or when its block ends."""
        self.expires_at = at

    def note_role(self, role: str | None) -> None:
        """Note the answer of a server that does not report its role; None to have it asked again."""
        self.asked_role = role

    def note_end_of_pools(self, by: str) -> None:
        """Note the cause of pools closed during the block."""
        self.cut_by = by

    def take_from_block(self) -> None:
        """Have the block see the connection as lost."""
        self.taken_away = True

    def leave_slot(self) -> Slot | None:
        """Return the slot, which is no longer the connection's."""
        slot, self.slot = self.slot, None
        return slot

    def count_block(self) -> int:
        """Return how many blocks had the connection, with the one that ends now."""
        self.times_lent += 1
        return self.times_lent

    @contextmanager
    def bounded(self, seconds: float) -> Iterator[None]:
        """Let no wait in the body end later than that."""
        self.until = monotonic() + seconds
        try:
            yield
        finally:
            self.until = None

    def own_dictionary(self) -> dict[str, Any]:
        """Return the attributes that have no slot; before anything else asks for them.

        Asking for them ends the form in which Python reads them fastest. In the resulting dictionary,
        whose keys are shared, each one is searched for; in one with its own keys it is found by position.
        """
        if not self.private:
            self.private, self.__dict__ = True, {**vars(self)}
        return vars(self)

    @property
    def _notifies_backlog(self) -> deque[psycopg.Notify] | None:
        """psycopg's notifications to come, made on first use: 760 bytes that few connections need."""
        if isinstance(self.backlog, tuple):
            self.backlog = deque()
        return self.backlog

    @_notifies_backlog.setter
    def _notifies_backlog(self, value: deque[psycopg.Notify] | None) -> None:
        self.backlog = value if value or value is None else ()

    @property  # type: ignore[override]
    def lock(self) -> AbstractContextManager[Any]:
        """The lock psycopg holds during each step; a no-op if its thread already has the turn."""
        return _HELD if self.owner == get_ident() else PsycopgsLock(self)

    @lock.setter
    def lock(self, lock: Lock) -> None:
        self.turn = lock

    def alone(self) -> AbstractContextManager[Any]:
        """Reserve the connection for several steps; other threads wait. Reentrant."""
        return _HELD if self.owner == get_ident() else Turn(self)

    def take_back(self) -> None:
        """Give up a turn whose end was interrupted in this thread, before the thread waits for another.

        :raises DBQueryError: a stream, COPY or notifies() of this thread has it.
        """
        self.check_free()
        if (step := self.step) is not None and step.thread == get_ident():
            step.give_up()

    def mark(self, *, session: bool = False, attributes: bool = False, kept: bool = False) -> None:
        """Note the changes that a block may leave, to be undone before the next one; nothing else does.

        :param session: the block may leave something in the session.
        :param attributes: the connection's own attributes may have changed.
        :param kept: the block may keep a reference to the connection.
        """
        if session:
            self.touched = True
        self.altered = self.altered or attributes
        self.handed_out = self.handed_out or kept

    @contextmanager
    def owning(self) -> Iterator[None]:
        """Admit psycopg's own methods, which take the lock; the caller must have the turn."""
        before, self.owner = self.owner, get_ident()
        try:
            yield
        finally:
            self.owner = before

    @contextmanager
    def unbound(self) -> Iterator[None]:
        """Admit the pool's own statements, without a block."""
        self.riding = True
        try:
            yield
        finally:
            self.riding = False

    def check_free(self) -> None:
        """Refuse a call that would deadlock on psycopg's lock, which this thread already holds."""
        if self.holder == get_ident():
            raise errors.as_query_error(psycopg.ProgrammingError(BUSY))

    def _is_anothers(self) -> bool:
        """Return whether another thread has the turn."""
        if not self.turn.locked() or self.owner == get_ident():
            return False
        return (step := self.step) is None or step.thread != get_ident()


NOBODYS = psycopg.pq.PGconn.connect_start(b"=")  # refused by libpq's parser: it never had a socket
NOBODYS.finish()
own_names = {"_pool", "_created_at", "_expire_at", *ConnectionState.__annotations__}
own_names.update(vars(psycopg.Connection(NOBODYS)))
"""Attributes in a connection's dictionary that are psycopg's, psycopg_pool's and this class's own."""


def _notice(wself: ref[ConnectionState], notice: PGresult) -> None:
    """Handle a notice; record a commit that did not wait for its standby, and the end of the session."""
    conn = wself()
    if conn is not None:
        conn.not_replicated = conn.not_replicated or outcome.stopped_waiting(notice)
        conn.ended_by_server = conn.ended_by_server or outcome.ends_session(notice)
    psycopg.Connection._notice_handler(wself, notice)  # type: ignore[arg-type]

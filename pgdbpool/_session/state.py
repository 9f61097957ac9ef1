"""What a connection knows of itself and of the block that it is lent to, and which thread may use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from threading import Lock, RLock, get_ident
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol
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
    from psycopg.pq.abc import PGresult

    from .._servers.endpoint import Endpoint
    from .block import Block
    from .slot import Slot

OUTSIDE = "this connection is back in its pool: use it inside its `with Handler(...)` block only"
BUSY = "a stream, COPY or notifies() of this connection is still open in this thread: end it first"
_HELD = HeldLock()


class Keeper(Protocol):
    """What a connection tells the group that it belongs to."""

    def tolerates(self, conn: Any) -> bool:
        """Count a commit that did not wait for its standby; return whether a log record of it will do."""


class ConnectionState(psycopg.Connection[Any]):
    """A psycopg connection with what its group, its block and its threads have to know of it."""

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
    visit: Guest | None = None
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
            raise errors.as_query_error(psycopg.ProgrammingError(BUSY))

    def _is_anothers(self) -> bool:
        """Return whether another thread has the turn."""
        if not self.turn.locked() or self.owner == get_ident():
            return False
        return (step := self.step) is None or step.thread != get_ident()


own_names = {"_pool", "_created_at", "_expire_at", *ConnectionState.__annotations__}
"""Attributes in a connection's dictionary that are psycopg's, psycopg_pool's and this class's own."""


def _notice(wself: ref[ConnectionState], notice: PGresult) -> None:
    """Take a notice; note that of a commit which did not wait for its standby."""
    conn = wself()
    if conn is not None and outcome.stopped_waiting(notice):
        conn.not_replicated = True
    psycopg.Connection._notice_handler(wself, notice)  # type: ignore[arg-type]

"""One `with` block, as the connection that is lent to it needs to know it."""

from __future__ import annotations

import os
from contextlib import suppress
from threading import RLock, get_ident
from types import CodeType
from typing import Any

from .._request.freshness import Seen
from .._request.tenant import Bound
from .._util.client_settings import REPORT, is_reported
from .._util.transaction_modes import READ_ONLY, Modes, modes_of
from .commands import BEGIN, INHERIT_PATIENCE, NOTHING, Command, set_local

_REPORT: tuple[Command, ...] = ((REPORT, ()),)


class Binding:
    """The settings of a block, and the command that binds them; shared by all blocks of one tenant."""

    __slots__ = (
        "alone", "begin_and_set", "by_role", "modes", "patience", "report", "set", "settings", "special",
    )  # fmt: skip

    def __init__(self, settings: Bound, patience: float | None = INHERIT_PATIENCE) -> None:
        self.settings = settings
        self.patience = patience
        """Seconds that the client waits for a statement; None for no bound."""
        self.modes = modes_of(settings)
        """The transaction modes among the settings; BEGIN must state them."""
        self.report = _REPORT if is_reported(name for name, _ in settings) else NOTHING
        """The query for the settings that decoding depends on, if the block binds one of them."""
        self.special = patience != INHERIT_PATIENCE or bool(self.report)
        """Whether the connection's own attributes change for the block."""
        self.set = set_local(settings) + self.report
        modes = self.modes
        self.begin_and_set = (BEGIN if modes is None else ((modes.begin(), None),)) + self.set
        self.alone = implicit(modes, settings) + self.report
        """The commands before a statement that is its own transaction."""
        self.by_role = modes is not None and modes.read_only is False
        """Whether the commands depend on the role of the server."""


def implicit(modes: Modes | None, settings: Bound, encoding: str = "utf-8") -> tuple[Command, ...]:
    """Return the commands that give an implicit transaction these modes, and bind the settings."""
    if modes is None:
        return set_local(settings, encoding)
    first = tuple((sql, None) for sql in modes.of_implicit())
    return first + set_local(settings + READ_ONLY if modes.read_only else settings, encoding)


UNBOUND = Binding(())

_making_ids = RLock()  # reentrant: a signal handler may need it too


def forked() -> None:
    """In a child, forget a lock that a thread of its parent may have held."""
    global _making_ids
    _making_ids = RLock()


class Block:
    """One `with` block: the commands its statements need first, and the code and thread that opened it."""

    __slots__ = (
        "at_begin", "binding", "chosen", "committed", "conn", "failure", "high", "in_effect",
        "in_transaction", "lost", "manual", "open", "own_id", "place", "seen", "settings", "since", "stack",
        "statement", "thread", "watch",
    )  # fmt: skip

    # Set on first use only, so that a block without one costs nothing; see `describe`.
    own_id: str
    stack: list[tuple[CodeType, int]]
    statement: Any
    """The last statement, finished or not."""
    chosen: bool
    """Set if the block has set `autocommit` itself; its transactions then work as in psycopg."""
    in_effect: bool
    """Whether a statement has taken effect outside a transaction since the last commit() or rollback()."""
    seen: Seen
    """The record of writes that its reads must see, and that notes its own; of a `GuardedBlock`."""

    def __init__(
        self, manual: bool, binding: Binding, place: tuple[CodeType, int], high: bool = False
    ) -> None:
        self.open = True
        self.watch: Any = None
        """A weak proxy of the Handler, or another owner; it reports when that is garbage-collected."""
        self.conn: Any = None
        """The `PooledConnection` lent to the block, or None."""
        self.lost = False
        """Whether an open transaction was lost with its connection and has not been rolled back yet."""
        self.committed = False
        """Whether part of a manual-commit block was, or may have been, committed."""
        self.high = high
        """Whether the block may take the group's reserved connections."""
        self.manual = manual
        """Whether its transactions end with commit(), rollback() or the block itself."""
        self.binding = binding
        self.settings = binding.settings
        """The settings to bind: the connection's, if any, and the block's."""
        self.in_transaction = binding.set
        self.at_begin = binding.begin_and_set if manual else binding.alone
        self.failure: Exception | None = None
        """The last error of a statement: the cause reported if the transaction cannot be committed."""
        self.since = 0.0
        self.thread = get_ident()
        self.place = place
        """The code object and instruction that entered the block; the line is computed only when reported."""

    @property
    def correlation_id(self) -> str:
        """The block's correlation id, generated on first use."""
        found: str | None = getattr(self, "own_id", None)
        if found is None:
            with _making_ids:  # the monitor thread may ask concurrently
                found = getattr(self, "own_id", None)
                if found is None:
                    found = self.own_id = os.urandom(8).hex()
        return found

    @property
    def nests(self) -> bool:
        """Whether `transaction()` opens the block's own transaction first, and so is always a savepoint."""
        return self.manual and not hasattr(self, "chosen")

    def choose(self, autocommit: bool) -> None:
        """Switch to autocommit mode or to transactions, overriding the group."""
        if not autocommit and not self.manual and hasattr(self, "statement"):
            self.committed = True  # statements so far must not be repeated
        self.chosen, self.manual = True, not autocommit

    def sees(self) -> Seen | None:
        """Return the record of writes that its reads must see, and that notes its own; None without one."""
        return None

    def guards(self) -> tuple[Command, ...]:
        """Return the commands that must precede its next transaction, so that it reads nothing stale."""
        return NOTHING

    def spans(self) -> bool:
        """Return whether the transaction continues after the current statement."""
        with suppress(AttributeError, ReferenceError):  # it is not a one-shot, or that is gone
            return self.manual and not self.watch.commits_at_once
        return self.manual

    def part(self) -> None:
        """Forget a lost connection, and the commands derived from its attributes."""
        binding = self.binding
        self.conn, self.settings, self.in_transaction = None, binding.settings, binding.set
        self.at_begin = binding.begin_and_set if self.manual else binding.alone


class GuardedBlock(Block):
    """A block whose reads must see the writes its context has seen; `guard` turns a block into one."""

    __slots__ = ()

    @property
    def at_begin(self) -> tuple[Command, ...]:
        """The commands before the first statement of a transaction, with the guards that are due."""
        commands: tuple[Command, ...] = self.conn.guarded(self, self.seen, _AT_BEGIN.__get__(self))
        return commands

    @at_begin.setter
    def at_begin(self, commands: tuple[Command, ...]) -> None:
        _AT_BEGIN.__set__(self, commands)

    def sees(self) -> Seen:
        """Return the record of writes that its reads must see, and that notes its own."""
        return self.seen

    def guards(self) -> tuple[Command, ...]:
        """Return the commands that must precede its next transaction, so that it reads nothing stale."""
        commands: tuple[Command, ...] = self.conn.guards_for(self.seen)
        return commands


_AT_BEGIN: Any = vars(Block)["at_begin"]


def guard(block: Block, seen: Seen) -> None:
    """Make a block see these writes, and add its own to them."""
    block.seen = seen
    block.__class__ = GuardedBlock


def is_high(priority: str) -> bool:
    """Return whether a block of this priority may take the group's reserved connections.

    :raises ValueError: the priority is unknown.
    """
    if priority not in ("normal", "high"):
        raise ValueError(f"priority={priority!r} is neither 'high' nor 'normal'")
    return priority == "high"

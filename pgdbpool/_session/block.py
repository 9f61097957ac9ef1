"""One `with` block, as the connection that is lent to it needs to know it."""

from __future__ import annotations

import os
from threading import RLock, get_ident
from types import CodeType
from typing import Any
from weakref import ref

from .._request.tenant import Bound
from .._util.client_settings import REPORT, is_reported
from .._util.transaction_modes import modes_of
from .commands import BEGIN, KEEP, NOTHING, Command, set_local

_REPORT: tuple[Command, ...] = ((REPORT, ()),)


class Binding:
    """What a block binds, and the command that does it; shared by all blocks of the same tenant."""

    __slots__ = ("begin_and_set", "modes", "patience", "report", "set", "settings", "special")

    def __init__(self, settings: Bound, patience: float | None = KEEP) -> None:
        self.settings = settings
        self.patience = patience
        """Seconds that the client waits for a statement; None for no bound."""
        self.modes = modes_of(settings)
        """What the settings say of a transaction's modes, which its BEGIN has to say."""
        self.report = _REPORT if is_reported(name for name, _ in settings) else NOTHING
        """What asks for the settings that values are read by, if the block binds one of them."""
        self.special = patience != KEEP or bool(self.report)
        """Whether the connection's own attributes change for the block."""
        self.set = set_local(settings) + self.report
        self.begin_and_set = BEGIN + self.set


UNBOUND = Binding(())

_making_ids = RLock()  # a signal handler may come back to it


def forked() -> None:
    """In a child, forget a lock that a thread of its parent may have held."""
    global _making_ids
    _making_ids = RLock()


class Block:
    """One `with` block: what its statements need first, and who opened it where."""

    __slots__ = (
        "at_begin", "binding", "chosen", "committed", "conn", "failure", "high", "in_effect",
        "in_transaction", "lost", "manual", "open", "own_id", "place", "settings", "since", "stack",
        "statement", "thread", "watch",
    )  # fmt: skip

    # Not set before there is one, so that a block without costs nothing; see `describe`.
    own_id: str
    stack: list[tuple[CodeType, int]]
    statement: Any
    """The last one, under way or not."""
    chosen: bool
    """Set if the block has chosen `autocommit` itself, and so wants transactions as psycopg has them."""
    in_effect: bool
    """Whether a statement has taken effect by itself since the last commit() or rollback()."""

    def __init__(self, manual: bool, binding: Binding, place: tuple[CodeType, int]) -> None:
        self.open = True
        self.watch: ref[Any] | None = None
        """Tells when its Handler is dropped."""
        self.conn: Any = None
        """The connection that is lent to it, a `PooledConnection`; None while it has none."""
        self.lost = False
        """Whether an open transaction was lost with its connection, and not yet given up."""
        self.committed = False
        """Whether a part of it was committed, or may have been; of a manual-commit block only."""
        self.high = False
        """Whether it may take the group's reserved connections."""
        self.manual = manual
        """Whether it has transactions that end with it, with commit() or with rollback()."""
        self.binding = binding
        self.settings = binding.settings
        """What is bound: the connection's own settings, where it has any, and the block's."""
        self.in_transaction = binding.set
        self.at_begin = binding.begin_and_set if manual else binding.set
        self.failure: Exception | None = None
        """The last error of a statement: the cause, where the transaction cannot be committed."""
        self.since = 0.0
        self.thread = get_ident()
        self.place = place
        """The code and the instruction that entered it; its line is worked out when it is told."""

    @property
    def correlation_id(self) -> str:
        """The block's correlation id; a block that has none is given one now."""
        found: str | None = getattr(self, "own_id", None)
        if found is None:
            with _making_ids:  # the monitor may ask at the same time
                found = getattr(self, "own_id", None)
                if found is None:
                    found = self.own_id = os.urandom(8).hex()
        return found

    @property
    def nests(self) -> bool:
        """Whether `transaction()` is a savepoint also if nothing is open: the block's own is opened first."""
        return self.manual and not hasattr(self, "chosen")

    def choose(self, autocommit: bool) -> None:
        """Go on in autocommit mode, or with transactions, whatever the group says."""
        if not autocommit and not self.manual and hasattr(self, "statement"):
            self.committed = True  # as far as it has come, which is not to be repeated
        self.chosen, self.manual = True, not autocommit

    def spans(self) -> bool:
        """Return whether its transaction goes on after the statement that is under way."""
        owner = self.watch() if self.watch is not None else None
        return self.manual and not getattr(owner, "commits_at_once", False)

    def part(self) -> None:
        """Forget the connection, which was lost, with what its attributes say of a BEGIN."""
        self.conn, self.settings, self.in_transaction = None, self.binding.settings, self.binding.set
        self.at_begin = self.binding.begin_and_set if self.manual else self.in_transaction


def is_high(priority: str) -> bool:
    """Tell whether a block of that priority may take the group's reserved connections.

    :raises ValueError: there is no such priority.
    """
    if priority not in ("normal", "high"):
        raise ValueError(f"priority={priority!r} is neither 'high' nor 'normal'")
    return priority == "high"

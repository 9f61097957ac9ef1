"""Limits how long blocks hold their connections: `leak_after` and `max_hold`."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .._session.block import Block
    from .._session.connection import PooledConnection
    from .group import Group
    from .telling import Warn

CANCEL_WITHIN = 0.5
"""Seconds that one cancel may take; the watching thread waits for it."""

NOTHING_DUE = 3600.0
SOON = 0.01

MOST_UNTOLD = 1000
"""Warnings kept while a log handler hangs: the latest ones."""

UNTOLD_AFTER = 1.0
"""Seconds until the remaining warnings are tried again."""


class _LogThread:
    """Logs warnings; in threaded mode in a separate thread, which a log handler may block."""

    def __init__(self, threaded: bool) -> None:
        self._threaded = threaded
        self._thread: threading.Thread | None = None
        self._untold: deque[Warn] = deque(maxlen=MOST_UNTOLD)

    def tell(self, warnings: Iterable[Warn]) -> bool:
        """Log these warnings too; return whether some may be left, so that it must be called again.

        An exception of a log handler ends this call; the next one goes on with the rest.
        """
        self._untold.extend(warnings)
        if self._untold and not self._threaded:
            self._run()
        elif self._untold and not (self._thread and self._thread.is_alive()):
            self._thread = threading.Thread(target=self._run, name="pgdbpool-log", daemon=True)
            self._thread.start()
        return bool(self._untold)

    def _run(self) -> None:
        while self._untold:
            self._untold.popleft()()


class HoldWatcher:
    """Checks the blocks of groups that have a limit, whenever the oldest block may have reached it."""

    def __init__(
        self, groups: Iterable[Group], clock: Callable[[], float] = monotonic, *, threaded: bool = False
    ) -> None:
        self._clock = clock
        self._log = _LogThread(threaded)
        self.watch(groups)
        self._told: set[tuple[int, float]] = set()
        """The holds already reported: id and start of the block. The id may be reused, the start is not."""

    def watch(self, groups: Iterable[Group]) -> None:
        """Watch the groups that have a limit from now on."""
        self._groups = [g for g in groups if g.config.leak_after or g.config.max_hold]

    @property
    def needed(self) -> bool:
        """Whether any group has a limit."""
        return bool(self._groups)

    def step(self) -> float:
        """Check all blocks; return the seconds until the next check is due.

        It cancels at most one statement, and may wait for its server, for `CANCEL_WITHIN`.
        """
        if not self._groups:
            return NOTHING_DUE
        self._now = now = self._clock()
        self._due = now + NOTHING_DUE
        self._seen: set[tuple[int, float]] = set()
        self._cancelled = False
        warnings: list[Warn] = []
        for group in self._groups:
            leak_after, max_hold = group.config.leak_after, group.config.max_hold
            # No block that begins from now on is due before that.
            self._due = min(self._due, now + min(leak_after or NOTHING_DUE, max_hold or NOTHING_DUE))
            for conn, block in group.held():
                warnings += filter(None, (self._leak(group, conn, block), self._overdue(group, conn, block)))
        self._told = self._seen
        if self._log.tell(warnings):
            self._due = min(self._due, now + UNTOLD_AFTER)
        return max(SOON, self._due - now)

    def _leak(self, group: Group, conn: PooledConnection, block: Block) -> Warn | None:
        """Return the warning of a block that has just reached `leak_after`."""
        limit, since = group.config.leak_after, block.since
        if not limit:
            return None
        if self._now - since < limit:
            self._due = min(self._due, since + limit)
            return None
        key = (id(block), since)
        self._seen.add(key)
        if key in self._told:
            return None
        self._told.add(key)
        return group.note_leak(conn, block, self._now - since)

    def _overdue(self, group: Group, conn: PooledConnection, block: Block) -> Warn | None:
        """Take the connection from a block that has reached `max_hold`; return the warning of it."""
        limit, since = group.config.max_hold, block.since
        if not limit:
            return None
        if self._now - since < limit:
            self._due = min(self._due, since + limit)
            return None
        if self._cancelled or conn.ending:  # one cancel a step, since each may wait for its server
            self._due = min(self._due, self._now + SOON)
            return None
        warning = group.take_away(conn, block, self._clock() + CANCEL_WITHIN)
        self._cancelled = warning is not None
        return warning

    def close(self) -> None:
        """Stop watching."""
        self._groups.clear()

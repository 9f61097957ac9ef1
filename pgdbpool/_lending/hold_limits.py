"""Looks at how long blocks hold their connections: `leak_after` and `max_hold`."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .group import Group, Warn

CANCEL_WITHIN = 0.5
"""Seconds that the cancelling of one statement may keep whoever looks."""

NOTHING_DUE = 3600.0
SOON = 0.01

MOST_UNTOLD = 1000
"""Warnings that are kept while a handler of the log hangs: the latest ones."""

UNTOLD_AFTER = 1.0
"""Seconds after which those that are left are looked for again."""


class _Teller:
    """Logs warnings, in threaded mode in a thread of its own: while a handler hangs, nobody waits for it."""

    def __init__(self, threaded: bool) -> None:
        self._threaded = threaded
        self._thread: threading.Thread | None = None
        self._untold: deque[Warn] = deque(maxlen=MOST_UNTOLD)

    def tell(self, warnings: Iterable[Warn]) -> bool:
        """Log these too; return whether to come back for what may be left.

        What a handler raises ends the telling, and the rest is told when this is called again.
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


class Holds:
    """Looks at the blocks of the groups that have a limit, whenever the oldest may have reached it."""

    def __init__(
        self, groups: Iterable[Group], clock: Callable[[], float] = monotonic, *, threaded: bool = False
    ) -> None:
        self._clock = clock
        self._teller = _Teller(threaded)
        self.watch(groups)
        self._told: set[tuple[int, float]] = set()
        """The holds that were told of: which block, since when. Its number may come again, its time not."""

    def watch(self, groups: Iterable[Group]) -> None:
        """Look at these groups from now on, as far as they have a limit."""
        self._groups = [g for g in groups if g.config.leak_after or g.config.max_hold]

    @property
    def needed(self) -> bool:
        """Whether there is anything to look at."""
        return bool(self._groups)

    def step(self) -> float:
        """Do what is due now; return the seconds until there may be more to do.

        It may wait for a server, for `CANCEL_WITHIN`, and cancels one statement at a time.
        """
        if not self._groups:
            return NOTHING_DUE
        now = self._clock()
        soonest = now + NOTHING_DUE
        seen: set[tuple[int, float]] = set()
        cancelled: Warn | None = None
        warnings: list[Warn] = []
        for group in self._groups:
            leak_after, max_hold = group.config.leak_after, group.config.max_hold
            # No block that begins from now on is due before that.
            soonest = min(soonest, now + min(leak_after or NOTHING_DUE, max_hold or NOTHING_DUE))
            for conn, block in group.held():
                since = block.since
                key = (id(block), since)
                if leak_after and now - since < leak_after:
                    soonest = min(soonest, since + leak_after)
                elif leak_after:
                    seen.add(key)
                    if key not in self._told:
                        self._told.add(key)
                        warnings.append(group.note_leak(conn, block, now - since))
                if max_hold and now - since < max_hold:
                    soonest = min(soonest, since + max_hold)
                elif max_hold and (cancelled or conn.ending):
                    soonest = min(soonest, now + SOON)
                elif max_hold:
                    cancelled = group.take_away(conn, block, self._clock() + CANCEL_WITHIN)
                    warnings += [cancelled] if cancelled else []
        self._told = seen
        if self._teller.tell(warnings):
            soonest = min(soonest, now + UNTOLD_AFTER)
        return max(SOON, soonest - now)

    def close(self) -> None:
        """Stop looking."""
        self._groups.clear()

"""The slots of a pool.

A `Slot` is the right to one connection, and it is taken for as long as the object lives: the
connection holds it, or the caller that is opening one. So no counter can be left wrong by an exception at
the wrong moment (KeyboardInterrupt, gevent.Timeout): a lost slot frees itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from .._session.slot import Slot


class Slots:
    """The slots of a pool; one is taken for as long as its object lives."""

    def __init__(self, limit: int, freed: Callable[[], None]) -> None:
        self.limit = limit
        self._freed = freed
        self._taken: set[weakref.ref[Slot]] = set()

    def live(self) -> list[Slot]:
        return [slot for ref in list(self._taken) if (slot := ref()) is not None]

    def free(self, slot: Slot) -> None:
        self._gone(weakref.ref(slot))  # equal to the one in the set

    def new(self) -> Slot | None:
        # In this order: the list keeps slots alive, and one that dies with it must be seen as free.
        if len(self.live()) >= self.limit and len(self._taken) >= self.limit:
            return None
        slot = Slot()
        self._taken.add(weakref.ref(slot, self._gone))
        return slot

    def _gone(self, ref: weakref.ref[Slot]) -> None:
        self._taken.discard(ref)
        self._freed()

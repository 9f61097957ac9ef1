"""How a group holds new blocks back: `pause` and `resume`."""

from __future__ import annotations

import time
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from ..errors import PoolTimeout, TooManyWaiting
from .configured import Pause
from .opening import OpeningGroup

HELD_EVERY = 0.02
"""Seconds between two checks of a held block: a lock could stay locked after an interruption by a signal."""


class PausingGroup(OpeningGroup):
    """A group whose new blocks can be made to wait.

    While it is paused, `_probe` returns True. So the checkout of an unpaused group needs no extra test.
    """

    __slots__ = ()

    if TYPE_CHECKING:

        def _first_use(self) -> bool: ...

    used: bool
    """Whether this process has used the group."""
    nested: Callable[[], bool]
    """Returns whether the calling thread has a connection, of any group."""

    def pause(self, by: str, until: float) -> None:
        """Hold new blocks back, each within its own `timeout`, until `resume` or the given time.

        A block inside another one goes on: the outer one could not end otherwise.
        """
        self._pause = Pause(by, until)
        self._set_probe()

    def resume(self) -> None:
        """Let the blocks go on."""
        self.doubt_roles()  # a pause is for a switchover
        self._pause = None
        self._set_probe()

    def _set_probe(self) -> None:
        """Have the next checkout look at the pause, if there is one."""
        self._probe = self._usual_probe()
        if self._pause is not None:  # last: another thread may just have set it
            self._probe = self._paused

    def _usual_probe(self) -> Callable[[], object] | None:
        return self._later_probe if self.used else self._first_use

    def _paused(self) -> bool:
        if (usual := self._usual_probe()) is not None:
            usual()
        return True

    def _hold(self, began: float, deadline: float) -> float:
        """Wait while the group is paused; return the time.

        :raises PoolTimeout: the time of the block is up.
        :raises TooManyWaiting: `max_waiting` blocks wait already.
        """
        if self._pause is None or self.nested():
            return monotonic()
        if 0 < self.config.max_waiting <= len(self.held_back):
            raise self._exhausted(TooManyWaiting, 0.0, True)
        place = object()
        self.held_back.append(place)
        try:
            while (pause := self._pause) is not None and (now := monotonic()) < pause.until:
                if now >= deadline:
                    raise self._exhausted(PoolTimeout, deadline - began, True)
                time.sleep(min(HELD_EVERY, deadline - now))
                if self._later_probe is not None:
                    self._later_probe()  # no thread would see that the pause is over
            if pause is not None and self._pause is pause:
                self.resume()
        finally:
            self.held_back.remove(place)
        return monotonic()

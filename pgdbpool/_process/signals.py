"""Signals in a plain process: open blocks end, then the pools close, then the earlier handler is called."""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..errors import ThreadingModelError

if TYPE_CHECKING:
    from .pools import Pools


SEND_EVERY = 0.1
"""Seconds until the signal is sent again if the main thread has not taken it."""


class SignalHandlers:
    """Ends the pools at the first of the signals, and then lets the signal have its earlier effect.

    A signal handler runs between any two instructions of the main thread, which may be in a block and hold
    any lock. So it must not wait. A separate thread waits, and sends the signal again at the end.
    """

    def __init__(
        self, refuse: Callable[[str], list[Pools]], terminate: Callable[[str], None], timeout: float
    ) -> None:
        self._refuse, self._terminate = refuse, terminate
        self._timeout = timeout
        self._earlier: dict[int, Any] = {}
        self._pools: list[Pools] = []
        self._by = "a signal"
        self.forked()

    def forked(self) -> None:
        """Reset in a forked child: the parent's thread does not exist there."""
        self._begun = self._hurry = self._done = self._over = self._handing_over = False
        self._main = _thread.get_ident()
        self._sending = threading.RLock()
        """Held while the signal is sent; a handler may interrupt the sender in its own thread."""

    def install(self, signals: Iterable[int]) -> None:
        """Take the signals over.

        :raises ThreadingModelError: this is not the main thread, or a handler outside Python has one of them.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ThreadingModelError(
                "install_signal_handlers works in the main thread only, as signal.signal does: call it there"
            )
        numbers = [signal.Signals(number) for number in signals]
        for number in numbers:
            if signal.getsignal(number) is None:
                raise ThreadingModelError(
                    f"{number.name} is handled by the program that runs Python in it: "
                    "call Connection.close() from what it offers for its end"
                )
        for number in numbers:
            self._earlier[number] = signal.signal(number, self._on_signal)

    def uninstall(self) -> None:
        """Restore the earlier handlers unless ours were replaced; in the main thread."""
        for number, earlier in self._earlier.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, earlier)

    def wait(self) -> None:
        """Before the main thread is refused a block, let the earlier handler speak: it may end the program.

        Otherwise a program that asks for its next block at this moment would end with the refusal.
        """
        me = _thread.get_ident()
        if not self._begun or me != self._main or self._has_block(me):
            return
        deadline = monotonic() + self._timeout + 2.0
        while not self._over and monotonic() < deadline:
            time.sleep(0.005)

    def _has_block(self, thread: int) -> bool:
        return any(group.held_by(thread) for pools in self._pools for group in pools.all_groups)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._handing_over:
            return  # sent again, a moment ago
        if self._done:
            self._hand_over(number, frame)
        elif self._begun:
            self._hurry = True  # asked twice
        else:
            self._begun, self._main = True, _thread.get_ident()
            self._by = f"the signal {signal.Signals(number).name}"
            self._pools = self._refuse(self._by)  # does not wait
            # Not threading.Thread, whose start() waits: under gevent this may be its hub.
            _thread.start_new_thread(self._finish, (number,))

    def _finish(self, number: int) -> None:
        try:
            deadline = monotonic() + self._timeout
            for pools in self._pools:
                pools.drain(deadline - monotonic(), hurry=lambda: self._hurry)
            for pools in self._pools:
                pools.terminate(self._by, self._main)  # all but the main thread's connections
        finally:
            self._done = True
            # A signal that comes just before the main thread sleeps does not end the sleep.
            while self._send(number):
                time.sleep(SEND_EVERY)

    def _send(self, number: int) -> bool:
        """Send the signal again; return False if the main thread has taken it."""
        with self._sending:
            if not self._over:
                os.kill(os.getpid(), number)
            return not self._over

    def _hand_over(self, number: int, frame: Any) -> None:
        with self._sending:
            self._over = self._handing_over = True
        self.uninstall()
        self._handing_over = False
        earlier = self._earlier[number]
        if callable(earlier):
            earlier(number, frame)
        elif earlier == signal.SIG_DFL:
            self._terminate(self._by)  # the main thread's own block, which dies here
            os.kill(os.getpid(), number)

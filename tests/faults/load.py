"""Load for the tests of faults: clients that run blocks until they are stopped, and note how it went."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType

import pgdbpool
from pgdbpool import Connection, Handler


@dataclass(frozen=True)
class Call:
    """One block: when it began and ended on the monotonic clock, on which server, or its error."""

    began: float
    ended: float
    endpoint: str = ""
    error: BaseException | None = None

    @property
    def took(self) -> float:
        return self.ended - self.began


def call(statement: str = "SELECT 1") -> Call:
    """Run a block of one statement."""
    began, endpoint = time.monotonic(), ""
    try:
        with Handler("g") as db:
            endpoint = db.endpoint
            db.query(statement).fetchall()
    except pgdbpool.Error as error:
        # The traceback's frames would keep the connection that failed.
        return Call(began, time.monotonic(), endpoint, error.with_traceback(None))
    return Call(began, time.monotonic(), endpoint)


class Load:
    """Clients that call again and again, each in a thread: one only where the pools are lock-free."""

    def __init__(self, clients: int, pause: float = 0.002) -> None:
        if Connection.get_threading_model() == "non-threaded":
            clients = 1
        self.calls: list[Call] = []
        self.pause = pause
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, name=f"client-{i}") for i in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in self._threads), "a client is left waiting"

    def _run(self) -> None:
        while not self._stop.wait(self.pause):
            self.calls.append(call())

    @property
    def errors(self) -> list[BaseException]:
        return [each.error for each in self.calls if each.error is not None]

    def good_since(self, moment: float) -> list[Call]:
        """Return the calls without an error that ended after the moment, the first of them first."""
        return sorted((c for c in self.calls if c.error is None and c.ended > moment), key=lambda c: c.ended)

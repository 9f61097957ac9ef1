"""Connections of groups with `slow_query`: they time their statements; other groups pay nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any

from .commands import ACTIVE, IDLE, NOTHING, Command
from .connection import PooledConnection
from .state import own_names

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult


class TimedConnection(PooledConnection):
    """A connection that tells its group of each statement, COMMIT and ROLLBACK that takes long."""

    slow_after: float = float("inf")
    """Seconds."""
    on_slow: Callable[[PooledConnection, Any, float], None]
    """Called with the connection, the statement and its duration in seconds."""

    def report_slow(self, after: float, to: Callable[[PooledConnection, Any, float], None]) -> None:
        """Tell of statements that take that long (seconds)."""
        self.slow_after, self.on_slow = after, to

    def receive(self, began_in: int = ACTIVE) -> list[PGresult]:
        """Wait, as any connection, for the answer to a statement that was sent alone."""
        with self._timed(getattr(self.block, "statement", None)):
            return super().receive(began_in)

    def exchange(
        self,
        commands: Sequence[Command],
        send: Callable[[], None] | None = None,
        after: Sequence[Command] = NOTHING,
        many: int = 1,
    ) -> list[list[PGresult]]:
        """Send and wait; a statement is timed with the preamble that it rides with."""
        if send is None:
            return super().exchange(commands, send, after, many)
        with self._timed(getattr(self.block, "statement", None)):
            return super().exchange(commands, send, after, many)

    def commit(self) -> None:
        """Commit the open transaction, if any."""
        if self.pgconn.transaction_status == IDLE:
            super().commit()
            return
        with self._timed("COMMIT"):
            super().commit()

    def rollback(self) -> None:
        """Roll the open transaction back, if any."""
        if self.pgconn.transaction_status == IDLE:
            super().rollback()
            return
        with self._timed("ROLLBACK"):
            super().rollback()

    @contextmanager
    def _timed(self, statement: Any) -> Iterator[None]:
        began = monotonic()
        try:
            yield
        finally:
            if (seconds := monotonic() - began) >= self.slow_after:
                self.on_slow(self, statement, seconds)


own_names.update(TimedConnection.__annotations__)

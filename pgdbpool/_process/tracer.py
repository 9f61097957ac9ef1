"""The points at which a tracer, such as OpenTelemetry's, follows connections and statements.

The functions at these points are wrapped while a tracer is in use. Applications without one would pay for a
test in each block and statement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from .._lending import opening
from .._lending.group import Group
from .._session.commands import IDLE
from .._session.cursors import BlockCursor
from .._session.server_cursor import BlockServerCursor
from .._session.transactions import TransactingConnection

if TYPE_CHECKING:
    from .._session.block import Block
    from .._session.connection import PooledConnection


class PoolTracer(Protocol):
    """Follows the pools of this process. Exceptions from its methods reach the block."""

    def checkout(self, group: str, take: Callable[[], PooledConnection]) -> PooledConnection:
        """Call `take`, which lends a connection to a block, and return the connection."""

    def checkin(self, group: str, seconds: float) -> None:
        """Note that a block has given its connection back after that time."""

    def connect(self, group: str, seconds: float) -> None:
        """Note that a connection was opened within that time."""

    def statement(self, conn: PooledConnection, query: Any, sets: int) -> AbstractContextManager[None]:
        """Return the context in which a statement runs: a COMMIT too, or a batch of `sets` parameter sets."""


_originals: list[tuple[Any, str, Any]] = []
"""Owner, name and function of each point that is wrapped."""


def use(tracer: PoolTracer | None) -> None:
    """Follow the pools with this tracer from now on, in place of an earlier one; None for no tracer."""
    while _originals:
        setattr(*_originals.pop())
    if tracer is not None:
        _follow_connections(tracer)
        _follow_statements(tracer)


def _wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    function = owner.__dict__[name]
    _originals.append((owner, name, function))
    setattr(owner, name, make(function))


def _follow_connections(tracer: PoolTracer) -> None:
    def checkout(function: Any) -> Any:
        def followed(group: Group, block: Block, timeout: float | None = None) -> PooledConnection:
            return tracer.checkout(group.name, lambda: function(group, block, timeout))

        return followed

    def checkin(function: Any) -> Any:
        def followed(group: Group, conn: PooledConnection, *reason: str) -> None:
            since = None if conn.block is None else conn.block.since
            function(group, conn, *reason)
            if since is not None:
                tracer.checkin(group.name, monotonic() - since)

        return followed

    def dial(function: Any) -> Any:
        def followed(endpoint: Any, group: Any, *arguments: Any) -> PooledConnection:
            began = monotonic()
            conn: PooledConnection = function(endpoint, group, *arguments)
            tracer.connect(group.name, monotonic() - began)
            return conn

        return followed

    _wrap(Group, "checkout", checkout)
    _wrap(Group, "checkin", checkin)
    _wrap(Group, "discard", checkin)
    _wrap(opening, "dial", dial)


def _follow_statements(tracer: PoolTracer) -> None:
    def execute(function: Any) -> Any:
        def followed(cursor: Any, query: Any, *arguments: Any, **options: Any) -> Any:
            with tracer.statement(cursor._conn, query, 1):
                return function(cursor, query, *arguments, **options)

        return followed

    def executemany(function: Any) -> Any:
        def followed(cursor: Any, query: Any, params_seq: Iterable[Any], **options: Any) -> Any:
            sets = params_seq if isinstance(params_seq, Sequence) else list(params_seq)
            with tracer.statement(cursor._conn, query, len(sets)):
                return function(cursor, query, sets, **options)

        return followed

    def commit(function: Any) -> Any:
        def followed(conn: PooledConnection) -> None:
            if conn.pgconn.transaction_status == IDLE:
                function(conn)
                return
            with tracer.statement(conn, "COMMIT", 1):
                function(conn)

        return followed

    _wrap(BlockCursor, "execute", execute)
    _wrap(BlockCursor, "executemany", executemany)
    _wrap(BlockServerCursor, "execute", execute)
    _wrap(TransactingConnection, "commit", commit)

"""The named cursors of a block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg

from .. import errors
from .commands import IDLE
from .connection import PooledConnection
from .foreign_cursors import NAMED
from .pooler_safety import CURSOR, refusal
from .state import OUTSIDE
from .statement_shape import shape

if TYPE_CHECKING:
    from psycopg._queries import PostgresQuery

from .riding import MOST_PARAMETERS, Declared, gone, refuse_parameters, wrong_parameters


class BlockServerCursor(Declared, psycopg.ServerCursor[Any]):
    """A named cursor of the block; its DECLARE comes after the preamble."""

    __slots__ = ("block",)
    _conn: PooledConnection

    def _convert_query(self, query: Any, params: Any = None) -> PostgresQuery:
        """Convert a statement as psycopg does; before anything is sent, refuse one that cannot be."""
        try:
            converted = super()._convert_query(query, params)
        except TypeError as error:
            raise wrong_parameters(params) or error  # noqa: B904  it is the same object, or its context
        if (values := converted.params) and len(values) > MOST_PARAMETERS:
            refuse_parameters(converted, len(values))
        return converted

    def __init__(self, connection: PooledConnection, name: str, **kwargs: Any) -> None:
        if connection.block is None:
            raise errors.BlockClosedError(OUTSIDE)
        super().__init__(connection, name, **kwargs)
        self.block = connection.block

    @property
    def closed(self) -> bool:
        """True once the cursor was closed or its block has ended."""
        block = getattr(self, "block", None)  # psycopg also asks about a cursor that could not be made
        return block is None or self._closed or not block.open

    def execute(self, query: Any, params: Any = None, **kwargs: Any) -> BlockServerCursor:
        """Declare the cursor for the query, after the preamble of the block."""
        conn, block = self._conn, self.block
        conn.check_free()
        with conn.alone():
            if conn.block is not block:
                raise gone(block)
            conn.end_wrapped()
            autocommit = not block.manual and conn.pgconn.transaction_status == IDLE
            if block.settings and autocommit and not self.withhold:
                raise errors.as_query_error(psycopg.NotSupportedError(NAMED))
            block.statement = query
            what = shape(query, conn)
            if what.special:
                what = conn.touch(what, query)
            if self.withhold and conn.local:
                wrong = refusal("a cursor WITH HOLD", CURSOR)
                raise errors.as_query_error(psycopg.NotSupportedError(wrong))
            if self.withhold:
                conn.mark(session=True)  # it outlives its transaction, and may outlive the block
            with conn.ready():
                super().execute(query, params, **kwargs)
        return self

    # psycopg's methods, which would wait for the server.

    def fetchone(self) -> Any:
        """Return the next row, or None."""
        self._check_block()
        return super().fetchone()

    def fetchmany(self, size: int = 0) -> list[Any]:
        """Return the next rows, `arraysize` of them by default."""
        self._check_block()
        return super().fetchmany(size)

    def fetchall(self) -> list[Any]:
        """Return all the rows that are left."""
        self._check_block()
        return super().fetchall()

    def __next__(self) -> Any:
        self._check_block()
        return super().__next__()

    def scroll(self, value: int, mode: str = "relative") -> None:
        """Move the cursor."""
        self._check_block()
        super().scroll(value, mode)

    def _check_block(self) -> None:
        if self._conn.block is not self.block:
            raise gone(self.block)

    def close(self) -> None:
        """Close the cursor at the server too, while its block has the connection."""
        if self._conn.block is self.block:
            super().close()
        else:
            self._close()

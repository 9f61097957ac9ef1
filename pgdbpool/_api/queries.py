"""The queries of a block under asyncpg's names: rows, one row, one value, the command tag."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import psycopg

from .._session.cursors import BlockCursor, has_rows, plain_row
from .._session.resending import Answer, resends, send_again
from ..errors import DBQueryError
from .copy import Copying

if TYPE_CHECKING:
    from psycopg.abc import Params, QueryNoTemplate
    from psycopg.abc import Query as Statement
    from psycopg.rows import RowFactory
    from typing_extensions import TypeVar

    from .._lending.group import Group
    from .._session.block import Block
    from .._session.connection import PooledConnection
    from .._session.rows import Row

    T = TypeVar("T", default=Any)  # the type that the group's row factory makes, if none is given

_item = tuple.__getitem__
_NO_ROWS = (
    "execute() returns the command tag, {!r}, and no rows: write db.query(...) for a cursor, or "
    "db.fetch(...), fetchrow(...) or fetchval(...)"
)


class Queries(Copying):
    """The query methods of a `Handler`, each built on `query` or on a cursor of the block."""

    __slots__ = ()

    if TYPE_CHECKING:

        def query(self, statement: Statement, params: Params | None = None) -> psycopg.Cursor[Any]: ...

        def _undo(self) -> None: ...

        def _live(self) -> PooledConnection: ...

        _group: Group
        _block: Block | None

    def fetch(
        self, statement: Statement, params: Params | None = None, *, row_factory: RowFactory[T] | None = None
    ) -> list[T]:
        """Execute a statement and return its rows, or an empty list if it has none.

        Here and in the methods below, several statements in one string give the result of the last one. Each
        method raises the errors of `query`.

        :param row_factory: makes the rows, such as psycopg's `class_row(Account)`; left out, the group's
            `row_factory`: `Row` by default.
        """
        return all_rows(self.query(statement, params), row_factory)

    def fetchrow(
        self, statement: Statement, params: Params | None = None, *, row_factory: RowFactory[T] | None = None
    ) -> T | None:
        """Execute a statement and return its first row, or None."""
        row: T | None = first_row(self.query(statement, params), row_factory)
        return row

    def fetchval(self, statement: Statement, params: Params | None = None, column: int | str = 0) -> Any:
        """Execute a statement and return a value of its first row, or None without a row.

        :param column: the index or the name of the column, whatever the group's `row_factory`.
        :raises LookupError: no such column; the statement has been executed.
        """
        return first_value(self.query(statement, params), column)

    def fetchmany(
        self,
        statement: QueryNoTemplate,
        params_seq: Iterable[Params],
        *,
        row_factory: RowFactory[T] | None = None,
    ) -> list[T]:
        """Execute a statement once for each set of parameters; return all of their rows in one list.

        It is one transaction, and all sets travel in one pipeline.
        """
        return rows_of_all(self._many(statement, params_seq, returning=True), row_factory)

    def executemany(self, statement: QueryNoTemplate, params_seq: Iterable[Params]) -> int:
        """Execute a statement once for each set of parameters; return the total number of rows.

        It is one transaction, and all sets travel in one pipeline.
        """
        return self._many(statement, params_seq, returning=False).rowcount

    def _many(
        self, statement: QueryNoTemplate, params_seq: Iterable[Params], *, returning: bool
    ) -> BlockCursor:
        sets = params_seq if isinstance(params_seq, Sequence) else list(params_seq)

        def attempt(conn: PooledConnection) -> BlockCursor:
            cursor = BlockCursor(conn)
            cursor.executemany(statement, sets, returning=returning)
            return cursor

        try:
            return attempt(self._live())
        except DBQueryError as error:
            if not resends(self._group, self._block, error):
                raise
        return self._again(attempt)

    def _again(self, attempt: Callable[[PooledConnection], Answer]) -> Answer:
        """Repeat an attempt that cannot have had an effect, in another transaction."""
        return send_again(self._group, self._block, self._begun_anew, attempt)

    def _begun_anew(self) -> PooledConnection:
        self._undo()
        return self._live()

    def execute(self, statement: Statement, params: Params | None = None) -> CommandTag:
        """Execute a statement and return its command tag, such as `INSERT 0 1`, as asyncpg does.

        It is a string. A loop over it raises `TypeError`, since it must be meant for the rows of `query`.
        """
        return command_tag(self.query(statement, params))

    @contextmanager
    def copy(self, statement: Statement, params: Params | None = None) -> Iterator[psycopg.Copy]:
        """Start a COPY, after the block's due commands; use the `psycopg.Copy` inside its `with`.

        See https://www.psycopg.org/psycopg3/docs/basic/copy.html

        :raises DBQueryError: PostgreSQL refused; an exception inside the `with` cancels the COPY.
        """
        conn = self._live()
        conn.mark(attributes=True, kept=True)  # the Copy has the connection as an attribute
        with BlockCursor(conn).copy(statement, params) as copy:
            yield copy

    @overload
    def cursor(
        self, name: None = None, *, row_factory: RowFactory[T] | None = None, binary: bool = False
    ) -> psycopg.Cursor[T]: ...

    @overload
    def cursor(
        self,
        name: str,
        *,
        row_factory: RowFactory[T] | None = None,
        binary: bool = False,
        scrollable: bool | None = None,
        withhold: bool = False,
    ) -> psycopg.ServerCursor[T]: ...

    def cursor(
        self,
        name: str | None = None,
        *,
        row_factory: RowFactory[T] | None = None,
        binary: bool = False,
        scrollable: bool | None = None,
        withhold: Literal[False] | bool = False,
    ) -> psycopg.Cursor[T] | psycopg.ServerCursor[T]:
        """Return a cursor of the block; with a name, one that stays at the server: for large results.

        Iterating over a named cursor fetches `itersize` rows at a time (100). It lives in a transaction: in
        an autocommit group, open one with `transaction()`.

        See https://www.psycopg.org/psycopg3/docs/advanced/cursors.html#server-side-cursors
        """
        options: Any = {"row_factory": row_factory, "binary": binary}
        if name is not None:
            options.update(scrollable=scrollable, withhold=withhold)
        return self._live().cursor(name or "", **options)

    def pipeline(self) -> AbstractContextManager[psycopg.Pipeline]:
        """Start a pipeline: its statements are sent without waiting for each one's result.

        See https://www.psycopg.org/psycopg3/docs/advanced/pipeline.html
        """
        return self._live().pipeline()


def all_rows(cursor: psycopg.Cursor[Any], row_factory: RowFactory[T] | None) -> list[T]:
    """Return the rows of the last statement's result."""
    if not has_rows(cursor):
        return []
    if row_factory is not None:
        cursor.row_factory = row_factory
    return cursor.fetchall()


def rows_of_all(cursor: psycopg.Cursor[Any], row_factory: RowFactory[T] | None) -> list[T]:
    """Return the rows of all sets of parameters after `executemany`."""
    if row_factory is not None:
        cursor.row_factory = row_factory
    return [row for result in cursor.results() if has_rows(result) for row in result]


def first_row(cursor: psycopg.Cursor[Any], row_factory: RowFactory[T] | None) -> Any:
    """Return the first row of the last statement's result, or None."""
    if not has_rows(cursor):
        return None
    if row_factory is not None:
        cursor.row_factory = row_factory
    return cursor.fetchone()


def first_value(cursor: psycopg.Cursor[Any], column: int | str) -> Any:
    """Return a value of the first row of the last statement's result, or None."""
    return value_in(plain_row(cursor), column)


def value_in(row: Row | None, column: int | str) -> Any:
    """Return a value of a row, or None without a row."""
    if row is None:
        return None
    try:
        return _item(row, column) if type(column) is int else row[column]
    except IndexError:
        names = ", ".join(row.keys())
        raise IndexError(f"no column {column!r}; the columns from 0 on are {names}") from None


def command_tag(cursor: psycopg.Cursor[Any]) -> CommandTag:
    """Return the command tag of the last statement; the empty string if there was none."""
    has_rows(cursor)
    return CommandTag(cursor.statusmessage or "")


class CommandTag(str):
    """A command tag: a string that cannot be mistaken for the rows of its statement."""

    __slots__ = ()

    def __iter__(self) -> NoReturn:
        raise TypeError(_NO_ROWS.format(str(self)))

    if not TYPE_CHECKING:  # the attributes of a string are known

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(_NO_ROWS.format(str(self)), name=name, obj=self)

"""COPY between a table or a query and Python: records, files, paths, iterables, callables."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import IO, TYPE_CHECKING, Any, Literal, TypedDict

from psycopg import ClientCursor, Copy, sql
from psycopg._compat import Template

from .._session.riding import checked_parameters
from .._session.statement_text import Filled

if TYPE_CHECKING:
    from psycopg.abc import Params
    from psycopg.abc import Query as Statement
    from typing_extensions import Unpack

    from .._session.connection import PooledConnection

Source = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[Any] | Iterable[str | bytes]
Output = str | os.PathLike[str] | IO[Any] | Callable[[bytes], object]

_CHUNK = 1 << 18
"""Bytes, or characters, that are read from a file at a time."""


class CopyOptions(TypedDict, total=False):
    """Options of COPY in both directions, under PostgreSQL's names; None is PostgreSQL's default.

    See https://www.postgresql.org/docs/current/sql-copy.html
    """

    format: Literal["text", "csv", "binary"] | None
    delimiter: str | None
    null: str | None
    header: bool | Literal["match"] | None
    quote: str | None
    escape: str | None
    encoding: str | None


class CopyInOptions(CopyOptions, total=False):
    """Options of COPY into a table."""

    freeze: bool | None
    force_not_null: Sequence[str] | Literal[True] | None
    force_null: Sequence[str] | Literal[True] | None


class CopyOutOptions(CopyOptions, total=False):
    """Options of COPY out of a table or a query."""

    force_quote: Sequence[str] | bool | None


_CSV_ONLY = {"quote", "escape", "force_quote", "force_null", "force_not_null"}
_SWITCHES = {"header", "freeze", "force_quote"}
_NOT_BINARY = {"delimiter", "null", "header", *_CSV_ONLY}


class Copying:
    """The COPY methods of a `Handler`."""

    __slots__ = ()

    if TYPE_CHECKING:

        def copy(
            self, statement: Statement, params: Params | None = None
        ) -> AbstractContextManager[Copy]: ...

        def _live(self) -> PooledConnection: ...

    def copy_records_to_table(
        self,
        table: str,
        records: Iterable[Sequence[Any]],
        *,
        columns: Sequence[str] | None = None,
        schema: str | None = None,
        where: str | sql.Composable | None = None,
    ) -> str:
        """Copy records, a sequence of values each, into a table; return the command tag: `COPY 2`.

        Values are sent as text, so PostgreSQL reads each by its column's type.

        :param where: an SQL condition that a row must meet; it is part of the statement's text.
        :raises DBQueryError: PostgreSQL refused; none of the records was copied.
        :raises TypeError: a record is not a sequence of values.
        """
        with self.copy(_into(table, columns, schema, sql.SQL(""), where)) as copy:
            for number, record in enumerate(records, 1):
                if type(record) is not tuple and isinstance(record, (str, bytes, Mapping)):
                    kind = type(record).__name__
                    raise TypeError(f"record {number} is a {kind}: pass the values of its columns in order")
                copy.write_row(record)
        return _tag(copy)

    def copy_to_table(
        self,
        table: str,
        source: Source,
        *,
        columns: Sequence[str] | None = None,
        schema: str | None = None,
        where: str | sql.Composable | None = None,
        **options: Unpack[CopyInOptions],
    ) -> str:
        """Copy data in one of COPY's formats into a table; return the command tag: `COPY 2`.

        :param source: a path, a file, an iterable of `bytes` or `str`, or the data itself as `bytes`.
        :param where: an SQL condition that a row must meet; it is part of the statement's text.
        :param options: options of COPY, such as `format="csv", header=True`.
        :raises DBQueryError: PostgreSQL refused; none of the data was copied.
        :raises ValueError: an option or a name that COPY does not have.
        """
        encoded = options.get("encoding") is not None
        statement = _into(table, columns, schema, _options(CopyInOptions.__optional_keys__, options), where)
        with _reading(source) as chunks, self.copy(statement) as copy:
            for chunk in chunks:
                if not isinstance(chunk, (str, bytes, bytearray, memoryview)):
                    kind = type(chunk).__name__
                    raise TypeError(f"the source gave a {kind}: records go into copy_records_to_table")
                if encoded and isinstance(chunk, str):
                    raise TypeError("encoding= is how bytes are read, and the source gives str: leave it out")
                copy.write(chunk)
        return _tag(copy)

    def copy_from_table(
        self,
        table: str,
        output: Output,
        *,
        columns: Sequence[str] | None = None,
        schema: str | None = None,
        **options: Unpack[CopyOutOptions],
    ) -> str:
        """Copy a table's rows into a file, a path or a callable; return the command tag: `COPY 2`.

        :param output: a path, a file that is open for writing, or a function that is called with `bytes`.
        :param options: options of COPY, such as `format="csv", header=True`.
        :raises DBQueryError: PostgreSQL refused; an output path was not opened.
        :raises ValueError: an option or a name that COPY does not have.
        """
        return self._copy_out(_table(table, columns, schema), output, options)

    def copy_from_query(
        self,
        statement: Statement,
        params: Params | None = None,
        *,
        output: Output,
        **options: Unpack[CopyOutOptions],
    ) -> str:
        """Copy the rows of a query into a file, a path or a callable; return the command tag: `COPY 2`.

        COPY has no parameters at the server: psycopg quotes them into the text.

        :param output: as for `copy_from_table`.
        :raises DBQueryError: PostgreSQL refused; an output path was not opened.
        :raises ValueError: an option that COPY does not have.
        """
        if checked_parameters(params) or isinstance(statement, Template):
            query: sql.Composable = Filled(ClientCursor(self._live()).mogrify(statement, params), statement)
        elif isinstance(statement, sql.Composable):
            query = statement
        else:
            query = sql.SQL(statement.decode() if isinstance(statement, bytes) else statement)
        # A comment at its end must not take the parenthesis with it.
        return self._copy_out(sql.SQL("(") + query + sql.SQL("\n)"), output, options)

    def _copy_out(self, what: sql.Composable, output: Output, options: CopyOutOptions) -> str:
        how = _options(CopyOutOptions.__optional_keys__, options)
        as_text = isinstance(output, io.TextIOBase) or hasattr(output, "encoding")
        if as_text and (options.get("format") == "binary" or options.get("encoding") is not None):
            raise ValueError("that format or encoding is none of a text file: open the output in binary mode")
        with self.copy(sql.SQL("COPY ") + what + sql.SQL(" TO STDOUT") + how) as copy:
            with _writing(output, copy.connection.info.encoding if as_text else None) as write:
                for data in copy:
                    write(bytes(data))
        return _tag(copy)


def _tag(copy: Copy) -> str:
    return f"COPY {copy.cursor.rowcount}"


# The source and the output.


@contextmanager
def _reading(source: Source) -> Iterator[Iterable[Any]]:
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            yield _chunks(file)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        yield (source,)
    elif hasattr(source, "read"):
        yield _chunks(source)
    elif isinstance(source, Iterable):
        yield source
    else:
        raise TypeError(f"source={source!r}: it is a path, a file, bytes, or an iterable of bytes or str")


def _chunks(file: Any) -> Iterator[Any]:
    while data := file.read(_CHUNK):
        yield data
    if data is None:  # not its end: the rest would be missing
        raise BlockingIOError(f"{file!r} is non-blocking and has no data now: pass one that waits")


@contextmanager
def _writing(output: Output, encoding: str | None) -> Iterator[Callable[[bytes], object]]:
    if isinstance(output, (str, os.PathLike)):
        with open(output, "wb") as file:
            yield file.write
    elif hasattr(output, "write"):
        put = output.write
        yield put if encoding is None else lambda data: put(data.decode(encoding))
    elif callable(output):
        yield output
    else:
        raise TypeError(f"output={output!r}: it is a path, a file, or a function that takes bytes")


# The statement: every name is quoted, every value a literal.


def _into(
    table: str,
    columns: Sequence[str] | None,
    schema: str | None,
    options: sql.Composable,
    where: str | sql.Composable | None,
) -> sql.Composed:
    statement = sql.SQL("COPY ") + _table(table, columns, schema) + sql.SQL(" FROM STDIN") + options
    if where is None:
        return statement
    return statement + sql.SQL(" WHERE ") + (where if isinstance(where, sql.Composable) else sql.SQL(where))


def _table(table: str, columns: Sequence[str] | None, schema: str | None) -> sql.Composable:
    path = [_name("table", table)] if schema is None else [_name("schema", schema), _name("table", table)]
    name = sql.SQL(".").join(path)
    return name if columns is None else name + _names("columns", columns)


def _name(key: str, name: Any) -> sql.Identifier:
    # libpq would end the name at a NUL, and so take another table.
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{key}={name!r}: it is a name, not empty and without NUL")
    return sql.Identifier(name)


def _names(key: str, names: Any) -> sql.Composable:
    if isinstance(names, (str, bytes)) or not names:
        raise ValueError(f"{key}={names!r}: it is a list of names; leave it out for all columns")
    return sql.SQL(" ({})").format(sql.SQL(", ").join(_name(key, name) for name in names))


def _options(allowed: frozenset[str], given: Mapping[str, Any]) -> sql.Composable:
    if unknown := sorted(given.keys() - allowed):
        known = ", ".join(sorted(allowed))
        raise TypeError(f"COPY has no option {unknown[0]!r} in this direction; it has {known}")
    chosen = {
        key: value
        for key, value in given.items()
        if value is not None and not (value is False and key in _SWITCHES)
    }
    form = chosen.get("format", "text")
    parts = []
    for key, value in chosen.items():
        if key in _NOT_BINARY and (form == "binary" or (key in _CSV_ONLY and form != "csv")):
            raise ValueError(f"{key}={value!r} does not go with format={form!r}")
        parts.append(sql.SQL(key.upper() + " ") + _value(key, value, allowed))
    return sql.SQL(" WITH ({})").format(sql.SQL(", ").join(parts)) if parts else sql.SQL("")


def _value(key: str, value: Any, allowed: frozenset[str]) -> sql.Composable:
    if key.startswith("force_"):
        return sql.SQL("*") if value is True else _names(key, value)
    if key in _SWITCHES:
        if value is True:
            return sql.SQL("true")
        if key == "header" and value == "match" and "freeze" in allowed:
            return sql.SQL("match")
        raise ValueError(f"{key}={value!r}: it is True or False")
    if key == "format":
        valid, what = value in ("text", "csv", "binary"), "text, csv or binary"
    elif key in ("delimiter", "quote", "escape"):
        valid, what = isinstance(value, str) and len(value) == 1 and value.isascii(), "one ASCII character"
    else:
        valid, what = isinstance(value, str), "text"
    if not valid or any(character in value for character in "\0\r\n"):
        raise ValueError(f"{key}={value!r}: it is {what}, without NUL or line breaks")
    return sql.Literal(value)

"""The rows that a query gives: tuples that also answer to column names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from psycopg import Cursor
    from psycopg.rows import RowMaker


class Row(tuple[Any, ...]):
    """A row of a result: ``row[0]``, ``row["name"]``, ``dict(row)``, ``"name" in row``, unpacking.

    Of several columns with the same name the last one answers to it.
    """

    __slots__ = ()
    _names: ClassVar[tuple[str, ...]] = ()
    _index: ClassVar[dict[str, int]] = {}

    def __getitem__(self, key: Any) -> Any:
        if type(key) is str:
            try:
                key = self._index[key]
            except KeyError:
                raise KeyError(f"no column {key!r}; the columns are {', '.join(self._names)}") from None
        return tuple.__getitem__(self, key)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of the column, or the default where there is no such column."""
        index = self._index.get(name)
        return default if index is None else tuple.__getitem__(self, index)

    def keys(self) -> tuple[str, ...]:
        """Return the column names in order."""
        return self._names

    def values(self) -> tuple[Any, ...]:
        """Return the values in order, as a plain tuple."""
        return tuple(self)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Iterate over pairs of column name and value."""
        return zip(self._names, self, strict=True)

    def __repr__(self) -> str:
        return f"<Row {' '.join(f'{name}={value!r}' for name, value in self.items())}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _make, (self._names, tuple(self))


@lru_cache(maxsize=512)
def _named(names: tuple[bytes, ...], encoding: str) -> type[Row]:
    return _row_class(tuple(name.decode(encoding) for name in names))


@lru_cache(maxsize=512)
def _row_class(names: tuple[str, ...]) -> type[Row]:
    index = {name: position for position, name in enumerate(names)}
    return type("Row", (Row,), {"__slots__": (), "_names": names, "_index": index})


def _make(names: tuple[str, ...], values: Sequence[Any]) -> Row:
    return _row_class(names)(values)


def row(cursor: Cursor[Any]) -> RowMaker[Row]:
    """Make rows of the class `Row`: the default row factory.

    See https://www.psycopg.org/psycopg3/docs/advanced/rows.html for what a row factory is.
    """
    result = cursor.pgresult
    if result is None or not result.nfields:
        return Row
    # As psycopg's own factories read them; `description` would make an object for each column.
    names = [result.fname(column) or b"" for column in range(result.nfields)]
    return _named(tuple(names), cursor._encoding)

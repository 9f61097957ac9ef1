"""The rows that a query gives: tuples that also answer to column names."""

from __future__ import annotations

from collections import _tuplegetter  # type: ignore[attr-defined]  # namedtuple's descriptor of a field
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from psycopg import Cursor
    from psycopg.rows import RowMaker


_item = tuple.__getitem__


class Row(tuple[Any, ...]):
    """A row of a result: ``row[0]``, ``row["name"]``, ``row.name``, ``dict(row)``, unpacking.

    It equals a tuple with the same values; ``in`` looks for a column name. If several columns have the same
    name, the last one is returned. A column is also an attribute if its name is an identifier, does not
    begin with an underscore, and is not an attribute of tuples or of this class (``count``, ``index``,
    ``keys`` ...). To JSON it is a list, as any tuple is: pass ``dict(row)`` for an object.
    """

    __slots__ = ()
    _names: ClassVar[tuple[str, ...]] = ()
    _at: ClassVar[dict[Any, str]] = {}
    """The attribute that holds the value, by column name and by index."""

    def __getitem__(self, key: Any) -> Any:
        # getattr finds a descriptor written in C, which takes half the time of tuple.__getitem__ from here.
        try:
            return getattr(self, self._at[key])
        except (KeyError, TypeError):  # no such column, or a slice
            if isinstance(key, str):
                raise KeyError(f"no column {key!r}; the columns are {', '.join(self._names)}") from None
        return _item(self, key)

    if TYPE_CHECKING:  # the columns

        def __getattr__(self, name: str) -> Any: ...

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of the column, or the default if the column does not exist."""
        return getattr(self, self._at[name]) if name in self._names else default

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
def _named(names: tuple[bytes | None, ...], encoding: str) -> type[Row]:
    return _row_class(tuple((name or b"").decode(encoding) for name in names))


@lru_cache(maxsize=512)
def _row_class(names: tuple[str, ...]) -> type[Row]:
    values = [_tuplegetter(position, "") for position in range(len(names))]
    at: dict[Any, str] = {}
    for position, name in enumerate(names):
        at[name] = at[position] = at[position - len(names)] = f"_{position}"
    fields = {
        name: value
        for name, value in zip(names, values, strict=True)
        if name.isidentifier() and not name.startswith("_") and not hasattr(Row, name)
    }
    positions = {f"_{position}": value for position, value in enumerate(values)}
    # An AttributeError shows the name of the class; a `__getattr__` would slow every access down.
    own = {"__slots__": (), "_names": names, "_at": at, **fields, **positions}
    return type(f"Row({', '.join(names)})", (Row,), own)


def _make(names: tuple[str, ...], values: Sequence[Any]) -> Row:
    return _row_class(names)(values)


def row(cursor: Cursor[Any]) -> RowMaker[Row]:
    """Make rows of the class `Row`: the default row factory.

    See https://www.psycopg.org/psycopg3/docs/advanced/rows.html for row factories.
    """
    result = cursor.pgresult
    if result is None or not result.nfields:
        return Row
    # As psycopg's own factories read them; `description` would make an object for each column.
    return _named(tuple(map(result.fname, range(result.nfields))), cursor._encoding)

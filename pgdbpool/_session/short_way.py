"""The parts of statements that are kept between executions, so that psycopg need not find them again.

A statement is known once it was executed: its text in psycopg's form, its prepared name, the class of its
rows. `RidingCursor._ride_known` sends it with these. All else about a statement is the same either way: its
preamble, the wait for its answer, losses and errors. In any doubt, and so for all that psycopg refuses,
the statement is left to psycopg's own conversion, before anything is sent.

It uses psycopg's private `_query2pg`, `AdaptersMap._dumpers`, `_dumpers_by_oid`, `_loaders` and
`TypesRegistry._registry`, and the order of the parameters of `Transformer.set_pgresult` in C, for which its
minor version is pinned.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn
from weakref import proxy

import psycopg
from psycopg._queries import _query2pg
from psycopg.adapt import AdaptersMap, Dumper, PyFormat, Transformer

from .statement_shape import StatementTraits, code_of, shape

if TYPE_CHECKING:
    from psycopg.pq.abc import PGconn, PGresult

LONGEST = 4096
"""Characters of the longest text that is kept: a longer one holds its data, and hardly comes again."""
MOST_PLANS = 2048
MOST_KEPT = 512
_DRIVERS = ("psycopg", "psycopg_binary", "psycopg_c")


class Plan:
    """A statement's traits, and its text as psycopg sends it."""

    __slots__ = ("ascii", "bare", "formats", "names", "places", "query", "what")

    def __init__(self, text: str, what: StatementTraits) -> None:
        self.what = what
        self.ascii = text.isascii()
        """Whether it has the same bytes in every encoding of a session."""
        self.bare = text.encode(), ()
        """Its key among psycopg's prepared statements if it is executed without parameters."""
        self.query, self.formats, self.places = b"", list[PyFormat](), -1
        """psycopg's form of it for parameters, and the number of its placeholders, if they have no names."""
        self.names: list[str] | None = None
        """The names of the placeholders, if they have names."""
        with suppress(psycopg.Error):  # `%` in a text without parameters
            self.query, self.formats, self.names, parts = _query2pg(self.bare[0], "utf-8")
            self.places = len(parts) - 1 if self.names is None else -1

    def values(self, params: Any) -> Sequence[Any] | None:
        """Return the parameters in the order of their placeholders; None if they may not fit."""
        names, kind = self.names, type(params)
        if names is None:
            return params if (kind is tuple or kind is list) and len(params) == self.places else None
        if kind is not dict:
            return None
        try:
            return [params[name] for name in names]
        except KeyError:
            return None


plans: dict[str, Plan] = {}
"""The known statements, of all connections."""


def remember(text: Any, conn: psycopg.Connection[Any]) -> None:
    """Keep a statement that may come again, if its text is all there is to it."""
    if type(text) is not str or len(text) > LONGEST:
        return
    what = shape(text, conn)
    if what.special or what.uncommon or what.sets:
        return
    if code_of(text).lstrip()[:7].lower().startswith(("fetch", "execute")):
        return  # its columns are those of a cursor or statement, which may be another one next time
    try:
        plan = Plan(text, what)
    except UnicodeError:
        return
    if len(plans) >= MOST_PLANS:
        plans.clear()
    plans[text] = plan


class _OfSession(Dumper):
    """Refuses a value that psycopg writes by the state of the session, so that psycopg does it."""

    def __init__(self, cls: type, context: Any = None) -> None:
        raise psycopg.NotSupportedError("it depends on the session")

    def dump(self, obj: Any) -> NoReturn:
        """Never called."""
        raise NotImplementedError


def _depends(dumper: type[Any]) -> bool:
    """Return whether psycopg's dumper asks its connection for more than the encoding."""
    # For IntervalStyle, the server's version, TimeZone.
    module = dumper.__module__.rpartition(".")[2]
    return module in ("range", "multirange") or dumper.__name__ in ("TimedeltaDumper", "BytesDumper")


def _independent(adapters: AdaptersMap) -> AdaptersMap | None:
    """Return the adapters without the dumpers that depend on the session; None if others might."""
    found = AdaptersMap(adapters)
    for format, known in adapters._dumpers.items():
        if any(dumper.__module__.partition(".")[0] not in _DRIVERS for dumper in known.values()):
            return None
        own = {kind: _OfSession if _depends(dumper) else dumper for kind, dumper in known.items()}
        found._dumpers[format] = own
    return found


class _Shared:
    """A copy of adapters for the cursors of all connections that have the same."""

    def __init__(self) -> None:
        self._last: tuple[AdaptersMap, AdaptersMap | None] = AdaptersMap(), None

    def of(self, adapters: AdaptersMap) -> tuple[AdaptersMap, AdaptersMap | None]:
        """Return the copy, and its part that can adapt the parameters of a connection's known statements.

        That part must hold no connection, since the cycle would keep a lost connection's slot. So it is None
        if the application has registered its own dumpers, which may ask for the connection.
        """
        last = self._last  # other threads may replace it
        if not _alike(last[0], adapters):
            self._last = last = AdaptersMap(adapters), _independent(adapters)
        return last


shared = _Shared()


def _alike(one: AdaptersMap, other: AdaptersMap) -> bool:
    """Return whether two maps of adapters are equal; quickly, if neither was changed since it was copied."""
    return (
        list(one._dumpers.values()) == list(other._dumpers.values())
        and one._loaders == other._loaders
        and one._dumpers_by_oid == other._dumpers_by_oid
        and one.types._registry is other.types._registry
    )


class Context(NamedTuple):
    """The attributes that psycopg's adaptation asks of a cursor, which itself would expose its connection."""

    adapters: AdaptersMap
    connection: Any


class _Session(NamedTuple):
    """The attributes that psycopg's loaders ask of a connection, which itself would form a cycle."""

    pgconn: PGconn


_TEXT = psycopg.pq.Format.TEXT
_IN_C = psycopg.pq.__impl__ != "python"
Styles = tuple[bytes | None, ...]
_STYLES = (b"TimeZone", b"DateStyle", b"IntervalStyle")
"""Settings that a loader of `_STYLED` looks at once, when it is made."""
_STYLED = {"DateLoader", "IntervalLoader", "TimestampLoader", "TimestamptzLoader"}
_LASTING = _STYLED | {
    "BoolLoader", "FloatLoader", "IntLoader", "JsonLoader", "JsonbLoader", "NumericLoader", "TextLoader",
    "TimeLoader", "TimetzLoader", "UUIDLoader",
}  # fmt: skip
"""Loaders of psycopg that may serve one result after another in a session in UTF8."""


class Reader:
    """Reads the results of a prepared statement, whose columns cannot change, for one cursor at a time.

    Finding the loaders of the columns again is a tenth of a statement's cost at the client. A cursor that
    dies with the reader leaves it without a result, in one step of C, and so free for the next cursor.
    """

    __slots__ = ("release", "styles", "tx", "user")

    def __init__(self, context: Context, styles: Styles | None, result: PGresult, cursor: Any) -> None:
        self.styles, self.tx = styles, Transformer(context)
        self.tx.set_pgresult(result)
        self.release = partial(self.tx.set_pgresult, None, False)  # type: ignore[call-arg]
        self.user = proxy(cursor, self.release)

    def read(self, result: PGresult, cursor: Any, pgconn: PGconn) -> bool:
        """Take a result for the cursor; return False if another one has the reader, or the styles differ."""
        if self.tx.pgresult is not None and getattr(cursor, "_tx", None) is not self.tx:
            return False
        if self.styles is not None and self.styles != _styles(pgconn):
            return False
        self.tx.set_pgresult(result, False)  # type: ignore[call-arg]
        self.user = proxy(cursor, self.release)
        return True


def _styles(pgconn: PGconn) -> Styles:
    return tuple(map(pgconn.parameter_status, _STYLES))


def reader_for(
    cursor: Any, result: PGresult, adapters: AdaptersMap, pgconn: PGconn
) -> Reader | Literal[False]:
    """Return a reader that has the cursor's result; False if a loader may not serve the next one."""
    if not _IN_C:
        return False
    names = set()
    for column in range(result.nfields):
        loader = adapters.get_loader(result.ftype(column), _TEXT) or adapters.get_loader(0, _TEXT)
        if loader is None or loader.__module__.partition(".")[0] not in _DRIVERS:
            return False
        names.add(loader.__name__)
    if not names <= _LASTING:
        return False
    styles = _styles(pgconn) if names & _STYLED else None
    return Reader(Context(adapters, _Session(pgconn)), styles, result, cursor)

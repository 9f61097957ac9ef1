"""Loaders of dates, times and intervals for blocks that bind TimeZone, DateStyle or IntervalStyle.

The server formats values by the block's settings, but reports a setting to the client only after the
transaction, when the session's value is back. So these loaders use the settings that the preamble queried.
"""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from typing import Any

import psycopg
from psycopg.adapt import AdaptersMap, Loader, PyFormat
from psycopg.types import datetime as own

from .commands import IDLE

_LOADERS: tuple[tuple[str, type[Loader]], ...] = (
    ("date", own.DateLoader),
    ("timestamp", own.TimestampLoader),
    ("timestamptz", own.TimestamptzLoader),
    ("timestamptz", own.TimestamptzBinaryLoader),
    ("interval", own.IntervalLoader),
)


def _context(context: Any) -> Any:
    """Return the settings by which the server formatted a value: those of the current or last transaction."""
    conn = getattr(context, "connection", None)
    in_force = getattr(conn, "in_force", None)
    if conn is None or in_force is None or conn.pgconn.transaction_status != IDLE:
        return context
    return in_force


@cache
def _following(loader: type[Loader]) -> type[Loader]:
    def init(self: Any, oid: int, context: Any = None) -> None:
        loader.__init__(self, oid, _context(context))

    return type(loader.__name__, (loader,), {"__init__": init, "__module__": __name__})


class _TimedeltaDumper(own.TimedeltaDumper):
    """Writes an interval with all signs, which every IntervalStyle reads alike."""

    def dump(self, obj: Any) -> Any:
        return self._dump_sql(self, obj)


def adapters_for(conn: psycopg.Connection[Any]) -> AdaptersMap:
    """Return the connection's adapters with loaders that follow the block's settings.

    Loaders and dumpers that `configure` registered in place of psycopg's are kept.
    """
    plain, adapters = psycopg.adapters, AdaptersMap(conn.adapters)
    for name, loader in _LOADERS:
        oid = plain.types[name].oid
        if adapters.get_loader(oid, loader.format) is plain.get_loader(oid, loader.format):
            adapters.register_loader(name, _following(loader))
    text = adapters.get_dumper(timedelta, PyFormat.TEXT)
    if text is plain.get_dumper(timedelta, PyFormat.TEXT):
        usual = adapters.get_dumper(timedelta, PyFormat.AUTO)
        adapters.register_dumper(timedelta, _TimedeltaDumper)
        adapters.register_dumper(timedelta, usual)  # the last one registered is the one for %s
    return adapters

"""Server settings that the client depends on too, to read and write values."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

SETTING_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)*")
"""The name of a server setting, also of an application's own: app.tenant."""

REPORTED = (b"TimeZone", b"DateStyle", b"IntervalStyle")
"""The settings by which psycopg reads and writes dates, times and intervals."""

# A transaction's own value of these would hold at the server alone, and text would be misread.
_REFUSED = {"client_encoding", "standard_conforming_strings"}
_SILENT = {"error", "fatal", "panic"}
_NAMES = {name.decode().lower() for name in REPORTED}
_COLUMNS = ",".join(f"pg_catalog.current_setting('{name.decode()}')" for name in REPORTED)
_MARK = b"pgdbpool_reported"
REPORT = f"SELECT {_COLUMNS.replace(',', f' AS {_MARK.decode()},', 1)}".encode()
"""The query for the values in force."""


def why_refused(name: str, value: object) -> str | None:
    """Return why no block can bind the setting to the value, with the remedy; None if one can."""
    if name.lower() == "client_min_messages" and str(value).strip().lower() in _SILENT:
        return (
            f"to {str(value).strip()!r} would hide the server's warning that a commit did not wait for its "
            "synchronous standby: use warning, or a lower level"
        )
    if name.lower() not in _REFUSED:
        return None
    return (
        "would hold at the server and not at the client, which misreads text then: "
        f"set it for whole sessions, in the server's options ({name}: ...)"
    )


def is_reported(names: Iterable[str]) -> bool:
    """Return whether the client reads values by one of these settings."""
    return any(name.lower() in _NAMES for name in names)


class InForce:
    """Stands in for a connection when psycopg's loaders ask one how the server wrote a value."""

    __slots__ = ("_values",)

    def __init__(self, values: dict[bytes, bytes | None]) -> None:
        self._values = values

    @classmethod
    def of(cls, result: Any) -> InForce | None:
        """Return the values in a result of `REPORT`; None for any other result."""
        if result.nfields != len(REPORTED) or result.fname(0) != _MARK:
            return None
        return cls({name: result.get_value(0, place) for place, name in enumerate(REPORTED)})

    @property
    def connection(self) -> InForce:
        return self

    @property
    def pgconn(self) -> InForce:
        return self

    def parameter_status(self, name: bytes) -> bytes | None:
        """Return the value that a setting had."""
        return self._values.get(name)

"""The kinds of values for server settings: their names, their values, a tenant's."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from .._util.client_settings import SETTING_NAME
from .._util.transaction_modes import canonical, is_mode, mode_value
from .declarations import Kind, Refused, Unreadable, show, step
from .text_types import Text, is_text

_PART_LIMIT = 63
_SECRET_NAME = re.compile(r"pass|pwd|secret|token|credential|key$", re.IGNORECASE)


class ServerSettings(Kind):
    """A mapping of server settings, each a name and a plain value."""

    mapping: ClassVar[bool] = True

    @property
    def allowed(self) -> str:
        return "a mapping of server settings, such as {work_mem: 64MB}"

    @property
    def schema(self) -> dict[str, Any]:
        return {
            "type": "object",
            "propertyNames": {"pattern": f"^{SETTING_NAME.pattern}$"},
            "additionalProperties": {"type": ["string", "number", "boolean"]},
        }

    def check(self, value: object) -> Any:
        if not isinstance(value, Mapping):
            raise self.refuse(value)
        settings: dict[str, str] = {}
        problems: list[tuple[str, str]] = []
        for name, item in value.items():
            if not isinstance(name, str) or not SETTING_NAME.fullmatch(name):
                problems.append((step(name), "is not the name of a server setting, such as work_mem"))
            elif isinstance(item, Unreadable):
                problems.append((step(name), item.reason))
            elif (setting := _setting(item)) is None:
                shown = show(item, secret=bool(_SECRET_NAME.search(name)))
                problems.append((step(name), f"must be a string, a number, true or false, not {shown}"))
            else:
                settings[str.__str__(name)] = setting
                problems += _wrong_mode(name, setting)
        problems += [(step(name), message) for name, message in twice(settings)]
        if problems:
            raise Refused(*problems)
        return settings


class TenantName(Text):
    """The name of an application's setting, which PostgreSQL accepts without knowing it."""

    @property
    def allowed(self) -> str:
        return (
            "a qualified custom name, such as app.current_tenant_id: letters, digits, _ and $ in parts "
            f"of at most {_PART_LIMIT} bytes, with a dot between"
        )

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": r"^[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)+$"}

    def check(self, value: object) -> Any:
        if isinstance(value, str) and SETTING_NAME.fullmatch(value):
            parts = value.split(".")
            if len(parts) > 1 and max(map(len, parts)) <= _PART_LIMIT:
                return str.__str__(value)
        raise self.refuse(value)


class Pattern(Text):
    """A Python regular expression."""

    @property
    def allowed(self) -> str:
        return "a regular expression"

    def check(self, value: object) -> Any:
        if isinstance(value, (list, Mapping)):  # YAML reads [a-z] and {2} this way
            raise self.refuse(value, "; quote it")
        pattern = super().check(value)
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            reason = error.msg if isinstance(error, re.error) else str(error)
        else:
            return pattern
        raise self.refuse(value, f": {reason}")


def twice(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield names that PostgreSQL takes for an earlier one, by their case or as a synonym, and why."""
    spellings: dict[str, str] = {}
    for name in names:
        if (first := spellings.setdefault(canonical(name), name)) != name:
            why = ", since case makes no difference" if first.lower() == name.lower() else ""
            yield name, f"is the same setting as {show(first)}{why}; keep one"


def _wrong_mode(name: str, value: str) -> Iterator[tuple[str, str]]:
    """Yield the problems of the value of a mode of transactions."""
    if is_mode(name):
        try:
            mode_value(name, value)
        except ValueError as error:
            yield step(name), f"must be {error}, not {show(value)}"


def _setting(value: object) -> str | None:
    """Return the value of a server setting as text, or None if it is not valid."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int):
        return int.__repr__(value) if value.bit_length() <= 64 else None
    if isinstance(value, float):
        return float.__repr__(value) if math.isfinite(value) else None
    return str.__str__(value) if isinstance(value, str) and is_text(value) else None

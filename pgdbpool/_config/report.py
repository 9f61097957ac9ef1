"""Shared by the checks of a configuration: the report of problems, and the reading of a mapping's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, Problem
from .declarations import Refused, Setting, Unreadable, show, step
from .foreign_keys import hint


class Report:
    """Collects problems; `names` replaces the start of a path with the source's name for it, a variable."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.deprecated: list[str] = []
        self.doubtful: list[str] = []
        """Values that are valid but hardly intended."""
        self._problems: dict[Problem, None] = {}

    def add(self, path: str, message: str) -> None:
        for inner, name in self.names.items():
            if path == inner or path.startswith((f"{inner}.", f"{inner}[")):
                # All the parts of a server are in its one variable.
                path = name if inner.startswith("db[") else name + path.removeprefix(inner)
                break
        self._problems[Problem(path, message)] = None

    def refused(self, path: str, refused: Refused) -> None:
        for place, message in refused.problems:
            self.add(path + place, message)

    def error(self, origin: str) -> ConfigError:
        """Return the error that has a line for each problem."""
        problems = tuple(self._problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "".join(f"\n  {problem}" for problem in problems)
        return ConfigError(f"{count} in the configuration ({origin}):{lines}", problems)

    def check(self, origin: str) -> None:
        """Raise `ConfigError` if there is any problem."""
        if self._problems:
            raise self.error(origin)


def read(known: Mapping[str, Setting], value: object, path: str, report: Report) -> dict[str, Any]:
    """Return the values of a mapping by the field that each goes to; wrong ones are reported and left out."""
    fields: dict[str, Any] = {}
    if isinstance(value, Unreadable):
        report.add(path, value.reason)
    elif not isinstance(value, Mapping):
        report.add(path, f"must be a mapping, not {show(value)}")
    else:
        for name, item in value.items():
            where = (path + step(name)).removeprefix(".")
            setting = known.get(name) if isinstance(name, str) else None
            if setting is None:
                report.add(where, f"unknown key{hint(name, known) or '; known are ' + ', '.join(known)}")
                continue
            try:
                fields[setting.field] = setting.read(item)
                if doubt := setting.key.kind.doubt(item):
                    report.doubtful.append(f"{where}: {doubt}")
            except Refused as error:
                report.refused(where, error)
    return fields


def refused(entry: object, fields: Mapping[str, Any], *names: str) -> bool:
    """Return whether any of these keys has no usable value: it was refused, or the whole entry was."""
    return not isinstance(entry, Mapping) or any(name in entry and name not in fields for name in names)

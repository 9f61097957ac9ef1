"""Transaction modes that settings ask for: `default_transaction_isolation`, `_read_only`, `_deferrable`.

A default counts for the next transaction, and settings are bound inside one. So the modes are a part of
BEGIN, and come before all other statements in the implicit transaction of an autocommit group's pipeline.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

_LEVELS = ("serializable", "repeatable read", "read committed", "read uncommitted")
_KINDS = {"isolation": "level", "read_only": "switch", "deferrable": "switch"}
_DEFAULT = "default_transaction_"
_ALIASES = {f"transaction_{mode}": _DEFAULT + mode for mode in _KINDS}
_MODES = {_DEFAULT + mode: mode for mode in _KINDS}


READ_ONLY = (("transaction_read_only", "on"),)
"""The setting that makes the rest of a transaction read only."""


class Modes(NamedTuple):
    """The modes that a transaction's BEGIN states; None is the session's default."""

    isolation: str | None = None
    read_only: bool | None = None
    deferrable: bool | None = None

    def begin(self) -> bytes:
        """Return the BEGIN of a transaction with these modes."""
        parts = ["BEGIN"]
        if self.isolation is not None:
            parts.append(f"ISOLATION LEVEL {self.isolation.upper()}")
        if self.read_only is not None:
            parts.append("READ ONLY" if self.read_only else "READ WRITE")
        if self.deferrable is not None:
            parts.append("DEFERRABLE" if self.deferrable else "NOT DEFERRABLE")
        return " ".join(parts).encode()

    def of_implicit(self) -> list[bytes]:
        """Return the statements that give an implicit transaction these modes, before its first query.

        `READ_ONLY` is not among them: a query may set it, so it is bound with the settings. SET TRANSACTION
        and SET LOCAL are not used, since the server warns of them outside BEGIN. Each transaction starts
        these settings again from their defaults, so nothing of them is left.
        """
        return [
            f"SET transaction_{mode} TO {_literal(value)}".encode()
            for mode, value in self._asdict().items()
            if value is not None and (mode, value) != ("read_only", True)
        ]

    def before_begin(self) -> list[bytes]:
        """Return the statements that make these modes the defaults of a BEGIN in the same pipeline."""
        return [*self.of_implicit(), *([b"SET transaction_read_only TO on"] if self.read_only else [])]


def canonical(name: str) -> str:
    """Return the canonical name of a setting: that of its default for a mode, in lower case for others."""
    small = name.lower()
    return _ALIASES.get(small, small)


def is_mode(name: str) -> bool:
    """Return whether the setting is a mode of transactions, under any of its names."""
    return canonical(name) in _MODES


def mode_value(name: str, text: str) -> str:
    """Return the value of a mode's setting as PostgreSQL shows it.

    :raises ValueError: the value is not allowed; the message has the allowed ones.
    """
    kind = _KINDS[_MODES[canonical(name)]]
    small = " ".join(text.split()).lower()
    if kind == "level":
        if small in _LEVELS:
            return small
        raise ValueError(f"one of {', '.join(_LEVELS)}")
    for word, value in (("on", "on"), ("off", "off"), ("true", "on"), ("yes", "on"), ("1", "on"),
                        ("false", "off"), ("no", "off"), ("0", "off")):  # fmt: skip
        # PostgreSQL takes an abbreviated word if it is unambiguous.
        if small == word or (small and small != "o" and word.startswith(small)):
            return value
    raise ValueError("on or off")


def modes_of(settings: Iterable[tuple[str, str]]) -> Modes | None:
    """Return the modes among settings of canonical names and values; None if there are none."""
    found = {mode: value for name, value in settings if (mode := _MODES.get(name)) is not None}
    if not found:
        return None
    switches = {mode: value == "on" for mode, value in found.items() if mode != "isolation"}
    return Modes(isolation=found.get("isolation"), **switches)


def _literal(value: str | bool) -> str:
    return f"'{value}'" if isinstance(value, str) else "on" if value else "off"

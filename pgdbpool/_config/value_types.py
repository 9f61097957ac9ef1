"""The kinds of values that keys of the configuration take."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, ClassVar, NamedTuple

from .declarations import Kind, Refused, nearest, show, step
from .text_types import VARIABLE, Factory, Text

_DURATION = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*(ms|s|min|h)", re.ASCII)
_UNIT_MS = {"ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000}
_AMOUNT = re.compile(r"(\d{1,18})\s*(B|kB|MB|GB|TB)", re.ASCII)
_UNIT_BYTES = {"B": 1, "kB": 2**10, "MB": 2**20, "GB": 2**30, "TB": 2**40}
DAY_SECONDS = 86_400
DURATION_SCHEMA = {
    "type": "string",
    "pattern": r"^\s*[0-9]{1,15}(\.[0-9]{1,9})?\s*(ms|s|min|h)\s*$",
}
DURATION_EXAMPLES = 'a string such as "500ms", "5s", "2min", "1h"'


class Section(Kind):
    """A mapping or list with separate keys, which are read one by one elsewhere."""

    shape: str
    mapping: ClassVar[bool] = True

    @property
    def allowed(self) -> str:
        return self.shape

    def check(self, value: object) -> Any:
        return value


class Ignored(Kind):
    """Accepted from version 1 with any value, and without effect."""

    @property
    def allowed(self) -> str:
        return "anything"

    def check(self, value: object) -> Any:
        return None


class Flag(Kind):
    """A boolean; `digits` takes 0 and 1 too, as libpq writes them."""

    digits: bool = False

    @property
    def allowed(self) -> str:
        return "true or false, or 1 or 0" if self.digits else "true or false"

    @property
    def schema(self) -> dict[str, Any]:
        return {"enum": [True, False, 1, 0]} if self.digits else {"type": "boolean"}

    def check(self, value: object) -> Any:
        if isinstance(value, bool) or (self.digits and isinstance(value, int) and value in (0, 1)):
            return bool(value)
        raise self.refuse(value)


class Word(Kind):
    """One of a few words; `other` are further spellings, `flags` the words that true and false stand for."""

    choices: tuple[str, ...]
    other: tuple[tuple[str, str], ...] = ()
    flags: tuple[str, str] | None = None

    @property
    def allowed(self) -> str:
        spellings = "".join(f", {other} (the same as {word})" for other, word in self.other)
        flags = f", true ({self.flags[0]}), false ({self.flags[1]})" if self.flags else ""
        words = "one of" if len(self.choices) > 1 else "the word"
        return f"{words} {', '.join(self.choices)}{spellings}{flags}"

    @property
    def schema(self) -> dict[str, Any]:
        return {"enum": [*self.choices, *dict(self.other), *((True, False) if self.flags else ())]}

    def check(self, value: object) -> Any:
        if isinstance(value, bool) and self.flags:
            return self.flags[0] if value else self.flags[1]
        word = dict(self.other).get(value, value) if isinstance(value, str) else value
        if not isinstance(word, str) or word not in self.choices:
            raise self.refuse(value, nearest(value, (*self.choices, *dict(self.other))))
        return str(word)


class Integer(Kind):
    """A whole number; `unit` and `zero` give its unit and the meaning of 0."""

    low: int
    high: int
    unit: str = ""
    zero: str = ""

    @property
    def allowed(self) -> str:
        zero = f" (= {self.zero})" if self.zero else ""
        return f"an integer from {self.low}{zero} to {self.high}{self.unit and ' ' + self.unit}"

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}

    def check(self, value: object) -> Any:
        if not isinstance(value, int) or isinstance(value, bool) or not self.low <= value <= self.high:
            digits = isinstance(value, str) and value.isdigit()
            raise self.refuse(value, "; write it without quotes" if digits else "")
        return int(value)

    def in_words(self, value: Any) -> str:
        words = super().in_words(value)
        if value is None:
            return words
        return f"{words} ({self.zero})" if value == 0 and self.zero else f"{words} {self.unit}".strip()


class Number(Kind):
    """A number above 0, whole or not."""

    high: int

    @property
    def allowed(self) -> str:
        return f"a number above 0 up to {self.high}"

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "number", "exclusiveMinimum": 0, "maximum": self.high}

    def check(self, value: object) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= self.high:
            return float(value)
        raise self.refuse(value)


class Seconds(Kind):
    """A duration in seconds; 0 is allowed if `zero` gives its meaning."""

    high: int
    zero: str = ""
    whole: bool = False  # libpq counts these in whole seconds
    likely: float = 0  # a higher number without a unit is probably meant in milliseconds

    @property
    def allowed(self) -> str:
        bounds = f"from 0 (= {self.zero})" if self.zero else "above 0"
        return f"{'whole ' if self.whole else ''}seconds {bounds} up to {self.high}, or {DURATION_EXAMPLES}"

    @property
    def schema(self) -> dict[str, Any]:
        kind = "integer" if self.whole else "number"
        least = {"minimum": 0} if self.zero else {"exclusiveMinimum": 0}
        return {"anyOf": [{"type": kind, **least, "maximum": self.high}, DURATION_SCHEMA]}

    def check(self, value: object) -> Any:
        number = _duration(value, 1000)
        # Compared before it is converted: an integer may be too large for a float.
        if number is None or not 0 <= number <= self.high or (number == 0 and not self.zero):
            raise self.refuse(value)
        if not self.whole:
            return float(number)
        if number != int(number):
            raise self.refuse(value)
        return int(number)

    def doubt(self, value: object) -> str:
        if not self.likely or not isinstance(value, (int, float)) or value <= self.likely:
            return ""
        return f'{value:g} is seconds; if it is meant, write it with a unit: "{value:g}s", else "{value:g}ms"'

    def in_words(self, value: Any) -> str:
        if value is None:
            return super().in_words(value)
        if value == 0:
            return f"``0`` ({self.zero})"
        hours = f" ({value / 3600:g} h)" if value >= 3600 else ""
        return f"``{value:g}`` s{hours}"


class Milliseconds(Kind):
    """A duration in whole milliseconds, as in PostgreSQL's own timeouts."""

    zero: str
    high: int = 2**31 - 1
    likely: ClassVar[int] = 100
    """A lower number without a unit is probably meant in seconds."""

    @property
    def allowed(self) -> str:
        return f"whole milliseconds from 0 (= {self.zero}) up to {self.high}, or {DURATION_EXAMPLES}"

    @property
    def schema(self) -> dict[str, Any]:
        return {"anyOf": [{"type": "integer", "minimum": 0, "maximum": self.high}, DURATION_SCHEMA]}

    def check(self, value: object) -> Any:
        number = _duration(value, 1)
        if number is None or isinstance(number, float) or not 0 <= number <= self.high:
            raise self.refuse(value)
        if number != int(number):
            raise self.refuse(value)
        return int(number)

    def doubt(self, value: object) -> str:
        if not isinstance(value, int) or not 0 < value < self.likely:
            return ""
        return f'{value} is milliseconds; if it is meant, write it with a unit: "{value}ms", else "{value}s"'

    def in_words(self, value: Any) -> str:
        return super().in_words(value) + (" ms" if value is not None else "")


class MaxLag(NamedTuple):
    """How far a standby may be behind; None means no limit."""

    bytes: int | None
    seconds: float | None


class LagLimit(Kind):
    """How far a standby may be behind, in bytes, in seconds, or in both."""

    mapping: ClassVar[bool] = True

    @property
    def allowed(self) -> str:
        return "a mapping with bytes, seconds or both, such as {bytes: 16MB, seconds: 10}"

    @property
    def schema(self) -> dict[str, Any]:
        amounts = {"bytes": Bytes(2**60).schema, "seconds": Seconds(DAY_SECONDS).schema}
        limits = {name: {"anyOf": [*each["anyOf"], VARIABLE]} for name, each in amounts.items()}
        return {"type": "object", "properties": limits, "additionalProperties": False, "minProperties": 1}

    def check(self, value: object) -> Any:
        if not isinstance(value, Mapping) or not value:
            raise self.refuse(value)
        problems: list[tuple[str, str]] = []
        limits: dict[str, Any] = {}
        kinds: dict[str, Kind] = {"bytes": Bytes(2**60), "seconds": Seconds(DAY_SECONDS)}
        for name, item in value.items():
            if name not in kinds:
                problems.append(
                    (step(name), f"unknown key{nearest(name, kinds) or '; known are bytes, seconds'}")
                )
                continue
            try:
                limits[name] = kinds[name].read(item)
            except Refused as refused:
                problems += [(f".{name}", message) for _, message in refused.problems]
        if problems:
            raise Refused(*problems)
        return MaxLag(limits.get("bytes"), limits.get("seconds"))


class Bytes(Kind):
    """An amount of data, above 0."""

    high: int

    @property
    def allowed(self) -> str:
        return 'a whole number of bytes above 0, or a string such as "64kB", "16MB", "1GB"'

    @property
    def schema(self) -> dict[str, Any]:
        amount = {"type": "string", "pattern": r"^\s*[0-9]{1,18}\s*(B|kB|MB|GB|TB)\s*$"}
        return {"anyOf": [{"type": "integer", "minimum": 1, "maximum": self.high}, amount]}

    def check(self, value: object) -> Any:
        match = _AMOUNT.fullmatch(value.strip()) if isinstance(value, str) else None
        number = int(match[1]) * _UNIT_BYTES[match[2]] if match else value
        if not isinstance(number, int) or isinstance(number, bool) or not 0 < number <= self.high:
            raise self.refuse(value)
        return int(number)


class Labels(Kind):
    """A list of different labels; an empty one would leave a group without a server."""

    @property
    def allowed(self) -> str:
        return "a non-empty list of labels"

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": Text().schema, "minItems": 1, "uniqueItems": True}

    def check(self, value: object) -> Any:
        if not isinstance(value, (list, tuple)) or not value:
            raise self.refuse(value)
        labels: dict[str, int] = {}
        problems: list[tuple[str, str]] = []
        for index, item in enumerate(value):
            try:
                label = Text().read(item)
            except Refused as refused:
                problems += [(f"[{index}]", message) for _, message in refused.problems]
                continue
            if labels.setdefault(label, index) != index:
                problems.append((f"[{index}]", f"{show(label)} is in the list already, at [{labels[label]}]"))
        if problems:
            raise Refused(*problems)
        return tuple(labels)


class Subclass(Kind):
    """A class that is derived from another one, or a dotted name that imports it."""

    of: type[Any]

    @property
    def allowed(self) -> str:
        name = f"{self.of.__module__}.{self.of.__qualname__}"
        return f'a subclass of {name}, or its name as "package.module:class"'

    @property
    def schema(self) -> dict[str, Any]:
        return Factory(()).schema

    def check(self, value: object) -> Any:
        found = Factory(()).check(value) if isinstance(value, str) else value
        if not isinstance(found, type) or not issubclass(found, self.of):
            raise self.refuse(value)
        return found


def _duration(value: object, unit_ms: int) -> int | float | Decimal | None:
    """Return a duration as a number of units of `unit_ms` milliseconds, or None if it is not a duration."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value if isinstance(value, int) or math.isfinite(value) else None
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    # Decimal, so that "1.001s" is 1001 ms and not 1000.9999999999999.
    return Decimal(match[1]) * _UNIT_MS[match[2]] / unit_ms if match else None

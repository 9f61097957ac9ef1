"""The declaration of a key: a `Key` on a dataclass field, with the `Kind` of value it takes.

Loading, error messages and the reference page read the same declaration, so they cannot disagree.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from inspect import get_annotations
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_type_hints

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_):
        """Do nothing; it is for type checkers."""
        return lambda cls: cls


_SECRET_TEXT = re.compile(r"(pass\w{0,20}|pwd|secret|key)\s{0,5}=|(pass(word)?|pwd)[\"']?\s{0,5}:", re.I)


class Refused(ValueError):
    """A key does not accept the value; `problems` are pairs of a place below the key and a message."""

    def __init__(self, *problems: tuple[str, str]) -> None:
        super().__init__(*problems)
        self.problems = problems


@dataclass(frozen=True)
class Unreadable:
    """Stands in a source's tree for a value that could not be read, such as an unset variable."""

    reason: str


def show(value: object, secret: bool = False) -> str:
    """Return a value as messages show it: short, on one line, and never with a password in it.

    Containers and foreign objects are named by their type only: a password may be anywhere inside.
    """
    if secret or (isinstance(value, str) and may_hold_password(value)):
        return "'***'"
    if isinstance(value, str):
        text = str.__repr__(value[:100])
    elif value is None or isinstance(value, bool):
        text = repr(value)
    elif isinstance(value, int):
        text = int.__repr__(value) if value.bit_length() < 200 else f"an integer of {value.bit_length()} bits"
    elif isinstance(value, float):
        text = float.__repr__(value)
    elif isinstance(value, Mapping):
        text = "a mapping"
    elif isinstance(value, (list, tuple)):
        text = "a list" if value else "an empty list"
    else:
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def may_hold_password(text: str) -> bool:
    """Return whether a string looks like part of a URI with user:password@, or has password=... in it."""
    return "@" in text or _SECRET_TEXT.search(text) is not None


def nearest(word: object, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the known word closest to a misspelt one, or nothing."""
    if not isinstance(word, str):
        return ""
    import difflib  # for an error only

    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(word[:60].lower(), by_lower, 1)
    return f"; did you mean {show(by_lower[matches[0]])}?" if matches else ""


def step(key: object) -> str:
    """Return one step of a path: `.name`, or `['any key']` if a plain name would mislead."""
    plain = isinstance(key, str) and re.fullmatch(r"[A-Za-z_][\w-]{0,60}", key, re.ASCII)
    return f".{key}" if plain else f"[{show(key)}]"


@dataclass_transform(eq_default=False)
class Kind:
    """A kind of value: `allowed` describes it, `check` returns a value as the package uses it.

    Each kind declares its fields as a dataclass does. A real dataclass would generate and compile code
    for each kind, which took a fifth of the package's import time.
    """

    text: ClassVar[bool] = False  # whether text is kept, even if it looks like a number or a boolean
    secret: ClassVar[bool] = False
    mapping: ClassVar[bool] = False  # a variable gives it as YAML: {key: value}
    _names: ClassVar[dict[str, None]] = {}
    """Its fields in order, those of its base first."""

    def __init_subclass__(cls) -> None:
        own = {name: None for name, hint in get_annotations(cls).items() if not hint.startswith("ClassVar")}
        cls._names = {**cls._names, **own}

    def __init__(self, *values: Any, **named: Any) -> None:
        names = self._names
        given = {**dict(zip(names, values, strict=False)), **named}
        if len(given) != len(values) + len(named) or not names.keys() >= given.keys():
            raise TypeError(f"{type(self).__name__} is made of {', '.join(names)}")
        if missing := [name for name in names if name not in given and not hasattr(self, name)]:
            raise TypeError(f"{type(self).__name__} needs {', '.join(missing)}")
        self.__dict__.update(given)

    @property
    def allowed(self) -> str:
        raise NotImplementedError

    def check(self, value: object) -> Any:
        """Return the value, normalised; raises `Refused` with the allowed values."""
        raise NotImplementedError

    def doubt(self, value: object) -> str:
        """Return why an accepted value is hardly intended, with the remedy; usually nothing."""
        return ""

    def read(self, value: object) -> Any:
        """Return the checked value of a source's tree; raises `Refused`."""
        if isinstance(value, Unreadable):
            raise Refused(("", value.reason))
        return self.check(value)

    def refuse(self, value: object, hint: str = "") -> Refused:
        return Refused(("", f"must be {self.allowed}, not {show(value, self.secret)}{hint}"))

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON Schema of the values; empty if it cannot express them."""
        return {}

    def in_words(self, value: Any) -> str:
        """Return a value, such as a default, as the reference page writes it."""
        if value is None:
            return "not set"
        return f"``{str(value).lower() if isinstance(value, bool) else value}``"


@dataclass(eq=False, repr=False)
class Key:
    """The declaration of a key, put on a dataclass field with `Annotated`.

    `name` is the key as users write it if that is not the field's name, `default` the default in words
    if it is not a plain value, `libpq` the connection parameter that carries the value; `nullable` is false
    if null does not count as a missing key.
    """

    kind: Kind
    meaning: str
    name: str = ""
    default: str = ""
    libpq: str = ""
    nullable: bool = True


@dataclass(eq=False, repr=False)
class Setting:
    """A key with the facts of its dataclass field: the value's destination, and whether null is a value."""

    name: str
    field: str
    key: Key
    default: str
    nullable: bool

    def read(self, value: object) -> Any:
        """Return the checked value; raises `Refused`."""
        return None if value is None and self.nullable else self.key.kind.read(value)


def settings_of(cls: type[Any]) -> dict[str, Setting]:
    """Return the keys that a dataclass declares, by the name that users write, in order."""
    settings: dict[str, Setting] = {}
    hints = get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint, *extras = get_args(hints[field.name]) or (None,)
        for key in extras:
            if isinstance(key, Key):
                name = key.name or field.name
                default = key.default or key.kind.in_words(field.default)
                nullable = key.nullable and type(None) in get_args(hint)
                settings[name] = Setting(name, field.name, key, default, nullable)
    return settings

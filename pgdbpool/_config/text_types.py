"""Kinds of values that are text: names, hosts, files, and the results of functions."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar
from urllib.parse import urlsplit

from .declarations import Kind, Refused, nearest, show

_DOTTED_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
VARIABLE = {"$ref": "#/definitions/variable"}
"""The JSON Schema of ``${VAR}`` in a file, which may stand for any scalar."""


class Text(Kind):
    """A string that can be sent to a server; `or_empty` takes an empty one for a key left out."""

    or_empty: bool = False
    text: ClassVar[bool] = True

    @property
    def allowed(self) -> str:
        return "a string" if self.or_empty else "a non-empty string"

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string"} if self.or_empty else {"type": "string", "minLength": 1}

    def check(self, value: object) -> Any:
        if not isinstance(value, str) or not (value or self.or_empty):
            raise self.refuse(value, "; quote it" if isinstance(value, (int, float)) else "")
        if not is_text(value):
            raise self.refuse(value, ": it has characters that are not text, such as NUL")
        return str.__str__(value) or None


class Secret(Text):
    """Text that no message and no repr shows."""

    secret: ClassVar[bool] = True


class Factory(Kind):
    """A callable, a dotted name that imports one, or one of a few words."""

    choices: tuple[str, ...]

    @property
    def allowed(self) -> str:
        words = f"one of {', '.join(self.choices)}, " if self.choices else ""
        return f'{words}a callable, or its name as "package.module:function"'

    @property
    def schema(self) -> dict[str, Any]:
        name = {"type": "string", "pattern": r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$"}
        return {"anyOf": [{"enum": list(self.choices)}, name]} if self.choices else name

    def check(self, value: object) -> Any:
        if callable(value) or (isinstance(value, str) and value in self.choices):
            return value
        if not isinstance(value, str) or not _DOTTED_NAME.fullmatch(value):
            raise self.refuse(value, nearest(value, self.choices))
        return self._imported(value)

    def _imported(self, name: str) -> Callable[..., Any]:
        module, _, attributes = name.partition(":")
        try:
            found: object = importlib.import_module(module)
            for attribute in attributes.split("."):
                found = getattr(found, attribute)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a module of the application may raise anything
            raise self.refuse(name, f": importing it raised {type(error).__name__}") from None
        if not callable(found):
            raise self.refuse(name, ", which is not callable")
        return found


class Provided(Text):
    """Text, or a function that returns it when it is needed.

    The function's name is in a mapping, since plain text could be a password.
    """

    @property
    def allowed(self) -> str:
        return f'{super().allowed}, a callable, or {{call: "package.module:function"}}'

    @property
    def schema(self) -> dict[str, Any]:
        named = {"type": "object", "properties": {"call": Factory(()).schema}, "required": ["call"]}
        return {"anyOf": [super().schema, {**named, "additionalProperties": False}]}

    def check(self, value: object) -> Any:
        if callable(value):
            return value
        if isinstance(value, Mapping) and list(value) == ["call"]:
            return Factory(()).read(value["call"])
        return super().check(value)


class ProvidedSecret(Provided):
    """The same, and no message and no repr shows it."""

    secret: ClassVar[bool] = True


class Label(Text):
    """A name as logs and status pages print it."""

    @property
    def allowed(self) -> str:
        return "a non-empty string of printable characters"

    def check(self, value: object) -> Any:
        label = super().check(value)
        if not label.isprintable():
            raise self.refuse(value)
        return label


_WITH_PORT = re.compile(r"(?P<host>[^:\[\]]+|\[[^\]]*\]):(?P<port>\d{1,5})", re.ASCII)


class Host(Text):
    """One host name, address, or directory of a Unix socket."""

    @property
    def allowed(self) -> str:
        return "a host name, an address, or the directory of a Unix socket"

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": "^[^,]+$"}

    def check(self, value: object) -> Any:
        host = super().check(value)
        if "," in host:
            raise self.refuse(value, "; one server per entry, list them separately")
        if "://" in host:
            raise self.refuse(value, "; a URI is the value of conninfo")
        if not host.startswith(("/", "@")) and (both := _WITH_PORT.fullmatch(host)):
            name = both["host"].strip("[]")
            raise self.refuse(value, f"; the port has its own key: host: {show(name)}, port: {both['port']}")
        if not host.startswith(("/", "@")) and len(host.split()) > 1:
            raise self.refuse(value, "; it is one word, and the other parameters have separate keys")
        if "@" in host[1:]:  # the first character marks an abstract socket
            raise self.refuse(value, "; an @ in the password of a URI is written %40")
        return host


class Url(Text):
    """The address of a server that speaks HTTP, without user and password."""

    allowed = "the URL of an HTTP server"

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": "^https?://[^/@?#]+(/[^?#]*)?$"}

    def check(self, value: object) -> Any:
        url = super().check(value)
        if "@" in url:  # which may have a password before it
            raise Refused(("", f"must be {self.allowed}, without user and password"))
        try:
            parts = urlsplit(url)
            told = bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            told = False
        if not told or not re.fullmatch(r"https?://[^?#\s]+", url):
            raise self.refuse(value, "; for example http://host:8008")
        return url


class File(Text):
    """The path of a file that exists and can be read; `~` is the home directory."""

    word: str = ""  # a word that libpq takes in place of a path

    @property
    def allowed(self) -> str:
        return "the path of a readable file" + (f", or the word {self.word}" if self.word else "")

    def check(self, value: object) -> Any:
        path = super().check(os.fspath(value) if isinstance(value, os.PathLike) else value)
        if path == self.word:
            return path
        path = os.path.expanduser(path)
        if not os.path.isfile(path):
            raise self.refuse(value, ", which is not a file")
        if not os.access(path, os.R_OK):
            raise self.refuse(value, ", which this process may not read")
        return path


class Directory(Text):
    """The absolute path of a directory, which need not exist yet; `~` is the home directory."""

    @property
    def allowed(self) -> str:
        return "the absolute path of a directory"

    def check(self, value: object) -> Any:
        path = super().check(os.fspath(value) if isinstance(value, os.PathLike) else value)
        path = os.path.expanduser(path)
        if not os.path.isabs(path):
            raise self.refuse(value)
        return path


def is_text(value: str) -> bool:
    """Return whether a string can be sent to PostgreSQL: no NUL, nothing that UTF-8 cannot encode."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value

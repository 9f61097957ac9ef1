"""Template strings (PEP 750): the interpreter's from Python 3.14 on, before that psycopg's class, filled."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from psycopg._compat import Interpolation, Template

REAL = sys.version_info >= (3, 14)


if not REAL:

    class _Filled(Template):
        """What psycopg sees of a template string if the interpreter has none."""

        parts: tuple[Any, ...]

        def __iter__(self) -> Iterator[Any]:
            return iter(self.parts)


def template(*parts: Any) -> Any:
    """Return the template string of these parts: `("SELECT ", (1, "x"), (name, "column", "i"))`.

    A tuple is a value with its expression and, if given, its format.
    """
    made = [
        part if isinstance(part, str) else Interpolation(part[0], part[1], None, "".join(part[2:]))
        for part in parts
    ]
    if REAL:
        return Template(*made)
    filled = object.__new__(_Filled)  # psycopg's own constructor calls itself without end
    filled.parts = tuple(made)
    return filled

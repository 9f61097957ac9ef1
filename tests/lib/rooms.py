"""The files of the package and the rooms that they are in."""

from __future__ import annotations

from pathlib import Path

import pgdbpool

PACKAGE = Path(pgdbpool.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "demo_app" not in path.parts)


def module_of(path: Path) -> str:
    """Return a file's module without the package's name; the package itself is the empty string."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return module.partition(".")[0]

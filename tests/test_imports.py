"""Imports point one way: a file can be read with those that it imports alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from rooms import FILES, PACKAGE, module_of, room_of

import pgdbpool
from pgdbpool._session.state import ConnectionState

# What each room may import, type-only imports included. A room is a module or a package below `pgdbpool`.
ROOMS = {
    "_error_categories": "",
    "errors": "_error_categories",
    "_util": "errors",
    "_config": "errors _util",
    "_request": "errors _util _config",
    "_servers": "errors _util _config",
    "_session": "errors _util _request _servers",
    "rls": "errors",
    "stats": "_util",
    "sizing": "_config _session",
    "_lending": "errors _util _config _request _session _servers stats rls",
    "_status": "errors _util _session _servers _lending stats",
    "_process": "errors _util _config _session _servers _lending _status sizing stats",
    "_api": "errors _error_categories _util _config _request _session _servers _lending _process rls stats",
    "": "errors _error_categories _util _request _session _api",
    "pool": "errors _api",
    "overview": "_api _status",
    "wsgi": "errors _util _request _status _api overview",
    "metrics": "errors wsgi overview",
    "otel": "stats _session _process _api",
    "_diagnosis": "errors _config _request _session _servers _lending _process rls sizing",
    "cluster": "",
    "_demo": "cluster",
    "_cli": "errors _util _config _status _api _diagnosis _demo cluster overview rls sizing",
    "contrib": "errors _error_categories _util _config _request _session _api _cli _diagnosis wsgi",
    "__main__": "_cli",
}
# The rooms that serve requests. Of their files, those that are imported only when they are needed: at `init`,
# at a connect, for tenants, for signals, with a `runtime_dir`.
CORE = (
    "errors",
    "_error_categories",
    "_util",
    "_request",
    "_session",
    "_servers",
    "_lending",
    "_process",
    "_api",
)
LATE = {
    "_process.health", "_process.orders", "_process.patroni", "_process.running_config", "_process.signals",
    "_process.size_warnings", "_process.tracer",
    "_servers.driver", "_session.decoding",
}  # fmt: skip
NEEDED_EARLY = {
    f"_config{name}" for name in ("", ".declarations", ".password_file", ".service_file", ".text_types")
}


MODULES = {module_of(path) for path in FILES}


class Import(NamedTuple):
    """An import of one of the package's modules by another."""

    module: str
    line: int
    imported: str


def names(node: ast.Import | ast.ImportFrom, package: tuple[str, ...]) -> Iterator[str]:
    """Yield the full names that a statement imports; a module's where the statement names one."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = package[: len(package) - node.level + 1] if node.level else ()
    origin = ".".join((*base, *filter(None, [node.module])))
    for alias in node.names:
        module = f"{origin}.{alias.name}"
        yield module if module.partition(".")[2] in MODULES else origin


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and full name of everything that a file imports, in functions and for types too."""
    package = ("pgdbpool", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, name) for name in names(node, package))


def own_imports() -> Iterator[Import]:
    """Yield the imports within the package."""
    for path in FILES:
        for line, name in imports(path):
            root, _, imported = name.partition(".")
            if root == "pgdbpool":
                yield Import(module_of(path), line, imported)


def test_every_file_is_in_a_room_of_the_table() -> None:
    assert {room_of(module) for module in MODULES} == set(ROOMS)


def test_rooms_import_only_rooms_above_them() -> None:
    above: set[str] = set()
    for room, allowed in ROOMS.items():
        assert set(allowed.split()) <= above, room
        above.add(room)


@pytest.mark.slow
def test_a_room_imports_only_what_the_table_allows() -> None:
    wrong = [
        f"{module or '__init__'}:{line} imports {imported or 'the package'}"
        for module, line, imported in own_imports()
        if room_of(module) != room_of(imported) and room_of(imported) not in ROOMS[room_of(module)].split()
        # The version, and the names of the package as an application has them.
        if not (imported == "" and room_of(module) in ("_cli", "otel"))
    ]
    assert not wrong


@pytest.mark.slow
def test_the_table_allows_nothing_that_no_file_needs() -> None:
    used = {(room_of(module), room_of(imported)) for module, _, imported in own_imports()}
    unused = [
        f"{room} imports {name}"
        for room, allowed in ROOMS.items()
        for name in allowed.split()
        if (room, name) not in used
    ]
    assert not unused


@pytest.mark.slow
def test_no_files_import_each_other_in_a_circle() -> None:
    uses: dict[str, set[str]] = {}
    for module, _, imported in own_imports():
        # A package's `__init__` has no part in a circle through the files in it, unless it imports them.
        if module and imported and not (module.startswith(f"{imported}.") and imported in ROOMS):
            uses.setdefault(module, set()).add(imported)
    while leaves := {module for module, imported in uses.items() if not imported & uses.keys()}:
        for module in leaves:
            del uses[module]
    assert not uses


@pytest.mark.slow
def test_one_file_alone_knows_psycopg_pool() -> None:
    users = {
        module_of(path)
        for path in FILES
        for _, name in imports(path)
        if name.partition(".")[0] == "psycopg_pool"
    }
    assert users == {"_lending.threaded_pool"}


@pytest.mark.slow
def test_importing_the_package_loads_the_core_and_nothing_else() -> None:
    code = "import sys, pgdbpool; print(*sorted(m for m in sys.modules if m.startswith('pgdbpool.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {module.partition(".")[2] for module in done.stdout.split()}
    core = {module for module in MODULES if room_of(module) in CORE}
    assert loaded == core - LATE | NEEDED_EARLY


@pytest.mark.slow
def test_the_package_shows_public_names_alone() -> None:
    code = "import pgdbpool; print(*[n for n in dir(pgdbpool) if not n.startswith('_')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - set(pgdbpool.__all__) == {"errors"}
    assert len(list(PACKAGE.iterdir())) - (PACKAGE / "__pycache__").exists() <= 30


@pytest.mark.parametrize(
    "room", [room for room in ROOMS if room.startswith("_") and (PACKAGE / room).is_dir()]
)
def test_a_room_says_what_lives_there_and_what_must_not(room: str) -> None:
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8")))
    assert text is not None
    first, _, second = text.partition("\n\n")
    assert first.endswith(".")
    assert second.endswith(".")


HOLDERS = {"conn", "connection", "heir", "other", "spare"}
"""Names of variables that hold a connection."""


def written(path: Path, names: set[str], holders: set[str]) -> Iterator[tuple[str, str]]:
    """Yield function and attribute of each assignment to one of these attributes of a connection."""
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if (
                    isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr in names
                    and isinstance(node.value, ast.Name) and node.value.id in holders
                ):  # fmt: skip
                    yield function.name, node.attr


def test_a_connection_is_changed_in_its_room_alone() -> None:
    own = {*ConnectionState.__slots__, *ConnectionState.__annotations__}
    elsewhere = [path for path in FILES if room_of(module_of(path)) != "_session"]
    changed = {name for path in elsewhere for _, name in written(path, own, HOLDERS)}
    assert changed == {"block", "lent", "used_at"}  # in one step with other notes of the pool


def test_what_a_block_leaves_is_noted_in_one_place() -> None:
    noted = {"touched", "altered", "handed_out"}
    functions = {function for path in FILES for function, _ in written(path, noted, {*HOLDERS, "self"})}
    assert functions == {"__init__", "mark", "keep_touched", "restore_attributes", "_hand_over"}


def test_no_file_has_more_than_500_lines_but_the_declarations() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert [path.name for path, number in lines.items() if number > 500] == ["model.py"]

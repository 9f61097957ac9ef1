"""Imports point one way, so that every module can be read with those above it alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pgdbpool

PACKAGE = Path(pgdbpool.__file__).parent

# A module imports only what stands before it. What is not listed may import all of these, and none of
# these imports it: commands, middlewares, the embedded cluster.
ORDER = [
    "categories", "client_settings",
    "errors", "events", "asking", "keys", "foreign", "kinds", "transaction_modes", "setting_kinds", "config",
    "names", "credentials", "arrival", "validation",
    "check_servers", "check_groups", "yamlfile", "sources",
    "tally", "stats", "scope", "tracing", "rows", "statements", "pooled", "tenant", "deadlines", "preamble",
    "prepared", "decoding", "greenlets", "guests", "outcome", "session", "ended", "timing", "cursors",
    "copying", "queries", "_rls_catalog", "_rls_probe", "_rls_findings", "rls",
    "driver", "probe", "sight", "roundtrip", "endpoint", "balance", "pools", "ratelimit", "hooks", "left",
    "group", "oneshots", "observer", "vigil", "patroni", "holds", "runtime", "publisher", "doubts", "monitor",
    "changes", "shutdown", "sizing", "health", "connection", "handler", "retry", "pool",
]  # fmt: skip
# Of these, imported only when they are needed: at `init`, at a connect, for tenants, for signals, for YAML.
LATE = {
    "rls", "shutdown", "_rls_catalog", "_rls_probe", "_rls_findings", "pool", "sizing", "health", "runtime",
    "publisher", "yamlfile", "config", "setting_kinds", "validation", "check_servers", "check_groups",
    "sources", "stats", "driver", "foreign", "patroni", "decoding",
}  # fmt: skip
HANDWRITTEN = sorted(path for path in PACKAGE.rglob("*.py") if "demo_app" not in path.parts)


def module_of(path: Path) -> str:
    """Return a file's module without the package's name; the package itself is the empty string."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and full name of each module imported when the program runs, also inside functions."""
    package = ("pgdbpool", *path.relative_to(PACKAGE).parent.parts)
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*base, *filter(None, [node.module])))
            if origin == "pgdbpool":  # from . import rows
                yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, origin
        todo += ast.iter_child_nodes(node)


def own_imports() -> Iterator[tuple[str, int, str]]:
    """Yield module, line and imported module of all imports within the package."""
    modules = {module_of(path) for path in HANDWRITTEN}
    for path in HANDWRITTEN:
        for line, name in imports(path):
            root, _, imported = name.partition(".")
            if root == "pgdbpool":
                # A name that is no module (`from . import __version__`) comes from the package itself.
                yield module_of(path), line, imported if imported in modules else ""


def test_every_module_of_the_order_exists() -> None:
    assert set(ORDER) <= {module_of(path) for path in HANDWRITTEN}


def test_imports_point_one_way() -> None:
    place = {module: number for number, module in enumerate(ORDER)}
    wrong = [
        f"{module}.py:{line} imports {imported or 'the package'}, which comes after it"
        for module, line, imported in own_imports()
        if module in place and place.get(imported, len(ORDER)) >= place[module]
    ]
    assert not wrong


def test_what_comes_after_the_core_has_no_cycle_either() -> None:
    uses: dict[str, set[str]] = {}
    for module, _, imported in own_imports():
        if module and imported:
            uses.setdefault(module, set()).add(imported)
    while leaves := {module for module, imported in uses.items() if not imported & uses.keys()}:
        for module in leaves:
            del uses[module]
    assert not uses


def test_one_module_alone_knows_psycopg_pool() -> None:
    users = {
        module_of(path)
        for path in HANDWRITTEN
        for _, name in imports(path)
        if name.partition(".")[0] == "psycopg_pool"
    }
    assert users == {"pools"}


def test_importing_the_package_loads_the_core_and_nothing_else() -> None:
    code = "import sys, pgdbpool; print(*sorted(m for m in sys.modules if m.startswith('pgdbpool.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {module.partition(".")[2] for module in done.stdout.split()}
    assert loaded == set(ORDER) - LATE

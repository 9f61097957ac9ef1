"""The documentation's tables, plots and figures, out of the JSON; its text is in doc/benchmarks.rst."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import targets
from .plots import draw
from .tables import as_rst, number, tables


def render(results: dict[str, Any], directory: Path) -> Iterator[Path]:
    """Write a file for each part, one for the targets, one for the machine, and the plots; yield them."""
    parts = {name: part["found"] for name, part in results["parts"].items()}
    directory.mkdir(parents=True, exist_ok=True)
    texts = {name: "\n".join(map(as_rst, tables(name, found))) for name, found in parts.items()}
    texts["targets"] = as_rst(targets.as_table(parts))
    texts["machine"] = machine(results)
    texts["figures"] = figures(parts)
    for name, text in texts.items():
        path = directory / f"{name}.inc"
        path.write_text(text.rstrip() + "\n")
        yield path
    yield from draw(parts, directory)


def machine(results: dict[str, Any]) -> str:
    """Say which machine and versions the figures are of."""
    about = results["machine"]
    lines = [
        f"- {about['processor']}, {about['cores']} cores, {about['memory']}, {about['system']}",
        f"- {about['python']}, PostgreSQL {about['postgresql']}, libpq {about['libpq']}",
        "- " + ", ".join(f"{name} {version}" for name, version in about["packages"].items()),
    ]
    dates = sorted({part["date"] for part in results["parts"].values()})
    quick = [name for name, part in results["parts"].items() if part["quick"]]
    lines.append(
        f"- measured on {' and '.join(dates)}" + (f"; with --quick: {', '.join(quick)}" if quick else "")
    )
    return "\n".join(lines)


def figures(parts: dict[str, Any]) -> str:
    """Define what the page's text calls by name: each target's figure, and that of the peer beside it."""
    lines = []
    for target in targets.TARGETS:
        for name, of in ((target.name, target.value), (f"{target.name}_peer", target.peer)):
            value = targets.measured(target, parts, of)
            text = "(not measured)" if value is None else number(value)
            lines.append(f".. |{name}| replace:: {text}")
    steps = parts.get("bookkeeping", {}).get("steps", {}).get("read", {})
    for name, peer in (("bare", "bare"), ("own", "pgdbpool"), ("checked", "psycopg_pool-check")):
        text = number(steps[peer]["bytecodes"]) if peer in steps else "(not measured)"
        lines.append(f".. |{name}_steps| replace:: {text}")
    return "\n".join(lines)

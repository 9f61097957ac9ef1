"""The output of commands: tables, colours and progress on a terminal, JSON for programs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import IO, Any, Protocol

from ..rls import Finding

GOOD, BAD, WARN, BOLD, DIM = "32", "31", "33", "1", "2"
COLOURS = {
    **dict.fromkeys(("ok", "healthy", "yes", "up", "done"), GOOD),
    **dict.fromkeys(("broken", "unhealthy", "no", "error", "down", "failed"), BAD),
    **dict.fromkeys(("degraded", "warning", "draining", "silent"), WARN),
}
EXIT = {"ok": 0, "healthy": 0, "broken": 1, "unhealthy": 1, "degraded": 3}
"""Exit status by the worst finding."""


class Commands(Protocol):
    """The result of argparse's `add_subparsers`."""

    def add_parser(self, name: str, **options: Any) -> argparse.ArgumentParser:
        """Add a sub-command."""


def colourful(stream: IO[str]) -> bool:
    """Return whether colours are wanted: on a terminal, unless NO_COLOR is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str | None = None) -> str:
    """Return text in a colour, that of the word itself by default, if standard output has colours."""
    code = COLOURS.get(text.strip()) if colour is None else colour
    return f"\033[{code}m{text}\033[0m" if code and colourful(sys.stdout) else text


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], width: int | None = None, spare: Sequence[str] = ()
) -> str:
    """Return lines with aligned columns; words that have a colour get it.

    :param width: the width of the screen, which no line exceeds; None for any.
    :param spare: columns to leave out, in this order, if not all fit.
    """
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    shown = list(range(len(head)))
    for name in spare:
        if width is not None and sum(widths[column] + 2 for column in shown) - 2 > width:
            shown.remove(list(head).index(name))
    texts = []
    for number, line in enumerate(lines):
        left, cells = sys.maxsize if width is None else width, []
        for column in shown:
            cell = cut(line[column], left)
            cells.append(cell if column == shown[-1] else cell.ljust(min(widths[column], max(left, 0))))
            left -= widths[column] + 2
        texts.append("  ".join(paint(cell, BOLD if number == 0 else None) for cell in cells if cell).rstrip())
    return "\n".join(texts)


def cut(text: str, width: int) -> str:
    """Return a text that is not longer than the width; an ellipsis stands for the rest."""
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…" if width > 0 else ""


def show_findings(findings: Sequence[Finding]) -> None:
    """Print findings with their remedies; a finding common to several servers is printed once."""
    same: dict[tuple[str, str, str, str], list[str]] = {}
    for found in findings:
        same.setdefault((found.severity, found.code, found.message, found.remedy), []).append(found.subject)
    for (severity, code, message, remedy), subjects in same.items():
        print(f"\n{paint(severity)} {code}: {paint(', '.join(subjects), BOLD)}")
        print(f"    {message}")
        if remedy:
            print(f"    remedy: {remedy}")


def show_json(value: Any) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=2))


class Progress:
    """One line of progress on standard error, on terminals only."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def __call__(self, text: str) -> None:
        if self._shown:
            print(f"\r\033[K{text} ...", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def milliseconds(seconds: float | None) -> str:
    """Return a duration in milliseconds, or a dash."""
    return "-" if seconds is None else f"{seconds * 1000:.2f} ms"


def optional(value: object) -> str:
    """Return a value as a cell of a table."""
    return "-" if value is None else str(value)


def new_parser(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    brief: str,
    text: str,
    exits: str,
) -> argparse.ArgumentParser:
    """Add a sub-command with its help, its exit status and `--json`."""
    parser = commands.add_parser(
        name,
        help=brief,
        description=text,
        epilog=f"Exit status: {exits}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=run)
    return parser


def whole(least: int, most: int) -> Callable[[str], int]:
    """Return argparse's converter for a whole number in a range."""

    def number(text: str) -> int:
        value = int(text) if text.isdecimal() else -1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return value

    return number


def seconds(text: str) -> float:
    """Return argparse's value for a time above 0, in seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0, up to 86400")
    return value

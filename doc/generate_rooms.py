"""Draws the rooms of the package and what each imports: `python doc/generate_rooms.py [--check]`.

An arrow is left out if a longer way leads to the same room.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pgdbpool

PICTURE = Path(__file__).parent / "pictures" / "rooms.svg"
PACKAGE = Path(pgdbpool.__file__).parent
WIDTH, ROW, HEIGHT = 1000, 80, 34
STYLE = """
  text { font: 14px sans-serif; text-anchor: middle; fill: #1f2328; }
  rect { fill: #eef4fb; stroke: #5b7ea6; }
  rect.public { fill: #eaf6ec; stroke: #4f8a5b; }
  path { fill: none; stroke: #8a94a0; marker-end: url(#end); }
  marker path { fill: #8a94a0; stroke: none; }
  .paper { fill: #ffffff; stroke: none; }"""


def imported_by(path: Path) -> Iterator[str]:
    """Yield the rooms that a file imports, in functions and for types too."""
    package = ("pgdbpool", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            origin = (*base, *(node.module or "").split("."))
            for alias in node.names:
                yield next(filter(None, (*origin[1:], alias.name)))


def rooms() -> dict[str, set[str]]:
    """Return each room of the package with the rooms that it imports."""
    found: dict[str, set[str]] = {}
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room not in ("__init__", "__main__", "demo_app"):
            found.setdefault(room, set()).update(name for name in imported_by(path) if name in names)
    return {room: used & found.keys() - {room} for room, used in found.items()}


def reduced(uses: dict[str, set[str]]) -> dict[str, set[str]]:
    """Leave out what is reached by a longer way."""

    def reach(room: str) -> set[str]:
        return uses[room].union(*map(reach, uses[room]))

    return {room: used - set().union(*map(reach, used)) for room, used in uses.items()}


def levels(uses: dict[str, set[str]]) -> dict[str, int]:
    """Return how far up each room stands: just below the lowest that imports it."""

    def depth(room: str) -> int:
        return 1 + max(map(depth, uses[room]), default=-1)

    level = {room: depth(room) for room in uses}
    for room in sorted(uses, key=lambda room: -level[room]):
        users = [level[user] for user in uses if room in uses[user]]
        level[room] = min(users, default=level[room] + 1) - 1
    return level


def ways(uses: dict[str, set[str]], level: dict[str, int]) -> list[list[str]]:
    """Return each arrow as the places that it passes: one in each row, so that it crosses no room."""
    return [
        [room, *(f"{room} {name} {between}" for between in range(level[room] - 1, level[name], -1)), name]
        for room, used in sorted(uses.items())
        for name in sorted(used)
    ]


def places(arrows: list[list[str]], level: dict[str, int]) -> dict[str, tuple[float, int]]:
    """Return where the middle of each room, and of each place on an arrow, is."""
    rows: dict[int, list[str]] = {}
    for room in sorted(level):
        rows.setdefault(level[room], []).append(room)
    below: dict[str, list[str]] = {}
    for arrow in arrows:
        for number, name in enumerate(arrow[:-1]):
            below.setdefault(name, []).append(arrow[number + 1])
            if number:
                rows[level[arrow[0]] - number].append(name)
    at: dict[str, float] = {}
    for height in sorted(rows):  # from the bottom: each above the middle of what it leads to
        row = rows[height]
        row.sort(key=lambda name: sum(at[n] for n in below.get(name, ())) / (len(below.get(name, ())) or 1))
        at |= {name: (number + 0.5) / len(row) for number, name in enumerate(row)}
    top = max(rows)
    return {name: (WIDTH * at[name], 20 + ROW * (top - height)) for height in rows for name in rows[height]}


def picture() -> str:
    """Return the picture as SVG."""
    uses = reduced(rooms())
    level = levels(uses)
    arrows = ways(uses, level)
    at = places(arrows, level)
    height = max(y for _, y in at.values()) + HEIGHT + 20
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        "<title>The rooms of the package; an arrow leads to a room that is imported</title>",
        f"<style>{STYLE}\n</style>",
        '<defs><marker id="end" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8"'
        ' orient="auto"><path d="M0 0 8 4 0 8z"/></marker></defs>',
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>',
    ]
    for arrow in arrows:
        x, y = at[arrow[0]]
        way, y = f"M{x:.0f} {y + HEIGHT}", y + HEIGHT
        for name in arrow[1:]:
            to_x, to_y = at[name]
            way += f" C{x:.0f} {y + 30} {to_x:.0f} {to_y - 30} {to_x:.0f} {to_y}"
            if name is not arrow[-1]:
                way += f" V{to_y + HEIGHT}"
            x, y = to_x, to_y + HEIGHT
        lines.append(f'<path d="{way}"/>')
    for room in sorted(level):
        x, y = at[room]
        wide = 22 + 8 * len(room)
        kind = "" if room.startswith("_") else ' class="public"'
        lines.append(f'<rect{kind} x="{x - wide / 2:.0f}" y="{y}" width="{wide}" height="{HEIGHT}" rx="6"/>')
        lines.append(f'<text x="{x:.0f}" y="{y + 22}">{room}</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    if "--check" not in sys.argv:
        PICTURE.write_text(picture(), encoding="utf-8")
    elif not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != picture():
        sys.exit(f"{PICTURE.name} is out of date: run python doc/{Path(__file__).name}")

"""The samples of the documentation: blocks of code in its pages and in README."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "doc").rglob("*.rst"))
README = ROOT / "README.md"


class Sample(NamedTuple):
    """A block of code in a page."""

    page: Path
    line: int
    """The first line of the code."""
    language: str
    marks: str
    text: str
    caption: str


def samples(page: Path) -> Iterator[Sample]:
    """Yield the blocks of code of a page in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        head = re.match(r"( *)\.\. code-block:: (\w+)$", lines[number])
        fence = re.match(r"( *)```(\w+)$", lines[number])
        before, number, caption = number, number + 1, ""
        if head:
            marks, indent = "", len(head[1]) + 3
            while lines[number].strip().startswith(":"):
                marks += lines[number].partition(":class:")[2]
                caption += lines[number].partition(":caption:")[2].strip()
                number += 1
            start = number + 1
            number = start
            while number < len(lines) and (not lines[number].strip() or lines[number][:indent].isspace()):
                number += 1
        elif fence:
            marks, indent, start = lines[max(before - 1, 0)].strip("<!-> "), len(fence[1]), number
            while lines[number].strip() != "```":
                number += 1
        else:
            continue
        text = "\n".join(line[indent:] for line in lines[start:number]).rstrip() + "\n"
        yield Sample(page, start, (head or fence)[2], marks.strip(), text, caption)


ALL = [sample for page in (*PAGES, README) for sample in samples(page)]


def name(sample: Sample) -> str:
    return f"{sample.page.relative_to(ROOT)}:{sample.line}"

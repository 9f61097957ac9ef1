"""A text that is shown repeatedly, on a terminal with keys."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .._cli import output

HOME, CLEAR_LINE, CLEAR_REST = "\x1b[H", "\x1b[K", "\x1b[J"
OTHER_SCREEN, FIRST_SCREEN = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"

RATE_OVER = 3.0
"""Seconds between the views from which rates are computed: processes publish once a second."""

View = Mapping[str, Any]
Show = Callable[["View | None", int, str], "tuple[View, str]"]
"""Makes a view and its text, from an earlier view, the width of the screen and the column to sort by."""


def watch(show: Show, every: float, sorts: Sequence[str], sort: str) -> int:
    """Show a view every few seconds, until `q`; `s` sorts by the next column."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    views: deque[View] = deque()
    with _keys() if terminal else contextlib.nullcontext():
        while True:
            if not terminal:
                _, text = show(None, sys.maxsize, sort)
                print(text, flush=True)
                time.sleep(every)
                continue
            width, height = os.get_terminal_size()
            view, text = show(views[0] if views else None, width, sort)
            views.append(view)
            while len(views) > 1 and views[1]["time"] <= view["time"] - RATE_OVER:
                views.popleft()
            _draw(text, width, height)
            for key in _pressed(every):
                if key in ("q", "Q", ""):
                    return 0
                if key == "s":
                    sort = sorts[(sorts.index(sort) + 1) % len(sorts)]


def _draw(text: str, width: int, height: int) -> None:
    """Draw a text in place of the last one, without a line that wraps or a screen that scrolls."""
    lines = text.splitlines()
    if len(lines) > height - 1:
        lines[height - 2 :] = [f"... {len(lines) - height + 2} lines more"]
    lines.append("q: end   s: sort by the next column")
    shown = [line if "\x1b" in line else output.cut(line, width) for line in lines]
    sys.stdout.write(HOME + "\n".join(line + CLEAR_LINE for line in shown) + CLEAR_REST)
    sys.stdout.flush()


def _pressed(seconds: float) -> Iterator[str]:
    """Yield the keys of the first input within some seconds; an empty one means the end of the input."""
    ready, _, _ = select.select([sys.stdin], [], [], seconds)
    if ready:
        yield from os.read(sys.stdin.fileno(), 64).decode("ascii", "replace") or [""]


@contextlib.contextmanager
def _keys() -> Iterator[None]:
    """Have the terminal give each key at once, on a separate screen; undo both at the end."""
    import termios
    import tty

    number = sys.stdin.fileno()
    before = termios.tcgetattr(number)
    tty.setcbreak(number)
    sys.stdout.write(OTHER_SCREEN)
    try:
        yield
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)
        sys.stdout.write(FIRST_SCREEN)
        sys.stdout.flush()

"""An order to all processes of a `runtime_dir`, and their answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .runtime_dir import RuntimeDir

LOOK_EVERY = 0.1
"""Seconds between two looks for answers."""


class Answer(NamedTuple):
    """What became of an order in one process."""

    pid: int
    done: bool | None
    """None if the process has not answered in time."""
    text: str


def give(
    room: RuntimeDir,
    order: Mapping[str, Any],
    deadline: float,
    watch: Callable[[int], object] = lambda _: None,
) -> list[Answer]:
    """Give an order to the processes that publish now, and return what each of them answers.

    A process that exits meanwhile has nothing more to do, and holds nothing up.

    :param order: what `RuntimeDir.order` takes.
    :param deadline: when to stop waiting, on the clock of `monotonic`.
    :param watch: is called with the number of processes that have not answered yet.
    :raises RuntimeDirError: the order cannot be given.
    """
    asked = {_key(snapshot): snapshot for snapshot in room.snapshots()}
    number = room.order(**order)
    answers: dict[Any, Answer] = {}
    began = time.monotonic()
    while True:
        living = {_key(snapshot): snapshot for snapshot in room.snapshots()}
        for key in asked:
            if key not in answers and (answer := _answer(key, living.get(key), number)) is not None:
                answers[key] = answer
        missing = asked.keys() - answers.keys()
        watch(len(missing))
        if not missing or time.monotonic() >= deadline:
            break
        time.sleep(LOOK_EVERY)
    waited = time.monotonic() - began
    for key in missing:
        answers[key] = Answer(key[0], None, _silence(asked[key], waited))
    return sorted(answers.values())


def await_quiet(room: RuntimeDir, groups: Sequence[str] | None, deadline: float) -> dict[int, int]:
    """Wait until no block is open in the groups; return the number of those that are, by process."""
    while True:
        in_use = {
            snapshot["status"]["pid"]: sum(
                group["in_use"]
                for name, group in snapshot["status"]["groups"].items()
                if groups is None or name in groups
            )
            for snapshot in room.snapshots()
        }
        busy = {pid: number for pid, number in in_use.items() if number}
        if not busy or time.monotonic() >= deadline:
            return busy
        time.sleep(LOOK_EVERY)


def _key(snapshot: Mapping[str, Any]) -> tuple[int, float]:
    """Return what tells a process from a later one with the same number."""
    return snapshot["status"]["pid"], snapshot["started"]


def _answer(key: tuple[int, float], snapshot: Mapping[str, Any] | None, number: int) -> Answer | None:
    if snapshot is None:
        return Answer(key[0], True, "has exited")
    found = next((answer for answer in snapshot["answers"] if answer["n"] == number), None)
    return None if found is None else Answer(key[0], found["done"], found["text"])


def _silence(snapshot: Mapping[str, Any], waited: float) -> str:
    if snapshot["status"]["type"] != "threaded":
        return f"no answer within {waited:.0f} s: without threads it takes orders at its next block"
    return f"no answer within {waited:.0f} s: it is stopped or stuck, or runs no Python (the master of uWSGI)"

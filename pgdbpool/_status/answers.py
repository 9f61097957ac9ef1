"""An order to all processes of a `runtime_dir`, and their answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .runtime_dir import RuntimeDir, replaces

LOOK_EVERY = 0.1
"""Seconds between two checks for answers."""
OVERTAKEN_WITHIN = 2.0
"""Seconds for the answers to an order that a later one has replaced."""


class Answer(NamedTuple):
    """The outcome of an order in one process."""

    pid: int
    done: bool | None
    """None if the process has not answered in time."""
    text: str
    set: str = ""
    """The name of its set of pools; empty for the default one."""


def give(
    room: RuntimeDir,
    order: Mapping[str, Any],
    deadline: float,
    watch: Callable[[int], object] = lambda _: None,
) -> list[Answer]:
    """Give an order to the processes that publish now, and return the answer of each.

    A process that exits meanwhile has nothing more to do, and delays nothing. Each set of pools of a
    process answers for itself, if the order is for it.

    :param order: as for `RuntimeDir.order`.
    :param deadline: when to stop waiting, on the clock of `monotonic`.
    :param watch: is called with the number of processes that have not answered yet.
    :raises RuntimeDirError: the order cannot be given.
    """
    asked = {_key(snapshot): snapshot for snapshot in _concerned(room.snapshots(), order)}
    number = room.order(**order)
    answers: dict[Any, Answer] = {}
    began = time.monotonic()
    successor = ""
    while True:
        if not successor and (successor := _successor(room, order, number)):
            deadline = min(deadline, time.monotonic() + OVERTAKEN_WITHIN)
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
        answers[key] = Answer(key[0], None, successor or _silence(asked[key], waited), key[1])
    return sorted(answers.values(), key=lambda answer: (answer.pid, answer.set))


def await_quiet(
    room: RuntimeDir, groups: Sequence[str] | None, deadline: float
) -> dict[tuple[int, str], int]:
    """Wait until no block is open in the groups; return how many still are, by process and set."""
    while True:
        in_use = {
            _key(snapshot)[:2]: sum(
                group["in_use"]
                for name, group in snapshot["status"]["groups"].items()
                if groups is None or name in groups
            )
            for snapshot in room.snapshots()
        }
        busy = {key: number for key, number in in_use.items() if number}
        if not busy or time.monotonic() >= deadline:
            return busy
        time.sleep(LOOK_EVERY)


def _concerned(
    snapshots: Sequence[Mapping[str, Any]], order: Mapping[str, Any]
) -> Iterator[Mapping[str, Any]]:
    """Yield the snapshots of the sets that take an order, by the rule that the sets apply."""
    having = [
        _key(snapshot)
        for snapshot in snapshots
        if fits(order, snapshot["status"]["groups"], snapshot["status"]["endpoints"])
    ]
    pids = {pid for pid, *_ in having}
    for snapshot in snapshots:
        pid, name, _ = key = _key(snapshot)
        if key in having or (not name and pid not in pids):
            yield snapshot


def fits(order: Mapping[str, Any], groups: Container[str], endpoints: Container[str]) -> bool:
    """Return whether a set of pools has the group, or else the server, that an order names."""
    if (group := order.get("group")) is not None:
        return group in groups
    return order.get("endpoint") is None or order["endpoint"] in endpoints


def _key(snapshot: Mapping[str, Any]) -> tuple[int, str, float]:
    """Return the identity of a set of pools: a later process may have the same process id."""
    return snapshot["status"]["pid"], snapshot.get("set", ""), snapshot["started"]


def _answer(key: tuple[int, str, float], snapshot: Mapping[str, Any] | None, number: int) -> Answer | None:
    if snapshot is None:
        return Answer(key[0], True, "has exited", key[1])
    found = next((answer for answer in snapshot["answers"] if answer["n"] == number), None)
    return None if found is None else Answer(key[0], found["done"], found["text"], key[1])


def _successor(room: RuntimeDir, order: Mapping[str, Any], number: int) -> str:
    """Return the description of the later order that has replaced this one; empty if none has."""
    later = (new for new in room.orders() if new["n"] > number and replaces(new, order))
    return next((f"overtaken by a later {new['do']}, ordered by {new['by']}" for new in later), "")


def _silence(snapshot: Mapping[str, Any], waited: float) -> str:
    if snapshot["status"]["type"] != "threaded":
        return f"no answer within {waited:.0f} s: without threads it takes orders at its next block"
    return f"no answer within {waited:.0f} s: it is stopped or stuck, or runs no Python (the master of uWSGI)"

"""What a checkout and a checkin cost in function calls: exact, whatever the machine.

The bounds are what they were before there was anything to diagnose (leaks, histograms, correlation ids): a
block that uses none of it pays nothing for it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from support import config

from pgdbpool import Connection, Handler
from pgdbpool._request import correlation as tracing
from pgdbpool._request import deadline as deadlines
from pgdbpool._request import freshness, special

CALLS = {"threaded": (12, 25), "non-threaded": (11, 23)}
"""Of Python functions, and of those and built-in ones together."""


def calls(function: Callable[[], None]) -> tuple[int, int]:
    """Return how many calls of Python functions and of built-in ones the function makes."""
    seen: Counter[str] = Counter()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        seen[event] += 1

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return seen["call"] - 1, seen["c_call"] - 1  # but for `function` itself, and `setprofile`


@pytest.fixture(params=list(CALLS))
def mode(request: pytest.FixtureRequest, known_cluster: Any, monkeypatch: Any) -> Iterator[str]:
    for module in (tracing, deadlines, freshness, special):  # as in a process that has used none of them
        monkeypatch.setattr(module, "in_use", False)
    auto: dict[str, Any] = {"connection_count": 1}
    watched = {**auto, "leak_after": 60, "slow_block": 60, "slow_query": 60, "max_hold": 120}
    groups = {"auto": auto, "manual": {**auto, "autocommit": False}, "watched": watched}
    Connection.init(config([known_cluster.primary], request.param, **groups))
    yield str(request.param)
    Connection.reset()


@pytest.mark.parametrize("group", ["auto", "manual", "watched"])
def test_a_block_makes_no_more_calls_than_it_did(mode: str, group: str) -> None:
    def block() -> None:
        with Handler(group):
            pass

    for _ in range(3):
        block()
    python, builtin = min(calls(block) for _ in range(5))  # in one of them garbage may be collected
    most_python, most = CALLS[mode]
    assert python <= most_python
    assert python + builtin <= most


def test_a_statement_makes_no_call_for_what_its_block_does_not_use(mode: str) -> None:
    def block(group: str) -> Callable[[], None]:
        def query() -> None:
            with Handler(group) as db:
                db.query("SELECT 1")

        return query

    for group in ("auto", "watched"):
        for _ in range(8):  # prepared by then
            block(group)()
    names: set[str] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        names.add(str(frame.f_globals.get("__name__")))

    query = block("auto")
    sys.setprofile(note)
    try:
        query()
    finally:
        sys.setprofile(None)
    assert "pgdbpool._lending.group" in names
    assert not names & {
        "pgdbpool._request.correlation",
        "pgdbpool._request.freshness",
        "pgdbpool._session.guarding",
        "pgdbpool._util.log_events",
        "pgdbpool._session.slow_statements",
        "pgdbpool._util.durations",
    }

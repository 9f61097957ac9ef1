"""What a `with` block makes current is current in it and nowhere else, wherever it is interrupted."""

from __future__ import annotations

import contextvars
import gc
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

import pgdbpool
from pgdbpool._util import scoped_value as scope

KINDS: list[tuple[Callable[[Any], Any], Callable[[], Any], Any, Any]] = [
    (pgdbpool.tenant, pgdbpool.current_tenant, "one", "two"),
    (pgdbpool.deadline, lambda: round(pgdbpool.time_left() or 0, -1) or None, 1000, 500),
    (pgdbpool.correlation, pgdbpool.current_correlation, "one", "two"),
]
kinds = pytest.mark.parametrize(
    ("make", "seen", "one", "two"), KINDS, ids=["tenant", "deadline", "correlation"]
)


@kinds
def test_blocks_nest_and_each_ends_with_itself(make: Any, seen: Any, one: Any, two: Any) -> None:
    with make(one):
        assert seen() == one
        with pytest.raises(ZeroDivisionError), make(two):
            assert seen() == two
            _ = 1 / 0
        assert seen() == one

    @make(one)
    def decorated(depth: int) -> Any:
        return decorated(depth - 1) if depth else seen()

    assert [decorated(2), decorated(0), seen()] == [one, one, None]


def test_a_scope_serves_one_block_at_a_time() -> None:
    block = pgdbpool.tenant("one")
    for _ in range(2):
        with block:
            with pytest.raises(RuntimeError, match="one of its own for each"):
                block.__enter__()
            assert pgdbpool.current_tenant() == "one"
        assert pgdbpool.current_tenant() is None


@kinds
def test_a_copied_context_keeps_it_and_a_thread_has_none(make: Any, seen: Any, one: Any, two: Any) -> None:
    found: list[Any] = []
    with make(one):
        copied = contextvars.copy_context()
        thread = threading.Thread(target=lambda: found.append(seen()))
        thread.start()
        thread.join(10)
    found += [copied.run(seen), seen()]
    assert found == [None, one, None]


class Interrupt(BaseException):
    """What a signal handler raises."""


def interrupted_at(step: int, do: Callable[[], None]) -> Interrupt | None:
    """Do it, interrupted before its step of that number; return the exception, None after the last step."""
    steps = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        if frame.f_code.co_filename not in (__file__, scope.__file__):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event in ("opcode", "call"):
            steps += 1
            if steps == step:
                sys.settrace(None)
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        do()
    except Interrupt as error:
        return error
    finally:
        sys.settrace(before)
    return None


@kinds
def test_an_interruption_anywhere_leaves_nothing(make: Any, seen: Any, one: Any, two: Any) -> None:
    def inner() -> None:
        with make(two):
            pass

    def both() -> None:
        with make(one):
            inner()

    step = 1
    while interrupted_at(step, both):
        assert seen() is None, step
        with make(one):
            interrupted_at(step, inner)
            assert seen() == one, step
        step += 1
    assert step > 50


def test_an_end_that_comes_too_late_takes_nothing_from_a_later_block() -> None:
    def inner() -> None:
        with pgdbpool.tenant("two"):
            pass

    step, late = 1, 0
    gc.collect()
    gc.freeze()  # a collection for each step looks at what this test made alone
    while True:
        with pgdbpool.tenant("one"):
            error = interrupted_at(step, inner)
            if error is None:
                break
            late += pgdbpool.current_tenant() == "two"  # the traceback holds on to it
            with pgdbpool.tenant("three"):
                copied = contextvars.copy_context()
                error = None
                gc.collect()
                assert pgdbpool.current_tenant() == "three", step
            assert pgdbpool.current_tenant() == "one", step
        assert pgdbpool.current_tenant() is None, step
        assert copied.run(pgdbpool.current_tenant) == "three", step
        step += 1
    assert late, "no step of the end was ever late"

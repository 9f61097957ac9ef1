"""Fixtures of the tests of faults: pools in both modes, and figures that are asserted, printed and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import config

from pgdbpool import Connection

HERE = Path(__file__).parent
FIGURES = pytest.StashKey[list[str]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("slow")


@pytest.fixture
def start(mode: str) -> Iterator[Callable[..., None]]:
    """Initialise the pools with one group `g` over nodes or `db` entries, in each mode."""

    def init(nodes: Any, wait: bool = True, **changes: Any) -> None:
        Connection.init(config(nodes, mode, g={"connection_count": 4, **changes}), wait=wait)

    yield init
    Connection.reset()


@pytest.fixture
def measured(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Callable[..., None]:
    """A function that asserts a figure's bounds and prints it, also at the report's end and in its XML."""

    def note(
        what: str, value: float, unit: str = "s", at_most: float | None = None, at_least: float | None = None
    ) -> None:
        bounds = "".join(
            f", {word} {bound:g} {unit} allowed"
            for word, bound in (("at most", at_most), ("at least", at_least))
            if bound is not None
        )
        text = f"{what}: {value:.3g} {unit}{bounds}"
        print(text)
        record_property(what, value)
        request.config.stash.setdefault(FIGURES, []).append(f"{request.node.name}: {text}")
        assert at_most is None or value <= at_most, text
        assert at_least is None or value >= at_least, text

    return note


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if figures := config.stash.get(FIGURES, []):
        terminalreporter.section("measured")
        for figure in figures:
            terminalreporter.write_line(figure)

"""Each log record is of a declared event with the fields that it declares, and the page lists them all."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rooms import FILES, module_of, room_of
from support import config, nobody, server

from pgdbpool import Connection, Handler
from pgdbpool._util import log_events as events
from pgdbpool._util.log_events import EVENTS, FIELDS

ROOT = Path(__file__).parents[2]
ASIDE = (
    "_cli",
    "_demo",
    "_diagnosis",
    "cluster",
    "contrib",
    "metrics",
    "otel",
    "overview",
    "wsgi",
    "__main__",
)
CORE = [path for path in FILES if room_of(module_of(path)) not in ASIDE]


def calls(path: Path) -> Iterator[tuple[int, ast.Call]]:
    """Yield the calls in a file that log something, with their lines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            base = node.func.value
            if isinstance(base, ast.Name) and base.id in ("events", "logger", "logging"):
                yield node.lineno, node


def test_the_core_logs_through_declared_events_only() -> None:
    for path in CORE:
        for line, call in calls(path):
            assert isinstance(call.func, ast.Attribute)
            assert isinstance(call.func.value, ast.Name)
            if call.func.value.id != "events":
                assert path.name == "log_events.py", f"{path.name}:{line} logs past log_events.py"


def test_each_record_is_given_the_fields_that_its_event_declares() -> None:
    given: dict[str, int] = {}
    for path in CORE:
        for line, call in calls(path):
            assert isinstance(call.func, ast.Attribute)
            event = getattr(events, call.func.attr, None)
            if not isinstance(event, events.Event):
                continue
            given[event.name] = line
            names = {keyword.arg for keyword in call.keywords} - {"exc_info"}
            if (
                None not in names
            ):  # those of `tracing.told`, which are seen in test_leaks.py and test_diagnosis.py
                assert names == set(event.fields), f"{path.name}:{line}"
    assert set(given) == set(EVENTS), "declared and never logged"


def test_fields_are_declared_used_and_no_attributes_of_every_record() -> None:
    used = {field for event in EVENTS.values() for field in event.fields}
    assert used == set(FIELDS)
    taken = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
    assert not taken & (used | {"event"})


def test_the_page_lists_them() -> None:
    check = [sys.executable, str(ROOT / "doc" / "generate_log_records.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mode", ["threaded", "non-threaded"])
def test_log_records_have_the_declared_fields(
    known_cluster: Any, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    caplog.set_level(logging.DEBUG, "pgdbpool")
    nodes = [server(known_cluster.primary, label="one"), {**nobody(), "label": "gone"}]
    group = {
        "connection_count": 2,
        "slow_block": 1e-6,
        "slow_query": 1e-6,
        "annotate": True,
        "leak_stack": True,
    }
    Connection.init(config(nodes, mode, auto=group, manual={**group, "autocommit": False}))
    try:
        for name in ("auto", "manual"):
            with Handler(name) as db:
                db.query("SELECT 1")
        Connection.drain("one")
        Connection.undrain("one")
    finally:
        Connection.reset()
    records = [record for record in caplog.records if record.name == "pgdbpool"]
    common = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
    for record in records:
        found = vars(record)
        event = EVENTS[found["event"]]
        assert record.levelno == event.level
        assert set(found) - common == {"event", *event.fields}
        assert record.module != "log_events"  # the caller's place
    seen = {vars(record)["event"] for record in records}
    assert seen >= {
        "endpoint.down", "endpoint.drain", "endpoint.undrain", "connection.opened", "connection.closed",
        "block.slow", "statement.slow",
    }  # fmt: skip

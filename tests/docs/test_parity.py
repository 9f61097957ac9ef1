"""doc/parity.rst keeps its word: each row names tests that there are, or says why there is nothing."""

from __future__ import annotations

import re
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest
from written import functions_in

import pgdbpool

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "doc" / "parity.rst"


def rows() -> list[tuple[str, str, str]]:
    """Return the three cells of each row: theirs, ours, and the tests."""
    found = []
    for table in PAGE.read_text(encoding="utf-8").split(".. list-table::")[1:]:
        for row in table.split("\n   * - ")[1:]:
            cells = re.split(r"\n     -(?: |$)", row.split("\n\n")[0], flags=re.MULTILINE)
            assert len(cells) == 3, row
            found.append((cells[0], cells[1], cells[2]))
    return [row for row in found if row[2] != "Test"]


ROWS = rows()


@pytest.mark.slow
def test_every_test_that_a_row_names_exists_once() -> None:
    suite = functions_in(*TESTS.rglob("test_*.py"))
    named = {name for row in ROWS for name in re.findall(r"``(\w+)``", row[2])}
    assert {name: suite[name] for name in named} == dict.fromkeys(named, 1)


def test_every_row_has_a_test_or_says_why_not() -> None:
    assert len(ROWS) > 100
    without = [
        theirs for theirs, ours, tests in ROWS if "``test_" not in tests and not ours.startswith("Not here: ")
    ]
    assert without == []


def test_no_feature_has_two_rows() -> None:
    tables = PAGE.read_text(encoding="utf-8").split(".. list-table::")[1:]
    for table in tables:
        names = re.findall(r"\n   \* - (.*)", table)
        assert sorted(names) == sorted(set(names))


OURS = re.compile(r"``((?:Connection|Handler|pgdbpool)\.[\w.]+)")


@pytest.mark.parametrize("name", sorted({name for row in ROWS for name in OURS.findall(row[1])}))
def test_each_name_of_a_row_exists(name: str) -> None:
    head, *path = name.split(".")
    if head != "pgdbpool":
        path.insert(0, head)
    if path[0] in ("wsgi", "metrics", "otel"):
        reduce(getattr, path[1:], import_module(f"pgdbpool.{path[0]}"))
    else:
        reduce(getattr, path, pgdbpool)


# Of asyncpg 0.30.
CREATE_POOL = (
    "dsn min_size max_size max_queries max_inactive_connection_lifetime connect setup init reset loop "
    "connection_class record_class"
)
METHODS = (
    "execute executemany fetch fetchval fetchrow fetchmany copy_from_table copy_from_query copy_to_table "
    "copy_records_to_table close terminate expire_connections is_closing set_connect_args get_size "
    "get_min_size get_max_size get_idle_size"
)


def test_the_whole_pool_of_asyncpg_is_there() -> None:
    named = {name for theirs, _, _ in ROWS for name in re.findall(r"``(\w+)``", theirs)}
    assert set(f"{CREATE_POOL} {METHODS}".split()) - named == set()

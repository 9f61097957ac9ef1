"""doc/faults.rst and the tests of faults say the same: each line has its test, each test its line."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from written import functions_in

TESTS = Path(__file__).parents[1]
TABLE = TESTS.parent / "doc" / "faults.rst"


def named() -> list[str]:
    return re.findall(r"``(test_\w+)``", TABLE.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_test_that_the_table_names_exists_once() -> None:
    suite = functions_in(*TESTS.rglob("test_*.py"))
    assert {name: suite[name] for name in named()} == dict.fromkeys(named(), 1)


def test_every_test_of_faults_is_in_the_table_once() -> None:
    mentions, tests = Counter(named()), functions_in(*(TESTS / "faults").glob("test_*.py"))
    assert {name: mentions[name] for name in tests} == dict.fromkeys(tests, 1)


def test_every_line_of_the_table_has_a_test() -> None:
    lines = TABLE.read_text(encoding="utf-8").split("\n   * - ")[1:]
    assert {line.splitlines()[0] for line in lines if "``test_" not in line} == {"Fault"}

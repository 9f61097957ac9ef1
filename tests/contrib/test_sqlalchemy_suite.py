"""A part of SQLAlchemy's own dialect compliance suite; the whole is `python -m tests.sqlalchemy_suite`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.sqlalchemy_suite.__main__ import read, run_in, tell, url, worse
from tests.sqlalchemy_suite.differences import DIFFERENCES

PART = "IsolationLevelTest or ServerSideCursorsTest or InsertBehaviorTest"


@pytest.mark.slow
def test_a_part_of_the_compliance_suite_passes(known_cluster: Any, mode: str, tmp_path: Path) -> None:
    with known_cluster.primary.connect() as admin:
        admin.execute("CREATE SCHEMA test_schema")
    outcome = run_in(tmp_path, url(tmp_path, mode, known_cluster.primary), PART)
    with known_cluster.primary.connect() as admin:
        admin.execute("DROP SCHEMA test_schema CASCADE")
    assert list(outcome.values()).count("passed") > 20
    assert [name for name, way in outcome.items() if way == "failed"] == []


def test_tests_that_only_stock_passes_are_listed(capsys: Any) -> None:
    stock = {"A::a": "passed", "A::b": "skipped", "A::c": "failed"}
    assert worse({"A::a": "skipped", "A::b": "passed", "A::c": "failed"}, stock) == ["A::a"]
    assert tell("threaded", stock, stock)
    assert not tell("threaded", {}, stock)
    assert "A::a: not run: NOT KNOWN" in capsys.readouterr().out


def test_outcomes_are_read_without_the_driver_in_their_names(tmp_path: Path) -> None:
    file = tmp_path / "outcome.xml"
    file.write_text(
        '<suite><testcase classname="test_suite.ATest_postgresql+pgdbpool_16_2" name="test_a"/>'
        '<testcase classname="x.B" name="test_b"><failure/></testcase></suite>'
    )
    assert read(file) == {"ATest::test_a": "passed", "B::test_b": "failed"}


def test_the_page_has_each_difference_with_its_reason() -> None:
    page = (Path(__file__).parents[2] / "doc" / "sqlalchemy-suite.rst").read_text(encoding="utf-8")
    for name, reason in DIFFERENCES.items():
        assert f"   * - ``{name}``\n     - {reason}\n" in page

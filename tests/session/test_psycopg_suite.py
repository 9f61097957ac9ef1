"""The known differences from psycopg are few, and the documentation shows each."""

from __future__ import annotations

import re
from pathlib import Path

from psycopg_suite.differences import DIFFERENCES, MOST

PAGE = Path(__file__).parents[2] / "doc/psycopg-suite.rst"


def test_the_documentation_shows_each_difference_with_its_reason() -> None:
    rows = re.findall(r"   \* - ``(\S+)``\n     - (.+)\n", PAGE.read_text(encoding="utf-8"))
    assert dict(rows) == DIFFERENCES
    assert len(rows) <= MOST

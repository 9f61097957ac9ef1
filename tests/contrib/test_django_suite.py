"""A part of Django's own tests over the backend; the whole is `python -m tests.django_suite`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("django")
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.django_suite.__main__ import BAD, ENGINES, EXCEPTIONS, QUICK, run

WHERE = "PGDBPOOL_TEST_DJANGO"


@pytest.mark.slow
@pytest.mark.skipif(WHERE not in os.environ, reason=f"{WHERE} does not name `tests` of Django's source")
def test_a_part_of_djangos_own_tests_passes() -> None:
    bad, summary = run(ENGINES[1], Path(os.environ[WHERE]), list(QUICK), parallel=1, timeout=120)
    assert bad == set(), summary


def test_the_page_has_each_exception() -> None:
    page = (Path(__file__).parents[2] / "doc" / "howto" / "django.rst").read_text(encoding="utf-8")
    assert [name for name in EXCEPTIONS if f"``{name}``" not in page] == []


def test_what_fails_is_read_from_djangos_output() -> None:
    output = "ERROR: test_a (basic.tests.A.test_a)\nok\nFAIL: test_b (basic.tests.B.test_b)\n"
    assert BAD.findall(output) == ["test_a (basic.tests.A.test_a)", "test_b (basic.tests.B.test_b)"]

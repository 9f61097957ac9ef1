"""The rendered pages in a browser: tables that fit, samples that are copied as commands, and no internals."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import PROGRAM, Browser

pytest.importorskip("sphinx")
pytest.importorskip("furo")
pytest.importorskip("sphinx_copybutton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed"),
]

DOC = Path(__file__).parents[2] / "doc"
SIZES = pytest.mark.parametrize(("width", "mobile"), [(1280, False), (390, True)])
TABLES = ["faults", "parity", "operations/advice", "operations/symptoms", "guide/command", "log-records"]

NONE_OF = "django,flask,gunicorn,opentelemetry,prometheus_client,sqlalchemy"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built as if no extra of the package were installed."""
    out = tmp_path_factory.mktemp("pages")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-D",
        f"autodoc_mock_imports={NONE_OF}",
    ]
    built = subprocess.run(
        [*command, str(DOC), str(out)], capture_output=True, text=True, timeout=400, check=False
    )
    assert built.returncode == 0, built.stderr
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def go(browser: Browser, pages: Path, page: str) -> None:
    browser.go((pages / f"{page}.html").as_uri())


@SIZES
@pytest.mark.parametrize("page", TABLES)
def test_tables_can_be_read_without_scrolling_sideways(
    browser: Browser, pages: Path, page: str, width: int, mobile: bool
) -> None:
    browser.look(width, mobile=mobile)
    go(browser, pages, page)
    assert browser.run("document.documentElement.scrollWidth") <= width
    wider = "[...document.querySelectorAll('.content {}')].filter(e => e.scrollWidth > e.clientWidth + 1)"
    assert [browser.run(f"{wider.format(kind)}.length") for kind in ("table", "td")] == [0, 0]
    # A column of a few letters a line cannot be read.
    widths = browser.run("[...document.querySelectorAll('.content td')].map(c => c.clientWidth)")
    assert min(widths, default=999) >= (300 if mobile else 60)


def test_the_advice_fits_on_one_screen(browser: Browser, pages: Path) -> None:
    browser.look(1280, 900)
    go(browser, pages, "operations/advice")
    height = browser.run("document.querySelector('table.knobs').getBoundingClientRect().height")
    assert height < 900
    assert browser.run("document.querySelectorAll('table.knobs tbody tr').length") >= 20


def test_a_command_is_copied_without_its_prompt_and_its_output(browser: Browser, pages: Path) -> None:
    browser.look(1280)
    go(browser, pages, "operations/tasks")
    assert browser.run("document.querySelectorAll('button.copybtn').length") >= 3
    browser.run("document.addEventListener('copy', e => { window.copied = e.target.value }, true)")
    browser.click("#take-a-standby-out-for-maintenance button.copybtn")
    assert browser.run("window.copied").splitlines() == [
        "pgdbpool drain pgdbpool.yaml --endpoint db2:5432",
        "pgdbpool undrain pgdbpool.yaml --endpoint db2:5432",
    ]


def test_the_reference_begins_with_what_one_calls_first(browser: Browser, pages: Path) -> None:
    browser.look(1280)
    go(browser, pages, "api")
    names = browser.run("[...document.querySelectorAll('dt.sig .descname')].map(e => e.innerText)")
    assert names[names.index("Connection") + 1] == "init"
    assert names[names.index("Handler") + 1] == "query"
    text = browser.text(".content")
    for internal in (
        "OneShots",
        "Borrowing",
        "ReloadMethods",
        "Bases: Queries",
        "CommandTag",
        "BlockOptions",
    ):
        assert internal not in text

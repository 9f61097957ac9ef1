"""The status page under real gunicorn with four workers, in a real browser."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from chromium import PROGRAM, Browser
from site_of_processes import PASSWORD, TOKEN, Load, Site
from support import server
from support import wait_for as wait_until

from pgdbpool.cluster import Cluster

pytestmark = pytest.mark.slow

needs_chromium = pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium here: install Debian's package `chromium`, or put one in PATH"
)
PICTURES = Path(__file__).parents[2] / "doc" / "pictures"
WORKERS = ("--workers", "4", "--worker-class", "gthread", "--threads", "6")


LOW_CONTRAST = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgb(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return light(colour);
    }
    return 1;
  };
  const low = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !element.checkVisibility()) continue;
    const [a, b] = [light(rgb(getComputedStyle(element).color)), ground(element)].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) low.push(element.textContent.trim());
  }
  return low;
})()
"""
"""Returns the texts with a contrast below 4.5 to 1."""


def wait_for(condition: Callable[[], Any], what: str = "") -> Any:
    """Wait for the page: a browser on a busy machine takes its time for each look at it."""
    return wait_until(condition, 60, what)


def settings(cluster: Cluster) -> dict[str, Any]:
    names = ("db-1", "db-2", "db-3")
    return {
        "db": [
            server(node, label=name, **{"pass": PASSWORD})
            for node, name in zip(cluster.nodes, names, strict=True)
        ],
        "groups": {
            "read": {
                "connection_count": 4, "target": "prefer-standby", "max_lag": {"seconds": 10},
            },
            "write": {"connection_count": 2, "target": "primary", "autocommit": False},
        },
    }  # fmt: skip


@pytest.fixture
def site(known_cluster: Cluster, tmp_path: Path) -> Iterator[Site]:
    with Site(tmp_path, settings(known_cluster), *WORKERS) as running:
        wait_for(lambda: len(running.overview()["processes"]) == 4, "all workers publish")
        yield running


@pytest.fixture
def browser(site: Site, tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as opened:
        token = {"Authorization": f"Bearer {TOKEN}"}
        opened.call("Network.setExtraHTTPHeaders", headers=token)
        opened.look(1200)
        opened.go(site.url)
        yield opened
        assert not opened.complaints
        hosts = {urlsplit(url).netloc for url in opened.requests if not url.startswith(("about:", "data:"))}
        assert hosts == {f"127.0.0.1:{site.port}"}
        assert PASSWORD not in opened.run("document.documentElement.outerHTML")


def row_of(label: str) -> str:
    """Return the selector of an endpoint's button, by which its row is found."""
    return f"#endpoints button[aria-label$='{label}']"


def state(browser: Browser, label: str) -> str:
    """Return what the page says of an endpoint."""
    row = f"[...document.querySelectorAll('#endpoints tbody tr')].find(r => r.innerText.includes('{label}'))"
    return str(browser.run(f"{row}?.querySelector('.state').innerText ?? ''"))


@needs_chromium
def test_the_page_shows_all_processes_and_keeps_itself_current(
    site: Site, browser: Browser, known_cluster: Cluster, request: pytest.FixtureRequest
) -> None:
    pids = {str(process["pid"]) for process in site.overview()["processes"]}
    assert len(pids) == 4
    with Load(site, threads=3):
        for pid in pids:
            assert pid in browser.text("#processes")
        wait_for(lambda: "● up" in state(browser, "db-3"), what="db-3 is up")
        assert "All endpoints up" in browser.text("#summary")
        wait_for(lambda: float(browser.text("#groups figure b").replace(",", "")) > 0, "blocks are plotted")

        known_cluster.nodes[2].kill()
        wait_for(lambda: "down" in state(browser, "db-3"), "the killed standby is shown")
        assert "down" in browser.run("document.title")
        wait_for(lambda: "is down" in browser.text("#events"), what="an event tells of it")
        known_cluster.nodes[2].start()
        wait_for(lambda: "up" in state(browser, "db-3"), "the standby is back")

        browser.click(row_of("db-2"))
        wait_for(lambda: "draining" in state(browser, "db-2"), what="db-2 is drained")
        wait_for(
            lambda: site.overview()["endpoints"][1]["states"] == {"draining": 4}, what="by all processes"
        )
        wait_for(lambda: site.overview()["endpoints"][1]["connections"] == 0, what="nobody uses it")
        if request.config.getoption("--pictures"):
            take_pictures(site, browser, known_cluster)
        wait_for(lambda: browser.run(f'document.querySelector("{row_of("db-2")}").innerText') == "Undrain")
        browser.click(row_of("db-2"))
        wait_for(lambda: "up" in state(browser, "db-2"), what="db-2 is in use again")
        wait_for(lambda: site.overview()["endpoints"][1]["states"] == {"up": 4}, what="by all processes")
    assert not re.search(r"Traceback|ERROR", site.log.read_text())


def take_pictures(site: Site, browser: Browser, cluster: Cluster) -> None:
    """Keep how the page looks, in a state in which there is something to see."""
    PICTURES.mkdir(exist_ok=True)
    holder = threading.Thread(target=site.ask, args=("/?hold=12",))
    with Load(site, threads=3, path="/both?hold=0.02"), Load(site, threads=4, path="/both?hold=0.1"):
        time.sleep(50)  # so that there is something to plot
        with Load(site, threads=14, path="/both?hold=0.15"):
            time.sleep(15)
        cluster.nodes[2].kill()
        wait_for(lambda: "down" in state(browser, "db-3"), what="a standby is down")
        holder.start()
        wait_for(lambda: "thread" in browser.text("#holders"), what="somebody holds for long")
        for name, look in {
            "status-light": {"width": 1200},
            "status-dark": {"width": 1200, "scheme": "dark"},
            "status-phone": {"width": 390, "height": 844, "mobile": True},
        }.items():
            browser.look(**look)  # type: ignore[arg-type]
            (PICTURES / f"{name}.png").write_bytes(browser.screenshot(1700 if "mobile" in look else None))
        browser.look(1200)
    cluster.nodes[2].start()
    holder.join()


@needs_chromium
def test_the_page_works_by_keyboard_and_on_a_phone(site: Site, browser: Browser) -> None:
    browser.look(360, 740, mobile=True)
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth"), "nothing sticks out"
    browser.press("Tab")
    assert browser.run("document.activeElement.className") == "skip"
    for _ in range(5):
        browser.press("Tab")
        if browser.run("document.activeElement.getAttribute('aria-label')") == "Drain db-2":
            break
    # What has the focus keeps it while the page is brought up to date.
    stamp = browser.text("#summary")
    wait_for(lambda: browser.text("#summary") != stamp, what="an update")
    assert browser.run("document.activeElement.getAttribute('aria-label')") == "Drain db-2"
    browser.press("Enter")
    wait_for(lambda: "draining" in state(browser, "db-2"), what="drained by keyboard")


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_and_every_text_has_contrast(
    site: Site, browser: Browser, width: int, scheme: str
) -> None:
    browser.look(width, scheme=scheme, mobile=width < 800)
    browser.go(site.url)
    wait_for(lambda: "db-3" in browser.text("#endpoints"), what="the page is there")
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
    # WCAG 2.2, 1.4.3: https://www.w3.org/TR/WCAG22/#contrast-minimum
    assert browser.run(LOW_CONTRAST) == []


@needs_chromium
def test_the_plots_have_a_scale_and_a_span_of_time(site: Site, browser: Browser) -> None:
    wait_for(lambda: browser.text("#groups .axis"), what="the plots are there")
    axis = browser.text("#groups .axis").split()
    assert axis[1:3] == ["minute", "ago"]
    assert axis[3:5] == ["0", "to"]
    assert axis[-1] == "now"
    labels = browser.run("[...document.querySelectorAll('.plot')].map(p => p.getAttribute('aria-label'))")
    assert all(re.search(r", last \d+ minutes?: most [\d.e+]+, now", label) for label in labels)


@needs_chromium
def test_a_screen_reader_finds_tables_on_a_phone_too(site: Site, browser: Browser) -> None:
    browser.look(390, 844, mobile=True)
    browser.go(site.url)
    wait_for(lambda: "db-3" in browser.text("#endpoints"), what="the page is there")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = [node["role"]["value"] for node in nodes if not node["ignored"]]
    assert roles.count("table") >= 2
    assert {"columnheader", "rowheader", "cell"} <= set(roles)
    names = {node["name"]["value"] for node in nodes if node["role"]["value"] == "button"}
    assert {"Drain db-1", "Drain db-2", "Drain db-3"} <= names


@needs_chromium
def test_the_page_can_be_read_without_javascript(site: Site, browser: Browser) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.go(site.url)
    text = browser.text()
    assert "All endpoints up" in text
    assert "db-2" in text
    assert str(site.overview()["processes"][3]["pid"]) in text
    browser.call("Emulation.setScriptExecutionDisabled", value=False)


@needs_chromium
def test_the_page_says_that_no_process_answers(site: Site, browser: Browser) -> None:
    workers = [process["pid"] for process in site.overview()["processes"]]
    os.kill(workers[0], signal.SIGSTOP)
    try:
        wait_for(lambda: "silent" in browser.text("#processes"), "a stopped process is silent")
        assert "1 process does not answer" in browser.text("#summary")
    finally:
        os.kill(workers[0], signal.SIGCONT)
    wait_for(lambda: "silent" not in browser.text("#processes"), what="it goes on")

"""What doc/howto/uwsgi.rst says, under a real uWSGI."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from pages import Clients, Running, beside, shown, write_application
from support import wait_for

from pgdbpool.cluster import Cluster

LISTENS = r"bound to TCP address 127.0.0.1:(\d+)"
OK = (200, "hello")


@pytest.fixture
def place(known_cluster: Cluster, tmp_path: Path) -> Path:
    if not os.path.exists(beside("pyuwsgi")):
        pytest.skip("pyuwsgi is not installed: pip install pyuwsgi")
    write_application(tmp_path, known_cluster)
    ini = next(sample.text for sample in shown("uwsgi") if sample.language == "ini")
    text = ini.replace("127.0.0.1:8000", "127.0.0.1:0").replace("/srv/shop/", f"{tmp_path}/")
    assert text.count(str(tmp_path)) == 1, "the file to touch"
    (tmp_path / "shop.ini").write_text(text)
    (tmp_path / "reload").touch()
    return tmp_path


def start(place: Path, *arguments: str) -> Running:
    return Running(place, beside("pyuwsgi"), *arguments, listens=LISTENS)


def test_the_ini_of_the_page_serves_and_a_chain_reload_costs_no_request(place: Path) -> None:
    with start(place, "--ini", "shop.ini") as server:
        assert server.ask() == OK
        assert server.ask("/health/ready")[0] == 200
        assert "post buffering" not in server.log()
        with Clients(server) as clients:
            later = time.time() + 10  # uWSGI compares whole seconds
            os.utime(place / "reload", (later, later))
            wait_for(lambda: "chain reloading complete" in server.log(), 40, "all workers are replaced")
        assert set(clients.answers) == {OK}


def test_threads_are_on_without_an_option(place: Path) -> None:
    text = (
        (place / "app.py")
        .read_text()
        .replace(
            "SELECT 'hello'\").encode()", "SELECT 'hello'\").encode()\n            body = names().encode()"
        )
    )
    text += (
        "\n\ndef names():\n    import threading\n    return ' '.join(t.name for t in threading.enumerate())\n"
    )
    (place / "app.py").write_text(text)
    with start(place, "--http-socket", "127.0.0.1:0", "--wsgi-file", "app.py", "--master") as server:
        assert "python threads support enabled" in server.log()
        assert "pgdbpool-read-worker-0" in server.ask()[1]


def test_hup_ends_pyuwsgi_of_a_virtual_environment(place: Path) -> None:
    with start(place, "--ini", "shop.ini") as server:
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(40) != 0
        assert "No module named 'pyuwsgi'" in server.log()


def test_its_gevent_loop_lets_requests_run_side_by_side(place: Path, known_cluster: Any) -> None:
    pytest.importorskip("gevent")
    text = (place / "app.py").read_text().replace("SELECT 'hello'", "SELECT 'hello' FROM pg_sleep(0.5)")
    (place / "app.py").write_text(text)
    options = ("--http-socket", "127.0.0.1:0", "--wsgi-file", "app.py", "--master")
    with start(place, *options, "--lazy-apps", "--gevent", "20", "--gevent-early-monkey-patch") as server:
        with Clients(server, threads=4) as clients:
            began = monotonic()
            wait_for(lambda: clients.answers[OK] >= 8, 20)
            took = monotonic() - began
        assert set(clients.answers) == {OK}
        assert took < 3, "eight requests of half a second, four at a time"


def test_its_master_counts_as_no_process(place: Path) -> None:
    settings = (place / "pgdbpool.yaml").read_text()
    (place / "pgdbpool.yaml").write_text(f"runtime_dir: {place}/run\n{settings}")
    text = (place / "app.py").read_text()
    text += (
        "\nfrom pgdbpool.metrics import MetricsApp\n"
        "application = mount(application, '/metrics', MetricsApp())\n"
    )
    (place / "app.py").write_text(text)
    options = ("--http-socket", "127.0.0.1:0", "--wsgi-file", "app.py", "--master", "--die-on-term")
    with start(place, *options, "--processes", "2", "--threads", "2") as server:

        def processes() -> str:
            server.ask()  # until each process has had a block
            return re.findall(r"^pgdbpool_processes (\S+)", server.ask("/metrics")[1], re.MULTILINE)[0]

        wait_for(lambda: processes() == "2.0", 20, "two workers and no master")
        assert server.ask("/metrics")[1].count("pgdbpool_processes ") == 3  # with its help and type

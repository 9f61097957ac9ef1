"""The command `pgdbpool`: what it says of itself, wrong arguments, and the embedded cluster."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from commands import ROOT, Running, alive, empty_room, environment, run

import pgdbpool
from pgdbpool._cli.main import main

pytestmark = pytest.mark.slow


@pytest.fixture
def room() -> Iterator[Path]:
    with empty_room() as place:
        yield place


def test_version(room: Path) -> None:
    done = run("--version", room=room)
    assert (done.returncode, done.stdout) == (0, f"pgdbpool {pgdbpool.__version__}\n")


def test_help_names_the_commands_and_the_exit_status(room: Path) -> None:
    done = run("--help", room=room)
    assert done.returncode == 0
    for text in ("pgdbpool demo ", "pgdbpool demo --check", "pgdbpool cluster", "Exit status: 0"):
        assert text in done.stdout


@pytest.mark.parametrize("command", ["demo", "cluster"])
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "Exit status" in said
    assert "--standbys N" in said


def test_without_a_command_the_help_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "pgdbpool demo --check" in said.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["demo", "--standbys", "0"], "'0' is not a whole number from 1 to 9"),
        (["demo", "--standbys", "two"], "'two' is not a whole number from 1 to 9"),
        (["demo", "--port", "65536"], "from 0 to 65535"),
        (["demo", "--pg", "9"], "invalid choice"),
        (["demo", "--worker-class", "gevent"], "invalid choice"),
        (["demo", "--worker-class", "sync", "--threads", "4"], "a sync worker has one thread"),
        (["dmeo"], "there is no command 'dmeo'; did you mean 'demo'?"),
        (["--help-me", "satus"], "there is no command 'satus'; did you mean 'status'?"),
        (["demo", "--chekc"], "unrecognized arguments: --chekc"),
        (["cluster", "--auth", "md5"], "invalid choice"),
        (["demo", "--check", "--json"], "leave --json out"),
    ],
)
def test_wrong_arguments_are_named(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "cluster"])
def test_a_missing_extra_is_named_with_the_remedy(command: str, room: Path, tmp_path: Path) -> None:
    packages = Path(psycopg.__file__).parents[1]
    for package in packages.iterdir():
        if not package.name.startswith(("gunicorn", "pixeltable", "__editable__", "pgdbpool")):
            (tmp_path / package.name).symlink_to(package)
    path = f"{ROOT}:{tmp_path}"
    without = {"PYTHONPATH": path, "PGDBPOOL_TEST_PG_BIN": str(tmp_path)}  # -S: no other packages
    done = run(
        command, room=room, command=(sys.executable, "-S", "-m", "pgdbpool"), env=environment(room, **without)
    )
    assert done.returncode == 2, done
    assert "pip install 'pgdbpool[demo]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("auth", ["scram-sha-256", "trust"])
def test_the_cluster_comes_with_a_configuration_that_works(auth: str, room: Path, tmp_path: Path) -> None:
    with Running("cluster", "--standbys", "1", "--auth", auth, room=room) as command:
        said = command.wait_for_output("Ctrl-C stops them")
        family = command.family()
        text = said[said.index("db:") : said.index("node1  primary")]
        path = tmp_path / "pgdbpool.yaml"
        path.write_text(text)
        try:
            pgdbpool.Connection.init(path)
            with pgdbpool.Handler("write") as db:
                db.query("CREATE TABLE t (i int)")
                db.query("INSERT INTO t VALUES (1)")
            with pgdbpool.Handler("read") as db:
                assert db.query("SELECT pg_is_in_recovery()").fetchone()[0]
        finally:
            pgdbpool.Connection.reset()
        assert ("pass:" in text) is (auth != "trust")
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(15) == 0
        assert not alive(family)


def test_the_cluster_tells_scripts_what_runs_where(room: Path) -> None:
    with Running("cluster", "--standbys", "1", "--json", room=room) as command:
        found = json.loads(command.wait_for_output("\n").splitlines()[0])
        assert found["status"] == "running"
        assert [(entry["name"], entry["role"]) for entry in found["servers"]] == [
            ("node1", "primary"),
            ("node2", "standby"),
        ]
        assert {entry["pid"] for entry in found["servers"]} <= command.family()
        try:
            pgdbpool.Connection.init(found["config"])
            ports = [server["port"] for server in found["servers"]]
            with pgdbpool.Handler("write") as db:
                assert db.connection.info.port == ports[0]
            with pgdbpool.Handler("read") as db:
                assert db.connection.info.port == ports[1]
        finally:
            pgdbpool.Connection.reset()
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(15) == 0


def test_psycopg_in_python_in_place_of_its_c_code_is_reported(room: Path) -> None:
    code = """
import sys, logging
sys.modules["psycopg_binary.pq"] = sys.modules["psycopg_c"] = None
import pgdbpool
from pgdbpool._servers.driver import driver
logging.basicConfig(stream=sys.stdout, format="%(event)s %(message)s")
pgdbpool.Connection.init({"db": {"host": "127.0.0.1"}, "groups": {"g": {}}}, wait=False)
"""
    told = {}
    for implementation in ("", "python"):
        environ = environment(room, PSYCOPG_IMPL=implementation)
        done = subprocess.run(
            [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
        )
        told[implementation] = done.stdout
    assert told[""].startswith("process.slow_driver psycopg 3.")
    assert "(python), libpq " in told[""]
    assert told["python"] == "", "it was asked for"

"""`pgdbpool status` and `pgdbpool shell`, on running processes and in a real terminal."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import PYTHON, environment, run
from support import config, pid_of, server, wait_for

from pgdbpool import Connection, Handler
from pgdbpool._cli import output
from pgdbpool._cli.main import main
from pgdbpool._status.runtime_dir import RuntimeDir

pytestmark = pytest.mark.slow

SECRET = "never-to-be-shown"


@pytest.fixture
def settings(known_cluster: Any, mode: str, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A process that publishes, and a `pgdbpool.yaml` for it that needs a variable."""
    entries = [
        server(node, label=f"db{number}", host="localhost", **{"pass": SECRET})
        for number, node in enumerate(known_cluster.nodes)
    ]
    groups = {
        "read": {"connection_count": 3, "min_size": 1, "settings": {"app.key": SECRET}},
        "write": {"connection_count": 2, "target": "read-write", "autocommit": False},
    }
    found = {**config(entries, mode, **groups), "runtime_dir": str(tmp_path / "run")}
    Connection.init(found)
    written = json.loads(json.dumps(found))
    for entry in written["db"]:
        entry["pass"] = "${PASSWORD_OF_THE_APPLICATION}"
    (tmp_path / "pgdbpool.yaml").write_text(yaml.safe_dump(written))
    yield found
    Connection.reset()


def published(place: str, condition: Callable[[dict[str, Any]], Any]) -> Any:
    """Wait until the snapshot of this process meets the condition; blocks make it publish without threads."""

    def met() -> Any:
        Connection.fetchval("read", "SELECT 1")
        if not os.path.isdir(place):
            return None
        with RuntimeDir(place) as room:
            return next((condition(snapshot) for snapshot in room.snapshots()), None)

    return wait_for(met, what="it is published")


def shown(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main(["status", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_the_status_needs_none_of_the_applications_variables(
    settings: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    published(settings["runtime_dir"], bool)
    text = shown(capsys, tmp_path / "pgdbpool.yaml")
    assert "ENDPOINT  STATE  SEEN BY" in text
    monkeypatch.setenv("PGDBPOOL_CONFIG", str(tmp_path / "pgdbpool.yaml"))
    assert "GROUP  IN USE" in shown(capsys)
    # The place may come after --watch by mistake; standard output is no terminal, so it is text.
    monkeypatch.setattr("time.sleep", _stop)
    with pytest.raises(_Stopped):
        main(["status", "--watch", str(tmp_path / "pgdbpool.yaml")])
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC  1 process  by name  /", capsys.readouterr().out)


class _Stopped(BaseException):
    pass


def _stop(_: float) -> None:
    raise _Stopped


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory"),
        (["--watch", "nowhere.yaml"], "'nowhere.yaml' is not a number of seconds"),
        ([".", "--watch", "."], "--watch takes seconds, not '.': . is the place"),
        (["--sort", "age"], "invalid choice: 'age'"),
    ],
)
def test_wrong_usage_says_what_was_meant(
    words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(SystemExit):
        assert main(["status", *words]) == 1
    assert error in " ".join(capsys.readouterr().err.split())


def test_each_connection_is_shown_with_its_server_process_and_its_block(
    settings: Any, capsys: pytest.CaptureFixture[str], known_cluster: Any
) -> None:
    place = settings["runtime_dir"]
    with Handler("write", correlation_id="order-7") as db:
        pid = pid_of(db)
        db.query("SELECT 'a secret', pg_backend_pid()")

        def told(snapshot: dict[str, Any]) -> Any:
            lines = snapshot["status"]["groups"]["write"]["listing"]
            return [line for line in lines if line.get("statement")]

        (line,) = published(place, told)
        assert (line["server_pid"], line["state"], line["correlation_id"]) == (pid, "in use", "order-7")
        assert (line["endpoint"], line["thread"]) == ("db0", threading.current_thread().name)
        assert line["statement"] == "SELECT '...', pg_backend_pid()"
        assert re.search(r"test_status.py:\d+ in test_each_connection", line["place"])
        text = shown(capsys, place, "--connections")
    (row,) = [row for row in text.splitlines() if str(pid) in row]
    assert row.split()[:3] == [str(os.getpid()), "write", "db0"]
    assert "order-7" in row
    assert [row for row in text.splitlines() if re.search(r"read +db\d +\d+ +(idle|in use) ", row)]
    with known_cluster.primary.connect() as admin:
        sql = "SELECT application_name FROM pg_stat_activity WHERE pid = %s"
        assert admin.execute(sql, (pid,)).fetchone() == ("pgdbpool",)


def test_the_running_configuration_is_shown_without_secrets(
    settings: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    place = settings["runtime_dir"]
    published(place, lambda snapshot: snapshot["config"]["addresses"].get("db0"))
    Connection.resize("read", connection_count=4)
    published(place, lambda snapshot: snapshot["config"]["groups"]["read"]["connection_count"] == 4)
    text = shown(capsys, place, "--config")
    assert f"# dict, in use by {os.getpid()}" in text
    assert SECRET not in text
    told = yaml.safe_load(text)
    assert told["groups"]["read"]["settings"] == "***"
    assert told["db"]["db0"]["pass"] == "***"
    assert told["db"]["db0"]["host"] == "localhost"
    assert "127.0.0.1" in told["addresses"]["db0"]
    assert told["groups"]["write"]["target"] == "read-write"
    assert SECRET not in shown(capsys, place, "--json")


def test_tables_are_sorted_and_fit(capsys: pytest.CaptureFixture[str]) -> None:
    head, rows = ["NAME", "NUMBER", "SPARE", "TEXT"], [["a", "1", "x" * 30, "y" * 40], ["b", "2", "x", "y"]]
    for width in (200, 80, 40, 20, 5):
        lines = output.table(head, rows, width, ["SPARE"]).splitlines()
        assert max(map(len, lines)) <= width
        assert ("SPARE" in lines[0]) == (width == 200)
    assert lines[1] == "a"
    assert output.table(head, rows, 40, ["SPARE"]).splitlines()[1].endswith("yyy…")


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50)])
def test_watch_fits_the_terminal_sorts_and_ends_at_q(
    settings: Any, tmp_path: Path, width: int, height: int
) -> None:
    place = settings["runtime_dir"]
    published(place, bool)
    tmux = ["tmux", "-L", f"pgdbpool-{os.getpid()}-{width}", "-f", "/dev/null"]
    variables = environment(tmp_path, TERM="xterm", LC_ALL="C.UTF-8", PYTHONUTF8="1")

    def call(*words: str) -> str:
        return subprocess.run(
            [*tmux, *words], capture_output=True, text=True, env=variables, check=True
        ).stdout

    command = (
        " ".join([*PYTHON, "status", place, "--watch", "0.2"]) + f"; echo ended $? > {tmp_path}/ended; cat"
    )
    call("-u", "new-session", "-d", "-x", str(width), "-y", str(height), command)
    try:

        def screen() -> str:
            Connection.fetchval("read", "SELECT 1")
            return call("capture-pane", "-p")

        wait_for(lambda: "q: end" in screen(), 20, "the status is shown")
        lines = screen().rstrip("\n").splitlines()
        assert "by name" in lines[0]
        assert all(len(line) <= width for line in lines)
        assert sum(line.startswith("GROUP") for line in lines) == 1
        (head,) = [line for line in lines if line.startswith("GROUP")]
        assert ("WAIT P50" in head) == (width == 200)
        assert "BLOCKS/S" in head
        # A line that wraps would stand on two.
        assert [line for line in lines if line.startswith("db")] == [
            line for line in lines if re.match(r"db\d  +up  ", line)
        ]

        def rate() -> float:
            (row,) = [line for line in screen().splitlines() if line.startswith("read ")]
            return float(row[head.index("BLOCKS/S") :].split()[0])

        wait_for(lambda: rate() > 0, what="blocks per second")
        call("send-keys", "s")
        wait_for(lambda: "by in use" in screen(), what="sorted by the next column")
        call("send-keys", "q")
        ended = tmp_path / "ended"
        wait_for(lambda: ended.exists() and ended.read_text() == "ended 0\n", what="q ends it")
    finally:
        call("kill-server")


# The shell.


@pytest.fixture
def shell(known_cluster: Any, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    groups = {"read": {"target": "standby"}, "write": {"target": "primary", "query_timeout": "7s"}}
    entries = [server(node) for node in known_cluster.nodes]
    (tmp_path / "pgdbpool.yaml").write_text(yaml.safe_dump(config(entries, **groups)))

    def call(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return run("shell", *words, room=tmp_path, **options)

    return call


ASK = "SELECT 'standby ' || pg_is_in_recovery(), current_setting('statement_timeout')"


@pytest.mark.skipif(shutil.which("psql") is None, reason="psql is not installed")
def test_the_shell_is_on_the_server_that_the_group_would_choose(shell: Any, tmp_path: Path) -> None:
    (tmp_path / "ask.sql").write_text(ASK)
    for group, told in (("read", "standby true"), ("write", "standby false")):
        for words in ([group, "pgdbpool.yaml"], ["pgdbpool.yaml", group]):
            with (tmp_path / "ask.sql").open() as asked:
                done = shell(*words, "--program", "psql", stdin=asked)
            assert (done.returncode, told in done.stdout) == (0, True), done.stderr
            assert done.stderr.startswith(f"{group}: 127.0.0.1:")
    assert "7s" in done.stdout


def test_a_shell_that_cannot_be_opened_says_why(shell: Any, tmp_path: Path) -> None:
    done = shell("raed", "pgdbpool.yaml", "--program", "psql")
    assert done.returncode == 1
    assert "no group 'raed'" in done.stderr
    done = shell("read", "pgdbpool.yaml", env=environment(tmp_path, PATH="/nowhere"))
    assert done.returncode == 1
    assert "pgcli and psql: not installed" in done.stderr
    done = shell("read", "nowhere.yaml", "--program", "psql")
    assert "nowhere.yaml" in done.stderr

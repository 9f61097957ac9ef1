"""`pgdbpool drain`, `expire`, `pause` ... on the workers of a real gunicorn."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, time
from typing import Any

import pytest
from site_of_processes import Load, Site
from support import config, server, wait_for

from pgdbpool._cli.main import main
from pgdbpool._status.answers import give
from pgdbpool._status.runtime_dir import RuntimeDir
from pgdbpool.overview import gather

pytestmark = pytest.mark.slow

APPLICATION = """
    import logging, os
    from pathlib import Path
    from urllib.parse import parse_qs
    import pgdbpool as dbpool

    logging.basicConfig(format="%(process)d %(event)s by=%(by)s: %(message)s")
    logging.getLogger().handlers[0].addFilter(lambda record: hasattr(record, "by"))
    dbpool.Connection.init("pgdbpool.yaml")

    def application(environ, start_response):
        seconds = float(parse_qs(environ["QUERY_STRING"]).get("hold", ["0"])[0])
        status = "200 OK"
        try:
            dbpool.Connection.fetchval("read", "SELECT pg_sleep(%s)", (seconds,))
            if environ["PATH_INFO"] == "/both":
                with dbpool.Handler("write") as db:
                    db.execute("CREATE TEMPORARY TABLE t (i int) ON COMMIT DROP")
        except dbpool.Error as error:
            print(os.getpid(), repr(error), flush=True)
            status = "503 Service Unavailable"
        start_response(status, [("Content-Type", "text/plain")])
        return [str(os.getpid()).encode()]
"""
Run = Callable[..., tuple[int, list[dict[str, Any]]]]


@pytest.fixture
def settings(known_cluster: Any, tmp_path: Path) -> dict[str, Any]:
    entries = [server(node, label=f"db{number}") for number, node in enumerate(known_cluster.nodes)]
    groups = {
        "read": {"connection_count": 4, "min_size": 1, "target": "prefer-standby", "timeout": 20},
        "write": {
            "connection_count": 2,
            "min_size": 1,
            "target": "read-write",
            "autocommit": False,
            "timeout": 20,
        },
    }
    return config(entries, "threaded", **groups)


@pytest.fixture
def site(settings: dict[str, Any], tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """A function that starts the application with two workers."""
    running: list[Site] = []

    def start(mode: str = "threaded", *arguments: str) -> Site:
        path = tmp_path / "pgdbpool.yaml"
        path.write_text(json.dumps({**settings, "type": mode, "runtime_dir": str(tmp_path / "run")}))
        threads = ("--threads", "4") if mode == "threaded" else ()
        found = Site(tmp_path, settings, "--workers", "2", *threads, *arguments, application=APPLICATION)
        running.append(found)
        wait_for(lambda: found.ask("/both")[0] == 200 and len(workers(found)) == 2, 20, "two workers publish")
        return found

    yield start
    for each in running:
        each.__exit__()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: object) -> tuple[int, list[dict[str, Any]]]:
        capsys.readouterr()
        status = main([*map(str, words), "--json"])
        return status, json.loads(capsys.readouterr().out)["answers"]

    return call


def workers(site: Site) -> set[int]:
    if not os.path.isdir(site.runtime_dir):
        return set()
    return {process["pid"] for process in gather(site.runtime_dir)["processes"]}


def group(site: Site, name: str) -> dict[str, Any]:
    return next(each for each in gather(site.runtime_dir)["groups"] if each["name"] == name)


def texts(answers: list[dict[str, Any]]) -> set[str]:
    return {answer["text"] for answer in answers}


def test_a_server_is_drained_and_used_again_in_every_worker(site: Any, run: Run) -> None:
    running = site()
    status, answers = run("drain", running.runtime_dir, "--endpoint", "db1")
    assert (status, {answer["pid"] for answer in answers}) == (0, workers(running))
    assert all(answer["done"] and answer["text"].startswith("no new block goes there") for answer in answers)
    endpoint = next(e for e in gather(running.runtime_dir)["endpoints"] if e["label"] == "db1")
    assert endpoint["states"] == {"draining": 2}
    status, answers = run("undrain", running.runtime_dir, "--endpoint", "db1")
    assert (status, texts(answers)) == (0, {"in use again"})
    log = wait_for(lambda: re.findall(r"(\d+) process.ordered by=(.+?): drain db1", running.log.read_text()))
    assert {int(pid) for pid, _ in log} == workers(running)
    assert {by for _, by in log} == {f"root on {os.uname().nodename} (process {os.getpid()})"}
    assert "drain db1" in {event["endpoint"] for event in gather(running.runtime_dir)["events"]}


def test_the_last_server_of_a_group_is_not_drained_by_mistake(
    site: Any, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    running = site()
    assert main(["drain", running.runtime_dir, "--endpoint", "db0"]) == 1
    assert "the group 'write' has no other primary that is up; --force drains" in capsys.readouterr().err
    assert run("drain", running.runtime_dir, "--endpoint", "db0", "--force")[0] == 0
    assert run("drain", running.runtime_dir, "--endpoint", "db1")[0] == 0
    assert main(["drain", running.runtime_dir, "--endpoint", "db2"]) == 1
    assert "the group 'read' has no other endpoint that is up; --force drains" in capsys.readouterr().err
    status, answers = run("drain", running.runtime_dir, "--endpoint", "db2", "--force")
    assert (status, len(answers)) == (0, 2)
    assert running.ask("/")[0] == 503


def test_connections_are_replaced_and_groups_resized(site: Any, run: Run) -> None:
    running = site()
    before = group(running, "read")["opened"]
    status, answers = run("expire", running.runtime_dir, "--group", "read")
    assert (status, len(answers)) == (0, 2)
    assert all(re.fullmatch(r"\d idle replaced; none in use", answer["text"]) for answer in answers)
    wait_for(lambda: group(running, "read")["opened"] > before, what="others are opened")
    status, answers = run("expire", running.runtime_dir, "--endpoint", "db0")
    assert status == 0
    status, answers = run("resize", running.runtime_dir, "--group", "read", "--connection-count", 7)
    assert (status, texts(answers)) == (0, {"connection_count 7, min_size 1"})
    wait_for(lambda: group(running, "read")["max_size"] == 14)
    status, answers = run("resize", running.runtime_dir, "--group", "read", "--min-size", 9)
    assert (status, {answer["done"] for answer in answers}) == (1, {False})
    assert "min_size" in answers[0]["text"]
    assert group(running, "read")["max_size"] == 14


def test_the_configuration_is_read_again_or_left_as_it_is(site: Any, run: Run) -> None:
    running = site()
    path = running.place / "pgdbpool.yaml"
    changed = json.loads(path.read_text())
    changed["groups"]["read"]["connection_count"] = 3
    path.write_text(json.dumps(changed))
    status, answers = run("reload", path)
    assert (status, texts(answers)) == (0, {"read pgdbpool.yaml again"})
    wait_for(lambda: group(running, "read")["max_size"] == 6)
    path.write_text(json.dumps({**changed, "groups": {"read": {"connection_cuont": 3}}}))
    status, answers = run("reload", running.runtime_dir)
    assert status == 1
    assert all(not answer["done"] and "connection_count" in answer["text"] for answer in answers)
    assert running.ask("/both")[0] == 200


def test_a_switchover_during_a_pause_costs_no_request(site: Any, run: Run, known_cluster: Any) -> None:
    running = site()
    with Load(running, threads=4) as load:
        wait_for(lambda: load.statuses[200] > 20, 20, "the load runs")
        status, answers = run("pause", running.runtime_dir, "--for", 60)
        assert (status, len(answers), {answer["open_blocks"] for answer in answers}) == (0, 2, {0})
        assert all(answer["text"].startswith("new blocks are held; ") for answer in answers)
        wait_for(lambda: group(running, "read")["waiting"] > 0, what="blocks are held")
        assert group(running, "write")["in_use"] == 0
        known_cluster.primary.stop()
        known_cluster.standbys[0].promote()
        status, answers = run("resume", running.runtime_dir)
        assert (status, len(answers)) == (0, 2)
        answered = load.statuses[200]
        wait_for(lambda: load.statuses[200] > answered + 20, 30, "the load goes on")
    assert set(load.statuses) == {200}, running.log.read_text()


def test_workers_without_threads_take_orders_at_their_next_block(site: Any, run: Run) -> None:
    running = site("non-threaded")
    status, answers = run("expire", running.runtime_dir, "--timeout", 1)
    assert status == 3
    assert {answer["done"] for answer in answers} == {None}
    assert all("takes orders at its next block" in answer["text"] for answer in answers)
    with Load(running, threads=4, path="/?hold=0.001"):
        status, answers = run("expire", running.runtime_dir)
        assert (status, {answer["done"] for answer in answers}) == (0, {True})


def test_a_stopped_worker_is_named_and_a_dead_one_holds_nothing_up(site: Any, run: Run) -> None:
    running = site()
    stopped, dead = sorted(workers(running))
    os.kill(stopped, signal.SIGSTOP)
    try:
        os.kill(dead, signal.SIGKILL)
        began = monotonic()
        status, answers = run("expire", running.runtime_dir, "--timeout", 2)
        assert 1.9 < monotonic() - began < 6
        assert status == 3
        told = {answer["pid"]: (answer["done"], answer["text"]) for answer in answers}
        assert told[stopped][0] is None
        assert "no answer within 2 s: it is stopped or stuck" in told[stopped][1]
        assert told.get(dead, (True, "has exited")) == (True, "has exited")
    finally:
        os.kill(stopped, signal.SIGCONT)


def test_an_order_that_a_later_one_overtakes_says_so_and_waits_no_longer(site: Any) -> None:
    running = site()
    stopped = min(workers(running))
    os.kill(stopped, signal.SIGSTOP)
    try:
        with RuntimeDir(running.runtime_dir) as room:
            later: list[int] = []

            def overtake(_: int) -> None:
                if not later:
                    later.append(room.order("resume", by="another operator"))

            began = monotonic()
            pause = {"do": "pause", "by": "an operator", "until": time() + 30}
            answers = {answer.pid: answer for answer in give(room, pause, began + 20, overtake)}
        assert monotonic() - began < 5
        assert answers[stopped].done is None
        assert answers[stopped].text == "overtaken by a later resume, ordered by another operator"
    finally:
        os.kill(stopped, signal.SIGCONT)


# Without workers.


def test_what_no_process_has_is_refused_before_it_is_ordered(site: Any, capsys: Any) -> None:
    running = site()
    for words, error in (
        (
            ("expire", "--group", "raed"),
            "no process has the group 'raed'; did you mean 'read'?; there are read, write",
        ),
        (("drain", "--endpoint", "db7"), "no process has the endpoint 'db7'; did you mean"),
    ):
        assert main([words[0], running.runtime_dir, *words[1:]]) == 1
        assert error in capsys.readouterr().err
    with RuntimeDir(running.runtime_dir) as room:
        assert room.orders() == []


def test_an_order_to_nobody_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    assert main(["expire", str(tmp_path / "run")]) == 1
    assert "no process publishes its status here" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for another user")
def test_only_the_user_of_the_directory_gives_orders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run"
    place.mkdir(mode=0o700)
    os.chown(place, 12345, 12345)
    assert main(["expire", str(place)]) == 1
    assert "belongs to another user: act as that user" in capsys.readouterr().err
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["drain", "run"], "the following arguments are required: --endpoint"),
        (["resize", "run"], "the following arguments are required: --group"),
        (["resize", "run", "--group", "g"], "say the new size: --connection-count N"),
        (["pause", "run", "--for", "0"], "'0' is not a whole number from 1 to 3600"),
    ],
)
def test_wrong_arguments_are_told(words: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert error in capsys.readouterr().err

"""The directory in which processes publish their status, and who reads it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT
from support import config, pid_of, wait_for

import pgdbpool
from pgdbpool import Connection, Handler
from pgdbpool._cli.main import main
from pgdbpool._status.runtime_dir import RuntimeDir
from pgdbpool.errors import RuntimeDirError
from pgdbpool.overview import gather, overview, stranded

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "run")


@pytest.fixture
def start(known_cluster: Any, place: str) -> Iterator[Callable[..., None]]:
    def init(mode: str = "threaded", **changes: Any) -> None:
        group = {"connection_count": 3, "min_size": 1, **changes}
        Connection.init({**config(known_cluster.nodes[:2], mode, g=group), "runtime_dir": place})

    yield init
    Connection.reset()


def blocks(number: int) -> None:
    for _ in range(number):
        with Handler("g") as db:
            db.query("SELECT 1")


def told(place: str) -> list[dict[str, Any]]:
    if not os.path.isdir(place):
        return []
    with RuntimeDir(place) as room:
        return room.snapshots()


def counted(place: str) -> int:
    return int(gather(place)["groups"][0]["checkouts"])


PROGRAM = """
    import json, sys, os, time
    import pgdbpool
    from pgdbpool import Connection, Handler
    if __name__ == "__main__":
        Connection.init(json.loads(sys.argv[1]))
        for _ in range(int(sys.argv[2])):
            with Handler("g") as db:
                db.query("SELECT 1")
        time.sleep(1.2)
        with Handler("g") as db:
            db.query("SELECT 1")
        print("ready", flush=True)
        sys.stdin.read()
"""


def program(settings: dict[str, Any], number: int) -> subprocess.Popen[str]:
    """Start a process that does so many blocks and one more, and ends when its input does."""
    packages = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), json.dumps(settings), str(number)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": packages},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_nothing_is_published_without_a_directory(known_cluster: Any, mode: str) -> None:
    try:
        Connection.init(config(known_cluster.nodes, mode, g={}))
        assert Connection.runtime_dir() is None
        assert "pgdbpool._status.publisher" not in sys.modules or Connection._current().publisher is None
    finally:
        Connection.reset()


def test_a_process_tells_its_status(start: Callable[..., None], place: str, mode: str) -> None:
    start(mode)
    blocks(5)
    wait_for(lambda: blocks(1) or (told(place) and counted(place) >= 5), what="the blocks are told")
    view = gather(place)
    assert view["ok"]
    [process] = view["processes"]
    assert (process["pid"], process["type"]) == (os.getpid(), mode)
    assert {endpoint["label"] for endpoint in view["endpoints"]} == set(Connection.status().endpoints)
    assert sum(endpoint["share"] for endpoint in view["endpoints"]) == pytest.approx(1.0)
    assert any(endpoint["round_trip"] for endpoint in view["endpoints"]) == sys.platform.startswith("linux")


def test_the_files_are_for_their_user_alone(start: Callable[..., None], place: str) -> None:
    start()
    blocks(1)
    wait_for(lambda: told(place))
    assert os.stat(place).st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o077 == 0 for file in Path(place).iterdir())


def test_a_directory_that_others_may_enter_is_refused(place: str) -> None:
    os.mkdir(place, 0o755)
    with pytest.raises(RuntimeDirError, match="chmod 700"):
        RuntimeDir(place)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_refused(place: str) -> None:
    os.mkdir(place, 0o700)
    os.chown(place, 12345, 12345)
    code = "import os, sys; from pgdbpool._status.runtime_dir import RuntimeDir as Made; "
    code += "os.setuid(54321); Made(sys.argv[1])"
    RuntimeDir(place).close()  # root may look
    done = subprocess.run(
        [sys.executable, "-c", code, place], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert "Permission denied" in done.stderr or "belongs to user 12345" in done.stderr


def test_a_link_in_the_place_of_the_directory_is_refused(tmp_path: Path, place: str) -> None:
    os.mkdir(tmp_path / "elsewhere", 0o700)
    os.symlink(tmp_path / "elsewhere", place)
    with pytest.raises(RuntimeDirError):
        RuntimeDir(place)


def test_a_directory_that_cannot_be_used_is_a_warning_and_no_error(
    start: Callable[..., None], place: str, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkdir(place, 0o777)
    os.chmod(place, 0o777)
    with caplog.at_level(logging.WARNING, "pgdbpool"):
        start(mode)
        blocks(3)
        wait_for(lambda: caplog.records, what="a warning")
    assert "chmod 700" in caplog.text


def test_counts_stay_when_their_processes_have_exited(known_cluster: Any, place: str, mode: str) -> None:
    settings = {**config(known_cluster.nodes[:1], mode, g={"connection_count": 2}), "runtime_dir": place}
    first, second = program(settings, 10), program(settings, 20)
    try:
        wait_for(lambda: counted(place) == 32, what="both are counted")
        assert len(gather(place)["processes"]) == 2
        first.kill()
        first.wait(10)
        wait_for(lambda: len(gather(place)["processes"]) == 1, what="the file of the dead one is swept")
        assert counted(place) == 32
        [group] = gather(place)["groups"]
        assert group["ended"] > 0
        there = group["in_use"] + group["idle"]
        assert group["opened"] == there + group["ended"] + sum(group["discarded"].values())
        assert len(list(Path(place).glob("*.status"))) == 1
        second.communicate(timeout=20)  # it ends by itself
        with RuntimeDir(place) as room:
            assert room.snapshots() == []
            assert room.gone()["g"]["checkouts"] == 32
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def test_a_forked_child_does_not_keep_its_parents_file(start: Callable[..., None], place: str) -> None:
    start()
    blocks(1)
    wait_for(lambda: told(place))
    ready, over = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(over, b"1")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(ready, 1)
        assert len(told(place)) == 1
        Connection.close()
        assert told(place) == []
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(over)


def test_a_file_that_was_removed_is_made_again(start: Callable[..., None], place: str) -> None:
    start()
    blocks(1)
    wait_for(lambda: told(place))
    for file in Path(place).glob("*.status"):
        file.unlink()
    wait_for(lambda: told(place), what="another file")


def test_a_process_that_stands_still_with_the_lock_stops_no_other(
    start: Callable[..., None], place: str
) -> None:
    start()
    wait_for(lambda: told(place))
    dead = Path(place) / "1-00000000.status"
    dead.write_bytes(b"")
    with RuntimeDir(place) as room, open(Path(place) / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RuntimeDirError, match="a process keeps its lock: is one of them stopped"):
            room.secret()
        assert len(room.snapshots()) == 1
        assert dead.exists()
        fcntl.flock(held, fcntl.LOCK_UN)
        room.snapshots()
        assert not dead.exists()


def test_a_torn_file_is_not_read(start: Callable[..., None], place: str) -> None:
    start()
    blocks(1)
    wait_for(lambda: told(place))
    Connection.close()
    Path(place, "1-00000000.status").write_bytes(b"pgdbpool-1 0000000010 00000000\nnot that")
    assert told(place) == []


def test_a_process_stopped_between_writing_and_shortening_its_file_is_seen(place: str) -> None:
    with RuntimeDir(place, create=True) as room:
        file = room.publish(os.getpid(), {"counts": {"long": 1}})
        length = os.fstat(file.fd).st_size
        file.write({})
        os.ftruncate(file.fd, length)
        assert room.snapshots() == [{}]
        file.close()


def test_a_directory_that_cannot_be_written_is_named_and_still_read(
    place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with RuntimeDir(place, create=True) as room:
        room.publish(1, {"counts": {}}).close()  # of a process that has exited
        os.mkdir(os.path.join(place, "lock"))  # so that it fails for root too
        assert room.snapshots() == []
        for use in (room.secret, lambda: room.order("resume", by="ann")):
            with pytest.raises(RuntimeDirError, match="cannot write 'lock': Is a directory"):
                use()
    assert main(["resume", place]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_an_order_drains_in_every_process_and_in_those_that_start_later(
    start: Callable[..., None], known_cluster: Any, place: str, mode: str
) -> None:
    start(mode, balance="round-robin")
    blocks(1)
    label = known_cluster.nodes[1].label
    wait_for(lambda: blocks(1) or told(place))
    with RuntimeDir(place) as room:
        room.order("drain", endpoint=label, by="test")
        state = lambda: Connection.status().endpoints[label].state  # noqa: E731
        wait_for(lambda: blocks(1) or state() == "draining", what="the order is executed")
        start(mode)
        wait_for(lambda: blocks(1) or state() == "draining", what="by the new pools too")
        wait_for(lambda: blocks(1) or gather(place)["endpoints"][1]["state"] == "draining")
        room.order("undrain", endpoint=label, by="test")
        wait_for(lambda: blocks(1) or state() == "up", what="undrained")
        wait_for(lambda: blocks(1) or gather(place)["ok"])
    events = [(event["kind"], event["text"]) for event in gather(place)["events"]]
    assert events[0][0] == "up"
    assert ("order", "ordered by test: in use again") in events


def test_what_is_no_order_is_passed_over(
    start: Callable[..., None], place: str, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    os.mkdir(place, 0o700)
    good = {"n": 5, "do": "fly", "by": "ann", "time": time.time() + 60, "group": None, "endpoint": None}
    wrong = [
        1,
        None,
        {},
        {**good, "n": "5"},
        {**good, "do": None},
        {**good, "do": "pause"},
        {**good, "by": 1},
    ]
    Path(place, "orders.json").write_text(json.dumps({"orders": [*wrong, good]}))
    start(mode)
    blocks(1)
    wait_for(lambda: blocks(1) or (told(place) and told(place)[0]["answers"]), what="an answer")
    assert [answer["text"] for answer in told(place)[0]["answers"]] == [
        "'fly' is not an order that this version of pgdbpool knows"
    ]
    for text in ("", "[]", "{", '{"orders": 1}'):
        Path(place, "orders.json").write_text(text)
        with RuntimeDir(place) as room:
            assert room.orders() == []
            room.order("resume", by="ann")
            assert len(room.orders()) == 1


def test_lock_free_publishes_at_checkin_at_most_once_a_second(start: Callable[..., None], place: str) -> None:
    start("non-threaded")
    publisher = Connection._current().publisher
    assert publisher is not None
    published = 0
    publish = publisher._publish

    def counting() -> None:
        nonlocal published
        published += 1
        publish()

    publisher._publish = counting  # type: ignore[method-assign]
    began = time.monotonic()
    while time.monotonic() - began < 2.5:
        blocks(20)
    assert 1 <= published <= 1 + (time.monotonic() - began)


def test_publishing_takes_hardly_any_time_of_a_core(start: Callable[..., None], place: str) -> None:
    start()
    blocks(1)
    wait_for(lambda: told(place))
    publisher = Connection._current().publisher
    assert publisher is not None
    before = time.thread_time()
    for _ in range(50):
        publisher._publish()
    assert (time.thread_time() - before) / 50 < 0.01  # of a second, and there is one a second


def test_the_publisher_has_no_thread(start: Callable[..., None], place: str) -> None:
    import threading

    start()
    blocks(1)
    wait_for(lambda: told(place))
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("pgdbpool-monitor") == 1
    assert not [name for name in names if "publish" in name]


def test_long_holders_are_reported_without_values(start: Callable[..., None], place: str) -> None:
    start(leak_after=0.1)
    with Handler("g") as db:
        db.query("SELECT 'a secret', $tag$another$tag$")
        wait_for(lambda: told(place) and gather(place)["holders"], what="the holder is told")
        [holder] = gather(place)["holders"]
        assert pid_of(db)
    assert "SELECT '...'" in holder["text"]
    assert "secret" not in json.dumps(gather(place))
    assert "another" not in holder["text"]


def test_a_block_of_a_second_is_a_long_holder_also_if_a_leak_takes_longer(
    start: Callable[..., None], place: str
) -> None:
    start(leak_after=30)
    with Handler("g") as db:
        db.query("SELECT 1")
        began = time.monotonic()
        wait_for(lambda: told(place) and gather(place)["holders"], what="the holder is told")
        assert time.monotonic() - began > 0.9


# The command.


def test_status_prints_the_processes_figures(
    start: Callable[..., None], place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    start()
    blocks(3)
    wait_for(lambda: told(place) and counted(place) >= 3)
    assert main(["status", place]) == 0
    text = capsys.readouterr().out
    assert str(os.getpid()) in text
    assert "primary" in text or "standby" in text
    assert "\x1b" not in text
    assert main(["status", place, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"][0]["name"] == "g"


def test_status_reports_a_drained_endpoint_by_its_exit_status(
    start: Callable[..., None], known_cluster: Any, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    start()
    blocks(1)
    Connection.drain(known_cluster.nodes[1].label)
    wait_for(lambda: told(place) and not gather(place)["ok"])
    assert main(["status", place]) == 3
    out = capsys.readouterr().out
    assert "draining" in out
    assert "is drained" in out


def test_status_finds_the_directory_in_the_configuration(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkdir(place, 0o700)
    file = tmp_path / "pgdbpool.yaml"
    file.write_text(f"runtime_dir: {place}\ndb: {{host: 127.0.0.1}}\ngroups: {{g: {{}}}}\n")
    assert main(["status", str(file)]) == 1
    assert "no process publishes" in capsys.readouterr().out
    monkeypatch.setenv("PGDBPOOL_RUNTIME_DIR", place)
    assert main(["status"]) == 1
    monkeypatch.delenv("PGDBPOOL_RUNTIME_DIR")
    file.write_text("db: {host: 127.0.0.1}\ngroups: {g: {}}\n")
    assert main(["status", str(file)]) == 1
    assert "has no runtime_dir" in capsys.readouterr().err


def test_status_watches_until_it_is_stopped(start: Callable[..., None], place: str) -> None:
    start()
    blocks(1)
    wait_for(lambda: told(place))
    watching = subprocess.Popen(
        [sys.executable, "-m", "pgdbpool", "status", place, "--json", "--watch", "0.2"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert watching.stdout is not None
        times = [json.loads(watching.stdout.readline())["time"] for _ in range(3)]
        assert times == sorted(set(times))
    finally:
        watching.terminate()
        watching.communicate(timeout=10)


def test_an_overview_of_nothing_is_not_ok() -> None:
    assert not overview([], {}, time.time())["ok"]


def test_the_overview_is_of_this_process_alone_without_a_directory(known_cluster: Any) -> None:
    try:
        Connection.init(config(known_cluster.nodes[:1], g={"connection_count": 1}))
        blocks(2)
        view = gather()
        assert [process["pid"] for process in view["processes"]] == [os.getpid()]
        assert view["groups"][0]["checkouts"] == 2
    finally:
        Connection.reset()


def test_the_directory_comes_from_the_environment_too(place: str) -> None:
    from pgdbpool._config.load import load

    environ = {"DATABASE_URL": "postgresql://127.0.0.1/", "PGDBPOOL_RUNTIME_DIR": place}
    assert load(None, environ).runtime_dir == place
    with pytest.raises(pgdbpool.ConfigError, match=r"PGDBPOOL_RUNTIME_DIR.*absolute path"):
        load(None, {**environ, "PGDBPOOL_RUNTIME_DIR": "run"})


def test_a_link_in_the_place_of_a_file_is_an_error_with_its_remedy(
    start: Any, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start()
    wait_for(lambda: told(place))
    os.symlink(tmp_path / "elsewhere", f"{place}/.orders.json")
    assert main(["expire", place]) == 1
    error = capsys.readouterr().err
    assert "cannot write '.orders.json': Too many levels of symbolic links; remove it" in error
    assert "Traceback" not in error
    assert not (tmp_path / "elsewhere").exists()
    os.unlink(f"{place}/.orders.json")
    assert main(["expire", place]) == 0


ROLES = {"a": "primary", "b": "standby", "c": "standby"}


@pytest.mark.parametrize(
    ("target", "drained", "down", "why"),
    [
        ("read-write", "a", "", "the group 'g' has no other primary that is up"),
        ("primary", "a", "b", "the group 'g' has no other primary that is up"),
        ("read-write", "b", "", None),
        ("read-write", "b", "a", None),  # it served no block
        ("standby", "b", "c", "the group 'g' has no other standby that is up"),
        ("read-only", "b", "", None),
        ("prefer-standby", "a", "", None),
        ("any", "c", "a b", "the group 'g' has no other endpoint that is up"),
    ],
)
def test_a_drain_that_would_strand_a_group_is_known(
    target: str, drained: str, down: str, why: str | None
) -> None:
    endpoints = [
        {"label": label, "state": "down" if label in down.split() else "up", "role": role, "outdated": False}
        for label, role in ROLES.items()
    ]
    group = {"name": "g", "target": target, "connections": dict.fromkeys(ROLES, 0)}
    assert stranded({"endpoints": endpoints, "groups": [group]}, drained) == why
    endpoints.append({"label": "old", "state": "up", "role": "primary", "outdated": True})
    group["connections"] = dict.fromkeys([*ROLES, "old"], 0)
    if target != "any":
        assert stranded({"endpoints": endpoints, "groups": [group]}, drained) == why

"""The commands that look at a configuration: on healthy, degraded and broken ones, as text and as JSON."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import yaml
from commands import Running, empty_room, environment
from pgbouncer import PROGRAM, PgBouncer
from support import closed_port, config, server

from pgdbpool import Connection
from pgdbpool._cli.main import main
from pgdbpool._config.load import load
from pgdbpool._diagnosis.advice import advise
from pgdbpool._diagnosis.inspection import Facts, GroupFacts, ServerFacts
from pgdbpool.cluster import Cluster

pytestmark = pytest.mark.slow

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")

Run = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    yield
    Connection.reset()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs a command and returns its exit status and standard output."""

    def call(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        status = main([str(word) for word in words])
        return status, capsys.readouterr().out

    return call


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a configuration and returns its path."""

    def write(nodes: Any, **groups: Any) -> Path:
        path = tmp_path / "pgdbpool.yaml"
        groups = groups or {
            "read": {"target": "prefer-standby", "connection_count": 10},
            "write": {"target": "primary", "autocommit": False, "connection_count": 5},
        }
        path.write_text(yaml.safe_dump(config(nodes, **groups)))
        return path

    return write


def codes(report: dict[str, Any], severity: str | None = None) -> set[str]:
    return {f["code"] for f in report["findings"] if severity in (None, f["severity"])}


# check


def test_check_of_a_healthy_cluster(known_cluster: Cluster, run: Run, write: Any) -> None:
    path = write(known_cluster.nodes)
    status, text = run("check", path)
    assert status == 0, text
    for node in known_cluster.nodes:
        assert f"{node.label}  yes" in text
    for words in ("ROUND TRIP", "primary", "standby", "0 B, 0.0 s", "remedy: ALTER ROLE", f"{path}: ok"):
        assert words in text
    assert "\033" not in text
    status, text = run("check", path, "--json")
    report = json.loads(text)
    assert (status, report["status"]) == (0, "ok")
    assert codes(report) == {"client_connection_check_interval", "idle_in_transaction_session_timeout"}
    assert all(finding["remedy"] for finding in report["findings"])
    primary = report["endpoints"][known_cluster.primary.label]
    assert (primary["role"], primary["timeline"], primary["max_connections"]) == ("primary", 1, 100)
    assert primary["round_trip_seconds"] > 0
    assert primary["connect_seconds"] > 0
    assert report["groups"]["write"]["served_by"] == [known_cluster.primary.label]


def test_check_with_a_standby_down_is_degraded(known_cluster: Cluster, run: Run, write: Any) -> None:
    path = write(known_cluster.nodes)
    known_cluster.standbys[0].kill()
    status, text = run("check", path)
    assert status == 3
    assert f"{known_cluster.standbys[0].label}  no" in text
    assert "remedy: start the server" in text
    assert text.endswith("degraded\n")
    status, text = run("check", path, "--json")
    report = json.loads(text)
    assert (status, report["status"], codes(report, "warning")) == (3, "degraded", {"unreachable"})


def test_check_without_a_primary_is_broken(known_cluster: Cluster, run: Run, write: Any) -> None:
    path = write(known_cluster.nodes)
    known_cluster.primary.kill()
    status, text = run("check", path)
    assert status == 1
    assert "error no-server: write" in text
    status, text = run("check", path, "--json")
    report = json.loads(text)
    assert (status, report["status"], codes(report, "error")) == (1, "broken", {"no-server"})
    assert report["groups"]["read"]["served_by"]


def test_check_of_a_file_that_is_not_a_configuration(run: Run, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "pgdbpool.yaml"
    path.write_text("db: {host: a, prot: 1}\ngroups: {g: {timeout: soon}}\n")
    assert main(["check", str(path)]) == 1
    said = capsys.readouterr().err
    assert "did you mean 'port'" in said
    assert "groups.g.timeout" in said
    status, text = run("check", path, "--json")
    report = json.loads(text)
    assert (status, report["status"]) == (1, "broken")
    assert {problem["key"] for problem in report["problems"]} == {"db.prot", "groups.g.timeout"}


def test_check_compares_with_max_connections(known_cluster: Cluster, run: Run, write: Any) -> None:
    path = write(known_cluster.nodes)
    assert run("check", path, "--processes", 4)[0] == 0
    status, text = run("check", path, "--processes", 10, "--json")
    report = json.loads(text)
    assert (status, codes(report, "warning")) == (3, {"too-many-connections"})  # one left alone
    assert report["endpoints"][known_cluster.primary.label]["opens_at_most"] == 160
    status, text = run("check", path, "--processes", 40)
    assert status == 1
    assert "40 processes can open 640 connections" in text


def test_check_of_a_stopped_server_ends_in_time(known_cluster: Cluster, run: Run, write: Any) -> None:
    entries = [server(node, connect_timeout=2) for node in known_cluster.nodes]
    path = write(entries)
    known_cluster.standbys[1].pause()
    try:
        began = monotonic()
        status, text = run("check", path)
        assert status == 3
        assert monotonic() - began < 30
        assert "whether the server hangs" in text
    finally:
        known_cluster.standbys[1].resume()


def test_check_of_a_wrong_password_and_an_unknown_database(
    known_cluster: Cluster, run: Run, write: Any
) -> None:
    path = write([server(known_cluster.primary, name="nowhere")])
    status, text = run("check", path)
    assert status == 1
    assert "fix `name` or `user`" in text


def test_check_names_roles_that_see_other_tenants(known_cluster: Cluster, run: Run, write: Any) -> None:
    known_cluster.primary.execute("CREATE ROLE app LOGIN")
    tenants = {"g": {"tenant": "app.tenant_id"}}
    status, text = run("check", write([server(known_cluster.primary)], **tenants), "--json")
    assert status == 1
    assert any(code.startswith("rls-") for code in codes(json.loads(text), "error"))
    status, text = run("check", write([server(known_cluster.primary, user="app")], **tenants), "--json")
    assert status == 0, text
    tenants["g"] = {"tenant": {"setting": "app.tenant_id", "verify": "warn"}}
    assert run("check", write([server(known_cluster.primary)], **tenants))[0] == 3


def test_check_reports_two_primaries(known_cluster: Cluster, run: Run, write: Any) -> None:
    known_cluster.standbys[0].promote()
    status, text = run("check", write(known_cluster.nodes), "--json")
    (finding,) = [f for f in json.loads(text)["findings"] if f["code"] == "two-primaries"]
    assert (status, finding["subject"]) == (1, known_cluster.nodes[0].label)


def test_check_does_not_advise_existing_settings(known_cluster: Cluster, run: Run, write: Any) -> None:
    options = {"client_connection_check_interval": "2s", "idle_in_transaction_session_timeout": "60s"}
    path = write([server(known_cluster.primary, options=options)])
    assert json.loads(run("check", path, "--json")[1])["findings"] == []


def test_check_of_statements_without_a_bound_and_of_an_unused_server(
    known_cluster: Cluster, run: Run, write: Any
) -> None:
    nodes = known_cluster.nodes
    path = write(nodes[:2], g={"query_timeout": 0, "endpoints": [nodes[0].label]})
    status, text = run("check", path, "--json")
    assert status == 3
    assert codes(json.loads(text)) >= {"query_timeout", "unused-endpoint"}


def test_check_reports_a_patroni_that_does_not_answer(known_cluster: Cluster, run: Run, write: Any) -> None:
    first, *others = known_cluster.nodes
    path = write([server(first, patroni=f"http://127.0.0.1:{closed_port()}"), *others])
    status, text = run("check", path, "--json")
    assert (status, codes(json.loads(text), "warning")) == (3, {"patroni"})


@pytest.mark.skipif(PROGRAM is None, reason="PgBouncer is not installed")
def test_check_sees_a_pooler(known_cluster: Cluster, run: Run, write: Any) -> None:
    with PgBouncer(known_cluster.primary, ("postgres",), 2) as bouncer:
        report = json.loads(run("check", write([server(bouncer, pooler="transaction")]), "--json")[1])
        assert report["endpoints"][f"{bouncer.host}:{bouncer.port}"]["pooler"] is True
        assert report["status"] == "ok"
        said = json.loads(run("size", write([server(bouncer, pooler="transaction")]), "--json")[1])
        assert "max_client_conn counts" in said["error"]
        entries, preparing = [server(bouncer, pooler="transaction")], {"g": {"prepare_threshold": 5}}
        report = json.loads(run("check", write(entries, **preparing), "--json")[1])
        assert codes(report, "warning") == {"prepared-statements"}
    entries = [server(known_cluster.primary, pooler="transaction")]
    assert "no-pooler" in codes(json.loads(run("check", write(entries), "--json")[1]))


@pytest.mark.skipif(not DEBIAN_15.exists(), reason="the packaged servers have no TLS")
def test_check_reports_tls(run: Run, write: Any) -> None:
    with Cluster(standbys=0, bin_dir=DEBIAN_15, tls=True) as cluster:
        tls = {"ssl": "verify-full", "sslrootcert": str(cluster.tls_certificate)}
        status, text = run("check", write([server(cluster.primary, **tls)]))
        assert status == 0
        assert "TLSv1." in text
        report = json.loads(run("check", write([server(cluster.primary, ssl="disable")]), "--json")[1])
    (endpoint,) = report["endpoints"].values()
    assert (endpoint["reachable"], endpoint["tls"]) == (True, None)


@pytest.mark.parametrize(
    ("host", "tls", "mode", "expected"),
    [
        ("db1.example.com", None, None, "not-encrypted"),
        ("db1.example.com", "TLSv1.3", "require", "not-verified"),
        ("db1.example.com", "TLSv1.3", "verify-full", None),
        ("127.0.0.1", None, None, None),
        ("::1", None, None, None),
        ("/var/run/postgresql", None, None, None),
    ],
)
def test_traffic_to_other_machines_should_be_encrypted(
    host: str, tls: str | None, mode: str | None, expected: str | None
) -> None:
    entry = {"host": host, "label": "a", **({"ssl": mode} if mode else {})}
    loaded = load({"db": entry, "groups": {"g": {}}})
    server = ServerFacts("a", reachable=True, tls=tls)
    facts = Facts(None, {"a": server}, {"g": GroupFacts("g", "any", 10, ["a"])})
    assert [finding.code for finding in advise(loaded, facts)] == [expected] * (expected is not None)


# ping


def test_ping_of_healthy_degraded_and_broken(known_cluster: Cluster, run: Run, write: Any) -> None:
    path = write(known_cluster.nodes)
    status, text = run("ping", path)
    assert status == 0
    assert f"{known_cluster.primary.label}  healthy" in text
    known_cluster.standbys[0].kill()
    status, text = run("ping", path, "--json")
    assert (status, json.loads(text)["status"]) == (0, "degraded")
    assert run("ping", path, "--strict")[0] == 3
    known_cluster.primary.kill()
    status, text = run("ping", path)
    assert status == 1
    assert "no server" in text
    assert run("ping", path, "--any")[0] == 0
    assert run("ping", path, "--any", "--strict")[0] == 3
    status, text = run("ping", path, "--group", "read", "--json")
    report = json.loads(text)
    assert (status, set(report["groups"])) == (0, {"read"})
    assert run("ping", path, "--any", "--group", "write")[0] == 1


def test_ping_waits_until_a_group_is_served(known_cluster: Cluster, run: Run, write: Any) -> None:
    path = write(known_cluster.nodes)
    known_cluster.primary.kill()
    starter = threading.Timer(0.5, known_cluster.primary.start)
    starter.start()
    try:
        assert run("ping", path, "--wait", 30)[0] == 0
    finally:
        starter.join()


def test_ping_that_is_stopped_does_not_say_that_all_is_well(write: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, empty_room() as room:
        silent.settimeout(20)
        path = write([{"host": "127.0.0.1", "port": silent.getsockname()[1]}])
        with Running("ping", str(path), "--wait", "60", room=room) as ping:
            silent.accept()[0].close()  # it asks
            ping.process.send_signal(signal.SIGTERM)
            assert ping.process.wait(15) == 128 + signal.SIGTERM


def test_ping_gives_up_at_last(known_cluster: Cluster, run: Run, write: Any) -> None:
    known_cluster.primary.kill()
    began = monotonic()
    assert run("ping", write(known_cluster.nodes), "--wait", 1)[0] == 1
    assert 0.9 < monotonic() - began < 10


def test_ping_of_an_unknown_group(known_cluster: Cluster, run: Run, write: Any) -> None:
    status, text = run("ping", write(known_cluster.nodes), "--group", "x", "--json")
    assert status == 1
    assert "no group 'x'" in json.loads(text)["error"]


def test_a_configuration_may_come_from_the_environment(
    known_cluster: Cluster, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", f"postgresql://postgres@{known_cluster.primary.label}/postgres")
    assert run("check")[0] == 0
    assert json.loads(run("ping", "--json")[1])["groups"]["default"]["status"] == "healthy"


# size


def test_size_without_a_configuration(run: Run) -> None:
    words = ("size", "--processes", 4, "--threads", 8, "--max-connections", 100, "--groups", "read,write")
    status, text = run(*words)
    assert status == 0
    assert "read: {connection_count: 8}" in text
    status, text = run(*words, "--json")
    report = json.loads(text)
    assert (status, report["groups"]["write"]["connection_count"], report["fits"]) == (0, 8, True)
    status, text = run("size", "--processes", 400, "--max-connections", 100)
    assert status == 1
    assert "put a pooler" in text


def test_size_of_a_configuration_asks_its_servers(known_cluster: Cluster, run: Run, write: Any) -> None:
    path = write(known_cluster.nodes)
    status, text = run("size", path, "--processes", 4, "--threads", 8)
    assert status == 0
    assert "97" in text
    status, text = run("size", path, "--processes", 20, "--threads", 8, "--json")
    report = json.loads(text)
    assert (status, report["status"]) == (1, "broken")
    assert report["groups"]["read"] == {
        "now": 10,
        "connection_count": 2,
        "limited_by": report["groups"]["read"]["limited_by"],
    }
    assert set(report["full_servers"]) == {node.label for node in known_cluster.nodes}


def test_size_of_servers_that_cannot_be_asked(
    known_cluster: Cluster, run: Run, write: Any, capsys: Any
) -> None:
    path = write(known_cluster.nodes)
    known_cluster.standbys[0].kill()
    assert main(["size", str(path)]) == 1
    assert "--max-connections instead" in capsys.readouterr().err
    status, text = run("size", path, "--max-connections", 200, "--json")
    assert (status, json.loads(text)["groups"]["read"]["connection_count"]) == (0, 1)


# Help, colours, wrong arguments


@pytest.mark.parametrize("command", ["check", "ping", "size", "config-schema", "config-docs"])
def test_each_command_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    for words in ("Exit status: 0", f"  pgdbpool {command} ", "--json"):
        assert words in said


@pytest.mark.parametrize(
    "words",
    [
        ["check", "x", "y"],
        ["check", "x", "--processes", "0"],
        ["ping", "x", "--timeout", "0"],
        ["ping", "x", "--wait", "soon"],
        ["size", "--busy", "2"],
        ["size", "--threads", "-1"],
        ["size", "--processes", "4"],
        ["size", "--busy", "0", "--max-connections", "9"],
    ],
)
def test_wrong_arguments_exit_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage: pgdbpool" in capsys.readouterr().err


def on_a_terminal(path: Path, room: Path, **more: str) -> str:
    """Run `pgdbpool check` on a terminal of its own, and return what that shows."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "pgdbpool", "check", str(path)],
            stdin=theirs, stdout=theirs, stderr=theirs, cwd=room, env=environment(room, TERM="xterm", **more),
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        try:
            while data := os.read(ours, 65_536):
                shown += data
        except OSError:  # EIO: the other end is closed
            pass
        assert process.wait(30) == 0
    finally:
        os.close(ours)
    return shown.decode()


def test_colours_and_progress_are_for_terminals(known_cluster: Cluster, write: Any) -> None:
    path = write(known_cluster.nodes)
    with empty_room() as room:
        shown = on_a_terminal(path, room)
        assert "\033[32mok\033[0m" in shown
        assert "(1 of 3), group read ..." in shown
        assert "\033[32m" not in on_a_terminal(path, room, NO_COLOR="1")


# rls


def test_rls_says_so_where_the_role_may_use_no_table(
    known_cluster: Cluster, run: Run, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    known_cluster.primary.execute("CREATE ROLE app LOGIN")
    path = write([server(known_cluster.primary, user="app")], write={"tenant": "app.tenant_id"})
    status, text = run("rls", path, "write")
    assert (status, "group 'write' may use no table here: is it the right database?" in text) == (0, True)
    with pytest.raises(SystemExit):
        main(["rls", str(path)])
    assert "the following arguments are required: GROUP\n" in capsys.readouterr().err

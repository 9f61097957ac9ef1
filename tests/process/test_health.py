"""Health: every server asked within one deadline, what it means for the groups, and the answers to probes."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from support import config, server, wait_for

import pgdbpool
from pgdbpool import Connection, Handler
from pgdbpool.wsgi import HealthApp

ROOT = Path(pgdbpool.__file__).parents[1]
MODES = ["threaded", "non-threaded"]


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    yield
    Connection.reset()


def init(cluster: Any, mode: str = "threaded", wait: bool = True, **changes: Any) -> None:
    """Initialise the groups `read` and `write` over all nodes."""
    common = {"connection_count": 3, "min_size": 1, **changes}
    read, write = {"target": "prefer-standby", **common}, {"target": "primary", "autocommit": False, **common}
    Connection.init(config(cluster.nodes, mode, read=read, write=write), wait=wait)


def get(app: HealthApp, path: str = "/", method: str = "GET") -> tuple[int, dict[str, Any]]:
    """Return the status and the JSON of an answer."""
    status: list[str] = []
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "wsgi.input": io.BytesIO()}
    body = b"".join(app(environ, lambda line, headers: status.append(line) or (lambda data: None)))
    return int(status[0][:3]), json.loads(body) if body else {}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wait", [True, False])
def test_all_servers_up_is_healthy(known_cluster: Any, mode: str, wait: bool) -> None:
    init(known_cluster, mode, wait)
    report = Connection.health()
    json.dumps(report)
    assert report["status"] == "healthy"
    primary, *standbys = (report["endpoints"][node.label] for node in known_cluster.nodes)
    assert primary["role"] == "primary"
    assert primary["lag_bytes"] is None
    for standby in standbys:
        assert (standby["role"], standby["reachable"], standby["error"]) == ("standby", True, None)
        assert standby["lag_bytes"] >= 0
        assert 0 < standby["latency"] < 2
    assert report["groups"]["write"]["served_by"] == [known_cluster.primary.label]
    assert report["groups"]["read"]["utilization"] == 0


def test_connections_in_use_show(known_cluster: Any) -> None:
    init(known_cluster)
    with Handler("write") as db:
        db.query("SELECT 1")
        group = Connection.health()["groups"]["write"]
    assert (group["in_use"], group["available"], group["utilization"]) == (1, 2, 0.333)


@pytest.mark.parametrize("mode", MODES)
def test_an_idle_connection_is_asked_and_kept(known_cluster: Any, mode: str) -> None:
    Connection.init(config([known_cluster.primary], mode, g={"connection_count": 1}))
    for _ in range(3):
        (endpoint,) = Connection.health()["endpoints"].values()
        assert endpoint["connect_latency"] is None
    status = Connection.status().groups["g"]
    assert (status.opened, status.idle, status.discarded) == (1, 1, {})


def test_a_connection_that_the_server_closed_is_not_the_servers_end(known_cluster: Any) -> None:
    Connection.init(config([known_cluster.primary], g={"connection_count": 1}))
    known_cluster.primary.execute("""
        SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'pgdbpool'
    """)
    assert Connection.health()["status"] == "healthy"


@pytest.mark.parametrize("mode", MODES)
def test_a_standby_down_is_degraded_and_a_primary_unhealthy(known_cluster: Any, mode: str) -> None:
    init(known_cluster, mode)
    standby = known_cluster.standbys[0]
    standby.kill()
    report = Connection.health()
    assert report["status"] == "degraded"
    assert report["endpoints"][standby.label]["status"] == "unhealthy"
    # Refused, or cut while the killed server's children still hold its socket.
    assert "connection failed" in report["endpoints"][standby.label]["error"]
    assert report["groups"]["read"]["status"] == "degraded"
    known_cluster.primary.kill()
    report = Connection.health()
    assert report["status"] == "unhealthy"
    assert report["groups"]["read"]["status"] == "degraded"
    assert report["groups"]["write"]["status"] == "unhealthy"
    assert report["groups"]["write"]["not_served_by"].keys() == {n.label for n in known_cluster.nodes}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wait", [True, False])
def test_a_stopped_server_costs_the_timeout_and_the_others_nothing(
    known_cluster: Any, mode: str, wait: bool
) -> None:
    init(known_cluster, mode, wait)
    standby = known_cluster.standbys[1]
    standby.pause()
    try:
        began = monotonic()
        report = Connection.health(timeout=1.0)
        assert 0.9 < monotonic() - began < 3
        assert report["status"] == "degraded"
        assert report["endpoints"][standby.label]["error"].startswith("no answer within 1")
        assert report["endpoints"][known_cluster.primary.label]["latency"] < 0.9
    finally:
        standby.resume()
    wait_for(lambda: Connection.health()["status"] == "healthy", what="healthy again")


def test_a_lock_free_process_that_gets_no_requests_finds_its_server_again(known_cluster: Any) -> None:
    init(known_cluster, "non-threaded")
    known_cluster.primary.kill()
    with pytest.raises(pgdbpool.Error), Handler("write") as db:
        db.query("SELECT 1")
    assert Connection.status().endpoints[known_cluster.primary.label].state != "up"
    known_cluster.primary.start()
    assert Connection.health()["groups"]["write"]["status"] == "healthy"
    assert Connection.status().endpoints[known_cluster.primary.label].state == "up"


def test_a_server_that_admits_no_more_serves_on(known_cluster: Any) -> None:
    known_cluster.primary.execute("CREATE ROLE few LOGIN CONNECTION LIMIT 1")
    Connection.init(config([server(known_cluster.primary, user="few")], g={"connection_count": 1}))
    with Handler("g") as db:
        db.query("SELECT 1")
        report = Connection.health()
    assert report["status"] == "degraded"
    assert report["groups"]["g"]["served_by"] == [known_cluster.primary.label]
    assert "too many connections" in report["endpoints"][known_cluster.primary.label]["error"]


def test_a_server_that_does_not_tell_its_role_keeps_its_connection(known_cluster: Any) -> None:
    known_cluster.primary.execute("CREATE ROLE app LOGIN")
    known_cluster.primary.execute("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM public")
    try:
        Connection.init(config([server(known_cluster.primary, user="app")], g={"connection_count": 1}))
        for _ in range(2):
            report = Connection.health()
        assert report["status"] == "healthy"
        assert report["endpoints"][known_cluster.primary.label]["role"] == "primary"
        assert Connection.status().groups["g"].discarded == {}
    finally:
        known_cluster.primary.execute("GRANT EXECUTE ON FUNCTION pg_control_system() TO public")


def test_a_drained_server_is_degraded(known_cluster: Any) -> None:
    init(known_cluster)
    label = known_cluster.standbys[0].label
    Connection.drain(label)
    report = Connection.health()
    assert (report["status"], report["endpoints"][label]["error"]) == ("degraded", "draining")
    Connection.undrain(label)
    assert Connection.health()["status"] == "healthy"


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_after_a_failover_the_new_primary_serves_and_the_old_one_does_not(
    known_cluster: Any, mode: str
) -> None:
    init(known_cluster, mode)
    old, new = known_cluster.primary, known_cluster.standbys[0]
    new.promote()
    report = Connection.health()
    assert report["groups"]["write"]["served_by"] == [new.label]
    assert "another was promoted" in report["groups"]["write"]["not_served_by"][old.label]
    assert report["status"] == "degraded"
    with Handler("write") as db:
        assert db.connection.info.port == new.port


@pytest.mark.slow
def test_another_thread_does_not_touch_a_lock_free_pool(known_cluster: Any) -> None:
    Connection.init(config([known_cluster.primary], "non-threaded", g={"connection_count": 1}))
    with Handler("g") as db:
        db.query("SELECT 1")
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(Connection.health()))
    thread.start()
    thread.join()
    (endpoint,) = found[0]["endpoints"].values()
    assert found[0]["status"] == "healthy"
    assert endpoint["connect_latency"] > 0


@pytest.mark.slow
def test_requests_and_checks_do_not_disturb_each_other(known_cluster: Any) -> None:
    node = server(known_cluster.primary, query_timeout="30s")
    Connection.init(config([node], g={"connection_count": 2, "timeout": 30}))
    over = threading.Event()
    errors: list[Exception] = []

    def work() -> None:
        try:
            while not over.is_set():
                with Handler("g") as db:
                    assert db.query("SELECT 1").fetchone()[0] == 1
        except Exception as error:  # noqa: BLE001 - whatever it is, the test fails with it
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    statuses = {Connection.health(10)["groups"]["g"]["served_by"][0] for _ in range(100)}
    over.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert statuses == {known_cluster.primary.label}


@pytest.mark.parametrize("timeout", [0, -1])
def test_a_timeout_is_above_zero(known_cluster: Any, timeout: float) -> None:
    init(known_cluster, wait=False)
    with pytest.raises(ValueError, match="above 0"):
        Connection.health(timeout)


# The answers to probes.


def test_probes_are_answered_200_while_every_group_is_served(known_cluster: Any) -> None:
    init(known_cluster)
    app = HealthApp(max_age=0)
    assert get(app, "/ready")[0] == 200
    known_cluster.standbys[0].kill()
    status, report = get(app, "/ready")
    assert (status, report["status"]) == (200, "degraded")
    assert report["groups"] == {"read": "degraded", "write": "degraded"}
    known_cluster.primary.kill()
    assert get(app, "/ready")[0] == 503
    assert get(HealthApp(groups=["read"]))[0] == 200
    assert get(app, "/live")[0] == 200


def test_an_answer_has_details_only_on_request(known_cluster: Any) -> None:
    init(known_cluster)
    assert known_cluster.primary.label not in json.dumps(get(HealthApp())[1])
    assert known_cluster.primary.label in get(HealthApp(details=True))[1]["endpoints"]


def test_an_answer_is_given_again_for_a_while(known_cluster: Any) -> None:
    init(known_cluster)
    app = HealthApp(max_age=60)
    assert get(app)[0] == 200
    known_cluster.primary.kill()
    assert get(app)[0] == 200
    Connection.close()
    assert get(app)[0] == 503


def test_a_process_without_pools_is_not_ready(known_cluster: Any) -> None:
    app = HealthApp()
    assert get(app, "/ready")[0] == 503
    assert get(app, "/health/live")[0] == 200
    init(known_cluster)
    Connection.close()
    assert get(app, "/ready")[0] == 503
    assert get(app, "/live") == (503, {"status": "ended", "pid": get(app, "/live")[1]["pid"]})


def test_only_get_and_head_are_answered(known_cluster: Any) -> None:
    init(known_cluster)
    assert get(HealthApp(), method="HEAD") == (200, {})
    status: list[str] = []
    HealthApp()({"REQUEST_METHOD": "POST"}, lambda line, headers: status.append(line) or print)
    assert status == ["405 Method Not Allowed"]


@pytest.mark.parametrize("wrong", [{"timeout": 0}, {"max_age": -1}, {"groups": "read"}])
def test_wrong_arguments_of_the_app_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        HealthApp(**wrong)


APPLICATION = """
import pgdbpool
from pgdbpool.wsgi import HealthApp
pgdbpool.Connection.init()
print("connected", flush=True)
application = HealthApp(max_age=0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("worker", [["sync"], ["gthread", "--threads", "4", "--preload"]])
def test_probes_of_a_real_server(known_cluster: Any, tmp_path: Path, worker: list[str]) -> None:
    (tmp_path / "probed.py").write_text(APPLICATION)
    log = tmp_path / "log"
    options = ["--bind", "127.0.0.1:0", "--workers", "2", "--worker-class", *worker]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    url = f"postgresql://postgres@{known_cluster.primary.label}/postgres"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", *options, "probed"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": path, "DATABASE_URL": url},
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        listening = r"Listening at: http://(127.0.0.1:\d+)"
        found = wait_for(lambda: re.search(listening, log.read_text()), 20, "gunicorn listens")

        def probe(path: str) -> int:
            connection = http.client.HTTPConnection(found[1], timeout=20)
            try:
                connection.request("GET", path)
                return connection.getresponse().status
            finally:
                connection.close()

        # A worker that finds no server when it starts would end them all.
        starts = 1 if "--preload" in worker else 2
        wait_for(lambda: log.read_text().count("connected") == starts, 20, "all are connected")
        assert [probe("/ready") for _ in range(8)] == [200] * 8
        known_cluster.primary.kill()
        assert [probe("/ready") for _ in range(8)] == [503] * 8
        assert probe("/live") == 200
        known_cluster.primary.start()
        wait_for(lambda: [probe("/ready") for _ in range(8)] == [200] * 8, what="ready again")
    finally:
        process.terminate()
        process.wait(20)

"""What doc/howto/mod-wsgi.rst says, under a real Apache."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from apache import Apache
from support import wait_for

from pgdbpool.cluster import Cluster

APPLICATION = """
import json, logging, os, sys
from urllib.parse import parse_qs
logging.basicConfig(stream=sys.stderr, format="%(event)s", level=logging.WARNING)
import psycopg
import pgdbpool as dbpool

server = {{"host": "127.0.0.1", "port": {port}, "name": "postgres", "user": "postgres"}}
dbpool.Connection.init({{
    "db": {{**server, "query_timeout": 60000}},
    "groups": {{"write": {{"autocommit": False, "connection_count": 4, "min_size": 1}}}},
}})

def application(environ, start_response):
    seconds = float(parse_qs(environ["QUERY_STRING"]).get("sleep", ["0"])[0])
    with dbpool.Handler("write") as db:
        db.query("SELECT pg_sleep(%s)", (seconds,))
        if seconds:
            db.query("INSERT INTO done VALUES (%s)", (seconds,))
    found = {{"version": {version}, "pid": os.getpid(), "psycopg": psycopg.pq.__impl__}}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(found).encode()]
"""
SLEEPING = (
    "SELECT count(*) = %s FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%%' AND state = 'active'"
)


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that Apache's unprivileged user may enter."""
    found = tmp_path_factory.mktemp("apache")
    for path in (found, *found.parents[:2]):
        if path.owner() == Path(os.path.expanduser("~")).owner() and path != Path("/tmp"):
            path.chmod(0o755)
    return found


@pytest.fixture
def serve(known_cluster: Cluster, place: Path) -> Callable[..., AbstractContextManager[Apache]]:
    port = known_cluster.primary.port
    known_cluster.primary.execute("CREATE TABLE done (seconds float)")
    return lambda **changes: Apache(place, APPLICATION.format(port=port, version=1), **changes)


def begun(cluster: Cluster, number: int = 1) -> None:
    wait_for(lambda: cluster.primary.execute(SLEEPING, (number,))[0][0], what=f"{number} blocks run")


def rows(cluster: Cluster) -> int:
    return int(cluster.primary.execute("SELECT count(*) FROM done")[0][0])


def renew(apache: Apache, cluster: Cluster) -> None:
    apache.write(APPLICATION.format(port=cluster.primary.port, version=2))
    os.utime(
        apache.place / "app.wsgi", (monotonic(), monotonic())
    )  # other than before, whatever the clock says


def test_a_touched_script_lets_requests_end_within_shutdown_timeout(
    known_cluster: Cluster, serve: Any
) -> None:
    with serve(processes=1, shutdown_timeout=20) as apache:
        assert apache.ask()["version"] == 1
        answer = apache.later("/?sleep=5")
        begun(known_cluster)
        renew(apache, known_cluster)
        assert apache.ask()["version"] == 2
        assert answer()["version"] == 1
        assert rows(known_cluster) == 1


def test_a_graceful_restart_kills_requests_longer_than_three_seconds(
    known_cluster: Cluster, serve: Any
) -> None:
    with serve(shutdown_timeout=20) as apache:
        short, long = apache.later("/?sleep=1"), apache.later("/?sleep=12")
        begun(known_cluster, 2)
        apache.signal(signal.SIGUSR1)
        assert short()["version"] == 1
        assert long() == 500
        assert rows(known_cluster) == 1


def test_a_stop_cuts_the_client_and_the_block_still_commits(known_cluster: Cluster, serve: Any) -> None:
    with serve() as apache:
        answer = apache.later("/?sleep=1.5")
        begun(known_cluster)
        apache.signal(signal.SIGTERM)
        assert isinstance(answer(), Exception)
        apache.wait(20)
        assert rows(known_cluster) == 1


def test_only_in_the_main_interpreter_an_old_process_ends_before_shutdown_timeout(
    known_cluster: Cluster, serve: Any
) -> None:
    took = {}
    for group in ("application-group=%{GLOBAL}", ""):
        with serve(group=group, processes=1, shutdown_timeout=5) as apache:
            pid = apache.ask()["pid"]
            began = monotonic()
            renew(apache, known_cluster)
            assert apache.ask()["version"] == 2
            wait_for(lambda pid=pid: not os.path.exists(f"/proc/{pid}"), 30)  # type: ignore[misc]
            took[group] = monotonic() - began
    assert took["application-group=%{GLOBAL}"] < 4 < took[""], took


def test_a_second_interpreter_has_psycopg_in_python_and_says_so(
    known_cluster: Cluster, serve: Any, place: Path
) -> None:
    second = f"WSGIScriptAlias /second {place}/app.wsgi process-group=shop application-group=second"
    with serve(extra=second, processes=1) as apache:
        found = {apache.ask("/")["psycopg"], apache.ask("/second")["psycopg"]}
        assert found == {"binary", "python"}
        assert apache.log().count("process.slow_driver") == 1

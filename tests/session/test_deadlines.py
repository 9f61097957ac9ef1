"""The deadline of a request: each wait and each statement inside is cut to what is left of it."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from support import config, pid_of, server, wait_for

import pgdbpool
from pgdbpool import Category, Connection, DeadlineExceeded, Handler, classify, deadline, time_left
from pgdbpool._request.tenant import milliseconds
from pgdbpool._util import bounds
from pgdbpool.wsgi import DeadlineMiddleware, TenantMiddleware


@pytest.fixture
def start(known_cluster: Any, mode: str) -> Iterator[Callable[..., None]]:
    def init(entry: dict[str, Any] | None = None, **changes: Any) -> None:
        auto = {"connection_count": 1, **changes}
        manual = {**auto, "autocommit": False}
        node = server(known_cluster.primary, **(entry or {}))
        Connection.init(config([node], mode, auto=auto, manual=manual))

    yield init
    Connection.reset()


def shown(db: Handler) -> float:
    """Return the statement_timeout that the server has for this statement, in milliseconds."""
    row = db.query("SELECT current_setting(%s)", ("statement_timeout",)).fetchone()
    assert row is not None
    value = milliseconds(row[0])
    assert value is not None
    return value


# What is current.


def test_the_earlier_of_nested_deadlines_wins() -> None:
    assert time_left() is None
    with deadline(10):
        with deadline(100):
            assert 9 < (time_left() or 0) <= 10
        with Connection.deadline(1):
            assert 0 < (time_left() or 0) <= 1
        assert 9 < (time_left() or 0) <= 10
    assert time_left() is None


@pytest.mark.parametrize("wrong", [None, "5", True, float("nan"), float("inf")])
def test_a_deadline_is_a_number_of_seconds(wrong: Any) -> None:
    with pytest.raises(ValueError, match="a number of seconds"), deadline(wrong):
        pass


def test_a_thread_has_it_if_the_context_is_passed_on() -> None:
    with deadline(10), ThreadPoolExecutor(1) as threads:
        assert threads.submit(time_left).result() is None
        assert threads.submit(contextvars.copy_context().run, time_left).result() is not None


# After it.


def test_a_block_that_begins_after_it_sends_nothing(start: Any, known_cluster: Any, proxy_to: Any) -> None:
    proxy = proxy_to(known_cluster.primary)
    start({"port": proxy.port})
    proxy.reset_counts()
    for group in ("auto", "manual"):
        for seconds in (0, -1):
            with deadline(seconds), pytest.raises(DeadlineExceeded, match="the deadline passed") as caught:
                Handler(group).__enter__()
            assert isinstance(caught.value, (pgdbpool.DBConnectionError, TimeoutError))
            assert caught.value.group == group
            assert classify(caught.value) is Category.TIMEOUT
    assert proxy.round_trips == 0
    assert Connection.status().groups["auto"].in_use == 0


def test_statements_past_the_deadline_in_an_open_block_send_nothing(start: Any) -> None:
    start()
    with Handler("auto") as db:
        db.query("CREATE TABLE IF NOT EXISTS late (i int)")
        pid = pid_of(db)
        with deadline(0):
            for use in (
                lambda: db.query("INSERT INTO late VALUES (1)"),
                lambda: db.query("INSERT INTO late VALUES (1); SELECT 1"),
                lambda: db.connection.execute("INSERT INTO late VALUES (1)"),
                lambda: db.connection.cursor().executemany("INSERT INTO late VALUES (%s)", [(1,), (2,)]),
                lambda: db.connection.cursor().copy("COPY late FROM STDIN").__enter__(),
                lambda: list(db.connection.cursor().stream("SELECT 1")),
                lambda: db.transaction().__enter__(),
                lambda: db.connection.pipeline().__enter__(),
            ):
                with pytest.raises(DeadlineExceeded):
                    use()
            with pytest.raises(DeadlineExceeded):  # a block of its own for what cannot be in one
                Handler("manual").__enter__()
        assert db.query("SELECT count(*) FROM late").fetchone()[0] == 0
        assert pid_of(db) == pid


@pytest.mark.slow
@pytest.mark.parametrize("how", ["end", "commit", "transaction"])
def test_a_commit_after_it_is_a_rollback_that_raises(start: Any, how: str) -> None:
    start()
    with Handler("auto") as db:
        db.query("CREATE TABLE IF NOT EXISTS half (i int)")
    group = "auto" if how == "transaction" else "manual"
    with Handler(group) as db:
        pid = pid_of(db)
    with pytest.raises(DeadlineExceeded), deadline(1), Handler(group) as db:
        if how == "transaction":
            with db.transaction():
                db.query("INSERT INTO half VALUES (1)")
                wait_for(lambda: (time_left() or 0) < 0)
        else:
            db.query("INSERT INTO half VALUES (1)")
            wait_for(lambda: (time_left() or 0) < 0)
            if how == "commit":
                db.commit()
    with Handler(group) as db:
        assert db.query("SELECT count(*) FROM half").fetchone()[0] == 0
        assert pid_of(db) == pid  # in order, and so it went back
    with Handler("auto") as db:
        with pytest.raises(DeadlineExceeded), deadline(0.5), db.transaction():
            db.query("INSERT INTO half VALUES (1)")
            wait_for(lambda: (time_left() or 0) < 0)
        db.query("INSERT INTO half VALUES (2)")  # beyond the deadline's own block, the block goes on
    with Handler("auto") as db:
        assert [row[0] for row in db.query("SELECT i FROM half")] == [2]


# The server's side.


@pytest.mark.parametrize("group", ["auto", "manual"])
def test_each_statement_is_limited_at_the_server_to_the_time_left(start: Any, group: str) -> None:
    start({"query_timeout": "30s"})
    with Handler(group) as db:
        assert shown(db) == 30_000
    with deadline(20), Handler(group) as db:
        first = shown(db)
        time.sleep(0.05)
        second = shown(db)
        assert 10_000 < second < first < 20_000
        with deadline(10):
            assert 0 < shown(db) < 10_000
        assert 10_000 < shown(db) <= second
    with Handler(group) as db:
        with deadline(10):
            assert shown(db) < 10_000
        assert shown(db) == 30_000  # what an ended deadline has bound in the transaction is put back
    with deadline(60), Handler(group) as db:
        assert shown(db) == 30_000  # never more than without
    with deadline(10), Handler(group, settings={"statement_timeout": "2s"}) as db:
        assert shown(db) == 2_000
    with deadline(10), Handler(group, settings={"statement_timeout": 0}) as db:
        assert 0 < shown(db) < 10_000
    with deadline(10), Handler(group) as db:
        db.query("SET statement_timeout = '1s'")
        assert shown(db) == 1_000  # the block's own
    with deadline(10), Handler("manual") as db:
        db.query("SET LOCAL statement_timeout = '1s'")
        assert shown(db) == 1_000
        with db.transaction():
            assert shown(db) == 1_000
    with Handler(group) as db:
        assert shown(db) == 30_000


def test_statements_that_cannot_ride_are_limited_in_a_round_trip_before(start: Any) -> None:
    start({"query_timeout": "30s"})
    with deadline(10), Handler("manual") as db:
        cursor = db.query("SELECT 1; SELECT current_setting('statement' || '_timeout')")
        cursor.nextset()
        assert 0 < (milliseconds(cursor.fetchone()[0]) or 0) < 10_000


def test_binding_takes_no_round_trip(start: Any, known_cluster: Any, proxy_to: Any) -> None:
    proxy = proxy_to(known_cluster.primary)
    start({"port": proxy.port, "query_timeout": "30s"}, tenant={"setting": "app.t", "verify": "off"})
    for group, expected in (("auto", 3), ("manual", 4)):
        proxy.reset_counts()
        with deadline(10), Handler(group, tenant="a") as db:
            for i in range(3):
                row = db.query("SELECT current_setting('app.t'), %s::int", (i,)).fetchone()
                assert row == ("a", i)
        assert proxy.round_trips == proxy.syncs == expected


@pytest.mark.slow
@pytest.mark.parametrize("group", ["auto", "manual"])
def test_a_slow_statement_is_cancelled_by_the_server_and_the_connection_lives_on(
    start: Any, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "MARGIN", 1.5)  # for the answer, on a machine that is busy
    start({"query_timeout": "30s"})
    with Handler(group) as db:
        pid = pid_of(db)
    began = time.monotonic()
    with pytest.raises(psycopg.errors.QueryCanceled) as caught, deadline(2.5), Handler(group) as db:
        db.query("SELECT 1")
        db.query("SELECT pg_sleep(20)")
    assert 0.8 < time.monotonic() - began < 2.5
    assert classify(caught.value) is Category.TIMEOUT
    with Handler(group) as db:
        assert pid_of(db) == pid


def test_the_first_statement_of_a_transaction_is_still_sent_again_and_no_later_one(
    start: Any, known_cluster: Any
) -> None:
    start({"query_timeout": "30s"})
    with known_cluster.primary.connect() as admin, deadline(20):
        with Handler("manual") as db:
            db.query("SELECT 1")
            admin.execute("SELECT pg_terminate_backend(%s, 5000)", (pid_of(db),))
            with pytest.raises(pgdbpool.ConnectionLostError) as caught:
                db.query("SELECT 2")
            assert not caught.value.repeatable
            db.rollback()


# A server that does not answer.


@pytest.mark.slow
@pytest.mark.parametrize("group", ["auto", "manual"])
def test_a_hung_server_costs_no_more_than_the_time_left(
    start: Any, known_cluster: Any, proxy_to: Any, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "CLIENT_GRACE", 20.0)  # none of it is added
    proxy = proxy_to(known_cluster.primary)
    start({"port": proxy.port, "query_timeout": "30s"})
    began = time.monotonic()
    with pytest.raises(pgdbpool.QueryDeadlineError, match="before the deadline"), deadline(1):
        with Handler(group) as db:
            db.query("SELECT 1")
            proxy.stall()
            db.query("SELECT 2")
    taken = time.monotonic() - began
    print(f"a hung server under a deadline of 1 s: {taken:.2f} s")
    assert 0.9 < taken < 5
    proxy.resume()
    with Handler(group) as db:
        assert db.query("SELECT 1").fetchone()[0] == 1


@pytest.mark.slow
def test_a_ping_of_a_request_in_a_hurry_puts_no_endpoint_down(
    start: Any, known_cluster: Any, proxy_to: Any
) -> None:
    proxy = proxy_to(known_cluster.primary)
    start({"port": proxy.port}, ping="always")
    proxy.delay = 0.3
    with pytest.raises(pgdbpool.DBConnectionError), deadline(0.1):
        Handler("auto").__enter__()
    (endpoint,) = Connection.status().endpoints.values()
    assert endpoint.state == "up"
    proxy.delay = 0
    with Handler("auto") as db:
        assert db.query("SELECT 1").fetchone()[0] == 1


@pytest.mark.slow
def test_a_connect_is_limited_to_the_time_left(start: Any, known_cluster: Any, proxy_to: Any) -> None:
    proxy = proxy_to(known_cluster.primary)
    start({"port": proxy.port, "connect_timeout": 20}, min_size=0, max_lifetime=0.01)
    proxy.stall()
    time.sleep(0.02)
    began = time.monotonic()
    with pytest.raises(pgdbpool.DBConnectionError), deadline(0.5):
        Handler("auto").__enter__()
    assert time.monotonic() - began < 10
    proxy.resume()


def test_the_wait_for_a_connection_is_limited_to_the_time_left(known_cluster: Any) -> None:
    Connection.init(config([known_cluster.primary], auto={"connection_count": 1, "timeout": 30}))
    done = threading.Event()

    def holder() -> None:
        with Handler("auto"):
            done.wait(20)

    thread = threading.Thread(target=holder)
    thread.start()
    try:
        wait_for(lambda: Connection.status().groups["auto"].in_use == 1)
        began = time.monotonic()
        with pytest.raises(pgdbpool.PoolTimeout, match="held by thread"), deadline(0.3):
            Handler("auto").__enter__()
        assert 0.25 < time.monotonic() - began < 10
    finally:
        done.set()
        thread.join()
        Connection.reset()


@pytest.mark.slow
def test_a_stream_that_flows_ends_with_it(start: Any) -> None:
    start({"query_timeout": "30s"})
    began = time.monotonic()
    with pytest.raises((pgdbpool.QueryDeadlineError, psycopg.errors.QueryCanceled)):
        with deadline(0.5), Handler("auto") as db:
            for _ in db.connection.cursor().stream("SELECT generate_series(1, 1000000000)"):
                pass
    assert time.monotonic() - began < 20
    with Handler("auto") as db:
        assert db.query("SELECT 1").fetchone()[0] == 1


def test_notifications_end_with_it_as_with_their_own_timeout(start: Any) -> None:
    start()
    with Handler("auto") as db:
        db.query("LISTEN nothing")
        with deadline(0.2):
            assert list(db.connection.notifies()) == []
        assert db.query("SELECT 1").fetchone()[0] == 1


# The middleware.


def request(app: Any) -> list[Any]:
    body = app({"wsgi.url_scheme": "http"}, lambda *_: None)
    try:
        return [float(step) for step in body]
    finally:
        if hasattr(body, "close"):
            body.close()


class Body:
    """A streamed body, each step of which says what is left."""

    closed_with: float | None = None

    def __iter__(self) -> Iterator[bytes]:
        for _ in range(3):
            yield str(time_left() or -1).encode()

    def close(self) -> None:
        Body.closed_with = time_left()


def test_the_middleware_sets_it_for_the_request_its_body_and_its_close() -> None:
    app = DeadlineMiddleware(lambda environ, start_response: Body(), seconds=10)
    first, second, third = request(app)
    assert 9 < third < second < first <= 10
    assert 9 < (Body.closed_with or 0) < third
    assert time_left() is None
    with ThreadPoolExecutor(1) as threads:  # each request of a thread has its own
        assert threads.submit(request, app).result()[0] > threads.submit(request, app).result()[0] - 1
        assert threads.submit(time_left).result() is None


def test_the_middleware_takes_a_function_and_goes_with_that_of_tenants() -> None:
    inner = TenantMiddleware(lambda environ, start_response: Body(), lambda environ: "a")
    assert 4 < request(DeadlineMiddleware(inner, seconds=lambda environ: 5))[2] < 5
    assert request(DeadlineMiddleware(inner, seconds=lambda environ: None)) == [-1, -1, -1]
    with pytest.raises(ValueError, match="not a time for a request"):
        DeadlineMiddleware(inner, seconds=0)

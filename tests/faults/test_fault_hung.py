"""A server that is there and does not answer: every wait has a bound, and only who met it pays."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from load import Load, call
from support import server, wait_for

import pgdbpool
from pgdbpool import Connection, Handler
from pgdbpool._util import bounds

PING, CONNECT, QUERY = 1.0, 1.2, 1.0


@pytest.fixture(params=["stopped process", "dead network"])
def hung(request: pytest.FixtureRequest, known_cluster: Any, proxy_to: Any) -> Iterator[Any]:
    """A `db` entry of a standby with functions that make it hang and go on."""
    standby = known_cluster.standbys[0]
    proxy = proxy_to(standby)
    stopped = request.param == "stopped process"
    hang, go_on = (standby.pause, standby.resume) if stopped else (proxy.stall, proxy.resume)

    def entry(**changes: Any) -> tuple[dict[str, Any], Callable[[], None], Callable[[], None]]:
        return server(standby, port=proxy.port, **changes), hang, go_on

    yield entry
    go_on()


def state() -> list[str]:
    return [endpoint.state for endpoint in Connection.status().endpoints.values()]


def test_a_checkout_from_a_hung_server_is_bounded(start: Any, hung: Any, measured: Any) -> None:
    entry, hang, _ = hung(connect_timeout=CONNECT)
    start([entry], ping="always", ping_timeout=PING)
    assert call().error is None
    hang()
    found = call()
    assert isinstance(found.error, pgdbpool.DBOfflineError)
    measured("the call that finds it by its ping", found.took, at_most=PING + CONNECT + 1)
    again = call()
    assert isinstance(again.error, pgdbpool.DBOfflineError)
    measured("the next call", again.took * 1000, "ms", at_most=PING * 1000)


def test_a_connect_to_a_hung_server_is_bounded(start: Any, hung: Any, measured: Any) -> None:
    entry, hang, go_on = hung(connect_timeout=CONNECT)
    start([entry], min_size=0)
    with Handler("g") as db:  # on the one connection that there is
        db.query("SELECT 1")
        hang()
        found = call()
        go_on()
    assert isinstance(found.error, pgdbpool.DBOfflineError)
    assert "no answer" in str(found.error)
    measured("the call that finds it by its connect", found.took, at_most=CONNECT + 1)


@pytest.mark.parametrize("timeout", [0, 0.1])
def test_a_hurried_ping_is_not_evidence_and_keeps_to_its_timeout(
    start: Any, known_cluster: Any, proxy_to: Any, measured: Any, timeout: float, monkeypatch: Any
) -> None:
    proxy = proxy_to(known_cluster.standbys[0])
    start([server(known_cluster.standbys[0], port=proxy.port)], ping="always", ping_timeout=5)
    with monkeypatch.context() as patched:
        patched.setattr(bounds, "MIN_TIMEOUT", 5)  # that long on a machine that is busy
        with Handler("g", timeout=timeout) as db:  # a ping has its moment, also with no time to wait
            assert db.query("SELECT 1").fetchone()[0] == 1
    proxy.stall()
    began = time.monotonic()
    with (
        pytest.raises(pgdbpool.DBConnectionError, match="no answer to a ping"),
        Handler("g", timeout=timeout),
    ):
        pass
    measured(f"a checkout that may take {timeout} s", time.monotonic() - began, at_most=timeout + 1)
    assert state() == ["up"]
    assert Connection.status().groups["g"].idle == 3
    proxy.resume()
    assert call().error is None


def test_a_statement_on_a_hung_server_is_bounded_and_a_reason_to_ping(
    start: Any, hung: Any, measured: Any, known_cluster: Any
) -> None:
    entry, hang, go_on = hung(query_timeout=f"{QUERY} s", connect_timeout=CONNECT)
    start([entry], ping_timeout=PING)
    with Handler("g") as db:
        hang()
        began = time.monotonic()
        with pytest.raises(pgdbpool.QueryDeadlineError) as caught:
            db.query("SELECT 1")
        measured(
            "a statement of at most 1 s", time.monotonic() - began, at_most=QUERY + 2.5, at_least=QUERY + 1
        )
        assert caught.value.maybe_executed
        assert db._conn is None or db._conn.closed
    assert state() == ["up"]  # a slow statement alone is no evidence ...
    began = time.monotonic()
    with pytest.raises(pgdbpool.DBOfflineError), Handler("g"):
        pass
    measured("the next checkout, which pings", time.monotonic() - began, at_most=PING + CONNECT + 1)
    assert state()[0] in ("down", "probing")  # ... a ping without an answer is
    go_on()
    wait_for(lambda: len(known_cluster.standbys[0].execute(SESSIONS)) <= 4, what="the old sessions are gone")


SESSIONS = "SELECT pid FROM pg_stat_activity WHERE application_name = 'pgdbpool'"


def test_other_requests_go_to_the_healthy_server_and_pay_nothing(
    start: Any, hung: Any, measured: Any, known_cluster: Any, mode: str
) -> None:
    entry, hang, go_on = hung(query_timeout=f"{QUERY} s", connect_timeout=CONNECT)
    other = known_cluster.standbys[1]
    start([entry, server(other)], connection_count=8, ping_timeout=PING)
    clients = 4 if mode == "threaded" else 1
    with Load(clients) as load:
        wait_for(lambda: len(load.calls) > 50)
        hang()
        since = time.monotonic()
        wait_for(lambda: state()[0] != "up", 10)
        known = time.monotonic()
        wait_for(lambda: len(load.good_since(known)) > 300)
    assert all(isinstance(error, pgdbpool.QueryDeadlineError) for error in load.errors)
    slow = [each for each in load.calls if each.ended > since and each.took > 0.9]
    measured("until the server counts as down", known - since, at_most=QUERY + 1 + PING + 2)
    measured("calls that paid", len(slow), "", at_most=2 * clients + 1)  # a statement, and a ping, each
    fast = [each for each in load.calls if each.began > known]
    assert {each.endpoint for each in fast} == {other.label}
    measured("slowest call after that", max(each.took for each in fast) * 1000, "ms", at_most=900)
    go_on()


def test_a_ping_that_is_answered_in_part_is_bounded(
    start: Any, known_cluster: Any, proxy_to: Any, measured: Any
) -> None:
    """As where a pooler or the network comes between the two messages that are the answer."""
    proxy = proxy_to(known_cluster.standbys[0])
    entry = server(known_cluster.standbys[0], port=proxy.port, connect_timeout=CONNECT)
    start([entry], ping="always", ping_timeout=PING)
    assert call().error is None
    proxy.lose_after(5)  # EmptyQueryResponse
    found = call()
    assert isinstance(found.error, pgdbpool.DBOfflineError)
    measured("the call that finds it by its ping", found.took, at_most=PING + CONNECT + 1)


def test_a_pooler_that_does_not_tell_the_role_is_bounded(
    start: Any, known_cluster: Any, proxy_to: Any, measured: Any
) -> None:
    """It is asked at the checkout, where the server it is in front of may be another by now."""
    proxy = proxy_to(known_cluster.primary)
    entry = server(known_cluster.primary, port=proxy.port, pooler="transaction", query_timeout="10 s")
    start([entry], ping="always", ping_timeout=PING, target="primary", timeout=0.5)
    assert call().error is None
    Connection.group("g").endpoints[0].suspected_at = time.monotonic()  # as when it has refused a write
    proxy.lose_after(11)  # the answer to the ping
    found = call()
    assert isinstance(found.error, pgdbpool.DBConnectionError)
    measured("a checkout that may take 0.5 s", found.took, at_most=PING + 1)


@pytest.mark.parametrize("use", ["stream", "COPY"])
def test_leaving_a_result_early_on_a_hung_server_is_bounded(
    start: Any, hung: Any, measured: Any, use: str
) -> None:
    entry, hang, _ = hung(query_timeout=f"{10 * QUERY} s", connect_timeout=CONNECT)
    start([entry], ping_timeout=PING)
    numbers = "SELECT i, repeat('x', 1000) FROM generate_series(1, 100000) i"
    began = 0.0
    with Handler("g") as db, pytest.raises(KeyError), db.connection.cursor() as cursor:
        if use == "stream":
            for _ in cursor.stream(numbers):
                hang()
                began = time.monotonic()
                raise KeyError
        with cursor.copy(f"COPY ({numbers}) TO STDOUT") as copy:
            for _ in copy:
                hang()
                began = time.monotonic()
                raise KeyError
    measured(f"the end of a {use}", time.monotonic() - began, at_most=4)


def test_many_sets_of_parameters_on_a_hung_server_are_bounded(
    start: Any, known_cluster: Any, proxy_to: Any, measured: Any
) -> None:
    known_cluster.primary.execute("CREATE TABLE t (i int)")
    proxy = proxy_to(known_cluster.primary)
    entry = server(known_cluster.primary, port=proxy.port, query_timeout="500 ms")
    start([entry], ping_timeout=PING)
    with Handler("g") as db:
        began = time.monotonic()
        db.executemany("SELECT pg_sleep(%s)", [(0.3,)] * 15)
        measured("15 sets that take 0.3 s each", time.monotonic() - began, at_least=4.4)
        proxy.stall()
        began = time.monotonic()
        with pytest.raises(pgdbpool.QueryDeadlineError):
            db.executemany("INSERT INTO t VALUES (%s)", [(i,) for i in range(1000)])
        measured("1,000 sets, each of at most 0.5 s", time.monotonic() - began, at_most=8)


@pytest.mark.parametrize("use", ["stream", "COPY"])
def test_a_result_left_early_leaves_no_bound_behind(start: Any, known_cluster: Any, use: str) -> None:
    """Also by a cursor that is psycopg's own."""
    start([known_cluster.standbys[0]], connection_count=1)
    numbers = "SELECT i, repeat('x', 1000) FROM generate_series(1, 1000) i"
    for kind in (None, psycopg.ClientCursor) * 2:
        with Handler("g") as db, suppress(KeyError):
            db.query("SELECT 1")
            cursor = db.connection.cursor() if kind is None else kind(db.connection)
            if use == "stream":
                for _ in cursor.stream(numbers):
                    raise KeyError
            with cursor.copy(f"COPY ({numbers}) TO STDOUT") as copy:
                for _ in copy:
                    raise KeyError
        with Handler("g") as db:
            assert db.connection.until is None


def test_a_statement_with_its_own_timeout_is_bounded_on_a_hung_server(
    start: Any, hung: Any, measured: Any
) -> None:
    entry, hang, _ = hung(query_timeout=f"{QUERY} s", connect_timeout=CONNECT)
    start([entry], ping_timeout=PING)
    with Handler("g") as db:
        db.query("SELECT length('a temp note on statement_timeout')")
        db.query("SET statement_timeout = '1500ms'")
        hang()
        began = time.monotonic()
        with pytest.raises(pgdbpool.QueryDeadlineError):
            db.query("SELECT 1")
        measured("a statement of at most 1.5 s", time.monotonic() - began, at_most=5, at_least=2.5)

"""A server that is there and does not answer: every wait has a bound, and only who met it pays."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from load import Load, call
from support import server, wait_for

import pgdbpool
from pgdbpool import Connection, Handler, group

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
def test_a_hurried_ping_is_no_evidence_and_costs_what_it_may(
    start: Any, known_cluster: Any, proxy_to: Any, measured: Any, timeout: float, monkeypatch: Any
) -> None:
    proxy = proxy_to(known_cluster.standbys[0])
    start([server(known_cluster.standbys[0], port=proxy.port)], ping="always", ping_timeout=5)
    with monkeypatch.context() as patched:
        patched.setattr(group, "HURRY", 5)  # that long on a machine that is busy
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

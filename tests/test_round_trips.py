"""Round trips are counted by a proxy between the pool and the server: exact, whatever the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import config, server

from pgdbpool import Connection, Handler


@pytest.fixture(params=["threaded", "non-threaded"])
def counted(
    request: pytest.FixtureRequest, known_cluster: Any, proxy_to: Any
) -> Iterator[Callable[..., Any]]:
    """Initialise groups `auto` and `manual` behind a counting proxy, which is returned."""
    proxy = proxy_to(known_cluster.primary)
    entry = server(known_cluster.primary, port=proxy.port)

    def init(**changes: Any) -> Any:
        auto = {"connection_count": 1, **changes}
        manual = {**auto, "autocommit": False}
        Connection.init(config([entry], request.param, auto=auto, manual=manual))
        proxy.reset_counts()
        return proxy

    yield init
    Connection.reset()


def trips(proxy: Any) -> int:
    """Both counts agree: what the client sent and waited for, and what makes a server answer."""
    assert proxy.round_trips == proxy.syncs
    count = int(proxy.round_trips)
    proxy.reset_counts()
    return count


def test_a_checkout_of_an_idle_connection_takes_none(counted: Any) -> None:
    proxy = counted()
    for group in ("auto", "manual"):
        with Handler(group):
            pass
    assert trips(proxy) == 0


@pytest.mark.parametrize("n", [1, 3, 10])
def test_an_autocommit_block_of_n_statements_takes_n(counted: Any, n: int) -> None:
    proxy = counted()
    with Handler("auto") as db:
        for i in range(n):
            db.query("SELECT %s::int", (i,)).fetchall()
    assert trips(proxy) == n


@pytest.mark.parametrize("n", [1, 3, 10])
@pytest.mark.parametrize("end", ["exit", "commit", "rollback", "exception"])
def test_a_manual_block_of_n_statements_takes_n_and_one(counted: Any, n: int, end: str) -> None:
    proxy = counted(prepare_threshold=None)
    try:
        with Handler("manual") as db:
            for i in range(n):
                db.query("SELECT %s::int", (i,)).fetchall()
            if end == "commit":
                db.commit()
            elif end == "rollback":
                db.rollback()
            elif end == "exception":
                raise RuntimeError
    except RuntimeError:
        pass
    assert trips(proxy) == n + 1


def test_each_transaction_of_a_manual_block_costs_its_commit_only(counted: Any) -> None:
    proxy = counted()
    with Handler("manual") as db:
        db.query("SELECT 1")
        db.commit()
        db.query("SELECT 2")
        db.query("SELECT 3")
        db.commit()
    assert trips(proxy) == 5


def test_what_cannot_ride_costs_one_more(counted: Any) -> None:
    proxy = counted()
    with Handler("manual") as db:
        db.query("SELECT 1; SELECT 2")
    assert trips(proxy) == 3
    with Handler("auto") as db:  # nothing has to go before it here
        db.query("SELECT 1; SELECT 2")
    assert trips(proxy) == 1


def test_a_statement_is_prepared_in_the_same_round_trip(counted: Any) -> None:
    proxy = counted(prepare_threshold=2)
    for _ in range(5):
        with Handler("manual") as db:
            db.query("SELECT %s::int", (1,))
    assert trips(proxy) == 10


def test_ping_always_costs_one_and_only_then(counted: Any) -> None:
    for ping, expected in (("always", 1), ("auto", 0), ("never", 0)):
        proxy = counted(ping=ping)
        with Handler("auto"):
            pass
        assert trips(proxy) == expected


def test_a_connection_idle_for_long_is_pinged_once(counted: Any) -> None:
    proxy = counted(ping_after="30s")
    with Handler("auto") as db:
        conn = db.connection
    conn.used_at -= 31
    for _ in range(2):
        with Handler("auto") as db:
            db.query("SELECT 1")
    assert trips(proxy) == 3

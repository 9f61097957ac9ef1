"""Round trips are counted by a proxy between the pool and the server: exact, whatever the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
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


def test_statements_that_cannot_ride_cost_one_more(counted: Any) -> None:
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
        conn = db._conn
    assert conn is not None
    conn.used_at -= 31
    for _ in range(2):
        with Handler("auto") as db:
            db.query("SELECT 1")
    assert trips(proxy) == 3


# The query methods and the one-shots.

ONE_SHOTS = {
    "fetch": lambda group, **use: Connection.fetch(group, "SELECT %s::int", (1,), **use),
    "fetchrow": lambda group, **use: Connection.fetchrow(group, "SELECT %s::int", (1,), **use),
    "fetchval": lambda group, **use: Connection.fetchval(group, "SELECT 1", **use),
    "execute": lambda group, **use: Connection.execute(group, "CREATE TABLE IF NOT EXISTS t (i int)", **use),
    "executemany": lambda group, **use: Connection.executemany(
        group, "SELECT %s::int", [(i,) for i in range(100)], **use
    ),
    "fetchmany": lambda group, **use: Connection.fetchmany(group, "SELECT %s::int", [(1,), (2,)], **use),
}
TENANT = {"tenant": {"setting": "app.tenant", "verify": "off"}}
WITH_TENANT = pytest.mark.parametrize("tenant", [False, True], ids=["plain", "tenant"])


def with_tenant(tenant: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a group and what a block has then."""
    settings = {"settings": {"work_mem": "5MB"}}
    return (TENANT, {"tenant": "a", **settings}) if tenant else ({}, {})


@pytest.mark.parametrize("method", list(ONE_SHOTS))
@pytest.mark.parametrize("group", ["auto", "manual"])
@WITH_TENANT
def test_a_one_shot_takes_one(counted: Any, method: str, group: str, tenant: bool) -> None:
    changes, use = with_tenant(tenant)
    proxy = counted(**changes, prepare_threshold=2)
    for _ in range(4):  # also where it is prepared, and after that
        ONE_SHOTS[method](group, **use)
        assert trips(proxy) == 1


@WITH_TENANT
def test_a_one_shot_that_fails_takes_one_more_to_roll_back(counted: Any, tenant: bool) -> None:
    changes, use = with_tenant(tenant)
    proxy = counted(**changes)
    for group, expected in (("auto", 1), ("manual", 2)):
        for _ in range(3):
            with pytest.raises(psycopg.errors.DivisionByZero):
                Connection.fetch(group, "SELECT 1 / 0", **use)
            assert trips(proxy) == expected
    later = "REFERENCES child DEFERRABLE INITIALLY DEFERRED"
    Connection.execute("auto", f"CREATE TABLE child (i int PRIMARY KEY, j int {later})", **use)
    proxy.reset_counts()
    for group in ("auto", "manual"):
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            Connection.execute(group, "INSERT INTO child VALUES (1, 2)", **use)
        assert trips(proxy) == 1  # rolled back by its own COMMIT


@WITH_TENANT
def test_a_one_shot_that_cannot_ride_takes_the_ordinary_way(counted: Any, tenant: bool) -> None:
    changes, use = with_tenant(tenant)
    proxy = counted(**changes)
    for group, expected in (("auto", 3 if tenant else 1), ("manual", 3)):
        for statement in ("SELECT 1; SELECT 2", "DO $$ BEGIN END $$"):
            Connection.execute(group, statement, **use)
            assert trips(proxy) == expected


@WITH_TENANT
def test_the_methods_of_a_block_take_one_each(counted: Any, tenant: bool) -> None:
    changes, use = with_tenant(tenant)
    proxy = counted(**changes)
    for group in ("auto", "manual"):
        with Handler(group, **use) as db:
            db.fetch("SELECT %s::int", (1,))
            db.fetchrow("SELECT 1")
            db.fetchval("SELECT 1")
            db.execute("SELECT 1")
            db.executemany("SELECT %s::int", [(1,), (2,)])
            db.fetchmany("SELECT %s::int", [(1,), (2,)])
            db.executemany("SELECT %s::int", [])
            assert trips(proxy) == 6
        assert trips(proxy) == (group == "manual")
    with Handler("manual", **use) as db:  # the preamble rides
        db.fetchmany("SELECT %s::int", [(1,), (2,)])
    assert trips(proxy) == 2

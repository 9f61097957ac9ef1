"""Several servers: spread by weight, passed over when they are down, taken back when they return."""

from __future__ import annotations

import logging
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import config, nobody, server, wait_for

import pgdbpool
from pgdbpool import Connection, Handler
from pgdbpool.cluster import Cluster


@pytest.fixture(params=["threaded", "non-threaded"])
def start(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    def init(nodes: Any, wait: bool = True, **changes: Any) -> None:
        group = {"connection_count": 6, **changes}
        Connection.init(config(nodes, request.param, g=group), wait=wait)

    yield init
    Connection.reset()


def counts() -> list[int]:
    return list(Connection.status().groups["g"].connections.values())


def use(n: int = 12) -> Counter[str]:
    """Run n blocks and count them by endpoint."""
    used: Counter[str] = Counter()
    for _ in range(n):
        with Handler("g") as db:
            db.query("SELECT 1")
            used[db.endpoint] += 1
    return used


# Spreading.


@pytest.mark.parametrize("balance", ["round-robin", "least-connections"])
@pytest.mark.parametrize("weights", [(1, 1, 1), (3, 2, 1), (8, 1, 1), (1, 5, 4)])
def test_connections_follow_the_weights_within_one(
    start: Any, known_cluster: Any, weights: tuple[int, ...], balance: str
) -> None:
    for size in (1, 4, 10):
        entries = [server(n, weight=w) for n, w in zip(known_cluster.nodes, weights, strict=True)]
        start(entries, connection_count=size, balance=balance)
        for count, weight in zip(counts(), weights, strict=True):
            assert abs(count - size * weight / sum(weights)) <= 1
        assert sum(counts()) == size


def test_a_random_balance_draws_by_weight(start: Any, known_cluster: Any) -> None:
    heavy, light = (server(n, weight=w) for n, w in zip(known_cluster.standbys, (9, 1), strict=True))
    start([heavy, light], connection_count=24, balance="random")
    first, second = counts()
    assert first + second == 24
    assert first > second  # otherwise once in a million times
    start([heavy, nobody()], balance="random")
    assert set(use()) == {known_cluster.standbys[0].label}


def test_blocks_use_every_endpoint(start: Any, known_cluster: Any) -> None:
    start(known_cluster.nodes)
    assert set(use(18).values()) == {6}


@pytest.mark.parametrize(
    ("target", "serving"),
    [
        ("any", [0, 1, 2]),
        ("primary", [0]),
        ("read-write", [0]),
        ("standby", [1, 2]),
        ("read-only", [1, 2]),
        ("prefer-standby", [1, 2]),
    ],
)
def test_a_target_is_served_by_its_role_only(
    start: Any, known_cluster: Any, target: str, serving: list[int]
) -> None:
    start(known_cluster.nodes, target=target)
    labels = [node.label for node in known_cluster.nodes]
    assert set(use()) == {labels[i] for i in serving}


def test_a_group_uses_its_endpoints_only(start: Any, known_cluster: Any) -> None:
    entries = [server(node, label=f"n{i}") for i, node in enumerate(known_cluster.nodes)]
    start(entries, endpoints=["n2", "n0"])
    assert set(use()) == {"n0", "n2"}


def test_prefer_standby_takes_the_primary_when_no_standby_is_there(start: Any, known_cluster: Any) -> None:
    start([known_cluster.primary, nobody()], target="prefer-standby")
    assert set(use()) == {known_cluster.primary.label}


# Down and back.


def test_one_endpoint_down_at_start_is_a_warning(
    start: Any, known_cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    gone = nobody()
    start([gone, known_cluster.primary])
    assert set(use()) == {known_cluster.primary.label}
    assert f"endpoint 127.0.0.1:{gone['port']} is down" in caplog.text
    assert Connection.status().endpoints[f"127.0.0.1:{gone['port']}"].state in ("down", "probing")
    caplog.clear()
    start([known_cluster.primary, gone], connection_count=1)  # also where it was not needed yet
    assert f"endpoint 127.0.0.1:{gone['port']} is down" in caplog.text


@pytest.mark.slow
def test_an_endpoint_that_goes_down_is_passed_over_and_comes_back(
    start: Any, known_cluster: Any, proxy_to: Any
) -> None:
    first, second = known_cluster.standbys
    proxy = proxy_to(second)
    start([first, server(second, port=proxy.port)])
    assert len(use()) == 2
    proxy.stop()
    began = time.monotonic()
    assert set(use(50)) == {first.label}  # not one error
    print(f"50 blocks after an endpoint went down: {(time.monotonic() - began) * 1000:.0f} ms")
    proxy.start()
    began = time.monotonic()
    wait_for(lambda: len(use()) == 2, 10, "the endpoint is used again")
    wait_for(lambda: use() and abs(counts()[0] - counts()[1]) <= 1, 30, "its fair share")
    print(f"fair share again {time.monotonic() - began:.1f} s after its return: {counts()}")


@pytest.mark.slow
def test_a_killed_server_costs_no_error_at_checkout(start: Any, known_cluster: Any) -> None:
    standby, other = known_cluster.standbys
    start([standby, other])
    standby.kill()
    assert set(use(30)) == {other.label}
    standby.start()
    wait_for(lambda: len(use()) == 2, 15)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["restart", "kill"])
def test_twenty_stale_connections_after_a_restart_cost_no_error(
    start: Any, known_cluster: Any, how: str
) -> None:
    standby = known_cluster.standbys[0]
    start([standby], connection_count=20)
    if how == "restart":
        standby.restart()
    else:
        standby.kill()
        standby.start()
    began = time.monotonic()
    use(1)
    first = time.monotonic() - began
    use(30)
    print(f"first success {first * 1000:.1f} ms after the server accepts, 20 stale connections")
    assert first < 1  # milliseconds; a sleep between checks would be a second and more


@pytest.mark.slow
def test_all_down_is_one_error_at_once_with_each_endpoints_reason(
    start: Any, known_cluster: Any, proxy_to: Any
) -> None:
    proxies = [proxy_to(node) for node in known_cluster.standbys]
    entries = [server(n, port=p.port) for n, p in zip(known_cluster.standbys, proxies, strict=True)]
    start(entries, timeout=20)
    for proxy in proxies:
        proxy.stop()
    for _ in range(3):
        began = time.monotonic()
        with pytest.raises(pgdbpool.DBOfflineError) as caught, Handler("g"):
            pass
        assert time.monotonic() - began < 5
        for proxy in proxies:
            assert f"127.0.0.1:{proxy.port}" in str(caught.value)
            assert caught.value.endpoints[f"127.0.0.1:{proxy.port}"]
        assert "refused" in str(caught.value)
    for proxy in proxies:
        proxy.start()

    def works() -> bool:
        try:
            return bool(use(1))
        except pgdbpool.DBOfflineError:
            return False

    began = time.monotonic()
    wait_for(works, 10)
    print(f"first success {time.monotonic() - began:.2f} s after the servers are back")


@pytest.mark.slow
def test_a_down_endpoint_is_dialled_at_most_twice_a_second(start: Any, known_cluster: Any) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        listener.settimeout(0.01)
        hung = {"host": "127.0.0.1", "port": listener.getsockname()[1], "name": "x", "user": "x"}
        start([known_cluster.primary, {**hung, "connect_timeout": 0.2}], connection_count=2)
        dials: list[float] = []
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            use(3)
            try:
                accepted, _ = listener.accept()
            except TimeoutError:
                continue
            dials.append(time.monotonic())
            accepted.close()
    print(f"{len(dials)} dials in 3 s")
    assert 2 <= len(dials) <= 8  # the first, what it was asked, and two a second


@pytest.mark.slow
def test_a_hung_server_is_found_by_the_ping_and_costs_one_request(
    start: Any, known_cluster: Any, proxy_to: Any
) -> None:
    first, second = known_cluster.standbys
    proxy = proxy_to(second)
    start([first, server(second, port=proxy.port)], ping="always", ping_timeout=1)
    proxy.stall()
    slow = 0
    for _ in range(30):
        began = time.monotonic()
        assert set(use(1)) == {first.label}
        slow += time.monotonic() - began > 0.9
    assert slow <= 1
    proxy.resume()
    wait_for(lambda: len(use()) == 2, 15)


def test_a_request_in_a_hurry_puts_no_endpoint_down(start: Any, known_cluster: Any, proxy_to: Any) -> None:
    proxy = proxy_to(known_cluster.primary)
    start([server(known_cluster.primary, port=proxy.port)], wait=False)
    proxy.stall()
    with pytest.raises(pgdbpool.DBConnectionError, match="no answer"), Handler("g", timeout=0.05):
        pass
    (endpoint,) = Connection.status().endpoints.values()
    assert endpoint.state == "up"
    proxy.resume()
    use(1)


@pytest.mark.slow
def test_a_statement_on_a_hung_server_ends_with_its_deadline(
    start: Any, known_cluster: Any, proxy_to: Any
) -> None:
    proxy = proxy_to(known_cluster.primary)
    start([server(known_cluster.primary, port=proxy.port, query_timeout=200)])
    with Handler("g") as db:
        proxy.stall()
        began = time.monotonic()
        with pytest.raises(pgdbpool.QueryDeadlineError) as caught:
            db.query("SELECT 1")
        took = time.monotonic() - began
        proxy.resume()
    assert caught.value.maybe_executed
    print(f"query_timeout 0.2 s: the client gave up after {took:.2f} s")
    assert 1.1 < took < 5


def writes() -> bool:
    try:
        with Handler("write") as db:
            db.query("CREATE TABLE IF NOT EXISTS moved (i int)")
    except pgdbpool.DBConnectionError:
        return False
    return True


@pytest.mark.slow
def test_roles_move_with_the_servers() -> None:
    with Cluster(standbys=1) as cluster:
        old, new = cluster.primary, cluster.standbys[0]
        for mode in ("threaded", "non-threaded"):
            groups = {
                "write": {"connection_count": 2, "target": "primary", "autocommit": False},
                "read": {"connection_count": 2, "target": "prefer-standby"},
            }
            Connection.init(config([old, new], mode, **groups))
            try:
                with Handler("write") as db:
                    assert db.endpoint == old.label
                with Handler("read") as db:
                    assert db.endpoint == new.label
                old.stop()
                new.promote()

                wait_for(writes, 10)
                with Handler("write") as db:
                    assert db.endpoint == new.label
            finally:
                Connection.reset()
            old.rejoin(new)
            old, new = new, old


# What init says.


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "no_such_database"}, "no_such_database"),
        ({"user": "no_such_role"}, "no_such_role"),
        ({"ssl": "require"}, "SSL"),
        ({"options": {"no_such.setting": "1", "work_mem": "lots"}}, "work_mem"),
    ],
)
def test_init_names_each_endpoints_own_cause(
    start: Any, known_cluster: Any, changes: dict[str, Any], says: str
) -> None:
    gone = nobody()
    with pytest.raises(pgdbpool.DBConnectionError) as caught:
        start([server(known_cluster.primary, **changes), gone])
    assert says in caught.value.endpoints[known_cluster.primary.label]
    assert "refused" in caught.value.endpoints[f"127.0.0.1:{gone['port']}"]
    assert says in str(caught.value)
    assert not isinstance(caught.value, pgdbpool.DBOfflineError)  # one of them is there


@pytest.mark.slow
def test_init_fails_within_the_connect_timeout(start: Any, known_cluster: Any, proxy_to: Any) -> None:
    proxies = [proxy_to(node) for node in known_cluster.nodes]
    for proxy in proxies:
        proxy.stall()
    began = time.monotonic()
    with pytest.raises(pgdbpool.DBConnectionError, match="no answer"):
        start([server(known_cluster.primary, port=p.port, connect_timeout=2) for p in proxies], wait="all")
    took = time.monotonic() - began
    print(f"three servers that do not answer, connect_timeout 2 s: {took:.2f} s")
    assert took < 5  # one after another it would be 6


@pytest.mark.slow
def test_a_password_is_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "s3cr3t-passw0rd"
    right = "the-r1ght-one"
    with Cluster(standbys=0, auth="scram-sha-256", password=right) as cluster:
        good = server(cluster.primary, **{"pass": right})
        for mode in ("threaded", "non-threaded"):
            Connection.init(config([good], mode, g={"connection_count": 1}))
            with Handler("g") as db:
                assert db.query("SELECT 1").fetchone()[0] == 1
            Connection.reset()
            with pytest.raises(pgdbpool.DBConnectionError, match="password") as caught:
                Connection.init(config([{**good, "pass": secret}], mode, g={"connection_count": 1}))
            error: BaseException | None = caught.value
            while error is not None:
                assert secret not in f"{error!r} {error} {getattr(error, 'endpoints', '')}"
                error = error.__cause__
            uri = f"postgresql://postgres:{secret}@{cluster.primary.label}/postgres"
            with pytest.raises(pgdbpool.DBConnectionError) as caught:
                Connection.init(config([{"conninfo": uri}], mode, g={"connection_count": 1}))
            assert secret not in str(caught.value)
    assert secret not in caplog.text
    assert not re.search(right, caplog.text)

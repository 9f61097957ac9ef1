"""What changes while the process runs: sizes, servers, a whole configuration; what has not changed stays."""

from __future__ import annotations

import copy
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support import config, pid_of, server, wait_for

import pgdbpool
from pgdbpool import Connection, Handler
from pgdbpool._process.observer import Observer
from pgdbpool.cluster import Cluster

pytestmark = pytest.mark.slow


@pytest.fixture
def pools(known_cluster: Cluster, mode: str) -> Iterator[Callable[..., dict[str, Any]]]:
    """Initialise groups over the three servers `a` (the primary), `b` and `c`; return the configuration."""

    def init(labels: str = "abc", **groups: dict[str, Any]) -> dict[str, Any]:
        entries = [entry(known_cluster, label) for label in labels]
        made = config(entries, mode, **(groups or {"g": {"connection_count": 3}}))
        Connection.init(made)
        return copy.deepcopy(made)

    yield init
    Connection.reset()


def entry(cluster: Cluster, label: str) -> dict[str, Any]:
    nodes = [cluster.primary, *cluster.standbys]
    return server(nodes["abc".index(label)], label=label)


def pids(group: str = "g", count: int = 3) -> set[int]:
    """Return the backends of as many connections, all that the group has."""
    blocks = [Handler(group) for _ in range(count)]
    try:
        return {pid_of(block.__enter__()) for block in blocks}
    finally:
        for block in blocks:
            block.__exit__(None, None, None)


def spread(group: str = "g") -> dict[str, int]:
    return Connection.status().groups[group].connections


def settled(group: str, wanted: dict[str, int]) -> None:
    """Wait until the connections are where they are wanted, with blocks that come and go."""
    count = sum(wanted.values())

    def there() -> bool:
        pids(group, count)
        return spread(group) == wanted

    wait_for(there, what=f"{wanted}")


# expire


def test_expire_replaces_every_connection(pools: Any) -> None:
    pools()
    with Handler("g") as db:
        before = pids(count=2) | {pid_of(db)}
        Connection.expire("g")
        assert db.query("SELECT 1").fetchone()[0] == 1
    wait_for(lambda: len(pids()) == 3)
    assert not pids() & before
    assert Connection.status().groups["g"].discarded == {"expired": 3}


def test_expire_of_one_group_leaves_the_others(pools: Any) -> None:
    pools(g={"connection_count": 3}, other={"connection_count": 3})
    before = pids("other")
    Connection.expire("g")
    assert pids("other") == before


def test_a_connection_that_was_being_opened_is_expired_too(known_cluster: Cluster) -> None:
    opening, expired = threading.Event(), threading.Event()

    def configure(conn: Any) -> None:
        opening.set()
        assert expired.wait(10)

    group = {"connection_count": 1, "min_size": 0, "configure": configure}
    Connection.init(config([known_cluster.primary], g=group), wait=False)
    try:
        found: list[set[int]] = []
        thread = threading.Thread(target=lambda: found.append(pids(count=1)))
        thread.start()
        assert opening.wait(10)
        Connection.expire("g")
        expired.set()
        thread.join(10)
        assert not pids(count=1) & found[0]
    finally:
        expired.set()
        Connection.reset()


# resize


def test_a_group_grows_and_shrinks(pools: Any) -> None:
    pools("a", g={"connection_count": 2})
    Connection.resize("g", 5)
    assert len(pids(count=5)) == 5
    assert Connection.get_max_pool_size("g") == 5
    wait_for(lambda: pids(count=1) and Connection.status().groups["g"].size == 5)
    with Handler("g"), Handler("g"), Handler("g"):
        Connection.resize("g", 1)
        assert Connection.status().groups["g"].size == 3
        with pytest.raises(pgdbpool.PoolTimeout), Handler("g", timeout=0.05):
            pass
    status = Connection.status().groups["g"]
    assert (status.size, status.min_size, status.max_size) == (1, 1, 1)
    assert status.discarded == {"surplus": 4}
    assert len(pids(count=1)) == 1


def test_waiters_get_added_connections(known_cluster: Cluster) -> None:
    Connection.init(config([known_cluster.primary], g={"connection_count": 1, "timeout": 10}))
    try:
        done: list[int] = []

        def block() -> None:
            with Handler("g") as db:
                done.append(pid_of(db))

        with Handler("g"):
            threads = [threading.Thread(target=block) for _ in range(2)]
            for thread in threads:
                thread.start()
            wait_for(lambda: Connection.status().groups["g"].waiting == 2)
            Connection.resize("g", 3)
            for thread in threads:
                thread.join(5)
            assert len(set(done)) == 2
    finally:
        Connection.reset()


def test_min_size_alone_can_be_changed(pools: Any) -> None:
    pools("a", g={"connection_count": 4, "min_size": 1})
    Connection.resize("g", min_size=3)

    def opened() -> bool:
        with Handler("g"):
            return Connection.status().groups["g"].size == 3

    wait_for(opened)
    Connection.resize("g", 2)
    assert Connection.status().groups["g"].min_size == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, None), r"groups\.g\.connection_count: must be an integer from 1"),
        ((True, None), r"groups\.g\.connection_count: must be an integer"),
        ((2, 3), r"groups\.g\.min_size: must be at most connection_count \(2\), not 3"),
        ((1, None), r"groups\.g\.reserved: must be below connection_count \(1\), not 1"),
    ],
)
def test_sizes_that_do_not_fit_change_nothing(pools: Any, sizes: Any, message: str) -> None:
    pools("a", g={"connection_count": 3, "reserved": 1})
    with pytest.raises(pgdbpool.ConfigError, match=message):
        Connection.resize("g", *sizes)
    assert Connection.get_max_pool_size("g") == 3


# add_endpoint and remove_endpoint


def test_a_server_that_is_added_gets_its_share(pools: Any, known_cluster: Cluster) -> None:
    pools("ab", g={"connection_count": 6}, fixed={"connection_count": 2, "endpoints": ["a"]})
    fixed = pids("fixed", 2)
    assert Connection.add_endpoint(entry(known_cluster, "c")) == "c"
    settled("g", {"a": 2, "b": 2, "c": 2})
    assert spread("fixed") == {"a": 2}
    assert pids("fixed", 2) == fixed


def test_a_server_is_added_to_named_groups(pools: Any, known_cluster: Cluster) -> None:
    pools("a", g={"connection_count": 2}, other={"connection_count": 2})
    Connection.add_endpoint(entry(known_cluster, "b"), groups=["other"])
    settled("other", {"a": 1, "b": 1})
    assert spread("g") == {"a": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "a"}, "label 'a' is that of another server"),
        ({"prot": 1}, "unknown key; did you mean 'port'"),
        ({"pooler": "transaction"}, r"groups\.g\.sqlprepare: prepares in the session"),
    ],
)
def test_a_server_that_is_wrong_is_not_added(
    pools: Any, known_cluster: Cluster, change: dict[str, Any], message: str
) -> None:
    pools("a", g={"connection_count": 1})
    if "pooler" in change:
        known_cluster.primary.execute(
            'CREATE SCHEMA "SQLPrepare"; CREATE FUNCTION "SQLPrepare"."PrepareQueries"() RETURNS void '
            "LANGUAGE sql AS ''"
        )
        Connection.reset()
        pools("a", g={"connection_count": 1, "sqlprepare": True})
    with pytest.raises(pgdbpool.ConfigError, match=message):
        Connection.add_endpoint({**entry(known_cluster, "b"), **change})
    assert list(Connection.status().endpoints) == ["a"]
    with pytest.raises(pgdbpool.UnconfiguredGroupError, match="no group 'h' is configured"):
        Connection.add_endpoint(entry(known_cluster, "b"), groups=["h"])


def test_a_server_that_is_removed_loses_its_connections(pools: Any) -> None:
    pools(g={"connection_count": 3}, other={"connection_count": 3})
    kept = {}
    blocks = [Handler("g") for _ in range(3)]
    for block in blocks:
        block.__enter__()
        kept[block.endpoint] = pid_of(block)
    Connection.remove_endpoint("b")
    assert list(Connection.status().endpoints) == ["a", "c"]
    for block in blocks:
        assert block.query("SELECT 1").fetchone()[0] == 1
        block.__exit__(None, None, None)
    after = pids()
    assert {kept["a"], kept["c"]} <= after
    assert kept["b"] not in after
    assert set(spread("other")) == {"a", "c"}
    assert set(spread()) == {"a", "c"}


def test_a_server_that_is_down_can_be_removed(pools: Any, known_cluster: Cluster) -> None:
    pools("ab", g={"connection_count": 2})
    known_cluster.standbys[0].kill()
    wait_for(lambda: pids(count=2) and Connection.status().endpoints["b"].state != "up")
    Connection.remove_endpoint("b")
    settled("g", {"a": 2})
    monitor = Connection._pools.monitor  # type: ignore[union-attr]
    wait_for(lambda: pids(count=1) and not monitor.prober.needed, what="it is probed no more")


def test_the_only_server_of_a_group_is_not_removed(pools: Any) -> None:
    pools("ab", g={"connection_count": 1}, h={"connection_count": 1, "endpoints": ["b"]})
    with pytest.raises(pgdbpool.ConfigError, match="it is the only server of group 'h'"):
        Connection.remove_endpoint("b")
    with pytest.raises(pgdbpool.UnknownEndpointError, match="no endpoint 'x' is configured"):
        Connection.remove_endpoint("x")
    assert list(Connection.status().endpoints) == ["a", "b"]


# reload


def test_reloading_the_same_configuration_touches_nothing(pools: Any) -> None:
    made = pools()
    before = pids()
    Connection.reload(made)
    assert pids() == before
    assert Connection.status().groups["g"].opened == 3


def test_unchanged_groups_keep_their_connections_at_a_reload(pools: Any, known_cluster: Cluster) -> None:
    made = pools("ab", g={"connection_count": 4}, old={"connection_count": 1})
    with Handler("g") as first, Handler("g") as second:
        at = {block.endpoint: pid_of(block) for block in (first, second)}
        made["db"][1]["application_name"] = "moved"
        del made["groups"]["old"]
        made["groups"]["new"] = {"connection_count": 1, "autocommit": False}
        made["groups"]["g"]["timeout"] = 0.5
        Connection.reload(made)
        for block in (first, second):
            assert block.query("SELECT 1").fetchone()[0] == 1
    settled("g", {"a": 2, "b": 2})
    after = pids(count=4)
    assert at["a"] in after, Connection.status()
    assert at["b"] not in after
    with Handler("new") as db:
        assert db.query("SELECT 1").fetchone()[0] == 1
    with pytest.raises(pgdbpool.UnconfiguredGroupError):
        Handler("old")
    standby = known_cluster.standbys[0]
    names = standby.execute(
        "SELECT DISTINCT application_name FROM pg_stat_activity WHERE pid = ANY(%s)", [list(after)]
    )
    assert names == [("moved",)]


@pytest.mark.parametrize(
    "change",
    [
        {"timeout": 1},
        {"ping": "always"},
        {"max_idle": 0},
        {"max_uses": 99},
        {"autocommit": False},
        {"balance": "random"},
    ],
    ids=str,
)
def test_keys_of_a_group_that_connections_do_not_have_change_without_them(pools: Any, change: Any) -> None:
    made = pools()
    before = pids()
    made["groups"]["g"].update(change)
    Connection.reload(made)
    assert pids() == before
    ((key, value),) = change.items()
    assert getattr(Connection.group("g").config, key) == value


def test_a_changed_rate_limit_keeps_its_count_of_refusals(pools: Any) -> None:
    made = pools(g={"connection_count": 1, "rate_limit": {"per_second": 0.01, "burst": 1, "max_wait": 0}})
    with Handler("g"):
        pass

    def refused() -> int:
        with pytest.raises(pgdbpool.RateLimitExceeded), Handler("g"):
            pass
        return Connection.status().groups["g"].rate_limited

    assert (refused(), refused()) == (1, 2)
    made["groups"]["g"]["rate_limit"]["per_second"] = 0.02
    Connection.reload(made)
    assert Connection.status().groups["g"].rate_limited == 2
    with Handler("g"):
        pass
    assert refused() == 3
    del made["groups"]["g"]["rate_limit"]
    Connection.reload(made)
    assert Connection.status().groups["g"].rate_limited == 3


@pytest.mark.parametrize(
    "change", [{"row_factory": "tuple"}, {"query_timeout": 1234}, {"prepare_threshold": None}], ids=str
)
def test_keys_of_a_group_that_connections_have_replace_them(pools: Any, change: Any) -> None:
    made = pools()
    before = pids()
    made["groups"]["g"].update(change)
    Connection.reload(made)
    assert not pids() & before


def test_a_block_of_a_removed_group_ends_without_an_error(pools: Any, known_cluster: Cluster) -> None:
    known_cluster.primary.execute("CREATE TABLE t (i int)")
    manual = {"connection_count": 1, "autocommit": False}
    made = pools("a", g={"connection_count": 1}, old=manual)
    with Handler("old") as db:
        db.query("INSERT INTO t VALUES (1)")
        del made["groups"]["old"]
        Connection.reload(made)
        db.query("INSERT INTO t VALUES (2)")
        pid = pid_of(db)
    assert known_cluster.primary.execute("SELECT count(*) FROM t") == [(2,)]
    gone = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s"
    wait_for(lambda: known_cluster.primary.execute(gone, [pid]) == [(0,)])


def test_close_waits_for_the_blocks_of_a_removed_group(known_cluster: Cluster) -> None:
    made = config([known_cluster.primary], g={"connection_count": 1}, old={"connection_count": 1})
    Connection.init(made)
    try:
        inside, leave = threading.Event(), threading.Event()
        results: list[Any] = []

        def block() -> None:
            with Handler("old") as db:
                inside.set()
                assert leave.wait(10)
                results.append(db.query("SELECT 1").fetchone()[0])

        thread = threading.Thread(target=block)
        thread.start()
        assert inside.wait(10)
        Connection.reload({**made, "groups": {"g": {"connection_count": 1}}})
        closing = threading.Thread(target=Connection.close)
        closing.start()
        wait_for(Connection.is_closing)
        assert closing.is_alive()
        leave.set()
        thread.join(10)
        closing.join(10)
        assert results == [1]
    finally:
        leave.set()
        Connection.reset()


def test_a_tenants_setting_can_change(pools: Any) -> None:
    tenant = {"setting": "app.one", "verify": "off"}
    made = pools("a", g={"connection_count": 1, "tenant": tenant})

    def tenants() -> tuple[Any, ...]:
        with Handler("g", tenant="x") as db:
            names = "current_setting('app.one', true), current_setting('app.two', true)"
            return tuple(value or None for value in db.query(f"SELECT {names}").fetchone())

    assert tenants() == ("x", None)
    made["groups"]["g"]["tenant"]["setting"] = "app.two"
    Connection.reload(made)
    assert tenants() == (None, "x")


def test_a_password_changes_without_touching_connections(pools: Any) -> None:
    made = pools("a", g={"connection_count": 2})
    before = pids(count=2)
    made["db"][0]["pass"] = "another"
    made["db"][0]["weight"] = 3
    Connection.reload(made)
    assert pids(count=2) == before
    assert Connection.group("g").endpoints[0].login.ask()["password"] == "another"


def test_a_wrong_call_changes_nothing(pools: Any, mode: str) -> None:
    made = pools()
    before = pids()
    wrong = copy.deepcopy(made)
    wrong["groups"]["g"]["conection_count"] = 1
    with pytest.raises(pgdbpool.ConfigError, match="did you mean 'connection_count'"):
        Connection.reload(wrong)
    made["type"] = "threaded" if mode == "non-threaded" else "non-threaded"
    with pytest.raises(pgdbpool.ConfigError, match=f"type: cannot change from {mode} to"):
        Connection.reload(made)
    assert pids() == before


def test_there_must_be_something_to_change() -> None:
    with pytest.raises(pgdbpool.NotInitializedError):
        Connection.reload({"db": {"host": "h"}, "groups": {"g": {}}})
    with pytest.raises(pgdbpool.NotInitializedError):
        Connection.remove_endpoint("a")


def test_max_lag_comes_and_goes(pools: Any) -> None:
    made = pools("ab", g={"connection_count": 2, "target": "standby", "max_lag": {"seconds": 30}})
    monitor = Connection._pools.monitor  # type: ignore[union-attr]

    def looks(wanted: bool) -> bool:
        with Handler("g"):
            return bool(monitor.observer.needed is wanted)

    wait_for(lambda: looks(True))
    limit = made["groups"]["g"].pop("max_lag")
    Connection.reload(made)
    wait_for(lambda: looks(False))
    made["groups"]["g"]["max_lag"] = limit
    Connection.reload(made)
    wait_for(lambda: looks(True) and Connection.status().endpoints["b"].lag_bytes is not None)


INTERRUPTED = {
    "_process/reload.py",
    "_api/connection.py",
    "_process/pools.py",
    "_lending/group.py",
    "_lending/configured.py",
    "_lending/closing.py",
    "_lending/eligibility.py",
    "_servers/endpoint.py",
    "_lending/threaded_pool.py",
    "_lending/lock_free_pool.py",
    "_process/background.py",
    "_lending/hold_limits.py",
}


def tangled(pools: Any) -> list[str]:
    """Return which parts of the pools have another configuration than the pools themselves."""
    made, wrong = pools.config, []
    if {label: endpoint.config for label, endpoint in pools.endpoints.items()} != {
        entry.label: entry for entry in made.endpoints
    }:
        wrong.append("the endpoints")
    for name, described in made.groups.items():
        group = pools.groups[name]
        members = [pools.endpoints[label] for label in described.endpoints]
        limit = group.limiter and group.limiter._config
        if not (
            group.config is described
            and list(group.endpoints) == members
            and (group._timeout, limit) == (described.timeout, described.rate_limit)
            and group._pool._slots.limit == described.connection_count
            and group._pool._min_size == described.min_size
            and not any(group not in endpoint.groups for endpoint in members)
        ):
            wrong.append(name)
    if list(pools.groups) != list(made.groups) or pools.monitor.holds._groups != [
        group for group in pools.all_groups if group.config.max_hold
    ]:
        wrong.append("the groups")
    observer = pools.monitor._next or pools.monitor.observer
    if observer.plan != Observer(pools.groups.values()).plan:
        wrong.append("what the observer looks at")
    return wrong


@pytest.mark.parametrize("second", ["reload", "resize"])
def test_a_change_that_a_signal_handlers_change_interrupts_ends_in_one_of_the_two(
    pools: Any, known_cluster: Cluster, mode: str, second: str
) -> None:
    """Interrupted at each line that it comes to."""

    def made(labels: str, groups: str, **group: Any) -> dict[str, Any]:
        entries = [entry(known_cluster, label) for label in labels]
        return config(entries, mode, **{name: {"min_size": 0, **group} for name in groups})

    limit = {"per_second": 1, "burst": 1, "max_wait": 0}
    first = made("abc", "gh", connection_count=5, timeout=5, max_hold=5, rate_limit=limit)
    other = made("bc", "gi", connection_count=7, timeout=7, target="standby")

    def handler() -> None:
        if second == "reload":
            Connection.reload(other)
        else:
            Connection.resize("g", 9)

    def interrupted(line: int) -> bool:
        lines = 0

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal lines
            if "/".join(Path(frame.f_code.co_filename).parts[-2:]) not in INTERRUPTED:
                return None
            lines += event == "line"
            if lines == line:
                sys.settrace(None)
                handler()
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            Connection.reload(first)
        finally:
            sys.settrace(before)
        return lines >= line

    outcomes, line = set(), 0
    while True:
        line += 1
        Connection.init(made("ab", "gh", connection_count=3), wait=False)
        if not interrupted(line):
            break
        now = Connection._pools
        assert now is not None
        assert not tangled(now), line
        outcomes.add((tuple(now.groups), now.config.groups["g"].connection_count))
        with ThreadPoolExecutor(1) as elsewhere:
            elsewhere.submit(Connection.resize, "h" if "h" in now.groups else "i", 4).result(5)
        with Handler("g") as db:
            assert db.query("SELECT 1").fetchone()[0] == 1
    assert line > 100
    assert outcomes == {(("g", "h"), 5), (("g", "i"), 7) if second == "reload" else (("g", "h"), 9)}


def test_a_forked_child_has_the_changed_configuration(pools: Any) -> None:
    pools("a", g={"connection_count": 1})
    Connection.resize("g", 2)
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if len(pids(count=2)) == 2 else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_changes_under_load_fail_no_block(known_cluster: Cluster) -> None:
    nodes = {label: entry(known_cluster, label) for label in "ab"}
    group = {"connection_count": 4, "timeout": 10}
    made = config([nodes["a"]], g=group)
    Connection.init(made)
    failures: list[BaseException] = []
    stop, blocks = threading.Event(), [0, 0, 0, 0, 0, 0]

    def work(number: int) -> None:
        while not stop.is_set():
            try:
                with Handler("g") as db:
                    assert db.query("SELECT %s::int", (number,)).fetchone()[0] == number
            except Exception as error:  # noqa: BLE001 - a thread of the test
                failures.append(error)
                return
            blocks[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(blocks))]
    try:
        for thread in threads:
            thread.start()
        for turn in range(20):
            before = sum(blocks)
            Connection.add_endpoint(nodes["b"])
            Connection.resize("g", 2 + turn % 4)
            Connection.expire("g")
            Connection.remove_endpoint("b")
            Connection.reload(made)
            wait_for(lambda before=before: failures or sum(blocks) > before + 20)  # type: ignore[misc]
        stop.set()
        for thread in threads:
            thread.join(10)
        assert not failures
        status = Connection.status().groups["g"]
        assert status.in_use == status.waiting == 0
        wait_for(lambda: pids("g", 4) and Connection.status().groups["g"].size == 4)
    finally:
        stop.set()
        Connection.reset()

"""Sizing: recommendations from numbers, what a configuration can open, and the warning at init."""

from __future__ import annotations

import doctest
import json
import logging
import random
from collections.abc import Iterator
from typing import Any

import pytest
from support import config, server

from pgdbpool import Connection, sizing
from pgdbpool._config.load import load
from pgdbpool.sizing import Server, demand, recommend

GROUPS = {"read": ["a", "b"], "write": ["a", "b"]}


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    yield
    Connection.reset()


def test_a_group_needs_no_more_than_the_process_has_threads() -> None:
    found = recommend(GROUPS, dict.fromkeys("ab", Server(1000)), processes=4, threads=8)
    assert {size.connection_count for size in found.groups.values()} == {8}
    assert {size.limited_by for size in found.groups.values()} == {"threads"}
    assert (found.fits, found.type) == (True, "threaded")
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_the_example_of_the_module_holds() -> None:
    assert doctest.testmod(sizing) == (0, 2)


def test_one_thread_is_lock_free_with_one_connection() -> None:
    found = recommend(GROUPS, dict.fromkeys("ab", Server(100)), processes=4)
    assert {size.connection_count for size in found.groups.values()} == {1}
    assert found.type == "non-threaded"


def test_the_smallest_server_limits_the_groups_that_use_it() -> None:
    servers = {"a": Server(100, reserved=0), "b": Server(20, reserved=0)}
    found = recommend({"read": ["b"], "write": ["a"]}, servers, processes=4, threads=8)
    assert found.groups["read"].connection_count == 4  # 20 less a tenth, over 4 processes
    assert found.groups["read"].limited_by == "what b admits"
    assert found.groups["write"].connection_count == 8


def test_the_cores_limit_the_connections_worth_opening() -> None:
    found = recommend({"g": ["a"]}, {"a": Server(1000, cores=4)}, processes=2, threads=50, busy=0.5)
    assert found.groups["g"].connection_count == 9  # (2 * 4 + 1) / 0.5 over 2 processes
    assert found.groups["g"].limited_by == "the cores of a"


def test_sizes_that_cannot_fit_are_reported_with_the_need() -> None:
    found = recommend(GROUPS, dict.fromkeys("ab", Server(20)), processes=16, threads=2)
    assert not found.fits
    assert {size.connection_count for size in found.groups.values()} == {1}
    again = Server(found.servers["a"]["max_connections_needed"])
    found = recommend(GROUPS, dict.fromkeys("ab", again), processes=16, threads=2)
    assert {size.connection_count for size in found.groups.values()} == {2}
    assert {size.limited_by for size in found.groups.values()} == {"threads"}


@pytest.mark.parametrize("seed", range(300))
def test_recommended_sizes_have_room_on_each_server(seed: int) -> None:
    rng = random.Random(seed)
    groups = {name: set(rng.choices("ab", k=2)) for name in "ghijk"[: rng.randint(1, 5)]}
    a, b, reserved = rng.randint(1, 500), rng.randint(1, 500), rng.randint(0, 5)
    processes, threads, cores = rng.randint(1, 40), rng.randint(1, 40), rng.choice([None, rng.randint(1, 64)])
    servers = {"a": Server(a, reserved, cores), "b": Server(b, reserved)}
    found = recommend(groups, servers, processes=processes, threads=threads)
    for name, each in servers.items():
        total = processes * sum(found.groups[g].connection_count for g in groups if name in groups[g])
        assert found.servers[name]["opened"] == total
        if found.fits:
            assert total <= each.usable
    assert all(1 <= size.connection_count <= threads for size in found.groups.values())
    if not found.fits:
        minimum = [processes * sum(name in used for used in groups.values()) for name in servers]
        rooms = [each.usable * 0.9 for each in servers.values()]
        assert any(least > room for least, room in zip(minimum, rooms, strict=True))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"processes": 0}, "processes=0"),
        ({"threads": 0}, "threads=0"),
        ({"headroom": 1}, "headroom=1"),
        ({"busy": 0}, "busy=0"),
        ({"groups": {}}, "no group"),
        ({"groups": {"g": ["c"]}}, "'g' uses 'c'"),
        ({"groups": {"g": []}}, "no server"),
    ],
)
def test_wrong_numbers_are_named(words: dict[str, Any], text: str) -> None:
    arguments = {"groups": GROUPS, "servers": dict.fromkeys("ab", Server(9)), "processes": 1, **words}
    with pytest.raises(ValueError, match=text):
        recommend(**arguments)


def test_limits_of_role_and_database_count() -> None:
    assert Server(100, 3).usable == 97
    assert Server(100, 3, role_limit=10).usable == 10
    assert Server(100, 3, database_limit=5, role_limit=10).usable == 5
    with pytest.raises(ValueError, match="max_connections=0"):
        Server(0)


def two(**groups: Any) -> Any:
    return load({"db": [{"host": "a", "label": "a"}, {"host": "b", "label": "b"}], "groups": groups})


def test_demand_is_usual_by_weight_and_most_when_one_is_left() -> None:
    found = demand(two(g={"connection_count": 10}), processes=4)["a"]
    assert (found.usual, found.most) == (20, 40)


def test_demand_follows_the_roles() -> None:
    loaded = two(write={"connection_count": 10, "target": "primary"})
    found = demand(loaded, 2, {"a": "primary", "b": "standby"})
    assert (found["a"].usual, found["b"].usual) == (22, 2)  # and one to look, in each process
    assert found["b"].most == 22


def test_endpoints_with_one_address_are_one_server() -> None:
    loaded = load({
        "db": [{"host": "a", "user": "r", "label": "r"}, {"host": "a", "user": "w", "label": "w"}],
        "groups": {"read": {"endpoints": ["r"]}, "write": {"endpoints": ["w"]}},
    })  # fmt: skip
    found = demand(loaded, 3)
    assert found["r"] is found["w"]
    assert found["r"].most == 60


def test_behind_a_pooler_the_servers_limits_are_not_ours() -> None:
    loaded = load({"db": {"host": "a", "pooler": "transaction"}, "groups": {"g": {}}})
    assert demand(loaded, 100) == {}


MODES = ["threaded", "non-threaded"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_init_warns_of_sizes_that_cannot_fit(
    known_cluster: Any, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    groups = {
        "read": {"connection_count": 10, "min_size": 1},
        "write": {"connection_count": 5, "min_size": 1},
    }
    caplog.set_level(logging.WARNING, "pgdbpool")
    Connection.init({**config([known_cluster.primary], mode, **groups), "processes": 6})
    assert not caplog.messages
    Connection.init({**config([known_cluster.primary], mode, **groups), "processes": 7})
    (message,) = caplog.messages
    assert "7 processes can open 105 connections (10 of read + 5 of write in each)" in message
    assert "max_connections 100" in message


def test_init_warns_of_the_roles_limit(known_cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    known_cluster.primary.execute("CREATE ROLE few LOGIN CONNECTION LIMIT 3")
    entry = server(known_cluster.primary, user="few")
    Connection.init({**config([entry], g={"connection_count": 2, "min_size": 1}), "processes": 2})
    (message,) = caplog.messages
    assert "CONNECTION LIMIT 3 of the role" in message


def test_without_the_number_of_processes_there_is_no_warning(
    known_cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    Connection.init(config([known_cluster.primary], g={"connection_count": 1000, "min_size": 1}))
    assert not caplog.messages


@pytest.mark.parametrize("value", [0, "many", 1.5])
def test_processes_is_a_whole_number(value: Any) -> None:
    from pgdbpool import ConfigError

    with pytest.raises(ConfigError, match="processes: must be an integer"):
        load({"db": {"host": "a"}, "groups": {"g": {}}, "processes": value})


def test_processes_may_come_from_the_environment() -> None:
    url = {"DATABASE_URL": "postgresql://a"}
    assert load(None, {**url, "PGDBPOOL_PROCESSES": "4"}).processes == 4
    assert load(None, url).processes is None

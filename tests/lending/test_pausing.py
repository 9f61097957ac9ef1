"""A group that is paused holds its new blocks, in both modes, and each within its own timeout."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from support import config, server, wait_for

from pgdbpool import Connection, Handler, NotInitializedError, PoolTimeout, TooManyWaiting, deadline
from pgdbpool._status.runtime_dir import RuntimeDir
from pgdbpool.overview import gather
from pgdbpool.wsgi._status_html import page


@pytest.fixture
def start(known_cluster: Any, mode: str) -> Iterator[Callable[..., Any]]:
    def init(**changes: Any) -> Any:
        top = {key: changes.pop(key) for key in ("runtime_dir",) if key in changes}
        group = {"connection_count": 2, "timeout": 5, **changes}
        Connection.init({**config([known_cluster.primary], mode, g=group, other=group), **top})
        return Connection.group("g")

    yield init
    Connection.reset()


@pytest.mark.parametrize("used", [True, False])
def test_a_block_is_held_for_its_timeout_and_told_why(start: Any, used: bool) -> None:
    start()
    if used:
        Connection.fetchval("g", "SELECT 1")
    Connection.pause("g")
    assert (Connection.status().groups["g"].paused, Connection.status().groups["other"].paused) == (
        "Connection.pause()",
        None,
    )
    for attempt in (
        lambda: Handler("g", timeout=0.1).__enter__(),
        lambda: Connection.getconn("g", timeout=0.1),
    ):
        began = monotonic()
        with pytest.raises(
            PoolTimeout,
            match=r"group 'g': paused by Connection.pause\(\): not resumed within 0.1 s; 0 of 2 in use",
        ):
            attempt()
        assert 0.09 < monotonic() - began < 1
    with pytest.raises(PoolTimeout, match=r"not resumed within 0\.\d{1,3} s;"), deadline(0.12345):
        Handler("g").__enter__()
    with pytest.raises(PoolTimeout, match="paused by"):
        Connection.fetch("g", "SELECT 1", timeout=0)
    assert Connection.fetchval("other", "SELECT 1") == 1
    Connection.resume("g")
    assert Connection.fetchval("g", "SELECT 1") == 1
    status = Connection.status().groups["g"]
    assert (status.paused, status.timeouts, status.waiting) == (None, 4, 0)


def test_a_pause_that_nobody_ends_ends_by_itself(start: Any) -> None:
    group = start()
    Connection.pause("g", 0.15)
    began = monotonic()
    assert Connection.fetchval("g", "SELECT 1") == 1
    assert 0.1 < monotonic() - began < 2
    assert group.paused_by is None


def test_a_block_inside_another_one_goes_on(start: Any) -> None:
    start()
    with Handler("other") as outer:
        Connection.pause("g")
        with Handler("g", timeout=0.05) as inner:
            assert inner.fetchval("SELECT 1") == outer.fetchval("SELECT 1") == 1
    with pytest.raises(PoolTimeout):
        Connection.fetch("g", "SELECT 1", timeout=0.05)


@pytest.mark.parametrize("waits_for", ["a connection", "its server"])
def test_a_block_that_waits_already_is_held_too(
    known_cluster: Any, proxy_to: Any, mode: str, waits_for: str
) -> None:
    if mode != "threaded":
        pytest.skip("one thread cannot wait and pause")
    proxy = proxy_to(known_cluster.primary)
    groups = {"g": {"connection_count": 1, "min_size": 0, "timeout": 10}}
    Connection.init(config([server(known_cluster.primary, port=proxy.port)], mode, **groups))
    values: list[Any] = []
    waiter = threading.Thread(target=lambda: values.append(Connection.fetchval("g", "SELECT 1")))
    try:
        if waits_for == "a connection":
            with Handler("g"):
                waiter.start()
                wait_for(lambda: Connection.status().groups["g"].waiting == 1)
                Connection.pause("g")
        else:
            Connection.expire("g")
            proxy.stall()
            waiter.start()
            wait_for(lambda: proxy.open_connections, what="the server is dialled")
            Connection.pause("g")
            proxy.resume()
        wait_for(lambda: Connection.status().groups["g"].idle == 1, what="there is a connection to lend")
        wait_for(lambda: Connection.group("g").held_back, what="the block is held")
        assert (values, Connection.status().groups["g"].in_use) == ([], 0)
        Connection.resume("g")
        waiter.join(5)
        assert values == [1]
    finally:
        Connection.reset()


def test_the_pools_close_at_once(start: Any, mode: str) -> None:
    if mode != "threaded":
        pytest.skip("one thread cannot wait and close")
    start()
    Connection.pause("g")
    errors: list[Exception] = []

    def block() -> None:
        try:
            Connection.fetch("g", "SELECT 1")
        except NotInitializedError as error:
            errors.append(error)

    thread = threading.Thread(target=block)
    thread.start()
    wait_for(lambda: Connection.status().groups["g"].waiting == 1)
    began = monotonic()
    Connection.close(1.0)
    thread.join(5)
    assert monotonic() - began < 2
    assert [type(error) for error in errors] == [NotInitializedError]


def test_a_connection_of_replaced_pools_lets_no_block_pass(start: Any) -> None:
    start()
    left = Connection.getconn("other")
    start()
    Connection.pause("g")
    with pytest.raises(PoolTimeout, match="paused by"):
        Handler("g", timeout=0.1).__enter__()
    left.close()


def test_max_waiting_holds_for_held_blocks_too(start: Any, mode: str) -> None:
    if mode != "threaded":
        pytest.skip("one thread cannot hold two blocks")
    start(max_waiting=1)
    Connection.pause("g")
    values: list[Any] = []
    thread = threading.Thread(target=lambda: values.append(Connection.fetchval("g", "SELECT 1")))
    thread.start()
    wait_for(lambda: Connection.status().groups["g"].waiting == 1)
    with pytest.raises(TooManyWaiting, match="paused by"):
        Connection.fetch("g", "SELECT 1")
    Connection.resume("g")
    thread.join(5)
    assert values == [1]


@pytest.mark.slow
def test_a_block_is_held_and_goes_on_by_orders(start: Any, tmp_path: Path) -> None:
    place = str(tmp_path / "run")
    start(runtime_dir=place)
    Connection.fetchval("g", "SELECT 1")
    with RuntimeDir(place, create=True) as room:
        seconds = {"until": time.time() + 30}
        room.order("pause", by="ann", group="g", **seconds)
        wait_for(lambda: _held("g"), what="the pause is in force")
        paused = lambda: [group["paused"] for group in gather(place)["groups"]]  # noqa: E731
        wait_for(lambda: paused() == ["ann", None], what="it is published")
        assert page(gather(place), None, alone=False).count("Paused by") == 1
        timer = threading.Timer(0.3, lambda: room.order("resume", by="ann"))
        timer.start()
        began = monotonic()
        assert Connection.fetchval("g", "SELECT 1") == 1
        assert 0.2 < monotonic() - began < 3
        timer.join()
        # A process that starts during a pause holds its first block.
        room.order("pause", by="ann", **seconds)
        start(runtime_dir=place)
        assert _held("g")
        assert _held("other")


def _held(group: str) -> bool:
    try:
        Connection.fetch(group, "SELECT 1", timeout=0.01)
    except PoolTimeout:
        return True
    return False

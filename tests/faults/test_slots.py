"""A slot is free as soon as its connection is gone, and a pool fills up again, whatever went wrong before."""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from support import config, kill_backends, pid_of, server, wait_for

from pgdbpool import Connection, ConnectionLostError, DBQueryError, Handler
from pgdbpool.cluster import Cluster, Node

MODES = ("threaded", "non-threaded")


@pytest.fixture
def node(known_cluster: Cluster) -> Node:
    return known_cluster.primary


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Garbage is not collected: what hangs in a cycle stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    Connection.close()


def status(group: str = "auto") -> Any:
    return Connection.status().groups[group]


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("mode", MODES)
def test_a_connection_opened_after_another_server_refused_gives_its_slot_back(mode: str, node: Node) -> None:
    with socket.socket() as nobody:
        nobody.bind((Node.host, 0))
        refusing = {**server(node), "port": nobody.getsockname()[1]}
        for _ in range(50):
            Connection.close()
            Connection.init(config([refusing, node], mode, auto={"connection_count": 1, "min_size": 0}))
            with node.connect() as admin, Handler("auto") as db:
                db.query("SELECT 1")
                refused = Connection.status().endpoints[f"{Node.host}:{refusing['port']}"].state != "up"
                kill_backends(admin, pid_of(db))
                with pytest.raises(ConnectionLostError):
                    db.query("SELECT 1")
            assert status().size == 0
            if refused:
                return  # it was the first to be asked
        pytest.fail("the server that refuses was never the first")


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lost", [True, False])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_handler_dropped_after_an_error_gives_its_slot_back(mode: str, lost: bool, node: Node) -> None:
    Connection.init(config([node], mode, auto={"connection_count": 1, "min_size": 0}))
    db = Handler("auto").__enter__()
    if lost:
        with node.connect() as admin:
            kill_backends(admin, pid_of(db))
    with pytest.raises(DBQueryError):
        db.query("SELECT 1 / 0")
    del db
    assert (status().in_use, status().size) == (0, 0)


@pytest.mark.parametrize("mode", MODES)
def test_connections_that_could_not_be_opened_are_opened_later(mode: str, node: Node) -> None:
    with node.connect() as admin:
        admin.execute("CREATE ROLE app LOGIN CONNECTION LIMIT 1")
        Connection.init(config([server(node, user="app")], mode, auto={"connection_count": 3}))
        with Handler("auto") as db:
            db.query("SELECT 1")
        wait_for(lambda: status().size == status().idle == 1, what="the others refused")
        admin.execute("ALTER ROLE app CONNECTION LIMIT 10")

        def full() -> bool:
            with Handler("auto") as db:
                db.query("SELECT 1")
            return bool(status().idle == 3)

        wait_for(full, 10, "the pool is full")

"""SQLAlchemy's engines and sessions read their own writes from standbys, as blocks do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("sqlalchemy")

from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import sessionmaker
from support import config, wait_for

import pgdbpool
from pgdbpool import Connection, StaleReadError
from pgdbpool.contrib.sqlalchemy import RoutingSession, engine

INSERT, COUNT = text("INSERT INTO t VALUES (:i)"), text("SELECT count(*) FROM t WHERE i = :i")


@pytest.fixture
def servers(known_cluster: Any, mode: str) -> Iterator[Any]:
    known_cluster.primary.execute("CREATE TABLE t (i int)")
    known_cluster.wait_in_sync()
    few = {"connection_count": 3, "fresh_wait": 0}
    groups = {
        "write": {"target": "primary", "autocommit": False, **few},
        "read": {"target": "prefer-standby", **few},
        "standby": {"target": "standby", **few},
    }
    Connection.init(config(known_cluster.nodes, mode, **groups))
    yield known_cluster
    Connection.reset()


@contextmanager
def paused(servers: Any) -> Iterator[None]:
    for node in servers.standbys:
        node.execute("SELECT pg_wal_replay_pause()")
        wait_for(lambda node=node: node.execute("SELECT pg_get_wal_replay_pause_state()") == [("paused",)])
    try:
        yield
    finally:
        for node in servers.standbys:
            node.execute("SELECT pg_wal_replay_resume()")


def test_an_engine_reads_what_another_one_has_written(servers: Any) -> None:
    writing, reading, standby = engine("write"), engine("read"), engine("standby")
    standby.connect().close()  # the first one asks for the server's version
    with reading.connect() as before, paused(servers):
        assert before.scalar(COUNT, {"i": 1}) == 0
        before.commit()
        with pgdbpool.read_your_writes() as seen:
            with writing.begin() as conn:
                conn.execute(INSERT, {"i": 1})
            assert seen.token is not None
            assert before.scalar(COUNT, {"i": 1}) == 1  # a connection of before as well
            with reading.connect() as conn:
                assert conn.scalar(COUNT, {"i": 1}) == 1
            with standby.connect() as conn, pytest.raises(OperationalError) as caught:
                conn.scalar(COUNT, {"i": 1})
            assert isinstance(caught.value.orig, StaleReadError)


def test_a_routing_session_reads_its_writes_after_the_commit(servers: Any) -> None:
    make = sessionmaker(class_=RoutingSession, writing=engine("write"), reading=engine("read"))
    with paused(servers), pgdbpool.read_your_writes():
        with make() as session:
            session.execute(INSERT, {"i": 2})
            session.commit()
            assert session.scalar(COUNT, {"i": 2}) == 1
        with make() as session:
            assert session.scalar(COUNT, {"i": 2}) == 1
    servers.wait_in_sync()
    with pgdbpool.read_your_writes(), make() as session:
        assert session.scalar(COUNT, {"i": 2}) == 1

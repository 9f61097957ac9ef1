"""A block gets the notifications of the channels that it listens to itself, from its own LISTEN on."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from support import config, pid_of, server

from pgdbpool import Connection, Handler

GROUPS = pytest.mark.parametrize("group", ["auto", "manual"])


@pytest.fixture
def start(mode: str, known_cluster: Any) -> Iterator[Callable[..., None]]:
    """Initialise an autocommit and a manual-commit group of one connection each."""

    def init(**changes: Any) -> None:
        common: dict[str, Any] = {"connection_count": 1, "timeout": 5, **changes}
        groups = {"auto": common, "manual": {**common, "autocommit": False}}
        Connection.init(config([server(known_cluster.primary)], mode, **groups))

    yield init
    Connection.reset()


@pytest.fixture
def admin(known_cluster: Any) -> Iterator[psycopg.Connection[Any]]:
    with known_cluster.primary.connect() as conn:
        yield conn


def listen(group: str, channel: str = "first") -> Any:
    """Leave a session that listens; return its connection of libpq, which the next block has too."""
    with Handler(group) as db:
        db.query(f"LISTEN {channel}")
        return db._live().pgconn


def arrive(admin: psycopg.Connection[Any], pgconn: Any, channel: str = "first") -> None:
    """Send a notification, and wait until it is in the connection's socket."""
    admin.execute("SELECT pg_notify(%s, 'of the first block')", (channel,))
    assert select.select([pgconn.socket], [], [], 10)[0]


def received(db: Handler, timeout: float = 0.05) -> list[str]:
    """Return the payloads that come in this time, or that have come."""
    return [notify.payload for notify in db.connection.notifies(timeout=timeout)]


def own(db: Handler, admin: psycopg.Connection[Any], channel: str = "second") -> list[str]:
    """Listen; return the payloads that come, to the one that is sent then."""
    db.query(f"LISTEN {channel}")
    db.commit()
    admin.execute("SELECT pg_notify(%s, 'own')", (channel,))
    return [notify.payload for notify in db.connection.notifies(timeout=10, stop_after=1)]


@GROUPS
@pytest.mark.parametrize("channel", ["first", "second"])
def test_messages_to_an_idle_connection_are_not_the_next_blocks(
    start: Any, admin: Any, group: str, channel: str
) -> None:
    start()
    pgconn = listen(group)
    arrive(admin, pgconn)
    with Handler(group) as db:
        assert db._live().pgconn is pgconn
        assert own(db, admin, channel) == ["own"]
        assert received(db) == []


@GROUPS
def test_nor_what_comes_between_its_beginning_and_its_first_statement(
    start: Any, admin: Any, group: str
) -> None:
    start()
    pgconn = listen(group)
    with Handler(group) as db:
        arrive(admin, pgconn)
        assert own(db, admin) == ["own"]
        assert received(db) == []


@GROUPS
def test_nor_is_it_there_for_a_block_that_only_waits(start: Any, admin: Any, group: str) -> None:
    start()
    pgconn = listen(group)
    arrive(admin, pgconn)
    with Handler(group) as db:
        assert received(db) == []
        admin.execute("NOTIFY first, 'late'")
        assert received(db) == []


@GROUPS
def test_nor_what_the_last_block_did_not_take(start: Any, admin: Any, group: str) -> None:
    start()
    with Handler(group) as db:
        db.query("LISTEN first")
        db.commit()
        admin.execute("NOTIFY first, 'not taken'")
        for _ in range(3):
            db.query("SELECT pg_sleep(0.01)")  # psycopg keeps what comes with an answer
            db.commit()
        pid = pid_of(db)
    with Handler(group) as db:
        assert own(db, admin) == ["own"]
        assert received(db) == []
        assert pid_of(db) == pid


@GROUPS
def test_a_handler_is_called_for_its_own_blocks_channels_alone(start: Any, admin: Any, group: str) -> None:
    start()
    pgconn = listen(group)
    arrive(admin, pgconn)
    heard: list[str] = []
    with Handler(group) as db:
        db.connection.add_notify_handler(lambda notify: heard.append(notify.payload))
        db.query("LISTEN second")
        db.commit()
        arrive(admin, pgconn, "second")
        db.query("SELECT 1")
        assert heard == ["of the first block"]
        db.commit()
    with Handler(group) as db:
        arrive(admin, pgconn, "second")
        db.query("SELECT 1")
        assert len(heard) == 1


@GROUPS
@pytest.mark.parametrize("first", ["one-shot", "pipeline", "transaction", "several", "copy"])
def test_the_next_block_may_begin_with_any_statement(start: Any, admin: Any, group: str, first: str) -> None:
    start()
    pgconn = listen(group)
    arrive(admin, pgconn)
    if first == "one-shot":
        Connection.fetch(group, "SELECT 1")
    with Handler(group) as db:
        if first == "pipeline":
            with db.pipeline():
                db.query("SELECT 1")
        elif first == "transaction":
            with db.transaction():
                db.query("SELECT 1")
        elif first == "several":
            db.query("SELECT 1; SELECT 2")
        elif first == "copy":
            with db.copy("COPY (SELECT 1) TO STDOUT") as copy:
                assert list(copy.rows())
        db.commit()
        assert received(db) == []
        assert own(db, admin) == ["own"]


@GROUPS
def test_with_reset_never_the_session_goes_on_listening(start: Any, admin: Any, group: str) -> None:
    start(reset="never")
    pgconn = listen(group)
    arrive(admin, pgconn)
    with Handler(group) as db:
        db.query("SELECT 1")
        assert received(db) == ["of the first block"]

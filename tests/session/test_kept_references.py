"""What a block's code keeps of its connection has no effect on a later block."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from support import config, pid_of, server

from pgdbpool import BlockClosedError, Connection, Handler
from pgdbpool._session.connection import PooledConnection
from pgdbpool.cluster import Cluster


@pytest.fixture(params=[True, False], ids=["autocommit", "manual"])
def group(request: pytest.FixtureRequest, known_cluster: Cluster, mode: str) -> Any:
    """The name of a group of one connection, in each mode and of each kind."""
    one = {"connection_count": 1, "autocommit": request.param}
    Connection.init(config([server(known_cluster.primary)], mode, one=one))
    yield "one"
    Connection.reset()


def ignore(*_: Any) -> None:
    """Handle nothing."""


EFFECTS: dict[str, Callable[[Any], Any]] = {
    "execute": lambda conn: conn.execute("SELECT 1"),
    "cursor": lambda conn: conn.cursor(),
    "named cursor": lambda conn: conn.cursor("c"),
    "with": lambda conn: conn.__enter__(),
    "commit": lambda conn: conn.commit(),
    "rollback": lambda conn: conn.rollback(),
    "close": lambda conn: conn.close(),
    "cancel": lambda conn: conn.cancel(),
    "cancel_safe": lambda conn: conn.cancel_safe(),
    "transaction": lambda conn: conn.transaction().__enter__(),
    "pipeline": lambda conn: conn.pipeline().__enter__(),
    "notifies": lambda conn: next(conn.notifies(timeout=0)),
    "autocommit": lambda conn: setattr(conn, "autocommit", False),
    "set_autocommit": lambda conn: conn.set_autocommit(False),
    "isolation_level": lambda conn: setattr(conn, "isolation_level", psycopg.IsolationLevel.SERIALIZABLE),
    "read_only": lambda conn: setattr(conn, "read_only", True),
    "deferrable": lambda conn: setattr(conn, "deferrable", True),
    "notice handler": lambda conn: conn.add_notice_handler(ignore),
    "notify handler": lambda conn: conn.add_notify_handler(ignore),
    "tpc_begin": lambda conn: conn.tpc_begin("x"),
    "tpc_commit": lambda conn: conn.tpc_commit("x"),
    "tpc_rollback": lambda conn: conn.tpc_rollback("x"),
    "tpc_recover": lambda conn: conn.tpc_recover(),
}


@pytest.mark.slow
@pytest.mark.parametrize("effect", EFFECTS)
def test_a_connection_kept_after_its_block_refuses_all_that_has_an_effect(group: str, effect: str) -> None:
    with Handler(group) as db:
        old, pid = db.connection, pid_of(db)
    with pytest.raises(BlockClosedError, match="back in its pool"):
        EFFECTS[effect](old)
    with Handler(group) as db:
        assert db.fetchval("SELECT 1") == 1
        with pytest.raises(BlockClosedError, match="back in its pool"):
            EFFECTS[effect](old)
        conn = db.connection
        assert db.fetchval("SELECT 1") == 1
        assert (pid_of(db), conn.closed, conn.read_only, conn.isolation_level) == (pid, False, None, None)


def test_a_block_has_one_connection_object_and_the_next_another(group: str) -> None:
    with Handler(group) as db:
        first = db.connection
        assert db.connection is first
        assert db.query("SELECT 1").connection is first
        assert first.execute("SELECT 1").connection is first
        assert isinstance(first, psycopg.Connection)
    with Handler(group) as db:
        assert db.connection is not first
    assert first.closed
    assert isinstance(first, PooledConnection)


def test_attributes_set_on_a_kept_connection_are_not_the_next_blocks(group: str) -> None:
    with Handler(group) as db:
        old = db.connection
    old.row_factory = psycopg.rows.dict_row
    old.prepare_threshold = 0
    old.adapters.register_dumper(int, psycopg.types.string.StrDumper)
    with Handler(group) as db:
        conn = db.connection
        assert conn.row_factory is not psycopg.rows.dict_row
        assert conn.prepare_threshold != 0
        assert conn.execute("SELECT %s + 1 AS n", (1,)).fetchone()["n"] == 2


def test_a_kept_cursor_transaction_pipeline_and_copy_are_refused(group: str) -> None:
    with Handler(group) as db:
        cursors = [db.query("SELECT 1"), db.connection.cursor(), psycopg.ClientCursor(db.connection)]
        with db.transaction() as transaction:
            pass
        with db.pipeline() as pipeline:
            pass
        with db.copy("COPY (SELECT 1) TO STDOUT") as copy:
            assert copy.read()
            assert not copy.read()
        pid = pid_of(db)
    copy._finished = False  # as if it was left in the middle
    with Handler(group) as db, db.pipeline():
        assert db.fetchval("SELECT pg_backend_pid()") == pid
        for cursor in cursors:
            with pytest.raises(BlockClosedError):
                cursor.execute("SELECT 2")
        with pytest.raises(BlockClosedError):
            transaction.__exit__(None, None, None)
        with pytest.raises(BlockClosedError):
            pipeline.sync()
        with pytest.raises(BlockClosedError):
            copy.read()


def test_a_thread_that_waits_for_the_connection_finds_the_block_ended(group: str) -> None:
    errors: list[BaseException] = []
    with Handler(group) as db:
        old = db.connection
        pid = pid_of(db)

    def late() -> None:
        try:
            old.execute("SELECT 1")
        except BlockClosedError as error:
            errors.append(error)

    thread = threading.Thread(target=late)
    with Handler(group) as db:
        thread.start()
        thread.join()
        assert pid_of(db) == pid
    assert len(errors) == 1


def test_notices_and_notifications_come_to_the_block_that_has_the_session(group: str) -> None:
    for _ in range(2):
        with Handler(group) as db:
            notices: list[str] = []
            conn = db.connection
            conn.add_notice_handler(lambda notice, to=notices: to.append(notice.message_primary))
            conn.execute("DO $$ BEGIN RAISE NOTICE 'here'; END $$")
            conn.execute("LISTEN here")
            conn.execute("NOTIFY here, 'now'")
            conn.commit()
            assert notices == ["here"]
            assert [n.payload for n in conn.notifies(timeout=5, stop_after=1)] == ["now"]

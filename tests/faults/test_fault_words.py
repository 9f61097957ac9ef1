"""What a server says as it ends a session or cancels a statement reaches the caller."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from support import server, wait_for

import pgdbpool
from pgdbpool import Connection, Handler

END = "SELECT pg_terminate_backend(pg_backend_pid())"

STATEMENTS: dict[str, Callable[[Handler], Any]] = {
    "query": lambda db: db.query(END),
    "second": lambda db: (db.query("SELECT 1"), db.query(END)),
    "parameters": lambda db: db.query("SELECT pg_terminate_backend(pg_backend_pid()), %s::int", (1,)),
    "executemany": lambda db: db.executemany(
        "SELECT pg_terminate_backend(pg_backend_pid()), %s::int", [(1,), (2,)]
    ),
    "several": lambda db: db.query(f"SELECT 1; {END}"),
    "transaction": lambda db: _in_transaction(db),
}


def _in_transaction(db: Handler) -> None:
    with db.transaction():
        db.query(END)


def gone(node: Any) -> None:
    """Wait until the server has no session of the pools any more."""
    wait_for(
        lambda: node.execute("SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = 'pgdbpool'")[
            0
        ][0],
        what="the sessions have ended",
    )


@pytest.mark.parametrize("manual", [False, True], ids=["auto", "manual"])
def test_the_words_that_end_a_session_reach_the_caller(known_cluster: Any, start: Any, manual: bool) -> None:
    setting = {"setting": "app.tenant", "required": False, "verify": "off"}
    start([known_cluster.primary], min_size=1, autocommit=not manual, tenant=setting)
    for statement in STATEMENTS:
        for tenant in (None, "1"):
            with pytest.raises(pgdbpool.ConnectionLostError) as caught, Handler("g", tenant=tenant) as db:
                STATEMENTS[statement](db)
            assert isinstance(caught.value, psycopg.errors.AdminShutdown), statement
            assert "terminating connection due to administrator command" in str(caught.value)


@pytest.mark.parametrize("one_shot", [False, True], ids=["block", "one-shot"])
def test_a_transaction_that_took_too_long_is_not_sent_again(
    known_cluster: Any, start: Any, one_shot: bool
) -> None:
    if known_cluster.primary.execute("SHOW server_version_num")[0][0] < "170000":
        pytest.skip("transaction_timeout came with PostgreSQL 17")
    start([known_cluster.primary], autocommit=False, settings={"transaction_timeout": "50ms"})
    with pytest.raises(pgdbpool.TransactionTimeoutError) as caught:
        if one_shot:
            Connection.fetch("g", "SELECT pg_sleep(5)")
        else:
            with Handler("g") as db:
                db.query("SELECT pg_sleep(5)")
    assert caught.value.sqlstate == "25P04"
    assert pgdbpool.classify(caught.value) is pgdbpool.Category.TIMEOUT
    assert Connection.status().groups["g"].retries == 0


@pytest.mark.parametrize("manual", [False, True], ids=["auto", "manual"])
def test_a_statement_after_idle_session_timeout_is_sent_again(
    known_cluster: Any, start: Any, manual: bool
) -> None:
    primary = known_cluster.primary
    primary.execute("CREATE TABLE t (i int)")
    entry = server(primary, options={"idle_session_timeout": "30ms"})
    start([entry], connection_count=1, autocommit=not manual)
    with Handler("g") as db:
        gone(primary)
        db.query("INSERT INTO t VALUES (1)")
    assert primary.execute("SELECT i FROM t") == [(1,)]
    assert Connection.status().groups["g"].retries == 1
    with pytest.raises(pgdbpool.IdleSessionTimeoutError) as caught, Handler("g") as db:
        db.connection.execute("SET work_mem = '1MB'")  # what the block has made its own is lost
        db.commit()
        gone(primary)
        db.query("INSERT INTO t VALUES (2)")
    assert not caught.value.maybe_executed
    assert primary.execute("SELECT i FROM t") == [(1,)]


@pytest.mark.parametrize("at", ["statement", "commit", "exit", "transaction"])
def test_a_transaction_that_idled_too_long_is_known_to_be_rolled_back(
    known_cluster: Any, start: Any, at: str
) -> None:
    primary = known_cluster.primary
    primary.execute("CREATE TABLE t (i int)")
    settings = {"idle_in_transaction_session_timeout": "30ms"}
    start([primary], connection_count=1, autocommit=at == "transaction", settings=settings)
    with pytest.raises(pgdbpool.IdleInTransactionTimeoutError) as caught, Handler("g") as db:
        if at == "transaction":
            with db.transaction():
                db.query("INSERT INTO t VALUES (1)")
                gone(primary)
        else:
            db.query("INSERT INTO t VALUES (1)")
            gone(primary)
            if at == "statement":
                db.query("INSERT INTO t VALUES (2)")
            elif at == "commit":
                db.commit()
    assert caught.value.sqlstate == "25P03"
    assert not caught.value.maybe_committed
    assert not caught.value.maybe_executed
    assert primary.execute("SELECT i FROM t") == []


@pytest.fixture
def impatient(known_cluster: Any) -> Any:
    """A standby whose replay does not wait for readers; table `t` is on the primary."""
    known_cluster.primary.execute("CREATE TABLE t (i int); INSERT INTO t VALUES (1)")
    standby = known_cluster.standbys[0]
    standby.execute("ALTER SYSTEM SET max_standby_streaming_delay = 0")
    standby.execute("SELECT pg_reload_conf()")
    wait_for(lambda: standby.execute("SHOW max_standby_streaming_delay")[0][0] == "0")
    known_cluster.wait_in_sync()
    yield standby
    standby.execute("ALTER SYSTEM RESET ALL")
    standby.execute("SELECT pg_reload_conf()")


@contextmanager
def conflicting(known_cluster: Any, standby: Any) -> Iterator[None]:
    """Change a table on the primary while a statement of the block sleeps on the standby."""
    asleep = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"

    def change() -> None:
        wait_for(lambda: standby.execute(asleep)[0][0], what="the reader sleeps")
        known_cluster.primary.execute("ALTER TABLE t ADD j int")

    thread = threading.Thread(target=change)
    thread.start()
    yield
    thread.join()


@pytest.mark.parametrize("manual", [False, True], ids=["auto", "manual"])
@pytest.mark.parametrize("one_shot", [False, True], ids=["block", "one-shot"])
def test_a_read_that_a_standby_cancelled_for_its_replay_is_sent_again(
    known_cluster: Any, impatient: Any, start: Any, manual: bool, one_shot: bool
) -> None:
    start([impatient], connection_count=1, target="standby", autocommit=not manual)
    with conflicting(known_cluster, impatient):
        if one_shot:
            assert Connection.fetchval("g", "SELECT i, pg_sleep(0.3) FROM t") == 1
        else:
            with Handler("g") as db:
                assert db.fetchval("SELECT i, pg_sleep(0.3) FROM t") == 1
    group = Connection.status().groups["g"]
    assert (group.retries, group.opened) == (1, 1)


def test_a_second_read_of_a_transaction_is_not_sent_again_after_a_conflict(
    known_cluster: Any, impatient: Any, start: Any
) -> None:
    start([impatient], connection_count=1, target="standby", autocommit=False)
    with (
        conflicting(known_cluster, impatient),
        pytest.raises(psycopg.errors.SerializationFailure),
        Handler("g") as db,
    ):
        db.query("SELECT 1")
        db.query("SELECT i, pg_sleep(5) FROM t")
    assert Connection.status().groups["g"].retries == 0


def test_a_block_that_only_read_never_may_have_committed_after_a_conflict(
    known_cluster: Any, impatient: Any, start: Any
) -> None:
    start([impatient], connection_count=1, target="standby", autocommit=False)
    with pytest.raises(pgdbpool.ConnectionLostError) as caught, Handler("g") as db:
        db.query("SELECT i FROM t")
        known_cluster.primary.execute("ALTER TABLE t ADD j int")
        gone(impatient)
    assert caught.value.sqlstate == "40001"
    assert not caught.value.maybe_committed

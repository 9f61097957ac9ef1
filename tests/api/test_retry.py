"""`run` repeats a unit of work where that can do no harm, and nowhere else."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from support import config, kill_backends, pid_of, server

import pgdbpool
from pgdbpool import Category, Connection, Handler, classify, deadline
from pgdbpool.cluster import Cluster


@pytest.fixture
def admin(known_cluster: Any) -> Iterator[psycopg.Connection[Any]]:
    with known_cluster.primary.connect() as conn:
        conn.execute("CREATE TABLE t (i int PRIMARY KEY, v int NOT NULL)")
        conn.execute("INSERT INTO t VALUES (1, 0), (2, 0)")
        yield conn


@pytest.fixture
def start(known_cluster: Any, admin: Any) -> Iterator[Callable[..., None]]:
    def init(mode: str = "threaded", entry: dict[str, Any] | None = None, **changes: Any) -> None:
        manual = {"connection_count": 2, "autocommit": False, **changes}
        node = server(known_cluster.primary, **(entry or {}))
        Connection.init(config([node], mode, manual=manual, auto={"connection_count": 2, **changes}))

    yield init
    Connection.reset()


class Work:
    """A unit of work that notes how often it was begun."""

    def __init__(self, work: Callable[[Handler, int], Any]) -> None:
        self.begun = 0
        self._work = work

    def __call__(self, db: Handler) -> Any:
        self.begun += 1
        return self._work(db, self.begun)


def values(admin: psycopg.Connection[Any]) -> dict[int, int]:
    return dict(admin.execute("SELECT i, v FROM t").fetchall())


def test_the_result_is_the_functions(start: Any, mode: str, admin: Any) -> None:
    start(mode)
    work = Work(lambda db, n: db.query("UPDATE t SET v = 7 WHERE i = 1 RETURNING v").fetchone()["v"])
    assert pgdbpool.run("manual", work) == 7
    assert (work.begun, values(admin)[1]) == (1, 7)


def test_the_blocks_own_arguments_are_those_of_handler(start: Any, mode: str) -> None:
    start(mode, tenant={"setting": "app.t", "verify": "off"})
    sql = "SELECT current_setting('app.t') || current_setting('app.x')"
    found = pgdbpool.run(
        "manual", lambda db: db.query(sql).fetchone()[0], tenant="a", settings={"app.x": "b"}, priority="high"
    )
    assert found == "ab"


# What the server undid.


def test_of_two_serializable_transactions_that_collide_both_are_done(start: Any, admin: Any) -> None:
    """Each reads both rows and writes one of them: not serializable side by side, so one is repeated."""
    start()
    barrier = threading.Barrier(2)

    def work_on(mine: int) -> Work:
        def work(db: Handler, n: int) -> int:
            db.query("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
            total = db.query("SELECT sum(v) FROM t").fetchone()[0]
            if n == 1:
                barrier.wait(10)
            db.query("UPDATE t SET v = %s WHERE i = %s", (total + 1, mine))
            if n == 1:
                barrier.wait(10)
            return n

        return Work(work)

    with ThreadPoolExecutor(2) as threads:
        works = [work_on(1), work_on(2)]
        futures = [threads.submit(pgdbpool.run, "manual", work, attempts=5) for work in works]
        attempts = [future.result(20) for future in futures]
    assert sorted(attempts)[0] == 1
    assert max(attempts) >= 2
    assert sorted(values(admin).values()) == [1, 2]  # as one after the other


def test_a_deadlock_is_resolved_by_repeating_its_victim(start: Any, admin: Any) -> None:
    start(entry={"options": {"deadlock_timeout": "100ms"}})
    barrier = threading.Barrier(2)

    def work_on(first: int, second: int) -> Work:
        def work(db: Handler, n: int) -> int:
            db.query("UPDATE t SET v = v + 1 WHERE i = %s", (first,))
            if n == 1:
                barrier.wait(10)
            db.query("UPDATE t SET v = v + 1 WHERE i = %s", (second,))
            return n

        return Work(work)

    with ThreadPoolExecutor(2) as threads:
        works = [work_on(1, 2), work_on(2, 1)]
        futures = [threads.submit(pgdbpool.run, "manual", work) for work in works]
        attempts = [future.result(20) for future in futures]
    assert sorted(attempts) == [1, 2]
    assert values(admin) == {1: 2, 2: 2}


def serialization_failure(db: Handler, _: int = 0) -> None:
    db.query("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")


def test_the_end_of_a_functions_body_is_not_a_commit(start: Any, mode: str, admin: Any) -> None:
    start(mode, settings={"work_mem": "5MB"})
    body = "BEGIN ATOMIC SELECT CASE 1 WHEN 1 THEN 2 END; SELECT 3; END"

    def deadlock(db: Handler, attempt: int) -> Any:
        db.query(f"CREATE FUNCTION made() RETURNS int {body}")
        if attempt == 1:
            db.query("DO $$ BEGIN RAISE deadlock_detected; END $$")
        return db.fetchval("SELECT made()")

    work = Work(deadlock)
    assert (pgdbpool.run("manual", work), work.begun) == (3, 2)


def test_the_last_error_is_raised_with_the_number_of_attempts(start: Any, mode: str) -> None:
    start(mode)
    work = Work(serialization_failure)
    with pytest.raises(psycopg.errors.SerializationFailure) as caught:
        pgdbpool.run("manual", work, attempts=4, backoff=0.001)
    assert work.begun == 4
    assert caught.value.attempts == 4
    if sys.version_info >= (3, 11):
        # Before it is the correlation id, where a test before this one has used any.
        assert caught.value.__notes__[-1] == "pgdbpool.run: the last of 4 attempts"


def test_a_failure_that_the_function_swallows_counts_too(start: Any, mode: str) -> None:
    start(mode)

    def work(db: Handler, n: int) -> int:
        if n == 1:
            with pytest.raises(psycopg.errors.SerializationFailure):
                serialization_failure(db)
        return n

    assert pgdbpool.run("manual", Work(work), backoff=0.001) == 2


@pytest.mark.parametrize("sqlstate", ["23505", "22012", "42601", "57014", "42501", "P0001"])
def test_other_errors_are_the_callers_at_once(start: Any, sqlstate: str) -> None:
    start()
    work = Work(lambda db, n: db.query(f"DO $$ BEGIN RAISE SQLSTATE '{sqlstate}'; END $$"))
    with pytest.raises(pgdbpool.DBQueryError) as caught:
        pgdbpool.run("manual", work, idempotent=True)
    assert (work.begun, getattr(caught.value, "attempts", None)) == (1, None)
    own = Work(lambda db, n: {}["missing"])
    with pytest.raises(KeyError):
        pgdbpool.run("manual", own, idempotent=True)
    assert own.begun == 1


def test_a_full_group_is_not_asked_again(start: Any) -> None:
    start("non-threaded", connection_count=1)
    work = Work(lambda db, n: None)
    with Handler("manual"), pytest.raises(pgdbpool.PoolExhausted):
        pgdbpool.run("manual", work)
    assert work.begun == 0


# What has been committed is not done again.


@pytest.mark.parametrize("commit", [lambda db: db.commit(), lambda db: db.query("COMMIT")])
def test_work_that_has_committed_a_part_is_not_repeated(
    start: Any, mode: str, admin: Any, commit: Callable[[Handler], Any]
) -> None:
    start(mode)

    def work(db: Handler, n: int) -> None:
        db.query("UPDATE t SET v = v + 1 WHERE i = 1")
        commit(db)
        serialization_failure(db)

    for idempotent, begun in ((False, 1), (True, 3)):
        counted = Work(work)
        with pytest.raises(psycopg.errors.SerializationFailure):
            pgdbpool.run("manual", counted, idempotent=idempotent, backoff=0.001)
        assert counted.begun == begun
    assert values(admin)[1] == 1 + 3


def test_work_whose_transaction_may_have_been_committed_is_not_repeated(
    start: Any, mode: str, admin: Any, known_cluster: Any, proxy_to: Any
) -> None:
    proxy = proxy_to(known_cluster.primary)
    start(mode, {"port": proxy.port})

    def work(db: Handler, n: int) -> None:
        db.connection.autocommit = False  # so that transaction() commits
        proxy.cut_after(b"COMMIT")
        with pytest.raises(pgdbpool.ConnectionLostError) as caught, db.transaction():
            db.query("UPDATE t SET v = v + 1 WHERE i = 1")
        assert caught.value.maybe_committed
        serialization_failure(db)  # the block goes on, and its error is not that of a lost transaction

    counted = Work(work)
    with pytest.raises(psycopg.errors.SerializationFailure):
        pgdbpool.run("manual", counted)
    assert (counted.begun, values(admin)[1]) == (1, 1)


def test_an_autocommit_block_is_repeated_only_if_allowed(start: Any, mode: str, admin: Any) -> None:
    start(mode)

    def work(db: Handler, n: int) -> int:
        db.query("UPDATE t SET v = v + 1 WHERE i = 1")
        if n < 3:
            serialization_failure(db)
        return n

    with pytest.raises(psycopg.errors.SerializationFailure):
        pgdbpool.run("auto", Work(work))
    assert values(admin)[1] == 1
    assert pgdbpool.run("auto", Work(work), idempotent=True, backoff=0.001) == 3
    assert values(admin)[1] == 4


# Lost connections.


def test_a_transaction_lost_before_its_commit_is_done_once(start: Any, mode: str, admin: Any) -> None:
    start(mode)

    def work(db: Handler, n: int) -> int:
        db.query("UPDATE t SET v = v + 1 WHERE i = 1")
        if n == 1:
            kill_backends(admin, pid_of(db))
        db.query("UPDATE t SET v = v + 1 WHERE i = 2")
        return n

    assert pgdbpool.run("manual", Work(work)) == 2
    assert values(admin) == {1: 1, 2: 1}


def test_a_lost_commit_is_repeated_for_idempotent_work_alone(start: Any, mode: str, admin: Any) -> None:
    start(mode)

    def work(db: Handler, n: int) -> None:
        db.query("UPDATE t SET v = v + 1 WHERE i = 1")
        if n == 1:
            kill_backends(admin, pid_of(db))  # so the COMMIT finds no server

    lost = Work(work)
    with pytest.raises(pgdbpool.ConnectionLostError) as caught:
        pgdbpool.run("manual", lost)
    assert (lost.begun, caught.value.maybe_committed) == (1, True)
    again = Work(work)
    pgdbpool.run("manual", again, idempotent=True)
    assert (again.begun, values(admin)[1]) == (2, 1)


def test_a_statement_that_may_have_run_is_repeated_for_idempotent_work_alone(
    start: Any, mode: str, admin: Any
) -> None:
    start(mode)

    def work(db: Handler, n: int) -> int:
        if n == 1:
            kill_backends(admin, pid_of(db))
        db.query("UPDATE t SET v = v + 1 WHERE i = 1")
        return n

    with pytest.raises(pgdbpool.ConnectionLostError) as caught:
        pgdbpool.run("auto", Work(work))
    assert caught.value.maybe_executed
    assert pgdbpool.run("auto", Work(work), idempotent=True) == 2


def test_a_group_that_only_reads_is_repeated(start: Any, mode: str, known_cluster: Any, admin: Any) -> None:
    standby = known_cluster.standbys[0]
    Connection.init(config([standby], mode, read={"connection_count": 1, "target": "standby"}))

    def work(db: Handler, n: int) -> int:
        if n == 1:
            with standby.connect() as there:
                kill_backends(there, pid_of(db))
        db.query("SELECT 1")
        return n

    try:
        assert pgdbpool.run("read", Work(work)) == 2
        written = Work(lambda db, n: db.query("CREATE TABLE no (i int)"))
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction) as caught:
            pgdbpool.run("read", written)  # there it will never be otherwise
        assert (written.begun, classify(caught.value)) == (1, Category.READ_ONLY)
    finally:
        Connection.reset()


@pytest.mark.parametrize(("before", "after"), [("primary", "standby"), ("standby", "primary")])
def test_a_group_that_a_reload_made_read_only_or_not_in_between_is_not_repeated(
    mode: str, known_cluster: Any, before: str, after: str
) -> None:
    def made(target: str) -> dict[str, Any]:
        group = {"connection_count": 1, "min_size": 0, "target": target}
        return config([known_cluster.primary, known_cluster.standbys[0]], mode, g=group)

    def work(db: Handler, n: int) -> None:
        Connection.reload(made(after))
        serialization_failure(db)

    Connection.init(made(before), wait=False)
    try:
        counted = Work(work)
        with pytest.raises(psycopg.errors.SerializationFailure):
            pgdbpool.run("g", counted, backoff=0.001)
        assert counted.begun == 1
    finally:
        Connection.reset()


# Servers that are away.


@pytest.mark.slow
def test_a_server_that_comes_back_is_waited_for(
    start: Any, mode: str, known_cluster: Any, proxy_to: Any
) -> None:
    proxy = proxy_to(known_cluster.primary)
    start(mode, {"port": proxy.port})
    proxy.stop()
    threading.Timer(0.5, proxy.start).start()
    found = pgdbpool.run(
        "auto", lambda db: db.query("SELECT 1").fetchone()[0], attempts=40, backoff=0.2, max_backoff=0.3
    )
    assert found == 1


@pytest.mark.slow
def test_work_goes_on_after_a_promotion(mode: str) -> None:
    """The primary is killed under a transaction; a standby is promoted meanwhile."""
    with Cluster(standbys=1) as cluster:
        primary, standby = cluster.nodes
        primary.execute("CREATE TABLE t (i int)")
        cluster.wait_in_sync()
        groups = {"write": {"target": "primary", "autocommit": False, "connection_count": 2}}
        Connection.init(config(cluster.nodes, mode, **groups))
        promotion = threading.Timer(0.5, standby.promote)
        try:

            def work(db: Handler, n: int) -> str:
                db.query("INSERT INTO t VALUES (1)")
                if n == 1:
                    primary.kill()
                    promotion.start()
                db.query("INSERT INTO t VALUES (2)")
                return db.endpoint

            began = time.monotonic()
            counted = Work(work)
            with deadline(30):
                endpoint = pgdbpool.run("write", counted, attempts=200, backoff=0.1, max_backoff=0.3)
            print(f"{mode}: done after {time.monotonic() - began:.2f} s, begun {counted.begun} times")
            assert endpoint.endswith(f":{standby.port}")
            with standby.connect() as conn:
                assert conn.execute("SELECT i FROM t ORDER BY i").fetchall() == [(1,), (2,)]
        finally:
            if promotion.ident is not None:  # the server takes writes before its promotion returns
                promotion.join()
            Connection.reset()


# Bounds.


@pytest.mark.slow
def test_nothing_is_repeated_beyond_the_deadline(start: Any, mode: str) -> None:
    start(mode)
    work = Work(serialization_failure)
    began = time.monotonic()
    with pytest.raises(psycopg.Error) as caught, deadline(2):
        pgdbpool.run("manual", work, attempts=1000, backoff=0.4, max_backoff=0.8)
    # The last attempt may be one that had hardly any time left.
    assert classify(caught.value) in (Category.RETRYABLE, Category.TIMEOUT)
    assert time.monotonic() - began < 5
    assert 2 <= work.begun <= 8


def test_the_wait_doubles_up_to_its_bound(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start()
    waits: list[float] = []
    monkeypatch.setattr("pgdbpool._api.retry.time.sleep", waits.append)
    with pytest.raises(psycopg.errors.SerializationFailure):
        pgdbpool.run("manual", serialization_failure, attempts=8, backoff=0.1, max_backoff=1.0)
    full = [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]
    assert len(waits) == len(full)
    assert all(limit / 2 <= wait <= limit for wait, limit in zip(waits, full, strict=True))
    assert len(set(waits)) == len(waits)


def test_work_is_tried_once_at_least(start: Any) -> None:
    start()
    with pytest.raises(ValueError, match="attempts=0"):
        pgdbpool.run("manual", lambda db: None, attempts=0)


def test_a_function_can_be_made_to_repeat_itself(start: Any, admin: Any) -> None:
    start()
    begun = []

    @pgdbpool.retrying("manual", attempts=2, backoff=0.001)
    def add(db: Handler, amount: int, *, to: int) -> int:
        """Add an amount."""
        begun.append(amount)
        if len(begun) == 1:
            serialization_failure(db)
        return int(db.query("UPDATE t SET v = v + %s WHERE i = %s RETURNING v", (amount, to)).fetchone()[0])

    assert add(5, to=2) == 5
    assert begun == [5, 5]
    assert (add.__name__, add.__doc__) == ("add", "Add an amount.")
    assert values(admin) == {1: 0, 2: 5}

"""Exceptions that come from outside, at any point: the pool's counts are exact afterwards.

`interrupt_at` raises at the n-th point of a block at which something from outside may do so.
"""

from __future__ import annotations

import ctypes
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext, suppress
from typing import Any

import psycopg
import pytest
from psycopg.transaction import OutOfOrderTransactionNesting
from support import Interruption, config, interrupt_at, interruptions, pid_of, server, wait_for

from pgdbpool import Connection, Handler, TransactionAbortedError

# What is raised in the callback of a weak reference goes nowhere: that is Python's rule for signals too.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

IDLE = psycopg.pq.TransactionStatus.IDLE
SIZE = 2


@pytest.fixture
def pools(known_cluster: Any, mode: str) -> Iterator[None]:
    known_cluster.primary.execute("CREATE TABLE t (i int)")
    groups: dict[str, dict[str, Any]] = {
        "auto": {"connection_count": SIZE, "settings": {"app.x": "1"}},
        "manual": {"connection_count": SIZE, "autocommit": False},
        "tenants": {
            "connection_count": SIZE,
            "autocommit": False,
            "tenant": {"setting": "app.tenant", "verify": "off", "required": False},
        },
    }
    Connection.init(config([server(known_cluster.primary)], mode, **groups))
    yield
    Connection.reset()


def exact(group: str) -> None:
    """Fail unless nothing is in use, and all connections that there may be can be lent at once, and work."""

    def settled() -> bool:
        if Connection.status().groups[group].left:
            with Handler(group, timeout=5):
                pass  # in lock-free mode a checkout asks whether the server has let go what was left
        status = Connection.status().groups[group]
        return status.in_use == status.waiting == 0 and status.idle == status.size

    wait_for(settled, 5, f"{Connection.status().groups[group]}")
    with ExitStack() as stack:
        blocks = [stack.enter_context(Handler(group, timeout=5)) for _ in range(SIZE)]
        assert all(block.query("SELECT 1").fetchone()[0] == 1 for block in blocks)
    status = Connection.status().groups[group]
    assert (status.in_use, status.idle, status.size) == (0, SIZE, SIZE), status


@pytest.mark.parametrize("group", ["auto", "manual"])
def test_an_interruption_at_any_point_of_a_block_leaves_the_counts_exact(
    pools: None, group: str, measured: Any
) -> None:
    def block() -> None:
        with Handler(group, timeout=5) as db:
            db.query("INSERT INTO t VALUES (1)")

    point = 1
    while interrupt_at(point, block):
        exact(group)
        point += 1
    measured("points at which a block was interrupted", point - 1, "", at_least=50)


@pytest.mark.parametrize("group", ["auto", "manual", "tenants"])
def test_an_interruption_at_any_point_of_getconn_leaves_the_counts_exact(
    pools: None, group: str, measured: Any
) -> None:
    taken: list[Any] = []

    def take() -> None:
        taken.append(Connection.getconn(group, timeout=5))

    point = 1
    while interrupt_at(point, take):
        for conn in taken:  # it has come to its borrower
            Connection.putconn(conn)
        taken.clear()
        exact(group)
        point += 1
    Connection.putconn(taken.pop())
    measured("points at which getconn was interrupted", point - 1, "", at_least=15)


@pytest.mark.parametrize("end", ["COMMIT AND CHAIN", "ROLLBACK AND CHAIN"])
@pytest.mark.parametrize("first", [True, False])
def test_after_any_interruption_the_next_statement_has_the_tenant(
    pools: None, end: str, first: bool, measured: Any
) -> None:
    point, going = 1, True
    while going:
        with Handler("tenants", tenant="one", timeout=5) as db:
            if not first:
                db.query("SELECT 1")
            going = interrupt_at(point, lambda db=db: db.query(end))  # type: ignore[misc]
            point += 1
            try:
                row = db.query("SELECT current_setting('app.tenant', true)").fetchone()
            except psycopg.Error:  # the connection was closed
                db.rollback()
                row = db.query("SELECT current_setting('app.tenant', true)").fetchone()
            assert row == ("one",), point
        exact("tenants")
    measured("points at which the end of a transaction was interrupted", point - 1, "", at_least=20)


def test_transactions_that_are_ended_crosswise_leave_nothing_to_commit(
    pools: None, known_cluster: Any
) -> None:
    with Handler("manual") as db:
        outer = db.transaction()
        outer.__enter__()
        db.query("INSERT INTO t VALUES (1)")
        inner = db.transaction()
        inner.__enter__()
        for context in (outer, inner):
            with pytest.raises(OutOfOrderTransactionNesting):
                context.__exit__(None, None, None)
        with pytest.raises(TransactionAbortedError):
            db.commit()
        assert db.query("SELECT count(*) FROM t").fetchone() == (0,)
    exact("manual")


def test_waiters_for_an_interrupted_dial_go_on_at_once(pools: None, mode: str) -> None:
    if mode != "threaded":
        pytest.skip("nobody waits for another in lock-free mode")
    group = Connection.group("manual")
    endpoint = group.endpoints[0]
    dials = [endpoint.begin_dial()]
    waiter = threading.Thread(target=group._dial_or_wait, args=(endpoint, 60))
    waiter.start()
    dials.clear()  # as the frames of the interrupted one do
    waiter.join(10)
    assert not waiter.is_alive()


@pytest.mark.parametrize("group", ["auto", "manual"])
@pytest.mark.parametrize("use", ["notifies", "stream"])
def test_an_error_in_a_loop_over_streamed_rows_ends_the_block(pools: None, group: str, use: str) -> None:
    """The loop's generator is left open then, and holds psycopg's lock."""
    with pytest.raises(Interruption), Handler(group) as db:
        db.query("LISTEN news")
        if group == "manual":
            db.commit()
        with db.transaction():
            db.query("NOTIFY news")
        db.commit()
        db.query("BEGIN" if group == "auto" else "SELECT 1")
        cursor = db.connection.cursor()
        generator: Any = cursor.stream("SELECT 1") if use == "stream" else db.connection.notifies(timeout=5)
        for _ in generator:
            with pytest.raises(psycopg.ProgrammingError, match=r"stream|notif"):
                db.rollback()
            with pytest.raises(psycopg.ProgrammingError, match=r"stream|notif"):
                db.commit()
            raise Interruption
    exact(group)


@pytest.mark.parametrize("group", ["auto", "manual"])
def test_an_error_in_a_loop_ends_the_transaction_around_it(pools: None, group: str) -> None:
    def fail(db: Handler) -> None:
        rows = db.connection.cursor().stream("SELECT generate_series(1, 3)")  # in the frame of the exception
        for _ in rows:
            raise Interruption

    for around in (True, False):
        with Handler(group) as db:
            with pytest.raises(Interruption), db.transaction() if around else nullcontext():
                with db.transaction():
                    db.query("INSERT INTO t VALUES (1)")
                    fail(db)
            db.rollback()
            assert db.query("SELECT count(*) FROM t").fetchone() == (0,)
        exact(group)


SLOW_COMMIT = """
    CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_sleep(0.3); RETURN NULL; END $$;
    CREATE CONSTRAINT TRIGGER late AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION slow()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("group", ["auto", "manual"])
def test_a_commit_whose_wait_is_interrupted_is_not_taken_for_a_loss(
    pools: None, known_cluster: Any, group: str, kept: bool
) -> None:
    """It may have committed: neither `commit()` nor the next statement may say that nothing was."""
    known_cluster.primary.execute(SLOW_COMMIT)

    def work(conn: Any) -> None:
        with conn.transaction() if group == "auto" else nullcontext():
            conn.execute("INSERT INTO t VALUES (1)")
        conn.commit()

    with interruptions() as interrupt, Connection.getconn(group) if kept else Handler(group) as taken:
        conn = taken if kept else taken.connection
        assert interrupt(0.1, lambda: work(conn))
        taken.commit()
        conn = taken if kept else taken.connection
        assert conn.execute("SELECT 1").fetchone()[0] == 1
    exact(group)
    wait_for(lambda: known_cluster.primary.execute("SELECT count(*) FROM t") == [(1,)])


def test_an_interruption_when_a_dial_ends_keeps_no_thread_waiting(pools: None, mode: str) -> None:
    if mode == "non-threaded":
        pytest.skip("nobody waits for another in lock-free mode")
    group = Connection.group("auto")
    endpoint = group.endpoints[0]
    dial = endpoint.begin_dial()

    def wait() -> None:
        with suppress(Interruption):
            group._dial_or_wait(endpoint, 60)

    waiters = [threading.Thread(target=wait) for _ in range(4)]
    for waiter in waiters:
        waiter.start()
    waiting = type(dial.over).wait.__code__
    for waiter in waiters:
        wait_for(lambda waiter=waiter: sys._current_frames()[waiter.ident].f_code is waiting)
    for waiter in waiters[:3]:  # raised as soon as it has the lock that it waits for
        assert waiter.ident is not None
        number, kind = ctypes.c_ulong(waiter.ident), ctypes.py_object(Interruption)
        wait_for(lambda number=number, kind=kind: ctypes.pythonapi.PyThreadState_SetAsyncExc(number, kind))
    endpoint.end_dial(dial)
    for waiter in waiters:
        waiter.join(10)
    assert [waiter.is_alive() for waiter in waiters] == [False] * 4


def test_an_interruption_at_any_point_of_a_connect_leaves_the_counts_exact(
    pools: None, measured: Any
) -> None:
    def block() -> None:
        with Handler("manual", timeout=5) as db:
            db.query("INSERT INTO t VALUES (1)")

    point, connects = 1, 0
    while True:
        with ExitStack() as stack:
            for _ in range(SIZE):
                stack.enter_context(Handler("manual")).connection.close()
            stack.close()
        wait_for(lambda: Connection.status().groups["manual"].in_use == 0)
        if not interrupt_at(point, block):
            break
        exact("manual")
        point += 7
        connects += 1
    measured("points at which a block that connects was interrupted", connects, "", at_least=10)


def test_an_interrupted_connection_is_never_lent_again(pools: None, known_cluster: Any) -> None:
    """Neither while the server is still at work for whoever was interrupted, nor with what was left open."""

    def alarm(*_: Any) -> None:
        raise Interruption

    previous = signal.signal(signal.SIGALRM, alarm)
    try:
        for group in ("auto", "manual"):
            for use in (_sleep, _stream, _copy, _pipeline):
                with pytest.raises(Interruption), Handler(group) as db:
                    used = pid_of(db)
                    # Again after a second: what is raised in a finalizer goes nowhere.
                    signal.setitimer(signal.ITIMER_REAL, 0.05, 1.0)
                    use(db)
                signal.setitimer(signal.ITIMER_REAL, 0)
                exact(group)
                with ExitStack() as stack:
                    for _ in range(SIZE):
                        db = stack.enter_context(Handler(group))
                        # psycopg may have brought the others to a clean end itself.
                        assert use is not _sleep or pid_of(db) != used
                        assert db.connection.pgconn.transaction_status == IDLE
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    busy = "SELECT pid FROM pg_stat_activity WHERE application_name = 'pgdbpool' AND state <> 'idle'"
    wait_for(lambda: known_cluster.primary.execute(busy) == [], what="nothing runs on at the server")


def _sleep(db: Handler) -> None:
    db.query("SELECT pg_sleep(4)")


def _stream(db: Handler) -> None:
    for _ in db.connection.cursor().stream("SELECT i, pg_sleep(0.01) FROM generate_series(1, 400) i"):
        pass


def _copy(db: Handler) -> None:
    with db.connection.cursor().copy("COPY t FROM STDIN") as copy:
        for i in range(10_000):
            copy.write_row((i,))
            time.sleep(0.001)


def _pipeline(db: Handler) -> None:
    with db.connection.pipeline():
        for _ in range(400):
            db.connection.execute("SELECT pg_sleep(0.01)")


def test_random_interruptions_lose_nothing(pools: None, known_cluster: Any, measured: Any) -> None:
    """What was acknowledged is there once, what was not at most once, and the pool is whole."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rand = random.Random(seed)
    acknowledged: list[int] = []
    number = interrupted = 0
    longest = 0.012

    def block() -> None:
        nonlocal number
        number += 1
        with Handler("manual", timeout=5) as db:
            db.query("INSERT INTO t VALUES (%s)", (number,))
        acknowledged.append(number)

    with interruptions() as interrupt:
        while interrupted < 300:
            before = len(acknowledged)
            for _ in range(20):
                interrupted += interrupt(rand.uniform(0.0005, longest), block)
            if len(acknowledged) == before:
                longest *= 2  # a busy machine does not even open a connection in that time
    exact("manual")
    rows = [i for (i,) in known_cluster.primary.execute("SELECT i FROM t")]
    measured("blocks acknowledged among 300 interruptions", len(acknowledged), "", at_least=10)
    assert len(rows) == len(set(rows))
    assert set(acknowledged) <= set(rows)

"""Where two features meet: a deadline and a one-shot, a reload and an open block, a fork and a lock."""

from __future__ import annotations

import logging
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from support import config, in_child, pid_of, server, wait_for

from pgdbpool import (
    Connection,
    ConnectionLostError,
    DBConnectionError,
    Handler,
    TransactionAbortedError,
    deadline,
)
from pgdbpool._config.model import RateLimit
from pgdbpool._lending.rate_limit import RateLimiter
from pgdbpool._session import block as blocks
from pgdbpool.cluster import Cluster


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    yield
    Connection.reset()


def in_time(function: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Run the function in a thread, and fail where it hangs."""
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001
            results.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"
    return results[0]


# Deadlines.


@pytest.mark.parametrize("many", [False, True])
def test_a_deadline_never_gives_a_one_shot_more_than_query_timeout(
    known_cluster: Cluster, mode: str, many: bool
) -> None:
    node = server(known_cluster.primary, query_timeout=300)
    Connection.init(config([node], mode, g={"connection_count": 1, "autocommit": False}))
    began = time.monotonic()
    with deadline(8), pytest.raises(psycopg.errors.QueryCanceled):
        if many:
            Connection.executemany("g", "SELECT pg_sleep(%s)", [(6,)])
        else:
            Connection.fetch("g", "SELECT pg_sleep(6)")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("key", ["deadline", "annotate"])
def test_a_transaction_can_set_its_isolation_level(known_cluster: Cluster, mode: str, key: str) -> None:
    group = {"connection_count": 1, "autocommit": False, "annotate": key == "annotate"}
    Connection.init(config([known_cluster.primary], mode, g=group))
    with deadline(5 if key == "deadline" else 1e6), Handler("g") as db:
        db.query("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        assert db.fetchval("SELECT current_setting('transaction_isolation')") == "serializable"


# A server is drained.


def test_no_block_gets_a_connection_that_was_being_opened_while_its_server_was_drained(
    known_cluster: Cluster, mode: str
) -> None:
    opening, go_on = threading.Event(), threading.Event()

    def user() -> str:
        opening.set()
        go_on.wait(10)
        return "postgres"

    slow = server(known_cluster.primary, label="a", user=user)
    other = server(known_cluster.standbys[0], label="b")
    Connection.init(config([slow, other], mode, g={"connection_count": 1, "min_size": 0}), wait=False)
    Connection.drain("b")
    got: list[Any] = []

    def work() -> None:
        with Handler("g") as db:
            got.append(db.endpoint)

    thread = threading.Thread(target=work)
    thread.start()
    assert opening.wait(10)
    Connection.undrain("b")
    Connection.drain("a")
    go_on.set()
    thread.join(10)
    assert got == ["b"]


def test_a_connection_that_health_had_borrowed_is_not_lent_after_a_drain(
    known_cluster: Cluster, mode: str
) -> None:
    entries = [
        server(node, label=label)
        for node, label in zip([known_cluster.primary, known_cluster.standbys[0]], "ab", strict=True)
    ]
    Connection.init(config(entries, mode, g={"connection_count": 2}))
    group = Connection.group("g")
    (endpoint,) = (e for e in group.endpoints if e.label == "a")
    conn = group.borrow(endpoint)
    assert conn is not None
    Connection.drain("a")
    conn.used_at = time.monotonic()  # it has answered
    group.give_back(conn)
    for _ in range(3):
        with Handler("g") as one:
            assert one.endpoint == "b"


def test_a_drain_is_kept_when_a_probe_fails_meanwhile(known_cluster: Cluster) -> None:
    Connection.init(config([server(known_cluster.primary, label="a")], g={"connection_count": 1}))
    (endpoint,) = Connection.group("g").endpoints
    prober = type(Connection._pools.monitor.prober)(lambda: 0.0)  # type: ignore[union-attr]
    endpoint.on_down = lambda endpoint: None
    endpoint.mark_down("test")
    real = endpoint.probe

    def probe() -> Any:
        made = real()
        step = made.step

        def drained_meanwhile() -> bool:
            endpoint.drain()
            made._finish(False, "no")
            return step()

        made.step = drained_meanwhile  # type: ignore[method-assign]
        return made

    endpoint.probe = probe  # type: ignore[method-assign]
    prober._due[endpoint] = 0.0
    prober.step()
    assert endpoint.state.value == "draining"


# A configuration changes.


def test_a_waiter_gets_an_idle_connection_that_is_no_longer_reserved(known_cluster: Cluster) -> None:
    made = config([known_cluster.primary], g={"connection_count": 2, "reserved": 1, "timeout": 30})
    Connection.init(made)
    release = threading.Event()
    holder = threading.Thread(target=lambda: _hold("g", release))
    holder.start()
    group = Connection.group("g")
    wait_for(lambda: group.status().in_use == 1)
    waiter = threading.Thread(target=lambda: _hold("g", release))
    waiter.start()
    wait_for(lambda: group.status().waiting == 1)
    made["groups"]["g"]["reserved"] = 0
    Connection.reload(made)
    try:
        wait_for(lambda: group.status().in_use == 2)
    finally:
        release.set()
        holder.join(10)
        waiter.join(10)


def _hold(group: str, release: threading.Event) -> None:
    with Handler(group):
        release.wait(10)


def test_a_reload_may_end_a_rate_limit_before_a_block_asks_for_its_turn(
    known_cluster: Cluster, mode: str
) -> None:
    made = config([known_cluster.primary], mode, g={"connection_count": 1, "rate_limit": 1000})
    Connection.init(made)
    del made["groups"]["g"]["rate_limit"]

    def interrupt(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_name == "admit":
            sys.setprofile(None)
            Connection.reload(made)

    def work() -> Any:
        sys.setprofile(interrupt)
        try:
            with Handler("g") as db:
                return db.fetchval("SELECT 1")
        finally:
            sys.setprofile(None)

    assert in_time(work) == 1


@pytest.mark.slow
def test_health_goes_on_while_a_server_is_added(known_cluster: Cluster, proxy_to: Any) -> None:
    proxy = proxy_to(known_cluster.primary)
    hung = server(known_cluster.primary, label="a", port=proxy.port)
    Connection.init(config([hung], g={"connection_count": 1}))
    proxy.stall()
    reports: list[Any] = []

    def examine() -> None:
        try:
            reports.append(Connection.health(timeout=1.0))
        except Exception as error:  # noqa: BLE001
            reports.append(error)

    thread = threading.Thread(target=examine)
    thread.start()
    wait_for(lambda: Connection.group("g").status().idle == 0)
    Connection.add_endpoint(server(known_cluster.standbys[0], label="b"))
    thread.join(10)
    assert isinstance(reports[0], dict)
    assert reports[0]["groups"]["g"]["status"] == "unhealthy"


def test_a_lost_transaction_stays_lost_when_a_reload_makes_its_group_autocommit(
    known_cluster: Cluster, mode: str
) -> None:
    made = config([known_cluster.primary], mode, g={"connection_count": 1, "autocommit": False})
    Connection.init(made)
    Connection.execute("g", "CREATE TABLE parts (n int)")
    with pytest.raises(TransactionAbortedError), Handler("g") as db:
        db.query("INSERT INTO parts VALUES (1)")
        made["groups"]["g"]["autocommit"] = True
        with suppress(psycopg.Error), db.transaction():
            Connection.reload(made)
            db.query("SELECT pg_terminate_backend(pg_backend_pid())")
        db.query("INSERT INTO parts VALUES (2)")
    assert Connection.fetchval("g", "SELECT count(*) FROM parts") == 0


def test_a_reload_that_asks_for_clean_sessions_removes_their_state(known_cluster: Cluster, mode: str) -> None:
    made = config([known_cluster.primary], mode, g={"connection_count": 1, "reset": "never"})
    Connection.init(made)
    with Handler("g") as db:
        db.query("SET app.kept = 'yes'")
    del made["groups"]["g"]["reset"]
    Connection.reload(made)
    with Handler("g") as db:
        assert not db.fetchval("SELECT current_setting('app.kept', true)")


# A server of before PostgreSQL 14, which does not report whether it is a standby.


@pytest.mark.parametrize("target", ["primary", "read-write"])
def test_a_server_that_reports_no_role_is_asked_again_after_it_refused_a_write(
    known_cluster: Cluster, mode: str, proxy_to: Any, target: str
) -> None:
    proxy = proxy_to(known_cluster.primary)
    proxy.rename(b"in_hot_standby", b"no_hot_standby")
    node = server(known_cluster.primary, port=proxy.port)
    Connection.init(config([node], mode, g={"connection_count": 1, "target": target}))
    with Handler("g") as db:
        pid = pid_of(db)
        db.query("BEGIN READ ONLY")
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            db.query("CREATE TABLE refused (n int)")
        db.query("ROLLBACK")
    with Handler("g") as db:
        assert pid_of(db) == pid
        assert db.connection.asked_role == "primary"


# The background.


@pytest.mark.slow
def test_the_background_survives_its_errors(known_cluster: Cluster) -> None:
    Connection.init(config([server(known_cluster.primary, label="a")], g={"connection_count": 1}))
    (endpoint,) = Connection.group("g").endpoints
    real = endpoint.probe
    failures = iter([OSError(24, "Too many open files")])

    def probe() -> Any:
        for error in failures:
            raise error
        return real()

    endpoint.probe = probe  # type: ignore[method-assign]
    endpoint.mark_down("test")
    wait_for(lambda: endpoint.state.value == "up")


def test_a_log_handler_told_of_a_reclaimed_connection_may_use_the_pool(
    known_cluster: Cluster, mode: str
) -> None:
    group = {"connection_count": 1, "max_hold": 0.05, "timeout": 9}
    Connection.init(config([known_cluster.primary], mode, g=group, other={"connection_count": 1}))
    took: list[float] = []

    class ToDatabase(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if getattr(record, "event", "") == "block.overdue":
                began = time.monotonic()
                with suppress(Exception), Handler("g") as db:
                    db.query("SELECT 1")
                took.append(time.monotonic() - began)

    handler = ToDatabase()
    logging.getLogger("pgdbpool").addHandler(handler)
    try:
        with suppress(ConnectionLostError), Handler("g") as db:
            time.sleep(0.1)
            if mode == "non-threaded":
                with Handler("other"):
                    pass
            wait_for(lambda: took)
            db.query("SELECT 1")
    finally:
        logging.getLogger("pgdbpool").removeHandler(handler)
    assert took[0] < 8


def test_a_signal_handler_may_close_what_it_interrupts_the_waking_of(known_cluster: Cluster) -> None:
    Connection.init(config([known_cluster.primary], g={"connection_count": 1}))
    pools = Connection._pools
    assert pools is not None
    monitor = pools.monitor

    def inside(frame: Any, event: str, arg: Any) -> Any:
        if event == "call" and frame.f_code.co_name in ("notify_all", "notify"):
            sys.setprofile(None)
            Connection.terminate()

    def work() -> None:
        sys.setprofile(inside)
        try:
            monitor.wake()
        finally:
            sys.setprofile(None)

    in_time(work)


def test_two_threads_may_be_the_first_to_use_a_group(known_cluster: Cluster) -> None:
    Connection.init(config([known_cluster.primary], g={"connection_count": 2}), wait=False)

    def inside(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_name == "_maintain":
            sys.setprofile(None)
            other = threading.Thread(target=Connection.fetchval, args=("g", "SELECT 2"))
            other.start()
            other.join(10)

    def work() -> Any:
        sys.setprofile(inside)
        try:
            return Connection.fetchval("g", "SELECT 1")
        finally:
            sys.setprofile(None)

    assert in_time(work) == 1


def test_a_finalizer_may_use_a_group_that_chooses_a_server(known_cluster: Cluster) -> None:
    Connection.init(config([known_cluster.primary], g={"connection_count": 2, "min_size": 0}), wait=False)
    group = Connection.group("g")
    again = iter([True])

    def inside(frame: Any, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_name == "_candidates" and next(again, False):
            with Handler("g") as db:
                db.query("SELECT 1")

    def work() -> int:
        sys.setprofile(inside)
        try:
            with Handler("g"):
                return group.status().in_use
        finally:
            sys.setprofile(None)

    assert in_time(work) == 1


def test_without_a_file_descriptor_left_the_error_is_one_of_the_pool(mode: str) -> None:
    nowhere = {"host": "/nowhere", "name": "postgres", "user": "postgres"}
    Connection.init(config([nowhere], mode, g={"connection_count": 1}), wait=False)

    def child() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        with suppress(OSError):
            while os.open(os.devnull, os.O_RDONLY):
                pass
        with pytest.raises(DBConnectionError), Handler("g"):
            pass

    in_child(child)


@pytest.mark.parametrize("inside", ["take", "_remove"])
def test_a_signal_handler_may_replace_the_connections(known_cluster: Cluster, mode: str, inside: str) -> None:
    Connection.init(config([known_cluster.primary], mode, g={"connection_count": 3}))
    names = {"take": "popleft", "_remove": "remove"}

    def interrupt(frame: Any, event: str, arg: Any) -> None:
        if event == "c_call" and frame.f_code.co_name == inside and arg.__name__ == names[inside]:
            sys.setprofile(None)
            Connection.expire("g")

    def work() -> Any:
        with Handler("g"):
            pass
        sys.setprofile(interrupt)
        try:
            if inside == "_remove":
                Connection.expire("g")
            return Connection.fetchval("g", "SELECT 1")
        finally:
            sys.setprofile(None)

    assert in_time(work) == 1
    assert Connection.group("g").status().size <= 3


@pytest.mark.slow
def test_a_signal_refuses_blocks_though_a_change_holds_the_pools(known_cluster: Cluster) -> None:
    Connection.init(config([known_cluster.primary], g={"connection_count": 1}))
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with Connection._lock:
            held.set()
            release.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    try:
        in_time(Connection.terminate)
        assert Connection.is_closing()
    finally:
        release.set()
        thread.join()


def test_a_rate_limit_may_be_asked_again_by_what_interrupts_it() -> None:
    limiter: RateLimiter | None = None
    again = iter([True])

    def clock() -> float:
        if limiter is not None and next(again, False):
            limiter.acquire()
        return time.monotonic()

    limiter = RateLimiter(RateLimit(per_second=1000, burst=10, max_wait=1), "g", lock_free=False, clock=clock)
    assert in_time(limiter.acquire) is None


# A fork.


def test_a_child_waits_for_no_lock_that_the_parent_held_for_an_id(known_cluster: Cluster) -> None:
    Connection.init(config([known_cluster.primary], g={"connection_count": 1}))
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with blocks._making_ids:
            held.set()
            release.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)

    def child() -> None:
        with Handler("g") as db:
            with suppress(psycopg.errors.UndefinedTable):
                db.query("SELECT * FROM nothing")
            assert db.correlation_id

    try:
        in_child(child)
    finally:
        release.set()
        thread.join()


def test_a_child_that_drops_the_parents_connection_waits_for_no_lock(known_cluster: Cluster) -> None:
    Connection.init(config([known_cluster.primary], g={"connection_count": 2}))
    pool: Any = Connection.group("g")._pool
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with pool._lock:
            held.set()
            release.wait(20)

    handlers = [Handler("g")]
    handlers[0].__enter__()
    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)

    def child() -> None:
        handlers.pop().__exit__(None, None, None)
        with Handler("g") as db:
            db.query("SELECT 1")

    try:
        in_child(child)
    finally:
        release.set()
        thread.join()
        handlers.pop().__exit__(None, None, None)


# What the connection itself is used for.


@pytest.mark.parametrize("more", [False, True])
def test_a_transaction_whose_connection_was_closed_in_the_block_is_lost(
    known_cluster: Cluster, mode: str, more: bool
) -> None:
    Connection.init(config([known_cluster.primary], mode, g={"connection_count": 1, "autocommit": False}))
    Connection.execute("g", "CREATE TABLE halves (n int)")
    with pytest.raises(TransactionAbortedError), Handler("g") as db:
        db.query("INSERT INTO halves VALUES (1)")
        db.connection.close()
        if more:
            db.query("INSERT INTO halves VALUES (2)")
    assert Connection.fetchval("g", "SELECT count(*) FROM halves") == 0


@pytest.mark.parametrize("autocommit", [True, False])
def test_on_checkout_may_send_a_statement_before_a_one_shot(
    known_cluster: Cluster, mode: str, autocommit: bool
) -> None:
    def on_checkout(conn: Any) -> None:
        conn.execute("SELECT 1")

    group = {"connection_count": 1, "autocommit": autocommit, "on_checkout": on_checkout}
    Connection.init(config([known_cluster.primary], mode, g=group))
    assert Connection.fetchval("g", "SELECT 2") == 2
    assert Connection.executemany("g", "SELECT %s", [(1,), (2,)]) == 2


def test_a_session_does_not_collect_prepared_preambles(known_cluster: Cluster, mode: str) -> None:
    tenant = {"setting": "app.tenant", "verify": "off"}
    Connection.init(config([known_cluster.primary], mode, g={"connection_count": 1, "tenant": tenant}))
    for number in range(200):
        with Handler("g", tenant=str(number)) as db:
            assert db.fetchval("SELECT current_setting('app.tenant')") == str(number)
            db.query("SELECT pg_advisory_xact_lock(1)")
    with Handler("g", tenant="a") as db:
        assert db.fetchval("SELECT count(*) FROM pg_prepared_statements") <= 50


def test_groups_that_never_reset_may_deallocate(known_cluster: Cluster, mode: str) -> None:
    tenant = {"setting": "app.tenant", "verify": "off"}
    group = {"connection_count": 1, "tenant": tenant, "reset": "never"}
    Connection.init(config([known_cluster.primary], mode, g=group))
    for number in range(3):
        with Handler("g", tenant=str(number)) as db:
            assert db.fetchval("SELECT current_setting('app.tenant')") == str(number)
            db.query("DEALLOCATE ALL")


# What an error says.


@pytest.mark.parametrize("how", ["copy", "stream", "pipeline", "executemany in pipeline"])
def test_an_autocommit_statement_that_was_lost_may_have_been_executed(
    known_cluster: Cluster, mode: str, proxy_to: Any, how: str
) -> None:
    Connection.init(config([known_cluster.primary], mode, g={"connection_count": 1}))
    Connection.execute("g", "CREATE TABLE sent (n int)")
    proxy = proxy_to(known_cluster.primary)
    node = server(known_cluster.primary, port=proxy.port)
    Connection.init(config([node], mode, g={"connection_count": 1}))
    with pytest.raises(ConnectionLostError) as caught, Handler("g") as db:
        if how == "copy":
            proxy.cut_after(b"c\0\0\0\4")  # CopyDone
            db.copy_records_to_table("sent", [(1,), (2,)])
        elif how == "stream":
            proxy.cut_after(b"INSERT")
            cursor: Any = db.cursor()
            list(cursor.stream("INSERT INTO sent VALUES (1), (2) RETURNING n"))
        elif how == "pipeline":
            proxy.cut_after(b"INSERT")
            with db.pipeline():
                db.query("INSERT INTO sent VALUES (1)")
        else:
            proxy.cut_after(b"INSERT")
            with db.pipeline():
                db.executemany("INSERT INTO sent VALUES (%s)", [(1,), (2,)])
    with psycopg.connect(known_cluster.primary.conninfo(), autocommit=True) as admin:
        wait_for(lambda: admin.execute("SELECT count(*) FROM sent").fetchone()[0])  # type: ignore[index]
    assert caught.value.maybe_executed or caught.value.maybe_committed


def test_the_parameters_of_a_copy_are_not_shown(known_cluster: Cluster, mode: str) -> None:
    Connection.init(config([known_cluster.primary], mode, g={"connection_count": 1}))
    with Handler("g") as db:
        db.copy_from_query("SELECT %s", ("mysecret",), output=lambda data: None)
        (holder,) = Connection.status().groups["g"].holders
        assert "SELECT" in holder
        assert "mysecret" not in holder

"""Correlation ids, annotations at the server, slow blocks and statements, histograms and counters."""

from __future__ import annotations

import json
import logging
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from support import SURVIVES_INTERRUPTIONS, config, interrupt_at, kill_backends, pid_of, server, wait_for

import pgdbpool
from pgdbpool import (
    Connection,
    DBQueryError,
    Handler,
    PoolTimeout,
    RateLimitExceeded,
    TransactionAbortedError,
    correlation,
    current_correlation,
)
from pgdbpool._util.durations import BATCH, BUCKETS, Tally
from pgdbpool.stats import Histogram


@pytest.fixture
def start(known_cluster: Any, mode: str) -> Iterator[Callable[..., None]]:
    def init(entry: dict[str, Any] | None = None, **changes: Any) -> None:
        auto = {"connection_count": 1, **changes}
        manual = {**auto, "autocommit": False}
        Connection.init(
            config([server(known_cluster.primary, **(entry or {}))], mode, auto=auto, manual=manual)
        )

    yield init
    Connection.reset()


@pytest.fixture
def counted(known_cluster: Any, mode: str, proxy_to: Any) -> Iterator[Callable[..., Any]]:
    """Initialise the groups behind a counting proxy, which is returned."""
    proxy = proxy_to(known_cluster.primary)
    entry = server(known_cluster.primary, port=proxy.port)

    def init(**changes: Any) -> Any:
        auto = {"connection_count": 1, **changes}
        Connection.init(config([entry], mode, auto=auto, manual={**auto, "autocommit": False}))
        proxy.reset_counts()
        return proxy

    yield init
    Connection.reset()


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[Any]]:
    """A function that returns the records of an event."""
    caplog.set_level(logging.DEBUG, "pgdbpool")
    return lambda event: [r for r in caplog.records if getattr(r, "event", None) == event]


def name_of(db: Handler) -> str:
    """Return what the server has as the session's application_name in this statement."""
    return str(db.fetchval("SELECT current_setting('application_name')"))


# Correlation ids.


def test_a_block_has_a_given_the_current_or_a_new_id(start: Any) -> None:
    start()
    with correlation("outer"):
        with Handler("auto") as db:
            assert db.correlation_id == "outer"
        with Handler("auto", correlation_id="given") as db:
            assert db.correlation_id == "given"
        with correlation("inner"):
            assert current_correlation() == "inner"
        assert current_correlation() == "outer"
    assert current_correlation() is None
    ids = set()
    for _ in range(5):
        with Handler("auto") as db:
            assert db.correlation_id == db.correlation_id
            ids.add(db.correlation_id)
    assert len(ids) == 5


def test_any_value_can_be_an_id_and_none_can_do_harm(start: Any) -> None:
    start()
    number = uuid.uuid4()
    for value, expected in (
        (number, str(number)),
        (7, "7"),
        ("a b\n*/ DROP TABLE t; --é%s", "a_b____DROP_TABLE_t__--__s"),
        ("x" * 1000, "x" * 128),
    ):
        with Handler("auto", correlation_id=value) as db:
            assert db.correlation_id == expected


def test_an_error_of_a_statement_has_the_id_also_inside_the_block(start: Any) -> None:
    start()
    for group in ("auto", "manual"):
        with Handler(group, correlation_id="request-1") as db:
            with pytest.raises(DBQueryError) as caught:
                db.query("SELECT 1 / 0")
            assert caught.value.correlation_id == "request-1"
            if group == "manual":
                db.rollback()


def test_an_error_that_leaves_a_block_has_the_id(start: Any) -> None:
    start(rate_limit={"per_second": 0.001, "burst": 3, "max_wait": 0})

    def swallow() -> None:
        with Handler("manual", correlation_id="request-2") as db:
            with pytest.raises(psycopg.errors.DivisionByZero):
                db.query("SELECT 1 / 0")

    def full() -> None:
        with Handler("auto"), Handler("auto", correlation_id="request-2", timeout=0.01):
            pass

    def limited() -> None:
        with Handler("auto"):
            pass
        with Handler("auto", correlation_id="request-2"):
            pass

    for function, kind in (
        (swallow, TransactionAbortedError),
        (full, PoolTimeout),
        (limited, RateLimitExceeded),
    ):
        with pytest.raises(kind) as caught:
            function()
        assert caught.value.correlation_id == "request-2"
        if hasattr(caught.value, "__notes__"):
            assert caught.value.__notes__ == ["correlation id: request-2"]


def test_an_error_of_a_one_shot_has_the_id_and_so_has_one_of_run(start: Any) -> None:
    start()
    for group in ("auto", "manual"):
        with pytest.raises(psycopg.errors.DivisionByZero) as caught:
            Connection.fetch(group, "SELECT 1 / 0", correlation_id="one")
        assert caught.value.correlation_id == "one"  # type: ignore[attr-defined]
        with pytest.raises(psycopg.errors.DivisionByZero) as caught, correlation("two"):
            pgdbpool.run(group, lambda db: db.query("SELECT 1 / 0"))
        assert caught.value.correlation_id == "two"  # type: ignore[attr-defined]


def test_an_exception_of_the_application_is_left_alone(start: Any) -> None:
    start()
    with pytest.raises(KeyError) as caught, Handler("auto", correlation_id="x"):
        raise KeyError
    assert not hasattr(caught.value, "correlation_id")
    assert not hasattr(caught.value, "__notes__")


def test_two_threads_that_ask_first_are_given_the_same_id(start: Any) -> None:
    start()
    with Handler("auto") as db:
        block, found, gate = db._block, [], threading.Barrier(8)
        assert block is not None

        def ask() -> None:
            gate.wait(10)
            found.append(block.correlation_id)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert len(found) == 8
    assert len(set(found)) == 1


# annotate.


@pytest.mark.parametrize("tenant", [False, True], ids=["plain", "tenant"])
def test_the_server_sees_the_id_in_no_more_round_trips(counted: Any, tenant: bool) -> None:
    changes = {"tenant": {"setting": "app.tenant", "verify": "off"}} if tenant else {}
    use: dict[str, Any] = {"tenant": "a"} if tenant else {}
    proxy = counted(annotate=True, **changes)
    for group, commit in (("auto", 0), ("manual", 1)):
        for number in range(8):  # also where it is prepared
            given = f"request-{number}"
            with Handler(group, correlation_id=given, **use) as db:
                for _ in range(3):
                    assert name_of(db) == f"pgdbpool {given}"
            assert proxy.round_trips == proxy.syncs == 3 + commit
            proxy.reset_counts()
    assert Connection.fetchval("manual", "SHOW application_name", correlation_id="y", **use) == "pgdbpool y"
    assert proxy.round_trips == proxy.syncs == 1


def test_a_block_without_an_id_is_annotated_with_its_own(start: Any) -> None:
    start(annotate=True)
    with Handler("auto") as db:
        assert name_of(db) == f"pgdbpool {db.correlation_id}"


def test_nothing_is_annotated_unless_configured(start: Any) -> None:
    start()
    with Handler("manual", correlation_id="x") as db:
        assert name_of(db) == "pgdbpool"


def test_the_annotation_ends_with_its_transaction(start: Any, known_cluster: Any) -> None:
    start(annotate=True)
    idle = "SELECT application_name FROM pg_stat_activity WHERE pid = %s"
    with known_cluster.primary.connect() as admin:
        for group in ("auto", "manual"):
            with Handler(group, correlation_id="mine") as db:
                pid = pid_of(db)
                db.query("SELECT 1")
            name = admin.execute(idle, (pid,)).fetchone()
            assert name == ("pgdbpool",)


def test_a_second_transaction_of_a_block_is_annotated_as_well(start: Any) -> None:
    start(annotate=True)
    with Handler("manual", correlation_id="mine") as db:
        for _ in range(3):
            assert name_of(db) == "pgdbpool mine"
            db.commit()
        with pytest.raises(psycopg.errors.DivisionByZero):
            db.query("SELECT 1 / 0")
        db.rollback()
        assert name_of(db) == "pgdbpool mine"
        with db.transaction():
            assert name_of(db) == "pgdbpool mine"


def test_statements_stay_prepared_though_each_block_has_another_id(start: Any) -> None:
    start(annotate=True, prepare_threshold=2)
    for group in ("auto", "manual"):
        for number in range(10):
            with Handler(group, correlation_id=number) as db:
                db.query("SELECT %s::int", (number,))
        with Handler(group) as db:
            statements = "SELECT count(*) FROM pg_prepared_statements WHERE statement = 'SELECT $1::int'"
            assert db.fetchval(statements) == 1


def test_a_long_name_leaves_room_for_the_id(start: Any) -> None:
    start({"application_name": "n" * 60}, annotate=True)
    given = str(uuid.uuid4())
    with Handler("auto", correlation_id=given) as db:
        assert name_of(db) == "n" * 26 + " " + given
    with Handler("auto", correlation_id="i" * 100) as db:
        assert name_of(db) == "i" * 63


def test_statements_that_cannot_ride_have_the_id_in_a_comment(counted: Any) -> None:
    proxy = counted(annotate=True)
    seen = "SELECT current_query(); SELECT 1"
    with Handler("auto", correlation_id="mine") as db:
        assert db.query(seen).fetchone()[0].startswith("/* correlation_id=mine */ SELECT")
        assert proxy.syncs == 1
        db.query("VACUUM")  # which PostgreSQL takes outside of a transaction only
        with db.copy("COPY (SELECT current_query()) TO STDOUT") as copy:
            (row,) = copy.rows()
            assert row[0].startswith("/* correlation_id=mine */ COPY")
        assert db.query(psycopg.sql.SQL("SELECT 1; SELECT 2")).nextset()
        assert db.query(b"SELECT 1; SELECT 2").nextset()
    with Handler("manual", correlation_id="mine") as db:
        db.query("SELECT 1; SELECT 2")
        assert name_of(db) == "pgdbpool mine"


def test_many_sets_of_parameters_are_annotated(start: Any) -> None:
    start(annotate=True)
    for group in ("auto", "manual"):
        with Handler(group, correlation_id="mine") as db:
            rows = db.fetchmany("SELECT %s::int, current_setting('application_name')", [(1,), (2,)])
        assert [row[1] for row in rows] == ["pgdbpool mine"] * 2


def test_a_block_may_still_name_its_session_itself(start: Any) -> None:
    start(annotate=True)
    with Handler("auto", correlation_id="mine") as db:
        db.query("SET application_name = 'own'")
        with pgdbpool.deadline(10):
            assert name_of(db) == "pgdbpool mine"
    with Handler("auto", correlation_id="next") as db:
        assert name_of(db) == "pgdbpool next"


# Slow blocks and statements.


@pytest.mark.slow
def test_a_slow_statement_is_logged_without_its_parameters(start: Any, records: Any) -> None:
    start(slow_query="500ms")
    for number, group in enumerate(("auto", "manual"), 1):
        with Handler(group, correlation_id="mine") as db:
            db.query("SELECT 1")
            db.query("SELECT pg_sleep(%s), %s::text", (0.6, "a secret"))
        record = records("statement.slow")[-1]
        assert len(records("statement.slow")) == number
        assert record.group == group
        assert record.statement == "SELECT pg_sleep(%s), %s::text"
        assert record.seconds >= 0.59  # the server wakes up a little early
        assert record.correlation_id == "mine"
        assert record.file == __file__
        assert record.function == "test_a_slow_statement_is_logged_without_its_parameters"
        assert "secret" not in record.getMessage()
        assert Connection.status().groups[group].slow_statements == 1


def test_sets_of_parameters_are_one_slow_statement(start: Any, records: Any) -> None:
    start(slow_query="200ms")
    with Handler("auto") as db:
        db.executemany("SELECT pg_sleep(%s)", [(0.05,)] * 6)
    (record,) = records("statement.slow")
    assert record.seconds >= 0.3


@pytest.mark.slow
def test_a_slow_commit_is_logged_as_one(start: Any, records: Any) -> None:
    start(slow_query="500ms")
    with Handler("manual") as db:
        db.query("""
            CREATE TABLE slow (i int);
            CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql
                AS 'BEGIN PERFORM pg_sleep(0.6); RETURN NULL; END';
            CREATE CONSTRAINT TRIGGER t AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED
                FOR EACH ROW EXECUTE FUNCTION wait()""")
    before = len(records("statement.slow"))
    with Handler("manual") as db:
        db.query("INSERT INTO slow VALUES (1)")
    (record,) = records("statement.slow")[before:]
    assert record.statement == "COMMIT"


def test_a_statement_that_fails_late_is_slow_too(start: Any, records: Any) -> None:
    start({"query_timeout": 100}, slow_query="50ms")
    with pytest.raises(psycopg.errors.QueryCanceled), Handler("auto") as db:
        db.query("SELECT pg_sleep(30)")
    (record,) = records("statement.slow")
    assert record.statement == "SELECT pg_sleep(30)"


@pytest.mark.slow
def test_a_slow_block_is_logged_at_its_end(start: Any, records: Any) -> None:
    start(slow_block="500ms")
    with Handler("auto") as db:
        db.query("SELECT 1")
    with Handler("auto") as db:
        db.query("SELECT pg_sleep(0.6)")
        assert not records("block.slow")
    (record,) = records("block.slow")
    assert record.seconds >= 0.59  # the server wakes up a little early
    assert record.statement == "SELECT pg_sleep(0.6)"
    assert Connection.status().groups["auto"].slow_blocks == 1


# Histograms and counters.


def test_a_histogram_counts_each_duration_in_its_bucket() -> None:
    tally = Tally()
    durations = [0.0, 1e-6, BUCKETS[0] * 0.99, BUCKETS[0] * 1.01, 0.001, 0.3, 1.0, 66.0, 68.0, 1e6]
    for seconds in durations:
        tally.add(seconds)
    histogram = Histogram.of([tally])
    assert histogram.count == len(durations)
    assert histogram.sum == pytest.approx(sum(durations))
    for at, bound in enumerate(BUCKETS):
        assert sum(histogram.counts[: at + 1]) == sum(seconds <= bound for seconds in durations)
    assert histogram.counts[-1] == 2
    assert Histogram.of([tally, tally], 5).count == 2 * len(durations) + 5


def test_many_threads_lose_no_duration() -> None:
    tally = Tally()

    def add() -> None:
        for _ in range(20 * BATCH):
            tally.add(0.001)
            if not len(tally.recent) % 50:
                tally.read()

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    histogram = Histogram.of([tally])
    assert histogram.count == 80 * BATCH
    assert histogram.sum == pytest.approx(0.08 * BATCH)
    assert len(tally.recent) == 0


@SURVIVES_INTERRUPTIONS
def test_an_interruption_while_counting_does_not_end_it() -> None:
    tally, point = Tally(), 1
    while interrupt_at(point, tally.count):
        tally.add(0.001)
        tally.count()
        assert not tally.recent, point
        point += 1
    assert point > 10


def test_a_quantile_is_the_end_of_its_bucket() -> None:
    assert Histogram.of([]).quantile(0.5) is None
    tally = Tally()
    for _ in range(99):
        tally.add(0.001)
    tally.add(10.0)
    histogram = Histogram.of([tally])
    assert histogram.quantile(0.5) == 0.001024
    assert histogram.quantile(1.0) == pytest.approx(16.777216)


def test_the_status_has_how_long_blocks_took(start: Any) -> None:
    start()
    for _ in range(5):
        with Handler("auto") as db:
            db.query("SELECT 1")
    with Handler("auto") as db:
        db.query("SELECT pg_sleep(0.1)")
    status = Connection.status()
    group = status.groups["auto"]
    (label,) = status.endpoints
    use = group.use[label]
    assert use.count == group.checkouts == 6
    assert use.sum >= 0.1
    assert sum(use.counts[BUCKETS.index(0.131072) :]) >= 1
    assert group.connect[label].count == group.opened == 1
    assert group.connect[label].sum > 0
    assert group.wait.count == 6
    assert group.waits == 0
    endpoint = status.endpoints[label]
    assert endpoint.use.count == 6
    assert endpoint.connect.count == sum(g.opened for g in status.groups.values())
    json.dumps(status.to_dict())


@pytest.mark.slow
def test_a_wait_is_counted_apart_from_the_use(known_cluster: Any) -> None:
    Connection.init(config([known_cluster.primary], auto={"connection_count": 1}))
    try:
        inside = threading.Event()

        def hold() -> None:
            with Handler("auto") as db:
                inside.set()
                wait_for(lambda: Connection.status().groups["auto"].waiting == 1)
                db.query("SELECT pg_sleep(1)")

        thread = threading.Thread(target=hold)
        thread.start()
        assert inside.wait(10)
        with Handler("auto"):
            (holder,) = Connection.status().groups["auto"].holders
            assert " for 0." in holder  # not since it began to wait
        thread.join(10)
        group = Connection.status().groups["auto"]
        assert group.waits == 1
        assert group.wait.sum >= 1
        assert group.wait.count == group.checkouts == 2
    finally:
        Connection.reset()


def test_errors_are_counted(start: Any, known_cluster: Any, records: Any) -> None:
    start(rate_limit={"per_second": 0.001, "burst": 3, "max_wait": 0})
    with Handler("manual") as db:
        pid = db.fetchval("SELECT pg_backend_pid()")
        db.rollback()
        with known_cluster.primary.connect() as admin:
            kill_backends(admin, pid)
        assert db.fetchval("SELECT pg_backend_pid()") != pid
    with pytest.raises(PoolTimeout), Handler("auto"), Handler("auto", timeout=0.01):
        pass
    with pytest.raises(RateLimitExceeded):
        for _ in range(2):
            with Handler("auto"):
                pass
    groups = Connection.status().groups
    assert groups["auto"].timeouts == 1
    assert groups["auto"].rate_limited == 1
    assert groups["manual"].discarded == {"lost": 1}
    assert groups["manual"].retries == 1
    (record,) = records("statement.retried")
    assert record.group == "manual"
    assert record.reason


def test_retries_are_counted(counted: Any, records: Any, known_cluster: Any) -> None:
    counted()
    lost = []

    def work(db: Handler) -> None:
        db.query("SELECT 1")
        if not lost:
            lost.append(pid_of(db))
            with known_cluster.primary.connect() as admin:
                kill_backends(admin, *lost)
        db.query("SELECT 2")

    with correlation("mine"):
        pgdbpool.run("manual", work)
    assert Connection.status().groups["manual"].retries == 1
    (record,) = records("run.retried")
    assert (record.group, record.attempt, record.correlation_id) == ("manual", 1, "mine")
    assert record.reason


@pytest.mark.slow
def test_a_promotion_is_counted_as_a_failover(known_cluster: Any, records: Any, mode: str) -> None:
    primary, standby = known_cluster.nodes[:2]
    nodes = [server(primary, label="one"), server(standby, label="two")]
    Connection.init(config(nodes, mode, write={"target": "primary", "connection_count": 1}))
    try:

        def known() -> bool:
            with Handler("write") as db:
                assert db.endpoint == "one"
            return Connection.status().endpoints["two"].role == "standby"

        wait_for(known)
        primary.stop()
        standby.promote()

        def writes() -> bool:
            try:
                with Handler("write", timeout=1) as db:
                    return db.endpoint == "two"
            except psycopg.Error:
                return False

        wait_for(writes, timeout=30)
        status = Connection.status()
        assert status.endpoints["two"].failovers == 1
        assert status.endpoints["one"].failovers == 0
        assert status.groups["write"].failovers == 1
        (record,) = [r for r in records("endpoint.role") if r.endpoint == "two"]
        assert (record.role, record.previous) == ("primary", "standby")
        (down,) = [r for r in records("endpoint.down") if r.endpoint == "one"]
        assert down.reason
        Connection.remove_endpoint("two")
        assert Connection.status().groups["write"].failovers == 1  # a counter never falls
    finally:
        Connection.reset()

"""What a block promises, in both modes and on each PostgreSQL version at hand."""

from __future__ import annotations

import gc
import json
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from support import config, kill_backends, pid_of, pools_backends, server, wait_for

import pgdbpool
from pgdbpool import Connection, Handler
from pgdbpool.cluster import Cluster

SYSTEM_15 = Path("/usr/lib/postgresql/15/bin")
OLDER = [16, *([15] if SYSTEM_15.is_dir() else [])]
VERSIONS = [18, *(pytest.param(version, marks=pytest.mark.slow) for version in OLDER)]


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: f"pg{version}")
def node(request: pytest.FixtureRequest) -> Iterator[Any]:
    where = {"bin_dir": str(SYSTEM_15)} if request.param == 15 else {"version": request.param}
    with Cluster(standbys=0, **where) as cluster:
        yield cluster.primary


@pytest.fixture
def admin(node: Any) -> Iterator[psycopg.Connection[Any]]:
    """A connection beside the pools, with the table `t` empty."""
    with node.connect() as conn:
        kill_backends(conn)
        conn.execute(
            "DROP SCHEMA public CASCADE; CREATE SCHEMA public; CREATE TABLE t (i int PRIMARY KEY, v text)"
        )
        yield conn


@pytest.fixture
def start(node: Any, mode: str, admin: Any) -> Iterator[Callable[..., None]]:
    """Initialise the pools: groups `auto` and `manual` of two connections, with changes."""

    def init(entry: dict[str, Any] | None = None, **changes: Any) -> None:
        auto = {"connection_count": 2, **changes}
        manual = {**auto, "autocommit": False}
        Connection.init(config([server(node, **(entry or {}))], mode, auto=auto, manual=manual))

    yield init
    Connection.reset()


def values(admin: psycopg.Connection[Any]) -> list[int]:
    return [row[0] for row in admin.execute("SELECT i FROM t ORDER BY i")]


# Lending.


@pytest.mark.slow
def test_blocks_take_turns_on_the_idle_connections(start: Any) -> None:
    start(connection_count=5)
    seen = []
    for _ in range(10):
        with Handler("auto") as db:
            seen.append(pid_of(db))
    assert len(set(seen)) == 5
    assert seen[:5] == seen[5:]


def test_an_unknown_group_is_refused_with_the_known_names(start: Any) -> None:
    start()
    with pytest.raises(pgdbpool.UnconfiguredGroupError, match=r"'nope'.*'auto', 'manual'"):
        Handler("nope")


def test_a_nested_block_on_an_exhausted_pool_says_who_holds_it(start: Any) -> None:
    start(timeout=30)
    began = time.monotonic()
    with Handler("auto"), Handler("auto"):
        with pytest.raises(pgdbpool.PoolTimeout) as caught:
            Handler("auto").__enter__()
    assert "test_contract.py" in str(caught.value)
    assert "MainThread" in str(caught.value)
    assert caught.value.in_use == 2
    assert len(caught.value.holders) == 2
    assert time.monotonic() - began < 10  # nobody else could release one, so there is no wait
    with Handler("auto") as db:
        assert db.query("SELECT 1").fetchone()[0] == 1


def test_a_handler_opens_one_block(start: Any) -> None:
    start()
    handler = Handler("auto")
    with handler:
        pass
    with pytest.raises(pgdbpool.BlockClosedError, match="another Handler"):
        handler.__enter__()


def test_nothing_of_a_block_works_after_it(start: Any) -> None:
    start()
    with Handler("auto") as db:
        cursor = db.query("SELECT 1")
        fresh = db.connection.cursor()
        connection = db.connection
    for use in (
        lambda: db.query("SELECT 1"),
        db.commit,
        db.rollback,
        lambda: db.connection,
        lambda: db.conn_ref,
        lambda: db.endpoint,
        lambda: db.query_prepared([1]),
        lambda: connection.execute("SELECT 1"),
        lambda: fresh.execute("SELECT 1"),
        cursor.fetchone,
        cursor.fetchall,
        lambda: list(cursor),
        lambda: connection.transaction().__enter__(),
        lambda: connection.pipeline().__enter__(),
    ):
        with pytest.raises(psycopg.InterfaceError):
            use()


def test_a_handler_that_is_dropped_gives_its_connection_back_and_warns(start: Any) -> None:
    start(connection_count=1)
    handler = Handler("auto").__enter__()
    handler.query("SELECT 1")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del handler
        gc.collect()
    assert any("dropped without" in str(w.message) for w in caught)
    with Handler("auto", timeout=5) as db:
        assert db.query("SELECT 1").fetchone()[0] == 1


def test_a_handler_that_is_dropped_after_a_failure_gives_its_connection_back(start: Any) -> None:
    start(connection_count=1)

    def fail() -> None:
        handler = Handler("manual").__enter__()
        with pytest.raises(psycopg.errors.DivisionByZero):
            handler.query("SELECT 1 / 0")  # which leads to the handler by its traceback
        del handler
        gc.collect()

    with pytest.warns(ResourceWarning, match="dropped without"):
        fail()
    with Handler("manual", timeout=5) as db:
        assert db.query("SELECT 1").fetchone()[0] == 1


def test_a_connection_that_its_block_closes_is_replaced(start: Any) -> None:
    start(connection_count=1)
    with Handler("auto") as db:
        pids = [pid_of(db)]
        db.connection.close()
    with Handler("auto", timeout=5) as db:
        pids.append(pid_of(db))
        db.connection.close()
        pids.append(db.query("SELECT pg_backend_pid()").fetchone()[0])  # nothing was lost: it goes on
    assert len(set(pids)) == 3
    assert Connection.status().groups["auto"].discarded == {"lost": 2}


def test_a_transaction_whose_block_closes_its_connection_is_not_committed_by_halves(
    start: Any, admin: Any
) -> None:
    start(connection_count=1)
    for group in ("manual", "auto"):
        with pytest.raises(pgdbpool.TransactionAbortedError), Handler(group) as db, db.transaction():
            db.query("INSERT INTO t VALUES (1)")
            db.connection.close()
            with pytest.raises(pgdbpool.TransactionAbortedError):
                db.query("INSERT INTO t VALUES (2)")
    with pytest.raises(pgdbpool.TransactionAbortedError), Handler("manual") as db:
        db.query("INSERT INTO t VALUES (3)")
        db.connection.close()
    with Handler("manual", timeout=5) as db:
        db.query("INSERT INTO t VALUES (4)")
        db.rollback()
        db.connection.close()  # after a rollback it may
        db.query("INSERT INTO t VALUES (5)")
    assert values(admin) == [5]


def test_status_reports_connections_in_use(start: Any, mode: str) -> None:
    start()
    with Handler("auto"):
        status = Connection.status()
        group = status.groups["auto"]
        assert (group.in_use, group.idle, group.size, group.min_size, group.max_size) == (1, 1, 2, 2, 2)
        assert "test_status_reports" in group.holders[0]
    (endpoint,) = status.endpoints.values()
    assert (endpoint.state, endpoint.role, endpoint.connections) == ("up", "primary", 4)
    assert json.loads(json.dumps(status.to_dict()))["groups"]["auto"]["in_use"] == 1
    assert Connection.get_threading_model() == mode
    assert Connection.get_max_pool_size("auto") == 2


# Statements and transactions.


def test_rows_answer_to_index_and_name(start: Any) -> None:
    start()
    with Handler("auto") as db:
        row = db.query("SELECT 1 AS one, 'x' AS letter").fetchone()
        assert (row[0], row["letter"], row[-1], row[0:2]) == (1, "x", "x", (1, "x"))
        assert dict(row) == {"one": 1, "letter": "x"}
        assert "one" in row
        assert "two" not in row
        assert row.get("two", 2) == 2
        one, letter = row
        assert (one, letter) == (1, "x")
        assert pickle.loads(pickle.dumps(row)) == row
        with pytest.raises(KeyError, match="the columns are one, letter"):
            row["two"]


def test_autocommit_is_seen_by_others_at_once(start: Any, admin: Any) -> None:
    start()
    with Handler("auto") as db:
        db.query("INSERT INTO t VALUES (1)")
        assert values(admin) == [1]


def test_a_manual_block_is_seen_when_it_commits(start: Any, admin: Any) -> None:
    start()
    with Handler("manual") as db:
        db.query("INSERT INTO t VALUES (%s)", (1,))
        assert values(admin) == []
        db.commit()
        assert values(admin) == [1]
        db.query("INSERT INTO t VALUES (2)")
        db.rollback()
        db.query("INSERT INTO t VALUES (3)")
        assert values(admin) == [1]
    assert values(admin) == [1, 3]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_rolls_a_manual_block_back(start: Any, admin: Any, error: type[BaseException]) -> None:
    start()
    with pytest.raises(error), Handler("manual") as db:
        db.query("INSERT INTO t VALUES (1)")
        raise error
    assert values(admin) == []
    assert Connection.status().groups["manual"].idle == 2


def test_a_swallowed_failure_raises_at_the_end_of_the_block(start: Any, admin: Any) -> None:
    start()
    with pytest.raises(pgdbpool.TransactionAbortedError) as caught:
        with Handler("manual") as db:
            db.query("INSERT INTO t VALUES (1)")
            with pytest.raises(pgdbpool.DBQueryError):
                db.query("INSERT INTO t VALUES (1)")
    assert isinstance(caught.value.__cause__, psycopg.errors.UniqueViolation)
    assert values(admin) == []


def test_commit_of_a_failed_transaction_raises(start: Any, admin: Any) -> None:
    start()
    with Handler("manual") as db:
        with pytest.raises(psycopg.errors.DivisionByZero):
            db.query("SELECT 1 / 0")
        with pytest.raises(pgdbpool.TransactionAbortedError):
            db.commit()
        db.query("INSERT INTO t VALUES (1)")  # the next transaction of the block
    assert values(admin) == [1]


def test_a_failed_commit_is_raised(start: Any, admin: Any) -> None:
    start()
    admin.execute("CREATE TABLE child (i int REFERENCES t (i) DEFERRABLE INITIALLY DEFERRED)")
    with pytest.raises(psycopg.errors.ForeignKeyViolation) as at_exit:
        with Handler("manual") as db:
            db.query("INSERT INTO child VALUES (9)")
    assert isinstance(at_exit.value, pgdbpool.DBQueryError)
    with Handler("manual") as db:
        db.query("INSERT INTO child VALUES (9)")
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            db.commit()
    assert admin.execute("SELECT count(*) FROM child").fetchone()[0] == 0


def test_an_error_is_both_dbqueryerror_and_psycopgs_own(start: Any) -> None:
    start()
    with Handler("auto") as db:
        db.query("INSERT INTO t VALUES (1)")
        with pytest.raises(psycopg.errors.UniqueViolation) as caught:
            db.query("INSERT INTO t VALUES (1)")
        error = caught.value
        assert isinstance(error, pgdbpool.DBQueryError)
        assert error.sqlstate == "23505"
        assert error.diag.constraint_name == "t_pkey"
        copy = pickle.loads(pickle.dumps(error))
        assert isinstance(copy, pgdbpool.DBQueryError)
        assert isinstance(copy, psycopg.errors.UniqueViolation)
        assert copy.diag.constraint_name == "t_pkey"
        assert db.query("SELECT 1").fetchone()[0] == 1  # the session is known again


def test_the_parameters_own_errors_are_query_errors_too(start: Any) -> None:
    start()
    for group in ("auto", "manual"):
        with Handler(group) as db:
            with pytest.raises(pgdbpool.DBQueryError):
                db.query("SELECT %s, %s", (1,))
            with pytest.raises(pgdbpool.DBQueryError):
                db.query("SELECT %s", (object(),))
            assert db.query("SELECT 1").fetchone()[0] == 1


@pytest.mark.parametrize("group", ["auto", "manual"])
def test_several_statements_in_one_string(start: Any, admin: Any, group: str) -> None:
    start()
    with Handler(group) as db:
        db.query("INSERT INTO t VALUES (1); INSERT INTO t VALUES (2, 'a;b');")
        db.query("INSERT INTO t VALUES (%s, %s); INSERT INTO t VALUES (%s, 'x')", (3, "c'; --", 4))
        cursor = db.query("SELECT 1; SELECT 2")
        assert [r.fetchone()[0] for r in cursor.results()] == [1, 2]
    assert values(admin) == [1, 2, 3, 4]
    assert admin.execute("SELECT v FROM t WHERE i = 3").fetchone()[0] == "c'; --"


def test_empty_parameters_count_as_none(start: Any) -> None:
    start()
    for empty in (None, (), [], {}):
        with Handler("auto") as db:
            assert db.query("SELECT 'a' LIKE 'a%'", empty).fetchone()[0] is True


@pytest.mark.parametrize("group", ["auto", "manual"])
def test_copy_named_cursors_executemany_stream_and_pipelines(start: Any, admin: Any, group: str) -> None:
    start()
    with Handler(group) as db:
        with db.connection.cursor().copy("COPY t FROM STDIN") as copy:
            for i in range(10):
                copy.write_row((i, "x"))
    with Handler(group) as db:
        cursor = db.connection.cursor()
        cursor.executemany("INSERT INTO t VALUES (%s)", [(i,) for i in range(10, 20)])
    with Handler(group) as db:
        with db.connection.pipeline():
            db.query("INSERT INTO t VALUES (20)")
            db.query("INSERT INTO t VALUES (21)")
    assert values(admin) == list(range(22))
    with Handler(group) as db:
        assert [row[0] for row in db.connection.cursor().stream("SELECT i FROM t ORDER BY i")] == list(
            range(22)
        )
    with Handler("manual") as db, db.connection.cursor("named") as named:
        named.execute("SELECT i FROM t ORDER BY i")
        assert [row["i"] for row in named] == list(range(22))


def test_a_statement_that_is_copy_gets_psycopgs_own_error(start: Any) -> None:
    start()
    for group in ("auto", "manual"):
        with Handler(group) as db:
            with pytest.raises(psycopg.ProgrammingError, match="use copy"):
                db.query("/* a */ copy t TO STDOUT")
            db.rollback()
            assert db.query("SELECT 1").fetchone()[0] == 1


def test_transactions_and_savepoints(start: Any, admin: Any) -> None:
    start()
    with Handler("auto") as db:
        with db.transaction():
            db.query("INSERT INTO t VALUES (1)")
            with pytest.raises(psycopg.errors.UniqueViolation), db.transaction():
                db.query("INSERT INTO t VALUES (2)")
                db.query("INSERT INTO t VALUES (1)")
            assert values(admin) == []
        assert values(admin) == [1]
    with pytest.raises(ValueError, match="away"), Handler("manual") as db:
        with db.transaction():
            db.query("INSERT INTO t VALUES (3)")
        assert values(admin) == [1]  # a savepoint of the block's transaction
        raise ValueError("away")
    assert values(admin) == [1]


def test_the_connection_itself_takes_part_in_the_block(start: Any, admin: Any) -> None:
    start()
    with pytest.raises(ValueError, match="away"), Handler("manual") as db:
        db.connection.execute("INSERT INTO t VALUES (1)")
        raise ValueError("away")
    assert values(admin) == []
    with Handler("manual") as db:
        db.conn_ref.cursor().execute("INSERT INTO t VALUES (1)")
        assert values(admin) == []
        db.conn_ref.commit()
        assert values(admin) == [1]
        db.conn_ref.cursor().execute("INSERT INTO t VALUES (2)")
        db.conn_ref.rollback()
    assert values(admin) == [1]


def test_a_cursor_executed_again_is_in_the_transaction_again(start: Any, admin: Any) -> None:
    start()
    with pytest.raises(ValueError, match="away"), Handler("manual") as db:
        cursor = db.query("INSERT INTO t VALUES (1)")
        db.commit()
        cursor.execute("INSERT INTO t VALUES (2)")
        raise ValueError("away")
    assert values(admin) == [1]


def test_statements_are_prepared_by_themselves_also_when_they_ride(start: Any, admin: Any) -> None:
    start(connection_count=1, prepare_threshold=2)
    for i in range(6):
        with Handler("manual") as db:
            assert db.query("SELECT %s::int", (i,)).fetchone()[0] == i
    with Handler("manual") as db:
        assert db.query("SELECT count(*) FROM pg_prepared_statements").fetchone()[0] >= 1
    for _ in range(4):  # the third is prepared while it fails: what failed is not taken for prepared
        with pytest.raises(psycopg.errors.DivisionByZero), Handler("manual") as db:
            db.query("SELECT 1 / %s::int", (0,))
    with Handler("manual") as db:
        assert db.query("SELECT 1 / %s::int", (1,)).fetchone()[0] == 1


def test_composed_bytes_and_binary_statements_ride(start: Any, admin: Any) -> None:
    start()
    with Handler("manual") as db:
        db.query(sql.SQL("INSERT INTO {} VALUES (%s)").format(sql.Identifier("t")), (1,))
    with Handler("manual") as db:
        db.query(b"INSERT INTO t VALUES (2)")
    with Handler("manual") as db:
        cursor = db.connection.cursor(binary=True)
        assert cursor.execute("SELECT i FROM t WHERE i = %b", (2,)).fetchone()[0] == 2
    with Handler("manual") as db:
        assert db.query("INSERT INTO t VALUES (3), (4) RETURNING i").fetchall() == [(3,), (4,)]
        assert db.query("DELETE FROM t").rowcount == 4
    with Handler("manual") as db:
        big = "x" * 3_000_000
        assert db.query("SELECT %s || ''", (big,)).fetchone()[0] == big


def test_a_slow_statement_is_cancelled_and_the_connection_lives_on(start: Any) -> None:
    start({"query_timeout": 100})
    for group in ("auto", "manual"):
        with pytest.raises(psycopg.errors.QueryCanceled), Handler(group) as db:
            pid = pid_of(db)
            db.query("SELECT pg_sleep(5)")
        pids = set()
        for _ in range(2):
            with Handler(group) as db:
                pids.add(pid_of(db))
        assert pid in pids


@pytest.mark.slow
@pytest.mark.parametrize("set_it", ["SET", "SET LOCAL"])
def test_a_statement_timeout_of_the_block_itself_is_the_clients_as_well(start: Any, set_it: str) -> None:
    start({"query_timeout": 100})
    with Handler("manual") as db:
        db.query(f"{set_it} statement_timeout = '10s'")
        db.query("SELECT pg_sleep(1.3)")  # longer than query_timeout and the client's second of grace
    with pytest.raises(psycopg.errors.QueryCanceled), Handler("manual") as db:
        db.query("SELECT pg_sleep(5)")


def test_settings_of_the_configuration_are_the_sessions_own(start: Any, node: Any) -> None:
    before = os.environ.get("PGOPTIONS")
    start({"session_tmp_buffer": 16, "options": {"work_mem": "7MB", "search_path": '"a b", public'}})
    with Handler("auto") as db:
        shown = [
            db.query(f"SHOW {name}").fetchone()[0] for name in ("temp_buffers", "work_mem", "search_path")
        ]
    assert shown == ["16MB", "7MB", '"a b", public']
    assert os.environ.get("PGOPTIONS") == before


def test_row_factories_of_psycopg(start: Any) -> None:
    for name, expected in (("tuple", (1,)), ("dict", {"a": 1})):
        start(row_factory=name)
        with Handler("auto") as db:
            assert db.query("SELECT 1 AS a").fetchone() == expected


def test_sqlprepare_is_called_on_connect_and_by_query_prepared(start: Any, admin: Any) -> None:
    admin.execute("""
        DROP SCHEMA IF EXISTS "SQLPrepare" CASCADE;
        CREATE SCHEMA "SQLPrepare";
        CREATE FUNCTION "SQLPrepare"."PrepareQueries"() RETURNS void LANGUAGE plpgsql AS $$
        BEGIN EXECUTE 'PREPARE add_one (int) AS SELECT $1 + 1'; END $$;
        CREATE FUNCTION "SQLPrepare"."ExecuteQuery"(name text, n int) RETURNS int LANGUAGE plpgsql AS $$
        DECLARE r int; BEGIN EXECUTE format('EXECUTE %I (%s)', name, n) INTO r; RETURN r; END $$;
    """)
    start(sqlprepare=True)
    for group in ("auto", "manual"):
        with Handler(group) as db:
            assert db.query_prepared(["add_one", 41]) == 42
            with pytest.raises(pgdbpool.DBQueryError):
                db.query_prepared(["no_such", 1])
            db.rollback()


# Lost connections.


def test_twenty_killed_connections_cost_no_error(start: Any, admin: Any) -> None:
    start(connection_count=20)
    kill_backends(admin)
    began = time.monotonic()
    for i in range(25):
        with Handler("auto") as db:
            assert db.query("SELECT 1").fetchone()[0] == 1
        if i == 0:
            first = time.monotonic() - began
    print(f"first success {first * 1000:.1f} ms after 20 connections were killed")
    assert Connection.status().groups["auto"].discarded["lost"] >= 20
    assert first < 1  # it is a few ms; a sleep would be 1 s and more


def test_a_connection_lost_in_an_autocommit_block_raises_once(start: Any, admin: Any) -> None:
    start()
    with Handler("auto") as db:
        kill_backends(admin, pid_of(db))
        with pytest.raises(pgdbpool.ConnectionLostError) as caught:
            db.query("INSERT INTO t VALUES (1)")
        assert caught.value.maybe_executed
        assert isinstance(caught.value, psycopg.OperationalError)
        db.query("INSERT INTO t VALUES (2)")
    assert values(admin) == [2]
    wait_for(lambda: Connection.status().groups["auto"].in_use == 0)


def test_a_transaction_lost_with_its_connection_is_never_committed_by_halves(start: Any, admin: Any) -> None:
    start()
    with pytest.raises(pgdbpool.TransactionAbortedError):
        with Handler("manual") as db:
            db.query("INSERT INTO t VALUES (1)")
            kill_backends(admin, pid_of(db))
            with pytest.raises(pgdbpool.ConnectionLostError) as caught:
                db.query("INSERT INTO t VALUES (2)")
            assert not caught.value.maybe_executed
            for use in (lambda: db.query("INSERT INTO t VALUES (3)"), db.commit, lambda: db.connection):
                with pytest.raises(pgdbpool.TransactionAbortedError):
                    use()
    assert values(admin) == []
    with Handler("manual") as db:
        db.query("INSERT INTO t VALUES (1)")
        kill_backends(admin, pid_of(db))
        with pytest.raises(pgdbpool.ConnectionLostError):
            db.query("INSERT INTO t VALUES (2)")
        db.rollback()
        db.query("INSERT INTO t VALUES (4)")
    assert values(admin) == [4]


@pytest.mark.parametrize("by", ["Handler", "connection", "getconn"])
@pytest.mark.parametrize("group", ["auto", "manual"])
def test_after_a_loss_in_an_inner_transaction_nothing_takes_effect_in_the_outer_one(
    start: Any, admin: Any, group: str, by: str
) -> None:
    start()
    with ExitStack() as stack:
        db: Any = stack.enter_context(Handler(group)) if by != "getconn" else Connection.getconn(group)
        conn = db if by == "Handler" else db.connection if by == "connection" else db
        if by == "getconn":
            stack.callback(db.close)
        with pytest.raises(pgdbpool.TransactionAbortedError), conn.transaction():
            with suppress(KeyError), conn.transaction():
                conn.execute("INSERT INTO t VALUES (1)")
                kill_backends(admin, (conn if by == "getconn" else db.connection).info.backend_pid)
                raise KeyError  # psycopg only logs that it cannot roll back
            with pytest.raises(pgdbpool.DBQueryError):
                db.execute("INSERT INTO t VALUES (2)")
            with pytest.raises(pgdbpool.Error), conn.transaction():
                pass
            with pytest.raises(psycopg.ProgrammingError, match="leave its `with"):
                db.rollback()
            with pytest.raises(pgdbpool.DBQueryError):
                db.execute("INSERT INTO t VALUES (3)")
        assert values(admin) == []
        if by == "getconn" or group == "manual":
            db.rollback()
        db.execute("INSERT INTO t VALUES (4)")
        db.commit()
    assert values(admin) == [4]


def test_a_transaction_context_lost_in_an_autocommit_block(start: Any, admin: Any) -> None:
    start()
    with Handler("auto") as db:
        with pytest.raises(pgdbpool.DBQueryError), db.transaction():
            db.query("INSERT INTO t VALUES (1)")
            kill_backends(admin, pid_of(db))
            with pytest.raises(pgdbpool.ConnectionLostError):
                db.query("INSERT INTO t VALUES (2)")
            db.query("INSERT INTO t VALUES (3)")
        db.query("INSERT INTO t VALUES (4)")
    assert values(admin) == [4]


def test_the_first_statement_of_a_transaction_is_sent_again(start: Any, admin: Any) -> None:
    start()

    def backend(db: Handler) -> int:
        return int(db.query("SELECT pg_backend_pid()").fetchone()[0])

    with Handler("manual") as db:
        lost = backend(db)
        db.rollback()
        kill_backends(admin, lost)
        db.query("INSERT INTO t VALUES (%s)", (1,))
        again = backend(db)
        assert again != lost
        db.commit()
        kill_backends(admin, again)
        db.query("INSERT INTO t VALUES (2)")
    assert values(admin) == [1, 2]
    with pytest.raises(pgdbpool.ConnectionLostError), Handler("manual") as db:
        db.query("SELECT pg_advisory_lock(1)")
        db.commit()
        kill_backends(
            admin, admin.execute("SELECT pid FROM pg_locks WHERE locktype = 'advisory'").fetchone()[0]
        )
        db.query("INSERT INTO t VALUES (3)")  # not again: the block's lock is gone with the session
    assert values(admin) == [1, 2]


def test_a_lost_commit_says_that_it_may_have_committed(start: Any, admin: Any) -> None:
    start()
    for end in ("exit", "commit"):
        with pytest.raises(pgdbpool.ConnectionLostError) as caught:
            with Handler("manual") as db:
                db.query("INSERT INTO t VALUES (1)")
                kill_backends(admin, pid_of(db))
                if end == "commit":
                    db.commit()
        assert caught.value.maybe_committed
    assert values(admin) == []


@pytest.mark.slow
def test_an_interrupted_statement_leaves_the_counts_exact(start: Any, mode: str) -> None:
    start({"query_timeout": 0})

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for group in ("auto", "manual"):
            for _ in range(3):
                with pytest.raises(KeyboardInterrupt), Handler(group) as db:
                    signal.setitimer(signal.ITIMER_REAL, 0.05)
                    db.query("SELECT pg_sleep(30)")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    for group in ("auto", "manual"):
        with Handler(group) as one, Handler(group) as two:
            assert one.query("SELECT 1").fetchone()[0] == two.query("SELECT 1").fetchone()[0]
        status = Connection.status().groups[group]
        assert (status.in_use, status.idle, status.size) == (0, 2, 2)


# Upkeep.


def test_a_connection_is_replaced_after_its_lifetime(start: Any) -> None:
    start(connection_count=1, max_lifetime=0.2)
    with Handler("auto") as db:
        first = pid_of(db)
    wait_for(lambda: Connection.group("auto")._pool.idle == 1)

    def another() -> bool:
        with Handler("auto") as db:
            return pid_of(db) != first

    wait_for(another, 5)
    assert Connection.status().groups["auto"].discarded["expired"] >= 1


@pytest.mark.slow
def test_connections_above_min_size_are_closed_when_idle(start: Any, mode: str) -> None:
    start(connection_count=3, min_size=1, max_idle=0.2)
    with Handler("auto"), Handler("auto"), Handler("auto"):
        assert Connection.status().groups["auto"].size == 3

    def shrunk() -> bool:
        with Handler("auto"):
            pass
        return Connection.status().groups["auto"].size == 1

    wait_for(shrunk, 5)


def test_close_ends_the_sessions_and_blocks_in_use_end_theirs(start: Any, admin: Any) -> None:
    start()
    with Handler("auto") as db:
        Connection.close()
        wait_for(lambda: pools_backends(admin) == 1)
        assert db.query("SELECT 1").fetchone()[0] == 1
    wait_for(lambda: pools_backends(admin) == 0)
    with pytest.raises(pgdbpool.NotInitializedError):
        Handler("auto")


def test_a_second_init_replaces_the_first(start: Any, admin: Any) -> None:
    start()
    start(connection_count=1)
    wait_for(lambda: pools_backends(admin) == 2)
    with Handler("auto") as db:
        assert db.query("SELECT 1").fetchone()[0] == 1


def test_a_failing_init_leaves_the_first_in_place(start: Any, node: Any, mode: str) -> None:
    start()
    with pytest.raises(pgdbpool.DBConnectionError):
        Connection.init(config([server(node, name="no_such_database")], mode, auto={"connection_count": 1}))
    with pytest.raises(pgdbpool.ConfigError):
        Connection.init({"db": {}, "groups": {}})
    with Handler("auto") as db:
        assert db.query("SELECT 1").fetchone()[0] == 1


def test_init_without_wait_connects_on_first_use(node: Any, mode: str, admin: Any) -> None:
    try:
        Connection.init(config([node], mode, auto={"connection_count": 2}), wait=False)
        assert pools_backends(admin) == 0
        with Handler("auto") as db:
            assert db.query("SELECT 1").fetchone()[0] == 1
    finally:
        Connection.reset()


def test_a_forked_child_has_its_own_connections(start: Any, admin: Any) -> None:
    start()
    with Handler("auto") as db:
        parents = pid_of(db)
        db.query("CREATE TEMPORARY TABLE mine (i int)")
        child = os.fork()
        if child == 0:  # pragma: no cover  (in the child)
            code = 1
            try:
                with pytest.raises(psycopg.InterfaceError):
                    db.query("SELECT 1")
                pids = []
                for _ in range(4):
                    with Handler("auto") as own:
                        pids.append(own.query("SELECT pg_backend_pid()").fetchone()[0])
                code = 2 if parents in pids else 0
                db.__exit__(None, None, None)
                gc.collect()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert pid_of(db) == parents
        assert db.query("SELECT count(*) FROM mine").fetchone()[0] == 0
    with Handler("auto") as one, Handler("auto") as two:
        assert parents in (pid_of(one), pid_of(two))


def test_lock_free_starts_no_thread_and_threaded_a_fixed_number(start: Any, mode: str) -> None:
    before = threading.active_count()
    start()
    for group in ("auto", "manual"):
        with Handler(group):
            pass
    added = threading.active_count() - before
    assert added == (0 if mode == "non-threaded" else 4)  # a worker and a scheduler for each group


# What a review with fresh eyes found.


@pytest.mark.parametrize("how", ["executemany", "copy", "pipeline", "stream", "raw"])
def test_work_lost_by_any_way_is_never_committed_by_halves(start: Any, admin: Any, how: str) -> None:
    start()

    def lose(db: Handler) -> None:
        kill_backends(admin, db.connection.info.backend_pid)
        cursor = db.connection.cursor()
        if how == "executemany":
            cursor.executemany("INSERT INTO t VALUES (%s)", [(2,), (3,)])
        elif how == "copy":
            with cursor.copy("COPY t FROM STDIN") as copy:
                copy.write_row((2, "x"))
        elif how == "pipeline":
            with db.connection.pipeline():
                cursor.execute("INSERT INTO t VALUES (2)")
        elif how == "stream":
            list(cursor.stream("SELECT 1"))
        else:
            db.connection.execute("INSERT INTO t VALUES (2)")

    with pytest.raises(pgdbpool.TransactionAbortedError):
        with Handler("manual") as db:
            db.query("INSERT INTO t VALUES (1)")
            with pytest.raises(pgdbpool.ConnectionLostError):
                lose(db)
            with pytest.raises(pgdbpool.TransactionAbortedError):
                db.query("INSERT INTO t VALUES (4)")
    assert values(admin) == []


def test_a_failure_swallowed_in_a_transaction_context_raises(start: Any, admin: Any) -> None:
    start()
    with Handler("auto") as db:
        with pytest.raises(pgdbpool.TransactionAbortedError) as caught, db.transaction():
            db.query("INSERT INTO t VALUES (1)")
            with pytest.raises(psycopg.errors.DivisionByZero):
                db.query("SELECT 1 / 0")
        assert isinstance(caught.value.__cause__, psycopg.errors.DivisionByZero)
        db.query("INSERT INTO t VALUES (2)")
    assert values(admin) == [2]


def test_an_error_that_is_kept_keeps_no_slot(start: Any, node: Any, mode: str, admin: Any) -> None:
    kept = []
    Connection.init(
        config([server(node, user="limited")], mode, g={"connection_count": 1, "min_size": 0}), wait=False
    )
    for _ in range(3):
        with pytest.raises(pgdbpool.DBConnectionError) as caught:
            Handler("g").__enter__()
        kept.append(caught.value)
        assert Connection.status().groups["g"].size == 0
    admin.execute("CREATE ROLE limited LOGIN")
    try:
        with Handler("g", timeout=5) as db:
            assert db.query("SELECT 1").fetchone()[0] == 1
    finally:
        Connection.reset()
        admin.execute("DROP ROLE limited")


def test_a_generator_left_open_does_not_lock_the_next_borrower_out(start: Any) -> None:
    start(connection_count=1)
    with Handler("auto") as db:
        pid = pid_of(db)
        notifies = db.connection.notifies(timeout=30)
        db.query("LISTEN here")
        db.query("SELECT pg_notify('here', 'x')")
        assert next(notifies).payload == "x"
    with Handler("auto") as db:  # `notifies` still holds psycopg's lock of the first one
        assert db.query("SELECT 1").fetchone()[0] == 1
        assert pid_of(db) != pid
    del notifies


def test_a_child_cannot_end_its_parents_transaction(start: Any, admin: Any) -> None:
    start()
    with Handler("auto") as db, db.transaction():
        db.query("INSERT INTO t VALUES (1)")
        raw = db.connection
        child = os.fork()
        if child == 0:  # pragma: no cover  (in the child)
            refused = 0
            for use in (raw.commit, raw.rollback, lambda: raw.execute("SELECT 1"), db.commit):
                try:
                    use()
                except psycopg.InterfaceError:
                    refused += 1
            raw.close()
            os._exit(refused)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 4
        db.query("INSERT INTO t VALUES (2)")
        assert values(admin) == []
    assert values(admin) == [1, 2]


def test_a_foreign_servers_connection_error_is_not_our_loss(start: Any) -> None:
    start()
    with Handler("auto") as db:
        pid = pid_of(db)
        with pytest.raises(psycopg.OperationalError) as caught:
            db.query("DO $$ BEGIN RAISE SQLSTATE '08006'; END $$")
        assert not isinstance(caught.value, pgdbpool.ConnectionLostError)
        assert pid_of(db) == pid


def test_a_cursor_that_the_block_did_not_make_cannot_go_round_it(start: Any, admin: Any) -> None:
    start()
    with Handler("manual") as db:
        foreign = psycopg.ClientCursor(db.connection)
        foreign.execute("INSERT INTO t VALUES (1)")
        db.query("INSERT INTO t VALUES (2)")
        foreign.execute("INSERT INTO t VALUES (%s)", (3,))
        assert values(admin) == []
    with pytest.raises(psycopg.InterfaceError):
        foreign.execute("INSERT INTO t VALUES (4)")
    assert values(admin) == [1, 2, 3]


def test_a_commit_in_text_of_a_failed_transaction_raises(start: Any, admin: Any) -> None:
    start()
    with Handler("manual") as db:
        db.query("INSERT INTO t VALUES (1)")
        with pytest.raises(psycopg.errors.DivisionByZero):
            db.query("SELECT 1 / 0")
        with pytest.raises(pgdbpool.TransactionAbortedError):
            db.query("COMMIT")
    assert values(admin) == []


def test_a_statement_inside_an_open_stream_is_refused_instead_of_hanging(start: Any) -> None:
    start()
    with Handler("auto") as db:
        rows = db.connection.cursor().stream("SELECT generate_series(1, 3)")
        next(rows)
        with pytest.raises(psycopg.ProgrammingError, match="still open"):
            db.query("SELECT 1")
        rows.close()

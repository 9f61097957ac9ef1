"""The outcome of a commit that waits for a synchronous standby: cancelled, left, or cut short."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from linecache import getline
from pathlib import Path
from typing import Any

import psycopg
import pytest
from support import Interruption, config, wait_for

import pgdbpool
from pgdbpool import Connection, ConnectionLostError, Handler, NotReplicatedError
from pgdbpool._session.commands import ACTIVE
from pgdbpool._session.exchange import ExchangingConnection
from pgdbpool._session.liveness import LiveConnection
from pgdbpool._session.outcome import may_commit
from pgdbpool.cluster import Cluster, Node

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
INSERT = "INSERT INTO t VALUES (1)"


class Work(threading.Thread):
    """Work in a thread of its own; keeps what it raised."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.work, self.error = work, None
        self.start()

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:  # noqa: BLE001  looked at by the test
            self.error = error

    def waits(self) -> bool:
        """Return whether its thread stands in a line that waits for the server's answer."""
        frame = sys._current_frames().get(self.ident or 0)
        while frame is not None and "wait_readable(" not in getline(frame.f_code.co_filename, frame.f_lineno):
            frame = frame.f_back
        return frame is not None

    def end(self) -> Any:
        self.join(15)
        assert not self.is_alive()
        return self.error


class Primary:
    """A primary whose commits wait for a standby that does not exist, while `lonely`."""

    def __init__(self, node: Node, admin: psycopg.Connection[Any]) -> None:
        self.node = node
        self.admin = admin

    def lonely(self) -> None:
        self.admin.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        self.admin.execute("SELECT pg_reload_conf()")
        probe = Work(self._probe)

        def cancelled() -> bool:
            for pid in self.waiting("probe"):  # a reload of before may let it go, and it waits once more
                self.admin.execute("SELECT pg_cancel_backend(%s)", (pid,))
            return not probe.is_alive()

        wait_for(cancelled)
        assert probe.end() is None

    def _probe(self) -> None:
        """Commit until a commit has waited, and was cancelled: the server takes a moment to reload."""
        told: list[Any] = []
        with psycopg.connect(self.admin.info.dsn, autocommit=True, application_name="probe") as conn:
            conn.add_notice_handler(told.append)
            while not told:
                with suppress(psycopg.errors.QueryCanceled):
                    conn.execute("CREATE TABLE probe (); DROP TABLE probe")

    def waiting(self, name: str = "pgdbpool") -> list[int]:
        """Return the backends that wait for the standby."""
        sql = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name = %s"
        return [pid for (pid,) in self.admin.execute(sql, (name,))]

    def sleeping(self) -> list[int]:
        """Return the backends that sleep in a statement."""
        sql = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        return [pid for (pid,) in self.admin.execute(sql)]

    def cancel(self, name: str = "pgdbpool") -> None:
        """Cancel, as an administrator does, what waits for the standby."""
        for pid in wait_for(lambda: self.waiting(name)):
            self.admin.execute("SELECT pg_cancel_backend(%s)", (pid,))

    @contextmanager
    def cancelling(self) -> Iterator[None]:
        """Cancel what waits while this thread is in the `with` block."""
        work = Work(self.cancel)
        yield
        assert work.end() is None

    def release(self) -> None:
        """Have commits wait for nothing; those that wait go on."""
        self.admin.execute("ALTER SYSTEM RESET synchronous_standby_names")
        self.admin.execute("SELECT pg_reload_conf()")
        wait_for(lambda: self.waiting() == [])

    def rows(self) -> int:
        row = self.admin.execute("SELECT count(*) FROM t").fetchone()
        assert row is not None
        return int(row[0])


@pytest.fixture
def primary(known_cluster: Any) -> Iterator[Primary]:
    with known_cluster.primary.connect(autocommit=True) as admin:
        admin.execute("SET synchronous_commit = local")
        admin.execute("CREATE TABLE t (i int)")
        found = Primary(known_cluster.primary, admin)
        yield found
        found.release()


@pytest.fixture
def start(known_cluster: Any, mode: str) -> Iterator[Callable[..., None]]:
    def init(**changes: Any) -> None:
        group = {"connection_count": 2, "min_size": 1, **changes}
        groups: dict[str, Any] = {"auto": group, "manual": {**group, "autocommit": False}}
        Connection.init(config([known_cluster.primary], mode, **groups))

    yield init
    Connection.reset()


# Each of the ways to commit one row.


def end_of_block() -> None:
    with Handler("manual") as db:
        db.query(INSERT)


def commit() -> None:
    with Handler("manual") as db:
        db.query(INSERT)
        db.commit()


def commit_of_the_connection() -> None:
    with Handler("manual") as db:
        db.query(INSERT)
        db.connection.commit()


def commit_as_text() -> None:
    with Handler("manual") as db:
        db.query(INSERT)
        db.query("COMMIT")


def transaction() -> None:
    with Handler("auto") as db, db.transaction():
        db.query(INSERT)


def statement() -> None:
    with Handler("auto") as db:
        db.query(INSERT)


def statement_with_settings() -> None:
    with Handler("auto", settings={"app.x": "1"}) as db:
        db.query(INSERT)


def wrapped_statement() -> None:
    with Handler("auto", settings={"app.x": "1"}) as db:
        db.query("DO $$BEGIN INSERT INTO t VALUES (1); END$$")


def several_statements() -> None:
    with Handler("auto") as db:
        db.query(f"SELECT 1; {INSERT}; SELECT 2")


def transaction_as_text() -> None:
    with Handler("auto") as db:
        db.query(f"BEGIN; {INSERT}; COMMIT; SELECT 1")


def many() -> None:
    with Handler("auto") as db:
        db.executemany("INSERT INTO t VALUES (%s)", [(1,)])


def copy() -> None:
    with Handler("auto") as db:
        db.copy_records_to_table("t", [(1,)])


def stream() -> None:
    with Handler("auto") as db:
        assert list(db.connection.cursor().stream(INSERT + " RETURNING i")) == [(1,)]


def pipeline() -> None:
    with Handler("auto") as db, db.pipeline():
        db.query(INSERT)
        db.query("SELECT 1")


def pipeline_with_commit() -> None:
    with Handler("manual") as db, db.pipeline():
        db.query(INSERT)
        db.query("COMMIT")
        db.query("SELECT 1")


def one_shot_in_autocommit() -> None:
    Connection.execute("auto", INSERT)


def one_shot() -> None:
    assert Connection.fetchval("manual", INSERT + " RETURNING i") == 1


def one_shot_of_many() -> None:
    Connection.executemany("manual", "INSERT INTO t VALUES (%s)", [(1,)])


def foreign_cursor() -> None:
    with Handler("auto") as db:
        psycopg.ClientCursor(db.connection).execute(INSERT)


WAYS = [
    end_of_block, commit, commit_of_the_connection, commit_as_text, transaction, statement,
    statement_with_settings, wrapped_statement, several_statements, transaction_as_text, many, copy, stream,
    pipeline, pipeline_with_commit, one_shot_in_autocommit, one_shot, one_shot_of_many, foreign_cursor,
]  # fmt: skip


# Cancelled by an administrator.


def test_a_cancelled_commit_has_its_own_error(primary: Primary, start: Any) -> None:
    start()
    primary.lonely()
    for number, way in enumerate(WAYS, 1):
        work = Work(way)
        primary.cancel()
        error = work.end()
        assert isinstance(error, NotReplicatedError), (way, error)
        assert isinstance(error, pgdbpool.ConnectionLostError)
        assert error.maybe_committed
        assert not error.repeatable
        assert "committed on" in str(error)
        assert primary.rows() == number, way
    status = Connection.status().groups
    assert status["auto"].not_replicated + status["manual"].not_replicated == len(WAYS)
    assert (
        status["auto"].discarded == status["manual"].discarded == {}
    )  # the connections are as good as before


def test_a_block_goes_on_after_a_commit_that_was_not_replicated(primary: Primary, start: Any) -> None:
    start()
    primary.lonely()

    def go_on() -> None:
        with Handler("manual") as db:
            db.query(INSERT)
            with pytest.raises(NotReplicatedError):
                db.commit()
            assert db.fetchval("SELECT count(*) FROM t") == 1
        with Handler("auto", settings={"app.x": "1"}) as db:
            with pytest.raises(NotReplicatedError) as caught:
                db.query(INSERT)
            assert caught.value.maybe_executed
            assert db.fetchval("SELECT current_setting('app.x')") == "1"

    work = Work(go_on)
    first = wait_for(primary.waiting)
    primary.cancel()
    wait_for(lambda: [pid for pid in primary.waiting() if pid not in first])
    primary.cancel()
    assert work.end() is None


@pytest.fixture
def two_phase() -> Iterator[Primary]:
    with Cluster(settings={"max_prepared_transactions": 5}) as cluster:
        with cluster.primary.connect(autocommit=True) as admin:
            admin.execute("SET synchronous_commit = local")
            admin.execute("CREATE TABLE t (i int)")
            yield Primary(cluster.primary, admin)


def test_two_phase_commits_have_it_too(two_phase: Primary) -> None:
    group = {"connection_count": 1}
    groups: dict[str, Any] = {"auto": group, "manual": {**group, "autocommit": False}}
    two_phase.lonely()
    for number, mode in enumerate(("threaded", "non-threaded"), 1):
        Connection.init(config([two_phase.node], mode, **groups))
        for name, begin in (("auto", "BEGIN"), ("manual", "SELECT 1")):
            with Handler(name) as db:
                db.query(begin)
                db.query(INSERT)
                with two_phase.cancelling(), pytest.raises(NotReplicatedError):
                    db.query("PREPARE TRANSACTION 'x'")
            with Handler("auto") as db, two_phase.cancelling(), pytest.raises(NotReplicatedError):
                db.query("COMMIT PREPARED 'x'")
        Connection.reset()
        assert two_phase.rows() == 2 * number


def test_a_log_record_is_enough_if_the_group_says_so(primary: Primary, start: Any, caplog: Any) -> None:
    start(not_replicated="warn")
    primary.lonely()
    for number, way in enumerate((end_of_block, statement, statement_with_settings, one_shot), 1):
        work = Work(way)
        primary.cancel()
        assert work.end() is None
        assert primary.rows() == number
    records = [record for record in caplog.records if record.event == "commit.not_replicated"]
    assert [record.group for record in records] == ["manual", "auto", "auto", "manual"]
    assert "INSERT INTO t" in records[0].statement
    status = Connection.status().groups
    assert (status["auto"].not_replicated, status["manual"].not_replicated) == (2, 2)


@pytest.mark.parametrize("group", ["auto", "manual"])
def test_run_never_repeats_committed_work(primary: Primary, start: Any, group: str) -> None:
    start()
    primary.lonely()
    work = Work(lambda: pgdbpool.run(group, lambda db: db.query(INSERT), idempotent=True))
    primary.cancel()
    assert isinstance(work.end(), NotReplicatedError)
    assert primary.rows() == 1


def test_a_warning_of_a_trigger_is_not_taken_for_it(primary: Primary, start: Any) -> None:
    start()
    primary.admin.execute("""
        CREATE FUNCTION warn() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE WARNING 'canceling wait for synchronous replication'; RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER late AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION warn()
    """)
    told: list[tuple[Any, ...]] = []
    with Handler("manual") as db:
        db.connection.add_notice_handler(
            lambda diag: told.append((diag.sqlstate, diag.severity_nonlocalized))
        )
        db.query(INSERT)
        db.commit()
    assert told == [("01000", "WARNING")]


@pytest.mark.parametrize("level", ["error", "FATAL", "panic"])
def test_a_setting_that_would_hide_it_is_refused(known_cluster: Any, start: Any, level: str) -> None:
    with pytest.raises(pgdbpool.ConfigError, match=r"client_min_messages.*use warning"):
        Connection.init(config([known_cluster.primary], g={"settings": {"client_min_messages": level}}))
    start()
    with pytest.raises(pgdbpool.SettingError, match=r"client_min_messages.*use warning"):
        Connection.fetch("auto", "SELECT 1", settings={"client_min_messages": level})
    shown = Connection.fetchval(
        "auto", "SHOW client_min_messages", settings={"client_min_messages": "warning"}
    )
    assert shown == "warning"


def test_notice_handlers_of_a_block_get_it(primary: Primary, start: Any) -> None:
    start()
    primary.lonely()
    told: list[str | None] = []

    def work() -> None:
        with Handler("auto") as db:
            db.connection.add_notice_handler(lambda diag: told.append(diag.source_function))
            db.query(INSERT)

    working = Work(work)
    primary.cancel()
    assert isinstance(working.end(), NotReplicatedError)
    assert told == ["SyncRepWaitForLSN"]


# Cut short by the pool.


def close() -> None:
    Connection.close(0)


@pytest.mark.parametrize("end", [Connection.terminate, close])
def test_a_statement_that_may_be_committing_is_cut_and_not_cancelled(
    primary: Primary, start: Any, end: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("pgdbpool._util.bounds.CUT_WITHIN", 0.1)
    for way in WAYS if end is not close else [end_of_block, statement]:
        start()
        primary.lonely()
        work = Work(way)
        (pid,) = wait_for(primary.waiting)
        end()
        error = work.end()
        assert isinstance(error, ConnectionLostError), (way, error)
        assert not isinstance(error, NotReplicatedError), way
        assert error.maybe_committed or error.maybe_executed, way
        assert primary.waiting() == [pid], way
        primary.release()


def test_a_commit_within_the_bound_is_a_success(primary: Primary, start: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("pgdbpool._util.bounds.CUT_WITHIN", 20.0)
    for way in (end_of_block, statement, one_shot):
        start()
        primary.lonely()
        work = Work(way)
        wait_for(primary.waiting)
        wait_for(work.waits)  # between sending and waiting, it would be refused with `maybe_executed`
        ending = Work(Connection.terminate)
        wait_for(Connection.is_closing)
        primary.release()
        assert work.end() is None, way
        assert ending.end() is None


CANCELLED = [
    ("auto", "SELECT pg_sleep(50)"),
    ("auto", "WITH t AS (SELECT pg_sleep(50)) SELECT count(*) FROM t"),
    ("manual", "INSERT INTO t SELECT 1 FROM pg_sleep(50)"),
]


@pytest.mark.parametrize(("group", "statement"), CANCELLED)
def test_a_statement_that_cannot_be_committing_is_cancelled(
    primary: Primary, start: Any, group: str, statement: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("pgdbpool._util.bounds.CUT_WITHIN", 10)  # that long on a machine that is busy
    start(query_timeout=60_000)

    def sleep() -> None:
        with Handler(group) as db:
            db.query(statement)

    work = Work(sleep)
    wait_for(primary.sleeping)
    Connection.terminate()
    error = work.end()
    assert isinstance(error, pgdbpool.Error)
    wait_for(lambda: not primary.sleeping())
    assert primary.rows() == 0


@pytest.mark.parametrize("group", ["auto", "manual"])
def test_a_statement_that_was_sent_as_its_connection_is_cut_is_cancelled(
    primary: Primary, start: Any, group: str, monkeypatch: Any
) -> None:
    start(query_timeout=60_000)
    receive, cut = ExchangingConnection.receive, LiveConnection._stop_statement

    def receive_late(self: Any, *args: Any) -> Any:
        if sleeping and self.pgconn.transaction_status == ACTIVE:
            held.append(self)
            wait_for(lambda: self.unusable)
        return receive(self, *args)

    def cut_late(self: Any, *args: Any) -> Any:
        wait_for(lambda: self.closed or self not in held)
        return cut(self, *args)

    def sleep() -> None:
        with Handler(group) as db:
            db.query("SELECT 1")
            sleeping.append(db)
            db.query("SELECT pg_sleep(50)")

    sleeping: list[Any] = []
    held: list[Any] = []
    monkeypatch.setattr(ExchangingConnection, "receive", receive_late)
    monkeypatch.setattr(LiveConnection, "_stop_statement", cut_late)
    work = Work(sleep)
    wait_for(primary.sleeping)
    Connection.terminate()
    assert isinstance(work.end(), ConnectionLostError)
    wait_for(lambda: not primary.sleeping())


def test_a_statement_that_is_sent_while_its_connection_is_cut_is_cancelled(
    primary: Primary, start: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("pgdbpool._util.bounds.CUT_WITHIN", 10)
    start(query_timeout=60_000)
    send_all, stop = ExchangingConnection._send_all, LiveConnection._stop_statement
    about_to_send, asked, sent = threading.Event(), threading.Event(), threading.Event()

    def send_late(self: Any, *args: Any) -> Any:
        about_to_send.set()
        assert asked.wait(5)
        found = send_all(self, *args)
        self.pgconn.flush()
        sent.set()
        return found

    def stop_and_wait(self: Any, *args: Any) -> bool:
        found = stop(self, *args)
        if not asked.is_set():
            asked.set()
            assert sent.wait(5)
            wait_for(primary.sleeping)
        return found

    def sleep() -> None:
        with Handler("manual") as db:  # its BEGIN goes with the statement
            db.query("SELECT pg_sleep(50)")

    monkeypatch.setattr(ExchangingConnection, "_send_all", send_late)
    monkeypatch.setattr(LiveConnection, "_stop_statement", stop_and_wait)
    work = Work(sleep)
    assert about_to_send.wait(5)
    Connection.terminate()
    assert isinstance(work.end(), pgdbpool.Error)
    wait_for(lambda: not primary.sleeping())


def test_max_hold_takes_a_connection_away_and_cancels_no_commit(primary: Primary, known_cluster: Any) -> None:
    group = {"connection_count": 1, "max_hold": 0.3}
    Connection.init(config([known_cluster.primary], auto=group))
    try:
        primary.lonely()
        work = Work(statement)
        (pid,) = wait_for(primary.waiting)
        error = work.end()
        assert isinstance(error, pgdbpool.HoldExceededError)
        assert error.maybe_executed
        assert primary.waiting() == [pid]
        with pytest.raises(pgdbpool.PoolTimeout, match="1 left in a commit"):
            Connection.fetchval("auto", "SELECT 1", timeout=0.3)
        primary.release()
        assert Connection.fetchval("auto", "SELECT 1") == 1
    finally:
        Connection.reset()


@pytest.mark.parametrize("kind", [Interruption, KeyboardInterrupt])
def test_an_interrupted_commit_is_not_cancelled(primary: Primary, start: Any, kind: Any) -> None:
    def interrupt(*_: Any) -> None:
        raise kind

    def send(earlier: set[int]) -> None:
        wait_for(lambda: set(primary.waiting()) - earlier)
        os.kill(os.getpid(), signal.SIGUSR1)

    start(connection_count=9)
    primary.lonely()
    previous = signal.signal(signal.SIGUSR1, interrupt)
    try:
        for way in (end_of_block, statement, statement_with_settings, copy, stream, one_shot):
            before = set(primary.waiting())
            sender = Work(lambda before=before: send(before))  # type: ignore[misc]
            with pytest.raises(kind):
                way()
            assert sender.end() is None
            assert len(set(primary.waiting()) - before) == 1, way
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_a_write_whose_rows_are_left_early_is_not_cancelled(primary: Primary, start: Any) -> None:
    start()
    primary.lonely()
    many = "INSERT INTO t SELECT generate_series(1, 20000) RETURNING i"

    def leave() -> None:
        with Handler("auto") as db:
            for _ in db.connection.cursor().stream(many):
                break

    work = Work(leave)
    (pid,) = wait_for(primary.waiting)
    work.end()
    assert primary.waiting() == [pid]
    primary.release()
    wait_for(lambda: primary.rows() == 20_000)


PROGRAM = """
    import signal, sys, threading, time
    from pgdbpool import Connection, ConnectionLostError, Handler
    Connection.init({{"type": "{mode}", "db": {{"host": "{host}", "port": {port}, "user": "postgres",
        "name": "postgres", "query_timeout": 60000}}, "groups": {{
        "auto": {{"connection_count": 1}}, "manual": {{"connection_count": 1, "autocommit": False}}}}}})
    {handler}
    try:
        with Handler("{group}") as db:
            db.query("INSERT INTO t VALUES (1)")
        print("committed", flush=True)
    except Exception as error:
        unknown = error.maybe_executed or error.maybe_committed
        print(isinstance(error, ConnectionLostError), unknown, flush=True)
"""
HANDLERS = {
    "signals": (signal.SIGTERM, "Connection.install_signal_handlers(timeout=0.3)"),
    "gunicorn": (
        signal.SIGQUIT,
        "from pgdbpool.contrib.gunicorn import worker_int\n"
        "    signal.signal(signal.SIGQUIT, lambda *_: worker_int(None))",
    ),
}


@pytest.mark.parametrize(("kind", "group"), [("signals", "auto"), ("gunicorn", "manual")])
def test_a_signal_cancels_no_commit(
    primary: Primary, known_cluster: Any, mode: str, group: str, kind: str
) -> None:
    number, handler = HANDLERS[kind]
    node = known_cluster.primary
    body = PROGRAM.format(mode=mode, host=node.host, port=node.port, group=group, handler=handler)
    primary.lonely()
    program = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        (pid,) = wait_for(primary.waiting)
        program.send_signal(number)
        out, _ = program.communicate(timeout=10)
    finally:
        program.kill()
        program.wait()
    assert out in ("", "True True\n")
    assert primary.waiting() == [pid]


def test_a_signal_lets_a_commit_end_that_can(primary: Primary, known_cluster: Any, mode: str) -> None:
    node = known_cluster.primary
    # To release the commit takes a moment.
    patience = "import pgdbpool._util.bounds; pgdbpool._util.bounds.CUT_WITHIN = 10"
    handler = f"{patience}; Connection.install_signal_handlers(timeout=20)"
    body = PROGRAM.format(mode=mode, host=node.host, port=node.port, group="manual", handler=handler)
    primary.lonely()
    program = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(body)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        wait_for(primary.waiting)
        program.send_signal(signal.SIGTERM)
        primary.release()
        out, _ = program.communicate(timeout=10)
    finally:
        program.kill()
        program.wait()
    assert out == "committed\n"


# Left in a commit.


def test_a_session_that_is_left_in_a_commit_counts_until_the_server_lets_it_go(
    primary: Primary, start: Any, caplog: Any
) -> None:
    """Past the client's deadline: a pool of two has two sessions at the server, whoever asks for more."""
    start(query_timeout=200, timeout=0.3)
    primary.lonely()
    for way in (end_of_block, commit_as_text):
        error = Work(way).end()
        assert isinstance(error, pgdbpool.QueryDeadlineError)
        assert error.maybe_committed
    for _ in range(3):
        with pytest.raises(pgdbpool.PoolTimeout, match="2 left in a commit"):
            end_of_block()
    assert len(primary.waiting()) == 2
    assert Connection.status().groups["manual"].left == 2
    assert [r.group for r in caplog.records if r.event == "session.left"] == ["manual"] * 2
    assert len(primary.waiting()) == 2
    primary.release()
    wait_for(lambda: serves("manual"))
    wait_for(lambda: serves("manual") and Connection.status().groups["manual"].left == 0)
    assert Connection.status().groups["manual"].size <= 2


def serves(group: str) -> bool:
    with suppress(pgdbpool.PoolTimeout), Handler(group) as db:
        return bool(db.fetchval("SELECT true"))
    return False


@pytest.mark.parametrize("how", ["restart", "terminate"])
def test_a_left_session_ends_with_its_server(
    primary: Primary, known_cluster: Any, start: Any, how: str
) -> None:
    start(query_timeout=200, timeout=0.3, connection_count=1)
    primary.lonely()
    assert isinstance(Work(end_of_block).end(), pgdbpool.QueryDeadlineError)
    assert Connection.status().groups["manual"].left == 1
    (pid,) = primary.waiting()
    if how == "terminate":
        primary.admin.execute("SELECT pg_terminate_backend(%s)", (pid,))
    else:
        primary.admin.execute("ALTER SYSTEM RESET synchronous_standby_names")
        known_cluster.primary.kill()
        known_cluster.primary.start()
        primary.admin = known_cluster.primary.connect(autocommit=True)

    def served() -> bool:
        with suppress(pgdbpool.DBConnectionError, pgdbpool.ConnectionLostError), Handler("manual") as db:
            return bool(db.fetchval("SELECT true"))
        return False

    wait_for(served)
    assert Connection.status().groups["manual"].left == 0


def test_pools_close_at_once_with_connections_in_any_state(primary: Primary, start: Any) -> None:
    start(query_timeout=200)
    primary.lonely()
    assert isinstance(Work(end_of_block).end(), pgdbpool.QueryDeadlineError)
    began = time.monotonic()
    Connection.close(20)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "call", ["app.count(1)", "app . count(1)", "app /* x */ . count(1)", "count$(1)", "a$count(1)"]
)
def test_a_function_that_only_looks_like_one_of_the_server_may_commit(call: str) -> None:
    assert may_commit(f"SELECT {call}", inside=False)
    assert not may_commit("SELECT pg_catalog . count(1), lower('A')", inside=False)

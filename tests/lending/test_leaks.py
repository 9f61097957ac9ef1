"""Blocks that hold a connection for too long are told of once, and after `max_hold` they lose it."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from support import config, wait_for

from pgdbpool import (
    Category,
    ConfigError,
    Connection,
    Handler,
    HoldExceededError,
    PoolTimeout,
    classify,
    retrying,
    run,
)
from pgdbpool._session.statement_text import text_of


@pytest.fixture
def start(known_cluster: Any, mode: str) -> Iterator[Callable[..., None]]:
    def init(**changes: Any) -> None:
        auto = {"connection_count": 1, "ping": "never", **changes}
        groups = {"auto": auto, "manual": {**auto, "autocommit": False}, "other": {"connection_count": 1}}
        Connection.init(config([known_cluster.primary], mode, **groups))

    yield init
    Connection.reset()


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[Any]]:
    """A function that returns the records of an event."""
    caplog.set_level(logging.DEBUG, "pgdbpool")
    return lambda event: [r for r in caplog.records if getattr(r, "event", None) == event]


def look(mode: str) -> None:
    """In lock-free mode the next checkout of the process looks."""
    if mode == "non-threaded":
        with Handler("other"):
            pass


def seen(mode: str, condition: Callable[[], Any]) -> None:
    def looked() -> Any:
        look(mode)
        return condition()

    wait_for(looked)


# leak_after.


def test_a_leak_is_one_warning_with_thread_place_and_statement(start: Any, mode: str, records: Any) -> None:
    start(leak_after=0.05)
    with Handler("auto") as db:
        db.query("SELECT %s::text", ("a secret",))
        seen(mode, lambda: records("block.leaked"))
        look(mode)
        for _ in range(3):
            db.query("SELECT 2")
            look(mode)
        (record,) = records("block.leaked")
    assert record.levelno == logging.WARNING
    assert record.group == "auto"
    assert record.endpoint == next(iter(Connection.status().endpoints))
    assert record.holder == threading.current_thread().name
    assert record.file == __file__
    assert record.function == "test_a_leak_is_one_warning_with_thread_place_and_statement"
    assert record.seconds >= 0.05
    assert record.statement == "SELECT %s::text"
    assert record.stack is None
    assert record.correlation_id
    text = record.getMessage()
    assert "SELECT %s::text" in text
    assert f"{record.file}:{record.line}" in text
    assert record.holder in text
    assert "secret" not in text
    assert Connection.status().groups["auto"].leaks == 1


def by_exit_stack() -> None:
    with contextlib.ExitStack() as stack:
        db = stack.enter_context(Handler("auto"))
        told(db)


def by_run() -> None:
    run("auto", told)


def by_decorator() -> None:
    retrying("auto")(told)()


@contextlib.contextmanager
def opened() -> Iterator[Handler]:
    with Handler("auto") as db:
        yield db


def by_helper() -> None:
    with opened() as db:
        told(db)


def told(db: Handler) -> None:
    db.query("SELECT 1")
    (holder,) = Connection.status().groups["auto"].holders
    PLACES.append(holder)


PLACES: list[str] = []


@pytest.mark.parametrize("enter", [by_exit_stack, by_run, by_decorator, by_helper])
def test_the_place_is_the_callers_however_the_block_is_entered(
    start: Any, records: Any, enter: Callable[[], None]
) -> None:
    start(slow_block=0.000001, slow_query=0.000001)
    PLACES.clear()
    enter()
    function = "opened" if enter is by_helper else enter.__name__
    lines = inspect.getsourcelines(opened if enter is by_helper else enter)
    for event in ("block.slow", "statement.slow"):
        record = records(event)[0]
        assert (record.file, record.function) == (__file__, function)
        assert lines[1] <= record.line < lines[1] + len(lines[0])
        assert f"{__file__}:{record.line} in {function}" in record.getMessage()
        entering = lines[0][record.line - lines[1]]
        assert any(word in entering for word in ("Handler(", "run(", "retrying("))
    assert f"in {function}" in PLACES[0]


def test_each_block_that_leaks_is_reported(start: Any, mode: str, records: Any) -> None:
    start(leak_after=0.02)
    for number in (1, 2):
        with Handler("auto"):
            seen(mode, lambda number=number: len(records("block.leaked")) == number)
    first, second = records("block.leaked")
    assert first.correlation_id != second.correlation_id


def test_a_block_that_ends_in_time_is_not_reported(start: Any, mode: str, records: Any) -> None:
    start(leak_after=60)
    for _ in range(50):
        with Handler("auto") as db:
            db.query("SELECT 1")
    look(mode)
    assert not records("block.leaked")
    assert Connection.status().groups["auto"].leaks == 0


def test_with_leak_stack_the_whole_stack_is_shown(start: Any, mode: str, records: Any) -> None:
    start(leak_after=0.02, leak_stack=True)

    def inner() -> None:
        with Handler("auto"):
            seen(mode, lambda: records("block.leaked"))

    inner()
    (record,) = records("block.leaked")
    assert record.stack[-1].endswith("in inner")
    assert record.stack[-2].endswith("in test_with_leak_stack_the_whole_stack_is_shown")
    assert record.stack[-1] in record.getMessage()


def test_the_timeout_shows_the_holders_in_the_same_way(start: Any, mode: str) -> None:
    start(leak_stack=True)
    with Handler("auto", correlation_id="request-7") as db:
        db.query("SELECT %s::text", ("a secret",))
        with pytest.raises(PoolTimeout) as caught, Handler("auto", timeout=0.01):
            pass
    (holder,) = caught.value.holders
    assert holder.startswith(f"thread {threading.current_thread().name} for ")
    assert f"from {__file__}:" in holder
    assert "in test_the_timeout_shows_the_holders_in_the_same_way" in holder
    assert "last statement: SELECT %s::text" in holder
    assert "correlation id request-7" in holder
    assert "stack: " in holder
    assert holder in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.slow
def test_a_statement_under_way_is_reported_too(known_cluster: Any, records: Any) -> None:
    Connection.init(config([known_cluster.primary], auto={"connection_count": 1, "leak_after": 0.05}))
    try:
        with Handler("auto") as db:
            db.query("SELECT pg_sleep(2)")
        (record,) = records("block.leaked")
        assert record.statement == "SELECT pg_sleep(2)"
    finally:
        Connection.reset()


def test_nothing_is_watched_unless_configured(start: Any, records: Any) -> None:
    start()
    with Handler("auto") as db:
        db.query("SELECT 1")
        assert "pgdbpool-monitor" not in [thread.name for thread in threading.enumerate()]


def test_no_thread_but_the_monitor_watches(start: Any, mode: str) -> None:
    start(leak_after=60, max_hold=120)
    with Handler("auto"):
        names = [thread.name for thread in threading.enumerate()]
    assert names.count("pgdbpool-monitor") == (mode == "threaded")


def test_literals_of_a_composed_statement_are_not_in_its_text() -> None:
    statement = psycopg.sql.SQL("SELECT {} FROM {} WHERE i = {}").format(
        psycopg.sql.Literal("a secret"), psycopg.sql.Identifier("t"), psycopg.sql.Placeholder()
    )
    assert text_of(statement) == 'SELECT ... FROM "t" WHERE i = %s'
    assert text_of(b"SELECT\n  1") == "SELECT 1"
    assert len(text_of("x" * 100_000) or "") < 1100
    assert text_of(None) is None


def test_a_forked_child_watches_its_own_blocks(start: Any, mode: str, records: Any) -> None:
    start(leak_after=0.05)
    with Handler("auto") as db:
        db.query("SELECT 1")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            before = len(records("block.leaked"))
            with Handler("auto") as db:
                db.query("SELECT 2")
                seen(mode, lambda: len(records("block.leaked")) > before)
            code = records("block.leaked")[-1].statement != "SELECT 2"
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# max_hold.


@pytest.mark.slow
@pytest.mark.parametrize("group", ["auto", "manual"])
def test_the_query_of_an_overdue_block_is_cancelled(known_cluster: Any, records: Any, group: str) -> None:
    base = {"connection_count": 1, "max_hold": 1, "timeout": 10}
    Connection.init(config([known_cluster.primary], auto=base, manual={**base, "autocommit": False}))
    try:
        with Handler(group) as db:
            first = db.connection.info.backend_pid
        with pytest.raises(HoldExceededError) as caught, Handler(group) as db:
            db.query("SELECT pg_sleep(30)")
        assert classify(caught.value) is Category.TIMEOUT
        assert isinstance(caught.value, psycopg.OperationalError | psycopg.errors.QueryCanceled)
        assert not caught.value.maybe_committed
        (record,) = wait_for(lambda: records("block.overdue"))
        assert record.statement == "SELECT pg_sleep(30)"
        assert record.seconds >= 1
        with Handler(group) as db:
            assert db.connection.info.backend_pid != first
        status = Connection.status().groups[group]
        assert status.overdue == 1
        assert status.discarded["max_hold"] == 1
        assert status.in_use == 0
        with known_cluster.primary.connect() as admin:
            running = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'"
            running += " AND state = 'active'"
            wait_for(lambda: admin.execute(running).fetchone() == (0,), what="the query has ended")
    finally:
        Connection.reset()


@pytest.mark.slow
def test_an_overdue_block_that_does_nothing_gives_its_place_to_another(start: Any, mode: str) -> None:
    start(max_hold=1, timeout=10)
    leaked = Handler("manual").__enter__()
    leaked.query("CREATE TABLE overdue (i int)")
    seen(mode, lambda: Connection.status().groups["manual"].overdue == 1)
    with Handler("manual") as db:  # the only connection of the group
        assert db.query("SELECT to_regclass('overdue')").fetchone()[0] is None
    with pytest.raises(HoldExceededError) as caught:
        leaked.__exit__(None, None, None)
    assert not caught.value.maybe_committed
    assert Connection.status().groups["manual"].size <= 1
    with Handler("manual", timeout=5) as db:
        assert db.query("SELECT 1").fetchone()[0] == 1


@pytest.fixture
def handlers() -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Make every record of the package call a function, until the end of the test."""
    added: list[logging.Handler] = []

    class Calling(logging.Handler):
        def __init__(self, function: Callable[[], Any]) -> None:
            super().__init__()
            self.function = function

        def emit(self, record: logging.LogRecord) -> None:
            self.function()

    def add(function: Callable[[], Any]) -> None:
        added.append(Calling(function))
        logging.getLogger("pgdbpool").addHandler(added[-1])

    yield add
    for handler in added:
        logging.getLogger("pgdbpool").removeHandler(handler)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_log_that_raises_keeps_no_connection(start: Any, mode: str, handlers: Any) -> None:
    start(leak_after=0.02, max_hold=0.1)

    def fail() -> None:
        raise OSError("the disk is full")

    handlers(fail)
    for number in (1, 2):
        with Handler("auto"):
            seen(mode, lambda number=number: Connection.status().groups["auto"].overdue == number)
    assert Connection.status().groups["auto"].leaks == 2


@pytest.mark.parametrize("mode", ["threaded"], indirect=True)
def test_a_log_that_hangs_keeps_no_connection(start: Any, mode: str, handlers: Any, records: Any) -> None:
    start(leak_after=0.02, max_hold=0.1)
    go_on, hanging = threading.Event(), threading.Event()

    def hang() -> None:
        hanging.set()
        go_on.wait(20)

    logging.getLogger("pgdbpool").setLevel(logging.WARNING)  # those of requests would hang too
    handlers(hang)
    try:
        for number in (1, 2):
            with Handler("auto"):
                wait_for(lambda number=number: Connection.status().groups["auto"].overdue == number)
        assert hanging.is_set()
    finally:
        go_on.set()
    wait_for(lambda: (len(records("block.leaked")), len(records("block.overdue"))) == (2, 2))


@pytest.mark.slow
def test_an_overdue_autocommit_block_goes_on_with_another_connection(
    start: Any, mode: str, records: Any
) -> None:
    start(max_hold=1)
    with Handler("auto") as db:
        db.query("SELECT 1")
        seen(mode, lambda: records("block.overdue"))  # it is counted a moment before it is cut
        with pytest.raises(HoldExceededError):
            db.query("SELECT 2")
        assert db.query("SELECT 3").fetchone()[0] == 3


def test_a_block_that_ends_in_time_keeps_its_connection(start: Any, mode: str) -> None:
    start(max_hold=60)
    pids = set()
    for _ in range(5):
        with Handler("auto") as db:
            pids.add(db.connection.info.backend_pid)
        look(mode)
    assert len(pids) == 1


@pytest.mark.slow
def test_many_blocks_at_the_limit_leave_the_pool_whole(known_cluster: Any) -> None:
    group = {"connection_count": 4, "max_hold": 0.03, "timeout": 20}
    Connection.init(config([known_cluster.primary], auto=group))
    outcomes: list[str] = []

    def work() -> None:
        for number in range(8):
            try:
                with Handler("auto") as db:
                    db.query("SELECT pg_sleep(%s)", (0.02 + 0.005 * (number % 4),))
                outcomes.append("in time")
            except HoldExceededError:
                outcomes.append("overdue")

    try:
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(outcomes) == 48
        status = Connection.status().groups["auto"]
        assert status.in_use == 0
        assert status.size <= 4
        assert status.overdue == status.discarded.get("max_hold", 0) >= outcomes.count("overdue")
        with Handler("auto", timeout=10) as db:
            assert db.query("SELECT 1").fetchone()[0] == 1
    finally:
        Connection.reset()


def test_a_leak_is_reported_before_it_ends() -> None:
    with pytest.raises(ConfigError, match=r"leak_after.*must be below max_hold \(5 s\), not 5 s"):
        Connection.init({"db": {"host": "h"}, "groups": {"g": {"leak_after": "5s", "max_hold": 5}}})

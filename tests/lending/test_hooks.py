"""Hooks: when they are called, and what becomes of one that fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.adapt import Dumper
from psycopg.types.string import TextLoader
from support import config, kill_backends, pid_of, pools_backends, wait_for

import pgdbpool
from pgdbpool import Connection, Handler
from pgdbpool.cluster import Cluster

pytestmark = pytest.mark.slow


@pytest.fixture
def admin(known_cluster: Cluster) -> Iterator[psycopg.Connection[Any]]:
    with known_cluster.primary.connect() as conn:
        kill_backends(conn)
        conn.execute("CREATE TABLE t (i int PRIMARY KEY)")
        yield conn


@pytest.fixture
def start(known_cluster: Cluster, mode: str, admin: Any) -> Iterator[Callable[..., None]]:
    """Initialise the groups `auto` and `manual` with one connection each, or as it is changed."""

    def init(**changes: Any) -> None:
        auto = {"connection_count": 1, "min_size": 0, "timeout": 3, **changes}
        groups = {"auto": auto, "manual": {**auto, "autocommit": False}}
        Connection.init(config([known_cluster.primary], mode, **groups), wait=False)

    yield init
    Connection.reset()


class Calls(list[Any]):
    """A hook that notes what it is called with, and raises where it is told to."""

    failure: BaseException | None = None

    def __call__(self, *args: Any) -> None:
        self.append(args)
        if self.failure is not None:
            raise self.failure


def pid(group: str = "auto") -> int:
    with Handler(group) as db:
        return pid_of(db)


# A new connection.


def test_configure_is_called_once_for_each_new_connection(start: Any, admin: Any) -> None:
    calls = Calls()
    start(configure=calls)
    assert pid() == pid()
    kill_backends(admin)
    pid()
    assert [type(conn).__name__ for (conn,) in calls] == ["PooledConnection"] * 2


class Shout(TextLoader):
    def load(self, data: Any) -> Any:
        return bytes(data).decode().upper()


class Whisper(Shout):
    def load(self, data: Any) -> Any:
        return bytes(data).decode().lower()


class Word:
    """A type that psycopg does not know."""


class WordDumper(Dumper):
    def dump(self, obj: Any) -> bytes:
        return b"word"


def test_adapters_that_configure_registers_are_there_for_every_block(start: Any) -> None:
    start(configure=lambda conn: conn.adapters.register_loader("text", Shout))
    for _ in range(2):
        with Handler("auto") as db:
            assert db.query("SELECT 'Ab'::text").fetchone()[0] == "AB"
            db.connection.adapters.register_loader("text", Whisper)
            assert db.query("SELECT 'Ab'::text").fetchone()[0] == "ab"


def test_adapters_of_a_cursor_are_its_own_and_hold_for_the_rows_it_has(start: Any) -> None:
    start()
    statement = "SELECT v FROM (VALUES ('Ab'::text), ('Ab')) AS t (v)"
    with Handler("auto") as db:
        cursor = db.query(statement)
        assert cursor.fetchone()[0] == "Ab"
        cursor.adapters.register_loader("text", Shout)
        assert cursor.fetchone()[0] == "AB"
        assert cursor.execute(statement).fetchone()[0] == "AB"
        assert db.query(statement).fetchone()[0] == "Ab"
    assert Connection.fetchval("auto", statement) == "Ab"


def test_dumpers_can_be_registered_after_a_cursors_first_execution(start: Any) -> None:
    start()
    statement = "SELECT %s::text"
    with Handler("auto") as db:
        cursor = db.query("SELECT 1")
        with pytest.raises(psycopg.ProgrammingError, match="Word"):
            cursor.execute(statement, (Word(),))
        cursor.adapters.register_dumper(Word, WordDumper)
        assert cursor.execute(statement, (Word(),)).fetchone()[0] == "word"
        with pytest.raises(psycopg.ProgrammingError, match="Word"):
            db.query(statement, (Word(),))


def test_adapters_of_the_connection_hold_for_the_cursors_made_after(start: Any) -> None:
    start()
    statement = "SELECT 'Ab'::text"
    with Handler("auto") as db:
        before = db.query(statement)
        db.connection.adapters.register_loader("text", Shout)
        assert db.query(statement).fetchone()[0] == "AB"
        assert before.execute(statement).fetchone()[0] == "Ab"
    assert Connection.fetchval("auto", statement) == "Ab"


def test_configure_executes_statements(start: Any, admin: Any) -> None:
    start(configure=lambda conn: conn.execute("INSERT INTO t VALUES (1)"))
    pid()
    assert admin.execute("SELECT count(*) FROM t").fetchone() == (1,)


def leaves_transaction(conn: Any) -> None:
    conn.autocommit = False
    conn.execute("SELECT 1")


@pytest.mark.parametrize(
    ("configure", "message"),
    [
        (lambda conn: 1 / 0, "configure of group 'auto' raised ZeroDivisionError: division by zero"),
        (lambda conn: conn.execute("SELECT 1/0"), "configure of group 'auto' raised DivisionByZero"),
        (leaves_transaction, "configure of group 'auto' left a transaction open"),
    ],
    ids=["raises", "statement", "transaction"],
)
def test_a_connection_that_cannot_be_configured_is_none(
    start: Any, admin: Any, configure: Any, message: str
) -> None:
    start(configure=configure)
    with pytest.raises(pgdbpool.DBConnectionError, match=message) as caught, Handler("auto"):
        pass
    assert isinstance(caught.value.__cause__, pgdbpool.HookError)
    assert not isinstance(caught.value, pgdbpool.DBOfflineError)
    wait_for(lambda: not pools_backends(admin))
    assert Connection.status().groups["auto"].size == 0


@pytest.mark.parametrize(("group", "left"), [("auto", False), ("manual", True)])
def test_configure_may_set_autocommit_and_must_put_it_back(
    start: Any, admin: Any, group: str, left: bool
) -> None:
    def configure(conn: Any) -> None:
        before = conn.autocommit
        conn.autocommit = False
        conn.execute("INSERT INTO t VALUES (1)")
        conn.rollback()
        conn.autocommit = left if leave else before

    leave = False
    start(configure=configure)
    with Handler(group) as db:
        assert db.connection.autocommit is (group == "auto")
    assert admin.execute("SELECT count(*) FROM t").fetchone() == (0,)
    leave = True
    start(configure=configure)
    message = rf"configure of group '{group}' left autocommit = {left}, and the group has `autocommit: "
    with pytest.raises(pgdbpool.DBConnectionError, match=message), Handler(group):
        pass


# The class of the connections.


class Counting(psycopg.Connection[Any]):
    """A connection of the application's own."""

    label = "counting"

    def answer(self) -> int:
        (value,) = self.execute("SELECT 42").fetchone() or (0,)
        return int(value)


@pytest.mark.parametrize("cls", [Counting, f"{__name__}:Counting"], ids=["class", "name"])
def test_the_application_has_its_own_class(start: Any, admin: Any, cls: Any) -> None:
    start(connection_class=cls, row_factory="tuple")
    for group in ("auto", "manual"):
        with Handler(group) as db:
            assert isinstance(db.connection, Counting)
            assert db.connection.answer() == 42
            db.query("INSERT INTO t VALUES (%s)", (len(group),))
        with pytest.raises(pgdbpool.BlockClosedError):
            db.connection.answer()
    assert admin.execute("SELECT count(*) FROM t").fetchone() == (2,)


def test_a_class_that_is_not_a_connection_is_refused(start: Any) -> None:
    for wrong in (dict, "os:PathLike", psycopg.AsyncConnection, Counting.answer):
        with pytest.raises(pgdbpool.ConfigError, match=r"must be a subclass of psycopg\.Connection"):
            start(connection_class=wrong)


# Blocks.


def test_on_checkout_and_on_checkin_are_called_once_for_each_block(start: Any) -> None:
    out, back = Calls(), Calls()
    start(on_checkout=out, on_checkin=back)
    for group in ("auto", "manual"):
        for _ in range(3):
            with Handler(group) as db:
                db.query("SELECT 1")
                assert len(out) == len(back) + 1
        assert Connection.fetchval(group, "SELECT 1") == 1
    assert len(out) == len(back) == 8
    assert out == back


def test_statements_of_on_checkout_are_the_blocks_own(start: Any, admin: Any) -> None:
    def on_checkout(conn: Any) -> None:
        conn.execute("INSERT INTO t VALUES (1)")

    start(on_checkout=on_checkout)
    with pytest.raises(RuntimeError), Handler("manual"):
        raise RuntimeError
    assert admin.execute("SELECT count(*) FROM t").fetchone() == (0,)
    with Handler("manual"):
        pass
    assert admin.execute("SELECT count(*) FROM t").fetchone() == (1,)


@pytest.mark.parametrize("failure", [ValueError("not now"), psycopg.DataError("no"), KeyboardInterrupt()])
def test_a_block_whose_on_checkout_fails_does_not_begin(start: Any, failure: BaseException) -> None:
    calls, discarded = Calls(), Calls()
    start(on_checkout=calls, on_discard=discarded)
    first = pid()
    calls.failure = failure
    own = isinstance(failure, Exception)
    for group in ("auto", "auto"):
        with pytest.raises(pgdbpool.HookError if own else KeyboardInterrupt) as caught, Handler(group):
            pytest.fail("the block began")
        if own:
            assert caught.value.__cause__ is failure
    assert Connection.status().groups["auto"].in_use == 0
    assert {reason for _, reason in discarded} == {"on_checkout failed" if own else "interrupted"}
    calls.failure = None
    assert pid() != first


def test_a_hook_error_is_classified_by_its_cause() -> None:
    error = pgdbpool.HookError("x")
    assert pgdbpool.classify(error) is pgdbpool.Category.USAGE
    error.__cause__ = psycopg.errors.UniqueViolation("x")
    assert pgdbpool.classify(error) is pgdbpool.Category.CONSTRAINT


def test_a_block_does_not_notice_that_on_checkin_fails(start: Any, admin: Any, caplog: Any) -> None:
    calls, discarded = Calls(), Calls()
    start(on_checkin=calls, on_discard=discarded)
    calls.failure = ValueError("not now")
    pids = set()
    for i in range(3):
        with Handler("manual") as db:
            db.query("INSERT INTO t VALUES (%s)", (i,))
            pids.add(pid_of(db))
    assert len(pids) == 3
    assert admin.execute("SELECT count(*) FROM t").fetchone() == (3,)
    assert [reason for _, reason in discarded] == ["on_checkin failed"] * 3
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    (warning,) = (record for record in warnings if "on_checkin" in record.getMessage())
    assert warning.getMessage() == "on_checkin of group 'manual' raised ValueError: not now"


def test_on_checkin_reaches_the_server_no_more(start: Any, caplog: Any) -> None:
    start(on_checkin=lambda conn: conn.execute("SELECT 1"))
    pid()
    assert "raised BlockClosedError" in caplog.text


# The end of a connection.


def test_on_discard_has_the_connection_and_the_reason(start: Any, admin: Any) -> None:
    discarded: list[tuple[int, str]] = []
    start(on_discard=lambda conn, reason: discarded.append((conn.info.backend_pid, reason)))
    first = pid()
    group = Connection.group("auto")
    group.drop_idle(group.endpoints[0], "barred")
    second = pid()
    Connection.close()
    assert discarded == [(first, "barred"), (second, "closed")]


def test_a_lost_connection_is_discarded(start: Any, admin: Any) -> None:
    calls = Calls()
    start(on_discard=calls, on_checkin=lambda conn: None)
    pid()
    kill_backends(admin)
    pid()
    assert [reason for _, reason in calls] == ["lost"]


def test_an_on_discard_that_fails_changes_nothing(start: Any, admin: Any, caplog: Any) -> None:
    calls = Calls()
    calls.failure = ValueError("not now")
    start(on_discard=calls)
    pid()
    kill_backends(admin)
    assert pid()
    assert len(calls) == 1
    assert "on_discard of group 'auto' raised ValueError: not now" in caplog.text


@pytest.mark.parametrize("end", ["block", "one-shot"])
def test_a_connection_is_replaced_after_max_uses(start: Any, end: str) -> None:
    calls = Calls()
    start(max_uses=3, on_discard=calls)

    def use() -> int:
        return pid() if end == "block" else int(Connection.fetchval("auto", "SELECT pg_backend_pid()"))

    pids = [use() for _ in range(9)]
    assert len(set(pids)) == 3
    assert pids == sorted(pids, key=pids.index)
    assert [reason for _, reason in calls] == ["used up"] * 3


def test_idle_connections_that_are_too_many_are_discarded(start: Any, mode: str) -> None:
    calls = Calls()
    start(connection_count=3, max_idle=0.2, on_discard=calls)
    with Handler("auto"), Handler("auto"), Handler("auto"):
        pass

    def shrunk() -> bool:
        pid()
        return Connection.status().groups["auto"].size == 1

    wait_for(shrunk)
    assert {reason for _, reason in calls} == {"idle"}


# Failover.


@pytest.mark.parametrize("failure", [None, ValueError("not now")])
def test_on_failover_gets_the_server_that_takes_the_writes_now(
    known_cluster: Cluster, mode: str, failure: Any, caplog: Any
) -> None:
    calls = Calls()
    calls.failure = failure
    group = {"target": "primary", "connection_count": 2, "on_failover": calls, "timeout": 5}
    Connection.init(config(known_cluster.nodes, mode, g=group, any={"connection_count": 1}))
    try:
        old, new = known_cluster.primary, known_cluster.standbys[0]
        for _ in range(3):
            pid("g")
        assert calls == []
        old.kill()
        new.promote()

        def writes() -> bool:
            try:
                with Handler("g") as db:
                    return db.endpoint == f"{new.host}:{new.port}"
            except pgdbpool.Error:
                return False

        wait_for(writes, 20)
        assert calls == [(f"{old.host}:{old.port}", f"{new.host}:{new.port}")]
        said = "on_failover of group 'g' raised ValueError"
        if failure is None:
            assert said not in caplog.text
        else:
            wait_for(lambda: said in caplog.text)  # it is logged after the call, by the thread that made it
    finally:
        Connection.reset()


def test_on_failover_is_for_groups_that_write(start: Any) -> None:
    with pytest.raises(pgdbpool.ConfigError, match=r"on_failover: is about the server that takes the writes"):
        start(on_failover=print)


# Configuration.


def test_hooks_are_named_in_a_file() -> None:
    from pgdbpool._config.load import load

    keys = ("configure", "on_checkout", "on_checkin", "on_discard")
    group = {**dict.fromkeys(keys, "builtins:print"), "on_failover": "builtins:print", "target": "primary"}
    loaded = load({"db": {"host": "h"}, "groups": {"g": group}}).groups["g"]
    assert {getattr(loaded, key) for key in (*keys, "on_failover")} == {print}
    with pytest.raises(
        pgdbpool.ConfigError, match=r'must be a callable, or its name as "package\.module:fun'
    ):
        load({"db": {"host": "h"}, "groups": {"g": {"on_checkout": "print"}}})

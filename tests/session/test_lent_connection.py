"""A lent connection keeps what psycopg promises: autocommit, the modes of transactions, handlers, types."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel
from psycopg.types import TypeInfo
from psycopg.types.composite import CompositeInfo, register_composite
from psycopg.types.enum import EnumInfo, register_enum
from psycopg.types.hstore import register_hstore
from psycopg.types.range import Range, RangeInfo, register_range
from support import config, kill_backends, pid_of, server

import pgdbpool
from pgdbpool import Connection, Handler
from pgdbpool.cluster import Cluster

GROUPS = ["auto", "manual", "auto_t", "manual_t"]
SHOWN = "SELECT current_setting('app.tenant', true)"


@pytest.fixture
def admin(known_cluster: Cluster) -> Iterator[psycopg.Connection[Any]]:
    with known_cluster.primary.connect() as conn:
        conn.execute(
            "CREATE TABLE t (i int PRIMARY KEY, tenant text DEFAULT current_setting('app.tenant', true))"
        )
        yield conn


@pytest.fixture
def start(known_cluster: Cluster, mode: str, admin: Any, proxy_to: Any) -> Iterator[Callable[..., Any]]:
    """Initialise groups of one connection, with and without a tenant, behind a proxy; return that."""
    proxy = proxy_to(known_cluster.primary)

    def init(**changes: Any) -> Any:
        auto = {"connection_count": 1, "min_size": 0, "timeout": 3, **changes}
        tenant = {**auto, "tenant": {"setting": "app.tenant", "verify": "off"}}
        groups = {
            "auto": auto,
            "manual": {**auto, "autocommit": False},
            "auto_t": tenant,
            "manual_t": {**tenant, "autocommit": False},
        }
        entry = server(known_cluster.primary, port=proxy.port)
        Connection.init(config([entry], mode, **groups), wait=False)
        return proxy

    yield init
    Connection.reset()


def handler(group: str, **options: Any) -> Handler:
    return Handler(group, tenant="a" if group.endswith("_t") else None, **options)


def rows(admin: psycopg.Connection[Any]) -> list[int]:
    return [i for (i,) in admin.execute("SELECT i FROM t ORDER BY i")]


def copy_in(db: Handler, i: int) -> None:
    with db.copy("COPY t (i) FROM STDIN") as copy:
        copy.write_row((i,))


def in_pipeline(db: Handler, i: int) -> None:
    with db.pipeline():
        db.query("INSERT INTO t VALUES (%s)", (i,))


# Every way to write a row, in an order that does not matter.
WRITES: dict[str, Callable[[Handler, int], Any]] = {
    "query": lambda db, i: db.query("INSERT INTO t VALUES (%s)", (i,)),
    "fetchval": lambda db, i: db.fetchval("INSERT INTO t VALUES (%s) RETURNING i", (i,)),
    "several": lambda db, i: db.query("SELECT 1; INSERT INTO t VALUES (%s)", (i,)),
    "with": lambda db, i: db.query("WITH x AS (INSERT INTO t VALUES (%s) RETURNING i) SELECT * FROM x", (i,)),
    "executemany": lambda db, i: db.executemany("INSERT INTO t VALUES (%s)", [(i,)]),
    "copy": copy_in,
    "stream": lambda db, i: list(db.cursor().stream("INSERT INTO t VALUES (%s) RETURNING i", (i,))),
    "cursor": lambda db, i: db.connection.cursor().execute("INSERT INTO t VALUES (%s)", (i,)),
    "connection": lambda db, i: db.connection.execute("INSERT INTO t VALUES (%s)", (i,)),
    "psycopg's": lambda db, i: psycopg.ClientCursor(db.connection).execute("INSERT INTO t VALUES (%s)", (i,)),
    "pipeline": in_pipeline,
}


# autocommit.


@pytest.mark.parametrize("group", GROUPS)
def test_autocommit_reads_as_the_group_has_it_in_each_block(start: Any, group: str) -> None:
    start()
    auto = group.startswith("auto")
    for _ in range(2):
        with handler(group) as db:
            assert db.connection.autocommit is auto
            db.connection.autocommit = not auto
            assert db.connection.autocommit is not auto


@pytest.mark.slow
@pytest.mark.parametrize("group", ["auto", "auto_t"])
def test_autocommit_false_makes_transactions_that_end_as_psycopgs_do(
    start: Any, admin: Any, group: str
) -> None:
    start()
    for way, write in WRITES.items():
        admin.execute("TRUNCATE t")
        with pytest.raises(RuntimeError, match=way), handler(group) as db:
            db.connection.autocommit = False
            write(db, 1)
            assert rows(admin) == [], way
            db.connection.rollback()
            write(db, 2)
            db.rollback()
            write(db, 3)
            db.connection.commit()
            write(db, 4)
            db.commit()
            assert rows(admin) == [3, 4], way
            write(db, 5)
            raise RuntimeError(way)
        assert rows(admin) == [3, 4], way
        with handler(group) as db:
            db.connection.set_autocommit(False)
            write(db, 6)
        assert rows(admin) == [3, 4, 6], way  # a clean end commits what is open
        with suppress(RuntimeError), handler(group) as db:
            write(db, 7)
            raise RuntimeError
        assert rows(admin) == [3, 4, 6, 7], way  # and the next block is one of its group again
        if group == "auto_t":
            assert admin.execute("SELECT DISTINCT tenant FROM t").fetchall() == [("a",)], way


@pytest.mark.parametrize("group", ["manual", "manual_t"])
def test_autocommit_true_makes_each_statement_take_effect_at_once(start: Any, admin: Any, group: str) -> None:
    start()
    for way, write in WRITES.items():
        admin.execute("TRUNCATE t")
        with pytest.raises(RuntimeError, match=way), handler(group) as db:
            db.connection.autocommit = True
            write(db, 1)
            assert rows(admin) == [1], way
            db.connection.rollback()
            write(db, 2)
            raise RuntimeError(way)
        assert rows(admin) == [1, 2], way
        with suppress(RuntimeError), handler(group) as db:
            write(db, 3)
            raise RuntimeError
        assert rows(admin) == [1, 2], way
        if group == "manual_t":
            assert admin.execute("SELECT DISTINCT tenant FROM t").fetchall() == [("a",)], way


@pytest.mark.parametrize("group", GROUPS)
def test_to_set_autocommit_costs_no_round_trip(start: Any, group: str) -> None:
    proxy = start(prepare_threshold=None)
    with handler(group) as db:
        conn = db.connection
        proxy.reset_counts()
        for value in (True, False):
            conn.autocommit = value
        assert proxy.round_trips == 0
        db.query("SELECT 1")
        db.query("SELECT 2")
        db.commit()
        assert proxy.round_trips == 3
        conn.autocommit = True
        db.query("SELECT 3")
        assert proxy.round_trips == 4


@pytest.mark.parametrize("group", ["manual", "auto_t"])
def test_autocommit_is_not_changed_inside_a_transaction(start: Any, group: str) -> None:
    start()
    with handler(group) as db, db.transaction():
        db.query("SELECT 1")
        with pytest.raises(psycopg.ProgrammingError, match="can't change 'autocommit' now") as caught:
            db.connection.autocommit = True
        assert isinstance(caught.value, pgdbpool.DBQueryError)


ATTRIBUTES = {"autocommit": False, "read_only": True, "isolation_level": 4, "deferrable": True}


@pytest.mark.parametrize(("name", "value"), ATTRIBUTES.items())
def test_an_attribute_of_a_connection_that_was_given_back_is_refused(
    start: Any, name: str, value: Any
) -> None:
    refused: list[Exception] = []

    def on_checkin(conn: Any) -> None:
        try:
            setattr(conn, name, value)
        except pgdbpool.BlockClosedError as error:
            refused.append(error)

    start(on_checkin=on_checkin)
    with handler("auto") as db:
        conn = db.connection
        before = getattr(conn, name)
    assert refused
    with pytest.raises(pgdbpool.BlockClosedError):
        setattr(conn, name, value)
    with handler("auto") as db:
        assert getattr(db.connection, name) == before


@pytest.mark.parametrize(("name", "value"), ATTRIBUTES.items())
def test_it_is_never_too_late_to_set_an_attribute_of_the_connection(
    start: Any, name: str, value: Any
) -> None:
    start()
    with handler("auto") as db:
        conn = db.connection
        with pgdbpool.deadline(0):
            setattr(conn, name, value)
        assert getattr(conn, name) == value
        assert not conn.closed
        with db.transaction(), pytest.raises(psycopg.ProgrammingError, match=f"can't change '{name}' now"):
            setattr(conn, name, value)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_is_not_set_in_a_stream_of_the_same_thread(start: Any, name: str) -> None:
    start()
    with handler("auto") as db:
        for _ in db.cursor().stream("SELECT generate_series(1, 3)"):
            with pytest.raises(psycopg.ProgrammingError):
                setattr(db.connection, name, ATTRIBUTES[name])


@pytest.mark.parametrize("group", GROUPS)
def test_transaction_commits_at_its_end_once_autocommit_was_set(start: Any, admin: Any, group: str) -> None:
    start()
    with suppress(RuntimeError), handler(group) as db:
        db.connection.autocommit = not db.connection.autocommit
        with db.connection.transaction():
            db.query("INSERT INTO t VALUES (1)")
        assert rows(admin) == [1]
        with suppress(ZeroDivisionError), db.transaction():
            db.query("INSERT INTO t VALUES (2)")
            raise ZeroDivisionError
        raise RuntimeError
    assert rows(admin) == [1]


def test_a_transaction_goes_on_after_a_commit_in_a_pipeline(start: Any, admin: Any) -> None:
    start()
    for group, i in (("manual", 1), ("auto", 4)):
        with handler(group) as db:
            if group == "auto":
                db.connection.autocommit = False
            with db.pipeline():
                db.query("INSERT INTO t VALUES (%s)", (i,))
                db.connection.commit()
                db.query("INSERT INTO t VALUES (%s)", (i + 1,))
                db.connection.rollback()
                db.query("INSERT INTO t VALUES (%s)", (i + 2,))
    assert rows(admin) == [1, 3, 4, 6]


def test_the_first_statement_after_autocommit_was_set_is_not_sent_again(start: Any, admin: Any) -> None:
    start()
    for group, value in (("auto", False), ("manual", True)):
        with pytest.raises(pgdbpool.ConnectionLostError) as caught, handler(group) as db:
            db.connection.autocommit = value
            pid = pid_of(db)
            db.query("SELECT pg_terminate_backend(%s)", (pid,))
        # In a transaction of its own nothing of it can have taken effect; else it may have.
        assert caught.value.maybe_executed is value


def test_run_does_not_repeat_effects_from_before_autocommit_was_set(start: Any, admin: Any) -> None:
    start()
    attempts = []

    def work(db: Handler) -> None:
        attempts.append(db)
        db.query("INSERT INTO t VALUES (%s)", (len(attempts),))
        db.connection.autocommit = False
        db.query("SELECT 1")
        kill_backends(admin, pid_of(db))
        db.query("SELECT 2")

    with pytest.raises(pgdbpool.ConnectionLostError):
        pgdbpool.run("auto", work)
    assert rows(admin) == [1]


def test_on_checkout_sets_autocommit_for_the_block(start: Any, admin: Any) -> None:
    def on_checkout(conn: Any) -> None:
        conn.autocommit = False

    start(on_checkout=on_checkout)
    with suppress(RuntimeError), Handler("auto") as db:
        db.query("INSERT INTO t VALUES (1)")
        raise RuntimeError
    Connection.execute("auto", "INSERT INTO t VALUES (2)")
    assert rows(admin) == [2]


# commit() and rollback() in an autocommit block.


@pytest.mark.parametrize("group", ["auto", "auto_t"])
def test_rollback_of_statements_that_an_autocommit_block_committed_raises(
    start: Any, admin: Any, group: str
) -> None:
    start()
    for i, (way, write) in enumerate(WRITES.items()):
        with handler(group) as db:
            write(db, i)
            assert rows(admin)[-1] == i, way
            with pytest.raises(psycopg.ProgrammingError) as caught:
                db.rollback()
            remedies = "each statement commits by itself", "`autocommit: false`", "db.transaction()"
            for part in (repr(group), *remedies):
                assert part in str(caught.value)
            db.connection.rollback()  # psycopg's own, of which frameworks make use
            db.commit()  # that is what was done
            db.rollback()
    assert rows(admin) == list(range(len(WRITES)))


@pytest.mark.parametrize("group", ["auto", "auto_t"])
def test_rollback_of_an_autocommit_block_that_changed_nothing_is_fine(start: Any, group: str) -> None:
    start()
    with handler(group) as db:
        db.rollback()
        for reading in ("SELECT 1", "WITH x AS (SELECT 'insert') TABLE x; SHOW work_mem", "EXPLAIN TABLE t"):
            db.query(reading)
        list(db.cursor().stream("SELECT 1"))
        with db.copy("COPY t TO STDOUT") as copy:
            list(copy)
        db.rollback()
        for failing in ("INSERT INTO t VALUES (NULL)", "SELECT 1/0; INSERT INTO t VALUES (1)"):
            with pytest.raises(psycopg.Error):
                db.query(failing)
        with pytest.raises(psycopg.Error):
            copy_in(db, "no number")  # type: ignore[arg-type]
        with pytest.raises(psycopg.Error):
            db.executemany("INSERT INTO t VALUES (%s)", [(1,), (1,)])
        db.rollback()
        with db.transaction():
            db.query("INSERT INTO t VALUES (1)")
        db.rollback()


def test_rollback_of_a_transaction_that_an_autocommit_block_began_rolls_it_back(
    start: Any, admin: Any
) -> None:
    start()
    with handler("auto") as db:
        db.query("INSERT INTO t VALUES (1)")
        db.query("BEGIN")
        db.query("INSERT INTO t VALUES (2)")
        db.rollback()
    assert rows(admin) == [1]


# What configure sets.


def modes(db: Handler) -> tuple[str, ...]:
    return tuple(
        db.query(
            "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only'),"
            " current_setting('transaction_deferrable')"
        ).fetchone()
    )


def set_modes(conn: Any) -> None:
    conn.isolation_level = IsolationLevel.REPEATABLE_READ
    conn.read_only = True
    conn.deferrable = True


READ = ("repeatable read", "on", "on")
USUAL = ("read committed", "off", "off")


@pytest.mark.parametrize("group", ["manual", "manual_t"])
def test_transaction_modes_that_configure_sets_hold_in_every_block(start: Any, group: str) -> None:
    proxy = start(configure=set_modes, prepare_threshold=None)
    with handler(group) as db:
        assert modes(db) == READ
    proxy.reset_counts()
    with handler(group) as db:
        assert modes(db) == READ
        db.commit()
        assert modes(db) == READ
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction) as caught:
            db.query("INSERT INTO t VALUES (1)")
        assert not isinstance(caught.value, pgdbpool.ReadOnlyServerError)
        db.rollback()
    assert proxy.round_trips == 5
    with handler(group) as db:
        db.connection.read_only = None
        db.connection.isolation_level = IsolationLevel.SERIALIZABLE
        assert modes(db) == ("serializable", "off", "on")
    options = {"tenant": "a"} if group == "manual_t" else {}
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        Connection.execute(group, "INSERT INTO t VALUES (1)", **options)
    with handler(group) as db:
        assert modes(db) == READ


@pytest.mark.parametrize("group", GROUPS)
def test_attributes_of_a_lost_connection_say_nothing_of_the_next_ones_transactions(
    start: Any, admin: Any, group: str
) -> None:
    start()
    with handler(group) as db:
        if group.startswith("auto"):
            db.connection.autocommit = False
        set_modes(db.connection)
        assert modes(db) == READ
        db.commit()
        kill_backends(admin, pid_of(db))
        with pytest.raises(pgdbpool.ConnectionLostError):  # the block had made the session its own
            db.query("SELECT 1")
        db.rollback()
        assert modes(db) == USUAL
        assert db.connection.read_only is None
        assert db.connection.autocommit is False  # that is the block's


@pytest.mark.parametrize("group", ["auto", "auto_t"])
def test_transaction_modes_that_configure_sets_hold_in_transactions_of_an_autocommit_group(
    start: Any, group: str
) -> None:
    start(configure=set_modes)
    for _ in range(2):
        with handler(group) as db:
            with db.transaction():
                assert modes(db) == READ
            assert modes(db) == USUAL  # as in psycopg: a statement by itself has no BEGIN
            db.connection.autocommit = False
            assert modes(db) == READ
    if group == "auto_t":
        with handler(group) as db, pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            copy_in(db, 1)


@pytest.mark.parametrize("group", GROUPS)
def test_handlers_that_configure_adds_stay_and_those_of_a_block_end_with_it(start: Any, group: str) -> None:
    notices: list[Any] = []
    notifications: list[Any] = []

    def configure(conn: Any) -> None:
        conn.add_notice_handler(lambda notice: notices.append(notice.message_primary))
        conn.add_notify_handler(lambda note: notifications.append(note.payload))

    def on_checkout(conn: Any) -> None:
        conn.add_notice_handler(of_hook.append)

    of_block: list[Any] = []
    of_hook: list[Any] = []
    start(configure=configure, on_checkout=on_checkout)
    for n in range(3):
        with handler(group) as db:
            db.connection.add_notice_handler(of_block.append)
            db.connection.add_notify_handler(of_block.append)
            db.query("DO $$ BEGIN RAISE NOTICE 'ho'; END $$")
            assert (len(notices), len(of_block), len(of_hook)) == (n + 1, 2 * n + 1, n + 1)
            db.query("LISTEN news")
            db.commit()
            db.query("NOTIFY news, 'hey'")
            db.commit()
            db.query("SELECT 1")
            assert (len(notifications), len(of_block)) == (n + 1, 2 * n + 2)
        with handler(group) as db:  # one that does not touch the connection
            assert db.fetchval("SELECT 1") == 1
    assert notices == ["ho"] * 3
    assert notifications == ["hey"] * 3


# Transaction modes among settings.

ALL_MODES = {
    "default_transaction_isolation": "REPEATABLE  read",
    "Transaction_Read_Only": True,
    "default_transaction_deferrable": "yes",
}


@pytest.mark.parametrize("where", ["group", "block"])
@pytest.mark.parametrize("group", GROUPS)
def test_settings_give_transactions_their_modes_in_one_round_trip(start: Any, group: str, where: str) -> None:
    proxy = start(prepare_threshold=None, **({"settings": ALL_MODES} if where == "group" else {}))
    own = {} if where == "group" else {"settings": ALL_MODES}
    manual = group.startswith("manual")
    with handler(group, **own) as db:
        modes(db)
    proxy.reset_counts()
    with handler(group, **own) as db:
        assert modes(db) == READ
        assert modes(db) == READ
    assert proxy.round_trips == (3 if manual else 2)
    with handler(group, **own) as db:
        with db.transaction():
            assert modes(db) == READ
        assert list(db.cursor().stream("SHOW transaction_read_only")) == [("on",)]
        for write in WRITES.values():
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction) as caught:
                write(db, 1)
            assert not isinstance(caught.value, pgdbpool.ReadOnlyServerError)
            if manual:
                db.rollback()
        db.connection.read_only = False  # an attribute of the connection is more than a default
        with db.transaction():
            assert modes(db) == ("repeatable read", "off", "on")
    proxy.reset_counts()
    options = {"tenant": "a"} if group.endswith("_t") else {}
    assert Connection.fetchval(group, "SHOW transaction_isolation", **options, **own) == READ[0]
    if where == "block":
        with handler(group) as db:
            assert modes(db) == USUAL
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        Connection.execute(group, "INSERT INTO t VALUES (1)", **options, **own)
    assert Connection.status().endpoints


@pytest.mark.parametrize("group", GROUPS)
def test_a_blocks_modes_go_over_the_groups_under_any_name(start: Any, admin: Any, group: str) -> None:
    start(settings=ALL_MODES)
    with handler(
        group, settings={"TRANSACTION_isolation": "serializable", "transaction_read_only": "0"}
    ) as db:
        assert modes(db) == ("serializable", "off", "on")
        db.query("INSERT INTO t VALUES (1)")
    assert rows(admin) == [1]
    with handler(group) as db:
        assert modes(db) == READ


@pytest.mark.parametrize("group", GROUPS)
def test_modes_hold_in_transactions_that_are_begun_by_hand_or_chained(start: Any, group: str) -> None:
    start(settings=ALL_MODES)
    with handler(group) as db:
        db.query("BEGIN" if group.startswith("auto") else "SELECT 1")
        assert modes(db) == READ
        db.query("COMMIT AND CHAIN")
        assert modes(db) == READ
        db.query("ROLLBACK")
        assert modes(db) == READ


def test_serializable_by_a_setting_is_serializable(start: Any, admin: Any) -> None:
    admin.execute("INSERT INTO t VALUES (1), (2)")
    start(connection_count=2, settings={"default_transaction_isolation": "serializable"})
    with (
        pytest.raises(psycopg.errors.SerializationFailure),
        Handler("manual") as one,
        Handler("manual") as two,
    ):
        for db, i in ((one, 3), (two, 4)):
            db.query("SELECT count(*) FROM t")
            db.query("INSERT INTO t VALUES (%s)", (i,))
        two.commit()
        one.commit()


def test_read_write_by_default_has_no_effect_on_a_standby(known_cluster: Cluster, mode: str) -> None:
    settings = {"default_transaction_read_only": "off"}
    auto = {"connection_count": 1, "settings": settings, "target": "standby"}
    groups = {"auto": auto, "manual": {**auto, "autocommit": False}}
    Connection.init(config(known_cluster.nodes, mode, **groups))
    try:
        for group in groups:
            with Handler(group) as db:
                assert db.fetchval("SELECT 1") == 1
    finally:
        Connection.reset()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"default_transaction_isolation": "strict"}, "one of serializable, repeatable read"),
        ({"transaction_READ_only": "maybe"}, "'transaction_READ_only'.*'maybe' is not on or off"),
        ({"default_transaction_deferrable": 2}, "on or off"),
        ({"transaction_read_only": "on", "default_transaction_read_only": "on"}, "twice"),
    ],
)
def test_modes_that_are_none_are_refused_before_anything_is_sent(
    start: Any, settings: dict[str, Any], message: str
) -> None:
    proxy = start()
    proxy.reset_counts()
    with pytest.raises(pgdbpool.SettingError, match=message), handler("auto", settings=settings):
        pass
    assert proxy.round_trips == 0
    if "twice" in message:
        message = "the same setting as"
    elif "maybe" in message:
        message = "groups.auto.settings.transaction_READ_only: must be on or off, not 'maybe'"
    with pytest.raises(pgdbpool.ConfigError, match=message):
        start(settings=settings)


# Types.


def register_types(conn: psycopg.Connection[Any]) -> None:
    """As each adapter's documentation says, and as pgvector's register_vector does."""
    for info, register in (
        (TypeInfo.fetch(conn, "hstore"), register_hstore),
        (EnumInfo.fetch(conn, "mood"), register_enum),
        (CompositeInfo.fetch(conn, "point3"), register_composite),
        (RangeInfo.fetch(conn, "timerange"), register_range),
    ):
        assert info is not None
        register(info, conn)  # type: ignore[operator]


TYPED = (
    "SELECT '\"a\"=>\"1\"'::hstore AS h, 'happy'::mood AS m, ROW(1, 2, 3)::point3 AS p,"
    " timerange('10:00', '11:00') AS r"
)


def check_types(row: Any, registered: bool) -> None:
    if registered:
        assert row["h"] == {"a": "1"}
        assert row["m"].name == "happy"
        assert (row["p"].x, row["p"].z) == (1, 3)
        assert isinstance(row["r"], Range)
    else:
        assert [type(value) for value in row] == [str] * 4


@pytest.fixture
def types(admin: psycopg.Connection[Any]) -> None:
    available = admin.execute("SELECT FROM pg_available_extensions WHERE name = 'hstore'").fetchall()
    # Without the extension's files: a type of that name whose one value is written as hstore writes it.
    admin.execute("CREATE EXTENSION hstore" if available else """CREATE TYPE hstore AS ENUM ('"a"=>"1"')""")
    admin.execute("CREATE TYPE mood AS ENUM ('happy', 'sad')")
    admin.execute("CREATE TYPE point3 AS (x int, y int, z int)")
    admin.execute("CREATE TYPE timerange AS RANGE (subtype = time)")


@pytest.mark.parametrize("group", GROUPS)
def test_types_that_configure_registers_are_there_for_every_block(
    start: Any, types: None, group: str
) -> None:
    def configure(conn: psycopg.Connection[Any]) -> None:
        register_types(conn)
        with conn.pipeline():
            conn.execute("SELECT 1")
        with conn.transaction(force_rollback=True), conn.transaction():
            conn.execute("INSERT INTO t VALUES (1)")

    start(configure=configure)
    for _ in range(2):
        with handler(group) as db:
            check_types(db.fetchrow(TYPED), registered=True)
            assert db.fetchval("SELECT count(*) FROM t") == 0
            assert db.connection.adapters


@pytest.mark.parametrize("group", GROUPS)
def test_types_that_a_block_registers_end_with_it(start: Any, types: None, group: str) -> None:
    start()
    with handler(group) as db:
        register_types(db.connection)
        check_types(db.fetchrow(TYPED), registered=True)
    with handler(group) as db:
        check_types(db.fetchrow(TYPED), registered=False)


# A connection that was lost.


def in_transaction(conn: Any) -> None:
    with conn.transaction():
        pass


def copy_over(cursor: Any) -> None:
    with cursor.copy("COPY t (i) FROM STDIN"):
        pass


# What the connection, or a cursor of it, may be asked.
ASKED: dict[str, Callable[[Any, Any], Any]] = {
    "rollback": lambda conn, cursor: conn.rollback(),
    "commit": lambda conn, cursor: conn.commit(),
    "transaction": lambda conn, cursor: in_transaction(conn),
    "pipeline": lambda conn, cursor: conn.pipeline().__enter__(),
    "autocommit": lambda conn, cursor: conn.set_autocommit(False),
    "read_only": lambda conn, cursor: conn.set_read_only(True),
    "notifies": lambda conn, cursor: list(conn.notifies(timeout=0.1)),
    "execute": lambda conn, cursor: cursor.execute("SELECT 1"),
    "several": lambda conn, cursor: cursor.execute("SELECT 1; SELECT 2"),
    "utility": lambda conn, cursor: cursor.execute("VACUUM"),
    "executemany": lambda conn, cursor: cursor.executemany("SELECT %s", [(1,)]),
    "stream": lambda conn, cursor: list(cursor.stream("SELECT 1")),
    "copy": lambda conn, cursor: copy_over(cursor),
    "psycopg's": lambda conn, cursor: psycopg.ClientCursor(conn).execute("SELECT 1"),
}


@pytest.mark.parametrize("group", ["auto", "auto_t"])
def test_an_autocommit_block_goes_on_after_a_loss_for_each_kind_of_use(
    start: Any, admin: Any, group: str
) -> None:
    start()
    for i, (what, ask) in enumerate(ASKED.items()):
        with handler(group) as db:
            conn, cursor = db.connection, db.connection.cursor()
            kill_backends(admin, pid_of(db))
            with pytest.raises(pgdbpool.ConnectionLostError):
                db.query("SELECT 1")
            with pytest.raises(psycopg.Error) as caught:
                ask(conn, cursor)
            assert not getattr(caught.value, "maybe_committed", False), what
            assert not getattr(caught.value, "maybe_executed", False), what
            db.query("INSERT INTO t VALUES (%s)", (i,))
        assert rows(admin)[-1] == i, what


def test_a_lost_transaction_stays_lost_when_the_lost_connection_is_asked_to_commit(
    start: Any, admin: Any
) -> None:
    start()
    with pytest.raises(pgdbpool.TransactionAbortedError), handler("manual") as db:
        db.query("INSERT INTO t VALUES (1)")
        conn = db.connection
        kill_backends(admin, pid_of(db))
        with pytest.raises(pgdbpool.ConnectionLostError):
            db.query("INSERT INTO t VALUES (2)")
        with pytest.raises(pgdbpool.ConnectionLostError) as caught:
            conn.commit()
        assert not caught.value.maybe_committed
        db.query("INSERT INTO t VALUES (3)")
    assert rows(admin) == []


# What a block sees at the client.


def seen(conn: psycopg.Connection[Any]) -> tuple[Any, ...]:
    return str(conn.info.timezone), conn.info.parameter_status("DateStyle")


@pytest.mark.parametrize("reset", ["auto", "always"])
@pytest.mark.parametrize("group", GROUPS)
def test_a_block_sees_its_own_settings_at_the_client_before_its_first_statement(
    start: Any, admin: Any, group: str, reset: str
) -> None:
    admin.execute(
        "CREATE FUNCTION move() RETURNS text LANGUAGE sql AS $$"
        " SELECT set_config('TimeZone', 'Asia/Tokyo', false) || set_config('DateStyle', 'SQL, DMY', false) $$"
    )
    looks: list[Any] = []
    statement = (
        "SELECT move()" if reset == "always" else "SET TimeZone = 'Asia/Tokyo'; SET DateStyle = 'SQL, DMY'"
    )
    proxy = start(reset=reset, on_checkout=lambda conn: looks.append(seen(conn)))
    clean = None
    for _ in range(2):
        with handler(group) as db:
            clean = clean or seen(db.connection)
            assert seen(db.connection) == clean
            for one in statement.split(";"):
                db.query(one)
        proxy.reset_counts()
        with handler(group) as db:
            assert seen(db.connection) == clean
            assert db.fetchval("SHOW TimeZone") == clean[0]
        assert proxy.round_trips == 2 + group.startswith("manual")
        proxy.reset_counts()
        with handler(group) as db:  # the last one has changed nothing that shows
            assert seen(db.connection) == clean
            assert db.fetchval("SHOW TimeZone") == clean[0]
        assert proxy.round_trips == 1 + group.startswith("manual")
    assert looks == [clean] * len(looks)


def test_a_connection_that_is_lost_while_it_is_cleaned_is_replaced(start: Any, admin: Any) -> None:
    proxy = start(settings={"application_name": "pgdbpool"})
    with handler("auto") as db:
        pid = pid_of(db)
        db.query("SET TimeZone = 'Asia/Tokyo'")
    with handler("auto") as db:
        kill_backends(admin, pid)
        assert db.connection.info.backend_pid != pid
        assert db.fetchval("SELECT 1") == 1
    assert proxy


@pytest.mark.parametrize("group", GROUPS)
def test_a_session_is_lost_with_the_servers_last_message_before_the_end_of_the_stream(
    start: Any, admin: Any, group: str
) -> None:
    start()
    for _ in range(10):
        with handler(group) as db:
            pid, readable = pid_of(db), select.poll()
            readable.register(db.connection.pgconn.socket, select.POLLIN)
        admin.execute("SELECT pg_terminate_backend(%s)", (pid,))
        assert readable.poll(5000)  # the process of the backend takes a moment longer to end
        with handler(group) as db:
            assert pid_of(db) != pid

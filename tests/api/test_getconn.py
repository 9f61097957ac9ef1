"""A connection that is out of its pool without a `with` block: `Connection.getconn` and `putconn`."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row, tuple_row
from psycopg.types.string import TextLoader
from support import config, in_child, kill_backends, server, wait_for

import pgdbpool
from pgdbpool import Connection, Handler
from pgdbpool.cluster import Cluster

SHOWN = "SELECT current_setting('app.tenant', true)"
GROUPS = ["auto", "manual"]


@pytest.fixture
def start(known_cluster: Cluster, mode: str, proxy_to: Any) -> Iterator[Callable[..., Any]]:
    """Initialise groups of one connection behind a proxy, and return that."""
    proxy = proxy_to(known_cluster.primary)

    def init(**changes: Any) -> Any:
        auto = {"connection_count": 1, "timeout": 3, "row_factory": "tuple", **changes}
        tenant = {**auto, "tenant": {"setting": "app.tenant", "verify": "off", "required": False}}
        groups = {
            "auto": auto,
            "manual": {**auto, "autocommit": False},
            "auto_t": tenant,
            "manual_t": {**tenant, "autocommit": False},
        }
        entry = server(known_cluster.primary, port=proxy.port)
        Connection.init(config([entry], mode, **groups))
        proxy.reset_counts()
        return proxy

    yield init
    Connection.reset()


def in_use(group: str) -> int:
    return Connection.status().groups[group].in_use


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("end", ["putconn", "close", "with"])
def test_a_connection_goes_back_and_is_lent_again(start: Any, group: str, end: str) -> None:
    start()
    pids = []
    for _ in range(2):
        conn = Connection.getconn(group)
        assert isinstance(conn, psycopg.Connection)
        assert in_use(group) == 1
        if end == "with":
            with conn:
                pids.append(conn.execute("SELECT pg_backend_pid()").fetchone())
        else:
            pids.append(conn.execute("SELECT pg_backend_pid()").fetchone())
            Connection.putconn(conn) if end == "putconn" else conn.close()
        assert in_use(group) == 0
    assert pids[0] == pids[1]


def test_a_returned_connection_refuses_and_says_so(start: Any) -> None:
    start()
    conn = Connection.getconn("manual")
    cursor = conn.cursor()
    conn.close()
    assert conn.closed
    conn.close()
    for use in (conn.cursor, conn.commit, conn.rollback, lambda: conn.execute("SELECT 1")):
        with pytest.raises(pgdbpool.BlockClosedError, match="already given back"):
            use()
    with pytest.raises(psycopg.Error):
        cursor.execute("SELECT 1")
    with pytest.raises(pgdbpool.BlockClosedError, match="already given back"):
        Connection.putconn(conn)
    with Handler("manual") as db:
        assert db.query("SELECT 1").fetchone()[0] == 1


def test_only_a_connection_of_getconn_can_be_put_back(start: Any) -> None:
    start()
    with Handler("auto") as db, pytest.raises(ValueError, match="not taken with Connection"):
        Connection.putconn(db.connection)


def test_an_argument_that_is_none_is_refused(start: Any) -> None:
    start()
    with pytest.raises(TypeError, match="connect_timeout"):
        Connection.getconn("auto", connect_timeout=3)  # type: ignore[call-arg]
    assert in_use("auto") == 0


@pytest.mark.parametrize("group", GROUPS)
def test_a_forked_child_closes_a_connection_of_its_parent_without_touching_it(start: Any, group: str) -> None:
    start()
    conn = Connection.getconn(group)
    conn.execute("SELECT 1")

    def child() -> None:
        with pytest.raises(pgdbpool.BlockClosedError, match="parent"):
            conn.execute("SELECT 1")
        conn.close()
        Connection.putconn(conn)
        with Connection.getconn(group) as own:
            assert own.execute("SELECT 2").fetchone() == (2,)

    in_child(child)
    assert conn.execute("SELECT 3").fetchone() == (3,)
    conn.close()
    assert in_use(group) == 0


@pytest.mark.parametrize("group", GROUPS)
def test_attributes_can_be_set_on_a_connection_that_goes_on_elsewhere(
    start: Any, known_cluster: Cluster, group: str
) -> None:
    start()
    with Connection.getconn(group) as conn:
        conn.autocommit = False
        conn.execute("SELECT 1")
        with known_cluster.primary.connect() as admin:
            kill_backends(admin)
        with pytest.raises(pgdbpool.ConnectionLostError):
            conn.execute("SELECT 2")
        with pytest.raises(psycopg.ProgrammingError, match="autocommit"):
            conn.autocommit = True  # the lost transaction is still open
        conn.rollback()
        conn.autocommit = True
        conn.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        assert conn.execute("SELECT 3").fetchone() == (3,)
        assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        with conn.transaction():
            assert conn.execute("SHOW transaction_isolation").fetchone() == ("serializable",)


@pytest.mark.parametrize("group", ["auto", "manual", "auto_t", "manual_t"])
def test_units_of_work_without_a_tenant_share_one_binding(start: Any, group: str) -> None:
    start(settings={"work_mem": "5MB"})
    bindings = set()
    for _ in range(2):
        with Connection.getconn(group) as conn:
            for _ in range(2):
                assert conn.execute("SHOW work_mem").fetchone() == ("5MB",)
                conn.commit()
                bindings.add(conn.stay.binding)
    assert len(bindings) == 1


@pytest.mark.parametrize("group", GROUPS)
def test_a_server_that_is_away_is_waited_for(start: Any, group: str) -> None:
    proxy = start()
    conn = Connection.getconn(group)
    conn.execute("SELECT 1")
    conn.rollback()
    proxy.stop()
    with pytest.raises(pgdbpool.DBOfflineError):
        Connection.getconn("auto_t", timeout=0.1)
    with pgdbpool.deadline(0.1), pytest.raises(pgdbpool.DBConnectionError):
        Connection.getconn("auto_t")
    with ThreadPoolExecutor() as pool:
        pool.submit(lambda: (time.sleep(0.3), proxy.start()))
        with Connection.getconn("manual_t", timeout=5) as other:
            assert other.execute("SELECT 2").fetchone() == (2,)
    assert conn.execute("SELECT 3").fetchone() == (3,)
    conn.close()


def test_a_connection_whose_owner_is_gone_is_replaced_and_its_place_named(start: Any) -> None:
    class Owner:
        pass

    start()
    owner = Owner()
    conn = Connection.getconn("manual")
    conn.belong_to(owner)
    conn.execute("SELECT 1")
    owners = [owner]
    del owner
    with pytest.warns(ResourceWarning, match=r"owner of a connection.*test_getconn\.py"):
        owners.clear()
    assert in_use("manual") == 0
    with pytest.raises(pgdbpool.BlockClosedError):
        conn.execute("SELECT 1")
    with Handler("manual") as db:
        assert db.fetchval("SELECT 1") == 1


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("group", ["manual", "manual_t"])
def test_a_transaction_of_n_statements_takes_n_and_one_round_trips(start: Any, group: str, n: int) -> None:
    proxy = start(prepare_threshold=None)
    with pgdbpool.tenant("a" if group == "manual_t" else None), Connection.getconn(group) as conn:
        for _ in range(2):
            proxy.reset_counts()
            for _ in range(n):
                conn.execute("SELECT 1")
            conn.commit()
            assert proxy.syncs == n + 1
        proxy.reset_counts()
    assert proxy.syncs == 0


def test_transactions_that_are_rolled_back_come_to_execute_prepared_statements(start: Any) -> None:
    proxy = start()
    for _ in range(8):
        conn = Connection.getconn("manual")
        conn.execute("SELECT 1 + %s", (1,))
        proxy.reset_counts()
        conn.close()
        assert proxy.round_trips == 1
    with Handler("manual") as db:
        assert (
            db.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE 'SELECT 1 +%'") == 1
        )


@pytest.mark.parametrize("cursor", ["own", "client", "many"])
def test_a_definition_that_is_rolled_back_takes_the_statements_prepared_under_it_along(
    start: Any, cursor: str
) -> None:
    start()
    with Handler("auto") as db:
        db.query("DROP TABLE IF EXISTS defined")
        db.query("CREATE TABLE defined (a int)")
    for columns in (2, 1):
        conn = Connection.getconn("manual")
        if columns == 2:
            change = "ALTER TABLE defined ADD b int"
            if cursor == "many":
                conn.cursor().executemany(change, [()])
            else:
                (psycopg.ClientCursor(conn) if cursor == "client" else conn.cursor()).execute(change)
        conn.execute("SELECT 1")  # the first statement of a transaction could be sent again
        for _ in range(8):
            assert len(conn.execute("SELECT * FROM defined").description or ()) == columns
        conn.close()
    with Handler("auto") as db:
        db.query("DROP TABLE defined")


def test_a_with_block_commits_at_a_clean_end_and_rolls_back_otherwise(start: Any) -> None:
    start()
    with Connection.getconn("manual") as conn:
        conn.execute("CREATE TABLE t (i int)")
    with pytest.raises(RuntimeError), Connection.getconn("manual") as conn:
        conn.execute("INSERT INTO t VALUES (1)")
        raise RuntimeError
    assert Connection.fetchval("auto", "SELECT count(*) FROM t") == 0
    conn = Connection.getconn("manual")
    conn.execute("INSERT INTO t VALUES (1)")
    conn.close()
    assert Connection.fetchval("auto", "SELECT count(*) FROM t") == 0
    assert in_use("manual") == 0


@pytest.mark.parametrize("group", ["auto_t", "manual_t"])
@pytest.mark.parametrize("way", ["execute", "many", "stream", "named", "foreign", "pipeline", "transaction"])
def test_each_unit_of_work_takes_the_tenant_of_now(start: Any, group: str, way: str) -> None:
    start()
    conn = Connection.getconn(group)
    for tenant in ("a", "b", None, "c"):
        with pgdbpool.tenant(tenant):
            assert shown(conn, way) == (tenant or "",)
            conn.commit()
    conn.close()
    with Handler(group) as db:
        assert db.query(SHOWN).fetchone()[0] == ""


def shown(conn: Any, way: str) -> Any:
    if way == "many":
        cursor = conn.cursor()
        cursor.executemany(SHOWN + " WHERE %s", [(True,)], returning=True)
        return cursor.fetchone()
    if way == "stream":
        return next(iter(list(conn.cursor().stream(SHOWN))))
    if way == "named":
        with conn.transaction(), conn.cursor("c") as cursor:
            cursor.execute(SHOWN)
            return cursor.fetchone()
    if way == "foreign":
        return psycopg.ClientCursor(conn).execute(SHOWN).fetchone()
    if way == "pipeline":
        with conn.pipeline():
            return conn.execute(SHOWN).fetchone()
    if way == "transaction":
        with conn.transaction():
            return conn.execute(SHOWN).fetchone()
    return conn.execute(SHOWN).fetchone()


def test_a_transaction_keeps_the_tenant_that_it_began_with(start: Any) -> None:
    start()
    with Connection.getconn("manual_t") as conn:
        with pgdbpool.tenant("a"):
            conn.execute("SELECT 1")
        assert conn.execute(SHOWN).fetchone() == ("a",)
        with pgdbpool.tenant("b"), pytest.raises(pgdbpool.TenantConflictError, match="keeps it"):
            conn.execute("SELECT 1")
        with pytest.raises(psycopg.ProgrammingError):
            conn.tenant = "b"
        conn.rollback()
        conn.tenant = "b"
        assert conn.execute(SHOWN).fetchone() == ("b",)


def test_a_required_tenant_is_asked_for_by_the_first_statement(start: Any) -> None:
    start(tenant={"setting": "app.tenant", "verify": "off", "required": True})
    with Connection.getconn("manual") as conn:
        with pytest.raises(pgdbpool.TenantRequiredError):
            conn.execute("SELECT 1")
        with pgdbpool.tenant("a"):
            assert conn.execute(SHOWN).fetchone() == ("a",)


@pytest.mark.parametrize("group", GROUPS)
def test_a_connection_that_was_lost_idle_is_replaced(start: Any, known_cluster: Cluster, group: str) -> None:
    start()
    with known_cluster.primary.connect() as admin, Connection.getconn(group) as conn:
        conn.row_factory = tuple_row
        conn.mine = "kept"  # type: ignore[attr-defined]
        pid = conn.info.backend_pid
        conn.commit()
        kill_backends(admin, pid)
        assert conn.execute("SELECT pg_backend_pid()").fetchone() != (pid,)
        assert conn.mine == "kept"  # type: ignore[attr-defined]
        assert in_use(group) == 1
    with Handler(group) as db:
        assert not hasattr(db.connection, "mine")


def test_the_state_of_a_lost_session_is_not_dropped_silently(start: Any, known_cluster: Cluster) -> None:
    start()
    with known_cluster.primary.connect() as admin, Connection.getconn("auto") as conn:
        conn.execute("SET search_path TO elsewhere")
        kill_backends(admin, conn.info.backend_pid)
        # The server's last word may be there before the end of the stream: then the statement finds it.
        with pytest.raises(pgdbpool.ConnectionLostError, match=r"set up in its session|terminating"):
            conn.execute("SELECT 1")
        with pytest.raises(pgdbpool.ConnectionLostError, match="set up in its session"):
            conn.execute("SELECT 1")
        assert conn.closed
    assert in_use("auto") == 0


def test_the_first_statement_of_a_manual_unit_of_work_is_sent_again(start: Any) -> None:
    proxy = start()
    with Connection.getconn("manual") as conn:
        cursor = conn.cursor()
        proxy.cut_before(b"fortytwo")
        assert cursor.execute("SELECT 42 AS fortytwo").fetchone() == (42,)
        assert proxy.cuts == 1
    assert Connection.status().groups["manual"].retries == 1


def test_a_later_statement_is_not_and_rollback_begins_another(start: Any) -> None:
    proxy = start()
    with Connection.getconn("manual") as conn:
        conn.execute("SELECT 1")
        proxy.cut_before(b"fortytwo")
        with pytest.raises(pgdbpool.ConnectionLostError):
            conn.execute("SELECT 42 AS fortytwo")
        assert conn.closed
        for use in (conn.commit, lambda: conn.execute("SELECT 1")):
            with pytest.raises(pgdbpool.TransactionAbortedError, match="rollback"):
                use()
        conn.rollback()
        assert conn.execute("SELECT 1").fetchone() == (1,)


def test_autocommit_can_be_switched_and_comes_back(start: Any) -> None:
    start()
    with Connection.getconn("manual") as conn:
        assert not conn.autocommit
        conn.autocommit = True
        conn.execute("CREATE TABLE t (i int)")
        conn.execute("CREATE INDEX CONCURRENTLY ON t (i)")
        conn.autocommit = False
        conn.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        assert conn.execute("SHOW transaction_isolation").fetchone() == ("serializable",)
    with Connection.getconn("manual") as conn:
        assert not conn.autocommit
        assert conn.isolation_level is None
        assert conn.execute("SHOW transaction_isolation").fetchone() == ("read committed",)


@pytest.mark.parametrize("group", GROUPS)
def test_all_that_was_set_on_a_connection_ends_with_its_stay(start: Any, group: str) -> None:
    start()
    conn = Connection.getconn(group)
    conn.row_factory, conn.cursor_factory = dict_row, psycopg.ClientCursor
    conn.prepare_threshold, conn.prepared_max = 1, 7
    conn.isolation_level, conn.read_only = psycopg.IsolationLevel.SERIALIZABLE, True
    conn.adapters.register_loader("int4", TextLoader)
    conn.add_notice_handler(print)
    conn.add_notify_handler(print)
    conn.mark_of_mine = 1  # type: ignore[attr-defined]
    assert conn.execute("SELECT 1 AS n, current_setting('transaction_isolation') AS level").fetchone() == {
        "n": "1",
        "level": "serializable" if group == "manual" else "read committed",
    }
    Connection.putconn(conn)
    with Connection.getconn(group) as conn:
        assert (conn.prepare_threshold, conn.prepared_max, conn.isolation_level, conn.read_only) == (
            5, 100, None, None,
        )  # fmt: skip
        assert not conn._notice_handlers
        assert not conn._notify_handlers
        assert not hasattr(conn, "mark_of_mine")
        assert conn.execute("SELECT 1, current_setting('transaction_isolation')").fetchone() == (
            1,
            "read committed",
        )


def test_what_reads_the_rows_of_prepared_statements_outlasts_the_stay(start: Any) -> None:
    start()
    readers = []
    for _ in range(9):
        with Connection.getconn("auto") as conn:
            assert conn.execute("SELECT 1").fetchone() == (1,)
            readers.append(list(conn.readers.values()))
    assert readers[-1][0] is readers[-2][0] is not None


def test_session_state_is_cleaned_for_the_next_block(start: Any) -> None:
    for reset in ("auto", "always"):
        start(reset=reset)
        with Connection.getconn("auto") as conn:
            if reset == "auto":
                conn.execute("SET search_path TO elsewhere")
                psycopg.ClientCursor(conn).execute("CREATE TEMP TABLE mine ()")
            else:
                conn.pgconn.exec_(b"SET search_path TO elsewhere")
        with Handler("auto") as db:
            assert db.query("SHOW search_path").fetchone()[0] != "elsewhere"
            assert db.query("SELECT to_regclass('pg_temp.mine')").fetchone()[0] is None


def test_only_work_over_libpq_itself_is_cleaned_unseen(start: Any) -> None:
    start()
    for work in ("none", "pgconn", "info", "text", "text of info"):
        with Connection.getconn("auto") as conn:
            conn.execute("SELECT 1")
            conn.rollback()
            assert conn.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
            if work.startswith("text"):  # which has no module
                asked = "conn.info" if "info" in work else "conn"
                exec(asked + ".pgconn.exec_(b'SET search_path TO elsewhere')", {"conn": conn})
            elif work != "none":
                libpq = conn.pgconn if work == "pgconn" else conn.info.pgconn
                libpq.exec_(b"SET search_path TO elsewhere")
        with Handler("auto") as db:
            assert db._conn is not None
            assert db._conn.stale is (work != "none")
            assert db.query("SHOW search_path").fetchone()[0] != "elsewhere"


def test_a_leak_names_the_line_that_took_the_connection(start: Any, caplog: Any, mode: str) -> None:
    start(leak_after=0.1)
    caplog.set_level(logging.WARNING, "pgdbpool")
    conn = Connection.getconn("auto")
    line = sys._getframe().f_lineno - 1

    def told() -> bool:
        if mode == "non-threaded":
            with Handler("manual"):
                pass
        return f"test_getconn.py:{line}" in caplog.text

    wait_for(told)
    conn.close()


def test_frames_of_named_packages_are_not_the_callers(start: Any) -> None:
    start()
    source = "def take(Connection):\n    return Connection.getconn('auto', skip=('framework',))\n"
    framework: dict[str, Any] = {"__name__": "framework.inside"}
    exec(compile(source, "framework.py", "exec"), framework)
    conn = framework["take"](Connection)
    assert conn.stay.place[0].co_filename == __file__
    conn.close()


def test_an_exhausted_group_names_its_holders(start: Any) -> None:
    start(timeout=0.05)
    with Connection.getconn("auto"), pytest.raises(pgdbpool.PoolTimeout, match="test_getconn"):
        Connection.getconn("auto")


def test_two_phase_transactions_work(start: Any) -> None:
    start()
    with Connection.getconn("manual") as conn:
        conn.tpc_begin(conn.xid(1, "x", "y"))
        conn.execute("SELECT 1")
        conn.tpc_rollback()
        assert conn.execute("SELECT 1").fetchone() == (1,)

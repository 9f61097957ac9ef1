"""Behind PgBouncer in transaction mode nothing counts on the session, and nothing is left in one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import psycopg
import pytest
from isolation import Plan, run
from pgbouncer import PROGRAM, PgBouncer
from proxy import Proxy
from support import SURVIVES_INTERRUPTIONS, config, server, wait_for

import pgdbpool
from pgdbpool import Connection, ConnectionLostError, Handler
from pgdbpool.cluster import Cluster

pytestmark = pytest.mark.slow

A, B = "a", "b"
MODES = ["threaded", "non-threaded"]
GROUPS = ["auto", "manual"]

with_pgbouncer = pytest.mark.skipif(PROGRAM is None, reason="PgBouncer is not installed")


@pytest.fixture
def bouncer(known_cluster: Any) -> Iterator[Callable[..., PgBouncer]]:
    """A function that starts PgBouncer before a primary that has a table of two tenants."""
    known_cluster.primary.execute("""
        CREATE ROLE app LOGIN;
        CREATE TABLE accounts (id serial PRIMARY KEY, tenant text NOT NULL, balance int DEFAULT 100);
        INSERT INTO accounts (tenant) SELECT t FROM unnest(ARRAY['a', 'b']) t, generate_series(1, 3);
        ALTER TABLE accounts ENABLE ROW LEVEL SECURITY;
        ALTER TABLE accounts FORCE ROW LEVEL SECURITY;
        CREATE POLICY own ON accounts USING (tenant = NULLIF(current_setting('app.tenant', true), ''));
        GRANT ALL ON accounts TO app;
    """)
    running: list[PgBouncer] = []

    def start(pool_size: int = 1, **settings: object) -> PgBouncer:
        running.append(PgBouncer(known_cluster.primary, ("app",), pool_size, **settings).__enter__())
        return running[-1]

    yield start
    Connection.reset()
    for each in running:
        each.__exit__()


def init(address: Any, mode: str = "threaded", pooler: str | None = "transaction", **changes: Any) -> None:
    """Initialise groups `auto` and `manual` at an address."""
    entry = server(address, user="app", pooler=pooler, query_timeout=changes.pop("query_timeout", 5000))
    tenant = {"setting": "app.tenant", "required": False}
    auto = {"connection_count": 3, "min_size": 1, "timeout": 5, "tenant": tenant, **changes}
    Connection.init(config([entry], mode, auto=auto, manual={**auto, "autocommit": False}))


def seen(db: Handler) -> Any:
    return db.query(
        "SELECT array_agg(DISTINCT tenant), current_setting('app.tenant') FROM accounts"
    ).fetchone()


@SURVIVES_INTERRUPTIONS
@with_pgbouncer
def test_tenants_are_kept_apart_over_two_sessions_that_all_share(known_cluster: Any) -> None:
    for _ in range(3):
        with PgBouncer(known_cluster.primary, ("postgres", "app"), pool_size=2) as pooled:
            plan = Plan("threaded", blocks=600, workers=6, tenants=20, seed=1, pooler=pooled.port)
            report = run(plan, known_cluster.primary)
            if not pooled.has_failed():  # an interrupt can come into a cancel, which ends PgBouncer 1.18
                break
    assert report.violations == []
    assert report.events["blocks"] == 600
    assert report.events["statements checked"] > 1000


def copy_in(db: Handler, kill: Any) -> None:
    with db.copy("COPY copied FROM STDIN") as copy:
        copy.write_row((1,))
        kill()


def copy_out(db: Handler, kill: Any) -> None:
    with db.copy("COPY (SELECT generate_series(1, 10000000)) TO STDOUT") as copy:
        copy.read()
        kill()
        for _ in copy:
            pass


def begin_to_copy(db: Handler, kill: Any) -> None:
    kill()
    with db.copy("COPY copied TO STDOUT"):
        pass


@with_pgbouncer
@pytest.mark.parametrize(
    ("lose", "group"),
    # In autocommit the pooler would have taken another session for a COPY that has not begun.
    [*product([copy_in, copy_out], GROUPS), (begin_to_copy, "manual")],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_session_that_its_server_ends_is_lost_whatever_the_pooler_adds(
    bouncer: Any, known_cluster: Any, mode: str, lose: Any, group: str
) -> None:
    init(bouncer(), mode)
    known_cluster.primary.execute("CREATE TABLE copied (i int); GRANT ALL ON copied TO app")
    with pytest.raises(ConnectionLostError, match="terminating connection"), Handler(group) as db:
        pid = db.fetchval("SELECT pg_backend_pid()")
        lose(db, lambda: known_cluster.primary.execute(f"SELECT pg_terminate_backend({pid}, 5000)"))
    with Handler(group) as db:
        assert db.fetchval("SELECT count(*) FROM copied") == 0


@with_pgbouncer
@pytest.mark.parametrize("mode", MODES)
def test_a_new_connection_whose_first_session_was_just_ended_gets_another(bouncer: Any, mode: str) -> None:
    pooled = bouncer()
    with Proxy(pooled.host, pooled.port) as proxy:
        init(proxy_address(proxy), mode, min_size=0)
        proxy.cut_after(b"pg_is_in_recovery")
        for _ in range(2):
            assert Connection.fetchval("auto", "SELECT 1") == 1
        Connection.expire("auto")
        proxy.cut_before(b"pg_is_in_recovery")
        assert Connection.fetchval("auto", "SELECT 1") == 1
        Connection.close()


@with_pgbouncer
@pytest.mark.parametrize("mode", MODES)
def test_it_takes_the_round_trips_that_it_takes_without(bouncer: Any, known_cluster: Any, mode: str) -> None:
    counts = {}
    for pooler, address in (("transaction", bouncer()), (None, known_cluster.primary)):
        with Proxy(address.host, address.port) as proxy:
            init(proxy_address(proxy), mode, pooler, prepare_threshold=None)
            counts[pooler] = list(count(proxy))
            Connection.close()
    assert counts["transaction"] == counts[None] == [1, 3, 2, 4, 5, 2, 1]


def count(proxy: Proxy) -> Iterator[int]:
    """Yield how many round trips some blocks take."""
    for group, n in (("auto", 1), ("auto", 3), ("manual", 1), ("manual", 3)):
        proxy.reset_counts()
        with Handler(group, tenant=A) as db:
            for _ in range(n):
                assert seen(db) == ([A], A)
        yield proxy.syncs
    proxy.reset_counts()
    with Handler("manual", tenant=A) as db:
        db.query("UPDATE accounts SET balance = balance + 1")
        db.commit()
        for _ in range(2):
            assert seen(db) == ([A], A)
    yield proxy.syncs
    proxy.reset_counts()
    with Handler("auto", tenant=A, settings={"work_mem": "5MB"}) as db:
        assert db.query("SHOW work_mem").fetchone()[0] == "5MB"
        assert seen(db) == ([A], A)
    yield proxy.syncs
    proxy.reset_counts()
    with Handler("auto") as db:
        assert seen(db) == (None, "")
    yield proxy.syncs


def proxy_address(proxy: Proxy) -> Any:
    """Return the proxy as what `support.server` takes for an address."""

    class Address:
        host, port = "127.0.0.1", proxy.port

    return Address


@with_pgbouncer
@pytest.mark.parametrize("mode", MODES)
def test_a_block_is_a_transaction(bouncer: Any, mode: str) -> None:
    init(bouncer(), mode)
    with Handler("manual", tenant=A) as db:
        db.query("UPDATE accounts SET balance = 1")
        db.rollback()
        db.query("UPDATE accounts SET balance = balance + 5")
    with pytest.raises(psycopg.errors.DivisionByZero), Handler("manual", tenant=A) as db:
        db.query("UPDATE accounts SET balance = 1")
        db.query("SELECT 1 / 0")
    with Handler("auto", tenant=A) as db, db.transaction():
        db.query("UPDATE accounts SET balance = balance + 5")
        with pytest.raises(psycopg.errors.InsufficientPrivilege), db.transaction():
            db.query("INSERT INTO accounts (tenant) VALUES ('b')")
    for tenant, balance in ((A, 110), (B, 100)):
        with Handler("manual", tenant=tenant) as db:
            assert {row["balance"] for row in db.query("SELECT balance FROM accounts")} == {balance}


@with_pgbouncer
@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_a_block_is_left_in_the_session_that_others_get(bouncer: Any, mode: str) -> None:
    pooled = bouncer()
    init(pooled, mode, settings={"work_mem": "5MB"}, query_timeout=3000)
    with pooled.connect() as other:
        pid, *before = other.execute(LEFT).fetchone()
        for group in GROUPS:
            for _ in range(10):
                with Handler(group, tenant=A) as db:
                    assert seen(db) == ([A], A)
                    assert db.query(LEFT).fetchone() == (pid, A, "3s", "5MB", 0)  # one session for all
                    db.query("SELECT %s; SELECT %s", (1, 2))
                    db.connection.cursor().executemany("SELECT %s", [(1,), (2,)])
                assert other.execute(LEFT).fetchone() == (pid, *["", *before[1:]])


LEFT = """SELECT pg_backend_pid(), coalesce(current_setting('app.tenant', true), ''),
                 current_setting('statement_timeout'), current_setting('work_mem'),
                 (SELECT count(*)::int FROM pg_prepared_statements)"""


@with_pgbouncer
def test_statements_are_prepared_only_on_request(bouncer: Any) -> None:
    pooled = bouncer()
    init(pooled, prepare_threshold=1, connection_count=1)
    with pooled.connect() as other:
        with Handler("auto", tenant=A) as db:
            for _ in range(3):
                db.query("SELECT 1")
        assert other.execute(LEFT).fetchone()[-1] > 0


STAYS = [
    "SET ROLE app",
    "SET SESSION AUTHORIZATION app",
    "SET search_path = secret",
    "/* x */ set work_mem = '7MB'",
    "SELECT 1; SET work_mem = '7MB'",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
    "RESET search_path",
    "SELECT pg_advisory_lock(1)",
    "SELECT pg_try_advisory_lock_shared(1)",
    "LISTEN news",
    "CREATE TEMP TABLE mine (i int)",
    "CREATE TABLE pg_temp.mine (i int)",
    "SELECT 1 AS i INTO TEMPORARY mine",
    "PREPARE mine AS SELECT 1",
    "DECLARE mine CURSOR WITH HOLD FOR SELECT 1",
    "SELECT set_config('work_mem', '7MB', false)",
    "WITH x AS (SELECT pg_catalog.set_config('work_mem', upper('7mb'), false)) TABLE x",
    "DISCARD ALL",
    "SELECT setseed(0.5)",
]
PASSES = [
    "SET LOCAL work_mem = '7MB'",
    "SET TRANSACTION READ ONLY",
    "SET CONSTRAINTS ALL DEFERRED",
    "SELECT set_config('work_mem', '7MB', true)",
    "SELECT set_config('work_mem', upper('7mb'), /* here */ TRUE)",
    "SELECT pg_advisory_xact_lock(1)",
    "CREATE TEMP TABLE mine ON COMMIT DROP AS SELECT 1",
    "DECLARE mine CURSOR FOR SELECT 1",
    "SELECT 'SET x = 1; pg_advisory_lock(1)', \"temp\" FROM (SELECT 1 AS temp) AS x",
    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'",
]
HELD = """SELECT session_user, current_user, current_setting('search_path'), current_setting('work_mem'),
                 current_setting('default_transaction_read_only'),
                 (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'),
                 (SELECT count(*) FROM pg_listening_channels()), to_regclass('pg_temp.mine'),
                 (SELECT count(*) FROM pg_prepared_statements), (SELECT count(*) FROM pg_cursors)"""


@with_pgbouncer
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group", GROUPS)
def test_statements_that_would_stay_in_the_session_are_refused_with_a_remedy(
    bouncer: Any, mode: str, group: str
) -> None:
    pooled = bouncer()
    init(pooled, mode)
    with pooled.connect() as other:
        before = other.execute(HELD).fetchone()
        for statement in STAYS:
            for way in (
                lambda db, text: db.query(text),
                lambda db, text: db.connection.execute(text),
                lambda db, text: db.executemany(text, [()]),
                lambda db, text: list(db.cursor().stream(text)),
            ):
                with Handler(group) as db:
                    with pytest.raises(psycopg.NotSupportedError, match=r"pooler: transaction`.*: [a-z]+"):
                        way(db, statement)
                    assert db.fetchval("SELECT 1") == 1  # nothing was sent: the block goes on
            with pytest.raises(psycopg.NotSupportedError):
                Connection.execute(group, statement)
        with Handler(group) as db, db.transaction(), pytest.raises(psycopg.NotSupportedError):
            db.cursor("mine", withhold=True).execute("SELECT 1")
        assert other.execute(HELD).fetchone() == before


@with_pgbouncer
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group", GROUPS)
def test_effects_that_end_with_the_transaction_pass(bouncer: Any, mode: str, group: str) -> None:
    pooled = bouncer()
    init(pooled, mode)
    with pooled.connect() as other:
        before = other.execute(HELD).fetchone()
        for statement in PASSES:
            with Handler(group) as db, db.transaction():
                db.query(statement)
        with Handler(group, settings={"search_path": "pg_catalog", "work_mem": "9MB"}) as db:
            assert db.fetchval("SHOW work_mem") == "9MB"
        assert other.execute(HELD).fetchone() == before


@with_pgbouncer
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group", GROUPS)
def test_a_statement_has_its_time(bouncer: Any, mode: str, group: str) -> None:
    pooled = bouncer()
    init(pooled, mode, query_timeout="50ms")
    with pytest.raises(psycopg.errors.QueryCanceled), Handler(group, tenant=A) as db:
        db.query("SELECT pg_sleep(5)")
    with pytest.raises(psycopg.errors.QueryCanceled), Handler(group) as db:
        db.query("SELECT 1; SELECT pg_sleep(5)")
    with Handler(group, settings={"statement_timeout": "5s"}) as db:
        db.query("SELECT pg_sleep(0.1)")
    with pooled.connect() as other:
        assert other.execute("SHOW statement_timeout").fetchone() == ("0",)


@with_pgbouncer
def test_nothing_is_asked_for_at_start_up(bouncer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pooled = bouncer()
    monkeypatch.setenv("PGOPTIONS", "-c work_mem=7MB")
    with pytest.raises(psycopg.OperationalError, match="startup parameter"):
        pooled.connect()
    init(pooled)
    with Handler("auto", tenant=A) as db:
        assert seen(db) == ([A], A)


@with_pgbouncer
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ping", ["auto", "always"])
def test_a_restart_of_pgbouncer_costs_no_error(bouncer: Any, mode: str, ping: str) -> None:
    pooled = bouncer()
    init(pooled, mode, ping=ping, min_size=3)
    for _ in range(3):
        for group in GROUPS:
            for tenant in (A, B):
                with Handler(group, tenant=tenant) as db:
                    assert seen(db) == ([tenant], tenant)
        wait_for(
            lambda: all(
                group.idle == 3 or mode != "threaded" for group in Connection.status().groups.values()
            )
        )
        pooled.restart()


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("db.options", {"options": {"work_mem": "5MB"}}),
        ("db.session_tmp_buffer", {"session_tmp_buffer": 8}),
        ("db.conninfo", {"conninfo": "options='-c work_mem=5MB'"}),
        ("groups.g.sqlprepare", {}),
    ],
)
def test_session_features_are_refused_before_anything_is_opened(key: str, changes: dict[str, Any]) -> None:
    entry = {"host": "127.0.0.1", "name": "postgres", "pooler": "transaction", **changes}
    group = {"connection_count": 1, "sqlprepare": not changes}
    with pytest.raises(pgdbpool.ConfigError, match=key.replace(".", r"\.")) as caught:
        Connection.init({"db": entry, "groups": {"g": group}})
    assert [problem.path for problem in caught.value.problems] == [key]


@with_pgbouncer
@pytest.mark.parametrize("mode", MODES)
def test_writes_follow_the_primary_though_pgbouncer_reports_old_values(mode: str) -> None:
    with Cluster(standbys=1) as cluster:
        cluster.primary.execute("CREATE ROLE app LOGIN; CREATE TABLE t (i int); GRANT ALL ON t TO app")
        cluster.wait_in_sync()
        old, new = cluster.primary, cluster.standbys[0]
        with PgBouncer(old, ("app",), 4) as before_old, PgBouncer(new, ("app",), 4) as before_new:
            servers = [server(each, user="app", pooler="transaction") for each in (before_old, before_new)]
            write = {"target": "primary", "connection_count": 2, "timeout": 2}
            read = {"target": "standby", "connection_count": 1, "timeout": 2}
            Connection.init(config(servers, mode, write=write, read=read))
            try:
                labels = {
                    node: f"{each.host}:{each.port}" for node, each in ((old, before_old), (new, before_new))
                }
                assert writer() == labels[old]
                with Handler("read") as db:
                    assert db.endpoint == labels[new]
                old.kill()
                new.promote()
                wait_for(lambda: writer() == labels[new], what="writes on the new primary")
                old.rejoin(new)
                assert {writer() for _ in range(5)} == {labels[new]}
                # Back again: the connections that are open were told that their server is a primary.
                cluster.wait_in_sync()
                new.kill()
                old.promote()
                wait_for(lambda: writer() == labels[old], what="writes on the old primary")
                new.rejoin(old)
                assert {writer() for _ in range(5)} == {labels[old]}
            finally:
                Connection.reset()


def writer() -> str | None:
    """Write, and return where; None where that was refused."""
    try:
        with Handler("write") as db:
            db.query("INSERT INTO t VALUES (1)")
            return db.endpoint
    except pgdbpool.Error:
        return None


@with_pgbouncer
def test_a_statement_that_the_pooler_had_no_server_for_is_not_queued_twice(
    bouncer: Callable[..., PgBouncer], mode: str
) -> None:
    front = bouncer(pool_size=1, query_wait_timeout=1)
    init(front, mode)
    with front.connect("app") as busy:
        busy.execute("BEGIN")  # has the pooler's one session
        for group in GROUPS:
            with pytest.raises(pgdbpool.ConnectionLostError, match="query_wait_timeout") as caught:
                with Handler(group, tenant=A) as db:
                    db.query("SELECT 1")
            assert not caught.value.maybe_executed
            assert Connection.status().groups[group].retries == 0


@with_pgbouncer
@pytest.mark.parametrize("mode", MODES)
def test_a_pause_beyond_the_deadlines_is_one_outage_and_no_flapping(
    bouncer: Any, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    pooled = bouncer(admin_users="app")
    limits = {"query_timeout": 300, "ping_timeout": 0.5, "connect_timeout": 1}
    init(pooled, mode, **limits)

    def use() -> float:
        began = time.monotonic()
        try:
            with Handler("auto") as db:
                db.query("SELECT 1")
        except pgdbpool.Error:
            return time.monotonic() - began
        return 0.0

    assert use() == 0.0
    with psycopg.connect(host=pooled.host, port=pooled.port, user="app", dbname="pgbouncer") as console:
        console.pgconn.exec_(b"PAUSE")
        ends = time.monotonic() + 2.5
        wait_for(lambda: use() and Connection.status().groups["auto"].idle == 0, 10)
        wait_for(lambda: 0 < use() < 0.4, 10, "it is known to give no answer")
        while time.monotonic() < ends:
            assert 0 < use() < 0.8
            time.sleep(0.05)
        console.pgconn.exec_(b"RESUME")
    wait_for(lambda: use() == 0.0, 10)
    said = [record.message for record in caplog.records if record.message.startswith("endpoint")]
    assert [text.split(": ")[0].split()[-1] for text in said] == ["down", "again"]


@with_pgbouncer
@pytest.mark.parametrize("mode", MODES)
def test_one_in_session_mode_wants_the_same_word(bouncer: Any, mode: str) -> None:
    running = bouncer(4, pool_mode="session")
    with pytest.raises(psycopg.OperationalError, match="unsupported startup parameter: options"):
        init(running, mode, pooler=None)
        with Handler("auto"):
            pass
    init(running, mode, query_timeout=100, min_size=0)
    for group in GROUPS:
        with Handler(group, tenant=A) as db:
            assert tuple(seen(db)) == ([A], A)
        with pytest.raises(psycopg.errors.QueryCanceled), Handler(group) as db:
            db.query("SELECT pg_sleep(5)")

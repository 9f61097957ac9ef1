"""One statement in a block of its own, in both modes: what it returns, and that it is committed or is not."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from support import config, kill_backends, server, wait_for

import pgdbpool
from pgdbpool import Connection, Handler, ResultError

SCHEMA = """
    CREATE ROLE app LOGIN;
    CREATE TABLE t (i int PRIMARY KEY, tenant text DEFAULT current_setting('app.tenant', true));
    CREATE TABLE child (i int REFERENCES t DEFERRABLE INITIALLY DEFERRED);
    CREATE TABLE docs (id int, tenant text);
    ALTER TABLE docs ENABLE ROW LEVEL SECURITY;
    CREATE POLICY own ON docs USING (tenant = current_setting('app.tenant', true));
    CREATE FUNCTION nap() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_sleep(NEW.i); RETURN NULL; END $$;
    CREATE TABLE slow (i int);
    CREATE CONSTRAINT TRIGGER nap AFTER INSERT ON slow DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION nap();
    GRANT ALL ON ALL TABLES IN SCHEMA public TO app;
    INSERT INTO docs VALUES (1, 'a'), (2, 'b'), (3, NULL);
"""


@pytest.fixture
def admin(known_cluster: Any) -> Iterator[psycopg.Connection[Any]]:
    with known_cluster.primary.connect() as conn:
        conn.execute(SCHEMA)
        yield conn


@pytest.fixture(params=["threaded", "non-threaded"])
def start(request: pytest.FixtureRequest, known_cluster: Any, admin: Any) -> Iterator[Callable[..., None]]:
    """Initialise groups `auto`, `manual`, and with a tenant `auto_t` and `manual_t`, of one connection."""

    def init(port: int | None = None, **changes: Any) -> None:
        common = {"connection_count": 1, **changes}
        tenant = {**common, "tenant": "app.tenant"}
        groups = {
            "auto": common,
            "manual": {**common, "autocommit": False},
            "auto_t": tenant,
            "manual_t": {**tenant, "autocommit": False},
        }
        node = known_cluster.primary
        entry = server(node, port=port or node.port, user="app")
        Connection.init(config([entry], request.param, **groups))

    yield init
    Connection.reset()


def there(admin: psycopg.Connection[Any], table: str = "t") -> list[Any]:
    return [row[0] for row in admin.execute(f"SELECT i FROM {table} ORDER BY i".encode())]


def use(group: str) -> dict[str, Any]:
    return {"tenant": "a"} if group.endswith("_t") else {}


def at_rest(group: str) -> bool:
    """The group's one connection is back, and works."""
    status = Connection.status().groups[group]
    return (status.in_use, Connection.fetchval(group, "SELECT 1", **use(group))) == (0, 1)


GROUPS = pytest.mark.parametrize("group", ["auto", "manual", "auto_t", "manual_t"])
MANUAL = pytest.mark.parametrize("group", ["manual", "manual_t"])


@GROUPS
def test_each_returns_the_same_as_a_handlers_method_and_commits(start: Any, admin: Any, group: str) -> None:
    start()
    insert = "INSERT INTO t VALUES (%s) RETURNING i, i * 2 AS twice"
    assert Connection.fetch(group, insert, (1,), **use(group)) == [(1, 2)]
    assert there(admin) == [1]
    assert Connection.fetchrow(group, insert, (2,), **use(group)) == (2, 4)
    assert there(admin) == [1, 2]
    assert Connection.fetchval(group, insert, (3,), "twice", **use(group)) == 6
    assert Connection.fetchval(group, insert, (4,), column=-1, **use(group)) == 8
    assert there(admin) == [1, 2, 3, 4]
    assert Connection.execute(group, "DELETE FROM t WHERE i > 1", **use(group)) == "DELETE 3"
    assert Connection.executemany(group, "INSERT INTO t VALUES (%s)", [(5,), (6,)], **use(group)) == 2
    assert there(admin) == [1, 5, 6]
    assert Connection.fetch(group, "INSERT INTO t VALUES (7)", **use(group)) == []
    assert Connection.fetchrow(group, "SELECT 1 WHERE false", **use(group)) is None
    assert Connection.fetchval(group, "SELECT 1 WHERE false", **use(group)) is None
    assert Connection.execute(group, "", **use(group)) == ""
    assert there(admin) == [1, 5, 6, 7]
    assert at_rest(group)


@GROUPS
def test_fetchmany_returns_the_rows_of_all_sets_or_commits_none(start: Any, admin: Any, group: str) -> None:
    start()
    insert = "INSERT INTO t VALUES (%s) RETURNING i, i * 2 AS twice"
    rows = Connection.fetchmany(group, insert, iter([(1,), (2,)]), **use(group))
    assert rows == [(1, 2), (2, 4)]
    assert rows[1].twice == 4
    assert there(admin) == [1, 2]
    assert Connection.fetchmany(group, "INSERT INTO t VALUES (%s)", [(3,)], **use(group)) == []
    assert Connection.fetchmany(group, insert, [], **use(group)) == []
    with pytest.raises(psycopg.errors.UniqueViolation):
        Connection.fetchmany(group, insert, [(4,), (1,)], **use(group))
    with pytest.raises(psycopg.errors.ForeignKeyViolation):  # in an autocommit group as well: one transaction
        Connection.fetchmany(group, "INSERT INTO child VALUES (%s) RETURNING i", [(1,), (9,)], **use(group))
    assert there(admin) == [1, 2, 3]
    assert there(admin, "child") == []
    assert at_rest(group)


@GROUPS
def test_a_failing_statement_commits_nothing_and_gives_the_connection_back(
    start: Any, admin: Any, group: str
) -> None:
    start()
    pid = Connection.fetchval(group, "SELECT pg_backend_pid()", **use(group))
    failing = "WITH w AS (INSERT INTO t VALUES (1) RETURNING i) SELECT i / 0 FROM w"
    for method in (Connection.fetch, Connection.fetchrow, Connection.fetchval, Connection.execute):
        with pytest.raises(psycopg.errors.DivisionByZero) as caught:
            method(group, failing, **use(group))
        assert isinstance(caught.value, pgdbpool.DBQueryError)
        assert not caught.value.maybe_committed
        with pytest.raises(psycopg.DataError, match="NUL"):
            method(group, "SELECT %s", ("\0",), **use(group))
    with pytest.raises(psycopg.errors.UniqueViolation):
        Connection.executemany(group, "INSERT INTO t VALUES (%s)", [(1,), (2,), (1,)], **use(group))
    assert there(admin) == []
    assert Connection.fetchval(group, "SELECT pg_backend_pid()", **use(group)) == pid
    assert at_rest(group)


@GROUPS
def test_a_constraint_that_fails_at_the_commit_is_raised(start: Any, admin: Any, group: str) -> None:
    start()
    for method in (Connection.fetch, Connection.execute):
        with pytest.raises(psycopg.errors.ForeignKeyViolation) as caught:
            method(group, "INSERT INTO child VALUES (9) RETURNING i", **use(group))
        assert not caught.value.maybe_committed
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        Connection.executemany(group, "INSERT INTO child VALUES (%s)", [(9,)], **use(group))
    assert there(admin, "child") == []
    assert at_rest(group)


@GROUPS
def test_statements_that_cannot_ride_go_the_ordinary_way(start: Any, admin: Any, group: str) -> None:
    start()
    several = "INSERT INTO t VALUES (%s); INSERT INTO t VALUES (%s) RETURNING i"
    assert Connection.fetch(group, several, (1, 2), **use(group)) == [(2,)]
    assert Connection.execute(group, "DELETE FROM t; INSERT INTO t VALUES (3)", **use(group)) == "INSERT 0 1"
    assert Connection.execute(group, "DO $$ BEGIN INSERT INTO t VALUES (4); END $$", **use(group)) == "DO"
    assert there(admin) == [3, 4]
    with pytest.raises(psycopg.errors.UniqueViolation):
        Connection.fetch(group, several, (5, 5), **use(group))
    with pytest.raises(psycopg.errors.DivisionByZero):
        Connection.execute(group, "DO $$ BEGIN INSERT INTO t VALUES (5); PERFORM 1 / 0; END $$", **use(group))
    with pytest.raises(psycopg.ProgrammingError, match="COPY"):
        Connection.execute(group, "COPY t FROM STDIN", **use(group))
    for end in ("ROLLBACK", "COMMIT"):
        assert Connection.execute(group, end, **use(group)) == end
    assert there(admin) == [3, 4]
    assert at_rest(group)


def test_statements_refused_inside_a_transaction_work_in_an_autocommit_group(start: Any) -> None:
    start()
    assert Connection.execute("auto", "VACUUM t") == "VACUUM"
    with pytest.raises(psycopg.errors.ActiveSqlTransaction):
        Connection.execute("manual", "VACUUM t")


@pytest.mark.parametrize("group", ["auto_t", "manual_t"])
def test_it_has_the_tenant_that_it_names_or_the_current_one(start: Any, admin: Any, group: str) -> None:
    start()
    for tenant, number in (("a", 1), ("b", 2)):
        assert Connection.fetch(group, "SELECT id FROM docs", tenant=tenant) == [(number,)]
        assert Connection.fetchrow(group, "SELECT id FROM docs", tenant=tenant) == (number,)
        assert Connection.fetchval(group, "SELECT id FROM docs", tenant=tenant) == number
        assert Connection.execute(group, "UPDATE docs SET id = id", tenant=tenant) == "UPDATE 1"
        assert Connection.executemany(group, "UPDATE docs SET id = %s", [(number,)], tenant=tenant) == 1
        with pgdbpool.tenant(tenant):
            assert Connection.fetchval(group, "SELECT id FROM docs") == number
            with pytest.raises(pgdbpool.TenantConflictError):
                Connection.fetchval(group, "SELECT id FROM docs", tenant="other")
            options: Any = {"tenant": "other", "tenant_override": True}
            assert Connection.fetchval(group, "SELECT id FROM docs", **options) is None
    with pytest.raises(pgdbpool.TenantRequiredError):
        Connection.fetch(group, "SELECT id FROM docs")
    with Handler(group, tenant="c") as db:
        assert db.fetchval("SELECT current_setting('app.tenant')") == "c"


@GROUPS
def test_settings_are_its_own_and_if_they_fail_nothing_runs(start: Any, admin: Any, group: str) -> None:
    start()
    mine: Any = {**use(group), "settings": {"work_mem": "5MB"}}
    assert Connection.fetchval(group, "SHOW work_mem", **mine) == "5MB"
    assert Connection.fetchval(group, "SHOW work_mem", **use(group)) != "5MB"
    wrong: Any = {**use(group), "settings": {"work_mem": "much"}}
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        Connection.execute(group, "INSERT INTO t VALUES (1)", **wrong)
    with pytest.raises(pgdbpool.SettingError):
        Connection.execute(group, "SELECT 1", **{**use(group), "settings": {"no name": 1}})
    assert there(admin) == []
    assert at_rest(group)


def test_mistakes_are_reported_as_by_a_handler(start: Any) -> None:
    with pytest.raises(pgdbpool.NotInitializedError):
        Connection.fetch("auto", "SELECT 1")
    start()
    with pytest.raises(pgdbpool.UnconfiguredGroupError, match="'nope'"):
        Connection.fetch("nope", "SELECT 1")
    with pytest.raises(TypeError, match="tennant"):
        Connection.fetch("auto", "SELECT 1", tennant="a")
    with Handler("auto"), pytest.raises(pgdbpool.PoolTimeout, match=r"test_oneshots\.py"):
        Connection.fetch("auto", "SELECT 1", timeout=0.01)


@GROUPS
def test_a_wrong_column_is_reported_after_the_commit(start: Any, admin: Any, group: str) -> None:
    start()
    with pytest.raises(KeyError, match="no column 'j'"):
        Connection.fetchval(group, "INSERT INTO t VALUES (1) RETURNING i", None, "j", **use(group))
    assert at_rest(group)


@GROUPS
def test_a_statement_is_prepared_as_often_as_any(start: Any, group: str) -> None:
    start(prepare_threshold=2)
    for i in range(6):
        assert Connection.fetchval(group, "SELECT %s::int AS prepared", (i,), **use(group)) == i
    prepared = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%AS prepared'"
    assert Connection.fetchval(group, prepared, **use(group)) == 1
    with pytest.raises(psycopg.errors.DivisionByZero):
        for i in (1, 1, 1, 0):
            Connection.fetchval(group, "SELECT 1 / %s::int", (i,), **use(group))
    assert at_rest(group)


# Outcomes that nobody knows.


def during(admin: psycopg.Connection[Any], text: str, act: Callable[[int], None]) -> threading.Thread:
    """Act on the backend of the pool that executes such a statement, from another thread."""

    def wait() -> None:
        query = """SELECT pid FROM pg_stat_activity
                   WHERE query LIKE %s AND wait_event = 'PgSleep' AND pid <> pg_backend_pid()"""
        found = wait_for(lambda: admin.execute(query, (text,)).fetchone(), what=text)
        act(found[0])

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.slow
@MANUAL
def test_a_commit_whose_answer_is_lost_may_be_one(
    start: Any, admin: Any, known_cluster: Any, proxy_to: Any, group: str
) -> None:
    proxy = proxy_to(known_cluster.primary)
    start(proxy.port)
    thread = during(admin, "COMMIT", lambda pid: proxy.reset_all())
    with pytest.raises(pgdbpool.ConnectionLostError) as caught:
        Connection.execute(group, "INSERT INTO slow VALUES (3)", **use(group))
    thread.join()
    assert caught.value.maybe_committed
    assert not caught.value.repeatable
    wait_for(lambda: there(admin, "slow") == [3])  # it was committed
    assert at_rest(group)


@MANUAL
def test_a_commit_that_the_server_did_not_live_to_may_be_one(start: Any, admin: Any, group: str) -> None:
    start()
    for statement, found in (
        ("INSERT INTO slow VALUES (20)", "COMMIT"),
        ("SELECT pg_sleep(20)", "%pg_sleep(20)%"),
    ):
        thread = during(admin, found, lambda pid: kill_backends(admin, pid))
        with pytest.raises(pgdbpool.ConnectionLostError) as caught:
            Connection.fetch(group, statement, **use(group))
        thread.join()
        assert caught.value.maybe_committed
        assert at_rest(group)
    assert there(admin, "slow") == []


@pytest.mark.slow
@MANUAL
def test_a_deadline_that_passes_in_the_commit_leaves_it_unknown(start: Any, admin: Any, group: str) -> None:
    start()
    options: Any = {**use(group), "settings": {"statement_timeout": "100ms"}}
    with pytest.raises(pgdbpool.QueryDeadlineError) as caught:
        Connection.execute(group, "INSERT INTO slow VALUES (3)", **options)  # no timeout of the server's here
    assert caught.value.maybe_committed
    wait_for(lambda: there(admin, "slow") == [3])  # it was committed
    assert at_rest(group)
    with pytest.raises(psycopg.errors.QueryCanceled) as cancelled:
        Connection.execute(group, "SELECT pg_sleep(3)", **options)
    assert not cancelled.value.maybe_committed  # the server answered
    assert at_rest(group)


@pytest.mark.parametrize("group", ["auto", "auto_t"])
def test_a_lost_statement_of_an_autocommit_group_may_have_taken_effect(
    start: Any, admin: Any, group: str
) -> None:
    start()
    thread = during(admin, "%pg_sleep(20)%", lambda pid: kill_backends(admin, pid))
    with pytest.raises(pgdbpool.ConnectionLostError) as caught:
        Connection.fetch(group, "SELECT pg_sleep(20)", **use(group))
    thread.join()
    assert (caught.value.maybe_executed, caught.value.maybe_committed) == (True, False)
    assert at_rest(group)


@GROUPS
def test_connections_that_died_while_idle_cost_no_error(start: Any, admin: Any, group: str) -> None:
    start()
    kill_backends(admin)
    assert Connection.fetchval(group, "INSERT INTO t VALUES (1) RETURNING i", **use(group)) == 1


@GROUPS
def test_a_session_that_cannot_be_cleaned_is_replaced(start: Any, admin: Any, group: str) -> None:
    start(reset="always")
    with Handler(group, **use(group)) as db:
        conn = db.connection
    conn.cleaning = ((b"BEGIN", None), (b"SELECT 1 / 0", None), (b"COMMIT", None))
    assert Connection.fetchval(group, "INSERT INTO t VALUES (1) RETURNING i", **use(group)) == 1
    assert conn.closed
    assert there(admin) == [1]


@pytest.mark.slow
@GROUPS
def test_an_interrupted_statement_leaves_the_counts_exact(start: Any, group: str) -> None:
    start()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                Connection.execute(group, "SELECT pg_sleep(30)", **use(group))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert at_rest(group)


# A result that Python cannot hold.

ENDLESS = "INSERT INTO t VALUES (1) RETURNING 'infinity'::timestamp"


def failing(cursor: Any) -> Any:
    def make(values: Any) -> Any:
        raise KeyError("no such thing")

    return make


@pytest.mark.parametrize("group", ["auto", "manual", "auto_t", "manual_t"])
@pytest.mark.parametrize("way", ["fetch", "fetchrow", "fetchval"])
def test_the_error_of_a_result_that_python_cannot_hold_says_committed(
    start: Any, admin: Any, group: str, way: str
) -> None:
    start()
    with pytest.raises(ResultError, match="committed") as caught:
        getattr(Connection, way)(group, ENDLESS, **use(group))
    assert isinstance(caught.value, psycopg.DataError)
    assert isinstance(caught.value.__cause__, psycopg.DataError)
    assert (caught.value.maybe_committed, caught.value.maybe_executed) == (True, True)
    assert there(admin) == [1]
    assert at_rest(group)


@pytest.mark.parametrize("group", ["auto", "manual"])
def test_the_error_of_a_row_factory_says_that_the_commit_came_before(
    start: Any, admin: Any, group: str
) -> None:
    start(row_factory=failing)
    for number, way in enumerate((Connection.fetch, Connection.fetchrow)):
        with pytest.raises(ResultError, match="committed") as caught:
            way(group, "INSERT INTO t VALUES (%s) RETURNING i", (number,))
        assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(ResultError):
        Connection.fetchmany(group, "INSERT INTO t VALUES (%s) RETURNING i", [(2,), (3,)])
    assert there(admin) == [0, 1, 2, 3]
    with pytest.raises(KeyError):  # of a read there is nothing to say
        Connection.fetch(group, "SELECT 1")


def test_if_the_commit_did_not_ride_nothing_is_committed(start: Any, admin: Any) -> None:
    start()
    admin.execute("""
        CREATE PROCEDURE enter(OUT endless timestamp) LANGUAGE plpgsql
        AS $$BEGIN INSERT INTO t VALUES (1); endless := 'infinity'; END$$
    """)
    with pytest.raises(psycopg.DataError) as caught:
        Connection.fetchval("manual", "CALL enter(NULL)")
    assert not isinstance(caught.value, ResultError)
    assert there(admin) == []
    with pytest.raises(ResultError):
        Connection.fetchval("auto", "CALL enter(NULL)")
    assert there(admin) == [1]

"""Prepared statements that the server no longer has, or whose tables have changed, fail nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from support import config

import pgdbpool
from pgdbpool import Connection, Handler
from pgdbpool.cluster import Cluster

GROUPS = ["auto", "manual"]
ALL = "SELECT * FROM items WHERE id > %s"
Way = Callable[[str], Any]


@pytest.fixture
def admin(known_cluster: Cluster) -> Iterator[psycopg.Connection[Any]]:
    with known_cluster.primary.connect() as conn:
        conn.execute("CREATE TABLE items (id int DEFAULT 1, name text DEFAULT 'x')")
        conn.execute("INSERT INTO items VALUES (1, 'one')")
        conn.execute("CREATE FUNCTION forget() RETURNS int LANGUAGE plpgsql AS"
                     " $$ BEGIN EXECUTE 'DEALLOCATE ALL'; RETURN 1; END $$")  # fmt: skip
        yield conn


@pytest.fixture
def start(known_cluster: Cluster, admin: Any, mode: str) -> Iterator[Callable[..., None]]:
    def init(**changes: Any) -> None:
        auto = {"connection_count": 1, "prepare_threshold": 0, **changes}
        manual = {**auto, "autocommit": False}
        Connection.init(config([known_cluster.primary], mode, auto=auto, manual=manual))

    yield init
    Connection.reset()


def by_query(group: str) -> Any:
    with Handler(group) as db:
        return db.query(ALL, (0,)).fetchall()


def by_many(group: str) -> Any:
    with Handler(group) as db:
        return db.fetchmany(ALL, [(0,), (5,)])


def by_connection(group: str) -> Any:
    with Handler(group) as db:
        return db.connection.cursor().execute(ALL, (0,)).fetchall()


WAYS: dict[str, Way] = {
    "query": by_query,
    "fetchmany": by_many,
    "connection": by_connection,
    "one-shot": lambda group: Connection.fetch(group, ALL, (0,)),
    "many one-shots": lambda group: Connection.fetchmany(group, ALL, [(0,), (5,)]),
}


SETTINGS = pytest.mark.parametrize("settings", [{}, {"work_mem": "5MB"}], ids=["plain", "settings"])


@pytest.mark.parametrize("group", GROUPS)
@SETTINGS
def test_a_changed_table_fails_no_block(start: Any, admin: Any, group: str, settings: Any) -> None:
    start(settings=settings)
    columns = 2
    for way in WAYS.values():
        assert len(way(group)[0]) == columns
        for _ in range(2):
            columns += 1
            admin.execute(f"ALTER TABLE items ADD COLUMN c{columns} int")
            assert len(way(group)[0]) == columns
            assert len(way(group)[0]) == columns


@pytest.mark.parametrize("group", GROUPS)
@SETTINGS
def test_a_statement_that_is_deallocated_fails_no_block(
    start: Any, admin: Any, group: str, settings: Any
) -> None:
    admin.execute("CREATE PROCEDURE forgetting() LANGUAGE plpgsql AS $$ BEGIN PERFORM forget(); END $$")
    start(settings=settings)
    ends = ["SELECT forget()", "DO $$ BEGIN PERFORM forget(); END $$", "DEALLOCATE ALL", "CALL forgetting()"]
    if group == "auto" and not settings:
        ends.append("DISCARD ALL")  # which cannot run inside a transaction
    for deallocate in ends:
        for way in WAYS.values():
            for _ in range(2):
                assert len(way(group)) == 1
                with Handler(group) as db:
                    db.query(deallocate)


@pytest.mark.parametrize("group", GROUPS)
def test_statements_that_cannot_ride_survive_a_deallocate(start: Any, group: str) -> None:
    start(settings={"work_mem": "5MB"})
    for _ in range(3):
        with Handler(group) as db:
            assert db.fetchval("SELECT forget()") == 1
        with Handler(group) as db:
            assert db.fetchval("SELECT 1; SHOW work_mem") == "5MB"
        with Handler(group) as db, db.copy("COPY (SELECT current_setting('work_mem')) TO STDOUT") as copy:
            assert list(copy.rows()) == [("5MB",)]


@pytest.mark.parametrize("group", GROUPS)
def test_a_statement_that_a_pipeline_skipped_fails_no_later_block(start: Any, group: str) -> None:
    start(prepare_threshold=1)
    for _ in range(4):
        with pytest.raises(psycopg.errors.DivisionByZero), Handler(group) as db, db.pipeline():
            db.query("SELECT 1 / 0")
            db.query(ALL, (0,))
            db.query(ALL, (0,))
        for _ in range(2):
            assert len(by_query(group)) == 1


@pytest.mark.parametrize("group", GROUPS)
def test_a_pipeline_fails_once_for_a_changed_table(start: Any, admin: Any, group: str) -> None:
    start()
    by_query(group)
    admin.execute("ALTER TABLE items ADD COLUMN more int")
    with pytest.raises(psycopg.errors.FeatureNotSupported), Handler(group) as db, db.pipeline():
        db.query(ALL, (0,))
    with Handler(group) as db, db.pipeline():
        cursor = db.query(ALL, (0,))
        assert len(cursor.fetchall()[0]) == 3


@pytest.mark.parametrize("group", GROUPS)
def test_a_name_that_is_taken_fails_no_block(start: Any, group: str) -> None:
    start()
    with Handler(group) as db:
        db.query('PREPARE "_pg3_1" AS SELECT 1', ())
        if group == "manual":
            db.commit()
        assert len(db.fetch(ALL, (0,))) == 1
        assert len(db.fetch("EXECUTE _pg3_1")) == 1  # the block's own is kept


def test_inside_a_transaction_it_fails_once(start: Any, admin: Any) -> None:
    start(settings={"work_mem": "5MB"})
    by_query("manual")
    with Handler("manual") as db:
        db.query("SELECT 1")
        admin.execute("ALTER TABLE items ADD COLUMN more int")
        with pytest.raises(psycopg.errors.FeatureNotSupported), db.transaction():
            db.query(ALL, (0,))
        assert len(db.fetch(ALL, (0,))[0]) == 3
        db.commit()
        assert len(db.fetch(ALL, (0,))[0]) == 3
    assert len(by_query("manual")[0]) == 3
    by_query("auto")
    with Handler("auto") as db:
        admin.execute("ALTER TABLE items ADD COLUMN other int")
        with pytest.raises(psycopg.errors.FeatureNotSupported), db.transaction():
            db.query(ALL, (0,))
        assert len(db.fetch(ALL, (0,))[0]) == 4


@pytest.mark.parametrize("group", GROUPS)
def test_a_resent_statement_takes_effect_once(start: Any, admin: Any, group: str) -> None:
    start(settings={"default_transaction_isolation": "serializable"})
    insert = "INSERT INTO items (id) VALUES (%s) RETURNING *"
    for n in range(6):
        admin.execute(f"ALTER TABLE items ADD COLUMN c{n} int")
        with Handler(group) as db:
            assert db.query(insert, (100 + n,)).rowcount == 1
        Connection.fetch(group, insert, (200 + n,))
        admin.execute(f"ALTER TABLE items ADD COLUMN d{n} int")
        Connection.fetchmany(group, insert, [(300 + n,), (400 + n,)])
    found = admin.execute("SELECT count(*), count(DISTINCT id) FROM items WHERE id >= 100").fetchone()
    assert found == (24, 24)


@pytest.mark.parametrize("group", GROUPS)
def test_tables_that_differ_by_search_path_fail_no_block(start: Any, admin: Any, group: str) -> None:
    for number in range(4):
        columns = ", ".join(f"c{n} int DEFAULT {number}" for n in range(number + 1))
        admin.execute(f"DROP SCHEMA IF EXISTS s{number} CASCADE; CREATE SCHEMA s{number}")
        admin.execute(f"CREATE TABLE s{number}.mine ({columns}); INSERT INTO s{number}.mine DEFAULT VALUES")
    start(prepare_threshold=2)
    for n in range(40):
        number = n * n % 4 if n % 3 else n % 4
        settings = {"search_path": f"s{number}, public"}
        if n % 2:
            with Handler(group, settings=settings) as db:
                rows = db.fetch("SELECT * FROM mine")
        else:
            rows = Connection.fetch(group, "SELECT * FROM mine", settings=settings)
        assert [tuple(row) for row in rows] == [(number,) * (number + 1)]


def test_forgotten_statements_are_dropped_at_the_server_and_the_blocks_own_are_not(
    start: Any, admin: Any
) -> None:
    start(settings={"work_mem": "5MB"})
    names = "SELECT name FROM pg_prepared_statements"
    for n in range(8):
        by_query("auto")
        admin.execute(f"ALTER TABLE items ADD COLUMN c{n} int")
    with Handler("auto") as db:
        assert len(db.fetch(names)) <= 4
        db.query("PREPARE mine AS SELECT 1")
        admin.execute("ALTER TABLE items ADD COLUMN more int")
        db.query(ALL, (0,))
        assert ("mine",) in [tuple(row) for row in db.fetch(names)]


@pytest.mark.parametrize("group", GROUPS)
def test_statements_that_may_commit_inside_are_not_sent_again(start: Any, admin: Any, group: str) -> None:
    start()
    admin.execute("""CREATE PROCEDURE half() LANGUAGE plpgsql AS $$
        BEGIN INSERT INTO items VALUES (7); EXECUTE 'DEALLOCATE nothing'; END $$""")
    with pytest.raises(psycopg.errors.InvalidSqlStatementName), Handler(group) as db:
        db.query("CALL half()")
    assert Connection.fetchval("auto", "SELECT count(*) FROM items WHERE id = 7") == 0
    assert Connection.status().groups[group].retries == 0
    with Handler(group) as db:
        with pytest.raises(pgdbpool.DBQueryError):
            db.query("SELECT * FROM nothing")
        db.rollback()
        assert len(db.fetch(ALL, (0,))) == 1


def test_an_abandoned_pipeline_leaves_the_transaction_open(start: Any, admin: Any) -> None:
    start()
    with Handler("manual") as db:
        db.query("SET application_name = 'own'")  # which the client is told of
        db.query("INSERT INTO items VALUES (77)")
        with pytest.raises(KeyError), db.pipeline():
            db.query(ALL, (0,))
            raise KeyError
        with db.transaction():
            assert len(db.fetch(ALL, (0,))) == 2
        assert db.connection.info.parameter_status("application_name") == "own"
        db.rollback()
    assert admin.execute("SELECT count(*) FROM items WHERE id = 77").fetchone() == (0,)

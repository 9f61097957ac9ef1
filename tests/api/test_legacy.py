"""Configurations and code as the documentation of 1.x shows them, unchanged."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest


@pytest.fixture
def old_config(known_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """1.x takes no port, so libpq's own default gives it."""
    import pgdbpool

    primary = known_cluster.primary
    monkeypatch.setenv("PGPORT", str(primary.port))
    primary.execute("CREATE TABLE table1 (a text, b int)")
    yield {
        "db": {"host": "127.0.0.1", "name": "postgres", "user": "postgres", "pass": "unused"},
        "groups": {"group1": {"connection_count": 20, "autocommit": True}},
    }
    pgdbpool.Connection.reset()


def test_both_import_paths_give_the_same_names() -> None:
    import pgdbpool as dbpool
    from pgdbpool import pool

    for name in (
        "Connection",
        "Handler",
        "Query",
        "DBConnectionError",
        "DBQueryError",
        "DBOfflineError",
        "UnconfiguredGroupError",
    ):
        assert getattr(dbpool, name) is getattr(pool, name)
    for name in ("DBConnectionError", "DBQueryError", "DBOfflineError", "UnconfiguredGroupError"):
        assert issubclass(getattr(pool, name), Exception)


@pytest.mark.parametrize("model", [None, "threaded", "non-threaded"])
def test_the_documented_configuration(old_config: dict[str, Any], model: str | None) -> None:
    import pgdbpool as dbpool

    if model:
        old_config["type"] = model
    before = copy.deepcopy(old_config)
    dbpool.Connection.init(old_config)
    assert old_config == before
    assert dbpool.Connection.get_threading_model() == (model or "threaded")
    assert dbpool.Connection.get_max_pool_size("group1") == 20
    sql = "select * from table1"
    with dbpool.Handler("group1") as db:
        db.query("insert into table1 values (%s, %s)", ("x", 1))
    with dbpool.Handler("group1") as db:
        for rec in db.query(sql):
            assert (rec[0], rec["b"]) == ("x", 1)
            assert dict(rec) == {"a": "x", "b": 1}
            assert str(rec)


def test_the_documented_list_of_servers(old_config: dict[str, Any], known_cluster: Any) -> None:
    from pgdbpool import pool as dbpool

    server = old_config["db"]
    old_config["db"] = [server, {**server, "host": "localhost"}]
    old_config["groups"]["group1"]["connection_count"] = 4
    dbpool.Connection.init(old_config)
    seen = set()
    for _ in range(4):
        with dbpool.Handler("group1") as db:
            seen.add(db.endpoint)
    assert seen == {f"127.0.0.1:{known_cluster.primary.port}", f"localhost:{known_cluster.primary.port}"}


@pytest.mark.filterwarnings("error")
def test_every_key_of_1x(old_config: dict[str, Any]) -> None:
    import pgdbpool as dbpool

    old_config["db"].update(
        ssl="disable",
        connect_timeout=30,
        query_timeout=30000,
        session_tmp_buffer=128,
        connection_retry_sleep=1,
    )
    old_config["groups"] = {
        "group1": {"connection_count": 2, "autocommit": True},
        "group2": {"connection_count": 2, "autocommit": False},
        "group3": {"connection_count": 2},
    }
    with pytest.warns(DeprecationWarning, match="connection_retry_sleep"):
        dbpool.Connection.init(old_config)
    with dbpool.Handler("group1") as db:
        assert db.query("show statement_timeout").fetchone()[0] == "30s"
        assert db.query("show temp_buffers").fetchone()[0] == "128MB"


def test_manual_commit_as_documented(old_config: dict[str, Any], known_cluster: Any) -> None:
    import pgdbpool as dbpool

    old_config["groups"]["group1"] = {"connection_count": 2, "autocommit": False}
    dbpool.Connection.init(old_config)
    with dbpool.Handler("group1") as db:
        db.query("INSERT INTO table1 VALUES (%s)", ("value1",))
        db.query("INSERT INTO table1 VALUES (%s)", ("value2",))
        db.commit()
        assert known_cluster.primary.execute("SELECT count(*) FROM table1") == [(2,)]
    with dbpool.Handler("group1") as db:
        db.query("INSERT INTO table1 VALUES (%s)", ("value3",))  # the end of the block commits
    with dbpool.Handler("group1") as db:
        db.conn_ref.cursor().execute("INSERT INTO table1 VALUES ('value4')")
        db.conn_ref.commit()
    assert known_cluster.primary.execute("SELECT count(*) FROM table1") == [(4,)]


def test_connections_are_lent_in_turn(old_config: dict[str, Any]) -> None:
    import pgdbpool as dbpool

    old_config["groups"]["group1"]["connection_count"] = 5
    dbpool.Connection.init(old_config)
    refs = []
    for _ in range(10):
        with dbpool.Handler("group1") as db:
            refs.append(db.conn_ref.info.backend_pid)
    assert refs[:5] == refs[5:]
    assert len(set(refs)) == 5


def test_errors_of_1x(old_config: dict[str, Any]) -> None:
    import pgdbpool as dbpool

    dbpool.Connection.init(old_config)
    with pytest.raises(dbpool.UnconfiguredGroupError):
        dbpool.Handler("group9")
    with dbpool.Handler("group1") as db:
        with pytest.raises(dbpool.DBQueryError):
            db.query("select * from no_such_table")
        with pytest.raises(psycopg.errors.UndefinedTable):
            db.query("select * from no_such_table")
        assert dbpool.Query.execute(db, "select 1").fetchone()[0] == 1
    old_config["db"]["host"] = "127.0.0.2.nowhere.invalid"
    dbpool.Connection.init(old_config)
    with pytest.raises(dbpool.DBConnectionError), dbpool.Handler("group1"):
        pass


def test_percent_signs_and_empty_parameters(old_config: dict[str, Any]) -> None:
    import pgdbpool as dbpool

    dbpool.Connection.init(old_config)
    with dbpool.Handler("group1") as db:
        assert db.query("select 'a' like 'a%'").fetchone()[0]
        assert db.query("select 'a' like 'a%'", ()).fetchone()[0]
        assert db.query("select 'a' like 'a%%' and 1 = %s", (1,)).fetchone()[0]
        assert db.query("select %(x)s::int", {"x": 1}).fetchone()[0] == 1

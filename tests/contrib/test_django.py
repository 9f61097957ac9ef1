"""Django's backend over the pool: its connections are those of a group."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from proxy import HOST
from psycopg.adapt import Loader
from support import config, in_child, interruptions, kill_backends, server, wait_for

pytest.importorskip("django")

from django import db as django_db
from django.conf import settings
from django.core.checks import ERROR, WARNING
from django.core.exceptions import ImproperlyConfigured
from django.db import connections, transaction
from django.db.transaction import TransactionManagementError
from django.db.utils import DatabaseError, IntegrityError, OperationalError
from django.utils.functional import empty

import pgdbpool
from pgdbpool import Connection
from pgdbpool.cluster._installation import find_installation
from pgdbpool.contrib.django import _checks
from pgdbpool.contrib.django.middleware import TenantMiddleware
from pgdbpool.contrib.django.routers import ReadWriteRouter
from pgdbpool.contrib.django.schemas import schema

ENGINE = "pgdbpool.contrib.django"
TENANT = {"setting": "app.tenant", "verify": "off", "required": False}
PID = "SELECT pg_backend_pid()"
SLOW_COMMIT = """
    CREATE TABLE t (id int);
    CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_sleep(0.2); RETURN NULL; END $$;
    CREATE CONSTRAINT TRIGGER late AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION slow()
"""


def forget_connections() -> None:
    for alias in ("default", "replica"):
        if hasattr(connections._connections, alias):
            getattr(connections._connections, alias).close()
            delattr(connections._connections, alias)


@pytest.fixture(autouse=True)
def outside_of_any_project() -> Iterator[None]:
    """Give Django settings for the test, and what it had before it afterwards."""
    before, known = settings._wrapped, (connections._settings, vars(connections).get("settings"))
    forget_connections()
    settings._wrapped = empty
    settings.configure(USE_TZ=True)
    yield
    forget_connections()
    settings._wrapped = before
    connections._settings = known[0]
    vars(connections).pop("settings", None)
    if known[1] is not None:
        connections.settings = known[1]
    Connection.reset()


def use(**databases: dict[str, Any]) -> None:
    """Let these be `DATABASES`."""
    connections._settings = databases
    vars(connections).pop("settings", None)


@pytest.fixture
def by_itself(known_cluster: Any, proxy_to: Any) -> Callable[..., Any]:
    """A function that makes `default` a database without a file, behind a proxy that it returns."""
    proxy = proxy_to(known_cluster.primary)

    def make(**keys: Any) -> Any:
        given = {"ENGINE": ENGINE, "HOST": HOST, "PORT": proxy.port, "USER": "postgres"}
        use(default={**given, "NAME": "postgres", **keys})
        return proxy

    return make


@pytest.fixture
def from_file(known_cluster: Any, mode: str, proxy_to: Any, tmp_path: Path) -> Callable[..., Any]:
    """A function that makes `default` a group of a file, with the keys that it is given."""
    proxy = proxy_to(known_cluster.primary)
    file = tmp_path / "pgdbpool.yaml"

    def make(**keys: Any) -> Any:
        entry = server(known_cluster.primary, port=proxy.port, options={"TimeZone": "UTC"})
        options = {"config": file, "group": "write", **({"hold": keys.pop("hold")} if "hold" in keys else {})}
        tree = config([entry], mode, write={"connection_count": 2, "timeout": 2, "autocommit": False, **keys})
        file.write_text(json.dumps(tree))
        use(default={"ENGINE": ENGINE, "OPTIONS": options})
        return proxy

    return make


def run(statement: str) -> None:
    with connections["default"].cursor() as cursor:
        cursor.execute(statement)


def value(statement: str, alias: str = "default") -> Any:
    with connections[alias].cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchone()[0]


def test_a_group_of_a_file_is_a_database(from_file: Any) -> None:
    from_file()
    assert value("SELECT 1") == 1
    assert Connection.status().groups["write"].in_use == 1
    connections["default"].close()
    assert Connection.status().groups["write"].in_use == 0
    assert connections["default"].settings_dict["NAME"] == "postgres"


def test_settings_alone_make_a_group(by_itself: Any) -> None:
    by_itself(OPTIONS={"connection_count": 3, "application_name": "shop"})
    assert value("SHOW application_name") == "shop"
    assert Connection.get_max_pool_size("default") == 3
    assert value("SHOW timezone") == "UTC"


def test_a_host_may_list_servers(by_itself: Any, known_cluster: Any) -> None:
    ports = [node.port for node in known_cluster.nodes]
    by_itself(HOST=",".join([HOST] * 3), PORT=",".join(map(str, ports)), OPTIONS={"target": "primary"})
    assert value("SELECT pg_is_in_recovery()") is False
    assert len(Connection.status().endpoints) == 3


def test_a_server_that_is_listed_twice_is_refused(by_itself: Any) -> None:
    proxy = by_itself()
    connections.settings["default"]["HOST"] = f"{HOST},{HOST}"
    connections.settings["default"]["PORT"] = f"{proxy.port},{proxy.port}"
    with pytest.raises(ImproperlyConfigured, match="label"):
        value("SELECT 1")


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kept", [True, False])
def test_a_request_of_n_statements_takes_n(from_file: Any, n: int, kept: bool) -> None:
    proxy = from_file()
    value("SELECT 1")
    if not kept:
        connections["default"].close()
    proxy.reset_counts()
    for _ in range(n):
        value("SELECT 1")
    assert proxy.syncs == n


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("tenant", [None, "a"])
def test_a_transaction_of_n_statements_takes_n_and_one(from_file: Any, n: int, tenant: Any) -> None:
    proxy = from_file(**({"tenant": TENANT} if tenant else {}))
    value("SELECT 1")
    connections["default"].close()
    proxy.reset_counts()
    with pgdbpool.tenant(tenant), transaction.atomic():
        for _ in range(n):
            assert value("SELECT coalesce(current_setting('app.tenant', true), '')") == (tenant or "")
    assert proxy.syncs == n + 1


def test_a_tenant_is_each_transactions_own(from_file: Any) -> None:
    from_file(tenant=TENANT)
    for tenant in ("a", "b", "a"):
        with pgdbpool.tenant(tenant):
            assert value("SELECT current_setting('app.tenant')") == tenant
            with transaction.atomic():
                assert value("SELECT current_setting('app.tenant')") == tenant
    assert value("SELECT current_setting('app.tenant')") == ""


@pytest.fixture
def schemas_a_and_b(known_cluster: Any) -> None:
    """Two schemas, each with a table that names it."""
    with known_cluster.primary.connect() as admin:
        for name in ("a", "b"):
            admin.execute(f"CREATE SCHEMA {name}; CREATE TABLE {name}.names AS SELECT '{name}' AS name")


def test_a_schema_is_a_tenant(from_file: Any, schemas_a_and_b: None) -> None:
    proxy = from_file()
    value("SELECT 1")
    proxy.reset_counts()
    with schema("a"):
        assert value("SELECT name FROM names") == "a"
        assert proxy.syncs == 1
        with transaction.atomic():
            assert [value("SELECT name FROM names") for _ in range(2)] == ["a", "a"]
        assert proxy.syncs == 4
    for name in ("a", "b", "a"):
        with schema(name):
            assert value("SELECT name FROM names") == name
            with transaction.atomic():
                assert value("SELECT name FROM names") == name
                with schema("b" if name == "a" else "a"):
                    with pytest.raises(TransactionManagementError, match="keeps its schema"):
                        value("SELECT name FROM names")
    assert value("SHOW search_path") == '"$user", public'
    with pytest.raises(ValueError, match="not the name of a schema"), schema("a; b"):
        pass


@pytest.mark.parametrize("hold", ["request", "transaction"])
@pytest.mark.parametrize("binding", [False, True])
def test_a_statement_has_the_schema_of_its_moment_and_not_of_its_cursors(
    from_file: Any, schemas_a_and_b: None, hold: str, binding: bool
) -> None:
    from_file(hold=hold)
    connections.settings["default"]["OPTIONS"]["server_side_binding"] = binding
    query = "SELECT name FROM names"
    with schema("a"), connections["default"].cursor() as cursor:
        cursor.execute(query)
        with schema("b"):
            assert value(query) == "b"
        cursor.execute(query)
        assert cursor.fetchall() == [("a",)]
        rows = cursor.cursor.stream(query)
        with schema("b"):
            assert list(rows) == [("b",)]
            cursor.execute(query)
            assert cursor.fetchall() == [("b",)]
            with cursor.copy(f"COPY ({query}) TO STDOUT") as copy:
                assert b"".join(copy) == b"b\n"
            cursor.executemany("UPDATE names SET name = %s", [("c",), ("d",)])
        assert value(query) == "a"
        with transaction.atomic():
            cursor.execute(query)
            with schema("b"), pytest.raises(TransactionManagementError, match="keeps its schema"):
                cursor.execute(query)
    with schema("b"):
        assert value(query) == "d"


def test_a_lost_connection_goes_on_with_the_schema_of_now(
    from_file: Any, schemas_a_and_b: None, known_cluster: Any
) -> None:
    from_file(autocommit=True)
    with schema("a"), known_cluster.primary.connect() as admin:
        with pytest.raises(OperationalError):
            run("SELECT pg_terminate_backend(pg_backend_pid())")
        kill_backends(admin)
    with schema("b"):
        assert value("SELECT name FROM names") == "b"


def test_the_middleware_binds_the_tenant_of_a_request(from_file: Any) -> None:
    from_file(tenant=TENANT)
    settings.PGDBPOOL_TENANT = "operator.itemgetter"
    assert TenantMiddleware(lambda request: None).extract
    settings.PGDBPOOL_TENANT = lambda request: request["tenant"]
    answer = TenantMiddleware(lambda request: value("SELECT current_setting('app.tenant')"))
    assert [answer({"tenant": tenant}) for tenant in ("a", "b")] == ["a", "b"]
    settings.PGDBPOOL_TENANT = None
    with pytest.raises(ImproperlyConfigured, match="PGDBPOOL_TENANT"):
        TenantMiddleware(lambda request: None)


def test_atomic_rolls_back_and_savepoints_too(from_file: Any) -> None:
    from_file()
    run("CREATE TABLE t (id int PRIMARY KEY)")
    done: list[str] = []
    with transaction.atomic():
        value("INSERT INTO t VALUES (1) RETURNING id")
        transaction.on_commit(lambda: done.append("committed"))
        with pytest.raises(IntegrityError), transaction.atomic():
            value("INSERT INTO t VALUES (1) RETURNING id")
        value("INSERT INTO t VALUES (2) RETURNING id")
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        value("INSERT INTO t VALUES (3) RETURNING id")
        raise ZeroDivisionError
    assert value("SELECT array_agg(id) FROM t") == [1, 2]
    assert done == ["committed"]


@pytest.mark.parametrize("tenant", [None, "a"])
@pytest.mark.parametrize("atomic", [True, False])
def test_a_cursor_at_the_server_reads_in_chunks(from_file: Any, atomic: bool, tenant: Any) -> None:
    from_file(**({"tenant": TENANT} if tenant else {}))
    connection = connections["default"]
    shown = "SELECT coalesce(current_setting('app.tenant', true), '') FROM generate_series(1, %s)"
    with pgdbpool.tenant(tenant), transaction.atomic() if atomic else nullcontext():
        with connection.chunked_cursor() as cursor:
            cursor.execute(shown, [5])
            rows = [cursor.fetchmany(2) for _ in range(3)]
    assert rows == [[(tenant or "",)] * size for size in (2, 2, 1)]


def test_a_killed_connection_costs_a_request_nothing(from_file: Any, known_cluster: Any) -> None:
    from_file()
    first = value(PID)
    connections["default"].close()
    with known_cluster.primary.connect() as admin:
        kill_backends(admin)
    assert value(PID) != first


def test_a_connection_lost_in_a_transaction_is_djangos_error(from_file: Any, known_cluster: Any) -> None:
    from_file()
    with pytest.raises(OperationalError) as caught, transaction.atomic():
        value("SELECT 1")
        with known_cluster.primary.connect() as admin:
            kill_backends(admin)
        value("SELECT 1")
    assert isinstance(caught.value.__cause__, pgdbpool.ConnectionLostError)
    connections["default"].close_if_unusable_or_obsolete()
    assert value("SELECT 1") == 1


def test_a_lost_commit_says_that_it_may_have_committed(from_file: Any) -> None:
    proxy = from_file()
    with pytest.raises(OperationalError) as caught, transaction.atomic():
        run("CREATE TABLE t (id int)")
        proxy.cut_after(b"COMMIT")
    assert caught.value.__cause__.maybe_committed  # type: ignore[union-attr]
    assert not connections["default"].in_atomic_block
    assert value("SELECT 1") == 1


def test_a_failure_that_was_swallowed_in_a_transaction_is_raised_at_its_end(from_file: Any) -> None:
    from_file()
    run("CREATE TABLE t (id int PRIMARY KEY)")
    with pytest.raises(DatabaseError, match="nothing was committed"), transaction.atomic():
        run("INSERT INTO t VALUES (1)")
        with suppress(IntegrityError):
            run("INSERT INTO t VALUES (1)")
    assert value("SELECT count(*) FROM t") == 0


@pytest.mark.parametrize("way", ["a statement", "the inner block's end", "its rollback", "all that follows"])
def test_a_transaction_lost_in_an_inner_block_is_not_given_up_in_silence(
    from_file: Any, known_cluster: Any, way: str
) -> None:
    from_file()
    run("CREATE TABLE t (id int)")
    with pytest.raises(DatabaseError, match="nothing of it was committed"), transaction.atomic():
        run("INSERT INTO t VALUES (1)")
        with suppress(DatabaseError, ValueError), transaction.atomic():
            with known_cluster.primary.connect() as admin:
                kill_backends(admin)
            if way == "its rollback":
                raise ValueError
            if way != "the inner block's end":
                run("INSERT INTO t VALUES (2)")
        if way == "all that follows":
            run("INSERT INTO t VALUES (3)")
    assert value("SELECT count(*) FROM t") == 0


def test_an_interrupted_commit_is_not_taken_for_a_databases_error(from_file: Any, known_cluster: Any) -> None:
    from_file()
    run(SLOW_COMMIT)

    def work() -> None:
        with transaction.atomic():
            run("INSERT INTO t VALUES (1)")

    with interruptions() as interrupt:
        assert interrupt(0.1, work)
    assert value("SELECT 1") == 1
    wait_for(lambda: known_cluster.primary.execute("SELECT count(*) FROM t") == [(1,)])


def test_a_forked_child_gets_connections_of_its_own(from_file: Any) -> None:
    from_file()
    pid = value(PID)

    def child() -> None:
        django_db.close_old_connections()  # as at the beginning of a request
        assert value(PID) != pid

    in_child(child)
    assert value(PID) == pid


def test_a_thread_that_ends_without_closing_leaves_no_connection_behind(
    from_file: Any, recwarn: Any, mode: str
) -> None:
    if mode != "threaded":
        return
    from_file(connection_count=1)
    for _ in range(3):
        thread = Thread(target=value, args=("SELECT 1",))
        thread.start()
        thread.join()
        del thread
        gc.collect()
    assert value("SELECT 1") == 1
    assert any("test_django.py" in str(warning.message) for warning in recwarn)


def test_configure_and_django_both_register_adapters(known_cluster: Any, mode: str) -> None:
    class Point(Loader):
        def load(self, data: Any) -> str:
            return "a point"

    keys = {"configure": lambda conn: conn.adapters.register_loader("point", Point)}
    Connection.init(config([known_cluster.primary], mode, write={"connection_count": 1, **keys}))
    use(default={"ENGINE": ENGINE, "OPTIONS": {"config": "not read", "group": "write"}})
    for _ in range(2):
        assert value("SELECT point(1, 2)") == "a point"
        assert value("SELECT jsonb '{}'") == "{}"  # Django decodes it by itself
        assert value("SELECT now()").utcoffset() == timedelta(0)
        connections["default"].close()


@pytest.mark.parametrize("kind", ["file", "settings"])
def test_a_test_database_is_made_used_and_dropped_in_silence(
    from_file: Any, by_itself: Any, caplog: Any, kind: str
) -> None:
    by_itself(OPTIONS={}) if kind == "settings" else from_file()
    connection = connections["default"]
    creation = connection.creation
    with connection._nodb_cursor() as cursor:
        cursor.execute("CREATE DATABASE test_postgres")
    connection.close()
    before, connection.settings_dict["NAME"] = connection.settings_dict["NAME"], "test_postgres"
    assert value("SELECT current_database()") == "test_postgres"
    connection.close()
    creation._destroy_test_db("test_postgres", 0)
    connection.settings_dict["NAME"] = before
    assert value("SELECT current_database()") == "postgres"
    assert [record.msg for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    ("keys", "remedy"),
    [
        ({"CONN_MAX_AGE": 60}, "max_lifetime"),
        ({"OPTIONS": {"pool": True}}, "connection_count"),
        ({"OPTIONS": {"group": "read"}}, "config"),
        ({"OPTIONS": {"hold": "for ever"}}, "'request' or 'transaction'"),
        ({"OPTIONS": {"config": "x.yaml", "group": "read"}, "HOST": "db"}, "HOST"),
        ({"OPTIONS": {"config": "x.yaml", "group": "read", "min_size": 1}}, "min_size"),
    ],
)
def test_settings_that_contradict_are_refused_with_the_remedy(
    keys: Any, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another module of this run may have installed the application, whose check reports it then.
    monkeypatch.setattr(_checks.apps, "ready", False)
    use(default={"ENGINE": ENGINE, "NAME": "postgres", **keys})
    (found,) = _checks.check_settings()
    assert remedy in f"{found.msg} {found.hint}"
    assert found.id == "pgdbpool.E001"
    assert connections["default"].validation.check() == [found]
    if "CONN_MAX_AGE" not in keys:
        with pytest.raises(ImproperlyConfigured, match=remedy):
            value("SELECT 1")


@pytest.mark.slow
def test_the_installed_application_checks_the_settings(tmp_path: Path) -> None:
    database = {"ENGINE": ENGINE, "NAME": "postgres", "CONN_MAX_AGE": 60}
    text = (
        f"SECRET_KEY, USE_TZ, INSTALLED_APPS, DATABASES = 'x', True, [{ENGINE!r}], {{'default': {database}}}"
    )
    (tmp_path / "checked_settings.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "django", "check", "--settings=checked_settings"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), *sys.path))},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "pgdbpool.E001" in done.stderr
    assert "max_lifetime" in done.stderr


def test_a_group_that_is_not_there_is_named(from_file: Any) -> None:
    from_file()
    connections.settings["default"]["OPTIONS"]["group"] = "writes"
    with pytest.raises(ImproperlyConfigured, match=r"'writes'.*'write'"):
        value("SELECT 1")


def test_the_check_of_a_database_is_that_of_its_group(by_itself: Any) -> None:
    proxy = by_itself(OPTIONS={"query_timeout": "30s"})
    assert connections["default"].validation.check() == []
    connections["default"].close_pool()
    connections.settings["default"]["OPTIONS"] = {}
    (found,) = connections["default"].validation.check()
    assert (found.id, found.level) == ("pgdbpool.query_timeout", WARNING)
    assert "query_timeout: 30s" in found.hint
    proxy.stop()
    found = {each.id: each for each in connections["default"].validation.check()}
    assert found["pgdbpool.unreachable"].level == WARNING
    assert found["pgdbpool.no-server"].level == ERROR
    connections["default"].settings_dict["OPTIONS"] = {"connection_count": "many"}
    (wrong,) = connections["default"].validation.check()
    assert wrong.id == "pgdbpool.E002"
    assert "connection_count" in wrong.msg


def test_the_shell_of_a_database_is_at_a_server_of_its_group(
    from_file: Any, known_cluster: Any, monkeypatch: Any, capfd: Any
) -> None:
    proxy = from_file()
    programs = find_installation(None, None).bin_dir
    if not (programs / "psql").exists():
        pytest.skip("there is no psql")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    connections["default"].client.runshell(["-AtX", "-c", "SELECT inet_server_port(), current_database()"])
    assert capfd.readouterr().out == f"{known_cluster.primary.port}|postgres\n"
    assert proxy.connections >= 2
    assert Connection.status().groups["write"].in_use == 0


def in_use() -> int:
    return Connection.status().groups["write"].in_use


def test_a_database_that_holds_for_a_transaction_has_no_connection_between(from_file: Any) -> None:
    proxy = from_file(hold="transaction")
    run("CREATE TABLE t (id int)")
    assert in_use() == 0
    proxy.reset_counts()
    for number in range(2):
        assert value(f"SELECT {number}") == number
        assert in_use() == 0
    assert proxy.syncs == 2
    seen: list[int] = []
    with transaction.atomic():
        for number in range(2):
            run(f"INSERT INTO t VALUES ({number})")
            assert in_use() == 1
        with transaction.atomic():
            run("INSERT INTO t VALUES (3)")
        transaction.on_commit(lambda: seen.append(value("SELECT count(*) FROM t")))
    assert seen == [3]
    assert in_use() == 0
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        run("INSERT INTO t VALUES (4)")
        raise ZeroDivisionError
    assert in_use() == 0
    with pytest.raises(DatabaseError):
        run("SELECT 1/0")
    assert in_use() == 0
    assert value("SELECT count(*) FROM t") == 3


def test_a_connection_is_held_while_a_cursor_is_open(from_file: Any) -> None:
    from_file(hold="transaction")
    value("SELECT 1")
    with connections["default"].cursor() as outer:
        outer.execute("SELECT pg_backend_pid()")
        assert value("SELECT 1") == 1
        assert in_use() == 1
        assert outer.fetchone()
    assert in_use() == 0
    with connections["default"].chunked_cursor() as named:
        named.execute("SELECT generate_series(1, 5)")
        assert len(named.fetchmany(2)) == 2
        assert in_use() == 1
        assert len(named.fetchall()) == 3
    assert in_use() == 0


def test_a_cursor_that_is_dropped_open_gives_the_connection_back(from_file: Any) -> None:
    from_file(hold="transaction", connection_count=1)
    cursors = [connections["default"].cursor() for _ in range(2)]
    for cursor in cursors:
        cursor.execute("SELECT 1")
    del cursor
    cursors.pop()
    gc.collect()
    assert in_use() == 1
    cursors.clear()
    gc.collect()
    assert in_use() == 0
    with transaction.atomic():
        connections["default"].cursor().execute("SELECT 1")
        gc.collect()
        assert in_use() == 1
    assert in_use() == 0


def test_a_cursor_dropped_in_another_thread_leaves_the_connection_to_its_own(from_file: Any) -> None:
    from_file(hold="transaction", connection_count=1)
    cursors = [connections["default"].cursor()]
    cursors[0].execute("SELECT 1")
    thread = Thread(target=cursors.clear)
    thread.start()
    thread.join()
    assert in_use() == 1
    assert value("SELECT 1") == 1
    assert in_use() == 0


def test_databases_that_hold_for_a_transaction_share_one_connection(from_file: Any) -> None:
    from_file(hold="transaction", connection_count=1)
    run("CREATE TABLE t (id int)")
    one, two = connections["default"], connections["default"].copy()
    for number in range(3):
        for each in (one, two):
            with each.cursor() as cursor:
                cursor.execute("INSERT INTO t VALUES (%s)", [number])
    assert transaction.get_autocommit()
    assert value("SELECT count(*) FROM t") == 6
    transaction.set_autocommit(False)
    run("DELETE FROM t")
    assert in_use() == 1
    transaction.commit()
    transaction.set_autocommit(True)
    assert in_use() == 0
    assert value("SELECT count(*) FROM t") == 0


def test_a_failed_connection_is_found_without_a_round_trip(from_file: Any, known_cluster: Any) -> None:
    proxy = from_file()
    connection = connections["default"]
    assert not connection.is_usable()
    value("SELECT 1")
    proxy.reset_counts()
    assert connection.is_usable()
    assert proxy.syncs == 0
    with known_cluster.primary.connect() as admin:
        kill_backends(admin)
    wait_for(lambda: not connection.is_usable(), what="the end of the session has arrived")


def test_reads_go_to_the_replica_but_in_a_transaction(from_file: Any) -> None:
    from_file()
    router = ReadWriteRouter()
    assert (router.db_for_read(None), router.db_for_write(None)) == ("replica", "default")
    with transaction.atomic():
        assert router.db_for_read(None) == "default"
    assert router.allow_relation(None, None)
    assert [router.allow_migrate(alias, "shop") for alias in ("default", "replica")] == [True, False]
    assert django_db.router is not router

"""The extension for Flask: pools with the application, a tenant and a deadline for each request."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import flask
import psycopg
import pytest
from support import closed_port, config, server

import pgdbpool
from pgdbpool import Connection, Handler
from pgdbpool.contrib.flask import PgDbPool

TENANT = {"tenant": {"setting": "app.tenant", "required": True}}


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    yield
    Connection.reset()


@pytest.fixture
def entry(known_cluster: Any) -> dict[str, Any]:
    """The `db` entry for the primary, with a role that policies bind."""
    with known_cluster.primary.connect() as admin:
        admin.execute("CREATE ROLE web LOGIN")
    return server(known_cluster.primary, user="web")


@pytest.fixture
def make(entry: dict[str, Any], mode: str) -> Callable[..., flask.Flask]:
    """A function that makes an application with a view `/tenant`, and the keys that it is given."""

    def make(pool: PgDbPool, **keys: Any) -> flask.Flask:
        app = flask.Flask("shop")
        app.config["PGDBPOOL"] = config([entry], mode, read={"connection_count": 2, **TENANT})
        app.config.update(keys)

        @app.before_request
        def log_in() -> Any:
            if flask.request.headers.get("X-User") == "nobody":
                flask.abort(401)
            flask.g.user = flask.request.headers.get("X-User")

        @app.get("/tenant")
        def tenant() -> Any:
            with Handler("read") as db:
                return str(db.fetchval("SELECT current_setting('app.tenant')"))

        pool.init_app(app)
        return app

    return make


def by_user() -> Any:
    return flask.g.user


def test_each_request_has_its_tenant_and_leaves_none(make: Any) -> None:
    client = make(PgDbPool(tenant=by_user)).test_client()
    for user in ("ada", "ben", "ada"):
        assert client.get("/tenant", headers={"X-User": user}).text == user
        assert pgdbpool.current_tenant() is None


def test_a_request_that_an_earlier_function_refuses_keeps_its_answer(make: Any) -> None:
    client = make(PgDbPool(tenant=by_user)).test_client()
    assert client.get("/tenant", headers={"X-User": "nobody"}).status_code == 401
    assert client.get("/tenant", headers={"X-User": "ada"}).text == "ada"


def test_a_tenant_that_cannot_be_told_is_the_errors_own_answer_and_leaves_nothing(make: Any) -> None:
    def broken() -> Any:
        raise LookupError("no such user")

    client = make(PgDbPool(tenant=broken)).test_client()
    assert client.get("/tenant").status_code == 500
    assert pgdbpool.current_tenant() is None


def test_a_streamed_body_has_the_tenant_and_the_deadline(make: Any) -> None:
    app = make(PgDbPool(tenant=by_user), PGDBPOOL_DEADLINE=60)

    @app.get("/stream")
    def stream() -> Any:
        def body() -> Iterator[str]:
            for _ in range(2):
                with Handler("read") as db:
                    yield str(db.fetchval("SELECT current_setting('app.tenant') || ' '"))
            yield str(0 < (pgdbpool.time_left() or 0) <= 60)

        return flask.Response(body())

    assert app.test_client().get("/stream", headers={"X-User": "ada"}).text == "ada ada True"
    assert pgdbpool.time_left() is None


def test_a_test_request_context_leaves_no_tenant(make: Any) -> None:
    app = make(PgDbPool(tenant=by_user))
    with app.test_request_context("/tenant", headers={"X-User": "ada"}):
        app.preprocess_request()
        assert pgdbpool.current_tenant() == "ada"
    assert pgdbpool.current_tenant() is None


def test_test_request_contexts_inside_of_each_other_keep_their_tenants(make: Any) -> None:
    app = make(PgDbPool(tenant=by_user))
    outer = app.test_request_context(headers={"X-User": "ada"})
    with app.app_context(), outer:
        app.preprocess_request()
        with app.test_request_context(headers={"X-User": "ben"}):
            app.preprocess_request()
            assert pgdbpool.current_tenant() == "ben"
        assert pgdbpool.current_tenant() == "ada"
        app.preprocess_request()
    assert pgdbpool.current_tenant() is None


def test_a_client_that_keeps_the_request_reads_a_body_that_streams_with_it(make: Any) -> None:
    app = make(PgDbPool(tenant=by_user))

    @app.get("/stream")
    def stream() -> Any:
        return flask.Response(flask.stream_with_context(pgdbpool.current_tenant() for _ in range(2)))

    with app.test_client() as client:
        assert client.get("/stream?x=1", headers={"X-User": "ada"}).text == "adaada"
        assert flask.request.args["x"] == "1"


def test_errors_that_sqlalchemy_has_wrapped_are_answered_too(make: Any) -> None:
    sa = pytest.importorskip("sqlalchemy")
    app = make(PgDbPool(), PGDBPOOL_ERRORS=True)
    engine = sa.create_engine("postgresql+pgdbpool://read")

    @app.get("/<what>")
    def fail(what: str) -> Any:
        if what == "offline":
            raise sa.exc.OperationalError(None, None, sqlite3.OperationalError())
        with pgdbpool.tenant("ada"), ExitStack() as stack:
            if what == "full":
                for _ in range(2):
                    stack.enter_context(Connection.getconn("read"))
            with pgdbpool.deadline(0.2), engine.connect() as conn:
                conn.execute(sa.text("SELECT pg_sleep(5)" if what == "late" else f"SELECT '{what}'::int"))
        return ""

    client = app.test_client()
    statuses = {what: client.get(f"/{what}").status_code for what in ("full", "late", "7", "x", "offline")}
    assert statuses == {"full": 503, "late": 504, "7": 200, "x": 500, "offline": 500}


def test_errors_are_answered_if_that_is_switched_on(make: Any) -> None:
    app = make(PgDbPool(), PGDBPOOL_ERRORS=True)

    @app.get("/raise/<name>")
    def fail(name: str) -> Any:
        error = getattr(pgdbpool, name)(name)
        if flask.request.args:
            error.maybe_committed = True
        raise error

    client = app.test_client()
    assert client.get("/tenant").status_code == 400  # TenantRequiredError
    for name, status, again in (
        ("DBOfflineError", 503, "1"),
        ("PoolTimeout", 503, "1"),
        ("ConnectionLostError", 503, "1"),
        ("RateLimitExceeded", 429, "1"),
        ("QueryDeadlineError", 504, None),
        ("TenantConflictError", 403, None),
        ("ConfigError", 500, None),
    ):
        answer = client.get(f"/raise/{name}")
        assert (answer.status_code, answer.headers.get("Retry-After")) == (status, again), name
    assert client.get("/raise/ConnectionLostError?committed").status_code == 500


def test_errors_are_the_applications_own_otherwise(make: Any) -> None:
    app = make(PgDbPool())
    app.register_error_handler(psycopg.Error, lambda error: ("mine", 418))

    @app.get("/lost")
    def lost() -> Any:
        raise pgdbpool.ConnectionLostError

    assert app.test_client().get("/lost").status_code == 418


def test_the_pages_stand_beside_the_application(make: Any) -> None:
    client = make(
        PgDbPool(), PGDBPOOL_HEALTH="/-/health", PGDBPOOL_STATUS="/-/pools", PGDBPOOL_STATUS_TOKEN="t" * 16
    ).test_client()
    assert client.get("/-/health/ready").json["status"] == "healthy"
    assert client.get("/-/health/live").json["status"] == "alive"
    assert client.get("/-/pools/").status_code == 401
    page = client.get("/-/pools/status.json", headers={"Authorization": "Bearer " + "t" * 16})
    assert [group["name"] for group in page.json["groups"]] == ["read"]
    assert client.get("/-/other").status_code == 404


def test_the_commands_take_the_applications_configuration(
    make: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    app = make(PgDbPool())
    runner = app.test_cli_runner()
    runner.invoke(args=["pgdbpool", "ping", "--json"], catch_exceptions=False)
    result = runner.invoke(args=["pgdbpool", "ping", "--json"])
    assert (result.exit_code, json.loads(result.output)["status"]) == (0, "healthy")
    result = runner.invoke(args=["pgdbpool", "check", "--json"])
    assert json.loads(result.output)["problems"] == []
    result = runner.invoke(args=["pgdbpool", "status"])
    assert result.exit_code == 1
    assert "no runtime_dir" in result.output + capfd.readouterr().err
    app.config["PGDBPOOL"] = {**app.config["PGDBPOOL"], "runtime_dir": str(tmp_path)}
    assert "no process publishes" in runner.invoke(args=["pgdbpool", "status"]).output


@pytest.mark.parametrize("seconds", [0, "5", -1, True])
def test_a_deadline_that_is_not_a_time_is_refused_before_anything_is_opened(seconds: Any) -> None:
    app = flask.Flask("shop")
    app.config.update(PGDBPOOL={}, PGDBPOOL_DEADLINE=seconds)
    with pytest.raises(ValueError, match=f"PGDBPOOL_DEADLINE={seconds!r}"):
        PgDbPool(app)


def test_a_missing_configuration_says_which_key_to_set() -> None:
    with pytest.raises(KeyError, match="PGDBPOOL"):
        PgDbPool(flask.Flask("shop"))


def test_a_wrong_configuration_is_refused() -> None:
    app = flask.Flask("shop")
    app.config["PGDBPOOL"] = {"db": {"host": "127.0.0.1", "port": closed_port()}, "grps": {}}
    with pytest.raises(pgdbpool.ConfigError, match="grps"):
        PgDbPool(app)

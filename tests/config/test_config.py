"""What a configuration may say, and what is said about one that is wrong."""

from __future__ import annotations

import copy
import dataclasses
import io
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import kwargs_row

from pgdbpool._config.load import load
from pgdbpool._config.model import (
    CONFIG_KEYS,
    DB_KEYS,
    GROUP_KEYS,
    KEEPALIVES,
    RATE_KEYS,
    TENANT_KEYS,
    Config,
    EndpointConfig,
    GroupConfig,
    RateLimit,
    TenantConfig,
    TenantSetting,
)
from pgdbpool.cluster import Cluster
from pgdbpool.errors import ConfigError, Error

SECRET = "pl4nted-s3cret"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def plain_libpq(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take libpq's variables away, so that its built-in defaults show."""
    for name in list(os.environ):
        if name.startswith("PG") and not name.startswith("PGDBPOOL_"):
            monkeypatch.delenv(name)


def config(db: object = None, groups: object = None, **top: object) -> Config:
    db = {"host": "h"} if db is None else db
    return load({"db": db, "groups": {"g": {}} if groups is None else groups, **top})


def endpoint(**keys: object) -> EndpointConfig:
    return config(db={"host": "h", **keys}).endpoints[0]


def group(**keys: object) -> GroupConfig:
    return config(groups={"g": keys}).groups["g"]


def tenant(given: object) -> TenantConfig:
    found = group(tenant=given).tenant
    assert found is not None
    return found


def tenant_problems(given: object) -> dict[str, str]:
    """Return what is said about a tenant, by the place in it."""
    found = problems({"db": {"host": "h"}, "groups": {"g": {"tenant": given}}})
    return {path.removeprefix("groups.g.tenant"): message for path, message in found.items()}


def from_yaml(text: str, **environ: str) -> Config:
    return load(io.StringIO(text), environ)


def refusal(source: Any = None, environ: Mapping[str, str] | None = None) -> ConfigError:
    """Return the error of a source, which is of the one class that load() may raise and shows no password."""
    with pytest.raises(ConfigError) as caught:
        load(source, environ or {})
    error = caught.value
    for text in (str(error), repr(error), repr(error.problems)):
        assert SECRET not in text
    assert error.__context__ is None
    assert error.__cause__ is None
    return error


def problems(source: Any = None, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    return {problem.path: problem.message for problem in refusal(source, environ).problems}


def db_problem(key: str, **keys: object) -> str:
    return problems({"db": {"host": "h", **keys}, "groups": {"g": {}}})[f"db.{key}"]


def group_problem(key: str, **keys: object) -> str:
    return problems({"db": {"host": "h"}, "groups": {"g": keys}})[f"groups.g.{key}"]


# Version 1.


def test_a_version_1_dict_loads_as_it_stands() -> None:
    loaded = load(
        {
            "type": "threaded",
            "db": {"host": "127.0.0.1", "name": "testdb", "user": "testuser", "pass": "testpass"},
            "groups": {"default": {"connection_count": 20, "autocommit": True}},
        }
    )
    assert loaded.type == "threaded"
    (server,) = loaded.endpoints
    assert (server.host, server.dbname, server.user, server.password) == (
        "127.0.0.1",
        "testdb",
        "testuser",
        "testpass",
    )
    pool = loaded.groups["default"]
    assert (pool.connection_count, pool.min_size, pool.autocommit) == (20, 20, True)
    assert pool.endpoints == (server.label,) == ("127.0.0.1:5432",)


def test_all_version_1_keys_of_a_server_are_taken() -> None:
    keys = {
        "port": 5433,
        "ssl": "disable",
        "connect_timeout": 30,
        "connection_retry_sleep": 1,
        "query_timeout": 30000,
        "session_tmp_buffer": 128,
    }
    with pytest.warns(DeprecationWarning, match="connection_retry_sleep"):
        server = endpoint(**keys)
    assert (server.port, server.sslmode, server.connect_timeout) == (5433, "disable", 30.0)
    assert (server.query_timeout, server.session_tmp_buffer) == (30000, 128)


def test_the_deprecation_warning_points_at_the_caller() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load({"db": {"connection_retry_sleep": 1}, "groups": {"g": {}}})
    assert [warning.filename for warning in caught] == [__file__]


def test_the_callers_dict_is_not_modified() -> None:
    source = {
        "db": [{"host": "a", "options": {"work_mem": "1MB"}}, {"host": "b"}],
        "groups": {"g": {"endpoints": ["a:5432"]}, "h": {}},
    }
    before = copy.deepcopy(source)
    load(source)
    assert source == before


def test_later_changes_of_the_callers_dict_do_not_reach_the_configuration() -> None:
    options = {"work_mem": "1MB"}
    server = endpoint(options=options)
    options["work_mem"] = "2MB"
    assert server.options == {"work_mem": "1MB"}


# The result.


def test_a_configuration_cannot_be_changed() -> None:
    loaded = config(db={"options": {"work_mem": "1MB"}}, groups={"g": {"tenant": "app.t", "settings": {}}})
    server, pool = loaded.endpoints[0], loaded.groups["g"]
    for instance, field in ((loaded, "type"), (server, "host"), (pool, "timeout"), (pool.tenant, "verify")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(instance, field, "x")
    assert pool.tenant is not None
    for mapping in (loaded.groups, server.options, pool.settings, pool.tenant.settings):
        assert isinstance(mapping, MappingProxyType)


def test_equal_configurations_are_equal_and_can_be_hashed() -> None:
    assert config() == config()
    groups = {"g": {"tenant": "app.t", "settings": {"work_mem": "1MB"}}}
    assert len({config(groups=groups), config(groups=groups)}) == 1
    assert endpoint(options={"work_mem": "1MB"}) != endpoint()


def test_defaults() -> None:
    loaded = config(db=[{"host": "a"}, {"host": "b"}])
    assert loaded.type == "threaded"
    assert loaded.endpoints[1] == EndpointConfig(label="b:5432", host="b")
    assert loaded.groups["g"] == GroupConfig(
        name="g",
        connection_count=10,
        min_size=10,
        autocommit=True,
        endpoints=("a:5432", "b:5432"),
        target="any",
        balance="round-robin",
        timeout=10.0,
        max_waiting=0,
        reserved=0,
        rate_limit=None,
        max_lifetime=3600.0,
        max_idle=600.0,
        num_workers=1,
        connect_timeout=None,
        query_timeout=None,
        ping="auto",
        ping_after=30.0,
        ping_timeout=2.0,
        prepare_threshold=5,
        row_factory="row",
        sqlprepare=False,
        tenant=None,
        settings={},
        reset="auto",
    )


def test_the_connect_timeout_is_5_seconds_and_10_with_a_single_server() -> None:
    assert config(db=[{"host": "a"}, {"host": "b"}]).endpoints[0].connect_timeout == 5.0
    assert config(db=[{"host": "a"}]).endpoints[0].connect_timeout == 10.0
    assert config(db={"host": "a"}).endpoints[0].connect_timeout == 10.0
    assert config(db={"host": "a", "connect_timeout": 3}).endpoints[0].connect_timeout == 3.0


def test_a_rate_limit_is_a_mapping_or_a_number() -> None:
    assert group(rate_limit=2.5).rate_limit == RateLimit(per_second=2.5, burst=3, max_wait=1.0)
    given = {"per_second": 10, "burst": 1, "max_wait": "200ms"}
    assert group(rate_limit=given).rate_limit == RateLimit(per_second=10.0, burst=1, max_wait=0.2)
    variables = {"DATABASE_URL": "postgresql://h/d", "PGDBPOOL_RATE_LIMIT": "{per_second: 5, burst: 7}"}
    loaded = load(None, variables).groups["default"]
    assert loaded.rate_limit == RateLimit(per_second=5.0, burst=7, max_wait=1.0)


def test_the_reserved_share_is_below_connection_count() -> None:
    assert group(connection_count=3, reserved=2).reserved == 2
    found = problems({"db": {"host": "h"}, "groups": {"g": {"connection_count": 3, "reserved": 3}}})
    assert found == {"groups.g.reserved": "must be below connection_count (3), not 3"}


def test_min_size_is_connection_count_unless_given() -> None:
    assert group(connection_count=7).min_size == 7
    assert group(connection_count=7, min_size=0).min_size == 0


def test_a_group_without_keys_has_all_defaults() -> None:
    assert from_yaml("db: {host: h}\ngroups:\n  g:\n").groups["g"] == group()


def test_the_origin_tells_where_a_configuration_came_from(tmp_path: Path) -> None:
    path = tmp_path / "pool.yaml"
    path.write_text("db: {}\ngroups: {g: }\n")
    assert config().origin == "dict"
    assert load(path).origin == load(str(path)).origin == str(path)
    with path.open() as text, path.open("rb") as binary:
        assert load(text).origin == load(binary).origin == str(path)
    assert load(None, {"PGDBPOOL_CONFIG": str(path)}).origin == str(path)
    assert load(None, {"DATABASE_URL": "postgresql://"}).origin == "environment"


# Values.


@pytest.mark.parametrize(
    ("given", "meant"),
    [("threaded", "threaded"), ("non-threaded", "non-threaded"), ("lock-free", "non-threaded")],
)
def test_type_has_two_values_and_a_second_spelling(given: str, meant: str) -> None:
    assert config(type=given).type == meant


@pytest.mark.parametrize("mode", ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"])
def test_ssl_takes_libpqs_words(mode: str) -> None:
    assert endpoint(ssl=mode).sslmode == endpoint(ssl=mode).conninfo_params()["sslmode"] == mode


def test_ssl_takes_true_and_false_and_is_libpqs_own_default_otherwise() -> None:
    assert endpoint(ssl=True).sslmode == "require"
    assert endpoint(ssl=False).sslmode == "disable"
    assert endpoint().sslmode is None
    assert "must be one of disable" in db_problem("ssl", ssl=1)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [(2, 2.0), (0.5, 0.5), ("500ms", 0.5), ("5s", 5.0), ("2 min", 120.0), ("1h", 3600.0)],
)
def test_a_duration_is_a_number_of_seconds_or_a_string_with_a_unit(given: object, seconds: float) -> None:
    assert endpoint(connect_timeout=given).connect_timeout == seconds
    durations = dict.fromkeys(
        ["timeout", "max_lifetime", "max_idle", "connect_timeout", "ping_after", "ping_timeout"], given
    )
    pool = group(**durations)
    assert {getattr(pool, name) for name in durations} == {seconds}
    assert {type(getattr(pool, name)) for name in durations} == {float}


@pytest.mark.parametrize(
    ("given", "milliseconds"), [(0, 0), (250, 250), ("250ms", 250), ("1.001s", 1001), ("2min", 120_000)]
)
def test_query_timeout_is_milliseconds_or_a_string_with_a_unit(given: object, milliseconds: int) -> None:
    assert endpoint(query_timeout=given).query_timeout == milliseconds
    assert group(query_timeout=given).query_timeout == milliseconds


@pytest.mark.parametrize(
    "given", ["5", "5 days", "s", "-1s", "", "1e3s", "\u0661s", "0.5ms", 0.5, -1, 2**31, True, None]
)
def test_no_other_query_timeout_is_taken(given: object) -> None:
    message = db_problem("query_timeout", query_timeout=given)
    assert "must be whole milliseconds from 0 (= none) up to 2147483647" in message


@pytest.mark.parametrize(
    "given",
    ["5", "soon", 0, -1, 3601, float("nan"), float("inf"), 10**400, "61min", True, None, [5], {"s": 5}],
)
def test_no_other_connect_timeout_is_taken(given: object) -> None:
    assert "must be seconds above 0 up to 3600" in db_problem("connect_timeout", connect_timeout=given)


def test_zero_switches_optional_limits_off() -> None:
    pool = group(
        max_lifetime=0, max_idle=0, max_waiting=0, ping_after=0, query_timeout=0, prepare_threshold=0
    )
    assert (pool.max_lifetime, pool.max_idle, pool.max_waiting) == (0, 0, 0)
    assert (pool.ping_after, pool.query_timeout, pool.prepare_threshold) == (0, 0, 0)
    for key in ("timeout", "ping_timeout", "connect_timeout", "connection_count", "num_workers"):
        assert "not 0" in group_problem(key, **{key: 0})


@pytest.mark.parametrize(
    ("key", "low", "high"),
    [("connection_count", 1, 10_000), ("num_workers", 1, 64), ("max_waiting", 0, 1_000_000)],
)
def test_counts_of_a_group_are_integers_within_bounds(key: str, low: int, high: int) -> None:
    assert getattr(group(**{key: low}), key) == low
    assert getattr(group(**{key: high}), key) == high
    for wrong in (low - 1, high + 1, True, 1.0, "1", None, 10**5000):
        assert f"must be an integer from {low}" in group_problem(key, **{key: wrong})


@pytest.mark.parametrize(
    ("key", "low", "high"), [("port", 1, 65535), ("weight", 1, 1000), ("session_tmp_buffer", 1, 16_384)]
)
def test_counts_of_a_server_are_integers_within_bounds(key: str, low: int, high: int) -> None:
    assert getattr(endpoint(**{key: low}), key) == low
    assert getattr(endpoint(**{key: high}), key) == high
    for wrong in (low - 1, high + 1, True, 1.0, "1", 10**5000):
        assert f"must be an integer from {low}" in db_problem(key, **{key: wrong})


def test_min_size_is_at_most_connection_count() -> None:
    assert group_problem("min_size", connection_count=5, min_size=6) == (
        "must be at most connection_count (5), not 6"
    )
    assert group_problem("min_size", min_size=11) == "must be at most connection_count (10), not 11"


@pytest.mark.parametrize("key", ["autocommit", "sqlprepare"])
def test_booleans_are_booleans(key: str) -> None:
    assert getattr(group(**{key: False}), key) is False
    for wrong in (0, 1, "true", None):
        assert "must be true or false" in group_problem(key, **{key: wrong})


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("target", ["any", "read-write", "read-only", "primary", "standby", "prefer-standby"]),
        ("balance", ["round-robin", "least-connections", "random"]),
        ("ping", ["auto", "always", "never"]),
        ("reset", ["auto", "always", "never"]),
    ],
)
def test_choices_are_words_and_nothing_else(key: str, words: list[str]) -> None:
    for word in words:
        assert getattr(group(**{key: word}), key) == word
    for wrong in (True, False, None, 1, "", [words[0]]):
        assert f"must be one of {', '.join(words)}" in group_problem(key, **{key: wrong})


def test_prepare_threshold_may_be_null_which_is_never() -> None:
    assert group(prepare_threshold=None).prepare_threshold is None
    assert from_yaml("{db: {}, groups: {g: {prepare_threshold: null}}}").groups["g"].prepare_threshold is None


def test_null_is_accepted_only_if_leaving_out_means_something() -> None:
    assert endpoint(host=None, port=None, user=None, session_tmp_buffer=None).label == "[local]:5432"
    assert group(connect_timeout=None, query_timeout=None) == group()
    assert "not None" in group_problem("timeout", timeout=None)


def test_row_factory_is_a_word_a_callable_or_the_name_of_one() -> None:
    for word in ("row", "tuple", "dict", "namedtuple"):
        assert group(row_factory=word).row_factory == word
    assert group(row_factory=kwargs_row).row_factory is kwargs_row
    assert group(row_factory="psycopg.rows:kwargs_row").row_factory is kwargs_row
    assert group(row_factory="collections:OrderedDict.fromkeys").row_factory


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("no_such_module_here:row", "importing it raised ModuleNotFoundError"),
        ("psycopg.rows:no_such_row", "importing it raised AttributeError"),
        ("psycopg.rows:__name__", "which is not callable"),
        ("psycopg.rows.kwargs_row", "must be one of row, tuple, dict, namedtuple, a callable"),
        ("tupel", "did you mean 'tuple'?"),
        (5, "not 5"),
    ],
)
def test_any_other_row_factory_is_refused(given: object, reason: str) -> None:
    assert reason in group_problem("row_factory", row_factory=given)


def test_a_row_factory_whose_module_fails_is_a_problem_of_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_rows_module.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    message = group_problem("row_factory", row_factory="failing_rows_module:row")
    assert "importing it raised SystemExit" in message


@pytest.mark.parametrize("wrong", ["", 5, True, ["h"], {"h": 1}, b"h", "a\0b", "\udce4", object()])
def test_text_is_a_string_that_can_be_sent(wrong: object) -> None:
    for key in ("host", "name", "user", "label", "application_name"):
        assert "must be " in db_problem(key, **{key: wrong})


def test_an_empty_password_is_one_left_out() -> None:
    assert endpoint(**{"pass": ""}).password is None


def test_the_name_of_a_group_is_a_printable_string() -> None:
    for wrong in ("", 1, None, True, ("a", "b"), "a\nb"):
        (message,) = problems({"db": {}, "groups": {wrong: {}}}).values()
        assert "the name of a group must be a non-empty string" in message


def test_at_least_one_server_and_one_group_are_needed() -> None:
    assert "is missing" in problems({"groups": {"g": {}}})["db"]
    assert "is missing" in problems({"db": {}})["groups"]
    assert "not an empty list" in problems({"db": [], "groups": {"g": {}}})["db"]
    assert "not an empty one" in problems({"db": {}, "groups": {}})["groups"]
    assert set(problems({})) == {"db", "groups"}


# Servers: labels, conninfo, files, settings.


def test_a_label_is_host_and_port_unless_given() -> None:
    labels = [server.label for server in config(db=[{"host": "a"}, {"host": "a", "port": 5433}]).endpoints]
    assert labels == ["a:5432", "a:5433"]
    assert endpoint(label="primary").label == "primary"
    assert endpoint(host="::1").label == "[::1]:5432"
    assert endpoint(host="/run/postgresql").label == "/run/postgresql:5432"
    assert config(db={"conninfo": "hostaddr=127.0.0.1"}).endpoints[0].label == "127.0.0.1:5432"
    assert config(db={"conninfo": "service=shop"}).endpoints[0].label == "shop"


def test_the_default_label_has_libpqs_own_host_and_port(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config(db={}).endpoints[0].label == "[local]:5432"
    monkeypatch.setenv("PGHOST", "db.internal")
    monkeypatch.setenv("PGPORT", "6432")
    (server,) = config(db={}).endpoints
    assert server.label == "db.internal:6432"
    assert "host" not in server.conninfo_params()
    monkeypatch.setenv("PGHOST", "a,b")
    assert "names several servers: give host and port" in problems({"db": {}, "groups": {"g": {}}})["db"]


def test_two_servers_with_one_label_are_an_error_that_names_both() -> None:
    found = problems({"db": [{"host": "a", "name": "x"}, {"host": "a", "name": "y"}], "groups": {"g": {}}})
    assert found == {"db[1]": "label 'a:5432' is that of db[0] too; give each its own label"}
    found = problems({"db": [{"label": "p"}, {"label": "q"}, {"label": "p"}], "groups": {"g": {}}})
    assert found == {"db[2].label": "label 'p' is that of db[0] too; give each its own label"}


def test_a_group_uses_the_servers_that_it_names() -> None:
    servers = [{"label": "a"}, {"label": "b"}, {"label": "c"}]
    loaded = config(db=servers, groups={"all": {}, "some": {"endpoints": ["c", "a"]}})
    assert loaded.groups["all"].endpoints == ("a", "b", "c")
    assert loaded.groups["some"].endpoints == ("c", "a")


@pytest.mark.parametrize(
    ("labels", "path", "message"),
    [
        (["standby1", "standby"], "[1]", "did you mean 'standby1'?"),
        (["standby1", "standby1"], "[1]", "'standby1' is in the list already, at [0]"),
        (["standby1", 5], "[1]", "must be a non-empty string, not 5"),
        ([], "", "must be a non-empty list of labels, not an empty list"),
        ("standby1", "", "must be a non-empty list of labels, not 'standby1'"),
    ],
)
def test_wrong_endpoints_of_a_group(labels: object, path: str, message: str) -> None:
    db = [{"label": "primary"}, {"label": "standby1"}]
    found = problems({"db": db, "groups": {"g": {"endpoints": labels}}})
    assert list(found) == [f"groups.g.endpoints{path}"]
    assert message in found[f"groups.g.endpoints{path}"]


def test_a_label_that_could_not_be_told_makes_no_group_wrong() -> None:
    db = [{"label": "a", "port": 0}, {"label": 5}, {"conninfo": "x"}]
    found = problems({"db": db, "groups": {"g": {"endpoints": ["a", "b"]}}})
    assert list(found) == ["db[0].port", "db[1].label", "db[2].conninfo"]


@pytest.mark.parametrize(
    "conninfo",
    [
        "postgresql://web:pw@h:5433/shop?sslmode=require&application_name=x&connect_timeout=3",
        "host=h port=5433 user=web password=pw dbname=shop sslmode=require application_name=x "
        "connect_timeout=3",
    ],
)
def test_a_conninfo_stands_for_the_parts(conninfo: str) -> None:
    (server,) = config(db={"conninfo": conninfo}).endpoints
    assert (server.label, server.host, server.port, server.user) == ("h:5433", "h", 5433, "web")
    assert (server.password, server.dbname, server.sslmode) == ("pw", "shop", "require")
    assert (server.application_name, server.connect_timeout) == ("x", 3.0)


def test_a_conninfo_may_have_any_parameter_of_libpq() -> None:
    params = endpoint(conninfo="channel_binding=disable krbsrvname=pg").conninfo_params()
    assert (params["channel_binding"], params["krbsrvname"], params["host"]) == ("disable", "pg", "h")


def test_parts_beside_a_conninfo_add_to_it_and_must_not_contradict_it() -> None:
    uri = "postgresql://web@h/shop"
    (server,) = config(db={"conninfo": uri, "pass": "pw", "host": "h", "ssl": True}).endpoints
    assert (server.password, server.host, server.sslmode) == ("pw", "h", "require")
    source = {
        "db": {"conninfo": f"postgresql://web:{SECRET}@h/shop", "host": "k", "pass": "pw", "name": "store"},
        "groups": {"g": {}},
    }
    assert problems(source) == {
        "db.host": "contradicts conninfo: 'k' here, 'h' there",
        "db.pass": "contradicts conninfo: '***' here, '***' there",
        "db.name": "contradicts conninfo: 'store' here, 'shop' there",
    }


@pytest.mark.parametrize(
    ("conninfo", "message"),
    [
        ("postgresql://a,b/shop", "one server per entry, list them separately"),
        ("host=a,b", "one server per entry, list them separately"),
        ("hostaddr=127.0.0.1,127.0.0.2", "one server per entry, list them separately"),
        ("host=a port=99999", "its port must be an integer from 1 to 65535, not 99999"),
        ("host=a sslmode=on", "its sslmode must be one of disable"),
        ("host=a connect_timeout=0", "its connect_timeout must be seconds above 0"),
        ("host=a target_session_attrs=read-write", "use target of the groups"),
        ("host=a options='-c statement_timeout=5'", "must be left to query_timeout"),
        (f"postgresql://u:{SECRET}@h/d?pool_size=5", "'pool_size' is none of its parameters"),
        (f"postgresql://u:{SECRET}@h/d?ssl_mode=require", "did you mean 'sslmode'?"),
        (f"postgresql://u:{SECRET}", "its port must be an integer from 1 to 65535"),
        (f"postgresql://u:{SECRET}/x@h/d", "in a password, / is written %2F"),
        (f"postgresql://u:x@{SECRET}@h/d", "an @ in the password of a URI is written %40"),
        ("hots=a", "'hots' is none of its parameters; did you mean 'host'?"),
        (f"postgresql+psycopg://u:{SECRET}@h/d", "must be a URI (postgresql://...)"),
        (f"host=h password='{SECRET}", "must be a URI (postgresql://...)"),
        (f"postgresql://u:%{SECRET}@h", "must be a URI (postgresql://...)"),
        (f"host=h password={SECRET} {SECRET}=5", "must be a URI (postgresql://...)"),
        ("\udce4", "must be a non-empty string"),
        (5, "must be a non-empty string"),
    ],
)
def test_a_conninfo_that_cannot_be_used(conninfo: object, message: str) -> None:
    assert message in problems({"db": {"conninfo": conninfo}, "groups": {"g": {}}})["db.conninfo"]


def test_a_host_is_one_host() -> None:
    assert "one server per entry, list them separately" in db_problem("host", host="a,b")


def test_a_password_file_is_read_without_the_newline_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "password"
    for content in (b"pw with space ", b"pw with space \n", b"pw with space \r\n"):
        path.write_bytes(content)
        assert endpoint(pass_file=str(path)).password == "pw with space "
    assert endpoint(pass_file=path).pass_file == str(path)
    loaded = from_yaml(f"db: {{pass_file: {path}}}\ngroups: {{g: }}")
    assert loaded.endpoints[0].password == "pw with space "


@pytest.mark.parametrize("content", [b"", b"\n", b"a\nb\n", b"a\0b", b"\xff", b"x" * 70_000])
def test_a_password_file_holds_one_password_alone(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_bytes(content)
    assert f"{str(path)!r}"[:50] in db_problem("pass_file", pass_file=str(path))


@pytest.mark.parametrize("key", ["user", "pass"])
def test_a_function_for_the_login_is_given_or_named(key: str) -> None:
    field = {"user": "user", "pass": "password"}[key]
    assert getattr(endpoint(**{key: os.getpid}), field) is os.getpid
    assert getattr(endpoint(**{key: {"call": "os:getcwd"}}), field) is os.getcwd
    assert getattr(endpoint(**{key: "os:getcwd"}), field) == "os:getcwd"
    assert "user" not in endpoint(user=os.getcwd).conninfo_params()
    for wrong in ({}, {"call": "os"}, {"call": "os:nothing"}, {"call": "os:getcwd", "x": 1}, {"cal": "os:x"}):
        assert "callable" in db_problem(key, **{key: wrong})
    uri = f"postgresql://u:{SECRET}@h"
    assert "contradicts conninfo" in db_problem(key, conninfo=uri, **{key: os.getcwd})


def test_a_password_file_that_is_missing_or_one_password_too_many(tmp_path: Path) -> None:
    path = tmp_path / "password"
    assert "which is not a file" in db_problem("pass_file", pass_file=str(path))
    assert "which is not a file" in db_problem("pass_file", pass_file=str(tmp_path))
    path.write_text("pw")
    assert "keep one of the two" in db_problem("pass_file", pass_file=str(path), **{"pass": SECRET})
    uri = f"postgresql://u:{SECRET}@h"
    assert "keep one of the two" in db_problem("pass_file", pass_file=str(path), conninfo=uri)


def test_files_of_tls_exist_and_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.crt").write_text("")
    for key in ("sslrootcert", "sslcert", "sslkey", "sslcrl"):
        assert endpoint(**{key: "~/x.crt"}).conninfo_params()[key] == str(tmp_path / "x.crt")
        assert "which is not a file" in db_problem(key, **{key: "~/y.crt"})
    assert endpoint(sslrootcert="system").sslrootcert == "system"
    assert endpoint(ssl="verify-full").sslrootcert is None


def test_server_settings_are_names_and_plain_values() -> None:
    options = {
        "work_mem": "64MB",
        "app.tenant": "x",
        "geqo": False,
        "jit": True,
        "random_page_cost": 1.1,
        "seed": 5,
    }
    assert endpoint(options=options).options == {
        "work_mem": "64MB",
        "app.tenant": "x",
        "geqo": "off",
        "jit": "on",
        "random_page_cost": "1.1",
        "seed": "5",
    }


@pytest.mark.parametrize(
    ("options", "path", "message"),
    [
        ({"work mem": "1"}, "['work mem']", "is not the name of a server setting"),
        ({"a.": "1"}, "['a.']", "is not the name of a server setting"),
        ({5: "1"}, "[5]", "is not the name of a server setting"),
        ({"work_mem": None}, ".work_mem", "must be a string, a number, true or false, not None"),
        ({"work_mem": ["1"]}, ".work_mem", "not a list"),
        ({"work_mem": float("nan")}, ".work_mem", "not nan"),
        ({"work_mem": "a\0b"}, ".work_mem", "must be a string"),
        ({"app.password": [SECRET]}, "['app.password']", "not '***'"),
        ({"Statement_Timeout": "1s"}, ".Statement_Timeout", "must be left to query_timeout"),
        ({"temp_buffers": "8MB"}, ".temp_buffers", "contradicts session_tmp_buffer"),
        ("work_mem=1", "", "must be a mapping of server settings"),
    ],
)
def test_wrong_server_settings(options: object, path: str, message: str) -> None:
    assert message in db_problem(f"options{path}", options=options, session_tmp_buffer=8)


# Tenants and settings of blocks.


def test_a_tenant_is_one_setting_with_a_type() -> None:
    given = {"setting": "app.current_tenant_id", "type": "uuid", "required": False, "verify": "warn"}
    found = tenant(given)
    assert dict(found.settings) == {"app.current_tenant_id": ("uuid", None)}
    assert (found.required, found.verify) == (False, "warn")


def test_a_tenant_is_text_required_and_verified_unless_it_says_otherwise() -> None:
    found = tenant({"setting": "app.tenant"})
    assert found == TenantConfig(settings={"app.tenant": ("text", None)}, required=True, verify="error")


def test_the_name_of_a_setting_is_short_for_a_tenant() -> None:
    assert tenant("app.tenant") == tenant({"setting": "app.tenant"})
    assert from_yaml("{db: {}, groups: {g: {tenant: app.t}}}").groups["g"].tenant == tenant("app.t")


@pytest.mark.parametrize("kind", ["uuid", "int", "text"])
def test_the_type_of_a_tenant_is_a_word(kind: str) -> None:
    assert dict(tenant({"setting": "app.t", "type": kind}).settings) == {"app.t": (kind, None)}
    assert dict(tenant({"settings": {"app.t": kind}}).settings) == {"app.t": (kind, None)}


def test_a_regex_has_a_pattern() -> None:
    typed = {"type": "regex", "pattern": "[a-z]{2}"}
    assert dict(tenant({"setting": "app.t", **typed}).settings) == {"app.t": ("regex", "[a-z]{2}")}
    assert tenant({"settings": {"app.t": typed}}) == tenant({"setting": "app.t", **typed})


def test_several_settings_keep_their_order() -> None:
    settings = {"app.z": "uuid", "app.a": {}, "app.m": {"type": "regex", "pattern": "x+"}, "app.b": "int"}
    assert list(tenant({"settings": settings}).settings.items()) == [
        ("app.z", ("uuid", None)),
        ("app.a", ("text", None)),
        ("app.m", ("regex", "x+")),
        ("app.b", ("int", None)),
    ]


@pytest.mark.parametrize("name", ["app.tenant", "A.b", "_a._b$1", "a.b.c", f"{'a' * 63}.{'b' * 63}"])
def test_a_tenants_setting_has_a_qualified_custom_name(name: str) -> None:
    assert list(tenant(name).settings) == list(tenant({"settings": {name: "int"}}).settings) == [name]


@pytest.mark.parametrize(
    "name",
    [
        *("tenant", "", ".", "app.", ".tenant", "app..tenant", "app.1", "1.app", "$a.b", "app.tenant id"),
        *("app.te-nant", "app.ténant", "app.t\n", "app.t\0", "app.t'; DROP TABLE x; --", "app.\udce4"),
        *(f"{'a' * 64}.b", f"a.{'b' * 64}", 5, None, True, 1.5, b"app.t"),
    ],
)
def test_no_other_name_is_that_of_a_tenants_setting(name: object) -> None:
    told = "must be a qualified custom name, such as app.current_tenant_id"
    assert told in tenant_problems({"setting": name})[".setting"]
    ((path, message),) = tenant_problems({"settings": {name: "uuid"}}).items()
    assert path.startswith((".settings[", ".settings."))
    assert told in message
    if isinstance(name, str):
        assert told in tenant_problems(name)[""]


@pytest.mark.parametrize(
    ("given", "path", "message"),
    [
        (None, "", "not None; leave it out for a group without tenants"),
        (5, "", "must be a mapping, or the name of a setting, such as app.current_tenant_id, not 5"),
        (["app.t"], "", "not a list"),
        ({}, "", "must have the key setting, the name of one, or settings"),
        ({"type": "uuid"}, "", "must have the key setting"),
        ({"setting": "app.t", "typ": "uuid"}, ".typ", "did you mean 'type'?"),
        (
            {"setting": "app.t", "type": "uid"},
            ".type",
            "must be one of uuid, int, text, regex, not 'uid'; did",
        ),
        ({"setting": "app.t", "type": None}, ".type", "not None"),
        ({"setting": "app.t", "required": "yes"}, ".required", "must be true or false, not 'yes'"),
        ({"setting": "app.t", "required": None}, ".required", "not None"),
        ({"setting": "app.t", "verify": "of"}, ".verify", "did you mean 'off'?"),
        ({"setting": "app.t", "verify": None}, ".verify", "not None"),
        ({"setting": "app.t", "type": "regex"}, "", "must have the key pattern"),
        ({"setting": "app.t", "pattern": "x"}, ".pattern", "goes with type: regex, and this is text"),
        ({"setting": "app.t", "type": "int", "pattern": "x"}, ".pattern", "and this is int"),
        ({"settings": {}}, ".settings", "must be a non-empty mapping of setting names to types"),
        ({"settings": ["app.t"]}, ".settings", "not a list"),
        ({"settings": None}, ".settings", "not None"),
        (
            {"settings": {"app.t": None}},
            ".settings['app.t']",
            "must be one of uuid, int, text, regex, not None",
        ),
        ({"settings": {"app.t": "uid"}}, ".settings['app.t']", "did you mean 'uuid'?"),
        ({"settings": {"app.t": {"typ": "x"}}}, ".settings['app.t'].typ", "did you mean 'type'?"),
        ({"settings": {"app.t": {"type": "uid"}}}, ".settings['app.t'].type", "did you mean 'uuid'?"),
        ({"settings": {"app.t": {"required": True}}}, ".settings['app.t'].required", "unknown key"),
        ({"settings": {"app.t": "regex"}}, ".settings['app.t']", "must have the key pattern"),
        ({"settings": {"app.t": {"pattern": "x"}}}, ".settings['app.t'].pattern", "goes with type: regex"),
        ({"settings": {"app.t": "int", "App.T": "int"}}, ".settings['App.T']", "the same setting as 'app.t'"),
        ({"settings": {"app.t": "int"}, "setting": "app.u"}, ".setting", "contradicts settings"),
        ({"settings": {"app.t": "int"}, "type": "int"}, ".type", "contradicts settings"),
        ({"settings": {"app.t": "int"}, "pattern": "x"}, ".pattern", "contradicts settings"),
    ],
)
def test_a_tenant_that_is_not_clear(given: object, path: str, message: str) -> None:
    found = tenant_problems(given)
    assert list(found) == [path]
    assert message in found[path]


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "not '(': missing ), unterminated subpattern"),
        ("[z-a]", "bad character range z-a"),
        ("x{99999999999999999999}", "too large"),
        ("(" * 20_000, "not '((("),
        ("", "must be a regular expression"),
        (None, "not None"),
        (7, "not 7; quote it"),
        (["a-z"], "not a list; quote it"),
        ({2: None}, "not a mapping; quote it"),
        ("a\0", "not text, such as NUL"),
    ],
)
def test_a_pattern_is_a_regular_expression_of_python(pattern: object, reason: str) -> None:
    assert reason in tenant_problems({"setting": "app.t", "type": "regex", "pattern": pattern})[".pattern"]


def test_a_tenant_in_yaml() -> None:
    text = """
    db: {}
    groups:
      a: {tenant: {setting: app.t, type: uuid, required: no, verify: off}}
      b: {tenant: {setting: app.t, type: regex, pattern: 007}}
      c:
        tenant:
          settings:
            app.tenant_id: uuid
            app.region: {type: regex, pattern: "${REGION}"}
    """
    groups = from_yaml(text, REGION="[a-z]{2}").groups
    assert groups["a"].tenant == TenantConfig(
        settings={"app.t": ("uuid", None)}, required=False, verify="off"
    )
    assert groups["b"].tenant == TenantConfig(settings={"app.t": ("regex", "007")})
    assert groups["c"].tenant == TenantConfig(
        settings={"app.tenant_id": ("uuid", None), "app.region": ("regex", "[a-z]{2}")}
    )


def test_a_tenant_is_never_left_out_by_mistake() -> None:
    """A key without a value, or a variable without one, must not take the tenants away."""
    for value in ("", "null", "${T:-}", "'${T:-}'", "off"):
        found = problems(io.StringIO(f"db: {{}}\ngroups:\n  g:\n    tenant: {value}\n"))
        assert "must be a mapping, or the name of a setting" in found["groups.g.tenant"]


def test_settings_of_a_group_are_names_and_plain_values() -> None:
    settings = {
        "search_path": "a, b",
        "statement_timeout": 500,
        "jit": False,
        "app.x": True,
        "seq_page_cost": 1.5,
    }
    assert dict(group(settings=settings).settings) == {
        "search_path": "a, b",
        "statement_timeout": "500",
        "jit": "off",
        "app.x": "on",
        "seq_page_cost": "1.5",
    }


def test_later_changes_of_the_callers_settings_do_not_reach_the_group() -> None:
    settings, several = {"work_mem": "1MB"}, {"app.t": "uuid"}
    pool = group(settings=settings, tenant={"settings": several})
    settings["work_mem"], several["app.u"] = "2MB", "uuid"
    assert pool == group(settings={"work_mem": "1MB"}, tenant={"setting": "app.t", "type": "uuid"})


@pytest.mark.parametrize(
    ("settings", "path", "message"),
    [
        ({"work mem": 1}, "['work mem']", "is not the name of a server setting"),
        ({"work_mem": None}, ".work_mem", "must be a string, a number, true or false, not None"),
        ({"app.password": [SECRET]}, "['app.password']", "not '***'"),
        (
            {"work_mem": 1, "Work_Mem": 2},
            ".Work_Mem",
            "is the same setting as 'work_mem', since case makes no",
        ),
        ({"app.T": "x"}, "['app.T']", "is the setting of the tenant, which each block gives; remove it here"),
        ({"Statement_Timeout": 5}, ".Statement_Timeout", "contradicts query_timeout, which sets it too"),
        ("work_mem=1", "", "must be a mapping of server settings, such as {work_mem: 64MB}"),
        (None, "", "not None"),
    ],
)
def test_wrong_settings_of_a_group(settings: object, path: str, message: str) -> None:
    keys = {"settings": settings, "tenant": "app.t", "query_timeout": 5}
    assert message in group_problem(f"settings{path}", **keys)


def test_options_that_differ_in_case_only_are_one_setting() -> None:
    message = db_problem("options.WORK_MEM", options={"work_mem": "1MB", "WORK_MEM": "2MB"})
    assert "is the same setting as 'work_mem'" in message


# Transaction poolers.


def test_a_pooler_pools_transactions_or_is_none() -> None:
    assert endpoint(pooler="transaction").pooler == "transaction"
    assert endpoint().pooler is endpoint(pooler=None).pooler is None
    for wrong in ("session", "statement", "pgbouncer", True, False, ""):
        assert "must be the word transaction, not " in db_problem("pooler", pooler=wrong)


def test_nothing_is_given_at_start_up_through_a_pooler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGOPTIONS", "-c geqo=off")
    server = endpoint(pooler="transaction", query_timeout=700)
    assert server.server_options() == server.server_options(50) == ""
    assert server.query_timeout == 700


@pytest.mark.slow
def test_libpq_sends_no_options_if_they_are_empty(
    known_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = known_cluster.primary
    keys = {"host": node.host, "port": node.port, "user": "postgres", "name": "postgres"}
    monkeypatch.setenv("PGOPTIONS", "-c geqo=off")
    for pooler, geqo in ((None, "off"), ("transaction", "on")):
        (server,) = config(db={**keys, "pooler": pooler}).endpoints
        conninfo = make_conninfo("", **server.conninfo_params(), options=server.server_options())
        with psycopg.connect(conninfo) as conn:
            assert conn.execute("SHOW geqo").fetchone() == (geqo,)


def test_startup_settings_are_refused_for_a_pooler() -> None:
    keys = {
        "pooler": "transaction",
        "conninfo": "options='-c jit=off'",
        "options": {"work_mem": "1MB"},
        "session_tmp_buffer": 8,
    }
    found = problems({"db": {"host": "h", **keys}, "groups": {"g": {}}})
    remedy = "write them as settings of the groups, or ALTER ROLE ... SET them at the server"
    assert found == {
        "db.options": f"cannot pass a transaction pooler; {remedy}",
        "db.conninfo": f"has options, which cannot pass a transaction pooler; {remedy}",
        "db.session_tmp_buffer": "cannot pass a transaction pooler; ALTER ROLE ... SET temp_buffers at the "
        "server",
    }
    assert endpoint(pooler="transaction", options={}, session_tmp_buffer=None).pooler == "transaction"


def test_a_group_prepares_nothing_through_a_pooler_by_default() -> None:
    servers = [{"label": "direct"}, {"label": "pooled", "pooler": "transaction"}]
    groups = {
        "all": {},
        "direct": {"endpoints": ["direct"]},
        "pooled": {"endpoints": ["pooled"]},
        "told": {"prepare_threshold": 3},
        "null": {"prepare_threshold": None, "endpoints": ["direct"]},
    }
    loaded = config(db=servers, groups=groups)
    assert {name: pool.prepare_threshold for name, pool in loaded.groups.items()} == {
        "all": None,
        "direct": 5,
        "pooled": None,
        "told": 3,
        "null": None,
    }


def test_sqlprepare_is_refused_through_a_pooler() -> None:
    servers = [{"label": "direct"}, {"label": "pooled", "pooler": "transaction"}]
    groups = {
        "a": {"sqlprepare": True},
        "b": {"sqlprepare": True, "endpoints": ["direct"]},
        "c": {"sqlprepare": True, "endpoints": []},
    }
    found = problems({"db": servers, "groups": groups})
    assert list(found) == ["groups.a.sqlprepare", "groups.c.endpoints"]
    assert found["groups.a.sqlprepare"] == (
        "prepares in the session, and 'pooled' (pooler: transaction) keeps none; leave it out, or use other "
        "endpoints"
    )


def test_a_pooler_whose_label_could_not_be_told_makes_no_group_wrong() -> None:
    db = [{"port": 0, "pooler": "transaction"}, {"label": "a"}]
    assert list(problems({"db": db, "groups": {"g": {"sqlprepare": True}}})) == ["db[0].port"]


# TCP.


def test_keepalives_are_libpqs() -> None:
    keys = {
        "keepalives": True,
        "keepalives_idle": "1min",
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": "20s",
    }
    params = endpoint(**keys).conninfo_params()
    assert {key: params[key] for key in keys} == {
        "keepalives": 1,
        "keepalives_idle": 60,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 20_000,
    }
    assert endpoint(keepalives=0).conninfo_params()["keepalives"] == 0
    for key, wrong in {"keepalives": 2, "keepalives_idle": 0.5, "keepalives_count": 1.5}.items():
        assert "must be " in db_problem(key, **{key: wrong})


# What libpq gets.


def test_parts_left_out_are_left_to_libpq() -> None:
    (server,) = config(db={}).endpoints
    ours = {"connect_timeout", "fallback_application_name", *KEEPALIVES}
    assert set(server.conninfo_params()) == ours
    (local,) = config(db={"host": "/run/postgresql"}).endpoints
    assert set(local.conninfo_params()) == ours - {*KEEPALIVES} | {"host"}
    (own,) = config(db={"conninfo": "tcp_user_timeout=7", "keepalives_idle": 5}).endpoints
    assert own.conninfo_params() | {"tcp_user_timeout": 7, "keepalives_idle": 5} == own.conninfo_params()


def test_conninfo_params_make_a_conninfo_that_libpq_takes() -> None:
    server = endpoint(
        port=5433, name="my db", user="o'hara", connect_timeout=0.2, ssl="prefer", **{"pass": "p\\ w'"}
    )
    params = conninfo_to_dict(make_conninfo("", **server.conninfo_params(), options=server.server_options()))
    assert params["password"] == "p\\ w'"
    assert (params["dbname"], params["user"], params["port"]) == ("my db", "o'hara", "5433")
    assert params["connect_timeout"] == "1"


def test_server_options_have_the_timeout_the_buffers_and_the_settings() -> None:
    server = endpoint(session_tmp_buffer=128, options={"search_path": "a, b", "app.path": "c:\\d"})
    assert server.server_options() == (
        r"-c statement_timeout=5000 -c temp_buffers=128MB -c search_path=a,\ b -c app.path=c:\\d"
    )
    assert endpoint().server_options(0) == "-c statement_timeout=0"


def test_options_of_the_conninfo_or_the_environment_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGOPTIONS", "-c geqo=off")
    assert endpoint().server_options() == "-c geqo=off -c statement_timeout=5000"
    server = endpoint(conninfo="options='-c jit=off'")
    assert server.server_options() == "-c jit=off -c statement_timeout=5000"
    assert "options" not in server.conninfo_params()


def test_a_server_takes_the_options_as_they_were_written(known_cluster: Cluster) -> None:
    settings = {"app.text": "two words, a \\ and a 'quote'\tand a tab", "work_mem": "5MB", "app.empty": ""}
    node = known_cluster.primary
    keys = {"host": node.host, "port": node.port, "user": "postgres", "name": "postgres"}
    (server,) = config(db={**keys, "session_tmp_buffer": 12, "options": settings}).endpoints
    conninfo = make_conninfo("", **server.conninfo_params(), options=server.server_options(1500))
    with psycopg.connect(conninfo) as conn:
        for name, value in {**settings, "statement_timeout": "1500ms", "temp_buffers": "12MB"}.items():
            assert conn.execute("SELECT current_setting(%s)", (name,)).fetchone() == (value,)
        shown = conn.execute("SELECT current_setting('application_name')").fetchone()
    assert shown == ("pgdbpool",)


# Problems.


def test_all_problems_are_reported_together_a_line_each() -> None:
    error = refusal(
        {
            "tpye": "threaded",
            "db": [{"host": "a", "prot": 5432}, {"label": "b", "port": 99999, "pass": [SECRET]}],
            "groups": {
                "read": {"timeout": "soon", "connection_count": True},
                "write": {"endpoints": ["c:5432"]},
            },
        }
    )
    assert isinstance(error, Error)
    assert isinstance(error, ValueError)
    assert [problem.path for problem in error.problems] == [
        "tpye",
        "db[0].prot",
        "db[1].port",
        "db[1].pass",
        "groups.read.timeout",
        "groups.read.connection_count",
        "groups.write.endpoints[0]",
    ]
    head, *lines = str(error).splitlines()
    assert head == "7 problems in the configuration (dict):"
    assert lines == [f"  {problem.path}: {problem.message}" for problem in error.problems]


def test_an_unknown_key_is_reported_with_the_nearest_known_one() -> None:
    assert db_problem("hots", hots="h") == "unknown key; did you mean 'host'?"
    assert group_problem("min_sizes", min_sizes=1) == "unknown key; did you mean 'min_size'?"
    assert problems({"db": {}, "group": {}})["group"] == "unknown key; did you mean 'groups'?"
    assert db_problem("xyzzy", xyzzy=1).startswith("unknown key; known are label, host, port, name, user")


def test_a_wrong_word_is_reported_with_the_nearest_allowed_one() -> None:
    assert group_problem("ping", ping="allways").endswith("not 'allways'; did you mean 'always'?")
    assert problems({"type": "lockfree", "db": {}, "groups": {"g": {}}})["type"].endswith(
        "did you mean 'lock-free'?"
    )


def test_a_number_in_quotes_is_reported_as_such() -> None:
    assert db_problem("port", port="5432").endswith("not '5432'; write it without quotes")


def test_odd_keys_are_unknown_keys() -> None:
    found = problems({"db": {1: 2, None: 3, (1, 2): 4, "a b": 5}, "groups": {"g": {}}, "\n": 1})
    assert list(found) == ["['\\n']", "db[1]", "db[None]", "db[a list]", "db['a b']"]


def test_a_wrong_value_is_shown_in_short() -> None:
    for value in ("x" * 10_000, 10**10_000, ["x" * 10_000], type("T" * 500, (), {})()):
        assert len(group_problem("timeout", timeout=value)) < 180
    assert group_problem("timeout", timeout="x" * 61).endswith(f"not '{'x' * 56}...")


def test_containers_in_place_of_plain_values_and_the_other_way_round() -> None:
    assert "must be a mapping, not 'h'" in problems({"db": ["h"], "groups": {"g": {}}})["db[0]"]
    assert "not 5" in problems({"db": 5, "groups": {"g": {}}})["db"]
    assert "not ['g']" not in problems({"db": {}, "groups": ["g"]})["groups"]
    assert "must be a mapping, not 5" in problems({"db": {}, "groups": {"g": 5}})["groups.g"]
    assert "goes under db: {conninfo: ...}" in problems({"db": "postgresql://h", "groups": {"g": {}}})["db"]


def test_a_dict_that_contains_itself_is_only_wrong() -> None:
    cyclic: dict[str, Any] = {"groups": {"g": {}}}
    cyclic["db"] = [cyclic, [cyclic]]
    cyclic["groups"]["h"] = cyclic
    assert "db[0].db" in problems(cyclic)


@pytest.mark.parametrize("wrong", [5, 1.5, True, b"pool.yaml", [("db", {})], {"db"}, object(), io.StringIO])
def test_no_other_source_is_taken(wrong: object) -> None:
    assert list(problems(wrong)) in (["source"], ["stream"])


def test_the_error_survives_pickling() -> None:
    error = refusal({})
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.problems) == (str(error), error.problems)


# Passwords.


def test_no_repr_shows_a_password(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text(SECRET)
    for keys in (
        {"pass": SECRET},
        {"pass_file": str(path)},
        {"conninfo": f"postgresql://u:{SECRET}@h"},
        {"options": {"app.key": SECRET}},
    ):
        loaded = config(db=keys)
        assert SECRET in str(loaded.endpoints[0].conninfo_params()) + loaded.endpoints[0].server_options()
        for instance in (loaded, loaded.endpoints, loaded.endpoints[0], loaded.groups):
            assert SECRET not in repr(instance) + str(instance)
    assert SECRET not in repr(group(settings={"app.key": SECRET}))


@pytest.mark.parametrize(
    "source",
    [
        {"db": {"host": f"postgresql://u:{SECRET}@h/d", "port": 0}, "groups": {}},
        {"db": f"postgresql://u:{SECRET}@h/d", "groups": {}},
        {"db": f"host=h password={SECRET}", "groups": {}},
        {"db": {"pas": SECRET, "pass ": SECRET, "password": SECRET}, "groups": {"g": {}}},
        {"db": {"pass": {"value": SECRET}}, "groups": {"g": {"timeout": {"pass": SECRET}}}},
        {"db": {"label": f"u:{SECRET}@h\n"}, "groups": {"g": {"endpoints": [f"u:{SECRET}@h"]}}},
        {"db": {"pooler": f"u:{SECRET}@h"}, "groups": {"g": {"settings": {"app.key": [SECRET]}}}},
        {"db": {}, "groups": {"g": {"tenant": {"settings": {f"{SECRET}@h": f"pass={SECRET}"}}}}},
        f"postgresql://u:{SECRET}@h/d",
    ],
)
def test_a_password_in_a_wrong_place_is_not_shown(source: object) -> None:
    refusal(source)


# YAML.


@pytest.mark.parametrize("kind", ["path", "str", "text", "binary", "memory", "bytes", "bom"])
def test_yaml_is_read_from_a_path_or_an_open_file(kind: str, tmp_path: Path) -> None:
    text = "db: {host: h, user: müller}\ngroups: {g: {timeout: 1min}}\n"
    path = tmp_path / "pool.yaml"
    path.write_text(text, encoding="utf-8-sig" if kind == "bom" else "utf-8")
    with path.open(encoding="utf-8") as as_text, path.open("rb") as as_binary:
        sources: dict[str, Any] = {
            "path": path,
            "str": str(path),
            "text": as_text,
            "binary": as_binary,
            "memory": io.StringIO(text),
            "bytes": io.BytesIO(text.encode()),
            "bom": path,
        }
        loaded = load(sources[kind])
    assert (loaded.endpoints[0].user, loaded.groups["g"].timeout) == ("müller", 60.0)


def closed_file() -> io.StringIO:
    file = io.StringIO()
    file.close()
    return file


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.yaml", "cannot be read: No such file or directory"),
        ("", "cannot be read: No such file or directory"),
        (".", "cannot be read: Is a directory"),
        ("a\0b", "cannot be read"),
        (f"db: {{user: u, secret: {SECRET}}}\ngroups: {{}}", "wrap a text in io.StringIO"),
        ("x" * 5000, "cannot be read: File name too long"),
        (closed_file(), "cannot be read: ValueError"),
        (io.BytesIO(b"db: \xff"), "it is not text in UTF-8"),
        (io.StringIO("#" * (1 << 21)), "is longer than"),
        ("/dev/zero", "is longer than"),
    ],
)
def test_a_file_that_cannot_be_read(source: object, message: str) -> None:
    (found,) = problems(source).values()
    assert message in found


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("db:\n  host: h\n port: 1\n", "line 3, column 2", "is not valid YAML: "),
        (f"db: {{host: h, pass: {SECRET}\n", "line 2, column 1", "but got '<stream end>'"),
        (f"db: {{pass: '{SECRET}\n", "line 2, column 1", "found unexpected end of stream"),
        (f"db: {{pass: *{SECRET}}}\n", "line 1, column 12", "found undefined alias '***'"),
        (f"db: {{pass: !{SECRET} x}}\n", "line 1, column 12", "the tag '***'"),
        (f"db: {{pass: !!int {SECRET}}}\n", "line 1, column 12", "does not fit its tag"),
        ("db: {host: h}\n\tgroups: {}\n", "line 2, column 1", "found character '\\t'"),
        (f"db: !!map [{SECRET}]\n", "line 1, column 5", "does not fit its tag"),
        (f"db: !!set [{SECRET}]\n", "line 1, column 5", "does not fit its tag"),
        ("db: {[a]: b}\n", "line 1, column 6", "a key that is a list or a mapping"),
        ("db: {{a: b}: c}\n", "line 1, column 6", "a key that is a list or a mapping"),
        ("db: {}\n---\ngroups: {}\n", "line 2, column 1", "found another document"),
        ("db: {}\ngroups: \x07\n", "line 2, column 9", "a character that YAML does not allow"),
        ("!!python/object/apply:os.system [x]", "line 1, column 1", "the tag '***'"),
    ],
)
def test_bad_yaml_is_reported_with_its_line_and_column(text: str, place: str, message: str) -> None:
    found = problems(io.StringIO(text))
    assert list(found) == [f"stream, {place}"]
    assert message in found[f"stream, {place}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; it must have the keys db and groups"),
        ("# nothing\n", "is empty"),
        ("- db\n", "must be a mapping with the keys db and groups, not a list"),
        ("db", "must be a mapping with the keys db and groups, not 'db'"),
        ("[" * 1000, "is nested too deeply"),
    ],
)
def test_yaml_that_is_not_a_mapping(text: str, message: str) -> None:
    assert message in problems(io.StringIO(text))["stream"]


def test_all_duplicate_keys_are_reported_with_their_lines() -> None:
    text = "db: {}\ngroups:\n  g:\n    timeout: 1\n    timeout: 2\n  g: {tmeout: 1}\n"
    assert problems(io.StringIO(text)) == {
        "stream, line 5": "the key 'timeout' stands in line 4 already",
        "stream, line 6": "the key 'g' stands in line 3 already",
        "groups.g.tmeout": "unknown key; did you mean 'timeout'?",
    }


def test_anchors_and_merges_work_and_recursion_does_no_harm() -> None:
    loaded = from_yaml(
        "db:\n  - &one {host: a, user: web, port: 5433}\n  - {<<: *one, host: b}\n"
        "groups: {g: &g {timeout: 3}, h: {<<: *g, ping: never}}\n"
    )
    assert [(server.host, server.user, server.port) for server in loaded.endpoints] == [
        ("a", "web", 5433),
        ("b", "web", 5433),
    ]
    assert (loaded.groups["h"].timeout, loaded.groups["h"].ping) == (3.0, "never")
    assert "db[0].host" in problems(io.StringIO("db: &a [{host: *a}]\ngroups: &g {g: *g}\n"))
    refusal(io.StringIO("db: &a {<<: *a, port: 0}\ngroups: {g: }\n"))


def test_text_keys_keep_the_characters_of_the_yaml_file() -> None:
    text = "{pass: 0123, user: 1e3, name: yes, label: 12:30, host: 2024-01-01, application_name: 5}"
    (server,) = from_yaml(f"db: {text}\ngroups: {{g: }}").endpoints
    assert (server.password, server.user, server.dbname) == ("0123", "1e3", "yes")
    assert (server.label, server.host, server.application_name) == ("12:30", "2024-01-01", "5")
    assert from_yaml("{db: {pass: null, user: ~}, groups: {g: }}").endpoints[0].password is None


@pytest.mark.parametrize(
    "scalar", ["010", "0x10", "1:30", "2024-01-01", "5.0", "1e1", ".inf", ".nan", "yes", "'5'", "~"]
)
def test_only_decimal_integers_are_integers_in_yaml(scalar: str) -> None:
    found = problems(io.StringIO(f"db: {{}}\ngroups: {{g: {{connection_count: {scalar}}}}}\n"))
    assert list(found) == ["groups.g.connection_count"]


def test_booleans_and_numbers_of_yaml() -> None:
    text = "db: {}\ngroups: {g: {autocommit: off, connection_count: 1_000, timeout: 1.5, max_idle: 1e2}}"
    pool = from_yaml(text).groups["g"]
    assert (pool.autocommit, pool.connection_count, pool.timeout, pool.max_idle) == (False, 1000, 1.5, 100.0)
    assert "not True" in problems(io.StringIO("{db: {}, groups: {g: {ping: on}}}"))["groups.g.ping"]


# Variables in YAML.


def test_variables_are_filled_in() -> None:
    text = """
    db: {host: "db.${ZONE}.internal", port: "${PORT}", user: "${DB_USER:-web}", pass: "${PASS}"}
    groups: {g: {connection_count: "${COUNT:-7}", timeout: "${TIMEOUT:-2s}", autocommit: "${AUTO:-no}"}}
    """
    loaded = from_yaml(text, ZONE="eu", PORT="6432", PASS=SECRET, TIMEOUT="")
    server, pool = loaded.endpoints[0], loaded.groups["g"]
    assert (server.host, server.port, server.user, server.password) == ("db.eu.internal", 6432, "web", SECRET)
    assert (pool.connection_count, pool.timeout, pool.autocommit) == (7, 2.0, False)


def test_variables_stay_text_under_text_keys() -> None:
    text = "db:\n  pass: ${V}\n  user: ${V}\n  name: ${V}\n  host: ${V}\n  label: ${V}\ngroups: {g: }\n"
    (server,) = from_yaml(text, V="0123").endpoints
    assert {server.password, server.user, server.dbname, server.host, server.label} == {"0123"}


def test_only_a_value_that_is_one_variable_becomes_a_number() -> None:
    text = "db: {}\ngroups:\n  g:\n    connection_count: 1${N}\n"
    assert "not '15'" in problems(io.StringIO(text), {"N": "5"})["groups.g.connection_count"]


def test_the_value_of_a_variable_is_not_expanded_again() -> None:
    assert from_yaml("db:\n  pass: ${P}\ngroups: {g: }", P="${Q} $${").endpoints[0].password == "${Q} $${"


def test_two_dollars_before_a_brace_are_one() -> None:
    text = "db:\n  pass: $${P} $$5 $6 ${P}\n  user: $$$${\ngroups: {g: }"
    (server,) = from_yaml(text, P="x").endpoints
    assert (server.password, server.user) == ("${P} $$5 $6 x", "$$${")


def test_keys_and_dicts_are_not_filled_in() -> None:

    assert list(from_yaml("db: {}\ngroups: {'${G}': }", G="g").groups) == ["${G}"]
    assert load({"db": {"pass": "${P}"}, "groups": {"g": {}}}, {"P": "x"}).endpoints[0].password == "${P}"


def test_an_unset_variable_is_a_problem_of_its_key() -> None:
    text = """
    db: [{host: "${A}", pass: "x${B}y${C}", options: {work_mem: "${D}"}}, "${E}"]
    groups: {g: {timeout: "${F}", endpoints: ["${G}"]}, h: "${H}"}
    type: "${I}"
    """
    found = problems(io.StringIO(text))
    assert found == {
        "type": "the variable I is not set; set it, or write ${I:-default}",
        "db[0].host": "the variable A is not set; set it, or write ${A:-default}",
        "db[0].pass": "the variable B is not set; set it, or write ${B:-default}; "
        "the variable C is not set; set it, or write ${C:-default}",
        "db[0].options.work_mem": "the variable D is not set; set it, or write ${D:-default}",
        "db[1]": "the variable E is not set; set it, or write ${E:-default}",
        "groups.g.timeout": "the variable F is not set; set it, or write ${F:-default}",
        "groups.g.endpoints[0]": "the variable G is not set; set it, or write ${G:-default}",
        "groups.h": "the variable H is not set; set it, or write ${H:-default}",
    }
    assert list(problems(io.StringIO('{db: "${A}", groups: "${B}"}'))) == ["db", "groups"]


@pytest.mark.parametrize("text", ["${", "${A", "${1}", "${A-b}", "${}", f"{SECRET}${{"])
def test_a_malformed_variable_is_a_problem_of_its_key(text: str) -> None:
    found = problems(io.StringIO(f"db: {{pass: '{text}'}}\ngroups: {{g: }}"))
    assert "begins no ${VAR} or ${VAR:-default}" in found["db.pass"]


# The environment.


def test_database_url_alone_is_the_group_default() -> None:
    loaded = load(None, {"DATABASE_URL": f"postgresql://web:{SECRET}@h:5433/shop"})
    assert list(loaded.groups) == ["default"]
    (server,) = loaded.endpoints
    assert (server.label, server.dbname, server.password) == ("h:5433", "shop", SECRET)
    assert server.connect_timeout == 10.0


def test_each_suffixed_url_is_a_group_with_its_own_server() -> None:
    environ = {
        "DATABASE_URL": "postgresql://a/x",
        "DATABASE_URL_READ": "postgresql://b/x",
        "DATABASE_URL_JOBS": "host=c",
    }
    loaded = load(None, environ)
    assert {name: pool.endpoints for name, pool in loaded.groups.items()} == {
        "default": ("a:5432",),
        "jobs": ("c:5432",),
        "read": ("b:5432",),
    }
    del environ["DATABASE_URL"]
    assert list(load(None, environ).groups) == ["jobs", "read"]


def test_groups_with_the_same_server_share_it() -> None:
    environ = {
        "DATABASE_URL": "postgresql://u@a:5432/x",
        "DATABASE_URL_READ": "host=a port=5432 user=u dbname=x",
    }
    loaded = load(None, environ)
    assert len(loaded.endpoints) == 1
    assert loaded.groups["read"].endpoints == loaded.groups["default"].endpoints == ("a:5432",)


def test_another_database_of_the_same_host_gets_its_own_label() -> None:
    environ = {"DATABASE_URL": "postgresql://a/x", "DATABASE_URL_AUDIT": "postgresql://a/audit"}
    assert [server.label for server in load(None, environ).endpoints] == ["a:5432", "a:5432 (audit)"]


def test_named_groups_share_the_one_url() -> None:
    environ = {"PGDBPOOL_GROUPS": "read, WRITE", "DATABASE_URL": "host=a", "DATABASE_URL_READ": "host=b"}
    loaded = load(None, {**environ, "DATABASE_URL_UNPOOLED": "host=c"})
    assert {name: pool.endpoints for name, pool in loaded.groups.items()} == {
        "read": ("b:5432",),
        "write": ("a:5432",),
    }
    del environ["DATABASE_URL"]
    assert problems(None, environ) == {
        "PGDBPOOL_GROUPS": "the group write has no server: set DATABASE_URL_WRITE or DATABASE_URL"
    }


def test_keys_come_from_variables_for_every_group_and_for_one() -> None:
    environ = {
        "DATABASE_URL": "host=a",
        "DATABASE_URL_READ": "host=b",
        "PGDBPOOL_TYPE": "lock-free",
        "PGDBPOOL_CONNECTION_COUNT": "5",
        "PGDBPOOL_AUTOCOMMIT": "false",
        "PGDBPOOL_TIMEOUT": "500ms",
        "PGDBPOOL_READ_CONNECTION_COUNT": "8",
        "PGDBPOOL_READ_TARGET": "standby",
        "PGDBPOOL_READ_PREPARE_THRESHOLD": "null",
        "PGDBPOOL_READ_PING_AFTER": "1.5",
        "PGDBPOOL_MAX_IDLE": "",
    }
    before = dict(environ)
    loaded = load(None, environ)
    default, read = loaded.groups["default"], loaded.groups["read"]
    assert loaded.type == "non-threaded"
    assert (default.connection_count, default.min_size, default.autocommit) == (5, 5, False)
    assert (default.timeout, default.target) == (0.5, "any")
    assert (read.connection_count, read.target, read.ping_after) == (8, "standby", 1.5)
    assert read.prepare_threshold is None
    assert environ == before


def test_every_key_of_a_group_but_endpoints_has_a_variable() -> None:
    for key in GROUP_KEYS:
        found = problems(None, {"DATABASE_URL": "host=a", f"PGDBPOOL_{key.upper()}": "[]"})
        assert ("unknown variable" in found[f"PGDBPOOL_{key.upper()}"]) == (key == "endpoints")


def test_a_tenant_and_settings_come_from_variables() -> None:
    environ = {
        "DATABASE_URL": "host=a",
        "DATABASE_URL_READ": "host=b",
        "PGDBPOOL_TENANT": "app.current_tenant_id",
        "PGDBPOOL_SETTINGS": "{work_mem: 64MB, jit: off}",
        "PGDBPOOL_RESET": "never",
        "PGDBPOOL_READ_TENANT": " {setting: app.t, type: regex, pattern: '[0-9]+', verify: warn}",
        "PGDBPOOL_READ_SETTINGS": "{}",
        "PGDBPOOL_READ_RESET": "always",
    }
    loaded = load(None, environ)
    default, read = loaded.groups["default"], loaded.groups["read"]
    assert default.tenant == TenantConfig(settings={"app.current_tenant_id": ("text", None)})
    assert (dict(default.settings), default.reset) == ({"work_mem": "64MB", "jit": "off"}, "never")
    assert read.tenant == TenantConfig(settings={"app.t": ("regex", "[0-9]+")}, verify="warn")
    assert (dict(read.settings), read.reset) == ({}, "always")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value", "path", "message"),
    [
        ("TENANT", "null", "", "leave it out for a group without tenants"),
        ("TENANT", "tenant", "", "must be a qualified custom name"),
        ("TENANT", "{setting: app.t, typ: uuid}", ".typ", "did you mean 'type'?"),
        ("TENANT", "{setting: app.t", ", line 1, column 16", "is not valid YAML"),
        (
            "TENANT",
            "{setting: app.t, setting: app.u}",
            ", line 1",
            "the key 'setting' stands in line 1 already",
        ),
        ("SETTINGS", "work_mem=64MB", "", "must be a mapping of server settings, such as {work_mem: 64MB}"),
        ("SETTINGS", "{work_mem: }", ".work_mem", "must be a string, a number"),
        ("SETTINGS", f"{{work_mem: !{SECRET} x}}", ", line 1, column 12", "is not valid YAML"),
        ("SETTINGS", "{" * 2000, "", "is nested too deeply"),
        ("RESET", "on", "", "must be one of auto, always, never, not True"),
    ],
)
def test_wrong_tenants_and_settings_name_the_variable(
    variable: str, value: str, path: str, message: str
) -> None:
    found = problems(None, {"DATABASE_URL": "host=a", f"PGDBPOOL_{variable}": value})
    assert list(found) == [f"PGDBPOOL_{variable}{path}"]
    assert message in found[f"PGDBPOOL_{variable}{path}"]


def test_problems_of_the_environment_name_the_variable() -> None:
    environ = {
        "DATABASE_URL": f"postgresql://u:{SECRET}@a:99999/x",
        "DATABASE_URL_READ": f"postgresql+psycopg://u:{SECRET}@a/x",
        "DATABASE_URL_": "host=a",
        "DATABASE_URL_low": "host=a",
        "PGDBPOOL_TYPE": "thread",
        "PGDBPOOL_TIMEOUT": "soon",
        "PGDBPOOL_READ_CONNECTION_COUNT": "many",
        "PGDBPOOL_CONNECTION_COUNT": "5",
        "PGDBPOOL_MIN_SIZE": "6",
        "PGDBPOOL_REED_TARGET": "any",
        "PGDBPOOL_timeout": "5",
    }
    found = problems(None, environ)
    assert set(found) == set(environ) - {"PGDBPOOL_CONNECTION_COUNT"}
    assert found["PGDBPOOL_REED_TARGET"] == (
        "unknown variable; the groups are default, read; did you mean 'PGDBPOOL_READ_TARGET'?"
    )
    assert found["PGDBPOOL_MIN_SIZE"] == "must be at most connection_count (5), not 6"


def test_a_variable_that_can_be_read_in_two_ways_is_refused() -> None:
    environ = {"DATABASE_URL_PING": "host=a", "PGDBPOOL_PING_TIMEOUT": "1"}
    assert problems(None, environ) == {
        "PGDBPOOL_PING_TIMEOUT": "can be read as ping_timeout of every group or timeout of ping; "
        "rename the group, or use a file"
    }


def test_variables_of_the_tests_are_not_unknown() -> None:
    environ = {"DATABASE_URL": "host=a", "PGDBPOOL_TEST_PG_BIN": "/x"}
    assert list(load(None, environ).groups) == ["default"]
    environ = {"DATABASE_URL_TEST": "host=a", "PGDBPOOL_TEST_TIMEOUT": "3", "PGDBPOOL_TEST_PG_BIN": "/x"}
    assert load(None, environ).groups["test"].timeout == 3.0


def test_a_configuration_file_of_the_environment_says_everything(tmp_path: Path) -> None:
    path = tmp_path / "pool.yaml"
    path.write_text("db: {conninfo: '${DATABASE_URL}'}\ngroups: {g: }\n")
    environ = {"DATABASE_URL": "host=a", "PGDBPOOL_TIMEOUT": "5", "PGDBPOOL_X": "y"}
    loaded = load(None, {**environ, "PGDBPOOL_CONFIG": str(path)})
    assert (loaded.endpoints[0].host, loaded.groups["g"].timeout) == ("a", 10.0)
    found = problems(None, {"PGDBPOOL_CONFIG": str(tmp_path / "none.yaml")})
    assert "cannot be read: No such file or directory" in found["PGDBPOOL_CONFIG"]


@pytest.mark.parametrize("environ", [{}, {"DATABASE_URL": ""}, {"PGDBPOOL_CONFIG": ""}, {"PGHOST": "h"}])
def test_with_nothing_set_the_error_names_the_variables_to_set(environ: dict[str, str]) -> None:
    (message,) = problems(None, environ).values()
    assert "set PGDBPOOL_CONFIG to the path of a YAML file, or DATABASE_URL" in message


def test_the_processes_environment_is_the_default_and_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "host=a")
    monkeypatch.delenv("PGDBPOOL_CONFIG", raising=False)
    before = dict(os.environ)
    server = load().endpoints[0]
    make_conninfo("", **server.conninfo_params(), options=server.server_options())
    assert dict(os.environ) == before


# The declarations.


DECLARED = [
    item for keys in (CONFIG_KEYS, DB_KEYS, GROUP_KEYS, RATE_KEYS, TENANT_KEYS) for item in keys.items()
]


@pytest.mark.parametrize(("name", "setting"), DECLARED)
def test_every_key_is_declared_with_its_values_and_meaning(name: str, setting: Any) -> None:
    assert setting.key.kind.allowed
    assert setting.default
    assert setting.key.meaning.endswith((".", "``."))


def test_every_field_that_is_a_key_is_declared() -> None:
    declared: list[tuple[type[Any], Mapping[str, Any]]] = [
        (Config, CONFIG_KEYS),
        (EndpointConfig, DB_KEYS),
        (GroupConfig, GROUP_KEYS),
        (RateLimit, RATE_KEYS),
        (TenantSetting, TENANT_KEYS),
        (TenantConfig, TENANT_KEYS),
    ]
    for cls, keys in declared:
        fields = {field.name for field in dataclasses.fields(cls)}
        assert fields - {setting.field for setting in keys.values()} <= {"name", "origin"}


@pytest.mark.slow
def test_the_reference_page_is_the_one_that_the_declarations_give() -> None:
    generator = REPOSITORY / "doc" / "generate_config.py"
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, generator, "--check"], check=True, env=environ)


def test_a_host_that_is_more_than_a_host_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="host") as caught:
        load({"db": {"host": "h password=pl4nted", "name": "shop", "user": "web"}, "groups": {"g": {}}})
    assert "pl4nted" not in str(caught.value)


@pytest.mark.parametrize(
    ("word", "key"),
    [
        *dict.fromkeys(
            ["max_size", "pool_size", "maxconn", "max_overflow", "maximumPoolSize", "max-pool-size"],
            "connection_count",
        ).items(),
        ("minconn", "min_size"), ("min_idle", "min_size"), ("pool_timeout", "timeout"),
        ("acquire_timeout", "timeout"), ("pool_recycle", "max_lifetime"), ("recycle", "max_lifetime"),
        ("idle_timeout", "max_idle"), ("statement_timeout", "query_timeout"),
        ("command_timeout", "query_timeout"), ("connectTimeout", "connect_timeout"),
        ("pool_pre_ping", "ping"), ("echo", "slow_query"),
        ("target_session_attrs", "target"), ("master", "target"), ("replica", "target"),
        ("load_balance_hosts", "balance"), ("leakDetectionThreshold", "leak_after"),
        ("sslmode", "ssl' of a server in `db`"), ("dbname", "name' of a server in `db`"),
        ("password", "pass' of a server in `db`"),
    ],
)  # fmt: skip
def test_the_words_of_other_pools_lead_to_the_key_of_a_group(word: str, key: str) -> None:
    expected = f"unknown key; did you mean '{key}" + ("?" if "`" in key else "'?")
    assert group_problem(word, **{word: 1}) == expected


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("sslmode", "ssl"), ("dbname", "name"), ("database", "name"), ("password", "pass"),
        ("passwd", "pass"), ("dsn", "conninfo"), ("uri", "conninfo"), ("url", "conninfo"),
        ("hostname", "host"), ("username", "user"),
        ("connectTimeout", "connect_timeout"), ("statement_timeout", "query_timeout"), ("master", "host"),
        ("pool_size", "connection_count' of a group"),
    ],
)  # fmt: skip
def test_the_words_of_other_drivers_lead_to_the_key_of_a_server(word: str, key: str) -> None:
    expected = f"unknown key; did you mean '{key}" + ("?" if " of a " in key else "'?")
    assert db_problem(word, **{word: "x"}) == expected


def test_the_words_of_other_pools_lead_to_the_top_level_and_to_variables() -> None:
    found = problems({"db": {}, "groups": {"g": {}}, "databases": [], "pools": {}, "max_size": 1})
    assert found["databases"] == "unknown key; did you mean 'db'?"
    assert found["pools"] == "unknown key; did you mean 'groups'?"
    assert found["max_size"] == "unknown key; did you mean 'connection_count' of a group?"
    environ = {"DATABASE_URL": "postgresql://h/d", "PGDBPOOL_MAX_SIZE": "1"}
    message = problems(None, environ)["PGDBPOOL_MAX_SIZE"]
    assert message.endswith("did you mean 'PGDBPOOL_CONNECTION_COUNT'?")


@pytest.mark.parametrize(
    ("host", "remedy"),
    [
        ("db1:5432", "; the port has its own key: host: 'db1', port: 5432"),
        ("10.0.0.1:5432", "; the port has its own key: host: '10.0.0.1', port: 5432"),
        ("[::1]:5432", "; the port has its own key: host: '::1', port: 5432"),
        ("postgresql://db1", "; a URI is the value of conninfo"),
    ],
)
def test_a_host_with_a_port_is_refused_with_the_remedy(host: str, remedy: str) -> None:
    assert db_problem("host", host=host).endswith(remedy)


def test_an_address_with_colons_is_a_host() -> None:
    assert load({"db": {"host": "fe80::1:5432"}, "groups": {"g": None}}).endpoints[0].host == "fe80::1:5432"


@pytest.mark.parametrize(
    ("db", "group", "warning"),
    [
        (
            {"query_timeout": 5},
            {},
            'db.query_timeout: 5 is milliseconds; if it is meant, write .*"5ms", else "5s"',
        ),
        ({}, {"query_timeout": 99}, "groups.g.query_timeout: 99 is milliseconds"),
        ({"connect_timeout": 3000}, {}, 'db.connect_timeout: 3000 is seconds; .*"3000s", else "3000ms"'),
        ({}, {"timeout": 30000}, "groups.g.timeout: 30000 is seconds"),
    ],
)
def test_a_number_that_can_hardly_be_meant_is_taken_with_a_warning(
    db: dict[str, Any], group: dict[str, Any], warning: str
) -> None:
    with pytest.warns(UserWarning, match=warning) as caught:
        load({"db": {"host": "h", **db}, "groups": {"g": group}})
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_a_number_with_a_unit_is_meant() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = load(
            {
                "db": {"host": "h", "query_timeout": "5ms", "connect_timeout": "3000s"},
                "groups": {"g": {"timeout": 600, "query_timeout": 100}, "h": {"query_timeout": 0}},
            }
        )
    assert made.endpoints[0].query_timeout == 5

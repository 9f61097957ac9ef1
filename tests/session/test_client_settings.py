"""Settings that the client goes by too: values are right whatever a block binds, or the last one has set."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from support import config, pid_of, server

import pgdbpool
from pgdbpool import Connection, Handler, SettingError
from pgdbpool.cluster import Cluster

GROUPS = ["auto", "manual"]
BERLIN = {"TimeZone": "europe/berlin"}  # which PostgreSQL calls Europe/Berlin
TIMES = """SELECT timestamptz '2024-07-09 12:00+00' AS moment, date '2024-05-06' AS day,
    timestamp '2024-05-06 07:08:09' AS local, ARRAY[timestamptz '2024-01-09 12:00+00'] AS moments,
    daterange('2024-05-06', '2024-05-08') AS days, %s::text AS text"""
DAY, LOCAL = dt.date(2024, 5, 6), dt.datetime(2024, 5, 6, 7, 8, 9)


@pytest.fixture
def start(known_cluster: Cluster, mode: str) -> Iterator[Callable[..., None]]:
    def init(options: dict[str, str] | None = None, **changes: Any) -> None:
        auto = {"connection_count": 1, **changes}
        entry = server(known_cluster.primary, options=options)
        Connection.init(config([entry], mode, auto=auto, manual={**auto, "autocommit": False}))

    yield init
    Connection.reset()


def rows_by_each_way(group: str, settings: dict[str, str]) -> Iterator[Any]:
    """Yield the row of `TIMES` as each way to have it gives it, some after the transaction has ended."""
    for _ in range(2):
        yield Connection.fetchrow(group, TIMES, ("x",), settings=settings)
        yield from Connection.fetchmany(group, TIMES, [("x",), ("y",)], settings=settings)
    with Handler(group, settings=settings) as db:
        yield db.fetchrow(TIMES, ("x",))
        yield from db.fetchmany(TIMES, [("x",)])
        cursor = db.query(TIMES, ("x",))
        db.commit()
        yield cursor.fetchone()
        yield db.cursor().execute(TIMES, ("x",)).fetchone()
        several = db.query("SELECT 1; " + TIMES, ("x",))
        db.commit()
        several.nextset()
        yield several.fetchone()
        with db.pipeline():
            cursor = db.query(TIMES, ("x",))
            yield cursor.fetchone()
        with db.transaction():
            yield db.fetchrow(TIMES, ("x",))
        streamed: Any = db.cursor()
        yield from streamed.stream(TIMES, ("x",))


@pytest.mark.parametrize("group", GROUPS)
def test_times_come_in_the_zone_that_the_block_binds(start: Any, group: str) -> None:
    start()
    for row in rows_by_each_way(group, BERLIN):
        assert (row["moment"].isoformat(), row["day"], row["local"]) == (
            "2024-07-09T14:00:00+02:00",
            DAY,
            LOCAL,
        )
        assert [moment.isoformat() for moment in row["moments"]] == ["2024-01-09T13:00:00+01:00"]
    with Handler(group) as db:
        assert db.fetchrow(TIMES, ("x",))["moment"].isoformat() == "2024-07-09T12:00:00+00:00"
    with Handler(group, settings=BERLIN) as db:
        cursor: Any = db.cursor(binary=True)
        assert cursor.execute("SELECT timestamptz '2024-07-09 12:00+00'").fetchone()[0].hour == 14


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("style", ["SQL, DMY", "SQL, MDY", "German", "Postgres, DMY", "ISO, DMY"])
def test_day_and_month_are_as_the_block_binds_their_order(start: Any, group: str, style: str) -> None:
    start()
    text = TIMES.replace("timestamptz", "timestamp").replace("+00", "")
    with Handler(group, settings={"DateStyle": style}) as db:
        for row in (db.fetchrow(text, ("x",)), db.fetchmany(text, [("x",)])[0]):
            assert (row["day"], row["local"], row["days"].lower) == (DAY, LOCAL, DAY)
    assert Connection.fetchval(group, "SELECT date '2024-05-06'", settings={"DateStyle": style}) == DAY


@pytest.mark.parametrize("group", GROUPS)
def test_an_interval_is_read_right_or_refused_and_written_right(start: Any, group: str) -> None:
    start()
    delta = -dt.timedelta(days=1, seconds=5)
    for style in ("postgres", "postgres_verbose", "sql_standard", "iso_8601"):
        settings = {"IntervalStyle": style}
        text = Connection.fetchval(
            group, "SELECT extract(epoch FROM %t::interval)", (delta,), settings=settings
        )
        assert text == delta.total_seconds()
        if style == "postgres":
            assert Connection.fetchval(group, "SELECT %s", (delta,), settings=settings) == delta
        else:
            with pytest.raises(NotImplementedError, match=style):  # psycopg's own words
                Connection.fetchval(group, "SELECT %s", (delta,), settings=settings)


@pytest.mark.parametrize("group", GROUPS)
def test_the_groups_own_settings_are_followed_too(start: Any, group: str) -> None:
    start(settings={"timezone": "Europe/Berlin", "datestyle": "SQL, DMY"})
    text = "SELECT date '2024-05-06', timestamptz '2024-07-09 12:00+00'::text"
    assert tuple(Connection.fetchrow(group, text) or ()) == (DAY, "09/07/2024 14:00:00 CEST")


def test_loaders_of_the_applications_own_stay(known_cluster: Cluster, mode: str) -> None:
    class Day(psycopg.adapt.Loader):
        def load(self, data: Any) -> str:
            return "own " + bytes(data).decode()

    def configure(conn: psycopg.Connection[Any]) -> None:
        conn.adapters.register_loader("date", Day)

    group = {"connection_count": 1, "configure": configure}
    Connection.init(config([known_cluster.primary], mode, g=group))
    for settings in ({"DateStyle": "German"}, {}, {"DateStyle": "SQL, DMY"}):
        value = Connection.fetchval("g", "SELECT date '2024-05-06'", settings=settings)
        assert value == "own " + {"German": "06.05.2024", "SQL, DMY": "06/05/2024"}.get(
            settings.get("DateStyle", ""), "2024-05-06"
        )


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", ["client_encoding", "Client_Encoding", "standard_conforming_strings"])
def test_settings_that_would_hold_at_the_server_alone_are_refused(
    known_cluster: Cluster, start: Any, group: str, name: str
) -> None:
    start()
    with pytest.raises(SettingError, match=rf"{name}.*server's options"):
        Handler(group, settings={name: "LATIN1"}).__enter__()
    with pytest.raises(pgdbpool.ConfigError, match=rf"settings\.{name}.*server's options"):
        Connection.init(config([known_cluster.primary], g={"connection_count": 1, "settings": {name: "on"}}))


@pytest.mark.parametrize("group", GROUPS)
def test_an_encoding_in_the_servers_options_is_spoken_on_both_sides(start: Any, group: str) -> None:
    start({"client_encoding": "LATIN1"})
    with Handler(group, settings={"app.x": "é"}) as db:
        values = db.fetchrow("SELECT %s, octet_length(%s), current_setting('app.x'), length('é')", ("é", "é"))
        assert tuple(values or ()) == ("é", 2, "é", 1)


def test_an_encoding_of_one_transaction_is_spoken_on_both_sides(start: Any) -> None:
    start(settings={"app.x": "é"})
    with Handler("manual") as db:
        for change in ("SET LOCAL client_encoding = 'LATIN1'",
                       "SELECT set_config('client_encoding', 'LATIN1', true)"):  # fmt: skip
            db.query(change)
            text = "SELECT %s::text, length('é'), current_setting('app.x')"
            assert tuple(db.fetchrow(text, ("é",)) or ()) == ("é", 1, "é")
            cursor = db.query(text, ("é",))
            db.commit()
            assert tuple(cursor.fetchone() or ()) == ("é", 1, "é")
            assert tuple(db.fetchrow(text, ("€",)) or ()) == ("€", 1, "é")


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_text_outside_the_sessions_encoding_is_refused_and_the_connection_stays(
    start: Any, group: str, encoding: str
) -> None:
    start({"client_encoding": encoding}, tenant={"setting": "app.tenant", "required": False, "verify": "off"})
    with Handler(group) as db:
        pid = pid_of(db)
    for use in ({"tenant": "€"}, {"settings": {"app.x": "€"}}):
        for _ in range(2):
            with pytest.raises(SettingError, match=r"'app\.(x|tenant)': '€'.*encoding.*UTF8"):
                Handler(group, **use).__enter__()
            with pytest.raises(SettingError, match="encoding"):
                Connection.fetch(group, "SELECT 1", **use)
    with Handler(group) as db:
        assert pid_of(db) == pid
    status = Connection.status().groups[group]
    assert (status.size, status.idle, status.in_use) == (1, 1, 0)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("reset", ["auto", "always"])
def test_a_block_finds_nothing_of_what_the_last_one_had_set_for_the_client(
    start: Any, group: str, reset: str
) -> None:
    start(reset=reset)
    changes = {"TimeZone": "Asia/Tokyo", "IntervalStyle": "sql_standard", "DateStyle": "SQL, DMY",
               "standard_conforming_strings": "off"}  # fmt: skip
    with Handler(group) as db:
        usual = {name: db.connection.info.parameter_status(name) for name in changes}
        pid = pid_of(db)
    for name, value in changes.items():
        with Handler(group) as db:
            db.query(f"SET {name} = '{value}'")
        with Handler(group) as db:
            assert db.connection.info.parameter_status(name) == usual[name]
            delta = -dt.timedelta(days=1, seconds=5)
            assert db.fetchval("SELECT extract(epoch FROM %t::interval)", (delta,)) == delta.total_seconds()
            assert pid_of(db) == pid
        with Handler(group) as db:
            db.query(f"SET {name} = '{value}'")
        cursor_class = psycopg.ClientCursor
        with Handler(group) as db:
            db.query("SELECT 1")
            found: Any = cursor_class(db.connection).execute("SELECT %s, %s", ("a\\'b", b"\\'")).fetchone()
            assert tuple(found) == ("a\\'b", b"\\'")

"""Statements, good and bad, that are generated to compare two ways of running them."""

from __future__ import annotations

import datetime as dt
import decimal
import ipaddress
import uuid
from collections.abc import Callable
from random import Random
from typing import Any

from psycopg.types.json import Json, Jsonb
from psycopg.types.range import Range

TYPES = """
DROP SCHEMA IF EXISTS own CASCADE; DROP SCHEMA IF EXISTS theirs CASCADE; DROP TYPE IF EXISTS mood;
CREATE TYPE mood AS ENUM ('sad', 'happy');
"""
TABLES = """
CREATE SCHEMA {0};
SET search_path = {0};
CREATE TABLE t (i serial PRIMARY KEY, v text, n numeric, m public.mood);
CREATE TABLE late (i int UNIQUE DEFERRABLE INITIALLY DEFERRED);
INSERT INTO late VALUES (1);
CREATE FUNCTION told(text) RETURNS text LANGUAGE plpgsql AS 'BEGIN RAISE NOTICE ''%'', $1; RETURN $1; END';
"""


class Statements:
    """Makes statements with parameters, good and bad."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.choice: Callable[[Any], Any] = self.random.choice

    def value(self) -> Any:
        number = self.random.randrange(-(2**40), 2**40)
        day = dt.datetime(2024, 2, 29, 12, 30, 1, number % 1000)
        zone = dt.timezone(dt.timedelta(hours=number % 12))
        made: list[Callable[[], Any]] = [
            lambda: number, lambda: number % 100, lambda: number**3, lambda: number / 7, lambda: None,
            lambda: self.choice((float("nan"), float("inf"), -0.0, True, False)),
            lambda: decimal.Decimal(number).scaleb(-5), lambda: decimal.Decimal("NaN"),
            lambda: self.choice(("", "a'b\"c\\d", "%s %%", "äöü€", "\U0001f600", "x" * 3000, "\ud800",
            "a\0b")),
            lambda: self.choice((b"", b"\0\xff'\\", bytearray(b"ab"), memoryview(b"cd"))),
            lambda: self.choice((day, day.replace(tzinfo=zone), day.date(), day.time(), day.timetz())),
            lambda: dt.timedelta(days=number % 50, microseconds=number), lambda: uuid.UUID(int=abs(number)),
            lambda: self.choice(([], [1, 2], [[1], [2]], [None, "a"], ["a", 1], [dt.timedelta(1)], (1, "a"))),
            lambda: self.choice((Json({"a": 1}), Jsonb([1]), {"a": 1}, {1}, object())),
            lambda: self.choice((Range(1, 5), Range(empty=True), Range(day, None))),
            lambda: ipaddress.ip_address(number % 2**32), lambda: [self.value() for _ in range(2)],
        ]  # fmt: skip
        return self.choice(made)()

    def __call__(self) -> tuple[str, Any]:
        value, other = self.value(), self.value()
        cast = self.choice(("text", "int", "bigint", "numeric", "float8", "bytea", "date", "jsonb", "text[]"))
        wide = ", ".join(f"{n} AS c{n}" for n in range(60))
        made: list[tuple[str, Any]] = [
            ("SELECT %s", (value,)), ("SELECT %s, %s AS x", [value, other]), ("SELECT %b", (value,)),
            (f"SELECT %s::{cast} AS x", (value,)), ("SELECT %t::text, '100%%'", (value,)),
            ("SELECT 1, '%'", None),
            ("SELECT %(a)s, %(b)s, %(a)s", {"a": value, "b": other}), ("SELECT %(a)s", {"b": value}),
            ("SELECT %(a)s", (value,)), ("SELECT %s", {"a": value}), ("SELECT %s, %s", (value,)),
            ("SELECT %s", ()),
            ("SELECT i, %s::text FROM generate_series(1, %s) i", ("a", self.random.randrange(40))),
            ("SELECT i FROM t WHERE false", None), ("SELECT", None), (f"SELECT {wide}, %s::int", (1,)),
            ("SELECT v AS a, v AS a, n FROM t ORDER BY i", None),
            ("SELECT m FROM t WHERE m = %s", (self.choice(("sad", "x")),)),
            ("INSERT INTO t (v, n) VALUES (%s, %s)", (self.choice(("a", None)), 2)),
            ("INSERT INTO t (v, m) VALUES (%s, %s) RETURNING *", ("b", "happy")),
            ("UPDATE t SET v = v || %s WHERE i %% 3 = %s", ("c", 1)),
            ("DELETE FROM t WHERE i = %s", (value,)),
            ("INSERT INTO t (i) VALUES (%s)", (1,)), ("INSERT INTO late VALUES (%s)", (1,)),
            ("SELECT told(%s)", (self.choice(("hello", "äöü")),)), ("SELECT 1 / %s", (0,)),
            ("SELECT nothing", None),
            ("SELECT * FROM missing WHERE i = %s", (1,)), ("SELEC %s", (1,)), ("SELECT %s::int", ("x",)),
            ("", None),
            ("SELECT pg_notify(current_schema(), %s)", ("n",)), ("SELECT 1; SELECT 2, 3", None),
            ("VALUES (%s), (2)", (1,)),
            ("WITH w AS (SELECT %s::int AS i) SELECT i FROM w", (5,)), ("SHOW TimeZone", None),
            ("SELECT %d", (1,)),
            ("SELECT '2 days'::interval, now() IS NOT NULL, '1999-01-02'::date, %s::bool", (True,)),
            ("TABLE late", None), ("SELECT * FROM t ORDER BY i", None),
        ]  # fmt: skip
        return self.choice(made)

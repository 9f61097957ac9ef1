"""Generated work through SQLAlchemy and Django: nothing shows whether their connections are a group's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import psycopg
import pytest
from statements import TABLES, TYPES, Statements
from support import config, server

pytest.importorskip("django")
pytest.importorskip("sqlalchemy")

import sqlalchemy as sa
from django.conf import settings
from django.db import connections, transaction
from test_django import ENGINE, outside_of_any_project, use

from pgdbpool import Connection
from pgdbpool.cluster import Node

__all__ = ["outside_of_any_project"]

HERE, THERE = "own", "theirs"
INTRANS, INERROR = psycopg.pq.TransactionStatus.INTRANS, psycopg.pq.TransactionStatus.INERROR
MANY = "INSERT INTO t (v, n) VALUES (%s, %s)"


class Unit(NamedTuple):
    """Some statements, and what they are wrapped in."""

    kind: str
    statements: list[tuple[str, Any]]
    commits: bool


def units(seed: int, number: int, kinds: tuple[str, ...]) -> Iterator[Unit]:
    """Generate units of work."""
    make = Statements(seed)
    for _ in range(number):
        several = make.random.randrange(1, 5)
        made = [
            (text, tuple(p) if isinstance(p, list) else p) for text, p in (make() for _ in range(several))
        ]
        yield Unit(make.choice(kinds), made, make.random.random() < 0.6)


def told(error: BaseException) -> list[Any]:
    """Return what a program decides by: the classes of an error and of its cause, and the SQLSTATE."""
    cause: Any = getattr(error, "orig", None) or error.__cause__
    classes = [
        next(kind.__name__ for kind in type(each).__mro__ if not kind.__module__.startswith("pgdbpool"))
        for each in (error, *([] if cause is None else [cause]))
    ]
    return [*classes, getattr(cause, "sqlstate", None), getattr(error, "connection_invalidated", None)]


def status_of(connection: Any, seen: list[Any]) -> int | None:
    """Return the status; None after what the driver refused, since psycopg sends BEGIN before it refuses."""
    refused = isinstance(seen[-1], list) and seen[-1] and seen[-1][-2:] in ([None, None], [None, False])
    return None if refused else int(connection.info.transaction_status)


def shape(description: Any) -> Any:
    return description and [tuple(column) for column in description]


@pytest.fixture
def node(known_cluster: Any) -> Iterator[Node]:
    """A server with the same tables in two schemas."""
    with known_cluster.primary.connect() as admin:
        admin.execute(TYPES)
        for schema in (HERE, THERE):
            admin.execute(TABLES.format(schema))
    yield known_cluster.primary
    Connection.reset()
    with known_cluster.primary.connect() as admin:
        admin.execute(f"DROP SCHEMA {HERE} CASCADE; DROP SCHEMA {THERE} CASCADE; DROP TYPE mood")


def through_sqlalchemy(engine: Any, unit: Unit) -> list[Any]:
    """Run a unit, and return all that a program sees of it."""
    seen: list[Any] = []

    def note(conn: Any) -> None:
        seen.append(
            [status_of(conn.connection.dbapi_connection, seen), conn.in_transaction(), conn.invalidated]
        )

    if unit.kind == "autocommit":
        engine = engine.execution_options(isolation_level="AUTOCOMMIT")
    try:
        with engine.begin() if unit.kind == "begin" else engine.connect() as conn:
            for text, params in unit.statements:
                try:
                    with conn.begin_nested() if unit.kind == "nested" else nullcontext():
                        if unit.kind == "many":
                            text, params = MANY, [("a", 1), ("b", params and 2)]
                        result = conn.exec_driver_sql(text, params)
                        seen.append([result.rowcount, shape(result.cursor and result.cursor.description)])
                        seen.append([repr(tuple(row)) for row in result] if result.returns_rows else None)
                except Exception as error:
                    seen.append(told(error))
                    if unit.kind == "begin":
                        raise
                note(conn)
            if (
                unit.kind == "connect"
                and unit.commits
                and seen[-1][0] == psycopg.pq.TransactionStatus.INTRANS
            ):
                conn.commit()
                note(conn)
    except Exception as error:  # noqa: BLE001 - of any kind
        seen.append(told(error))
    return seen


@pytest.mark.parametrize("group", ["auto", "manual"])
def test_sqlalchemy_shows_no_difference(node: Node, group: str) -> None:
    entry = server(node, options={"search_path": HERE})
    plain = {"connection_count": 1, "row_factory": "tuple", "autocommit": group == "auto"}
    Connection.init(config([entry], **{group: plain}))
    stock = sa.create_engine(
        f"postgresql+psycopg://{node.user}@{node.host}:{node.port}/postgres",
        connect_args={"options": f"-c search_path={THERE}"},
        isolation_level="AUTOCOMMIT" if group == "auto" else None,
    )
    own = sa.create_engine(f"postgresql+pgdbpool://{group}")
    kinds = ("connect", "begin", "many", *(("nested", "autocommit") if group == "manual" else ()))
    for unit in units(1, 60, kinds):
        assert through_sqlalchemy(own, unit) == through_sqlalchemy(stock, unit), unit
    stock.dispose()


def through_django(alias: str, unit: Unit) -> list[Any]:
    """Run a unit, and return all that a program sees of it."""
    database, seen = connections[alias], list[Any]()
    atomic: Callable[..., Any] = transaction.atomic
    try:
        with ExitStack() as stack:
            if unit.kind != "autocommit":
                stack.enter_context(atomic(using=alias))
            for text, params in unit.statements:
                try:
                    with ExitStack() as each:
                        if unit.kind == "nested":
                            each.enter_context(atomic(using=alias))
                        cursor = each.enter_context(database.cursor())
                        if unit.kind == "many":
                            cursor.executemany(MANY, [("a", 1), ("b", params and 2)])
                        else:
                            cursor.execute(text, params)
                        seen.append([cursor.rowcount, shape(cursor.description)])
                        seen.append([repr(row) for row in cursor.fetchall()] if cursor.description else None)
                except Exception as error:  # noqa: BLE001 - of any kind
                    seen.append(told(error))
                status = status_of(database.connection, seen)
                seen.append([status, database.needs_rollback, database.get_autocommit()])
            failed = database.connection.info.transaction_status == INERROR
            if unit.kind != "autocommit" and (failed or not unit.commits):
                # Stock rolls a failed transaction back without a word where this says so.
                transaction.set_rollback(True, using=alias)
    except Exception as error:  # noqa: BLE001 - of any kind
        seen.append(told(error))
    return seen


@pytest.mark.filterwarnings("ignore:Accessing the database")
@pytest.mark.parametrize("binding", ["client", "server"])
def test_django_shows_no_difference(node: Node, binding: str) -> None:
    def database(engine: str, schema: str) -> dict[str, Any]:
        options = {"options": f"-c search_path={schema}", "server_side_binding": binding == "server"}
        place = {"HOST": node.host, "PORT": node.port, "USER": node.user, "NAME": "postgres"}
        return {"ENGINE": engine, **place, "OPTIONS": options}

    use(default=database(ENGINE, HERE), replica=database("django.db.backends.postgresql", THERE))
    assert settings.USE_TZ
    for number, unit in enumerate(units(2, 60, ("atomic", "many", "nested", "autocommit"))):
        assert through_django("default", unit) == through_django("replica", unit), unit
        if number % 3 == 0:
            connections["default"].close()

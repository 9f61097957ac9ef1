"""What libpq and psycopg refuse before they send it: a plain error, nothing is executed, nothing lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from support import config, pid_of

import pgdbpool
from pgdbpool import Connection, DBQueryError, Handler
from pgdbpool.cluster import Cluster

pytestmark = pytest.mark.slow

GROUPS = ["auto", "manual"]
MANY = 70_000
REFUSED = {
    "too many parameters": (f"INSERT INTO t SELECT {'+'.join(['%s'] * MANY)}", [1] * MANY),
    "a NUL in the text": ("INSERT INTO t VALUES (1)\0 + nonsense", ()),
    "a NUL in a parameter": ("INSERT INTO t SELECT length(%s)", ("\0",)),
    "a surrogate in the text": ("INSERT INTO t SELECT length('\ud800')", ()),
    "a surrogate in a parameter": ("INSERT INTO t SELECT length(%s)", ("\ud800",)),
    "a type that nobody knows": ("INSERT INTO t SELECT %s", (object(),)),
    "too few parameters": ("INSERT INTO t SELECT %s + %s", (1,)),
}
PLAIN = (psycopg.Error, UnicodeEncodeError)


@pytest.fixture
def start(known_cluster: Cluster, mode: str) -> Iterator[Callable[..., None]]:
    def init(**changes: Any) -> None:
        auto = {"connection_count": 1, "prepare_threshold": 1, **changes}
        manual = {**auto, "autocommit": False}
        Connection.init(config([known_cluster.primary], mode, auto=auto, manual=manual))
        Connection.execute("auto", "CREATE TABLE IF NOT EXISTS t (n int)")

    yield init
    Connection.reset()


def by_pipeline(db: Handler, statement: Any, params: Any) -> None:
    with db.pipeline():
        cursor = db.query("SELECT 1")
        with pytest.raises(DBQueryError):
            db.query(statement, params)
        assert cursor.fetchone() == (1,)


def by_stream(db: Handler, statement: Any, params: Any) -> None:
    cursor: Any = db.cursor()
    list(cursor.stream(statement + " RETURNING 1", params))


def by_named_cursor(db: Handler, statement: Any, params: Any) -> None:
    with db.transaction(), db.cursor("mine") as cursor:
        cursor.execute(statement, params)


WAYS: dict[str, Callable[[Handler, Any, Any], Any]] = {
    "query": lambda db, statement, params: db.query(statement, params),
    "many": lambda db, statement, params: db.fetchmany(statement, [params]),
    "connection": lambda db, statement, params: db.connection.execute(statement, params or None),
    "several": lambda db, statement, params: db.query("SELECT 1; " + statement, params),
    "stream": by_stream,
    "named": by_named_cursor,
    "pipeline": by_pipeline,
}


def check(error: BaseException) -> None:
    assert not getattr(error, "maybe_executed", False)
    assert not getattr(error, "maybe_committed", False)
    assert not isinstance(error, (pgdbpool.ConnectionLostError, pgdbpool.TransactionAbortedError))


@pytest.mark.parametrize(
    ("group", "settings"), [("auto", {}), ("auto", {"work_mem": "5MB"}), ("manual", {"work_mem": "5MB"})]
)
@pytest.mark.parametrize("what", REFUSED)
def test_it_is_a_plain_error_and_the_connection_stays(
    start: Any, group: str, settings: Any, what: str
) -> None:
    start(settings=settings)
    statement, params = REFUSED[what]
    with Handler(group) as db:
        pid = pid_of(db)
    for way, use in WAYS.items():
        if way == "several" and what == "too many parameters":
            continue  # which are written into the text there
        with Handler(group) as db, suppress(*PLAIN):
            try:
                use(db, statement, params)
                assert way == "pipeline", way
            except PLAIN as error:
                check(error)
                raise
        with Handler(group) as db:
            use_after = db.fetchval("SELECT count(*) FROM t")
            assert (use_after, pid_of(db)) == (0, pid), way
            with suppress(*PLAIN):
                use(db, statement, params)
            db.rollback() if group == "manual" else None
            assert db.fetchval("SELECT 1") == 1
    for one_shot in (Connection.fetch, Connection.execute):
        with pytest.raises(PLAIN) as caught:
            one_shot(group, statement, params)
        check(caught.value)
    with pytest.raises(PLAIN) as caught:
        Connection.executemany(group, statement, [params])
    check(caught.value)
    with Handler(group) as db:
        assert (db.fetchval("SELECT count(*) FROM t"), pid_of(db)) == (0, pid)
    assert Connection.status().groups[group].retries == 0


@pytest.mark.parametrize("group", GROUPS)
def test_a_row_that_copy_cannot_write_cancels_it(start: Any, group: str) -> None:
    start(settings={"work_mem": "5MB"})
    with Handler(group) as db:
        pid = pid_of(db)
    for row in (("\ud800",), (object(),), ("\0",)):
        with pytest.raises((*PLAIN, TypeError)), Handler(group) as db:
            with db.copy("COPY t FROM STDIN") as copy:
                copy.write_row((1,))
                copy.write_row(row)
        with Handler(group) as db:
            assert (db.fetchval("SELECT count(*) FROM t"), pid_of(db)) == (0, pid)


def test_so_many_parameters_are_named_with_the_remedy(start: Any) -> None:
    start()
    with pytest.raises(psycopg.ProgrammingError, match=r"70000 parameters.*65535.*ANY"):
        Connection.fetch("manual", *REFUSED["too many parameters"])
    assert Connection.fetchval("auto", f"SELECT {'+'.join(['%s'] * 3000)}", [1] * 3000) == 3000

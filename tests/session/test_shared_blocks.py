"""Threads may share a block, as they may share a connection of psycopg: each statement has the tenant."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import FrameType
from typing import Any

import psycopg
import pytest
from support import config, kill_backends, pid_of, server, wait_for

import pgdbpool
from pgdbpool import Connection, Handler

THREADS = 8
ROUNDS = 30
READ = "SELECT current_setting('app.tenant', true)"


@pytest.fixture
def start(mode: str, known_cluster: Any) -> Iterator[None]:
    """Initialise an autocommit and a manual-commit group with a tenant."""
    tenant = {"setting": "app.tenant", "verify": "off"}
    common: dict[str, Any] = {"connection_count": 2, "timeout": 5, "tenant": tenant}
    groups = {"auto": common, "manual": {**common, "autocommit": False}}
    Connection.init(config([server(known_cluster.primary)], mode, **groups))
    yield
    Connection.reset()


def in_threads(work: Callable[[int], Any], threads: int = THREADS) -> list[Any]:
    """Do the work in so many threads that begin at once; return what each gave."""
    barrier = threading.Barrier(threads)

    def begin(number: int) -> Any:
        barrier.wait(10)
        return work(number)

    with ThreadPoolExecutor(threads) as pool:
        return [done.result(30) for done in [pool.submit(begin, number) for number in range(threads)]]


# Each gives the values of the setting that its statements have seen.


def plain(db: Handler) -> list[Any]:
    return [db.fetchval(READ) for _ in range(3)]


def with_parameters(db: Handler) -> list[Any]:
    return [db.query(READ + ", %s::int", (i,)).fetchone()[0] for i in range(3)]


def several(db: Handler) -> list[Any]:
    cursor = db.query(f"{READ}; {READ}")
    found = [cursor.fetchone()[0]]
    cursor.nextset()
    return [*found, cursor.fetchone()[0]]


def many(db: Handler) -> list[Any]:
    return [row[0] for row in db.fetchmany(READ + ", %s::int", [(1,), (2,)])]


def stream(db: Handler) -> list[Any]:
    return [row[0] for row in db.cursor().stream(READ + ", generate_series(1, 3)")]


def copy(db: Handler) -> list[Any]:
    with db.copy(f"COPY ({READ}) TO STDOUT") as copy:
        return [row[0] for row in copy.rows()]


def raw(db: Handler) -> list[Any]:
    return [db.connection.execute(READ).fetchone()[0]]


def done(db: Handler) -> list[Any]:
    db.query("DO $$ BEGIN ASSERT current_setting('app.tenant', true) = 'acme'; END $$")
    return []


def committed(db: Handler) -> list[Any]:
    found = db.fetchval(READ)
    db.commit()
    return [found]


def rolled_back(db: Handler) -> list[Any]:
    found = db.fetchval(READ)
    db.rollback()
    return [found]


WAYS = [plain, with_parameters, several, many, stream, copy, raw, done]


@pytest.mark.slow
@pytest.mark.parametrize("group", ["auto", "manual"])
@pytest.mark.parametrize("way", WAYS)
def test_each_statement_of_each_thread_has_the_tenant(start: None, group: str, way: Any) -> None:
    with Handler(group, tenant="acme") as db:
        found = in_threads(lambda _: [value for _ in range(ROUNDS) for value in way(db)])
    assert Counter(value for values in found for value in values).keys() <= {"acme"}


@pytest.mark.parametrize("group", ["auto", "manual"])
def test_so_it_has_if_each_thread_does_something_else(start: None, group: str) -> None:
    ways = [*WAYS, plain, *([committed, rolled_back] if group == "manual" else [])]
    with Handler(group, tenant="acme") as db:
        found = in_threads(
            lambda n: [value for i in range(ROUNDS) for value in ways[(n + i) % len(ways)](db)], len(ways)
        )
    assert Counter(value for values in found for value in values).keys() == {"acme"}


def test_statements_beside_a_transaction_of_another_thread_have_the_tenant(start: None) -> None:
    def work(number: int) -> list[Any]:
        found = []
        for _ in range(ROUNDS):
            if number:
                found += plain(db)
            else:
                with db.transaction():
                    found += plain(db)
        return found

    with Handler("auto", tenant="acme") as db:
        found = in_threads(work)
    assert Counter(value for values in found for value in values) == {"acme": 3 * THREADS * ROUNDS}


@pytest.mark.parametrize("group", ["auto", "manual"])
def test_threads_may_share_a_pipeline(start: None, group: str) -> None:
    with Handler(group, tenant="acme") as db:
        for _ in range(5):
            with db.pipeline():
                cursors = in_threads(lambda _: [db.query(READ) for _ in range(ROUNDS)])
            assert {cursor.fetchone()[0] for each in cursors for cursor in each} == {"acme"}


@pytest.mark.parametrize("group", ["auto", "manual"])
def test_a_thread_that_outlasts_the_block_reaches_no_other(
    start: None, known_cluster: Any, group: str
) -> None:
    lock = 4711
    with known_cluster.primary.connect() as admin, ThreadPoolExecutor(1) as pool:
        admin.execute("SELECT pg_advisory_lock(%s)", (lock,))
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory'"

        def late() -> list[Any]:
            found: list[Any] = []
            try:
                while True:
                    found += plain(db)
                    db.query("SELECT pg_advisory_lock(%s)", (lock,))
            except (pgdbpool.Error, psycopg.Error):
                return found

        with suppress(pgdbpool.TransactionAbortedError), Handler(group, tenant="acme") as db:
            thread = pool.submit(late)
            wait_for(lambda: admin.execute(waits).fetchone()[0])
        for _ in range(20):
            with Handler(group, tenant="other") as other:
                assert plain(other) == ["other"] * 3
        assert set(thread.result(10)) == {"acme"}
        assert {group.in_use for group in Connection.status().groups.values()} == {0}


def test_threads_whose_connection_is_lost_go_on_with_one_other(start: None, known_cluster: Any) -> None:
    with known_cluster.primary.connect() as admin, Handler("auto", tenant="acme") as db:
        for _ in range(5):
            kill_backends(admin, pid_of(db))

            def work(_: int) -> Any:
                with suppress(pgdbpool.ConnectionLostError):
                    plain(db)
                return plain(db), pid_of(db)

            found = in_threads(work)
            assert {str(values) for values, _ in found} == {str(["acme"] * 3)}
            assert len({pid for _, pid in found}) == 1
            assert Connection.status().groups["auto"].in_use == 1


class Struck(BaseException):
    """What a signal raises."""


def strike(number: int, work: Callable[[], Any]) -> Struck | None:
    """Do the work; raise at the place of this number where a signal may hit the taking or end of a turn."""
    places = 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal places
        if event in ("call", "c_return") and frame.f_code.co_filename.endswith(
            ("guests.py", "contextlib.py")
        ):
            places += 1
            if places == number:
                sys.setprofile(None)
                raise Struck

    sys.setprofile(profile)
    try:
        work()
    except Struck as error:
        return error
    finally:
        sys.setprofile(None)
    return None


INTERRUPTED: list[Callable[[Handler], Any]] = [
    lambda db: db.connection.execute(READ).fetchone(),
    lambda db: db.connection.rollback(),
]


@pytest.mark.parametrize("group", ["auto", "manual"])
@pytest.mark.parametrize("work", INTERRUPTED)
def test_an_interrupted_step_keeps_the_turn_from_no_thread(
    start: None, group: str, work: Callable[[Handler], Any]
) -> None:
    def interrupt(number: int) -> list[BaseException]:
        kept: list[BaseException] = []
        with suppress(pgdbpool.Error, psycopg.Error), Handler(group, tenant="acme") as db:
            plain(db)
            if (struck := strike(number, lambda: work(db))) is not None:
                kept.append(struck)  # and with it each generator that it has passed
            for way in (plain, raw, plain):
                with suppress(pgdbpool.Error, psycopg.Error):
                    assert set(way(db)) == {"acme"}
            plain(db)  # if this thread is refused, the others go on when the block ends
            assert set(in_threads(lambda _: plain(db), 1)[0]) == {"acme"}
        return kept

    for number in range(1, 200):
        done: list[list[BaseException]] = []
        thread = threading.Thread(target=lambda n=number, d=done: d.append(interrupt(n)), daemon=True)
        thread.start()
        thread.join(20)
        assert done, f"struck at place {number}, the thread waits for its own turn"
        if not done[0]:
            return

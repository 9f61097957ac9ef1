"""What a block of the randomized isolation test may do, each step with its own check of what it sees.

A step is a function of a `Scene`: a block that is open, whose tenant is known and every answer of which says
under which tenant the server gave it. `STEPS` gives each its weight.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from random import Random
from threading import Lock, Thread
from typing import Any

import psycopg
from psycopg import sql

import pgdbpool
from pgdbpool import DBQueryError, Handler

READ = """SELECT current_setting('app.tenant', true), array_agg(tenant), %s::int
          FROM (SELECT tenant FROM docs ORDER BY id DESC LIMIT 4) AS newest"""
READ_NOW = READ % 0
NOTE = "INSERT INTO journal (writer, unit) VALUES (%s, %s) RETURNING seen, ARRAY[writer]"
CHANGE = "WHERE id IN (SELECT id FROM docs ORDER BY id DESC LIMIT 2 FOR UPDATE SKIP LOCKED)"
RETURNING = "RETURNING seen, ARRAY[tenant]"

# What a block leaves in its session; the next one must not notice.
LEFT_BEHIND = [
    "SET ROLE peeker",
    "SET search_path = shadow, public",
    "SET row_security = off",
    "CREATE TEMP TABLE docs AS SELECT 0::bigint AS id, 'foreign' AS tenant, '' AS writer, '' AS seen",
    "CREATE TEMP TABLE journal (seen text DEFAULT 'foreign', writer text, unit bigint)",
    "SET default_transaction_read_only = on",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY, ISOLATION LEVEL SERIALIZABLE",
    "SET client_encoding = 'LATIN1'",
    "PREPARE mine AS SELECT 1",
    "DEALLOCATE ALL",
    "DECLARE mine CURSOR WITH HOLD FOR SELECT 1",
    "LISTEN news",
    "SELECT pg_advisory_lock_shared(1)",
    "SET statement_timeout = 1",
]
# What changes the tenant of a session, and of a transaction that is open, until that ends.
OTHER_TENANT = [
    "SET app.tenant = {}",
    "SELECT set_config('app.tenant', {}, false)",
    "SELECT remember({})",  # a function, whose text says nothing
    "SELECT 1; SET app.tenant = {}",
    "SET LOCAL app.tenant = {}",
    "SELECT set_config('app.tenant', {}, true)",
    "RESET app.tenant; SELECT {}",
]
LOCAL_TENANT = [
    "SET LOCAL app.tenant = {}",
    "SELECT set_config('app.tenant', {}, true)",
    "SELECT remember({})",
]
"""Of these, those that a group behind a pooler does not refuse."""

CHANNELS: deque[str] = deque(maxlen=20)
"""Channels that blocks have listened to of late, some of them in sessions that others have now."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C at any moment."""


class Aborted(BaseException):
    """What a server's timeout, a greenlet's end or an exit raises at any moment."""


class ApplicationError(Exception):
    """An error of the application's own."""


class Leave(ApplicationError):
    """The block is to end here: what it has done to itself, it has done to its own later statements."""


class Violation(Exception):
    """The oracle says no."""


INTERRUPTS = (Interrupted, Aborted)


@dataclass(slots=True)
class Unit:
    """One transaction: at the end all of its rows are there, or none."""

    number: int
    trail: list[str]  # of its block: what it did
    rows: int = 0
    outcome: str = "none"  # committed: all of them; unknown: all or none
    counted: bool = True  # false where an interrupt came between a row and its counting


class Companion:
    """A second thread for the blocks of a worker.

    It is started once, before anything is raised in the worker: CPython 3.11 raises in the new thread what is
    asked for its creator while the thread begins, and so before the thread can note that it has ended.
    """

    def __init__(self) -> None:
        self.violations: list[str] = []
        self._jobs: SimpleQueue[tuple[Callable[[], None] | None, Lock]] = SimpleQueue()
        Thread(target=self._run, name="companion", daemon=True).start()

    def begin(self, job: Callable[[], None] | None) -> Lock:
        """Have a job done, or the thread ended; return a lock that can be acquired when it is over."""
        over = Lock()
        over.acquire()
        self._jobs.put((job, over))
        return over

    def finish(self) -> None:
        """Wait for the jobs that an interrupted block did not wait for, and end the thread."""
        if not self.begin(None).acquire(timeout=30):
            self.violations.append("the other thread of a block does not end")

    def _run(self) -> None:
        while True:
            job, over = self._jobs.get()
            try:
                if job is None:
                    return
                job()
            except Violation as violation:
                self.violations.append(str(violation))
            finally:
                over.release()
                del job  # it leads to the block


class Scene:
    """A block that is open, with its tenant ("" for none) and the transaction that it has open."""

    def __init__(
        self,
        db: Handler,
        tenant: str,
        manual: bool,
        random: Random,
        events: Counter[str],
        new_unit: Callable[[], Unit],
        companion: Companion,
    ) -> None:
        self.db = db
        self.tenant = tenant
        self.manual = manual
        self.schema: int | None = None
        """Which of the schemas the block's search_path names, if any."""
        self.switched = False
        """Whether the block has set autocommit, and so has psycopg's own transactions."""
        self.random = random
        self.events = events
        self.new_unit = new_unit
        self.companion = companion
        self.unit: Unit | None = new_unit() if manual else None
        self.listens: set[str] = set()
        """Channels that the block listens to."""

    # The oracle.

    def check(self, cursor: psycopg.Cursor[Any]) -> None:
        """Hold each row (setting, tenants, ...) of a result against the block's tenant."""
        for row in cursor:
            self.check_row(*row[:2])

    def check_row(self, setting: str | None, tenants: list[str] | None) -> None:
        """Raise a `Violation` unless the server answered for the block's tenant."""
        self.events["statements checked"] += 1
        if setting != self.tenant or set(tenants or ()) - {self.tenant}:
            raise Violation(f"tenant {self.tenant!r}: the server had {setting!r} and showed {tenants}")

    def wrote(self, rows: int = 1) -> None:
        """Count rows of the open transaction."""
        if self.unit is not None:
            self.unit.rows += rows

    @property
    def mark(self) -> tuple[str, int | None]:
        """What a row of the journal says about its writer."""
        return self.tenant, self.unit.number if self.unit else None

    # Transactions.

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Around what commits: note what came of the open transaction, and begin the next."""
        unit = self.unit
        if unit is not None:
            unit.outcome = "unknown"
        try:
            yield
            if unit is not None:
                unit.outcome = "committed"
        except DBQueryError as error:
            if unit is not None and not error.maybe_committed:
                unit.outcome = "none"
            raise
        finally:
            self.unit = self.new_unit() if self.manual else None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """A transaction in an autocommit block, a savepoint in a manual one that has not set autocommit."""
        outermost = self.unit is None or (self.switched and self.idle)
        if self.unit is None:
            self.unit = self.new_unit()
        unit = self.unit
        assert unit is not None
        before = unit.rows
        context = self.db.transaction()
        try:
            with context:
                yield
                if outermost:
                    unit.outcome = "unknown"
        except BaseException as error:
            if not outermost:
                unit.rows = before
            elif isinstance(error, DBQueryError) and not error.maybe_committed:
                unit.outcome = "none"
            raise
        else:
            unit.outcome = "committed" if outermost else unit.outcome
        finally:
            if outermost:
                self.unit = self.new_unit() if self.manual else None
            else:
                self.unit = unit

    @property
    def idle(self) -> bool:
        """Whether no transaction is open."""
        conn = self.db._conn
        return conn is None or conn.pgconn.transaction_status == psycopg.pq.TransactionStatus.IDLE

    def hazard(self) -> None:
        """Raise now and then, wherever this is called."""
        if self.random.random() < 0.03:
            kind = self.random.choice((ApplicationError, *INTERRUPTS))
            self.events[f"raised {kind.__name__}"] += 1
            raise kind


# Reading and writing through the Handler.


def read(s: Scene) -> None:
    s.check(s.db.query(READ_NOW))


def read_with_parameter(s: Scene) -> None:
    s.check(s.db.query(READ, (s.random.randrange(9),)))


def insert(s: Scene) -> None:
    if s.tenant:
        values = (s.tenant, s.tenant)
        s.check(s.db.query(f"INSERT INTO docs (tenant, writer) VALUES (%s, %s) {RETURNING}", values))


def update(s: Scene) -> None:
    s.check(s.db.query(f"UPDATE docs SET writer = %s {CHANGE} {RETURNING}", (s.tenant,)))


def delete(s: Scene) -> None:
    if s.random.random() < 0.3:
        query = f"DELETE FROM docs {CHANGE} RETURNING current_setting('app.tenant', true), ARRAY[tenant]"
        s.check(s.db.query(query))


def note(s: Scene) -> None:
    s.check(s.db.query(NOTE, s.mark))
    s.wrote()


def trespass(s: Scene) -> None:
    """Write for another tenant: PostgreSQL refuses, and the block goes on."""
    with suppress(psycopg.errors.InsufficientPrivilege), s.transaction():
        s.db.query("INSERT INTO docs (tenant, writer) VALUES ('other', %s)", (s.tenant,))
        raise Violation(f"{s.tenant!r} wrote a row of another tenant")


def fail(s: Scene) -> None:
    """Swallow an error; in a manual block, roll back after it, or go on and find that one must."""
    with suppress(psycopg.errors.DivisionByZero):
        s.db.query("SELECT 1 / 0")
    if s.random.random() < 0.7:
        roll_back(s)


def fail_in_savepoint(s: Scene) -> None:
    with suppress(psycopg.errors.DivisionByZero), s.transaction():
        note(s)
        s.db.query("SELECT 1 / 0")
    read(s)


# What does not ride in a pipeline with its preamble.


def several(s: Scene) -> None:
    for result in s.db.query(f"{NOTE}; {READ_NOW}; {NOTE}", (*s.mark, *s.mark)).results():
        s.check(result)
    s.wrote(2)


def do_block(s: Scene) -> None:
    s.db.query("DO $$ BEGIN PERFORM * FROM docs; END $$")


def many(s: Scene) -> None:
    read(s)  # as in pipeline()
    cursor = s.db.connection.cursor()
    cursor.executemany(NOTE, [s.mark] * 3, returning=True)
    s.wrote(3)
    for result in cursor.results():
        s.check(result)


def stream(s: Scene) -> None:
    rows = s.db.connection.cursor().stream(f"{READ_NOW}, generate_series(1, 3) GROUP BY generate_series")
    for row in rows:
        s.check_row(*row[:2])
        s.hazard()


def copy_out(s: Scene) -> None:
    with s.db.connection.cursor().copy(f"COPY ({READ_NOW}) TO STDOUT") as copy:
        copy.set_types(["text", "text[]", "int4"])
        for setting, tenants, _ in copy.rows():
            s.hazard()
            s.check_row(setting, tenants)


def copy_in(s: Scene) -> None:
    with s.db.connection.cursor().copy("COPY journal (writer, unit) FROM STDIN") as copy:
        copy.write_row(s.mark)
        s.hazard()
        copy.write_row(s.mark)
    s.wrote(2)


def pipeline(s: Scene) -> None:
    read(s)  # after a stream(), libpq gives the first result of a pipeline row by row
    with s.db.connection.pipeline():
        cursors = [s.db.query(READ_NOW), s.db.query(NOTE, s.mark), s.db.query(READ, (1,))]
        s.wrote()
        s.hazard()
        if s.random.random() < 0.3:
            with suppress(psycopg.errors.DivisionByZero):
                s.db.query("SELECT 1 / 0").fetchone()
    for cursor in cursors:
        s.check(cursor)


def named_cursor(s: Scene) -> None:
    with s.transaction(), s.db.connection.cursor("mine") as cursor:
        cursor.execute(READ_NOW)
        s.hazard()
        s.check(cursor)


def raw(s: Scene) -> None:
    """Use the connection as psycopg's documentation shows it."""
    connection = s.db.connection
    s.check(connection.execute(READ_NOW))
    with connection.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        assert cursor.execute("SELECT 1 AS one").fetchone() == {"one": 1}
    s.check(connection.cursor(binary=True).execute(READ, (1,), prepare=True))


def cursor_of_psycopg(s: Scene) -> None:
    """Use a cursor that is not the block's: refused, or it has the tenant."""
    kind = s.random.choice((psycopg.Cursor, psycopg.ClientCursor, psycopg.RawCursor))
    with suppress(psycopg.NotSupportedError):
        s.check(kind(s.db.connection).execute(READ_NOW))


def commit_in_pipeline(s: Scene) -> None:
    """End the transaction inside a pipeline: refused, since what follows would have no tenant."""
    before = s.unit
    read(s)  # as in pipeline()
    with s.db.connection.pipeline():
        with suppress(psycopg.NotSupportedError), s.ending():
            s.random.choice((s.db.commit, lambda: s.db.query("COMMIT")))()
        cursor = s.db.query(READ_NOW)
    s.check(cursor)
    s.unit = before


# The methods under asyncpg's names, and the one-shots.


def fetches(s: Scene) -> None:
    for row in s.db.fetch(READ, (s.random.randrange(9),)):
        s.check_row(*row[:2])
    row = s.db.fetchrow(READ_NOW)
    assert row is not None
    s.check_row(*row[:2])
    s.check_row(s.db.fetchval(READ_NOW), [])
    rows = s.db.fetchmany(READ, [(1,), (2,)])
    for row in rows:
        s.check_row(*row[:2])


def executes(s: Scene) -> None:
    assert s.db.execute(NOTE, s.mark) == "INSERT 0 1"
    s.wrote()
    s.hazard()
    assert s.db.executemany(NOTE, [s.mark] * 2) == 2
    s.wrote(2)
    for row in s.db.fetchmany(NOTE, [s.mark] * 2):
        s.wrote()
        s.check_row(*row)


def copies(s: Scene) -> None:
    def marks() -> Iterator[tuple[str, int | None]]:
        for _ in range(3):
            yield s.mark
            s.hazard()

    assert s.db.copy_records_to_table("journal", marks(), columns=["writer", "unit"]) == "COPY 3"
    s.wrote(3)
    found: list[bytes] = []

    def keep(data: bytes) -> None:
        found.append(data)
        s.hazard()

    s.db.copy_from_query("SELECT DISTINCT tenant FROM docs", output=keep)
    s.db.copy_from_query("SELECT current_setting('app.tenant', true)", output=keep)
    for data in found:
        s.check_row(data.decode().removesuffix("\n"), [])


def own_cursor_and_pipeline(s: Scene) -> None:
    with s.transaction(), s.db.cursor("mine") as cursor:
        cursor.execute(READ_NOW)
        s.hazard()
        s.check(cursor)
    read(s)  # as in pipeline()
    with s.db.pipeline():
        cursors = [s.db.query(READ_NOW), s.db.query(NOTE, s.mark)]
        s.wrote()
        s.hazard()
        s.check_row(s.db.fetchval(READ_NOW), [])
    for each in cursors:
        s.check(each)


def one_shot(s: Scene) -> None:
    """Read or write in a block of its own, for the same tenant, and hold what it says of its outcome."""
    group = s.db._group.name
    use: Any = {"tenant": s.tenant or None, "tenant_override": True, "timeout": 0.05}
    unit = s.new_unit()
    try:
        if s.random.random() < 0.5:
            rows = pgdbpool.Connection.fetch(group, READ, (3,), **use)
        else:
            mark = s.tenant, unit.number
            unit.rows, unit.outcome = 2, "unknown"
            if s.random.random() < 0.5:
                with_two = NOTE.replace("(%s, %s)", "(%s, %s), (%s, %s)")
                rows = pgdbpool.Connection.fetch(group, with_two, (*mark, *mark), **use)
            else:
                pgdbpool.Connection.executemany(group, NOTE, [mark, mark], **use)
                rows = []
            unit.outcome = "committed"
        for row in rows:
            s.check_row(*row[:2])
        s.events["one-shots"] += 1
    except DBQueryError as error:
        if not (error.maybe_committed or error.maybe_executed):
            unit.outcome = "none"
        raise
    except pgdbpool.DBOfflineError:
        raise
    except pgdbpool.DBConnectionError:
        unit.outcome = "none"
        s.events["one-shots without a connection"] += 1


# Prepared statements whose tables differ, or change.


@contextmanager
def stale_plans(s: Scene) -> Iterator[None]:
    """Let a plan that is stale fail in a transaction that was open before, and only there."""
    was_open = not s.idle
    try:
        yield
    except psycopg.errors.FeatureNotSupported as error:
        if not was_open:
            raise Violation("a stale plan has failed outside of a transaction") from error
        s.events["stale plans in a transaction"] += 1
        raise ApplicationError from error


def table_of_the_schema(s: Scene) -> None:
    """Read a table that has other columns in each of the schemas."""
    if s.schema is None:
        return
    with stale_plans(s):
        rows = s.db.fetch("SELECT * FROM shapes")
    s.events["tables of a schema read"] += 1
    if [tuple(row) for row in rows] != [(s.schema,) * (s.schema + 1)]:
        raise Violation(f"search_path of schema {s.schema}: {rows}")


def changing_table(s: Scene) -> None:
    """Read a table whose owner changes a column's type all the time."""
    with stale_plans(s):
        for number, value in s.db.query("SELECT * FROM changing WHERE id = %s", (1,)):
            if (number, int(value)) != (1, 7):
                raise Violation(f"the changing table has {number}, {value!r}")


# Threads, and notifications.


def two_threads(s: Scene) -> None:
    """Read and write in another thread at the same time, over the same connection."""
    notes = 0
    failures: list[BaseException] = []
    # Another connection is taken by the thread of the block alone, where the pool has no lock.
    cursors = [s.db.cursor(row_factory=psycopg.rows.tuple_row) for _ in range(4)]
    mark = s.mark

    def other() -> None:
        nonlocal notes
        try:
            for cursor in cursors[1:]:
                s.check(cursor.execute(READ_NOW))
                s.check(cursor.execute(READ, (1,)))
                s.check(cursor.execute(NOTE, mark))
                notes += 1
            for result in cursors[0].execute(f"{READ_NOW}; {READ_NOW}").results():
                s.check(result)
        except Violation:
            raise
        except Exception as error:  # noqa: BLE001  it is raised in the block's thread
            failures.append(error)

    over = s.companion.begin(other)
    try:
        for _ in range(3):
            read(s)
            read_with_parameter(s)
        s.hazard()
    finally:
        if not over.acquire(timeout=30):
            raise Violation("the other thread of the block does not end")
        s.wrote(notes)
        s.events["blocks with two threads"] += 1
    if failures:
        raise failures.pop()


def notifications(s: Scene) -> None:
    """Tell another block's channel, listen to one of one's own, and take what comes: for that alone."""
    channel = f"c{s.random.randrange(10**9)}"
    if s.random.random() < 0.5:
        s.listens.add(channel)
        s.db.query(f"LISTEN {channel}")
        CHANNELS.append(channel)
    for told in (s.random.choice((*CHANNELS, "news")), *s.listens):
        s.db.query("SELECT pg_notify(%s, %s)", (told, s.tenant))
    if s.manual:
        with s.ending():
            s.db.commit()
    for notify in s.db.connection.notifies(timeout=0.001):
        s.events["notifications"] += 1
        if notify.channel not in s.listens:
            raise Violation(f"{notify.channel} told a block that listens to {s.listens or 'nothing'}")


# The transaction.


def commit(s: Scene) -> None:
    if s.manual:
        with s.ending():
            if s.random.random() < 0.8:
                s.db.commit()
            else:
                commit_by_hand(s, "COMMIT")
        read(s)


def commit_and_chain(s: Scene) -> None:
    if s.manual:
        note(s)
        with s.ending():
            commit_by_hand(s, "COMMIT AND CHAIN")
        read(s)


def commit_by_hand(s: Scene, statement: str) -> None:
    """PostgreSQL's own COMMIT does not fail in a transaction that has; it says what it did."""
    if s.db.query(statement).statusmessage != "COMMIT":
        raise ApplicationError


def roll_back(s: Scene) -> None:
    if s.manual:
        s.unit = s.new_unit()
        s.db.rollback()


def transaction(s: Scene) -> None:
    with s.transaction():
        note(s)
        s.hazard()
        with suppress(ApplicationError), s.transaction():
            note(s)
            s.hazard()
        read(s)


# What a block does to its own tenant and to its session.


def become_another(s: Scene) -> None:
    """Change the tenant of the session; the next transaction is the block's tenant's again."""
    text = s.random.choice(LOCAL_TENANT if s.db._live().local else OTHER_TENANT)
    s.events["tenant changed by the block"] += 1
    try:
        s.db.query(text.format(sql.Literal(s.random.choice(("other", "", "o'neill"))).as_string()))
        if s.manual:
            with s.ending():
                s.db.commit()
    except BaseException as error:
        if s.manual:
            raise Leave from error
        raise
    read(s)
    note(s)


def switch_autocommit(s: Scene) -> None:
    """Go on in the other mode to the end of the block; what is open is committed before."""
    s.events["autocommit switched"] += 1
    try:
        if s.manual:
            with s.ending():
                s.db.commit()
        s.db.connection.autocommit = s.manual
        s.manual, s.switched = not s.manual, True
        s.unit = s.new_unit() if s.manual else None
    except BaseException as error:
        raise Leave from error  # in which mode it goes on is not known here
    read(s)
    note(s)


def leave_something(s: Scene) -> None:
    """Leave something behind in the session, and the block with it."""
    s.events["sessions left unclean"] += 1
    try:
        s.db.connection.row_factory = psycopg.rows.dict_row
        s.db.connection.prepare_threshold = 0
        with suppress(DBQueryError):  # the second may not like what the first has done
            for statement in s.random.sample(LEFT_BEHIND, 2):
                s.db.query(statement)
            if s.manual:
                with s.ending():
                    s.db.commit()
    finally:
        raise Leave


STEPS: dict[Callable[[Scene], None], int] = {
    read: 8,
    read_with_parameter: 6,
    insert: 5,
    update: 3,
    delete: 2,
    note: 6,
    trespass: 1,
    fail: 2,
    fail_in_savepoint: 1,
    several: 2,
    do_block: 1,
    many: 2,
    stream: 2,
    copy_out: 2,
    copy_in: 1,
    pipeline: 2,
    named_cursor: 1,
    raw: 2,
    cursor_of_psycopg: 1,
    commit_in_pipeline: 1,
    fetches: 3,
    executes: 2,
    copies: 2,
    own_cursor_and_pipeline: 1,
    one_shot: 3,
    two_threads: 2,
    notifications: 3,
    table_of_the_schema: 4,
    changing_table: 3,
    commit: 3,
    commit_and_chain: 1,
    roll_back: 2,
    transaction: 3,
    become_another: 2,
    switch_autocommit: 2,
    leave_something: 2,
}


SESSION = {leave_something, notifications}
"""Steps that change the session itself, which no pooler gives back as it was."""


def mistakes(group: str, tenant: str, other: str) -> None:
    """Ask for blocks that are refused before anything is sent."""
    for current, use, error in (
        (None, {}, pgdbpool.TenantRequiredError),
        (tenant, {"tenant": other}, pgdbpool.TenantConflictError),
    ):
        try:
            with pgdbpool.tenant(current), Handler(group, **use):
                raise Violation(f"{group} opened a block for {use} inside {current!r}")
        except error:
            continue

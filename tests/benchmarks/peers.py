"""The pools that are measured, each used as its documentation says; each runs in a process of its own.

A peer has the same operations as the others, as far as it can: a read of one row in autocommit mode, the
same for a tenant under row-level security, a transaction of a tenant, one write that is committed, and a
checkout with its checkin. Nothing is imported here that only some of the processes have.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

READ = "SELECT id, name FROM items WHERE id = %s"
TENANT_READ = "SELECT id, name FROM tenant_items WHERE id = %s"
BIND = "SELECT set_config('app.tenant_id', %s, true)"
UPDATE = "UPDATE items SET hits = hits + 1 WHERE id = %s"
TENANT_UPDATE = "UPDATE tenant_items SET hits = hits + 1 WHERE id = %s"
MANY = "SELECT id, name, hits, id * 2 AS twice, now() AS at FROM items ORDER BY id LIMIT 50"
TENANT = 7
READ_1, TENANT_READ_1, BIND_1, UPDATE_1, TENANT_UPDATE_1 = (  # as asyncpg writes parameters
    text.replace("%s", "$1") for text in (READ, TENANT_READ, BIND, UPDATE, TENANT_UPDATE)
)
ROWS = 100
"""Rows of each table; those of the tenant have the same numbers."""


class Unsupported(Exception):
    """The peer has no such operation; the text says why."""


class Peer:
    """A pool, or two where it needs one for autocommit and one for transactions."""

    label = ""
    threads = True
    """Whether several threads may use it, and wait for each other."""
    row = 1
    """The row that it updates, so that no peer waits for another's lock."""

    def __init__(self, servers: list[dict[str, Any]], size: int) -> None:
        self.servers, self.size = servers, size

    def read(self) -> Any:
        """Read one row, in a block of its own."""
        raise Unsupported("no such operation")

    def tenant_read(self) -> Any:
        """Read one row of a tenant."""
        raise Unsupported("no such operation")

    def transaction(self, statements: int) -> None:
        """Update one row of a tenant so often, in one transaction."""
        raise Unsupported("no such operation")

    def write(self) -> None:
        """Update one row and commit, in as few steps as the pool has for it."""
        raise Unsupported("no such operation")

    def fetchval(self) -> Any:
        """Read one value, in a block of its own."""
        raise Unsupported("no such operation")

    def rows(self) -> Any:
        """Read 50 rows of 5 columns, in a block of its own."""
        raise Unsupported("no such operation")

    def block_write(self) -> None:
        """Update one row in a transaction, and commit it at its end."""
        raise Unsupported("no such operation")

    def deadline_read(self) -> Any:
        """Read one row, with a deadline for the request."""
        raise Unsupported("no such operation")

    def checkout(self) -> None:
        """Check a connection out and in, without a query."""
        raise Unsupported("it has no pool")

    def block(self) -> AbstractContextManager[Any]:
        """Hold one connection of the pool for reads."""
        raise Unsupported("it has no pool")

    def run(self, operation: Callable[[], Any]) -> Any:
        """Run an operation to its end."""
        return operation()

    def fill(self) -> None:
        """Open all connections of the pool for reads."""
        with ExitStack() as stack:
            for _ in range(self.size):
                stack.enter_context(self.block())

    def operation(self, name: str) -> Callable[[], Any]:
        """Return the operation of that name: `read`, `transaction 3` ..."""
        word, _, number = name.partition(" ")
        method: Callable[..., Any] = getattr(self, word)
        return (lambda: method(int(number))) if number else method


def libpq(servers: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Return libpq's parameters for the servers; of several, for the one that takes writes."""
    first = servers[0]
    parameters = {
        "host": ",".join(server["host"] for server in servers),
        "port": ",".join(str(server["port"]) for server in servers),
        "user": first["user"],
        "dbname": first["name"],
    }
    if len(servers) > 1:
        parameters["target_session_attrs"] = "read-write"
    return parameters | more


class Bare(Peer):
    """psycopg on a connection that the thread keeps: the limit. Its tenant is that of the session."""

    label = "psycopg, held connection"

    def __init__(self, servers: list[dict[str, Any]], size: int) -> None:
        import psycopg

        super().__init__(servers, size)
        self._own = threading.local()
        self._connect = psycopg.connect

    def _connection(self) -> Any:
        try:
            return self._own.connection
        except AttributeError:
            connection = self._own.connection = self._connect(**libpq(self.servers), autocommit=True)
            connection.execute("SELECT set_config('app.tenant_id', %s, false)", (str(TENANT),))
            return connection

    def read(self) -> Any:
        return self._connection().execute(READ, (1,)).fetchone()

    def tenant_read(self) -> Any:
        return self._connection().execute(TENANT_READ, (1,)).fetchone()

    def transaction(self, statements: int) -> None:
        connection = self._connection()
        with connection.transaction():
            for _ in range(statements):
                connection.execute(TENANT_UPDATE, (self.row,))

    def write(self) -> None:
        self._connection().execute(UPDATE, (self.row,))

    def fetchval(self) -> Any:
        return self._connection().execute(READ, (1,)).fetchone()[0]

    def rows(self) -> Any:
        return self._connection().execute(MANY).fetchall()

    def block_write(self) -> None:
        connection = self._connection()
        connection.execute("BEGIN")
        connection.execute(UPDATE, (self.row,))
        connection.execute("COMMIT")

    def deadline_read(self) -> Any:
        return self.read()  # it has none


class Pgdbpool(Peer):
    """pgdbpool 2, threaded: each block looks at its connection first."""

    label = "pgdbpool"
    mode = "threaded"

    def __init__(self, servers: list[dict[str, Any]], size: int) -> None:
        import pgdbpool

        super().__init__(servers, size)
        self.package, self.handler = pgdbpool, pgdbpool.Handler
        several = {"target": "primary"} if len(servers) > 1 else {}
        base: dict[str, Any] = {"connection_count": size, **several}
        late = {**base, "min_size": 0}  # opened by the first that needs them
        tenants = {**late, "tenant": {"setting": "app.tenant_id", "type": "int"}}
        groups = {"read": base, "write": {**late, "autocommit": False}}
        groups |= {"tenant_read": tenants, "tenant_write": {**tenants, "autocommit": False}}
        pgdbpool.Connection.init({"type": self.mode, "db": servers, "groups": groups})

    def read(self) -> Any:
        with self.handler("read") as db:
            return db.query(READ, (1,)).fetchone()

    def tenant_read(self) -> Any:
        with self.handler("tenant_read", tenant=TENANT) as db:
            return db.query(TENANT_READ, (1,)).fetchone()

    def transaction(self, statements: int) -> None:
        with self.handler("tenant_write", tenant=TENANT) as db:
            for _ in range(statements):
                db.query(TENANT_UPDATE, (self.row,))

    def write(self) -> None:
        self.package.Connection.execute("write", UPDATE, (self.row,))

    def fetchval(self) -> Any:
        return self.package.Connection.fetchval("read", READ, (1,))

    def rows(self) -> Any:
        with self.handler("read") as db:
            return db.query(MANY).fetchall()

    def block_write(self) -> None:
        with self.handler("write") as db:
            db.query(UPDATE, (self.row,))

    def deadline_read(self) -> Any:
        with self.package.deadline(30):
            return self.read()

    def checkout(self) -> None:
        with self.handler("read"):
            pass

    def block(self) -> AbstractContextManager[Any]:
        return self.handler("read")


class PgdbpoolLockFree(Pgdbpool):
    """pgdbpool 2 for one thread."""

    label = "pgdbpool, lock-free"
    mode = "non-threaded"
    threads = False


class PsycopgPool(Peer):
    """psycopg_pool, without a look at what it lends."""

    label = "psycopg_pool"
    check = False

    def __init__(self, servers: list[dict[str, Any]], size: int) -> None:
        import psycopg_pool

        super().__init__(servers, size)
        self._make = psycopg_pool.ConnectionPool
        self.reads = self._pool(autocommit=True)
        self._writes: Any = None

    def _pool(self, **more: Any) -> Any:
        options = {"check": self._make.check_connection} if self.check else {}
        pool = self._make(
            kwargs=libpq(self.servers, **more), min_size=self.size, max_size=self.size, open=False, **options
        )
        pool.open(wait=True)
        return pool

    @property
    def writes(self) -> Any:
        """The pool for transactions, opened by the first that needs it."""
        self._writes = self._writes or self._pool()
        return self._writes

    def read(self) -> Any:
        with self.reads.connection() as connection:
            return connection.execute(READ, (1,)).fetchone()

    def tenant_read(self) -> Any:
        with self.writes.connection() as connection:
            connection.execute(BIND, (str(TENANT),))
            return connection.execute(TENANT_READ, (1,)).fetchone()

    def transaction(self, statements: int) -> None:
        with self.writes.connection() as connection:
            connection.execute(BIND, (str(TENANT),))
            for _ in range(statements):
                connection.execute(TENANT_UPDATE, (self.row,))

    def write(self) -> None:
        with self.reads.connection() as connection:
            connection.execute(UPDATE, (self.row,))

    def checkout(self) -> None:
        self.reads.putconn(self.reads.getconn())

    def block(self) -> AbstractContextManager[Any]:
        return self.reads.connection()  # type: ignore[no-any-return]


class PsycopgPoolCheck(PsycopgPool):
    """psycopg_pool with `check=ConnectionPool.check_connection`."""

    label = "psycopg_pool, check"
    check = True


class Sqlalchemy(Peer):
    """SQLAlchemy's core and QueuePool on psycopg 3, with `pool_pre_ping`."""

    label = "SQLAlchemy, pre-ping"

    def __init__(self, servers: list[dict[str, Any]], size: int) -> None:
        import sqlalchemy

        super().__init__(servers, size)
        self._text = sqlalchemy.text
        self._make = sqlalchemy.create_engine
        self.reads = self._engine(isolation_level="AUTOCOMMIT")
        self.writes = self._engine()
        self._read = self._text(READ.replace("%s", ":id"))
        self._tenant_read = self._text(TENANT_READ.replace("%s", ":id"))
        self._bind = self._text(BIND.replace("%s", ":tenant"))
        self._update = self._text(UPDATE.replace("%s", ":id"))
        self._tenant_update = self._text(TENANT_UPDATE.replace("%s", ":id"))

    def _engine(self, **more: Any) -> Any:
        return self._make(
            "postgresql+psycopg://",
            connect_args=libpq(self.servers),
            pool_size=self.size,
            max_overflow=0,
            pool_pre_ping=True,
            **more,
        )

    def read(self) -> Any:
        with self.reads.connect() as connection:
            return connection.execute(self._read, {"id": 1}).fetchone()

    def tenant_read(self) -> Any:
        with self.writes.begin() as connection:
            connection.execute(self._bind, {"tenant": str(TENANT)})
            return connection.execute(self._tenant_read, {"id": 1}).fetchone()

    def transaction(self, statements: int) -> None:
        with self.writes.begin() as connection:
            connection.execute(self._bind, {"tenant": str(TENANT)})
            for _ in range(statements):
                connection.execute(self._tenant_update, {"id": self.row})

    def write(self) -> None:
        with self.reads.connect() as connection:
            connection.execute(self._update, {"id": self.row})

    def checkout(self) -> None:
        self.reads.raw_connection().close()

    def block(self) -> AbstractContextManager[Any]:
        return self.reads.connect()  # type: ignore[no-any-return]


class Psycopg2(Peer):
    """psycopg2's ThreadedConnectionPool, which does not look at what it lends, nor wait."""

    label = "psycopg2 pool"

    def __init__(self, servers: list[dict[str, Any]], size: int) -> None:
        from psycopg2.pool import ThreadedConnectionPool

        super().__init__(servers, size)
        self.pool = ThreadedConnectionPool(size, size, **libpq(servers))

    @contextmanager
    def block(self) -> Any:
        connection = self.pool.getconn()
        try:
            connection.autocommit = True
            yield connection
        finally:
            self.pool.putconn(connection)

    @contextmanager
    def _transaction(self) -> Any:
        connection = self.pool.getconn()
        try:
            connection.autocommit = False
            with connection, connection.cursor() as cursor:
                cursor.execute(BIND, (str(TENANT),))
                yield cursor
        finally:
            self.pool.putconn(connection)

    def read(self) -> Any:
        with self.block() as connection, connection.cursor() as cursor:
            cursor.execute(READ, (1,))
            return cursor.fetchone()

    def tenant_read(self) -> Any:
        with self._transaction() as cursor:
            cursor.execute(TENANT_READ, (1,))
            return cursor.fetchone()

    def transaction(self, statements: int) -> None:
        with self._transaction() as cursor:
            for _ in range(statements):
                cursor.execute(TENANT_UPDATE, (self.row,))

    def write(self) -> None:
        with self.block() as connection, connection.cursor() as cursor:
            cursor.execute(UPDATE, (self.row,))

    def checkout(self) -> None:
        self.pool.putconn(self.pool.getconn())


class Legacy(Peer):
    """pgdbpool 1.0.2, on psycopg2: it sends a query of its own before each of the block's."""

    label = "pgdbpool 1.0.2"

    def __init__(self, servers: list[dict[str, Any]], size: int) -> None:
        import pgdbpool.pool

        super().__init__(servers, size)
        self.handler = pgdbpool.pool.Handler
        os.environ["PGPORT"] = str(servers[0]["port"])  # it has no setting for it
        groups = {"read": {"connection_count": size, "autocommit": True}}
        groups["write"] = {"connection_count": size, "autocommit": False}
        pgdbpool.pool.Connection.init(
            {"db": [{**server, "pass": None} for server in servers], "groups": groups}
        )

    def read(self) -> Any:
        with self.handler("read") as db:
            return db.query(READ, (1,)).fetchone()

    def tenant_read(self) -> Any:
        with self.handler("write") as db:
            db.query(BIND, (str(TENANT),))
            return db.query(TENANT_READ, (1,)).fetchone()

    def transaction(self, statements: int) -> None:
        with self.handler("write") as db:
            db.query(BIND, (str(TENANT),))
            for _ in range(statements):
                db.query(TENANT_UPDATE, (self.row,))
            db.commit()

    def write(self) -> None:
        with self.handler("read") as db:
            db.query(UPDATE, (self.row,))

    def checkout(self) -> None:
        with self.handler("read"):
            pass

    def block(self) -> AbstractContextManager[Any]:
        return self.handler("read")  # type: ignore[no-any-return]


class Asyncpg(Peer):
    """asyncpg's pool, driven one at a time: the other world's reference."""

    label = "asyncpg pool, one at a time"
    threads = False

    def __init__(self, servers: list[dict[str, Any]], size: int) -> None:
        import asyncpg

        super().__init__(servers, size)
        self.loop = asyncio.new_event_loop()
        several = {"target_session_attrs": "read-write"} if len(servers) > 1 else {}

        async def make() -> Any:
            return await asyncpg.create_pool(
                host=[server["host"] for server in servers],
                port=[server["port"] for server in servers],
                user=servers[0]["user"],
                database=servers[0]["name"],
                min_size=size,
                max_size=size,
                **several,
            )

        self.pool = self.loop.run_until_complete(make())

    def run(self, operation: Callable[[], Awaitable[Any]]) -> Any:
        return self.loop.run_until_complete(operation())

    async def read(self) -> Any:
        async with self.pool.acquire() as connection:
            return await connection.fetchrow(READ_1, 1)

    async def tenant_read(self) -> Any:
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.execute(BIND_1, str(TENANT))
            return await connection.fetchrow(TENANT_READ_1, 1)

    async def transaction(self, statements: int) -> None:  # type: ignore[override]
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.execute(BIND_1, str(TENANT))
            for _ in range(statements):
                await connection.execute(TENANT_UPDATE_1, self.row)

    async def write(self) -> None:  # type: ignore[override]
        async with self.pool.acquire() as connection:
            await connection.execute(UPDATE_1, self.row)

    async def checkout(self) -> None:  # type: ignore[override]
        async with self.pool.acquire():
            pass

    def fill(self) -> None:
        """It opens them all by itself (`min_size`)."""


PEERS: dict[str, type[Peer]] = {
    "bare": Bare,
    "pgdbpool": Pgdbpool,
    "pgdbpool-lock-free": PgdbpoolLockFree,
    "psycopg_pool": PsycopgPool,
    "psycopg_pool-check": PsycopgPoolCheck,
    "sqlalchemy": Sqlalchemy,
    "psycopg2": Psycopg2,
    "legacy": Legacy,
    "asyncpg": Asyncpg,
}

for _number, _peer in zip(itertools.count(1), PEERS.values(), strict=False):
    _peer.row = _number

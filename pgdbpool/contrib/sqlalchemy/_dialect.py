"""The dialect `postgresql+pgdbpool`: SQLAlchemy's own for psycopg, with connections from a group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from psycopg.rows import tuple_row
from psycopg.types import TypeInfo
from psycopg.types.hstore import register_hstore
from psycopg.types.json import set_json_dumps, set_json_loads
from psycopg.types.string import TextLoader
from sqlalchemy import URL, Engine, event, exc, pool
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg, PGExecutionContext_psycopg
from sqlalchemy.engine.characteristics import ConnectionCharacteristic

from ..._api.connection import Connection
from ..._api.one_statement import BlockOptions
from ._pool import GroupPool

_FRAMEWORKS = ("sqlalchemy", "alembic", "flask_sqlalchemy", "sqlmodel")
"""Packages whose lines are not the application's."""


class Tenant(ConnectionCharacteristic):
    """The execution option `tenant` of an engine or a connection; not to be changed in a transaction."""

    transactional = True

    def set_characteristic(self, dialect: Any, dbapi_conn: Any, value: Any) -> None:
        """Give later transactions the tenant."""
        dbapi_conn.tenant = value

    def get_characteristic(self, dialect: Any, dbapi_conn: Any) -> Any:
        """Return the tenant of later transactions; None for the current one of each."""
        return dbapi_conn.tenant

    def reset_characteristic(self, dialect: Any, dbapi_conn: Any) -> None:
        """Give later transactions the current tenant."""
        dbapi_conn.rollback()
        dbapi_conn.tenant = None


class ExecutionContext(PGExecutionContext_psycopg):
    """The execution of a statement, with the tenant of the execution options."""

    def create_cursor(self) -> Any:
        """Return a cursor of a connection that has the tenant."""
        options = self.root_connection.get_execution_options()
        if "tenant" in options:
            _keep_tenant(self.root_connection, options)
        return super().create_cursor()


class PgDbPoolDialect(PGDialect_psycopg):
    """`postgresql+pgdbpool://GROUP` or `postgresql+pgdbpool://GROUP?config=FILE`."""

    # `driver` stays psycopg: code that asks for it wants to know which values and errors to expect.
    supports_statement_cache = True
    execution_ctx_cls = ExecutionContext
    connection_characteristics = PGDialect_psycopg.connection_characteristics.union({"tenant": Tenant()})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self._hstore: TypeInfo | None = None

    @classmethod
    def get_pool_class(cls, url: URL) -> type[pool.Pool]:
        """Return the pool that is a group."""
        return GroupPool

    @classmethod
    def load_provisioning(cls) -> None:
        """Load the facts about PostgreSQL that SQLAlchemy's own test suite needs."""
        PGDialect_psycopg.load_provisioning()  # type: ignore[no-untyped-call]

    @classmethod
    def engine_created(cls, engine: Engine) -> None:
        """Give the engine's pool its group.

        :raises sqlalchemy.exc.ArgumentError: the engine has a pool that would keep connections.
        """
        event.listen(engine.pool, "detach", _be_collectable)
        if isinstance(engine.pool, GroupPool):
            engine.pool.group = engine.url.host
        elif isinstance(engine.pool, (pool.QueuePool, pool.SingletonThreadPool)):
            raise exc.ArgumentError(
                f"the engine's pool is a group of pgdbpool: remove poolclass={type(engine.pool).__name__}, "
                "which would keep its connections from everything else"
            )

    def create_connect_args(self, url: URL) -> Any:
        """Read the URL: its host is the group.

        :raises sqlalchemy.exc.ArgumentError: the URL or an option is not valid; says what to set instead.
        """
        if not url.host:
            raise exc.ArgumentError(f"{url!r} names no group: write postgresql+pgdbpool://GROUP")
        wrong = [name for name in ("username", "password", "port", "database") if getattr(url, name)]
        if wrong := wrong + [name for name in url.query if name != "config"]:
            raise exc.ArgumentError(
                f"{url!r}: {', '.join(wrong)} can't be in the URL of a group: its servers, users and "
                "databases are in the configuration of the pools (?config=FILE, or Connection.init)"
            )
        config = url.query.get("config")
        if isinstance(config, tuple):
            raise exc.ArgumentError(f"{url!r} names {len(config)} configurations: keep one ?config=FILE")
        if self.client_encoding is not None:
            raise exc.ArgumentError(
                f"client_encoding={self.client_encoding!r} is not the engine's: set it in the `options` of "
                "the servers"
            )
        return [], {"group": url.host} if config is None else {"group": url.host, "config": config}

    def connect(self, *arguments: Any, group: str, config: Any = None, **options: Any) -> Any:
        """Take a connection out of the group; a file opens the pools first, if none are open.

        :raises sqlalchemy.exc.ArgumentError: `connect_args` has an argument that a block cannot be given.
        """
        if wrong := sorted(options.keys() - BlockOptions.__annotations__.keys()):
            raise exc.ArgumentError(
                f"connect_args: {', '.join(wrong)} can't be given to a group: set it in the configuration of "
                f"the pools; a connection takes {', '.join(BlockOptions.__annotations__)}"
            )
        if config is not None:
            _init_once(config)
        conn = Connection.getconn(group, skip=_FRAMEWORKS, **options)
        try:
            conn.row_factory = tuple_row
            self._adapt(conn)
        except BaseException:
            conn.terminate()
            raise
        return conn

    def _adapt(self, conn: Any) -> None:
        """Register the engine's adapters for a connection, over those that the group has registered."""
        if self._native_inet_types is False:
            for name in ("inet", "cidr"):
                conn.adapters.register_loader(name, TextLoader)
        deserializer: Any = self._json_deserializer  # its type differs between 2.0 and 2.1
        if deserializer:
            set_json_loads(deserializer, conn)
        if self._json_serializer:
            set_json_dumps(self._json_serializer, conn)
        if self._hstore is not None:
            register_hstore(self._hstore, conn)

    def _type_info_fetch(self, connection: Any, name: str) -> Any:
        info = super()._type_info_fetch(connection, name)  # type: ignore[no-untyped-call]
        if name == "hstore":
            self._hstore = info
        return info

    def do_begin_twophase(self, connection: Any, xid: Any) -> None:
        """Begin a two-phase transaction of the tenant."""
        options = connection.get_execution_options()
        if "tenant" in options:
            _keep_tenant(connection, options)
        super().do_begin_twophase(connection, xid)  # type: ignore[no-untyped-call]

    def do_terminate(self, dbapi_connection: Any) -> None:
        """Close a connection for good, which the group replaces."""
        dbapi_connection.terminate()


def _keep_tenant(connection: Any, options: Mapping[str, Any]) -> None:
    """Give the tenant of the execution options to SQLAlchemy's replacement for a lost connection."""
    connection.connection.dbapi_connection.tenant = options["tenant"]


def _be_collectable(dbapi_connection: Any, record: Any) -> None:
    """Let the group replace a detached connection that is dropped: SQLAlchemy no longer looks after it."""
    dbapi_connection.be_collectable()


def _init_once(config: str | Mapping[str, Any]) -> None:
    """Open the pools, unless they are open."""
    if Connection._is_open():  # mostly: this is asked for each connection
        return
    with Connection._lock:
        if not Connection._is_open():
            Connection.init(config)

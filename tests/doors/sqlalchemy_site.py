"""An application on SQLAlchemy that reads and writes, over one of the ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from pgdbpool import Connection
from pgdbpool.contrib.sqlalchemy import RoutingSession
from tests.doors.ways import CONNECT_TIMEOUT, SIZE, TIMEOUT, groups, hosts, own

WAY, SERVERS = own()


def engine(role: str) -> sa.Engine:
    """Return the engine for a role."""
    if WAY.own:
        return sa.create_engine(f"postgresql+pgdbpool://{role}")
    places = {**hosts(SERVERS, role), "connect_timeout": CONNECT_TIMEOUT}
    return sa.create_engine(
        "postgresql+psycopg://bench@/postgres",
        connect_args=places,
        pool_size=SIZE,
        max_overflow=0,
        pool_timeout=TIMEOUT,
        pool_pre_ping=WAY.checks,
        isolation_level="AUTOCOMMIT" if role == "read" else None,
    )


if WAY.own:
    Connection.init({"db": [{**server, "query_timeout": 0} for server in SERVERS], "groups": groups()})
WRITING, READING = engine("write"), engine("read")
Session = sessionmaker(class_=RoutingSession, writing=WRITING, reading=READING)


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    hits: Mapped[int]


ONE = sa.select(Item.name).where(Item.id == 3)
ADD = sa.update(Item).where(Item.id == 3).values(hits=Item.hits + 1)


def read() -> None:
    """Read one row in autocommit mode."""
    with READING.connect() as conn:
        conn.execute(ONE).one()


def read_in_transaction() -> None:
    """Read one row in a transaction, which is rolled back, as SQLAlchemy does by default."""
    with WRITING.connect() as conn:
        conn.execute(ONE).one()


def write() -> None:
    """Write one row and commit."""
    with WRITING.begin() as conn:
        conn.execute(ADD)


def commit() -> None:
    """Read one row through the ORM, change it, and commit."""
    with Session() as session, session.primary():
        session.get_one(Item, 3).hits += 1
        session.commit()


OPERATIONS: dict[str, Callable[[], None]] = {
    "Core: a read": read,
    "Core: a read in a transaction": read_in_transaction,
    "Core: a write": write,
    "ORM: one row read, changed and committed": commit,
}


def warm() -> None:
    """Let the engines ask what they ask the first time."""
    read()
    read_in_transaction()


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer one request."""
    try:
        {"/read": read, "/write": write}[environ["PATH_INFO"]]()
        status = "200 OK"
    except sa.exc.SQLAlchemyError as error:
        environ["wsgi.errors"].write(f"{error}\n")
        status = "503 Service Unavailable"
    start_response(status, [("Content-Length", "0")])
    return []

"""SQLAlchemy over the groups of this pool: an engine's pool is a group.

    engine = sqlalchemy.create_engine("postgresql+pgdbpool://write?config=pgdbpool.yaml")

    with engine.begin() as conn:
        conn.execute(text("UPDATE accounts SET balance = 0"))

It needs the extra `sqlalchemy`.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.dialects import registry

from ._dialect import PgDbPoolDialect
from ._pool import GroupPool
from ._routing import RoutingSession

__all__ = ["GroupPool", "PgDbPoolDialect", "RoutingSession", "engine"]

registry.register("postgresql.pgdbpool", "pgdbpool.contrib.sqlalchemy", "PgDbPoolDialect")


def engine(group: str, **options: Any) -> Engine:
    """Return an engine whose pool is the group.

    :param options: arguments of `sqlalchemy.create_engine`, except those that the group decides.
    :raises sqlalchemy.exc.ArgumentError: an option contradicts the group; names the key to set instead.
    """
    return create_engine(URL.create("postgresql+pgdbpool", host=group), **options)

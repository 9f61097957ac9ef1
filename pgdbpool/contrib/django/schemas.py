"""A schema for each tenant: the `search_path` of each transaction, or of each statement outside one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from django.db.transaction import TransactionManagementError
from psycopg.pq import TransactionStatus

_current: ContextVar[str | None] = ContextVar("pgdbpool_schema", default=None)
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,62}")


@contextmanager
def schema(name: str | None) -> Iterator[None]:
    """Make a schema the current one inside the `with` block, before ``public``; None for the session's own.

    :raises ValueError: the name is longer than 63 characters, begins with a digit, or has a character that is
        not a lower-case letter, a digit or an underscore.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a schema: use small letters, digits and _")
    token = _current.set(name)
    try:
        yield
    finally:
        _current.reset(token)


def follow(connection: Any) -> None:
    """Give the next unit of work the current schema.

    :raises django.db.transaction.TransactionManagementError: a transaction is open that has another one.
    """
    name = _current.get()
    wanted = None if name is None else {"search_path": f"{name}, public"}
    if wanted == connection.stay.own_settings:
        return
    # A lost connection has no transaction, and goes on with another session.
    if connection.pgconn.transaction_status not in (TransactionStatus.IDLE, TransactionStatus.UNKNOWN):
        raise TransactionManagementError(
            f"the open transaction keeps its schema: end it before {name!r} becomes the current one"
        )
    connection.stay.own_settings = wanted

"""A session that reads from one engine and writes to another."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, TextClause, event, exc
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.sql import visitors
from sqlalchemy.sql.expression import SelectBase

_READS = re.compile(r"\s*(select|values|table|show)\b", re.IGNORECASE)
_MORE = re.compile(r"\bfor\s+(no\s+key\s+)?(update|share|key\s+share)\b|\binto\b|;\s*\S", re.IGNORECASE)
"""A part that locks or makes a table, or another statement, in a text that begins as a read."""


class RoutingSession(Session):
    """A session whose reads go to `reading` until it writes, and all else to `writing`.

    A flush, INSERT, UPDATE, DELETE, DDL, a SELECT that locks rows, and text that is not plainly a SELECT are
    writes. From the first of them on everything goes to `writing`, until the transaction ends. A function
    that writes, called in a SELECT, is not seen: put it into `with session.primary():`. Inside
    `begin_nested()` everything goes to `writing`, which has the savepoint; so it does with `twophase=True`,
    since a standby cannot prepare a transaction. A class or table of `binds` keeps its own engine.
    """

    def __init__(self, *arguments: Any, writing: Engine, reading: Engine, **options: Any) -> None:
        if not arguments and options.get("bind") is None:
            options["bind"] = writing
        super().__init__(*arguments, **options)
        self._writing, self._reading = writing, reading
        self._forced: Engine | None = None
        self._wrote = False

    @contextmanager
    def primary(self) -> Iterator[None]:
        """Send everything to `writing` inside the `with` block."""
        with self._through(self._writing):
            yield

    @contextmanager
    def replica(self) -> Iterator[None]:
        """Send all that reads to `reading` inside the `with` block, even after a write.

        :raises sqlalchemy.exc.InvalidRequestError: the session's transactions are two-phase.
        """
        if self.twophase:
            raise exc.InvalidRequestError(
                "replica() has no two-phase transactions, which a standby can't prepare: read in a session "
                "without twophase=True"
            )
        with self._through(self._reading):
            yield

    @contextmanager
    def _through(self, engine: Engine) -> Iterator[None]:
        before, self._forced = self._forced, engine
        try:
            yield
        finally:
            self._forced = before

    def get_bind(
        self, mapper: Any = None, *, clause: Any = None, bind: Any = None, **options: Any
    ) -> Engine | Connection:
        """Return the engine for a statement."""
        bound = super().get_bind(mapper, clause=clause, bind=bind, **options)
        if bind is not None or bound is not self._writing:
            return bound
        if self._flushing or (clause is not None and writes(clause)):
            self._wrote = True
            return self._writing
        if self._forced is not None:
            return self._forced
        stays = self._wrote or self.twophase or clause is None or self.in_nested_transaction()
        return self._writing if stays else self._reading


@event.listens_for(RoutingSession, "after_transaction_end")
def _read_again(session: RoutingSession, transaction: SessionTransaction) -> None:
    """Let the next transaction begin with reads."""
    if transaction.parent is None:
        session._wrote = False


def writes(clause: Any) -> bool:
    """Return whether a statement may do more than read."""
    if isinstance(clause, TextClause):
        text = clause.text
        return _READS.match(text) is None or _MORE.search(text) is not None
    if not isinstance(clause, SelectBase) and not getattr(clause, "is_select", False):
        return True
    return any(
        getattr(part, "is_dml", False)
        or getattr(part, "_for_update_arg", None) is not None
        or (isinstance(part, TextClause) and part is not clause and _MORE.search(part.text) is not None)
        for part in visitors.iterate(clause)
    )

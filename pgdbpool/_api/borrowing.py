"""Connections without a `with` block: `Connection.getconn` and `Connection.putconn`."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

from .._request import correlation as tracing
from .._request import freshness
from .._session import describe
from .._session.block import is_high
from .._session.stay import GIVEN_BACK, KeptConnection, Returned, give_back, keep
from .._session.stay_block import Stay
from .._util.token import Token
from ..errors import BlockClosedError

if TYPE_CHECKING:
    from types import FrameType

    from .._lending.group import Group


class Borrowing:
    """The methods of `Connection` that take a connection out of its pool and give it back."""

    if TYPE_CHECKING:

        @classmethod
        def group(cls, name: str) -> Group: ...

    @classmethod
    def getconn(
        cls,
        group: str,
        *,
        tenant: Any = None,
        tenant_override: bool = False,
        settings: Mapping[str, Any] | None = None,
        timeout: float | None = None,
        priority: Literal["high", "normal"] = "normal",
        correlation_id: Any = None,
        after: Token | str | None = None,
        skip: Collection[str] = (),
    ) -> KeptConnection:
        """Take a connection out of the group's pool, until it is given back with `putconn` or its `close`.

        It is a psycopg connection. In a manual-commit group its first statement begins a transaction, and
        `commit` and `rollback` end it; each transaction, or each statement in autocommit mode, takes the
        tenant that is current when it begins. As a `with` block it commits or rolls back, and is given back.
        A `Handler` is safer wherever a `with` block will do: its connection comes back by itself. While no
        server of the group is up, as in a restart, the call waits for one, as psycopg_pool's `getconn` does.

        The parameters are those of a `Handler`.

        :param tenant: the tenant of all transactions, instead of the current one of each.
        :param skip: top-level packages that the call may come through: their lines are not the caller's.
        :param timeout: seconds to wait for a connection, and for a server that is up.
        :raises PoolTimeout: no connection became free in time.
        :raises DBOfflineError: no server was up in time. It also raises the errors of entering a `Handler`.
        """
        found = cls.group(group)
        frame = _caller(sys._getframe(1), ("pgdbpool", "contextlib", *skip))
        place = frame.f_code, frame.f_lasti
        stay = Stay(found, found.manual, place, tenant, tenant_override, settings, timeout)
        stay.high = is_high(priority)
        given = None if correlation_id is None else tracing.clean(correlation_id)
        if tracing.in_use:
            describe.begin(stay, given, frame if found.config.leak_stack else None)
        if after is not None:
            stay.seen = freshness.Seen(after)
        if found.limiter is not None:
            found.admit(stay)
        try:
            return keep(stay.take())
        except BaseException:  # interrupted: the caller has nothing that it could give back
            for conn, block in found.held():
                if block is stay:
                    found.discard(conn, "interrupted")
            raise

    @classmethod
    def putconn(cls, conn: Any) -> None:
        """Give a connection back that `getconn` returned; an open transaction is rolled back.

        :raises BlockClosedError: it was given back before.
        :raises ValueError: it is not one that `getconn` returned.
        """
        if isinstance(conn, Returned):
            raise BlockClosedError(GIVEN_BACK)
        if not isinstance(conn, KeptConnection):
            raise ValueError(
                f"{conn!r} was not taken with Connection.getconn(group): close it where it came from"
            )
        give_back(conn)


_passed: dict[tuple[str, ...], set[str | None]] = {}
"""The modules known to be of the packages that are skipped: a framework is dozens of frames deep."""


def _caller(frame: FrameType, skip: tuple[str, ...]) -> FrameType:
    """Return the nearest frame outside the packages; the given one if every frame is inside them."""
    at: FrameType | None = frame
    passed = _passed.setdefault(skip, set())
    while at is not None:
        if (name := at.f_globals.get("__name__")) not in passed:
            if str(name).partition(".")[0] not in skip:
                return at
            passed.add(name)
        at = at.f_back
    return frame

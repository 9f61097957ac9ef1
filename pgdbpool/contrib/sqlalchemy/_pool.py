"""The pool of an engine: a group, whose queue, ping and recycling are the only ones."""

from __future__ import annotations

from typing import Any

from sqlalchemy import exc, pool

from ..._api.connection import Connection

UNSET: Any = object()

_INSTEAD = {
    "pool_size": "`min_size` and `connection_count`",
    "max_overflow": "`connection_count`, which is pool_size + max_overflow",
    "pool_timeout": "`timeout`",
    "pool_use_lifo": "`max_idle` (idle connections take turns, and surplus ones are closed)",
    "pool_recycle": "`max_lifetime`",
    "pool_pre_ping": "nothing (dead connections are found without a round trip) or `ping_after`",
}


class GroupPool(pool.NullPool):
    """A pool to SQLAlchemy; each connection comes from the group and goes back to it.

    So `connect` is an event of each checkout: the session is as clean as a new one.
    """

    def __init__(
        self,
        creator: Any,
        # By place, since SQLAlchemy looks for them there.
        pool_size: Any = UNSET,
        max_overflow: Any = UNSET,
        timeout: Any = UNSET,
        use_lifo: Any = UNSET,
        recycle: Any = -1,
        pre_ping: Any = False,
        **options: Any,
    ) -> None:
        given = {
            "pool_size": pool_size is not UNSET,
            "max_overflow": max_overflow is not UNSET,
            "pool_timeout": timeout is not UNSET,
            "pool_use_lifo": use_lifo is not UNSET and bool(use_lifo),
            "pool_recycle": recycle != -1,
            "pool_pre_ping": bool(pre_ping),
        }
        if wrong := [name for name, there in given.items() if there]:
            instead = "; ".join(f"remove {name}, and set {_INSTEAD[name]} in the group" for name in wrong)
            raise exc.ArgumentError(f"the engine's pool is a group of pgdbpool: {instead}")
        super().__init__(creator, **options)
        self.group: str | None = None
        """The group's name."""

    def recreate(self) -> GroupPool:
        """Return a pool like this one."""
        made = type(self)(
            self._creator,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            reset_on_return=self._reset_on_return,
            _dispatch=self.dispatch,
            dialect=self._dialect,
        )
        made.group = self.group
        return made

    def dispose(self) -> None:
        """Replace the group's connections: idle ones now, those in use as they are given back."""
        if self.group is not None and not Connection.is_closing():
            Connection.expire(self.group)

    # As a QueuePool's.

    def status(self) -> str:
        """Return the group's counts, in words."""
        if self.group is None:
            return "GroupPool"
        now = Connection.status().groups[self.group]
        return (
            f"GroupPool {self.group!r}: {now.in_use} in use, {now.idle} idle, {now.waiting} waiting, "
            f"of {now.max_size} at most"
        )

    def size(self) -> int:
        """Return how many connections the group may have."""
        return Connection.get_max_pool_size(str(self.group))

    def checkedout(self) -> int:
        """Return how many connections of the group are in use, by any code."""
        return Connection.status().groups[str(self.group)].in_use

    def checkedin(self) -> int:
        """Return how many connections of the group are idle."""
        return Connection.status().groups[str(self.group)].idle

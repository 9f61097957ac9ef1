"""The time that a connection is out of its pool without a `with` block: a block that begins again.

Each of its units of work takes the tenant that is current when it begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import monotonic, sleep
from types import CodeType
from typing import Any, Protocol
from weakref import ref

from .. import errors
from .._request import deadline as deadlines
from .._request import freshness
from .._request.freshness import Seen
from .._request.tenant import current_tenant
from .block import UNBOUND, Binding, Block
from .commands import NOTHING, Command
from .connection import PooledConnection

_OTHER_TENANT = (
    "group {!r}: the open transaction has another tenant than the current one, and keeps it; commit() or "
    "rollback() before the tenant changes"
)

_AT_BEGIN: Any = vars(Block)["at_begin"]

ASK_EVERY = 0.02
"""Seconds between two checkouts while no server is up."""


class Lender(Protocol):
    """The operations of a group that a connection outside its pool uses."""

    name: str
    config: Any
    endpoints: Any
    look_sooner: Callable[[Any], None]

    @property
    def on_drop(self) -> Callable[[ref[Any]], None]:
        """The callback of a reference to the owner of a connection."""

    def bind(self, tenant: Any, override: bool, settings: Mapping[str, Any] | None) -> Binding:
        """Return the binding of a unit of work."""

    def checkout(self, block: Block, timeout: float | None = None) -> PooledConnection:
        """Lend a working connection."""

    def discard(self, conn: PooledConnection, reason: str) -> None:
        """Take back a connection that must not be used again."""

    def checkin(self, conn: PooledConnection) -> None:
        """Take a connection back."""

    def loosen(self, conn: PooledConnection) -> None:
        """Let a connection in use be garbage-collected."""

    def tie(self, conn: PooledConnection) -> None:
        """Refer to such a connection again."""

    def take_over(self, conn: PooledConnection, heir: PooledConnection) -> None:
        """Note that a connection in use continues in another object."""

    def note_retry(self, block: Block | None, error: errors.Error) -> None:
        """Count a statement that is sent again."""

    def prefer_fresh(self, seen: Seen) -> None:
        """Let the next block have an idle connection, if any, to a server known to have these writes."""

    def fresh(self, block: Block, conn: PooledConnection, timeout: float | None) -> PooledConnection:
        """Return a connection to a server that has the writes the block must see."""


class Stay(Block):
    """The time that a connection is out of its pool, from `getconn` to `putconn`."""

    __slots__ = ("group", "loose", "override", "own_settings", "tenant", "timeout")

    def __init__(
        self,
        group: Lender,
        manual: bool,
        place: tuple[CodeType, int],
        tenant: Any,
        override: bool,
        settings: Mapping[str, Any] | None,
        timeout: float | None,
    ) -> None:
        self.group, self.tenant, self.override = group, tenant, override
        self.own_settings, self.timeout, self.loose = settings, timeout, False
        try:
            binding = self.bind()
        except errors.TenantRequiredError:
            binding = UNBOUND  # the first unit of work has to have one
        super().__init__(manual, binding, place)

    def bind(self) -> Binding:
        """Return the binding of a unit of work that begins now."""
        return self.group.bind(self.tenant, self.override, self.own_settings)

    @property
    def at_begin(self) -> tuple[Command, ...]:
        """The commands before the first statement of a unit of work, with the guards that are due."""
        commands: tuple[Command, ...] = _AT_BEGIN.__get__(self)
        if freshness.in_use and self.conn is not None and (seen := self.sees()) is not None:
            commands = self.conn.guarded(self, seen, commands)
        return commands

    @at_begin.setter
    def at_begin(self, commands: tuple[Command, ...]) -> None:
        _AT_BEGIN.__set__(self, commands)

    def sees(self) -> Seen | None:
        """Return the current record of writes, which its reads must see and which notes its own."""
        return getattr(self, "seen", None) or freshness.current_seen()

    def guards(self) -> tuple[Command, ...]:
        """Return the commands that must precede its next unit of work, so that it reads nothing stale."""
        seen = self.sees()
        return NOTHING if seen is None or self.conn is None else self.conn.guards_for(seen)

    def take(self) -> PooledConnection:
        """Lend a connection; while no server of the group is up, wait for one, within the timeout.

        :raises DBOfflineError: none was up in time.
        """
        timeout = self.group.config.timeout if self.timeout is None else self.timeout
        if freshness.in_use and (seen := self.sees()) is not None:
            self.group.prefer_fresh(seen)
        left = deadlines.time_left() if deadlines.in_use else None
        until = monotonic() + (timeout if left is None else min(timeout, left))
        while True:
            try:
                return self.group.checkout(self, timeout)
            except errors.DBOfflineError:
                if (timeout := until - monotonic()) <= ASK_EVERY:
                    raise
            self.group.look_sooner(self.group.endpoints)
            sleep(ASK_EVERY)

    def check_tenant(self) -> None:
        """Refuse to go on in a transaction whose tenant is not the current one.

        :raises TenantConflictError: another tenant became the current one since the transaction began.
        """
        if self.tenant is not None or current_tenant() is None:
            return
        if self.bind().settings != self.binding.settings:
            raise errors.TenantConflictError(_OTHER_TENANT.format(self.group.name))

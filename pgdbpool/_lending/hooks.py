"""Calls the hooks of the application, and handles those that fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .._session.commands import IDLE
from .._util import log_events as events
from ..errors import HookError, one_line

if TYPE_CHECKING:
    from .._config.model import GroupConfig
    from .._session.connection import PooledConnection


class Hooks:
    """The hooks of a group; each attribute is None if no hook is set, so that it costs one test.

    They are called without holding a lock of the group, in any thread.
    """

    def __init__(self, config: GroupConfig) -> None:
        self._config = config
        self._failed: dict[str, str] = {}
        """The last failure of each hook: a repetition is logged at a lower level."""
        self.configure = self._configure if config.configure is not None else None
        self.on_checkout = self._on_checkout if config.on_checkout is not None else None
        self.at_checkin = self._at_checkin if config.on_checkin is not None or config.max_uses else None
        self.on_discard = self._on_discard if config.on_discard is not None else None
        self.on_failover = self._on_failover if config.on_failover is not None else None

    def _configure(self, conn: PooledConnection) -> None:
        """Have the application set up a new connection; raises `HookError` if that failed."""
        self._call("configure", conn)
        if conn.pgconn.transaction_status != IDLE:
            raise HookError(f"configure of group {self._config.name!r} left a transaction open")
        left, wanted = conn.autocommit, self._config.autocommit
        if left is not wanted:
            raise HookError(
                f"configure of group {self._config.name!r} left autocommit = {left}, and the group has "
                f"`autocommit: {str(wanted).lower()}`: put it back, or change the group's key"
            )
        conn.stay_in_autocommit()

    def _on_checkout(self, conn: PooledConnection) -> None:
        """Call the hook for a checkout; raises `HookError` if it failed."""
        conn.mark(attributes=True)  # changes that the hook makes belong to the block, and end with it
        self._call("on_checkout", conn)

    def _at_checkin(self, conn: PooledConnection, reason: str | None) -> str | None:
        """Call the hook for a checkin; return the reason to close the connection, if any."""
        times = conn.count_block()
        if self._config.on_checkin is not None and not self._tell("on_checkin", conn):
            return reason or "on_checkin failed"
        if 0 < self._config.max_uses <= times:
            return reason or "used up"
        return reason

    def _on_discard(self, conn: PooledConnection, reason: str) -> None:
        """Call the hook before the connection is closed."""
        self._tell("on_discard", conn, reason)

    def _on_failover(self, old: str, new: str) -> None:
        """Call the hook after another server has taken over the writes of the group."""
        self._tell("on_failover", old, new)

    def _tell(self, name: str, *args: Any) -> bool:
        """Call a hook whose failure is only logged; return whether it worked."""
        try:
            self._call(name, *args)
        except HookError as error:
            text = str(error)
            group, cause = self._config.name, error.__cause__
            if self._failed.get(name) == text:
                events.HOOK_FAILED_AGAIN("%s", text, exc_info=cause, group=group, hook=name)
            else:
                events.HOOK_FAILED("%s", text, exc_info=cause, group=group, hook=name)
            self._failed[name] = text
            return False
        return True

    def _call(self, name: str, *args: Any) -> None:
        hook: Callable[..., object] = getattr(self._config, name)
        try:
            hook(*args)
        except Exception as error:
            what = f"{name} of group {self._config.name!r} raised {type(error).__name__}: {one_line(error)}"
            raise HookError(what) from error

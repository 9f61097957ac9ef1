"""`Connection`: the process's one piece of global state, as class methods."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, Literal

from .._process import fork
from .._process.pools import Pools
from .._process.reload import ReloadMethods
from .._process.unknown import unknown_endpoint, unknown_group
from .._request import freshness
from .._request.deadline import deadline
from .._servers.endpoint import has_everywhere
from .._servers.positions import written
from .._session import block as blocks
from .._session.block import UNBOUND, Block
from .._util import greenlets
from .._util import log_events as events
from .._util.token import Token
from ..errors import ConfigError, NotInitializedError, TargetUnavailableError
from .borrowing import Borrowing
from .one_statement import OneShots

if TYPE_CHECKING:
    from .._lending.group import Group
    from .._process.signals import SignalHandlers
    from .._servers.endpoint import Endpoint
    from ..rls import Audit
    from ..stats import Status

REFUSE_WITHIN = 1.0
"""Seconds that `close` waits for a configuration change to finish before it refuses new blocks anyway."""


class Connection(OneShots, Borrowing, ReloadMethods):
    """The pools of the process; all methods are class methods."""

    _pools: Pools | None = None
    _abandoned: list[Pools] = []
    """A parent's, kept so that nothing of them is collected, and so touched, in a child."""
    _lock = threading.RLock()
    """Re-entrant, since a signal handler may close pools whose opening it interrupts."""
    _all: weakref.WeakSet[Pools] = weakref.WeakSet()
    _closed = False
    _closed_by = ""
    _handlers: SignalHandlers | None = None

    deadline = staticmethod(deadline)

    def __new__(cls, *args: object, **kwargs: object) -> Connection:
        """Refuse: the process has one set of pools, which the class itself stands for.

        :raises TypeError: always.
        """
        raise TypeError(
            "Connection is not instantiated: call Connection.init(config) once, then open blocks with "
            "`with Handler(group) as db:`; Connection.getconn(group) returns a connection"
        )

    @classmethod
    def init(
        cls,
        config: Mapping[str, Any] | str | os.PathLike[str] | IO[str] | None = None,
        *,
        wait: bool | Literal["all"] = True,
    ) -> None:
        """Read the configuration and open the pools, in place of those of an earlier call.

        :param config: a mapping, the path of a YAML file or an open one, or None for the environment.
        :param wait: True opens `min_size` connections of each group, one at least, before returning. A group
            whose servers are all away is a warning in the log: its blocks raise `DBOfflineError` until one is
            there. ``"all"`` raises that error here. False opens nothing until the first block needs it.
        :raises ConfigError: everything that is wrong with the configuration, before anything is opened.
        :raises DBConnectionError: a server is up and refuses a group because of the configuration (a wrong
            password, an unknown database, a certificate that is not trusted), and the group has no other. The
            error has each endpoint's own reason. One endpoint of several is a warning.
        :raises ThreadingModelError: gevent has patched the process too late, or in part.
        :raises ValueError: `wait` is another value.
        """
        if wait not in (True, False, "all"):
            raise ValueError(f"wait={wait!r} is none of True, False and 'all'")
        from .._config.load import load  # a quarter of what there is to import, and this alone needs it

        greenlets.check()
        fork.notice()
        pools = Pools(load(config))
        pools.owner = cls
        _warn_of_driver()
        cls._all.add(pools)
        if wait:
            try:
                pools.open(needed=wait == "all")
            except BaseException:
                pools.close(1.0)
                raise
        with cls._lock:
            previous, cls._pools = cls._pools, pools
            cls._closed = False
        if previous is not None:
            previous.close(5.0)

    @classmethod
    def close(cls, timeout: float = 5.0) -> None:
        """Refuse new blocks, wait for those that are open, and close all pools.

        A block that is still open after the timeout finds its connection lost, as after `terminate`. The
        calling thread's own blocks are not waited for: their connections are closed as they end.

        :param timeout: seconds to wait for blocks.
        """
        cls._close(timeout, "Connection.close()")

    @classmethod
    def _close(cls, timeout: float, by: str) -> None:
        pools = cls._refuse(by)
        if pools is not None:
            me = threading.get_ident()
            pools.drain(timeout, me)
            pools.terminate(by, me)

    @classmethod
    def terminate(cls) -> None:
        """Close all pools within about a second: running statements are cancelled, their blocks fail."""
        cls._terminate("Connection.terminate()")

    @classmethod
    def _terminate(cls, by: str) -> None:
        cls._refuse(by)
        for pools in list(cls._all):  # also those that a `close` waits for, or an `init` has replaced
            pools.terminate(by)

    @classmethod
    def is_closing(cls) -> bool:
        """Return whether new blocks are refused since `close`, `terminate` or a signal ended the pools."""
        return cls._closed

    @classmethod
    def install_signal_handlers(cls, *signals: int, timeout: float = 5.0) -> None:
        """Make signals, SIGTERM and SIGINT if none are named, end the pools before their old handlers run.

        From the first signal on new blocks are refused, and those that are open have `timeout` seconds to
        end. Then the pools are closed and the earlier handler is called, or the process ends if there
        was none.
        A second signal ends the wait. For processes of your own: servers have hooks, see
        `pgdbpool.contrib.gunicorn`.

        :param timeout: seconds to wait for blocks.
        :raises ThreadingModelError: this is not the main thread.
        """
        from .._process.signals import SignalHandlers  # nothing but this needs it

        if cls._handlers is not None:
            cls._handlers.uninstall()
        cls._handlers = SignalHandlers(cls._refuse, cls._terminate, timeout)
        cls._handlers.install(signals or (signal.SIGTERM, signal.SIGINT))

    @classmethod
    def _refuse(cls, by: str) -> Pools | None:
        fork.notice()
        # With a bound: the thread that holds the lock may wait for the code that a signal handler interrupts.
        alone = cls._lock.acquire(blocking=False) or (
            not greenlets.in_hub() and cls._lock.acquire(timeout=REFUSE_WITHIN)
        )
        try:
            pools, cls._pools, cls._closed, cls._closed_by = cls._pools, None, True, by
        finally:
            if alone:
                cls._lock.release()
        return pools

    @classmethod
    def reset(cls) -> None:
        """Forget everything, as before the first `init`: for tests."""
        cls.close(timeout=1.0)
        cls._abandoned.clear()
        cls._closed = False
        if cls._handlers is not None:
            cls._handlers.uninstall()
            cls._handlers = None

    @classmethod
    @fork.noticed
    def group(cls, name: str) -> Group:
        """Return the group of that name.

        :raises UnconfiguredGroupError: there is no such group; the error lists the groups.
        :raises NotInitializedError: `init` was not called.
        """
        pools = cls._pools
        if pools is None:
            raise cls._refusal()
        try:
            return pools.groups[name]
        except (KeyError, TypeError):
            raise unknown_group(name, pools.groups) from None

    @classmethod
    def status(cls) -> Status:
        """Return a frozen snapshot of all groups and endpoints.

        :raises NotInitializedError: `init` was not called.
        """
        return cls._current().status()

    @classmethod
    def runtime_dir(cls) -> str | None:
        """Return the directory in which the processes publish their status; None if they do not.

        :raises NotInitializedError: `init` was not called.
        """
        return cls._current().config.runtime_dir

    @classmethod
    def health(cls, timeout: float = 2.0) -> dict[str, Any]:
        """Ask every server whether it answers, and report whether each group can be served, as for JSON.

        `status` is `healthy`; or `degraded` if something is down but every group is served; or
        `unhealthy` if a group is not. :doc:`guide/health` has all fields. Servers are asked at the same
        time, over an idle connection of the pool, or a new one if none is idle.

        :param timeout: seconds for all of it; a server that has not answered by then counts as down.
        :raises NotInitializedError: `init` was not called, or the pools are closed.
        """
        from .._process.health import examine  # nothing but this needs it

        pools = cls._current()
        return examine(pools.groups, pools.endpoints, timeout)

    @classmethod
    def audit_rls(
        cls, group: str, tables: Sequence[str] | None = None, *, ignore: Iterable[str] = ()
    ) -> Audit:
        """Look for ways in which the group's role gets at rows of another tenant; see `pgdbpool.rls`.

        It uses a separate connection, since a session that has had a tenant shows less.

        :param tables: names of tables, or None for all that the role has privileges on.
        :param ignore: findings to leave out, by `code` or `code:subject`, with `*`.
        :raises ConfigError: the group has no tenant setting, or a table does not exist.
        :raises DBConnectionError: no endpoint is up.
        :raises psycopg.Error: the server could not be asked.
        """
        from ..rls import audit  # nothing but this needs it

        found = cls.group(group)
        if found.config.tenant is None:
            raise ConfigError(f"group {group!r} has no tenant setting: configure `tenant` to audit it")
        role = {name.lower(): value for name, value in found.config.settings.items()}.get("role")
        with found.connect_apart() as conn:
            return audit(conn, list(found.config.tenant.settings), tables, role, ignore=ignore)

    @classmethod
    def token(cls, group: str) -> Token:
        """Return where the writes of the group's servers end now, those of others included.

        It takes a round trip; a block's own token takes none, see `Handler.token`.

        :raises TargetUnavailableError: the group's connection is to a standby, which has no writes: ask
            a group whose target is `primary` or `read-write`.
        """
        found, caller = cls.group(group), sys._getframe(1)
        conn = found.checkout(Block(False, UNBOUND, (caller.f_code, caller.f_lasti)))
        try:
            facts = conn.ask_facts()
        finally:
            found.checkin(conn)
        position = None if facts is None else written(facts)
        if position is None:
            raise TargetUnavailableError(
                f"group {group!r}: its server does not say where writes end; it is "
                f"{facts or 'silent about its write-ahead log'}: ask a group whose target is read-write",
                group=group,
            )
        return Token([position])

    @classmethod
    def is_everywhere(cls, token: Token) -> bool:
        """Return whether each standby of the pools is known to have what the token stands for.

        No server is asked: what reads have found out counts.
        """
        return cls._pools is not None and has_everywhere(token.positions, cls._pools.endpoints.values())

    @classmethod
    def drain(cls, label: str) -> None:
        """Take a server out of use in this process: no block gets a connection to it from now on.

        Its idle connections are closed at once, those in use when their blocks end.

        :param label: the endpoint's label, as `status()` has it.
        :raises UnknownEndpointError: no endpoint has that label; the error lists the labels.
        """
        cls._endpoint(label).drain()

    @classmethod
    def undrain(cls, label: str) -> None:
        """Put a drained server back into use; the groups even out as connections come back.

        :raises UnknownEndpointError: no endpoint has that label; the error lists the labels.
        """
        cls._endpoint(label).undrain()

    @classmethod
    def pause(cls, group: str, seconds: float = 60.0) -> None:
        """Hold new blocks of a group back in this process, each within its own `timeout`, until `resume`.

        A block that a thread enters inside another one goes on. `pgdbpool pause` does it in all processes.

        :param seconds: after which the pause ends by itself.
        :raises UnconfiguredGroupError: there is no such group; the error lists the groups.
        """
        cls._current().pause([cls.group(group)], "Connection.pause()", seconds)

    @classmethod
    def resume(cls, group: str) -> None:
        """Let the blocks of a paused group go on.

        :raises UnconfiguredGroupError: there is no such group; the error lists the groups.
        """
        cls._current().resume([cls.group(group)])

    @classmethod
    def _endpoint(cls, label: str) -> Endpoint:
        endpoints = cls._current().endpoints
        try:
            return endpoints[label]
        except (KeyError, TypeError):
            raise unknown_endpoint(label, endpoints) from None

    @classmethod
    def get_threading_model(cls) -> str:
        """Return `threaded` or `non-threaded` (1.x)."""
        return cls._current().config.type

    @classmethod
    def get_max_pool_size(cls, group: str) -> int:
        """Return the group's `connection_count` (1.x)."""
        return cls.group(group).config.connection_count

    @classmethod
    def _current(cls) -> Pools:
        fork.notice()
        if cls._pools is None:
            raise NotInitializedError("call pgdbpool.Connection.init(config) first")
        return cls._pools

    @classmethod
    def _is_open(cls) -> bool:
        """Return whether the pools are open, for integrations that open them if nobody did.

        :raises NotInitializedError: `close`, `terminate` or a signal ended them: nothing is to open others.
        """
        try:
            cls._current()
        except NotInitializedError:
            if cls.is_closing():
                raise
            return False
        return True

    @classmethod
    def _refusal(cls) -> NotInitializedError:
        """Return the error for a block that may not begin."""
        if cls._handlers is not None:
            cls._handlers.wait()
        if cls._closed:
            return NotInitializedError(
                f"the pools were closed by {cls._closed_by}: no block can begin before the next init"
            )
        return NotInitializedError("call pgdbpool.Connection.init(config) before the first Handler")

    @classmethod
    def _begin_anew(cls) -> None:
        """In a forked child, replace everything of the parent's by pools that open on first use."""
        # The parent's connections, locks and threads are not ours: nothing of them may be closed, written to
        # or waited for.
        cls._lock = threading.RLock()
        blocks.forked()
        freshness.forked()
        if cls._handlers is not None:
            cls._handlers.forked()
        for old in list(cls._all):  # including replaced or closed pools, which blocks may still use
            cls._abandoned.append(old)
            old.abandon()
        cls._all = weakref.WeakSet()
        if cls._pools is not None:
            cls._pools = cls._pools.renewed()
            cls._all.add(cls._pools)  # for a child of this child

    @classmethod
    def _at_exit(cls) -> None:
        # The end of the process closes every connection. To close them here would only disturb
        # daemon threads that are still at work.
        if cls._pools is not None:
            cls._pools.end_with_process()


def _warn_of_driver() -> None:
    from .._servers.driver import SLOW, driver  # no block needs it

    if (loaded := driver()).fell_back:
        events.PROCESS_SLOW_DRIVER("%s: %s", loaded, SLOW, reason=SLOW)


fork.in_child(Connection._begin_anew)
atexit.register(Connection._at_exit)

"""A set of pools as class methods, and `Connection`, which is the default one of the process."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from time import monotonic
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias

from .._process import fork
from .._process.pools import Pools, every_pools, forget_parents
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

Source: TypeAlias = "Mapping[str, Any] | str | os.PathLike[str] | IO[str] | None"
"""The source of a configuration."""

REFUSE_WITHIN = 1.0
"""Seconds that `close` waits for a configuration change to finish before it refuses new blocks anyway."""


open_sets: dict[str, type[PoolSet]] = {}
"""The sets of the process by name, without the closed ones; the default set is always there."""


class PoolSet(OneShots, Borrowing, ReloadMethods):
    """A set of pools; all methods are class methods, and the state is that of the class.

    `Connection` is one. Each `Pools` object has its own class, so that the same methods serve it.
    """

    set_name: str
    _pools: Pools | None
    _lock: threading.RLock
    """Re-entrant, since a signal handler may close pools whose opening it interrupts."""
    _closed: bool
    _closed_by: str
    _unopened: str
    """The advice for a set that was not opened."""
    _until: str
    """The event until which no block can begin in a closed set."""
    _anew: str
    """The advice for a configuration to which a running set cannot change."""

    # Shared by the whole process.
    _abandoned: list[Pools] = []
    """The parent's pools, kept in a child so that nothing of them is collected, and so touched."""
    _handlers: SignalHandlers | None = None

    deadline = staticmethod(deadline)

    @classmethod
    def _open(cls, config: Source, wait: bool | Literal["all"]) -> None:
        if wait not in (True, False, "all"):
            raise ValueError(f"wait={wait!r} is none of True, False and 'all'")
        from .._config.load import load  # a quarter of all imports, and only this method needs it

        greenlets.check()
        fork.notice()
        pools = Pools(load(config), cls)
        _warn_of_driver()
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
            previous.retire()
            previous.close(5.0)

    @classmethod
    def close(cls, timeout: float = 5.0) -> None:
        """Refuse new blocks, wait for those that are open, and close all pools.

        A block that is still open after the timeout finds its connection lost, as after `terminate`. The
        calling thread's own blocks are not waited for: their connections are closed as they end.

        :param timeout: seconds to wait for blocks.
        """
        cls._close(timeout, f"{cls.__name__}.close()")

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
        cls._terminate(f"{cls.__name__}.terminate()")

    @classmethod
    def _terminate(cls, by: str) -> None:
        cls._refuse(by)
        for pools in every_pools():  # also those that a `close` waits for, or an `init` has replaced
            if pools.owner is cls:
                pools.terminate(by)

    @classmethod
    def is_closing(cls) -> bool:
        """Return whether new blocks are refused since `close`, `terminate` or a signal ended the pools."""
        return cls._closed

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
        if pools is not None:
            pools.retire()
        return pools

    @classmethod
    @fork.noticed
    def group(cls, name: str) -> Group:
        """Return the group of that name.

        :raises UnconfiguredGroupError: no such group; the error lists the groups.
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
        """Return the position at which the writes to the group's servers end, other clients' included.

        It takes a round trip; a block's own token takes none, see `Handler.token`.

        :raises TargetUnavailableError: the group's connection is to a standby, which has no writes, or the
            server does not report its position: ask a group whose target is `primary` or `read-write`.
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
        """Return whether each standby of all sets of pools is known to have the token's writes.

        No server is asked: the answer rests on the findings of earlier reads.
        """
        here = [endpoint for pools in open_pools() for endpoint in pools.endpoints.values()]
        return bool(here) and has_everywhere(token.positions, here)

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

        :param seconds: the time after which the pause ends by itself.
        :raises UnconfiguredGroupError: no such group; the error lists the groups.
        """
        cls._current().pause([cls.group(group)], f"{cls.__name__}.pause()", seconds)

    @classmethod
    def resume(cls, group: str) -> None:
        """Let the blocks of a paused group go on.

        :raises UnconfiguredGroupError: no such group; the error lists the groups.
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
    def _current(cls) -> Pools:
        fork.notice()
        if cls._pools is None:
            raise NotInitializedError(f"{cls._unopened} first")
        return cls._pools

    @classmethod
    def _is_open(cls) -> bool:
        """Return whether the pools are open, for integrations that open them if the application did not.

        :raises NotInitializedError: `close`, `terminate` or a signal ended them; none may be opened.
        """
        try:
            cls._current()
        except NotInitializedError:
            if cls.is_closing():
                raise
            return False
        return True

    @classmethod
    def _let_end(cls) -> None:
        """Let a signal that closed the pools end the program, before the main thread is refused a block."""
        if cls._handlers is not None:
            cls._handlers.wait()

    @classmethod
    def _refusal(cls) -> NotInitializedError:
        """Return the error for a block that may not begin."""
        cls._let_end()
        if cls._closed:
            return NotInitializedError(
                f"the pools were closed by {cls._closed_by}: no block can begin {cls._until}"
            )
        return NotInitializedError(f"{cls._unopened} before the first Handler")


def _warn_of_driver() -> None:
    from .._servers.driver import SLOW, driver  # no block needs it

    if (loaded := driver()).fell_back:
        events.PROCESS_SLOW_DRIVER("%s: %s", loaded, SLOW, reason=SLOW)


class Connection(PoolSet):
    """The default pools of the process; all methods are class methods."""

    set_name = ""
    _pools = None
    _lock = threading.RLock()
    _closed, _closed_by = False, ""
    _unopened = "call pgdbpool.Connection.init(config)"
    _until = "before the next init"
    _anew = "call Connection.init instead"

    def __new__(cls, *args: object, **kwargs: object) -> Connection:
        """Refuse: the class itself stands for the default set of pools.

        :raises TypeError: always.
        """
        raise TypeError(
            "Connection is not instantiated: call Connection.init(config) once, then open blocks with "
            "`with Handler(group) as db:`; Connection.getconn(group) returns a connection, and Pools(config) "
            "makes another set of pools"
        )

    @classmethod
    def init(cls, config: Source = None, *, wait: bool | Literal["all"] = True) -> None:
        """Read the configuration and open the pools, in place of those of an earlier call.

        :param config: a mapping, the path of a YAML file or an open one, or None for the environment.
        :param wait: True opens `min_size` connections of each group, one at least, before returning. A group
            whose servers are all away is a warning in the log: its blocks raise `DBOfflineError` until one is
            there. ``"all"`` raises that error here. False opens nothing until the first block needs it.
        :raises ConfigError: with all faults of the configuration, before anything is opened.
        :raises DBConnectionError: a server is up and refuses a group because of the configuration (a wrong
            password, an unknown database, a certificate that is not trusted), and the group has no other. The
            error has each endpoint's own reason. A refusal by one endpoint of several is only a warning.
        :raises ThreadingModelError: gevent has patched the process too late, or in part.
        :raises ValueError: `wait` is another value.
        """
        cls._open(config, wait)

    @classmethod
    def install_signal_handlers(cls, *signals: int, timeout: float = 5.0) -> None:
        """Make signals, SIGTERM and SIGINT if none are named, end all pools before their old handlers run.

        From the first signal on, new blocks are refused, and those that are open have `timeout` seconds to
        end. Then the pools are closed and the earlier handler is called, or the process ends if there
        was none.
        A second signal ends the wait. This is for your own processes; application servers have hooks, see
        `pgdbpool.contrib.gunicorn`.

        :param timeout: seconds to wait for blocks.
        :raises ThreadingModelError: this is not the main thread.
        """
        from .._process.signals import SignalHandlers  # nothing but this needs it

        if PoolSet._handlers is not None:
            PoolSet._handlers.uninstall()
        PoolSet._handlers = SignalHandlers(_refuse_all, terminate_all, timeout)
        PoolSet._handlers.install(signals or (signal.SIGTERM, signal.SIGINT))

    @classmethod
    def reset(cls) -> None:
        """Forget everything, as before the first `init`: for tests."""
        cls.close(timeout=1.0)
        cls._abandoned.clear()
        cls._closed = False
        if PoolSet._handlers is not None:
            PoolSet._handlers.uninstall()
            PoolSet._handlers = None

    @classmethod
    def get_threading_model(cls) -> str:
        """Return `threaded` or `non-threaded` (1.x)."""
        return cls._current().config.type

    @classmethod
    def get_max_pool_size(cls, group: str) -> int:
        """Return the group's `connection_count` (1.x)."""
        return cls.group(group).config.connection_count


open_sets[""] = Connection


def open_pools() -> list[Pools]:
    """Return the pools of the open sets, those of the default one first."""
    fork.notice()
    return [pools for each in list(open_sets.values()) if (pools := each._pools) is not None]


def _refuse_all(by: str) -> list[Pools]:
    """Refuse new blocks of all sets; return the pools that were in use."""
    return [pools for each in list(open_sets.values()) if (pools := each._refuse(by)) is not None]


def terminate_all(by: str) -> None:
    """Close the pools of all sets within about a second, as `terminate` does."""
    _refuse_all(by)
    for pools in every_pools():
        pools.terminate(by)


def close_all(timeout: float, by: str) -> None:
    """Close all sets, as `close` does, within the timeout together."""
    deadline = monotonic() + timeout
    for each in list(open_sets.values()):
        each._close(max(deadline - monotonic(), 0.0), by)


def _begin_anew() -> None:
    """In a forked child, replace all of the parent's pools with pools that open on first use."""
    # The parent's connections, locks and threads are not ours: none of them may be closed, written to
    # or waited for.
    sets = list(open_sets.values())
    for each in sets:
        each._lock = threading.RLock()
    blocks.forked()
    freshness.forked()
    if PoolSet._handlers is not None:
        PoolSet._handlers.forked()
    PoolSet._abandoned.extend(forget_parents())
    for each in sets:
        if each._pools is not None:
            each._pools = each._pools.renewed()


def _at_exit() -> None:
    # The end of the process closes every connection. To close them here would only disturb
    # daemon threads that are still at work.
    for each in list(open_sets.values()):
        if each._pools is not None:
            each._pools.end_with_process()


fork.in_child(_begin_anew)
atexit.register(_at_exit)

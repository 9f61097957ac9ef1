"""The process's one piece of global state: `Connection.init`, `close`, `status`, and the fork guard."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from time import monotonic
from typing import IO, TYPE_CHECKING, Any

import psycopg

from . import rows
from .config import Config
from .deadlines import deadline
from .endpoint import Endpoint
from .errors import ConfigError, NotInitializedError, UnconfiguredGroupError
from .group import Group
from .monitor import Prober
from .probe import StartupProbe
from .sources import load
from .stats import EndpointStatus, Status

if TYPE_CHECKING:
    from .rls import Audit

_ROW_FACTORIES: dict[Any, Any] = {
    "row": rows.row,
    "tuple": psycopg.rows.tuple_row,
    "dict": psycopg.rows.dict_row,
    "namedtuple": psycopg.rows.namedtuple_row,
}


class _Pools:
    """Everything that belongs to one configuration in one process."""

    def __init__(self, config: Config) -> None:
        self.config = config
        lock_free = config.type == "non-threaded"
        self.prober = Prober(threaded=not lock_free)
        self.endpoints = {e.label: Endpoint(e) for e in config.endpoints}
        self.groups = {
            name: Group(
                group,
                [self.endpoints[label] for label in group.endpoints],
                lock_free=lock_free,
                row_factory=_ROW_FACTORIES.get(group.row_factory, group.row_factory),
                probe=self._probe if lock_free else None,
            )
            for name, group in config.groups.items()
        }
        for endpoint in self.endpoints.values():
            endpoint.groups = [g for g in self.groups.values() if endpoint in g.endpoints]
            endpoint.on_down = self._went_down
            endpoint.on_up = self._came_up

    def _probe(self) -> None:
        self.prober.step()

    def _went_down(self, endpoint: Endpoint) -> None:
        for group in endpoint.groups:
            group.drop_idle(endpoint)
        self.prober.watch(endpoint)

    def _came_up(self, endpoint: Endpoint) -> None:
        for group in endpoint.groups:
            group.welcome()

    def open(self) -> None:
        for group in self.groups.values():
            group.open()
        for endpoint in self.endpoints.values():
            # Not needed for `min_size`, so nobody has asked yet whether it is there.
            if endpoint.groups and endpoint.opened == 0 and endpoint.last_error is None:
                probe = StartupProbe(endpoint.config)
                probe.run(endpoint.config.connect_timeout)
                if not probe.accepting:
                    endpoint.mark_down(probe.reason)

    def close(self, timeout: float) -> None:
        self.prober.close()
        for group in self.groups.values():
            group.close(timeout)


class Connection:
    """The pools of the process; all methods are class methods."""

    _pools: _Pools | None = None
    _abandoned: list[_Pools] = []
    """A parent's, kept so that nothing of them is collected, and so touched, in a child."""
    _lock = threading.Lock()
    _all: weakref.WeakSet[_Pools] = weakref.WeakSet()

    deadline = staticmethod(deadline)

    @classmethod
    def init(
        cls,
        config: Mapping[str, Any] | str | os.PathLike[str] | IO[str] | None = None,
        *,
        wait: bool = True,
    ) -> None:
        """Read the configuration and open the pools, in place of those of an earlier call.

        :param config: a mapping, the path of a YAML file or an open one, or None for the environment.
        :param wait: open `min_size` connections of each group, one at least, before returning;
            False opens nothing until the first block needs it. `min_size` is `connection_count`
            where it is left out.
        :raises ConfigError: everything that is wrong with the configuration, before anything is opened.
        :raises DBConnectionError: a group none of whose endpoints can be connected to, with each
            endpoint's own reason, within the connect timeout. One endpoint of several is a warning.
        """
        pools = _Pools(load(config))
        cls._all.add(pools)
        if wait:
            try:
                pools.open()
            except BaseException:
                pools.close(1.0)
                raise
        with cls._lock:
            previous, cls._pools = cls._pools, pools
        if previous is not None:
            previous.close(5.0)

    @classmethod
    def close(cls, timeout: float = 5.0) -> None:
        """Close all pools; connections in use are closed as their blocks end.

        :param timeout: seconds to wait for the pools' threads.
        """
        with cls._lock:
            pools, cls._pools = cls._pools, None
        if pools is not None:
            pools.close(timeout)

    @classmethod
    def reset(cls) -> None:
        """Forget everything, as before the first `init`: for tests."""
        cls.close(timeout=1.0)
        cls._abandoned.clear()

    @classmethod
    def group(cls, name: str) -> Group:
        """Return the group of that name.

        :raises UnconfiguredGroupError: there is none; names those that there are.
        :raises NotInitializedError: `init` was not called.
        """
        pools = cls._pools
        if pools is None:
            raise NotInitializedError("call pgdbpool.Connection.init(config) before the first Handler")
        try:
            return pools.groups[name]
        except (KeyError, TypeError):
            known = ", ".join(repr(group) for group in pools.groups)
            raise UnconfiguredGroupError(f"no group {name!r} is configured; the groups are {known}") from None

    @classmethod
    def status(cls) -> Status:
        """Return a frozen snapshot of all groups and endpoints.

        :raises NotInitializedError: `init` was not called.
        """
        pools = cls._current()
        return Status(
            pid=os.getpid(),
            type=pools.config.type,
            groups={name: group.status() for name, group in pools.groups.items()},
            endpoints={label: _endpoint_status(e) for label, e in pools.endpoints.items()},
        )

    @classmethod
    def audit_rls(
        cls, group: str, tables: Sequence[str] | None = None, *, ignore: Iterable[str] = ()
    ) -> Audit:
        """Look for ways in which the group's role gets at rows of another tenant; see `pgdbpool.rls`.

        It uses a connection of its own, since a session that has had a tenant shows less.

        :param tables: names of tables, or None for all that the role has privileges on.
        :param ignore: findings to leave out, by `code` or `code:subject`, with `*`.
        :raises ConfigError: the group has no tenant setting, or a table does not exist.
        :raises DBConnectionError: no endpoint is up.
        :raises psycopg.Error: the server could not be asked.
        """
        from .rls import audit  # nothing but this needs it

        found = cls.group(group)
        if found.config.tenant is None:
            raise ConfigError(f"group {group!r} has no tenant setting: configure `tenant` to audit it")
        role = {name.lower(): value for name, value in found.config.settings.items()}.get("role")
        with found.connect_apart() as conn:
            return audit(conn, list(found.config.tenant.settings), tables, role, ignore=ignore)

    @classmethod
    def get_threading_model(cls) -> str:
        """Return `threaded` or `non-threaded` (1.x)."""
        return cls._current().config.type

    @classmethod
    def get_max_pool_size(cls, group: str) -> int:
        """Return the group's `connection_count` (1.x)."""
        return cls.group(group).config.connection_count

    @classmethod
    def _current(cls) -> _Pools:
        if cls._pools is None:
            raise NotInitializedError("call pgdbpool.Connection.init(config) first")
        return cls._pools

    @classmethod
    def _after_fork_in_child(cls) -> None:
        # The parent's connections, locks and threads are not ours: nothing of them may be closed,
        # written to or waited for. The same configuration starts anew, opened on first use.
        cls._lock = threading.Lock()
        for old in list(cls._all):  # also those replaced or closed, which blocks may still use
            cls._abandoned.append(old)
            for group in old.groups.values():
                group.abandon()
        pools = cls._pools
        if pools is not None:
            for group in pools.groups.values():
                group.abandon()
            cls._pools = _Pools(pools.config)

    @classmethod
    def _at_exit(cls) -> None:
        # The end of the process closes every connection. To close them here would only disturb
        # daemon threads that are still at work.
        if cls._pools is not None:
            for group in cls._pools.groups.values():
                group.ending = True


def _endpoint_status(endpoint: Endpoint) -> EndpointStatus:
    at = endpoint.last_error_at
    return EndpointStatus(
        label=endpoint.label,
        state=endpoint.state.value,
        role=endpoint.role.value if endpoint.role else None,
        weight=endpoint.weight,
        connections=endpoint.connections,
        last_error=endpoint.last_error,
        seconds_since_error=None if at is None else monotonic() - at,
    )


os.register_at_fork(after_in_child=Connection._after_fork_in_child)
atexit.register(Connection._at_exit)

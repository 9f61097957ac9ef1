"""Changes while the process runs: `Connection.reload`, `resize`, `expire`, `add_endpoint`, `remove_endpoint`.

Each derives a changed configuration from the present one, and the pools then take it over.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

from ..errors import ConfigError
from .unknown import unknown_endpoint, unknown_group

# The modules that read and check a configuration are imported by the functions below, as for `init`.
if TYPE_CHECKING:
    from .._config.model import Config, GroupConfig
    from .._lending.group import Group
    from .pools import Pools


class ReloadMethods:
    """The methods of `Connection` that change the configuration of the pools in use.

    They wait for no server. Blocks that are open keep their connections; a process that is forked later
    has the changed configuration too. A change by a signal handler that interrupts another one takes effect
    when that one has, and so after the handler.
    """

    if TYPE_CHECKING:
        _lock: AbstractContextManager[Any]
        _anew: str

        @classmethod
        def _current(cls) -> Pools: ...

        @classmethod
        def group(cls, name: str) -> Group: ...

    @classmethod
    def reload(
        cls, config: Mapping[str, Any] | str | os.PathLike[str] | IO[str] | IO[bytes] | None = None
    ) -> None:
        """Read a configuration as `init` does, and apply the changes.

        Connections of servers and groups that have not changed are kept, also if a server's
        `weight`, `connect_timeout`, `pass` or `pass_file` differs. The others are replaced: idle ones
        now, those in use as their blocks end.

        :raises ConfigError: the configuration is not valid (the error lists all problems), or has another
            `type` or `runtime_dir`; nothing was changed.
        :raises NotInitializedError: `init` was not called.
        """
        from .._config.load import load

        loaded = load(config)
        cls._change(loaded)

    @classmethod
    def resize(cls, group: str, connection_count: int | None = None, min_size: int | None = None) -> None:
        """Resize a group: waiters get added capacity at once, surplus connections close after their block.

        :param connection_count: the most connections, or None to keep the number.
        :param min_size: the connections that are kept open; None keeps it, within `connection_count`;
            if the two were equal, they stay equal.
        :raises ConfigError: the sizes do not fit together; nothing was changed.
        :raises UnconfiguredGroupError: there is no such group.
        """
        from .._config.check_groups import check_sizes
        from .._config.declarations import Refused, step
        from .._config.model import GROUP_KEYS
        from .._config.report import Report

        with cls._lock:
            config = cls._present()
            old = _group(config, group)
            report, path = Report(), f"groups{step(group)}"
            sizes = {"connection_count": connection_count, "min_size": min_size}
            fields: dict[str, Any] = {"reserved": old.reserved}
            for name, value in sizes.items():
                try:
                    fields[name] = (
                        getattr(old, name) if value is None else GROUP_KEYS[name].key.kind.read(value)
                    )
                except Refused as error:
                    report.refused(f"{path}.{name}", error)
            report.check("resize")
            if min_size is None:
                count = fields["connection_count"]
                fields["min_size"] = (
                    count if old.min_size == old.connection_count else min(old.min_size, count)
                )
            check_sizes(fields, path, report)
            report.check("resize")
            cls._change(_with_groups(config, {group: replace(old, **fields)}))

    @classmethod
    def expire(cls, group: str) -> None:
        """Replace all connections that a group has now: idle ones at once, those in use as their blocks end.

        :raises UnconfiguredGroupError: there is no such group.
        """
        cls.group(group).expire()

    @classmethod
    def add_endpoint(cls, server: Mapping[str, Any], groups: Iterable[str] | None = None) -> str:
        """Add a server, and return its label; groups even out over it as connections come back.

        :param server: its keys, as in an entry of `db`.
        :param groups: the groups that use it; None for those that use all servers now.
        :raises ConfigError: something is wrong with it; nothing was changed.
        :raises UnconfiguredGroupError: there is no such group.
        """
        from .._config.check_endpoints import check_servers
        from .._config.check_groups import check_pooler
        from .._config.declarations import show, step
        from .._config.model import EndpointConfig
        from .._config.report import Report

        with cls._lock:
            config = cls._present()
            report = Report()
            fields = check_servers({"db": [server]}, report)[0]
            labels = {endpoint.label for endpoint in config.endpoints}
            label = fields.get("label")
            if label in labels:
                report.add("db[0].label", f"label {show(label)} is that of another server; give it its own")
            report.check("add_endpoint")
            if "connect_timeout" not in server:
                fields["connect_timeout"] = EndpointConfig.__dataclass_fields__["connect_timeout"].default
            names = [n for n, g in config.groups.items() if set(g.endpoints) == labels]
            changed = {}
            for name in names if groups is None else groups:
                old = _group(config, name)
                group: dict[str, Any] = {
                    "endpoints": (*old.endpoints, label),
                    "sqlprepare": old.sqlprepare,
                }
                # As in a whole configuration: a pooler changes the default of prepare_threshold.
                check_pooler(group, [fields], f"groups{step(name)}", report)
                changed[name] = replace(old, **group)
            report.check("add_endpoint")
            endpoint = EndpointConfig(**fields)
            cls._change(_with_groups(replace(config, endpoints=(*config.endpoints, endpoint)), changed))
        return endpoint.label

    @classmethod
    def remove_endpoint(cls, label: str) -> None:
        """Remove a server: its idle connections are closed at once, those in use as their blocks end.

        :raises UnknownEndpointError: no endpoint has that label; the error lists the labels.
        :raises ConfigError: a group would have no server left; nothing was changed.
        """
        with cls._lock:
            config = cls._present()
            rest = tuple(endpoint for endpoint in config.endpoints if endpoint.label != label)
            if len(rest) == len(config.endpoints):
                raise unknown_endpoint(label, [endpoint.label for endpoint in rest])
            changed = {}
            for name, group in config.groups.items():
                if left := tuple(other for other in group.endpoints if other != label):
                    changed[name] = replace(group, endpoints=left)
                else:
                    raise ConfigError(
                        f"{label!r} cannot be removed: it is the only server of group {name!r}; add another "
                        "one first, or reload a configuration without that group"
                    )
            cls._change(_with_groups(replace(config, endpoints=rest), changed))

    @classmethod
    def _present(cls) -> Config:
        """Return the configuration to change: the coming one if this interrupts a change."""
        pools = cls._current()
        return pools.wanted if pools.changing else pools.config

    @classmethod
    def _change(cls, config: Config) -> None:
        with cls._lock:
            pools = cls._current()
            for key in ("type", "runtime_dir"):
                was, is_now = getattr(pools.config, key), getattr(config, key)
                if was != is_now:
                    raise ConfigError(
                        f"{key}: cannot change from {was} to {is_now} while the process runs; {cls._anew}"
                    )
            removed: list[Group] = []
            pools.wanted = config
            # A signal handler that comes here while `changing` is set leaves its change to this loop; before
            # and after that the handler makes it, and the loop finds nothing left to do, or does it again.
            while not pools.changing and pools.wanted is not pools.config:
                pools.changing = True
                try:
                    removed += pools.apply(pools.wanted)
                finally:
                    pools.changing = False
        for group in removed:
            group.close(1.0)


def _group(config: Config, name: str) -> GroupConfig:
    try:
        return config.groups[name]
    except (KeyError, TypeError):
        raise unknown_group(name, config.groups) from None


def _with_groups(config: Config, changed: Mapping[str, GroupConfig]) -> Config:
    return replace(config, groups=MappingProxyType({**config.groups, **changed}))

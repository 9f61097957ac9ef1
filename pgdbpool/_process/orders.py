"""The orders that an operator gives to all processes, as one of them executes them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import ConfigError
from .unknown import unknown_endpoint, unknown_group

if TYPE_CHECKING:
    from .._config.model import Config
    from .._lending.group import Group
    from .._servers.endpoint import Endpoint

Order = Mapping[str, Any]


class Ordered(Protocol):
    """The pools of a process, as orders reach them."""

    config: Config
    groups: dict[str, Group]
    endpoints: dict[str, Endpoint]
    owner: Any

    def pause(self, groups: Iterable[Group], by: str, seconds: float) -> None:
        """Hold new blocks of groups back."""

    def resume(self, groups: Iterable[Group]) -> int:
        """Let the blocks of groups go on; return how many were held."""


def obey(pools: Ordered, order: Order) -> str:
    """Execute an order and return its effect in words.

    :raises Error: it cannot be executed; nothing was changed.
    """
    if order["do"] not in _ORDERS:
        raise ConfigError(f"{order['do']!r} is not an order that this version of pgdbpool knows")
    return _ORDERS[order["do"]](pools, order)


def _groups(pools: Ordered, order: Order) -> Sequence[Group]:
    """Return the group that the order names, or all."""
    return list(pools.groups.values()) if order["group"] is None else [_group(pools, order)]


def _group(pools: Ordered, order: Order) -> Group:
    for group in pools.groups.values():
        if group.name == order["group"]:
            return group
    raise unknown_group(order["group"], [group.name for group in pools.groups.values()])


def _endpoint(pools: Ordered, order: Order) -> Endpoint:
    if (label := order["endpoint"]) not in pools.endpoints:
        raise unknown_endpoint(label, pools.endpoints)
    return pools.endpoints[label]


def _drain(pools: Ordered, order: Order) -> str:
    endpoint = _endpoint(pools, order)
    endpoint.drain()
    return f"no new block goes there; {_ending(endpoint.connections)}"


def _undrain(pools: Ordered, order: Order) -> str:
    _endpoint(pools, order).undrain()
    return "in use again"


def _expire(pools: Ordered, order: Order) -> str:
    groups = _groups(pools, order)
    endpoint = None if order["endpoint"] is None else _endpoint(pools, order)
    replaced = in_use = 0
    for group in groups:
        before = group.discarded("expired")
        group.expire(lambda conn: endpoint is None or conn.endpoint is endpoint)
        replaced += group.discarded("expired") - before
        in_use += sum(endpoint is None or conn.endpoint is endpoint for conn, _ in group.held())
    return f"{replaced} idle replaced; {_ending(in_use)}"


def _ending(number: int) -> str:
    return f"{number} in use until the end of their blocks" if number else "none in use"


def _resize(pools: Ordered, order: Order) -> str:
    name = _group(pools, order).config.name
    pools.owner.resize(name, order.get("connection_count"), order.get("min_size"))
    config = pools.groups[name].config
    return f"connection_count {config.connection_count}, min_size {config.min_size}"


def _reload(pools: Ordered, order: Order) -> str:
    origin = pools.config.origin
    if not os.path.isfile(origin):
        raise ConfigError(
            f"the configuration came from {origin!r}, which is not a file that can be read again: "
            "the application itself has to call Connection.reload"
        )
    pools.owner.reload(origin)
    return f"read {origin} again"


def _pause(pools: Ordered, order: Order) -> str:
    left = order["until"] - time.time()
    if left <= 0:
        return "it was over already"
    groups = _groups(pools, order)
    pools.pause(groups, order["by"], left)
    return f"new blocks are held; {_ending(sum(len(group.held()) for group in groups))}"


def _resume(pools: Ordered, order: Order) -> str:
    return f"{pools.resume(_groups(pools, order))} held blocks go on"


_ORDERS: dict[str, Callable[[Ordered, Order], str]] = {
    "drain": _drain,
    "undrain": _undrain,
    "expire": _expire,
    "resize": _resize,
    "reload": _reload,
    "pause": _pause,
    "resume": _resume,
}

"""The pools' group for a database of Django's settings; groups are added as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from psycopg.conninfo import make_conninfo

from ..._api.connection import Connection
from ..._config.load import load
from ..._config.model import GROUP_KEYS, Config, EndpointConfig, GroupConfig
from ...errors import ConfigError

OWN_OPTIONS = ("config", "group", "hold")
DJANGOS_OPTIONS = (
    "pool",
    "assume_role",
    "isolation_level",
    "server_side_binding",
    "prepare_threshold",
    "cursor_factory",
    "context",
)
"""Options that affect the use of a connection, and not the choice of one."""
GROUP_OPTIONS = tuple(name for name in GROUP_KEYS if name not in ("endpoints", *DJANGOS_OPTIONS))
MAINTENANCE = "postgres"

Key = tuple[Any, ...]
_made: dict[Key, str] = {}
"""The groups that were added for a database, by the settings that made them."""


def own_options(options: Mapping[str, Any]) -> set[str]:
    """Return the names of the options that are the pools' and not libpq's.

    `connect_timeout` and `application_name` are known to both, and left to libpq.
    """
    return {name for name in options if name in OWN_OPTIONS or name in GROUP_OPTIONS} - {"connect_timeout"}


def named_database(settings: Mapping[str, Any]) -> str | None:
    """Return the database that a group of a configuration file uses.

    :raises django.core.exceptions.ImproperlyConfigured: the settings are not valid; says what to change.
    """
    config, group = _from_file(settings)
    return _endpoints(config, group)[0].dbname


def group_of(alias: str, settings: Mapping[str, Any], timezone: str | None) -> str:
    """Return the name of the group for a database; open the pools, or add the group, if need be.

    :raises django.core.exceptions.ImproperlyConfigured: the settings are not valid; says what to change.
    """
    with Connection._lock:
        if settings["OPTIONS"].get("config") is None:
            return _add(_key(alias, settings, timezone), lambda: _from_settings(alias, settings, timezone))
        config, group = _from_file(settings)
        if not Connection._is_open():
            Connection.init(config, wait=False)  # type: ignore[arg-type]
        database = MAINTENANCE if settings["NAME"] is None else settings["NAME"]
        endpoints = _endpoints(config, group)
        if not database or all(endpoint.dbname == database for endpoint in endpoints):
            return group.name
        return _add((group.name, database), lambda: _elsewhere(group, endpoints, database))


def alone(name: str) -> Config:
    """Return the configuration of a group by itself, with its servers."""
    config = Connection._present()
    return _config(config, {name: config.groups[name]}, {e.label: e for e in config.endpoints})


def forget(database: str) -> None:
    """Remove a database's added groups and their connections, so that it can be dropped."""
    if not Connection._is_open():
        return
    with Connection._lock:
        config = Connection._present()
        inside = {endpoint.label for endpoint in config.endpoints if endpoint.dbname == database}
        gone = {name for name in _made.values() if name in config.groups}
        gone = {name for name in gone if inside.issuperset(config.groups[name].endpoints)}
        for key in [key for key, name in _made.items() if name in gone]:
            del _made[key]
        groups = {name: kept for name, kept in config.groups.items() if name not in gone}
        Connection._change(_config(config, groups, {e.label: e for e in config.endpoints}))


def _from_file(settings: Mapping[str, Any]) -> tuple[Config, GroupConfig]:
    options = settings["OPTIONS"]
    try:
        config = Connection._present() if Connection._is_open() else load(options["config"])
    except ConfigError as error:
        raise ImproperlyConfigured(str(error)) from error
    name = options.get("group")
    if name not in config.groups:
        known = ", ".join(map(repr, config.groups))
        raise ImproperlyConfigured(f"OPTIONS['group'] is {name!r}: set it to one of the groups {known}")
    return config, config.groups[name]


def _endpoints(config: Config, group: GroupConfig) -> list[EndpointConfig]:
    return [endpoint for endpoint in config.endpoints if endpoint.label in group.endpoints]


def _elsewhere(
    group: GroupConfig, endpoints: list[EndpointConfig], database: str
) -> tuple[list[EndpointConfig], GroupConfig]:
    """Return a group as another one, in another database of its servers, such as that of tests."""
    moved = [replace(e, label=f"{e.label}/{database}", dbname=database) for e in endpoints]
    labels = tuple(endpoint.label for endpoint in moved)
    name = f"{group.name}/{database}"
    return moved, replace(group, name=name, endpoints=labels, min_size=0, query_timeout=0)


def _key(alias: str, settings: Mapping[str, Any], timezone: str | None) -> Key:
    options = {name: value for name, value in settings["OPTIONS"].items() if name not in DJANGOS_OPTIONS}
    places = tuple(settings[name] for name in ("NAME", "HOST", "PORT", "USER", "PASSWORD"))
    return (alias, timezone, *places, repr(sorted(options.items())))


def _from_settings(
    alias: str, settings: Mapping[str, Any], timezone: str | None
) -> tuple[list[EndpointConfig], GroupConfig]:
    """Return the servers and the group that Django's settings describe by themselves."""
    options = settings["OPTIONS"]
    own = own_options(options)
    rest = {n: v for n, v in options.items() if n not in own and n not in DJANGOS_OPTIONS}
    server: dict[str, Any] = {"user": settings["USER"], "pass": settings["PASSWORD"]}
    server["name"] = MAINTENANCE if settings["NAME"] is None else settings["NAME"]
    server["query_timeout"] = 0  # Django has none
    server["conninfo"] = make_conninfo(**{**rest, "client_encoding": "UTF8"})
    if timezone and "options" not in rest:
        server["options"] = {"TimeZone": timezone}
    given = {name: value for name, value in server.items() if value not in ("", None)}
    hosts = str(settings["HOST"] or "").split(",")
    ports = str(settings["PORT"] or "").split(",")
    servers = [{**given, **_place(host, ports[i % len(ports)])} for i, host in enumerate(hosts)]
    group = {"min_size": 0, **{n: options[n] for n in own if n not in OWN_OPTIONS}}
    try:
        config = load({"db": servers, "groups": {"default": group}})
    except ConfigError as error:
        raise ImproperlyConfigured(f"DATABASES[{alias!r}]: {error}") from error
    made = [replace(e, label=f"{e.label}/{e.dbname}") for e in config.endpoints]
    labels = tuple(endpoint.label for endpoint in made)
    return made, replace(config.groups["default"], name=alias, endpoints=labels)


def _place(host: str, port: str) -> dict[str, Any]:
    place: dict[str, Any] = {"host": host.strip()} if host.strip() else {}
    return {**place, "port": int(port)} if port.strip() else place


def _add(key: Key, make: Callable[[], tuple[list[EndpointConfig], GroupConfig]]) -> str:
    """Add a group to the pools, or open the pools with it, unless it is there."""
    name = _made.get(key)
    if name is not None and Connection._is_open() and name in Connection._present().groups:
        return name
    endpoints, group = make()
    present = Connection._present() if Connection._is_open() else Config(endpoints=(), groups={})
    groups = dict(present.groups)
    servers = {e.label: e for e in present.endpoints}
    number, suffix = 1, ""
    while group.name + suffix in groups or _clash(servers, endpoints, suffix):
        number += 1
        suffix = f"#{number}"
    endpoints = [replace(e, label=e.label + suffix) for e in endpoints]
    group = replace(group, name=group.name + suffix, endpoints=tuple(e.label for e in endpoints))
    groups[group.name] = group
    servers.update({e.label: e for e in endpoints})
    changed = _config(present, groups, servers)
    if Connection._is_open():
        Connection._change(changed)
    else:
        Connection.init(changed, wait=False)  # type: ignore[arg-type]
    _made[key] = group.name
    return group.name


def _clash(servers: Mapping[str, EndpointConfig], endpoints: list[EndpointConfig], suffix: str) -> bool:
    """Return whether another server has the label of one of these."""
    named = [replace(endpoint, label=endpoint.label + suffix) for endpoint in endpoints]
    return any(servers.get(endpoint.label, endpoint) != endpoint for endpoint in named)


def _config(base: Config, groups: Mapping[str, GroupConfig], servers: Mapping[str, EndpointConfig]) -> Config:
    used = {label for group in groups.values() for label in group.endpoints}
    endpoints = tuple(endpoint for label, endpoint in servers.items() if label in used)
    return replace(base, groups=MappingProxyType(dict(groups)), endpoints=endpoints)

"""The configuration that is in use, for operators: the keys that it sets, without secrets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .._config.declarations import Setting
from .._config.model import CONFIG_KEYS, ENDPOINT_KEYS, GROUP_KEYS, Config

HIDDEN = "***"


def running_config(config: Config) -> dict[str, Any]:
    """Return the keys of a configuration that differ from their defaults, as plain values."""
    top = {key: _plain(getattr(config, key)) for key in ("type", "runtime_dir", "processes")}
    return {
        "origin": config.origin,
        **{key: value for key, value in top.items() if value is not None and key in CONFIG_KEYS},
        "db": {endpoint.label: _set(endpoint, ENDPOINT_KEYS, "label") for endpoint in config.endpoints},
        "groups": {name: _set(group, GROUP_KEYS, "name") for name, group in config.groups.items()},
    }


def _set(part: Any, keys: Mapping[str, Setting], but: str) -> dict[str, Any]:
    names = {setting.field: name for name, setting in keys.items()}
    found = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if field.name != but and not _is_default(field, value):
            found[names.get(field.name, field.name)] = _plain(value) if field.repr else HIDDEN
    return found


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return bool(value == field.default_factory())
    return bool(value == field.default)


def _plain(value: Any) -> Any:
    """Return a value in its JSON form; a function by its name."""
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if dataclasses.is_dataclass(value):
        return {
            f.name: _plain(getattr(value, f.name)) if f.repr else HIDDEN for f in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(each) for each in value]
    return f"{getattr(value, '__module__', '?')}.{getattr(value, '__qualname__', type(value).__name__)}"

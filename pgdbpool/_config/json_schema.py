"""The configuration as JSON Schema and as a reference, both from the one declaration in `model.py`.

An editor with a YAML language server completes and checks a `pgdbpool.yaml` that has this line:

    # yaml-language-server: $schema=./pgdbpool.schema.json

The schema checks less than `load`: not how keys depend on each other, nor whether a file exists.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .._config import model as config
from .declarations import Key, Setting
from .text_types import VARIABLE
from .value_types import DURATION_EXAMPLES, Section

PUBLISHED = Path(__file__).with_name("pgdbpool.schema.json")
"""The schema as a file, installed with the package."""


class Part(NamedTuple):
    """The keys of one mapping."""

    title: str
    prefix: str
    """The prefix of their names in the reference."""
    keys: Mapping[str, Setting]


PARTS = (
    Part("Top level", "", config.CONFIG_KEYS),
    Part("Servers", "db.", config.DB_KEYS),
    Part("Groups", "groups.", config.GROUP_KEYS),
    Part("Rate limits", "groups.rate_limit.", config.RATE_KEYS),
    Part("Tenants", "groups.tenant.", config.TENANT_KEYS),
)


class Entry(NamedTuple):
    """A key as the reference shows it."""

    key: str
    part: str
    allowed: str
    default: str
    meaning: str


def reference() -> Iterator[Entry]:
    """Yield all keys in the order of their declaration, in plain words."""
    for part in PARTS:
        for setting in part.keys.values():
            allowed = setting.key.kind.allowed.replace(f", or {DURATION_EXAMPLES}", ", or with a unit")
            allowed += ", or null" if setting.nullable else ""
            meaning, default = plain(setting.key.meaning), plain(setting.default)
            yield Entry(part.prefix + setting.name, part.title, allowed, default, meaning)


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 7, which editors know best) of a configuration."""
    server = _mapping(config.DB_KEYS)
    group = _mapping(config.GROUP_KEYS)
    group["type"] = ["object", "null"]
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Configuration of pgdbpool",
        "definitions": {
            "variable": {
                "description": "Filled in from the environment: ${VAR} or ${VAR:-default}.",
                "type": "string",
                "pattern": r"\$\{[A-Za-z_]",
            },
            "server": server,
            "group": group,
        },
        **_mapping(config.CONFIG_KEYS),
        "required": ["db", "groups"],
    }


def _mapping(keys: Mapping[str, Setting]) -> dict[str, Any]:
    """Return the schema of a mapping with these keys."""
    properties = {name: _property(setting) for name, setting in keys.items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _property(setting: Setting) -> dict[str, Any]:
    """Return the schema of one key's value."""
    key = setting.key
    value = _SECTIONS[key]() if key in _SECTIONS else copy.deepcopy(key.kind.schema)
    if value and not isinstance(key.kind, Section):
        choices = value.pop("anyOf", None) or [value]
        choices += [] if key.kind.mapping or choices[0].get("type") == "string" else [VARIABLE]
        choices += [{"type": "null"}] if setting.nullable else []
        value = choices[0] if len(choices) == 1 else {"anyOf": choices}
    default = plain(setting.default)
    words = [plain(key.meaning), "" if default in ("required", "not set") else f"Default: {default}."]
    return {"description": " ".join(filter(None, words)), **value}


def _servers() -> dict[str, Any]:
    one = {"$ref": "#/definitions/server"}
    return {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}


def _groups() -> dict[str, Any]:
    each = {"$ref": "#/definitions/group"}
    return {"type": "object", "additionalProperties": each, "minProperties": 1}


def _rate_limit() -> dict[str, Any]:
    short = config.RATE_KEYS["per_second"].key.kind.schema
    return {"anyOf": [short, VARIABLE, {**_mapping(config.RATE_KEYS), "required": ["per_second"]}]}


def _tenant() -> dict[str, Any]:
    short = config.TENANT_KEYS["setting"].key.kind.schema
    types = config.TENANT_KEYS["type"].key.kind.schema
    keys = {name: config.TENANT_KEYS[name] for name in ("type", "pattern")}
    long = _mapping(config.TENANT_KEYS)
    long["properties"]["settings"] |= {
        "type": "object",
        "propertyNames": short,
        "additionalProperties": {"anyOf": [types, VARIABLE, _mapping(keys)]},
        "minProperties": 1,
    }
    long["anyOf"] = [{"required": ["setting"]}, {"required": ["settings"]}]
    return {"anyOf": [short, VARIABLE, long]}


_SECTIONS: dict[Key, Any] = {
    config.CONFIG_KEYS["db"].key: _servers,
    config.CONFIG_KEYS["groups"].key: _groups,
    config.GROUP_KEYS["rate_limit"].key: _rate_limit,
    config.GROUP_KEYS["tenant"].key: _tenant,
}


def plain(text: str) -> str:
    """Return text of the reference without its markup."""
    return re.sub(r"``(.*?)``|`([^`]*)`", lambda match: match[1] or match[2] or "", text)

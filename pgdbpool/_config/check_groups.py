"""The checks of `groups`: their servers, their tenants, and the settings that their blocks bind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .._util.client_settings import why_refused
from .declarations import Refused, Unreadable, nearest, show, step
from .model import (
    CONFIG_KEYS,
    CONNECTION_COUNT,
    GROUP_KEYS,
    RATE_KEYS,
    TENANT_KEYS,
    RateLimit,
    TenantConfig,
    TenantType,
)
from .report import Report, read, refused
from .setting_types import twice
from .text_types import Label

_FLAT = ("setting", "type", "pattern")  # of a tenant with one setting

_Typed = tuple[TenantType, str | None]


def check_groups(
    tree: Mapping[Any, Any], servers: list[dict[str, Any]], report: Report
) -> list[dict[str, Any]]:
    """Return the fields of each group."""
    allowed = CONFIG_KEYS["groups"].key.kind.allowed
    value = tree.get("groups")
    if "groups" not in tree:
        report.add("groups", f"is missing; it must be {allowed}")
        return []
    if not isinstance(value, Mapping) or not value:
        if not isinstance(value, Unreadable):
            shown = "an empty one" if isinstance(value, Mapping) else show(value)
            report.add("groups", f"must be {allowed}, not {shown}")
        return []
    groups = []
    for name, entry in value.items():
        path = f"groups{step(name)}"
        try:
            label = Label().check(name)
        except Refused as error:
            report.add(path, f"the name of a group {error.problems[0][1]}")
            continue
        entry = {} if entry is None else entry  # in YAML, a group without any key
        groups.append({"name": label, **_group(entry, servers, path, report)})
    return groups


def _group(entry: object, servers: list[dict[str, Any]], path: str, report: Report) -> dict[str, Any]:
    group = read(GROUP_KEYS, entry, path, report)
    if not refused(entry, group, "connection_count"):
        check_sizes(group, path, report)
    if not refused(entry, group, "endpoints"):
        labels = tuple(server.get("label") for server in servers)
        _check_endpoints(group.setdefault("endpoints", labels), labels, path, report)
        check_pooler(group, servers, path, report)
    if group.get("max_lag") and group.get("target") in ("primary", "read-write"):
        report.add(
            f"{path}.max_lag", f"is about standbys, and target: {group['target']} takes none; remove it"
        )
    leak_after, max_hold = group.get("leak_after"), group.get("max_hold")
    if leak_after and max_hold and leak_after >= max_hold:
        report.add(f"{path}.leak_after", f"must be below max_hold ({max_hold:g} s), not {leak_after:g} s")
    if group.get("on_failover") is not None and group.get("target") not in ("primary", "read-write"):
        message = "is about the server that takes the writes, which only the targets primary and read-write"
        report.add(f"{path}.on_failover", f"{message} follow; remove it, or set the target")
    if "tenant" in group:
        group["tenant"] = _tenant(group["tenant"], f"{path}.tenant", report)
    if "rate_limit" in group:
        group["rate_limit"] = _rate_limit(group["rate_limit"], f"{path}.rate_limit", report)
    group["settings"] = MappingProxyType(group.get("settings", {}))
    _check_settings(group, path, report)
    return group


def check_sizes(group: dict[str, Any], path: str, report: Report) -> None:
    """Report sizes that contradict each other; missing ones get their defaults."""
    count = group.setdefault("connection_count", CONNECTION_COUNT)
    if group.setdefault("min_size", count) > count:
        message = f"must be at most connection_count ({count}), not {group['min_size']}"
        report.add(f"{path}.min_size", message)
    if group.get("reserved", 0) >= count:
        message = f"must be below connection_count ({count}), not {group['reserved']}"
        report.add(f"{path}.reserved", message)


def _check_endpoints(
    endpoints: tuple[str, ...], labels: tuple[str | None, ...], path: str, report: Report
) -> None:
    if not labels or None in labels:
        return
    for index, label in enumerate(endpoints):
        if label not in labels:
            known = ", ".join(show(known) for known in labels)
            hint = nearest(label, filter(None, labels))
            message = f"no server has the label {show(label)}; the labels are {known}{hint}"
            report.add(f"{path}.endpoints[{index}]", message)


def check_pooler(group: dict[str, Any], servers: list[dict[str, Any]], path: str, report: Report) -> None:
    """Set the default that a transaction pooler needs, and report keys that it cannot serve."""
    pooled = [server.get("label") for server in servers if server.get("pooler")]
    through = [label for label in group["endpoints"] if label is not None and label in pooled]
    if not through:
        return
    group.setdefault("prepare_threshold", None)
    if group.get("sqlprepare"):
        message = f"prepares in the session, and {show(through[0])} (pooler: transaction) keeps none"
        report.add(f"{path}.sqlprepare", f"{message}; leave it out, or use other endpoints")


def _check_settings(group: Mapping[str, Any], path: str, report: Report) -> None:
    """Report settings that another key of the group sets too, and settings that no block can bind."""
    tenant: TenantConfig | None = group.get("tenant")
    tenants = {name.lower() for name in tenant.settings} if tenant else set()
    for name, value in group["settings"].items():
        where = f"{path}.settings{step(name)}"
        if name.lower() in tenants:
            report.add(where, "is the setting of the tenant, which each block gives; remove it here")
        elif name.lower() == "statement_timeout" and group.get("query_timeout") is not None:
            report.add(where, "contradicts query_timeout, which sets it too; keep one of the two")
        elif reason := why_refused(name, value):
            report.add(where, reason)


def _rate_limit(entry: object, path: str, report: Report) -> RateLimit | None:
    """Return the value of the key `rate_limit`; None if it is not valid."""
    if not isinstance(entry, (Mapping, str)) and entry is not None:
        try:
            entry = {"per_second": RATE_KEYS["per_second"].read(entry)}
        except Refused as error:
            report.refused(path, error)
            return None
    if not isinstance(entry, Mapping):
        hint = "; leave it out for no limit" if entry is None else ""
        report.add(path, f"must be {GROUP_KEYS['rate_limit'].key.kind.allowed}, not {show(entry)}{hint}")
        return None
    fields = read(RATE_KEYS, entry, path, report)
    if "per_second" not in entry:
        report.add(path, "must have the key per_second")
    if refused(entry, fields, *RATE_KEYS) or "per_second" not in fields:
        return None
    fields.setdefault("burst", math.ceil(fields["per_second"]))
    return RateLimit(**fields)


def _tenant(entry: object, path: str, report: Report) -> TenantConfig | None:
    """Return the value of the key `tenant`; None if it is not valid."""
    if isinstance(entry, str):
        try:
            entry = {"setting": TENANT_KEYS["setting"].read(entry)}
        except Refused as error:
            report.refused(path, error)
            return None
    if not isinstance(entry, Mapping):
        hint = "; leave it out for a group without tenants" if entry is None else ""
        report.add(path, f"must be {GROUP_KEYS['tenant'].key.kind.allowed}, not {show(entry)}{hint}")
        return None
    fields = read(TENANT_KEYS, entry, path, report)
    settings: dict[str, _Typed] = {}
    if "settings" in entry:
        for name in filter(entry.__contains__, _FLAT):
            report.add(f"{path}.{name}", "contradicts settings, which takes its place; keep one of the two")
        if "settings" in fields:
            settings = _tenant_settings(fields["settings"], f"{path}.settings", report)
    elif "setting" not in entry:
        report.add(path, "must have the key setting, the name of one, or settings")
    else:
        typed = _typed(entry, fields, path, report)
        if typed and "setting" in fields:
            settings = {fields["setting"]: typed}
    if not settings or refused(entry, fields, "required", "verify"):
        return None
    options = {name: fields[name] for name in ("required", "verify") if name in fields}
    return TenantConfig(settings=MappingProxyType(settings), **options)


def _tenant_settings(value: object, path: str, report: Report) -> dict[str, _Typed]:
    """Return the settings of a tenant that has several; wrong ones are reported and left out."""
    if not isinstance(value, Mapping) or not value:
        shown = "an empty one" if isinstance(value, Mapping) else show(value)
        report.add(path, f"must be {TENANT_KEYS['settings'].key.kind.allowed}, not {shown}")
        return {}
    settings: dict[str, _Typed] = {}
    for name, item in value.items():
        where = path + step(name)
        try:
            setting = TENANT_KEYS["setting"].read(name)
            entry = item if isinstance(item, Mapping) else {"type": TENANT_KEYS["type"].read(item)}
        except Refused as error:
            report.refused(where, error)
            continue
        fields = read({key: TENANT_KEYS[key] for key in ("type", "pattern")}, entry, where, report)
        typed = _typed(entry, fields, where, report)
        if typed:
            settings[setting] = typed
    for name, message in twice(settings):
        report.add(path + step(name), message)
    return settings


def _typed(entry: Mapping[Any, Any], fields: Mapping[str, Any], path: str, report: Report) -> _Typed | None:
    """Return the type of a tenant's setting with its pattern; None if they are wrong, or not together."""
    if refused(entry, fields, "type", "pattern"):
        return None
    kind: TenantType = fields.get("type", "text")
    pattern: str | None = fields.get("pattern")
    if kind == "regex" and pattern is None:
        report.add(path, "must have the key pattern, the regular expression of type: regex")
    elif kind != "regex" and pattern is not None:
        report.add(f"{path}.pattern", f"goes with type: regex, and this is {kind}")
    else:
        return kind, pattern
    return None

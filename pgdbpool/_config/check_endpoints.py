"""The checks of `db`: the address, the login and the session options of each server."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import psycopg
from psycopg import pq

from .declarations import Refused, Unreadable, nearest, show, step
from .model import CONFIG_KEYS, DB_KEYS, ENDPOINT_KEYS, conninfo_parts
from .password_file import read_password
from .report import Report, read, refused
from .service_file import service_of

_BY_PARAMETER = {setting.key.libpq: setting for setting in ENDPOINT_KEYS.values() if setting.key.libpq}


def check_servers(tree: Mapping[Any, Any], report: Report) -> list[dict[str, Any]]:
    """Return the fields of each server; one whose label is not known has none."""
    allowed = CONFIG_KEYS["db"].key.kind.allowed
    value = tree.get("db")
    if "db" not in tree:
        report.add("db", f"is missing; it must be {allowed}")
        return []
    if isinstance(value, Unreadable):
        return []
    if isinstance(value, Mapping):
        entries: dict[str, Any] = {"db": value}
    elif isinstance(value, (list, tuple)) and value:
        entries = {f"db[{index}]": entry for index, entry in enumerate(value)}
    else:
        hint = "; a connection string goes under db: {conninfo: ...}" if isinstance(value, str) else ""
        report.add("db", f"must be {allowed}, not {show(value)}{hint}")
        return []
    servers = []
    labels: dict[str, str] = {}
    for path, entry in entries.items():
        servers.append(_server(entry, path, report))
        timeout = _service_timeout(servers[-1]) or (10.0 if len(entries) == 1 else 5.0)
        servers[-1].setdefault("connect_timeout", timeout)
        label = servers[-1].get("label")
        if label is not None and labels.setdefault(label, path) != path:
            where = f"{path}.label" if isinstance(entry, Mapping) and "label" in entry else path
            report.add(where, f"label {show(label)} is that of {labels[label]} too; give each its own label")
    return servers


def _service_timeout(fields: Mapping[str, Any]) -> float:
    """Return the `connect_timeout` of the server's service file, 0 if there is none, or no limit."""
    try:
        params = conninfo_parts(fields["conninfo"]) if fields.get("conninfo") else {}
    except (psycopg.Error, ValueError):
        return 0.0  # which is reported elsewhere
    text = service_of(params).get("connect_timeout", "") if not fields.get("host") else ""
    return float(text) if text.isdigit() else 0.0


def _server(entry: object, path: str, report: Report) -> dict[str, Any]:
    fields = read(DB_KEYS, entry, path, report)
    if "connection_retry_sleep" in fields:
        report.deprecated.append(f"{path}.connection_retry_sleep")
        del fields["connection_retry_sleep"]
    params: dict[str, str] | None = {}
    if fields.get("conninfo") is not None:
        params = _merge_conninfo(fields, path, report)
    if fields.get("pass_file") is not None:
        _read_pass_file(fields, path, report)
    for name in fields.get("options", ()):
        where = f"{path}.options{step(name)}"
        if name.lower() == "statement_timeout":
            report.add(where, "must be left to query_timeout, which sets it")
        elif name.lower() == "temp_buffers" and fields.get("session_tmp_buffer") is not None:
            report.add(where, "contradicts session_tmp_buffer, which sets it too; keep one of the two")
    if fields.get("pooler"):
        _check_pooled_server(fields, params or {}, path, report)
    fields["options"] = MappingProxyType(fields.get("options", {}))
    told = params is not None and not refused(entry, fields, "label", "host", "port", "conninfo")
    if "label" not in fields and told:
        fields["label"] = default_label({**(params or {}), **fields})
        if "," in fields["label"]:
            message = f"libpq's default host or port ({show(fields['label'])}) names several servers"
            report.add(path, f"{message}: give host and port")
    return fields


def _read_pass_file(fields: dict[str, Any], path: str, report: Report) -> None:
    """Set the password to the one in the file."""
    if fields.get("password") is not None:
        report.add(f"{path}.pass_file", "contradicts the password that is given too; keep one of the two")
        return
    try:
        fields["password"] = read_password(fields["pass_file"])
    except Refused as error:
        report.refused(f"{path}.pass_file", error)


def _check_pooled_server(
    fields: Mapping[str, Any], params: Mapping[str, str], path: str, report: Report
) -> None:
    """Report keys that have no effect behind a transaction pooler."""
    why = "cannot pass a transaction pooler"
    remedy = "write them as settings of the groups, or ALTER ROLE ... SET them at the server"
    if fields.get("options"):
        report.add(f"{path}.options", f"{why}; {remedy}")
    if params.get("options"):
        report.add(f"{path}.conninfo", f"has options, which {why}; {remedy}")
    if fields.get("session_tmp_buffer") is not None:
        report.add(f"{path}.session_tmp_buffer", f"{why}; ALTER ROLE ... SET temp_buffers at the server")


def parse_conninfo(conninfo: str) -> dict[str, str]:
    """Return the parameters of a URI or keyword string; raises `Refused` without quoting it."""
    # Such a password would end at the slash, and its rest would pass for a host, port or database.
    if re.match(r"postgres(ql)?://[^/?]*/[^?]*@", conninfo):
        raise Refused(("", "has an @ after a slash; in a password, / is written %2F, and elsewhere @ is %40"))
    try:
        return conninfo_parts(conninfo)
    except (psycopg.Error, ValueError) as error:
        reason = _unknown_parameter(str(error), conninfo)
    raise Refused(("", f"must be a URI (postgresql://...) or keyword string (host=...) of libpq{reason}"))


def default_label(params: Mapping[str, Any]) -> str:
    """Return host:port of a server, with libpq's defaults for missing parts."""
    host, port = params.get("host") or params.get("hostaddr"), params.get("port")
    if not host and params.get("service"):
        return str(params["service"])
    defaults = {default.keyword: default.val for default in pq.Conninfo.get_defaults()}
    host = host or (defaults.get(b"host") or b"[local]").decode(errors="replace")
    port = port or (defaults.get(b"port") or b"5432").decode(errors="replace")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _merge_conninfo(fields: dict[str, Any], path: str, report: Report) -> dict[str, str] | None:
    """Add the conninfo's parts to the fields, and return its parameters; None if it is not valid."""
    where = f"{path}.conninfo"
    try:
        params = parse_conninfo(fields["conninfo"])
    except Refused as error:
        report.refused(where, error)
        return None
    if any("," in params.get(name, "") for name in ("host", "hostaddr", "port")):
        report.add(where, "names several servers; one server per entry, list them separately")
        return None
    if params.get("target_session_attrs", "any") != "any":
        report.add(where, "has target_session_attrs, which is for a list of hosts; use target of the groups")
    if re.search(r"statement[-_]timeout", params.get("options", ""), re.IGNORECASE):
        report.add(where, "sets statement_timeout, which must be left to query_timeout")
    for name, text in params.items():
        if text and name in _BY_PARAMETER:
            _merge_parameter(name, text, fields, path, report)
    return params


def _merge_parameter(name: str, text: str, fields: dict[str, Any], path: str, report: Report) -> None:
    """Add one parameter of a conninfo to the fields, unless they already have another value."""
    setting = _BY_PARAMETER[name]
    kind = setting.key.kind
    digits = not kind.text and re.fullmatch(r"-?[0-9]{1,18}", text)
    try:
        value = kind.read(int(text) if digits else text)
    except Refused as error:
        message = error.problems[0][1]
        if name == "port" and not digits:  # the text after a colon may be a password
            message = f"must be {kind.allowed}"
        report.add(f"{path}.conninfo", f"its {name} {message}")
        return
    given = fields.get(setting.field)
    if given is None:
        fields[setting.field] = value
    elif given != value:
        here, there = (show(side, kind.secret) for side in (given, value))
        report.add(f"{path}.{setting.name}", f"contradicts conninfo: {here} here, {there} there")


def _unknown_parameter(message: str, conninfo: str) -> str:
    """Return a hint at the parameter that libpq does not know, if it cannot be part of a password."""
    match = re.search(r'"([a-z_]{1,40})"', message)
    tail = conninfo.rpartition("@")[2]
    if not match or "pass" in tail.lower() or not re.search(rf"(^|[\s?&]){match[1]}\s*=", tail):
        return ""
    known = [option.keyword.decode() for option in pq.Conninfo.get_defaults()]
    return f"; {match[1]!r} is none of its parameters{nearest(match[1], known)}"

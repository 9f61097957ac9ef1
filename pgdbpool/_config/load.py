"""The sources of a configuration: a dict, a YAML file, or the environment.

A dict is taken as it is. Without a dict or a file, the environment is read; an empty variable counts as not
set.

===========================  ==========================================================================
Variable                     Meaning
===========================  ==========================================================================
``PGDBPOOL_CONFIG``          Path of a YAML file, which then holds everything: the other variables count
                             only if the file names them as ``${VAR}``.
``DATABASE_URL``             The server of every group that has no other: a URI or keyword
                             string of libpq. ``postgresql://`` leaves it all to the ``PG*`` variables.
``DATABASE_URL_<GROUP>``     The server of one group; the suffix in lower case is the group's name.
``PGDBPOOL_GROUPS``          The groups, separated by commas. If not set, there is a group for each
                             ``DATABASE_URL_<GROUP>``, and the group ``default`` for ``DATABASE_URL``.
``PGDBPOOL_TYPE``            `type`: ``threaded``, ``non-threaded`` or ``lock-free``.
``PGDBPOOL_RUNTIME_DIR``     `runtime_dir`: where each process publishes its status.
``PGDBPOOL_PROCESSES``       `processes`: how many use this configuration.
``PGDBPOOL_<KEY>``           A key of every group, such as ``PGDBPOOL_CONNECTION_COUNT``; any key of a
                             group but `endpoints`. A mapping is written in YAML, in braces:
                             ``PGDBPOOL_SETTINGS='{work_mem: 64MB}'``.
``PGDBPOOL_<GROUP>_<KEY>``   The same for one group, such as ``PGDBPOOL_READ_TARGET``; it wins.
``PGDBPOOL_TEST_*``          Left to the package's own tests, but for the keys of a group ``test``.
===========================  ==========================================================================

Any other ``PGDBPOOL_*`` is an error. Groups with the same server share it. The label of a server is
``host:port``; a second server there has its group's name added.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import IO, Any

from .check_endpoints import check_servers, default_label, parse_conninfo
from .check_groups import check_groups
from .declarations import Refused, may_hold_password, nearest, show, step
from .foreign_keys import synonym
from .model import CONFIG_KEYS, GROUP_KEYS, Config, EndpointConfig, GroupConfig
from .report import Report, read

_SIZE_LIMIT = 1 << 20
_GROUP_NAME = re.compile(r"[a-z0-9_]+")
_VARIABLE_KEYS = [key for key in GROUP_KEYS if key != "endpoints"]
_NOTHING = (
    "nothing to connect to: set PGDBPOOL_CONFIG to the path of a YAML file, or DATABASE_URL to a URI such as "
    "postgresql://user@host:5432/dbname, or give a mapping or a path"
)


def load(
    source: Config | Mapping[Any, Any] | str | os.PathLike[str] | IO[str] | IO[bytes] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Config:
    """Return the configuration of a dict, of a YAML file (its path, or open), or else of the environment.

    Raises `ConfigError` with every problem at once, and nothing else, for any invalid input.
    The source is not modified, and no server is connected to. A `Config` is returned as it is.
    """
    if isinstance(source, Config):
        return source
    report = Report()
    if isinstance(source, Mapping):
        origin, tree = "dict", source
    elif source is None and not environ.get("PGDBPOOL_CONFIG"):
        origin, tree = "environment", _read_environment(environ, report)
    else:
        variable = "PGDBPOOL_CONFIG" if source is None else ""
        origin, text = _read_text(environ[variable] if variable else source, report, variable)
        from .yaml_file import read_yaml  # late, with PyYAML: a mapping needs none of it

        tree = read_yaml(text, origin, environ, report)
    config = build(tree, origin, report)
    for path in report.deprecated:
        warnings.warn(f"{path} has no effect in pgdbpool 2: remove it", DeprecationWarning, _caller())
    for text in report.doubtful:
        warnings.warn(text, UserWarning, _caller())
    return config


def load_runtime_dir(
    source: Mapping[Any, Any] | str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> tuple[str, str | None]:
    """Return the origin of a configuration and its `runtime_dir`; nothing else in it has to be valid.

    So a command does not need the application's variables.

    :raises ConfigError: the file cannot be read, or its `runtime_dir` is not valid.
    """
    if isinstance(source, Mapping):
        origin, tree = "dict", dict(source)
    elif source is None and not environ.get("PGDBPOOL_CONFIG"):
        origin, tree = "environment", {"runtime_dir": environ.get("PGDBPOOL_RUNTIME_DIR") or None}
    else:
        variable = "PGDBPOOL_CONFIG" if source is None else ""
        origin, text = _read_text(environ[variable] if variable else source, Report(), variable)
        from .yaml_file import read_yaml

        tree = dict(read_yaml(text, origin, environ, Report()))
    report, key = Report(), "runtime_dir"
    found = read({key: CONFIG_KEYS[key]}, {key: tree.get(key)}, "", report)
    report.check(origin)
    return origin, found.get(key)


def build(tree: Mapping[Any, Any], origin: str, report: Report) -> Config:
    """Return the configuration that a tree of plain values describes; the tree is not modified.

    Raises `ConfigError` with all problems, including those already in the report.
    """
    top = read(CONFIG_KEYS, tree, "", report)
    servers = check_servers(tree, report)
    groups = check_groups(tree, servers, report)
    report.check(origin)
    return Config(
        type=top.get("type", "threaded"),
        endpoints=tuple(EndpointConfig(**server) for server in servers),
        groups=MappingProxyType({group["name"]: GroupConfig(**group) for group in groups}),
        runtime_dir=top.get("runtime_dir"),
        processes=top.get("processes"),
        origin=origin,
    )


def _read_text(source: object, report: Report, variable: str = "") -> tuple[str, str]:
    """Return the name and the text of a YAML file that is given by its path, or open."""
    name, problem, text = "stream", "", ""
    try:
        if isinstance(source, (str, os.PathLike)):
            name = _printable(os.fsdecode(source))
            with open(source, "rb") as file:
                data: Any = file.read(_SIZE_LIMIT + 1)
        elif callable(read := getattr(source, "read", None)):
            given = getattr(source, "name", None)
            name = _printable(given) if isinstance(given, str) else name
            data = read(_SIZE_LIMIT + 1)
        else:
            name, data = "source", b""
            problem = f"must be a mapping, the path of a YAML file or an open file, not {show(source)}"
        text = data if isinstance(data, str) else str(data, "utf-8-sig")
    except Exception as error:  # noqa: BLE001 - an open file is the caller's object: it may raise anything
        reason = error.strerror if isinstance(error, OSError) else None
        reason = "it is not text in UTF-8" if isinstance(error, UnicodeDecodeError) else reason
        problem = f"cannot be read: {reason or type(error).__name__}"
        if isinstance(source, str) and "\n" in source:
            problem += "; a string is the path of a file, wrap a text in io.StringIO"
    if len(text) > _SIZE_LIMIT:
        problem = f"is longer than {_SIZE_LIMIT} characters, so it is not a configuration"
    if problem:
        report.add(variable or name, f"names the file {name}, which {problem}" if variable else problem)
        raise report.error(name)
    return name, text


def _read_environment(environ: Mapping[str, str], report: Report) -> Mapping[Any, Any]:
    """Return the tree that the variables describe; problems will name the variable."""
    given = {
        name: value
        for name, value in environ.items()
        if value and (name == "DATABASE_URL" or name.startswith(("DATABASE_URL_", "PGDBPOOL_")))
    }
    names = _group_names(given, report)
    tree: dict[str, Any] = {"db": [], "groups": {name: {} for name in names}}
    if "PGDBPOOL_TYPE" in given:
        tree["type"] = given["PGDBPOOL_TYPE"]
        report.names["type"] = "PGDBPOOL_TYPE"
    if "PGDBPOOL_RUNTIME_DIR" in given:
        tree["runtime_dir"] = given["PGDBPOOL_RUNTIME_DIR"]
        report.names["runtime_dir"] = "PGDBPOOL_RUNTIME_DIR"
    if "PGDBPOOL_PROCESSES" in given:
        from .yaml_file import retype

        tree["processes"] = retype(given["PGDBPOOL_PROCESSES"])
        report.names["processes"] = "PGDBPOOL_PROCESSES"
    _add_servers(tree, given, report)
    _add_keys(tree["groups"], given, environ, report)
    if not names:
        report.add("environment", _NOTHING)
    if not tree["db"]:
        raise report.error("environment")
    return tree


def _group_names(given: Mapping[str, str], report: Report) -> list[str]:
    if "PGDBPOOL_GROUPS" in given:
        source = dict.fromkeys(name.strip() for name in given["PGDBPOOL_GROUPS"].split(","))
        names = {name.lower(): "PGDBPOOL_GROUPS" for name in source}
    else:
        names = {"default": "DATABASE_URL"} if "DATABASE_URL" in given else {}
        for variable in sorted(given):
            if variable.startswith("DATABASE_URL_"):
                names.setdefault(variable.removeprefix("DATABASE_URL_").lower(), variable)
    for name, variable in list(names.items()):
        if not _GROUP_NAME.fullmatch(name) or variable != variable.upper():
            report.add(
                variable, f"{show(name)} cannot name a group: its variables need capitals, digits and _"
            )
            del names[name]
    return list(names)


def _add_servers(tree: dict[str, Any], given: Mapping[str, str], report: Report) -> None:
    """Give each group of the tree its server; groups whose server is the same share it."""
    labels: dict[object, str] = {}
    for group, keys in tree["groups"].items():
        own = f"DATABASE_URL_{group.upper()}"
        variable = own if own in given else "DATABASE_URL"
        if variable not in given:
            report.add("PGDBPOOL_GROUPS", f"the group {group} has no server: set {own} or DATABASE_URL")
            continue
        identity: object = given[variable]
        label = group
        try:
            params = parse_conninfo(given[variable])
            identity, label = frozenset(params.items()), default_label(params)
        except Refused:
            pass  # build() reports it, under the variable's name
        if identity not in labels:
            labels[identity] = f"{label} ({group})" if label in labels.values() else label
            report.names[f"db[{len(tree['db'])}]"] = variable
            tree["db"].append({"conninfo": given[variable], "label": labels[identity]})
        keys["endpoints"] = [labels[identity]]


def _add_keys(
    groups: dict[str, dict[str, Any]], given: Mapping[str, str], environ: Mapping[str, str], report: Report
) -> None:
    """Give each group its keys: first those of every group, then its own."""
    meanings: dict[str, list[tuple[str, str]]] = {}
    for group in ("", *groups):
        for key in _VARIABLE_KEYS:
            variable = "_".join(filter(None, ("PGDBPOOL", group, key))).upper()
            meanings.setdefault(variable, []).append((group, key))
    for variable, readings in meanings.items():
        if variable in given and len(readings) > 1:
            words = " or ".join(f"{key} of {group or 'every group'}" for group, key in readings)
            report.add(variable, f"can be read as {words}; rename the group, or use a file")
        elif variable in given:
            ((group, key),) = readings
            try:
                value = _value(key, given[variable], variable, environ, report)
            except Refused as error:
                report.refused(variable, error)
                continue
            for name in [group] if group else groups:
                groups[name][key] = value
                report.names[f"groups{step(name)}.{key}"] = variable
    others = (
        "PGDBPOOL_CONFIG",
        "PGDBPOOL_GROUPS",
        "PGDBPOOL_TYPE",
        "PGDBPOOL_PROCESSES",
        "PGDBPOOL_RUNTIME_DIR",
    )
    known = {*meanings, *others}
    for variable in sorted(given):
        reserved = variable.startswith(("PGDBPOOL_TEST_", "DATABASE_URL"))
        if not reserved and variable not in known:
            names = f"; the groups are {', '.join(groups)}" if groups else ""
            report.add(variable, f"unknown variable{names}{_meant(variable, known)}")


def _meant(variable: str, known: set[str]) -> str:
    """Return a hint at the intended variable: by another pool's word for a key, or by its letters."""
    key = synonym(variable.removeprefix("PGDBPOOL_"), _VARIABLE_KEYS)
    return f"; did you mean 'PGDBPOOL_{key.upper()}'?" if key else nearest(variable, known)


def _value(key: str, text: str, variable: str, environ: Mapping[str, str], report: Report) -> object:
    """Return the value that a variable gives to a key; raises `Refused` for invalid YAML."""
    from .yaml_file import parse, retype

    if GROUP_KEYS[key].key.kind.mapping and text.lstrip().startswith("{"):
        return parse(text, variable, environ, report)
    return retype(text)


def _printable(name: str) -> str:
    """Return the name of a file, unless it is a URI or the YAML text itself, which may hold a password."""
    return name if name.isprintable() and not may_hold_password(name) else "'***'"


def _caller() -> int:
    """Return the stack level of the first frame outside the package, as `warnings.warn` counts it."""
    level, frame = 1, sys._getframe(1)
    package = __name__.partition(".")[0]
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == package:
        level, frame = level + 1, frame.f_back
    return level

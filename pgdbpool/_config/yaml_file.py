"""The YAML form of a configuration: substitution of variables, scalars, duplicate keys.

Values, but not keys, may have ``${VAR}`` and ``${VAR:-default}`` in them, filled in from the environment; the
default also stands in for an empty variable, and ``$${`` is a literal ``${``. A value that is one ``${...}``
as a whole is read again as a YAML scalar, so that ``port: ${PORT}`` is a number. Within ``{ }``, YAML needs
quotes around it: ``{port: "${PORT}"}``.

Keys that take text (`pass`, `user`, `name`, `host`, `label` and the like) keep it as it is written:
``pass: 0123`` and ``pass: ${PASS}`` are never numbers. Elsewhere numbers are decimal, and dates are text. A
key that occurs twice in one mapping is an error.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from .declarations import Refused, Unreadable, show
from .model import DB_KEYS, GROUP_KEYS, TENANT_KEYS
from .report import Report

_VARIABLE = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\})?")
_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "yes": True, "on": True}
_CONSTANTS |= {"false": False, "no": False, "off": False}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]{0,40})")
_FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.\d+)(e[-+]?\d+)?|[-+]?\d+e[-+]?\d+|[-+]?\.inf|\.nan", re.I | re.ASCII)
_QUOTED = re.compile(r"""b?('[^']*'|"[^"]*")""")
_TEXT_KEYS = {
    name
    for keys in (DB_KEYS, GROUP_KEYS, TENANT_KEYS)
    for name, setting in keys.items()
    if setting.key.kind.text
}
_PLAIN, _STR, _MERGE = "!plain", "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


def read_yaml(text: str, origin: str, environ: Mapping[str, str], report: Report) -> Mapping[Any, Any]:
    """Return the tree that a YAML text describes; raises `ConfigError` if it is not YAML."""
    tree: object = None
    try:
        tree = parse(text, origin, environ, report)
    except Refused as error:
        report.refused(origin, error)
    else:
        if tree is None:
            report.add(origin, "is empty; it must have the keys db and groups")
        elif not isinstance(tree, Mapping):
            report.add(origin, f"must be a mapping with the keys db and groups, not {show(tree)}")
    if not isinstance(tree, Mapping):
        raise report.error(origin)
    return tree


def parse(text: str, origin: str, environ: Mapping[str, str], report: Report) -> object:
    """Return the value of a YAML text; raises `Refused` if it is not valid."""
    try:
        loader = _Loader(text, environ, origin, report)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except RecursionError:
        where, message = "", "is nested too deeply"
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        where, message = f", line {line}, column {column}", "has a character that YAML does not allow"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = _QUOTED.sub(_unquoted, error.problem or "it cannot be parsed")
        message = f"is not valid YAML: {reason}"
    raise Refused((where, message))


def retype(text: str) -> object:
    """Return the value of a plain scalar: null, a boolean, a decimal number, or the text itself.

    YAML 1.1's octal and sexagesimal numbers stay text, and so are refused: 010 is not 8, and 1:30 is not 90.
    """
    plain = text.strip()
    if plain.lower() in _CONSTANTS:
        return _CONSTANTS[plain.lower()]
    if _INTEGER.fullmatch(plain):
        return int(plain.replace("_", ""))
    if _FLOAT.fullmatch(plain):
        return float(plain.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def expand(text: str, environ: Mapping[str, str]) -> str | Unreadable:
    """Return a string with its variables filled in, or why that cannot be done."""
    reasons: list[str] = []

    def value(match: re.Match[str]) -> str:
        name, default = match[1], match[2]
        if match[0] == "$${":
            return "${"
        if name is None:
            reasons.append("has a ${ that begins no ${VAR} or ${VAR:-default}; write $${ for a literal ${")
            return ""
        if default is not None:
            return environ.get(name) or default
        if name not in environ:
            reasons.append(f"the variable {name} is not set; set it, or write ${{{name}:-default}}")
        return environ.get(name, "")

    expanded = _VARIABLE.sub(value, text)
    return Unreadable("; ".join(reasons)) if reasons else expanded


def _unquoted(match: re.Match[str]) -> str:
    """Hide a parser's quotation, which may be a password, unless it is a character or a token's name."""
    inner = match[1][1:-1]
    return match[0] if re.fullmatch(r".|\\.|<[a-z ]+>", inner) else "'***'"


class _Loader(yaml.SafeLoader):
    """A SafeLoader with the rules of this module."""

    def __init__(self, text: str, environ: Mapping[str, str], origin: str, report: Report) -> None:
        super().__init__(text)
        self.environ = environ
        self.origin = origin
        self.report = report

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        """Leave plain scalars to `construct_text`, which sees them as they were written."""
        if kind is yaml.ScalarNode and implicit[0]:
            return _MERGE if value == "<<" else _PLAIN
        return super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Report duplicate keys; here, because a merge (<<) adds keys to the node later."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    message = f"the key {show(key.value)} stands in line {lines[key.value]} already"
                    self.report.add(f"{self.origin}, line {line}", message)
                lines.setdefault(key.value, line)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError):
            # SafeLoader's own constructors raise these for a value that does not fit its explicit tag.
            problem = "found a value that does not fit its tag"
        raise _bad(node, problem)

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _bad(node, "found a value that does not fit its tag")
        self.flatten_mapping(node)
        mapping: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag in (_PLAIN, _STR):
                key = retype(key_node.value) if key_node.tag == _PLAIN else key_node.value
            else:
                key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _bad(key_node, "found a key that is a list or a mapping")
            if key in _TEXT_KEYS and value_node.tag in (_PLAIN, _STR):
                null = value_node.tag == _PLAIN and retype(value_node.value) is None
                mapping[key] = None if null else expand(value_node.value, self.environ)
            else:
                mapping[key] = self.construct_object(value_node, deep)
        return mapping

    def construct_text(self, node: yaml.ScalarNode) -> Any:
        value = expand(node.value, self.environ)
        as_written = node.tag == _PLAIN and value == node.value
        if isinstance(value, str) and (as_written or _VARIABLE.fullmatch(node.value)):
            return retype(value)
        return value


def _bad(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_Loader.add_constructor(_PLAIN, _Loader.construct_text)
_Loader.add_constructor(_STR, _Loader.construct_text)

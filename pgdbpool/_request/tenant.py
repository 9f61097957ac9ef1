"""Tenants and local settings: the value bound to each server setting, and its origin.

A value is always a parameter of `set_config(name, value, true)` and never part of a statement's
text; the setting's name comes from the configuration.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from .._util.client_settings import SETTING_NAME, why_refused
from .._util.scoped_value import Binding, Scope, Variable, current
from .._util.transaction_modes import canonical, is_mode, mode_value
from ..errors import SettingError, TenantConflictError, TenantRequiredError

if TYPE_CHECKING:
    from .._config.model import TenantConfig

Bound = tuple[tuple[str, str], ...]
"""Settings and their values, in order."""

_current: Variable[Any] = ContextVar("pgdbpool_tenant", default=None)


def tenant(value: Any) -> Scope[Any]:
    """Set the current tenant inside the `with` block, for every Handler without `tenant=`.

    It is a context variable: a new thread does not inherit it, `contextvars.copy_context()` passes it on.

    :param value: a value for `Handler(group, tenant=...)`, or None for no tenant.
    """
    return Scope(_current, lambda: value)


def set_current(value: Any) -> None:
    """Set the current tenant for the rest of this context, such as a request's."""
    _current.set(Binding(value))


def current_tenant() -> Any:
    """Return the current tenant, or None."""
    return current(_current)


def bind_tenant(config: TenantConfig | None, group: str, explicit: Any, override: bool) -> Bound:
    """Return the tenant's settings for a block, each with its checked value.

    If no tenant is given and none is required, each setting is bound to the empty string. So a value that
    an earlier block left in the session is never taken for a tenant.

    :raises TenantRequiredError: the group requires a tenant, and none is given or current.
    :raises TenantConflictError: the explicit one is not the current one, and `override` is not set.
    :raises SettingError: a value is not of the configured type.
    """
    if config is None:
        if explicit is not None:
            raise SettingError(
                f"group {group!r} has no tenant setting: remove tenant=, or configure `tenant`"
            )
        return ()
    here = current(_current)
    chosen = here if explicit is None else explicit
    if chosen is None:
        if config.required:
            raise TenantRequiredError(
                f"group {group!r} requires a tenant: pass Handler({group!r}, tenant=...), or make one "
                "current with pgdbpool.tenant(...)"
            )
        return tuple((name, "") for name in config.settings)
    bound = _values(config, group, chosen)
    if explicit is not None and here is not None and not override and _values(config, group, here) != bound:
        raise TenantConflictError(
            f"group {group!r}: the block's tenant is not the current one; pass tenant_override=True "
            "if that is intended"
        )
    return bound


def _values(config: TenantConfig, group: str, given: Any) -> Bound:
    names = list(config.settings)
    if not isinstance(given, Mapping):
        if len(names) != 1:
            raise SettingError(
                f"group {group!r} has the tenant settings {', '.join(names)}: pass a mapping of them"
            )
        given = {names[0]: given}
    if set(given) != set(names):
        raise SettingError(
            f"group {group!r}: the tenant has the settings {', '.join(map(repr, given))}, "
            f"the configuration {', '.join(map(repr, names))}"
        )
    return tuple((name, tenant_value(name, given[name], *config.settings[name])) for name in names)


def tenant_value(name: str, value: Any, kind: str, pattern: str | None = None) -> str:
    """Return the tenant's value as text, checked against its type (uuid, int, text, regex)."""
    try:
        if kind == "uuid":
            from uuid import UUID  # its import takes as long as that of a fifth of this package

            return UUID.__str__(value if isinstance(value, UUID) else UUID(value))
        if kind == "int":
            digits = None if isinstance(value, bool) else plain_text(value)
            if digits is None or not re.fullmatch(r"-?[0-9]{1,19}", digits):
                raise ValueError
            return str(int(digits))
        text = setting_value(name, value)
    except (ValueError, TypeError, AttributeError):
        raise SettingError(f"tenant setting {name!r}: {_shown(value)} is not a valid {kind}") from None
    if kind == "regex" and not re.fullmatch(pattern or "", text):
        raise SettingError(f"tenant setting {name!r}: {_shown(value)} does not match {pattern!r}")
    if not text:
        raise SettingError(f"tenant setting {name!r}: an empty value is not a tenant; pass None instead")
    return text


def bind_settings(settings: Mapping[str, Any]) -> Bound:
    """Return local settings with their values as text.

    :raises SettingError: a name is not a valid server setting name, or a value is neither text nor a number.
    """
    for name, value in settings.items():
        if not isinstance(name, str) or not SETTING_NAME.fullmatch(name):
            raise SettingError(
                f"{_shown(name)} is not a valid server setting name, such as statement_timeout or app.x"
            )
        if reason := why_refused(name, value):
            raise SettingError(f"setting {name!r} {reason}")
    bound = tuple(_bind(name, setting_value(name, value)) for name, value in settings.items())
    modes = [name for name, _ in bound if is_mode(name)]
    if twice := sorted({name for name in modes if modes.count(name) > 1}):
        raise SettingError(f"setting {twice[0]!r} is given twice, under different names: keep one")
    return bound


def _bind(name: str, value: str) -> tuple[str, str]:
    """Return a setting as it is bound: a transaction mode by its canonical name and PostgreSQL's value."""
    if not is_mode(name):
        return name, value
    try:
        return canonical(name), mode_value(name, value)
    except ValueError as error:
        raise SettingError(f"setting {name!r}: {_shown(value)} is not {error}") from None


def is_uuid(kind: type[Any]) -> bool:
    """Return whether a type is UUID itself; no such value exists before the module is imported."""
    module = sys.modules.get("uuid")
    return module is not None and kind is module.UUID


def plain_text(value: Any) -> str | None:
    """Return a value as psycopg sends it as a parameter; None if it is neither text, a number nor a UUID.

    A subclass (an enumeration) may override `str()`; the base type's text is used.
    """
    for kind, text in (str, str.__str__), (int, int.__repr__), (float, float.__repr__):
        if isinstance(value, kind):
            return text(value)
    for module, name in ("uuid", "UUID"), ("decimal", "Decimal"):
        base: Any = getattr(sys.modules.get(module), name, None)
        if base is not None and isinstance(value, base):
            return str(base.__str__(value))
    return str(value.__index__()) if hasattr(type(value), "__index__") else None  # of numpy


def setting_value(name: str, value: Any) -> str:
    """Return a setting's value as PostgreSQL reads it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    text = plain_text(value)
    if text is None:
        raise SettingError(f"setting {name!r}: {_shown(value)} is neither text nor a number")
    if "\0" in text:
        raise SettingError(
            f"setting {name!r}: {_shown(value)} contains a NUL, which PostgreSQL does not allow in text"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SettingError(f"setting {name!r}: {_shown(value)} cannot be encoded") from None
    return text


_UNITS = {"": 1, "us": 0.001, "ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}


def milliseconds(text: str) -> float | None:
    """Return a time setting's value in milliseconds, or None if it is not valid.

    https://www.postgresql.org/docs/current/config-setting.html#CONFIG-SETTING-NAMES-VALUES
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([a-z]*)\s*", text)
    if match is None or match[2] not in _UNITS:
        return None
    return float(match[1]) * _UNITS[match[2]]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

"""Django's system checks of the settings of a database."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from django.apps import apps
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.backends.base.validation import BaseDatabaseValidation
from django.db.utils import Error

from ...errors import ConfigError
from ...errors import Error as PoolError
from . import _groups
from ._hold import HOLDS

_NOT_WITH_A_FILE = ("HOST", "PORT", "USER", "PASSWORD")
_KINDS = {"error": checks.Error, "warning": checks.Warning}


def contradictions(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the contradictions in a database's settings, each with the remedy."""
    return list(_contradictions(settings))


def _age(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if settings["CONN_MAX_AGE"] != 0:
        yield (
            "CONN_MAX_AGE keeps a connection from the pool.",
            "Remove it; `max_lifetime` of the group replaces old connections.",
        )


def _contradictions(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    options = settings["OPTIONS"]
    if options.get("pool"):
        yield (
            "OPTIONS['pool'] is a second pool.",
            "Remove it; `connection_count` and `min_size` are the sizes of the group.",
        )
    if (hold := options.get("hold", HOLDS[0])) not in HOLDS:
        yield (f"OPTIONS['hold'] is {hold!r}.", f"Set it to {' or '.join(map(repr, HOLDS))}.")
    if options.get("config") is None:
        if "group" in options:
            yield (
                "OPTIONS['group'] names a group of no configuration.",
                "Set OPTIONS['config'], or remove it.",
            )
        return
    if wrong := [name for name in _NOT_WITH_A_FILE if settings.get(name)]:
        yield (f"{', '.join(wrong)} can't be set beside OPTIONS['config'].", "Set them in its `db`.")
    if wrong := sorted(_groups.own_options(options) - set(_groups.OWN_OPTIONS)):
        yield (f"OPTIONS has {', '.join(wrong)} beside `config`.", "Set them in the file's group.")


def check_settings(app_configs: Any = None, **kwargs: Any) -> list[checks.CheckMessage]:
    """Report the contradictions in the settings of the databases that use this backend."""
    found: list[checks.CheckMessage] = []
    for alias in connections:
        if connections.settings[alias]["ENGINE"] == __package__:
            found += _errors(alias, connections[alias].settings_dict)
    return found


def _errors(alias: str, given: Mapping[str, Any]) -> list[checks.CheckMessage]:
    return [
        checks.Error(f"DATABASES[{alias!r}]: {what}", hint=remedy, id="pgdbpool.E001")
        for what, remedy in (*_age(given), *_contradictions(given))
    ]


checks.register(check_settings)


class DatabaseValidation(BaseDatabaseValidation):  # type: ignore[misc]
    """The checks of `manage.py check --database`."""

    def check(self, **kwargs: Any) -> list[checks.CheckMessage]:
        """Report the findings of `pgdbpool check` on the group and its servers, except mere hints."""
        return [*super().check(**kwargs), *self._findings()]

    def _findings(self) -> list[checks.CheckMessage]:
        if wrong := _errors(self.connection.alias, self.connection.settings_dict):
            known = apps.ready and apps.is_installed(str(__package__))  # then `check_settings` reports it
            return [] if known else wrong
        from ..._diagnosis.advice import advise  # no request needs it
        from ..._diagnosis.inspection import inspect

        try:
            config = _groups.alone(self.connection.find_group())
            findings = advise(config, inspect(config))
        except (Error, PoolError, ConfigError, ImproperlyConfigured) as error:
            return [checks.Error(f"{self.connection.alias}: {error}", id="pgdbpool.E002")]
        return [
            _KINDS[each.severity](
                f"{self.connection.alias}: {each.subject}: {each.message}",
                hint=each.remedy,
                id=f"pgdbpool.{each.code}",
            )
            for each in findings
            if each.severity in _KINDS
        ]

"""The application for INSTALLED_APPS, with which `manage.py check` also examines the settings."""

from __future__ import annotations

from django.apps import AppConfig


class PgDbPoolConfig(AppConfig):  # type: ignore[misc]
    """It has no models; it registers the checks of the settings."""

    name = "pgdbpool.contrib.django"
    label = "pgdbpool"
    verbose_name = "pgdbpool"

    def ready(self) -> None:
        """Register the checks."""
        from . import _checks  # noqa: F401  it needs the settings

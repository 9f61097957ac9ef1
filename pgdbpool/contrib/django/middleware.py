"""The tenant of a request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

from ..._request.tenant import tenant


class TenantMiddleware:
    """Bind the tenant that `settings.PGDBPOOL_TENANT` returns for a request; None for none.

    The setting is a callable that takes the request, or the dotted name of one. Place this middleware after
    the one that the callable needs, such as Django's for authentication.
    """

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        extract = getattr(settings, "PGDBPOOL_TENANT", None)
        if isinstance(extract, str):
            extract = import_string(extract)
        if not callable(extract):
            raise ImproperlyConfigured(
                f"PGDBPOOL_TENANT is {extract!r}: set it to a callable, or the dotted name of one"
            )
        self.get_response, self.extract = get_response, extract

    def __call__(self, request: Any) -> Any:
        """Answer the request under its tenant."""
        with tenant(self.extract(request)):
            return self.get_response(request)

"""The errors for names that the configuration does not have."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import UnconfiguredGroupError, UnknownEndpointError


def unknown_group(name: object, groups: Iterable[str]) -> UnconfiguredGroupError:
    """Return the error for a group that is not configured."""
    return UnconfiguredGroupError(
        f"no group {name!r} is configured; the groups are {', '.join(map(repr, groups))}"
    )


def unknown_endpoint(label: object, labels: Iterable[str]) -> UnknownEndpointError:
    """Return the error for an endpoint that is not configured."""
    from .._config.declarations import show

    return UnknownEndpointError(
        f"no endpoint {show(label)} is configured; the endpoints are {', '.join(map(repr, labels))}"
    )

"""The ways to reach PostgreSQL that are compared, and how each of their processes is told which it is."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

SIZE = 4
TIMEOUT = 10
"""Connections of each pool, and seconds that a request waits for one; the same for all."""
CONNECT_TIMEOUT = 3


class Way(NamedTuple):
    """A framework with a pool."""

    label: str
    site: str
    """The module with the operations and the application."""
    own: bool
    """Whether the connections are those of a group."""
    checks: bool = False
    """Whether the framework checks a connection before each use."""
    hold: str = "request"
    atomic: bool = False
    """Whether each request is a transaction (`ATOMIC_REQUESTS`)."""


WAYS = {
    "sqlalchemy": Way("SQLAlchemy, its pool with pre-ping", "sqlalchemy_site", own=False, checks=True),
    "sqlalchemy-own": Way("SQLAlchemy over pgdbpool", "sqlalchemy_site", own=True),
    "django": Way("Django, its pool", "django_site", own=False),
    "django-checks": Way("Django, its pool with health checks", "django_site", own=False, checks=True),
    "django-own": Way("Django over pgdbpool", "django_site", own=True),
    "django-own-transaction": Way(
        'Django over pgdbpool, "hold": "transaction"', "django_site", own=True, hold="transaction"
    ),
    "django-checks-atomic": Way(
        "Django, its pool with health checks, ATOMIC_REQUESTS", "django_site", False, checks=True, atomic=True
    ),
    "django-own-atomic": Way("Django over pgdbpool, ATOMIC_REQUESTS", "django_site", own=True, atomic=True),
}
INTERRUPTED = (
    "sqlalchemy",
    "sqlalchemy-own",
    "django",
    "django-checks",
    "django-own",
    "django-own-transaction",
)
"""Those that are driven by HTTP while servers fail."""


def environment(name: str, servers: list[dict[str, Any]]) -> dict[str, str]:
    """Return what a process of the way needs in its environment."""
    return {"DOORS_WAY": name, "DOORS_SERVERS": json.dumps(servers)}


def own() -> tuple[Way, list[dict[str, Any]]]:
    """Return the way of this process, and its servers."""
    return WAYS[os.environ["DOORS_WAY"]], json.loads(os.environ["DOORS_SERVERS"])


def hosts(servers: list[dict[str, Any]], role: str) -> dict[str, str]:
    """Return libpq's parameters for one of the servers, that of a role if there are several."""
    found = {
        "host": ",".join(server["host"] for server in servers),
        "port": ",".join(str(server["port"]) for server in servers),
    }
    if len(servers) > 1:
        found["target_session_attrs"] = "read-write" if role == "write" else "prefer-standby"
        found["load_balance_hosts"] = "disable" if role == "write" else "random"
    return found


def groups() -> dict[str, dict[str, Any]]:
    """Return the groups of the pools."""
    common = {"connection_count": SIZE, "timeout": TIMEOUT, "connect_timeout": CONNECT_TIMEOUT}
    return {
        "write": {**common, "target": "primary", "autocommit": False},
        "read": {**common, "target": "prefer-standby", "settings": {"default_transaction_read_only": "on"}},
    }

"""The contents of a connection service file of libpq (https://www.postgresql.org/docs/current/libpq-pgservice.html)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from psycopg.conninfo import make_conninfo
from psycopg.pq import ConninfoOption, PGconn


def decoded(options: Iterable[ConninfoOption]) -> dict[str, str]:
    """Return the parameters of libpq that have a value."""
    # Some values may not be in UTF-8, but the ones used here are.
    return {o.keyword.decode(): o.val.decode(errors="surrogateescape") for o in options if o.val}


def service_of(given: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameters of the given service, or of ``PGSERVICE``; nothing without one."""
    name = given.get("service") or os.environ.get("PGSERVICE")
    return with_service({"service": str(name)}) if name else {}


def with_service(params: dict[str, str]) -> dict[str, str]:
    """Return the parameters completed from the service file, which libpq reads when it connects."""
    # It reads all parameters before it refuses one, and connects to nothing.
    pgconn = PGconn.connect_start(make_conninfo("", **{**params, "channel_binding": "nothing"}).encode())
    try:
        found = decoded(pgconn.info)
    finally:
        pgconn.finish()
    found.pop("channel_binding", None)
    return found

"""An application for tests of start-ups: `/read` and `/write` ask a server each, `/slow` takes a second."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import psycopg

from pgdbpool import Connection, Handler

SERVER = {"host": "127.0.0.1", "user": "postgres", "name": os.environ.get("DATABASE", "postgres")}

Connection.init(
    {
        "type": os.environ.get("POOL_TYPE", "threaded"),
        "db": [
            {**SERVER, "label": "primary", "port": int(os.environ["PRIMARY_PORT"])},
            {**SERVER, "label": "standby", "port": int(os.environ["STANDBY_PORT"])},
        ],
        "groups": {
            "read": {"endpoints": ["standby"], "connection_count": 2},
            "write": {"target": "primary", "connection_count": 2, "autocommit": False},
        },
    }
)


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer with the process that did it, or 503 with the error's class."""
    path = environ["PATH_INFO"].strip("/")
    try:
        with Handler("write" if path == "write" else "read") as db:
            db.query("SELECT pg_sleep(%s)", (1.0 if path == "slow" else 0,))
    except psycopg.OperationalError as error:
        start_response("503 Service Unavailable", [("Content-Type", "text/plain")])
        return [f"{type(error).__name__}: {error}".encode()]
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]

"""An application for tests of process models: it answers what it was asked, by way of the database.

Its pools are used while the module is loaded, which is in the parent where the server forks after that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

from pgdbpool import Connection, Handler

SIZE = 4

Connection.init(
    {
        "type": os.environ.get("POOL_TYPE", "threaded"),
        "db": {
            "host": "127.0.0.1",
            "port": int(os.environ["NODE_PORT"]),
            "user": "postgres",
            "name": "postgres",
            "query_timeout": 60_000,
            "options": json.loads(os.environ.get("SERVER_OPTIONS", "{}")),
        },
        "groups": {
            "auto": {"connection_count": SIZE},
            "manual": {"connection_count": SIZE, "autocommit": False},
        },
    }
)


def backends() -> list[int]:
    """Use each connection of the process once; return their backends."""
    found = []
    for group in ("auto", "manual"):
        blocks = [Handler(group).__enter__() for _ in range(SIZE)]
        for number, db in enumerate(blocks):
            token = f"{os.getpid()} {group} {number}"
            backend, answer = db.query("SELECT pg_backend_pid(), %s::text", (token,)).fetchone()
            assert answer == token, (answer, token)
            found.append(backend)
        for db in blocks:
            db.__exit__(None, None, None)
    return found


LOADED_BY, LOADED_WITH = os.getpid(), backends()


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer `?token=`, after `?sleep=` seconds at the server, with who has served it."""
    query = {name: values[0] for name, values in parse_qs(environ.get("QUERY_STRING", "")).items()}
    used, answers = [], []
    for group in ("auto", "manual"):
        with Handler(group) as db:
            if group == "auto" and "sleep" in query:
                db.query("SELECT pg_sleep(%s)", (float(query["sleep"]),))
            backend, answer = db.query(
                "SELECT pg_backend_pid(), %s::text", (query.get("token", ""),)
            ).fetchone()
            used.append(backend)
            answers.append(answer)
    body = {"pid": os.getpid(), "backends": used, "tokens": answers, "loaded": [LOADED_BY, LOADED_WITH]}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(body).encode()]

"""A WSGI application, the same over each pool: a request is one operation of a peer, by the path's name.

It is run in the directory of this file, as `worker.py` is. `BENCH_PEER` and `BENCH_SERVERS` say over what.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

from peers import PEERS

SIZE = 4
"""Connections of the pool: as many as a worker has threads."""
peer = PEERS[os.environ["BENCH_PEER"]](json.loads(os.environ["BENCH_SERVERS"]), SIZE)


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer with what the operation has read."""
    body = json.dumps(list(peer.operation(environ["PATH_INFO"].strip("/"))())).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]

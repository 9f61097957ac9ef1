"""A Patroni that is configured and does not answer stops nothing; `tests/surroundings` has real ones."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from time import monotonic
from typing import Any

import pytest
from support import closed_port, config, server

from pgdbpool import ConfigError, Connection, Handler, TargetUnavailableError

pytestmark = pytest.mark.slow


@pytest.fixture(params=["refuses", "hangs", "speaks no HTTP"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "refuses":
        yield f"http://127.0.0.1:{closed_port()}"
        return
    scheme = "https" if request.param == "speaks no HTTP" else "http"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield f"{scheme}://127.0.0.1:{silent.getsockname()[1]}"


def test_a_patroni_that_does_not_answer_stops_nothing(known_cluster: Any, mode: str, url: str) -> None:
    nodes = known_cluster.standbys
    servers = [server(node, patroni=url, label=f"db-{number}") for number, node in enumerate(nodes)]
    groups = {"read": {}, "write": {"target": "primary", "connection_count": 1, "timeout": 20}}
    Connection.init(config(servers, mode, **groups), wait=False)
    try:
        began = monotonic()
        for _ in range(5):
            with pytest.raises(TargetUnavailableError), Handler("write"):
                pass
            with Handler("read") as db:
                assert db.fetchval("SELECT 1") == 1
        assert monotonic() - began < 4
    finally:
        Connection.reset()


@pytest.mark.parametrize(
    "url", ["pg1:8008", "ftp://pg1", "http://", "http://pg1:0", "http://pg1:x", "http://me:hidden@pg1"]
)
def test_an_address_that_is_not_a_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"db\.patroni: must be the URL of an HTTP server") as caught:
        Connection.init({"db": {"host": "a", "patroni": url}, "groups": {"g": {}}}, wait=False)
    assert "hidden" not in str(caught.value)

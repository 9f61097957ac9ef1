"""The start-up probe asks where libpq would connect to."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from support import closed_port, server

from pgdbpool.config import Config
from pgdbpool.endpoint import Endpoint
from pgdbpool.probe import StartupProbe
from pgdbpool.sources import load


def endpoint_config(**entry: Any) -> Any:
    config: Config = load({"db": entry, "groups": {"g": {"connection_count": 1}}})
    return Endpoint(config.endpoints[0]).config


def probe(config: Any) -> StartupProbe:
    asked = StartupProbe(config)
    asked.run(5)
    return asked


def test_the_server_of_a_service_file_is_the_one_that_is_asked(
    known_cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    node = known_cluster.primary
    services = tmp_path / "services.conf"
    services.write_text(f"[mine]\nhost={node.host}\nport={node.port}\nuser=postgres\ndbname=postgres\n")
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    config = endpoint_config(conninfo="service=mine")
    assert probe(config).accepting
    services.write_text(services.read_text().replace(f"port={node.port}", f"port={closed_port()}"))
    refused = probe(config)
    assert not refused.accepting
    assert "refused" in refused.reason


def test_the_next_address_of_a_name_is_asked_when_one_refuses(
    known_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = known_cluster.primary
    stream = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    resolved = [(*stream, ("127.0.0.9", node.port)), (*stream, (node.host, node.port))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: list(resolved))
    config = endpoint_config(**server(node, host="db.example"))
    assert probe(config).accepting
    del resolved[1]
    assert "refused" in probe(config).reason

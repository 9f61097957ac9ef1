"""The start-up probe asks where libpq would connect to."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from support import closed_port, server, wait_for
from tls_front import TlsFront

import pgdbpool
from pgdbpool import Connection, Handler
from pgdbpool._config.load import load
from pgdbpool._config.model import Config
from pgdbpool._servers.endpoint import Endpoint
from pgdbpool._servers.startup_probe import StartupProbe
from pgdbpool.cluster import Cluster

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")


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


@pytest.fixture(scope="module")
def encrypted() -> Iterator[Cluster]:
    """A server with a certificate of its own."""
    with Cluster(standbys=0, bin_dir=DEBIAN_15, tls=True) as cluster:
        yield cluster


@pytest.fixture
def front(encrypted: Cluster, request: pytest.FixtureRequest) -> Iterator[TlsFront]:
    """A front that takes TLS alone, at once or after an SSLRequest."""
    node, certificate = encrypted.primary, encrypted.tls_certificate
    key = certificate.with_name("server.key")
    found = TlsFront((node.host, node.port), certificate, key, direct=request.param == "direct")
    yield found
    found.close()


@pytest.mark.slow
@pytest.mark.parametrize("front", ["direct", "postgres"], indirect=True)
def test_a_server_behind_a_front_for_tls_alone_comes_back(
    front: TlsFront, encrypted: Cluster, mode: str, request: pytest.FixtureRequest
) -> None:
    negotiation = request.node.callspec.params["front"]
    if negotiation == "direct" and psycopg.pq.version() < 170000:
        pytest.skip("libpq before 17")
    root = encrypted.tls_certificate
    entry = {
        "conninfo": f"host=localhost hostaddr=127.0.0.1 port={front.port} sslnegotiation={negotiation} "
        f"sslmode=verify-full sslrootcert={root} user=postgres dbname=postgres"
    }
    Connection.init({"type": mode, "db": entry, "groups": {"g": {"connection_count": 1}}})
    try:
        use()
        front.stop()
        with pytest.raises(pgdbpool.DBOfflineError):
            use()
        front.open = True
        wait_for(works, 5)
        assert not front.in_clear
    finally:
        Connection.reset()


@pytest.mark.slow
def test_no_name_is_sent_to_a_server_whose_certificate_is_not_trusted(
    encrypted: Cluster, proxy_to: Any, tmp_path: Path
) -> None:
    proxy = proxy_to(encrypted.primary)
    for host, says in {
        "localhost": "accepting sessions",
        "127.0.0.1": "accepting|mismatch|not valid",
    }.items():
        entry = {
            "host": host, "port": proxy.port, "user": "somebody", "name": "postgres", "ssl": "verify-full",
            "sslrootcert": str(encrypted.tls_certificate),
        }  # fmt: skip
        found = probe(endpoint_config(**entry))
        assert found.accepting
        assert re.search(says, found.reason)
    another = tmp_path / "root.crt"
    with Cluster(standbys=0, bin_dir=DEBIAN_15, tls=True) as other:
        another.write_bytes(other.tls_certificate.read_bytes())
    found = probe(endpoint_config(**{**entry, "host": "localhost", "sslrootcert": str(another)}))
    assert found.accepting  # it is there, and the connect says what is wrong with it
    assert "certificate verify failed" in found.reason


def test_a_refused_login_is_an_answer(known_cluster: Any) -> None:
    node = known_cluster.primary
    for ssl in ("prefer", "disable", "require"):  # which this server has none of
        assert probe(endpoint_config(**server(node, ssl=ssl, user="nobody"))).accepting


@pytest.mark.slow
@pytest.mark.parametrize("answers", ["first", "second"])
def test_the_servers_that_a_service_lists_come_back_after_an_outage(
    known_cluster: Any,
    proxy_to: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    mode: str,
    answers: str,
) -> None:
    proxy, closed = proxy_to(known_cluster.primary), closed_port()
    ports = (proxy.port, closed) if answers == "first" else (closed, proxy.port)
    services = tmp_path / "services.conf"
    services.write_text(
        f"[mine]\nhost=127.0.0.1,localhost\nport={ports[0]},{ports[1]}\nuser=postgres\ndbname=postgres\n"
    )
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    entry = {"conninfo": "service=mine"}
    Connection.init({"type": mode, "db": entry, "groups": {"g": {"connection_count": 1}}})
    try:
        use()
        proxy.stop()
        with pytest.raises(pgdbpool.DBOfflineError):
            use()
        proxy.start()
        wait_for(works, 5)
        services.write_text(services.read_text().replace("host=127.0.0.1,localhost", "host=localhost"))
        proxy.reset_all()
        with pytest.raises(pgdbpool.DBConnectionError, match="2 port numbers are given, and 1 hosts"):
            use()
        assert Connection.status().endpoints["mine"].state == "up"
    finally:
        Connection.reset()


def use() -> None:
    with Handler("g") as db:
        db.query("SELECT 1")


def works() -> bool:
    try:
        use()
    except pgdbpool.DBConnectionError:
        return False
    return True


def test_a_service_file_fills_in_keys_left_out(
    known_cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str
) -> None:
    node = known_cluster.primary
    services = tmp_path / "services.conf"
    services.write_text(
        f"[mine]\nhost={node.host}\nport={node.port}\nuser=postgres\ndbname=postgres\nconnect_timeout=7\n"
        "keepalives_idle=77\noptions=-c search_path=pg_temp -c work_mem=3MB\n"
    )
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    monkeypatch.setenv("PGOPTIONS", "-c work_mem=5MB")
    asked = "SELECT current_setting('search_path'), current_setting('work_mem'), current_setting('jit')"
    for own, idle, timeout in (({}, "77", 7.0), ({"keepalives_idle": 20, "connect_timeout": 3}, "20", 3.0)):
        entry = {"conninfo": "service=mine", "options": {"jit": "off"}, **own}
        Connection.init({"type": mode, "db": entry, "groups": {"g": {"connection_count": 1}}})
        try:
            with Handler("g") as db:
                assert tuple(db.query(asked).fetchone()) == ("pg_temp", "3MB", "off")
                used = {o.keyword.decode(): o.val.decode() for o in db.connection.pgconn.info if o.val}
            assert used["keepalives_idle"] == idle
            assert used["keepalives_count"] == "3"
            assert Connection.group("g").endpoints[0].config.connect_timeout == timeout
        finally:
            Connection.reset()

"""A server's name is resolved for each connection, and a silent name server stops nothing else."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import name_server
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def run(known_cluster: Any, mode: str, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """A function that runs a scenario of `name_server`, and returns what it found."""
    conf = tmp_path / "resolv.conf"
    address = f"127.77.{random.randrange(256)}.{random.randrange(1, 255)}"  # whoever else runs this suite
    conf.write_text(name_server.RESOLV_CONF.format(address))
    bind = f"mount --bind {conf} /etc/resolv.conf"
    own = ["unshare", "--mount", "sh", "-c"]
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind((address, 53))
    except OSError:
        pytest.skip("no port 53 for this user on this machine")
    if not shutil.which("unshare") or subprocess.run([*own, bind]).returncode:
        pytest.skip("no /etc/resolv.conf of one's own on this machine")

    def scenario(name: str) -> dict[str, Any]:
        port = str(known_cluster.primary.port)
        script = [sys.executable, name_server.__file__, name, mode, port, address]
        command = [*own, f'{bind} && exec "$@"', "sh", *script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        print(found)
        return found

    return scenario


def test_while_no_name_is_resolved_new_connections_go_to_the_last_addresses(
    run: Callable[[str], dict[str, Any]],
) -> None:
    found = run("silent-later")
    assert found["second"][1] == found["third"][1] == ""
    assert found["state"] == "up"
    (warning,) = found["warnings"]
    assert "endpoint db: its last addresses are used: host 'db.test' is not resolved: " in warning
    assert found["pulse"] < 0.4  # no other thread waits for it
    assert 0.2 <= found["second"][0] < 1.2
    assert found["third"][0] < 0.2  # it is being asked for all along


def test_a_forked_child_knows_the_last_addresses(run: Callable[[str], dict[str, Any]]) -> None:
    seconds, error = run("forked")["first"]
    assert error == ""
    assert seconds < 1.2


def test_a_name_that_was_never_resolved_is_a_server_that_is_down(
    run: Callable[[str], dict[str, Any]],
) -> None:
    found = run("silent-first")
    seconds, error = found["first"]
    assert error.startswith("DBOfflineError")
    assert "host 'db.test': no address within 0.5 s" in error
    assert seconds < 1.5
    assert found["then"][0] < 0.4  # the probes wait for it, and no request
    assert found["state"] in ("down", "probing")
    assert found["pulse"] < 0.4


def test_a_name_that_no_longer_resolves_is_a_server_that_is_down(
    run: Callable[[str], dict[str, Any]],
) -> None:
    found = run("gone")
    assert "DBOfflineError" in found["second"][1]
    assert "failed to resolve host 'db.test'" in found["second"][1]
    assert found["state"] in ("down", "probing")


def test_a_named_server_that_was_away_is_used_by_the_first_request_after_its_return(
    run: Callable[[str], dict[str, Any]],
) -> None:
    found = run("away")
    assert found["refused"][1].startswith("DBOfflineError")
    assert found["then"][1] == ""
    assert found["then"][0] < 1.5
    assert found["state"] == "up"


def test_a_silent_address_of_a_name_costs_its_share_of_the_time_once(
    run: Callable[[str], dict[str, Any]],
) -> None:
    found = run("silent-address")
    assert found["names"] == ["127.0.0.1", "127.0.0.2"]
    assert found["began"][1] == ""
    assert 1.0 < found["began"][0] < 2.9  # half of `connect_timeout`
    assert found["then"][1] == ""
    assert found["then"][0] < 1.0  # the one that worked comes first
    assert found["state"] == "up"

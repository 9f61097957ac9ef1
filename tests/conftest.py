"""Fixtures: a cluster for all tests, put back to a known state for each that asks, and proxies to it."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from known import VERSION_VARIABLE, leave, restore
from proxy import Proxy

import pgdbpool
from pgdbpool.cluster import Cluster, ClusterError, Node


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the tests that take long")
    parser.addoption(
        "--surroundings", action="store_true", help="also run the tests with Patroni, Apache, Prometheus ..."
    )
    parser.addoption("--pictures", action="store_true", help="take the pictures of the status page for doc/")


MEMORY = Path("/dev/shm")
ROOM_NEEDED = 8 << 30
"""Bytes; a whole run in four processes takes a third of that."""


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        _keep_servers_in_memory(config)
    # What `nohup` and a shell's `&` ignore is ignored in every program that a test starts, too. What has a
    # handler here has the default there.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    config.addinivalue_line("markers", "slow: takes more than half a second; `-m 'not slow'` leaves it out")
    config.addinivalue_line("markers", "long: takes long; runs with --long only")
    config.addinivalue_line("markers", "surroundings: runs other programs; runs with --surroundings only")


def _keep_servers_in_memory(config: pytest.Config) -> None:
    """Have temporary files but pytest's own made in memory, if there is room: servers create thousands."""
    if "TMPDIR" in os.environ:
        return
    if not os.access(MEMORY, os.W_OK) or shutil.disk_usage(MEMORY).free < ROOM_NEEDED:
        return
    if os.statvfs(MEMORY).f_flag & os.ST_NOEXEC:  # tests install programs, and run them
        return
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    place = tempfile.mkdtemp(prefix="pgdbpool-tests-", dir=MEMORY)
    os.chmod(place, 0o1777)  # the servers' user is another than root
    os.environ["TMPDIR"], tempfile.tempdir = place, None
    config.add_cleanup(lambda: shutil.rmtree(place, ignore_errors=True))


def pytest_collection_finish() -> None:
    """Spare each collection of garbage in a test the thousands of tests themselves."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker, reason in (("long", "takes long"), ("surroundings", "runs other programs")):
        if not config.getoption(f"--{marker}"):
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=f"{reason}: run it with --{marker}"))


@pytest.fixture(autouse=True)
def nothing_current() -> Iterator[None]:
    """A test leaves the next one no tenant, deadline or correlation id."""
    yield
    assert (pgdbpool.current_tenant(), pgdbpool.time_left(), pgdbpool.current_correlation()) == (None,) * 3


@pytest.fixture(params=["threaded", "non-threaded"])
def mode(request: pytest.FixtureRequest) -> str:
    """Each of the two threading models."""
    return str(request.param)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A primary and two standbys, shared by all tests, of the version or programs in the environment."""
    version = os.environ.get(VERSION_VARIABLE)
    with Cluster(standbys=2, version=int(version) if version else None) as shared:
        yield shared
        leave(*shared.nodes)


@pytest.fixture
def known_cluster(cluster: Cluster) -> Cluster:
    """The shared cluster with all nodes up in their first roles, in sync, empty, and without clients."""
    try:
        restore(cluster)
    except (ClusterError, psycopg.Error):
        leave(*cluster.nodes)
        cluster.stop()
        cluster.start()
    return cluster


@pytest.fixture
def proxy_to() -> Iterator[Callable[[Node], Proxy]]:
    """A function that starts a proxy to a node; all are closed after the test."""
    proxies: list[Proxy] = []

    def start(node: Node) -> Proxy:
        proxies.append(Proxy(node.host, node.port))
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.close()

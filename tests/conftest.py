"""Fixtures: a cluster for all tests, put back to a known state for each that asks, and proxies to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import psycopg
import pytest
from proxy import Proxy
from psycopg import sql

from pgdbpool.cluster import Cluster, ClusterError, Node

VERSION_VARIABLE = "PGDBPOOL_TEST_PG_VERSION"

END_CLIENTS = b"""
    SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
    WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"""
# What a test may have made in a database, one row each: the statement that removes it.
LEFTOVERS = b"""
    SELECT format('DROP DATABASE %I WITH (FORCE)', datname) FROM pg_database
    WHERE datname NOT IN ('postgres', 'template0', 'template1')
    UNION ALL
    SELECT format('DROP SCHEMA %I CASCADE', nspname) FROM pg_namespace
    WHERE nspname NOT LIKE 'pg\\_%' AND nspname NOT IN ('information_schema', 'public')
    UNION ALL
    SELECT format('DROP SCHEMA public CASCADE; CREATE SCHEMA public AUTHORIZATION pg_database_owner;'
                  ' GRANT USAGE ON SCHEMA public TO public')
    WHERE to_regnamespace('public') IS NULL
       OR EXISTS (SELECT FROM pg_depend WHERE refclassid = 'pg_namespace'::regclass
                  AND refobjid = to_regnamespace('public') AND classid <> 'pg_init_privs'::regclass)
    UNION ALL
    SELECT format('DROP OWNED BY %I CASCADE; DROP ROLE %I', rolname, rolname) FROM pg_roles
    WHERE rolname NOT LIKE 'pg\\_%' AND rolname <> current_user
    UNION ALL
    SELECT format('ALTER DATABASE %I RESET ALL', datname) FROM pg_db_role_setting s
    JOIN pg_database d ON d.oid = s.setdatabase WHERE s.setrole = 0
    UNION ALL
    SELECT format('ALTER ROLE %I RESET ALL', current_user) FROM pg_db_role_setting WHERE setrole <> 0"""
CHANGED_SETTINGS = b"SELECT FROM pg_file_settings WHERE sourcefile LIKE '%postgresql.auto.conf' LIMIT 1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the tests that take long")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: takes long; runs with --long only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes long: run it with --long"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A primary and two standbys, shared by all tests, of the version or programs in the environment."""
    version = os.environ.get(VERSION_VARIABLE)
    with Cluster(standbys=2, version=int(version) if version else None) as shared:
        yield shared


@pytest.fixture
def known_cluster(cluster: Cluster) -> Cluster:
    """The shared cluster with all nodes up in their first roles, in sync, empty, and without clients."""
    try:
        restore(cluster)
    except (ClusterError, psycopg.Error):
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


def restore(cluster: Cluster) -> None:
    """Undo what a test did to the cluster; raises if that takes a new one."""
    primary, *standbys = cluster.nodes
    if cluster.primary is not primary or [node.upstream for node in standbys] != [primary] * len(standbys):
        raise ClusterError("the roles have changed")
    for node in cluster.nodes:
        node.resume()
        if not node.running:
            node.start()
    for node in cluster.nodes:
        with node.connect() as connection:
            # First, since what these hold locked could not be dropped, nor its end be replayed on a standby.
            connection.execute(END_CLIENTS)
            if connection.execute(CHANGED_SETTINGS).fetchone():
                connection.execute("ALTER SYSTEM RESET ALL")
                node.restart()
    with primary.connect() as connection:
        for (statements,) in connection.execute(LEFTOVERS).fetchall():
            connection.execute(sql.SQL(statements))
    cluster.wait_in_sync(timeout=10)

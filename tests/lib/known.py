"""The known state that tests of the shared cluster start from."""

from __future__ import annotations

import time
import weakref
from typing import Any

import psycopg
from psycopg import sql

from pgdbpool.cluster import Cluster, ClusterError, Node

VERSION_VARIABLE = "PGDBPOOL_TEST_PG_VERSION"

END_CLIENTS = b"""
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
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


FOLLOWS = b"""
    SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn AND EXISTS (
        SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming' AND sender_port = %s)"""


_kept: weakref.WeakKeyDictionary[Node, psycopg.Connection[Any]] = weakref.WeakKeyDictionary()
"""Our session on each server, from test to test: to open one is what most tests would take longest for."""


def restore(cluster: Cluster) -> None:
    """Undo what a test did to the cluster; raises if that takes a new one."""
    primary, *standbys = cluster.nodes
    if cluster.primary is not primary or [node.upstream for node in standbys] != [primary] * len(standbys):
        raise ClusterError("the roles have changed")
    for node in cluster.nodes:
        node.resume()
        if not node.running:
            node.start()
    first, *others = [_without_clients(node) for node in cluster.nodes]
    for (statements,) in first.execute(LEFTOVERS).fetchall():
        first.execute(sql.SQL(statements))
    ((written,),) = first.execute("SELECT pg_current_wal_lsn()::text").fetchall()
    follow = [_follows(other, written, primary.port) for other in others]
    if not all(follow):
        cluster.wait_in_sync(timeout=10)


def _without_clients(node: Node) -> psycopg.Connection[Any]:
    """Return the only session on a server, which has the settings that it began with."""
    connection = _session(node)
    if connection.execute(CHANGED_SETTINGS).fetchone():
        connection.execute("ALTER SYSTEM RESET ALL")
        node.restart()
        connection = _session(node)
    return connection


def _session(node: Node) -> psycopg.Connection[Any]:
    """Return our session on a server, a new one if a test has ended it, after the end of all others."""
    # First, since what these hold locked could not be dropped, nor its end be replayed on a standby.
    try:
        _end_others(_kept[node])
    except (KeyError, psycopg.OperationalError):
        leave(node)
        _kept[node] = node.connect()
        _end_others(_kept[node])
    return _kept[node]


def leave(*nodes: Node) -> None:
    """Close our sessions, for a test that must be a server's only client, or before the servers end."""
    for node in nodes:
        if (connection := _kept.pop(node, None)) is not None:
            connection.close()


def _end_others(connection: psycopg.Connection[Any]) -> None:
    """End all other clients; the server's own wait for that looks every 100 ms only."""
    deadline = time.monotonic() + 5
    while connection.execute(END_CLIENTS).fetchall():
        if time.monotonic() > deadline:
            raise ClusterError("a client's session does not end")
        time.sleep(0.002)


def _follows(standby: psycopg.Connection[Any], written: str, port: int) -> bool:
    """Return whether a standby has replayed what was written, or has a moment later."""
    for _ in range(100):
        if standby.execute(FOLLOWS, (written, port)).fetchone() == (True,):
            return True
        time.sleep(0.002)
    return False

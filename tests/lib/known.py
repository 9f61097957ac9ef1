"""The known state that tests of the shared cluster start from."""

from __future__ import annotations

from psycopg import sql

from pgdbpool.cluster import Cluster, ClusterError

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

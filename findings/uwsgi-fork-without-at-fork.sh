#!/usr/bin/env bash
# uWSGI 2.0.30 (pyuwsgi 2.0.30.post1), Python 3.10 or later
#
# Expected: a function that an application gives to os.register_at_fork(after_in_child=...) runs in each worker that
# uWSGI forks after it has loaded the application. Happens: it does not run, since uWSGI forks without telling Python, so
# libraries that drop their parent's sockets, locks or random state that way go on with them in every worker. It
# runs with `py-call-uwsgi-fork-hooks`; `lazy-apps` loads the application after the fork. Without either, compare
# os.getpid() at first use.
set -euo pipefail
room=$(mktemp -d)
trap 'kill -INT $(jobs -p) 2>/dev/null || true; wait; rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet pyuwsgi==2.0.30.post1
cd "$room"
cat > app.py <<'PYTHON'
import os

told = []
os.register_at_fork(after_in_child=lambda: told.append(os.getpid()))
loaded_by = os.getpid()


def application(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"forked after loading: {loaded_by != os.getpid()}, told: {bool(told)}".encode()]
PYTHON
port=$(venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
answer() { # options
    venv/bin/uwsgi --http-socket "127.0.0.1:$port" --master --processes 1 --need-app --wsgi-file app.py "$@" 2> log &
    venv/bin/python - "$port" <<'PYTHON'
import sys, time, urllib.request

for _ in range(100):
    try:
        print(urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/", timeout=5).read().decode())
        break
    except OSError:
        time.sleep(0.2)
PYTHON
    kill -INT $!
    wait $! || true
}
venv/bin/uwsgi --version
plain=$(answer)
hooks=$(answer --py-call-uwsgi-fork-hooks)
echo "by default:                     $plain"
echo "with py-call-uwsgi-fork-hooks:  $hooks"
if [ "$plain" = "forked after loading: True, told: False" ] && [ "$hooks" = "forked after loading: True, told: True" ]; then
    echo "as described"
else
    echo "CHANGED"
    exit 1
fi

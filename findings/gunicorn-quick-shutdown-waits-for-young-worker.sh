#!/usr/bin/env bash
# gunicorn 27.0.1
#
# Expected: a quick shutdown (SIGINT) ends within moments when no request is under way. Happens: the master tells each
# worker once. A worker that is forked and has not set its own signal handlers yet still has the master's, which lose
# the signal; it starts, serves, and the master waits the whole `graceful_timeout` for it and then kills it. A graceful
# stop (SIGTERM) tells each worker once, too. So a stop right after a worker was replaced can take that long: give a
# supervisor's stop more time than `graceful_timeout`.
set -euo pipefail
room=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet gunicorn==27.0.1
cd "$room"
cat > app.py <<'PYTHON'
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]
PYTHON
cat > gunicorn.conf.py <<'PYTHON'
import time

graceful_timeout = 8


def post_fork(server, worker):
    time.sleep(1)  # what a start may take
PYTHON
venv/bin/gunicorn --version
stop_after() { # seconds after the fork: print how long a quick shutdown takes
    venv/bin/gunicorn --bind 127.0.0.1:0 --no-control-socket app:app 2> log &
    local master=$!
    until grep -q 'Listening at' log && [ -n "$(cat "/proc/$master/task/$master/children")" ]; do sleep 0.02; done
    sleep "$1"
    SECONDS=0
    kill -INT "$master"
    wait "$master" || true
    echo "$SECONDS"
}
old=$(stop_after 3)
echo "a worker that was forked 3 s ago: $old s"
young=$(stop_after 0.3)
echo "a worker that was forked 0.3 s ago: $young s"
if [ "$old" -le 2 ] && [ "$young" -ge 7 ]; then
    echo "as described"
else
    echo "CHANGED"
    exit 1
fi

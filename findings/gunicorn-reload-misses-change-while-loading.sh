#!/usr/bin/env bash
# gunicorn 27.0.1
#
# Expected: under `--reload`, a worker is replaced once a file that it has loaded has changed. Happens: a worker first
# looks at its files after it has loaded the application, and takes what it finds then for what it has loaded. So a
# change that is saved while the application loads is never noticed: the worker serves the old code until the file
# changes once more. Who starts gunicorn and saves at once, or saves twice within a slow start, saves again.
set -euo pipefail
room=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet gunicorn==27.0.1
cd "$room"
cat > app.py <<'PYTHON'
import time

TEXT = b"first"
time.sleep(3)  # an application that takes its time to load


def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [TEXT]
PYTHON
venv/bin/gunicorn --version
PYTHONDONTWRITEBYTECODE=1 venv/bin/gunicorn --bind 127.0.0.1:0 --no-control-socket --reload app:app 2> log &
until grep -q 'Reloader is on' log; do sleep 0.05; done
sleep 1
sed -i 's/first/second/' app.py
port=$(grep -o '127.0.0.1:[0-9]*' log | head -1)
ask() { venv/bin/python -c 'import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=20).read().decode())' "http://$port/"; }
ask >/dev/null # answered once the application is loaded
sleep 5 # it looks once a second
while_loading=$(ask)
echo "saved while the application loads, 5 s later: $while_loading"
touch app.py
sleep 6
touched=$(ask)
echo "saved once more, 6 s later: $touched"
if [ "$while_loading" = first ] && [ "$touched" = second ]; then
    echo "as described"
else
    echo "CHANGED"
    exit 1
fi

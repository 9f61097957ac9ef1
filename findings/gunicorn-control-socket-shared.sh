#!/usr/bin/env bash
# gunicorn 27.0.1
#
# Expected: two applications of one user, each under a gunicorn of its own, do not meet. Happens: both take the same
# control socket in the user's home directory by default. The second takes it away from the first without a word, both
# logs say that they listen on it, and `gunicornc` then reaches the second alone. Give each its `control_socket`.
set -euo pipefail
room=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet gunicorn==27.0.1
cd "$room"
mkdir home
cat > app.py <<'PYTHON'
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]
PYTHON
for name in first second; do
    HOME=$room/home venv/bin/gunicorn --bind 127.0.0.1:0 --workers 1 app:app 2> "$name.log" &
    for _ in $(seq 100); do
        if grep -q -i 'control' "$name.log"; then break; fi
        sleep 0.1
    done
done
venv/bin/gunicorn --version
grep -i 'control' first.log second.log || true
first=$(grep -i -o '/[^ ]*\.ctl' first.log | head -1)
second=$(grep -i -o '/[^ ]*\.ctl' second.log | head -1)
if [ -n "$first" ] && [ "$first" = "$second" ]; then
    echo "as described"
else
    echo "CHANGED"
    exit 1
fi

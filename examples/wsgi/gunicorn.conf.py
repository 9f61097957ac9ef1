"""gunicorn's settings for the example: run `gunicorn` in this directory."""

from pathlib import Path

wsgi_app = "app:application"
chdir = str(Path(__file__).resolve().parent)
bind = "127.0.0.1:8000"

# Each worker is a process with pools of its own: workers x connection_count, over all groups, is what the
# servers must admit. A group needs no more connections than a worker has threads.
workers = 2
worker_class = "gthread"
threads = 4

# `preload_app = True` works as well: a forked worker opens its own connections on first use.
preload_app = False

# It would be one file in the home directory for all gunicorns of a user.
control_socket_disable = True

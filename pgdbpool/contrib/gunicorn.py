"""Hooks for gunicorn.conf.py: they end statements that a worker would leave running at the servers.

A worker that is forked needs no hook, and neither does one that ends in time:

    from pgdbpool.contrib.gunicorn import worker_abort, worker_exit, worker_int

gunicorn knows them by these names. With the gevent worker, patch first: the import brings psycopg along.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from .._api.connection import close_all, terminate_all
from .._util import greenlets

__all__ = ["worker_abort", "worker_exit", "worker_int"]


def worker_abort(worker: Any) -> None:
    """A worker that timed out (SIGABRT): cancel its statements, before gunicorn kills it."""
    if not greenlets.in_hub():  # there gunicorn's sys.exit goes to the main greenlet, and so to worker_exit
        terminate_all("gunicorn's worker_abort, as the worker timed out")


def worker_int(worker: Any) -> None:
    """A quick shutdown (SIGINT, SIGQUIT): cancel running statements, so that no thread waits for them.

    gunicorn also calls it, in a thread, if ``--reload`` has found a change: the requests must end.
    """
    if threading.current_thread() is threading.main_thread():
        terminate_all("gunicorn's worker_int, as the worker was told to quit")


def worker_exit(server: Any, worker: Any) -> None:
    """A worker that ends: close its pools; requests that overstayed `graceful_timeout` are cancelled.

    gunicorn calls it in the master if the worker has exited already, and the master keeps its pools. When all
    of gunicorn ends, the master kills the remaining workers at `graceful_timeout`: the hook may be too late.
    """
    if worker.pid == os.getpid():
        close_all(0.0, "gunicorn's worker_exit, as the worker ends")

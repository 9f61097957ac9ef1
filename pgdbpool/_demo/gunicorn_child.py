"""gunicorn as a child that does not outlive the demo: `python -m` with gunicorn's arguments.

Standard input is the lifeline: only the demo holds its other end, so it ends with the demo, even if
that is killed, and removes the directory in which the workers publish their status.
"""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import threading


def end_with_parent() -> None:
    """Wait for the end of standard input, then end gunicorn as Ctrl-C would."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, name="lifeline", daemon=True).start()
    arbiter = os.getpid()
    try:
        runpy.run_module("gunicorn", run_name="__main__", alter_sys=True)
    finally:
        directory = os.environ["PGDBPOOL_DEMO_RUNTIME_DIR"]
        if directory and os.getpid() == arbiter:  # and not a worker, which was forked in there
            shutil.rmtree(directory, ignore_errors=True)

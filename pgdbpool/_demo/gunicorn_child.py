"""gunicorn as a child that does not outlive the demo: `python -m` with gunicorn's arguments.

Standard input is the lifeline: only the demo holds its other end, so it ends with the demo, even if
that is killed.
"""

from __future__ import annotations

import os
import runpy
import signal
import threading


def end_with_parent() -> None:
    """Wait for the end of standard input, then end gunicorn as Ctrl-C would."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, name="lifeline", daemon=True).start()
    runpy.run_module("gunicorn", run_name="__main__", alter_sys=True)

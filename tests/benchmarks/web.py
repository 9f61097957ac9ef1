"""gunicorn with threads, as the benchmarks start it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WORKERS = 2


@contextmanager
def serving(
    application: str, variables: Mapping[str, str], *, threads: int, directory: Path, log: Any = None
) -> Iterator[int]:
    """Serve an application in two workers; return its port. Its log goes to `log`, or to standard error."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "--bind", f"fd://{listener.fileno()}",
             "--workers", str(WORKERS), "--worker-class", "gthread", "--threads", str(threads),
             "--no-control-socket", "--graceful-timeout", "1", "--log-level", "warning", application],
            env={**os.environ, **variables},
            cwd=directory,
            pass_fds=[listener.fileno()],
            stdout=log, stderr=log,
        )  # fmt: skip
        try:
            yield listener.getsockname()[1]
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(5)

"""Which machine and versions the figures are of."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from psycopg import pq

from .bench import Bench
from .crew import ROOT
from .legacy import VERSION as LEGACY

PACKAGES = ("psycopg", "psycopg-pool", "SQLAlchemy", "psycopg2-binary", "asyncpg", "gunicorn")


def describe(bench: Bench) -> dict[str, Any]:
    """Return machine and versions."""
    [(server,)] = bench.cluster.primary.execute("SHOW server_version")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "postgresql": server.split()[0],
        "libpq": str(pq.version() // 10000) + "." + str(pq.version() % 10000),
        "packages": {name: _version(name) for name in PACKAGES} | {"pgdbpool": _own(), "pgdbpool 1": LEGACY},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _own() -> str:
    import pgdbpool

    try:
        git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return pgdbpool.__version__
    return f"{pgdbpool.__version__} ({commit})"


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

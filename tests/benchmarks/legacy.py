"""pgdbpool 1.0.2 in an environment of its own, since it has the same name; made once and kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from functools import lru_cache
from pathlib import Path

VERSION = "1.0.2"


@lru_cache
def legacy_python() -> str:
    """Return the interpreter of the environment; it is made where there is none."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = cache / "pgdbpool-benchmarks" / f"{VERSION}-python{sys.version_info[0]}.{sys.version_info[1]}"
    python = place / "bin" / "python"
    check = [str(python), "-I", "-c", "import pgdbpool.pool, psycopg2"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if python.exists() and not subprocess.run(check, env=environment, capture_output=True).returncode:
        return str(python)
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=False)
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    # It says nothing of what it needs, nor of how to be built.
    subprocess.run([*install, "setuptools", "psycopg2-binary"], env=environment, check=True)
    subprocess.run([*install, "--no-build-isolation", f"pgdbpool=={VERSION}"], env=environment, check=True)
    return str(python)

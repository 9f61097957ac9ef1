"""Which psycopg this process has: the one in C, or the slower one in Python with the system's libpq."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec

import psycopg
from psycopg import pq


@dataclass(frozen=True, slots=True)
class Driver:
    """psycopg as it was loaded, and the libpq that it uses."""

    psycopg: str
    implementation: str
    """`binary`, `c` or `python`."""
    libpq: str

    @property
    def fell_back(self) -> bool:
        """Whether it is the one in Python although another is installed, and nobody asked for it.

        That is so in each further interpreter of a process: psycopg's C code is loaded in one alone.
        """
        installed = any(find_spec(name) is not None for name in ("psycopg_binary", "psycopg_c"))
        return self.implementation == "python" and installed and os.environ.get("PSYCOPG_IMPL") != "python"

    def __str__(self) -> str:
        return f"psycopg {self.psycopg} ({self.implementation}), libpq {self.libpq}"


SLOW = "psycopg runs in Python: its C code cannot be loaded, or another interpreter of this process has it"
"""What has happened where it `fell_back`."""


def driver() -> Driver:
    """Return what is loaded in this interpreter."""
    return Driver(psycopg.__version__, pq.__impl__, pq.version_pretty(pq.version()))

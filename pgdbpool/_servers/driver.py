"""Which psycopg is loaded: the C version, or the slower Python version with the system's libpq."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec

import psycopg
from psycopg import pq


@dataclass(frozen=True, slots=True)
class Driver:
    """The loaded psycopg and its libpq."""

    psycopg: str
    implementation: str
    """`binary`, `c` or `python`."""
    libpq: str

    @property
    def fell_back(self) -> bool:
        """Whether the Python version runs, unasked by PSYCOPG_IMPL, although the C version is installed.

        This happens in subinterpreters: psycopg's C code can be loaded in one interpreter only.
        """
        installed = any(find_spec(name) is not None for name in ("psycopg_binary", "psycopg_c"))
        return self.implementation == "python" and installed and os.environ.get("PSYCOPG_IMPL") != "python"

    def __str__(self) -> str:
        return f"psycopg {self.psycopg} ({self.implementation}), libpq {self.libpq}"


SLOW = "psycopg runs in Python: its C code cannot be loaded, or another interpreter of this process has it"
"""The explanation if it `fell_back`."""


def driver() -> Driver:
    """Return the driver of this interpreter."""
    return Driver(psycopg.__version__, pq.__impl__, pq.version_pretty(pq.version()))

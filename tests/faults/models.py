"""The process models of WSGI servers, as their command lines have them."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

import pgdbpool

ROOT = Path(pgdbpool.__file__).parents[1]
UWSGI = shutil.which("pyuwsgi", path=str(Path(sys.executable).parent)) or shutil.which("uwsgi")
SYNC = ("--worker-class", "sync", "--workers", "3")
GTHREAD = ("--worker-class", "gthread", "--workers", "2", "--threads", "4")
GEVENT = ("--worker-class", "gevent", "--workers", "2")
PRELOAD = ("--preload",)
UWSGI_TWO = ("uwsgi", "--master", "--processes", "2")
FORK_HOOKS = "--py-call-uwsgi-fork-hooks"
"""Without it uWSGI forks as it is, while a thread of its master may hold one of Python's locks for ever."""

needs_gevent = pytest.mark.skipif(importlib.util.find_spec("gevent") is None, reason="no gevent")
needs_uwsgi = pytest.mark.skipif(UWSGI is None, reason="no uWSGI")

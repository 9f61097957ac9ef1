"""Run Django's own tests over both backends, and compare what fails.

    python -m tests.django_suite /path/to/django/tests                          # what concerns a backend
    python -m tests.django_suite /path/to/django/tests basic transactions ...
    python -m tests.django_suite /path/to/django/tests --quick                  # over the pool alone, 15 s

The directory is `tests` of Django's source distribution, of the version that is installed. `--all` runs
everything. A project's CI runs the quick part, with the directory in PGDBPOOL_TEST_DJANGO.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from pgdbpool.cluster import Cluster

ENGINES = ("django.db.backends.postgresql", "pgdbpool.contrib.django")
PART = (
    "backends", "basic", "transactions", "transaction_hooks", "queries", "select_for_update", "servers",
    "multiple_database", "test_runner", "migrations", "postgres_tests", "check_framework",
)  # fmt: skip
QUICK = ("basic", "transactions", "transaction_hooks", "select_for_update")
_FAILED = "ends `atomic` after a statement that failed in it, which raises here"
# What tests the inside of Django's own backend or what the pool refuses, each with the reason.
EXCEPTIONS = {
    "test_connect_pool": "asks for Django's own pool",
    "test_connect_pool_set_to_true": "asks for Django's own pool",
    "test_connect_pool_with_timezone": "asks for Django's own pool",
    "test_pool_check_can_be_overridden": "asks for Django's own pool",
    "test_pool_options_not_mutated": "asks for Django's own pool",
    "test_pooling_health_checks": "asks for Django's own pool",
    "test_pooling_not_support_persistent_connections": "asks for Django's own pool",
    "test_connect_server_side_binding": "compares the class of the cursor, which is the pool's",
    "test_alter_array_field_decrease_base_field_length": _FAILED,
    "test_alter_array_field_decrease_nested_base_field_length": _FAILED,
    "test_alter_char_field_decrease_length": _FAILED,
    "test_func_index_nondeterministic": _FAILED,
    "test_func_unique_constraint_nondeterministic": _FAILED,
    "test_validate": _FAILED,
    "test_bypass_timezone_configuration": "expects a SET; the session starts with the time zone",
}
BAD = re.compile(r"^(?:ERROR|FAIL): (\S+ \(\S+\))", re.MULTILINE)
SETTINGS = """
DATABASES = {{
    alias: {{
        "ENGINE": {engine!r}, "HOST": {host!r}, "PORT": {port}, "USER": "postgres",
        "NAME": "django_" + alias, "TEST": {{"NAME": "test_" + alias}},
    }}
    for alias in ("default", "other")
}}
SECRET_KEY = "django_tests_secret_key"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
USE_TZ = False
"""


def run(engine: str, tests: Path, labels: list[str], parallel: int, timeout: float) -> tuple[set[str], str]:
    """Run the tests over a backend in a cluster of their own; return what fails, and the last lines."""
    with Cluster(standbys=0) as cluster, tempfile.TemporaryDirectory() as room:
        node = cluster.primary
        Path(room, "suite_settings.py").write_text(
            SETTINGS.format(engine=engine, host=node.host, port=node.port)
        )
        ran = subprocess.run(
            [sys.executable, "runtests.py", "--settings=suite_settings", "--noinput",
             f"--parallel={parallel}", *labels],
            cwd=tests, env={**os.environ, "PYTHONPATH": f"{room}:{Path.cwd()}"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False,
        )  # fmt: skip
    summary = re.findall(r"^(?:Ran .*|OK.*|FAILED.*)$", ran.stdout, re.MULTILINE)
    if len(summary) < 2:
        raise SystemExit(f"{engine}: the tests did not run\n{ran.stdout[-4000:]}")
    return set(BAD.findall(ran.stdout)), " ".join(summary)


def main() -> int:
    """Compare the backends; return 1 if a test fails over the pool alone."""
    parser = argparse.ArgumentParser(prog="python -m tests.django_suite", description=__doc__)
    parser.add_argument("tests", type=Path)
    parser.add_argument("labels", nargs="*")
    parser.add_argument("--quick", action="store_true", help="a short part, over the pool alone")
    parser.add_argument("--all", action="store_true", help="all tests")
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=7200, help="seconds for each backend")
    given = parser.parse_args()
    labels = [] if given.all else given.labels or list(QUICK if given.quick else PART)
    failed: list[set[str]] = [set()] if given.quick else []
    for engine in ENGINES[len(failed) :]:
        bad, summary = run(engine, given.tests.resolve(), labels, given.parallel, given.timeout)
        failed.append(bad)
        print(f"{engine}: {summary}")
    alone = sorted(failed[1] - failed[0])
    for name in alone:
        print(f"over the pool alone: {name}: {EXCEPTIONS.get(name.split()[0], 'not known')}")
    return 1 if any(name.split()[0] not in EXCEPTIONS for name in alone) else 0


if __name__ == "__main__":
    sys.exit(main())

"""The command: run SQLAlchemy's dialect compliance suite over the pool and over SQLAlchemy's own.

python -m tests.sqlalchemy_suite                                    # psycopg, threaded and lock-free
python -m tests.sqlalchemy_suite --only threaded -k Isolation       # a part of it
python -m tests.sqlalchemy_suite --checkout sqlalchemy              # with the requirements of its repository
python -m tests.sqlalchemy_suite --checkout sqlalchemy test/engine  # its own tests

It starts servers of its own, and fails if a test does not pass that passes with SQLAlchemy's own pool.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from pgdbpool.cluster import Cluster, Node

from .differences import DIFFERENCES

WAYS = ("psycopg", "threaded", "non-threaded")
CONFTEST = """
import sys
import pytest
pytest.register_assert_rewrite("sqlalchemy.testing.assertions")
from sqlalchemy.testing.plugin.pytestplugin import *
start = pytest_sessionstart
collect_ignore_glob = ["*_py314.py"] if sys.version_info < (3, 14) else []

def pytest_sessionstart(session):
    from sqlalchemy.dialects import registry
    registry.register("postgresql.pgdbpool", "pgdbpool.contrib.sqlalchemy", "PgDbPoolDialect")
    # It would create extensions that a server may not have.
    from sqlalchemy.dialects.postgresql import provision
    from sqlalchemy.testing.provision import post_configure_engine
    post_configure_engine.fns["postgresql"] = lambda *arguments: None
    start(session)
"""
SETTINGS = """
[tool:pytest]
addopts = -p no:warnings -p no:cacheprovider
[sqla_testing]
requirement_cls = {requirements}
profile_file = profiles.txt
"""
Outcome = dict[str, str]
"""How each test went: passed, failed or skipped."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for and tell what differs; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.sqlalchemy_suite", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("files", nargs="*", default=["test_suite.py"], help="files of the checkout")
    parser.add_argument("--checkout", type=Path, help="a checkout of SQLAlchemy, of the version installed")
    parser.add_argument("--only", choices=WAYS[1:], action="append", help="the mode; both by default")
    parser.add_argument("-k", dest="tests", default="", help="only tests that match, as pytest's -k")
    options = parser.parse_args(arguments)
    outcomes = {
        way: run(way, options.tests, options.checkout, options.files)
        for way in ("psycopg", *(options.only or WAYS[1:]))
    }
    stock = outcomes.pop("psycopg")
    print(f"psycopg: {counts(stock)}")
    wells = [tell(way, outcome, stock) for way, outcome in outcomes.items()]
    return 0 if all(wells) else 1


def run(way: str, tests: str, checkout: Path | None, files: Sequence[str]) -> Outcome:
    """Run the suite over a server of its own."""
    settings = {"max_prepared_transactions": 10}
    with Cluster(standbys=0, settings=settings) as cluster, tempfile.TemporaryDirectory() as place:
        with cluster.primary.connect() as admin:
            admin.execute("CREATE SCHEMA test_schema")
        return run_in(Path(place), url(Path(place), way, cluster.primary), tests, checkout, files)


def url(place: Path, way: str, node: Node) -> str:
    """Return the URL of the engine, and write the configuration that it needs."""
    if way == "psycopg":
        return f"postgresql+psycopg://postgres@{node.host}:{node.port}/postgres"
    group = {"connection_count": 30, "min_size": 0, "autocommit": False}
    entry = {"host": node.host, "port": node.port, "name": "postgres", "user": "postgres"}
    configuration = {"type": way, "db": [entry], "groups": {"suite": group}}
    (place / "pgdbpool.yaml").write_text(json.dumps(configuration), encoding="utf-8")
    return f"postgresql+pgdbpool://suite?config={place / 'pgdbpool.yaml'}"


def run_in(
    place: Path,
    uri: str,
    tests: str,
    checkout: Path | None = None,
    files: Sequence[str] = ("test_suite.py",),
) -> Outcome:
    """Run the suite in a directory."""
    requirements = "sqlalchemy.testing.requirements:SuiteRequirements"
    if checkout is not None:
        shutil.copytree(checkout / "test", place / "test", ignore=shutil.ignore_patterns("conftest.py"))
        requirements = "test.requirements:DefaultRequirements"
    (place / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    (place / "setup.cfg").write_text(SETTINGS.format(requirements=requirements), encoding="utf-8")
    (place / "test_suite.py").write_text("from sqlalchemy.testing.suite import *\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "--junitxml=outcome.xml",
        "--dburi",
        uri,
        *files,
    ]
    environment = {**os.environ, "PYTHONPATH": str(place)}
    command += ["-k", tests] if tests else []
    done = subprocess.run(command, cwd=place, env=environment, check=False, capture_output=True, text=True)
    if not (place / "outcome.xml").is_file():
        raise SystemExit(f"the suite did not run to its end:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    if os.environ.get("SUITE_SHOW"):
        print(done.stdout[-int(os.environ["SUITE_SHOW"]) :])
    return read(place / "outcome.xml")


def read(file: Path) -> Outcome:
    """Return how each test went."""
    found: Outcome = {}
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        # The name has the URL's driver in it.
        name = re.sub(r"(Test)_postgresql\+\w+(_[\d_]+)?", r"\1", name)
        kinds = {child.tag for child in case}
        found[name] = (
            "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        )
    return found


def counts(outcome: Outcome) -> str:
    """Return how many tests went how."""
    ways = list(outcome.values())
    return ", ".join(f"{ways.count(way)} {way}" for way in ("passed", "failed", "skipped"))


def worse(outcome: Outcome, stock: Outcome) -> list[str]:
    """Return the tests that pass with SQLAlchemy's own pool alone."""
    return [name for name, way in stock.items() if way == "passed" and outcome.get(name) != "passed"]


def tell(way: str, outcome: Outcome, stock: Outcome) -> bool:
    """Print what differs; return whether all of it is known."""
    print(f"{way}: {counts(outcome)}")
    unknown = False
    for name in worse(outcome, stock):
        reason = DIFFERENCES.get(name.partition("[")[0])
        unknown = unknown or reason is None
        print(f"  {name}: {outcome.get(name, 'not run')}: {reason or 'NOT KNOWN'}")
    return not unknown and "passed" in outcome.values()


if __name__ == "__main__":
    sys.exit(main())

"""The command: run psycopg's test-suite with its connection replaced by a lent one, in both kinds of group.

git clone https://github.com/psycopg/psycopg                        # a version that the pool is made for
python -m tests.psycopg_suite psycopg                               # about three minutes
python -m tests.psycopg_suite psycopg --group manual -k transaction # a part of it

It starts a server of its own, and fails if a test fails that is not one of the known differences.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from pgdbpool.cluster import Cluster, Node

from .differences import DIFFERENCES, MOST

GROUPS = ("manual", "autocommit")
MODULES = (
    "adapt column concurrency connection connection_info copy cursor cursor_client cursor_common cursor_raw "
    "cursor_server errors notify pipeline prepared psycopg_dbapi20 query rows sql tpc transaction typeinfo"
)
FILES = [f"tests/test_{name}.py" for name in MODULES.split()] + ["tests/types"]
LEFT_OUT = "not slow and not mypy and not subprocess"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for and tell what differs; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.psycopg_suite", description=__doc__.splitlines()[0]
    )
    parser.add_argument("checkout", type=Path, help="a checkout of psycopg's repository")
    parser.add_argument("--group", choices=GROUPS, action="append", help="the kind of group; both by default")
    parser.add_argument("-k", dest="only", default="", help="only tests that match, as pytest's -k")
    options = parser.parse_args(arguments)
    if not (options.checkout / "tests" / "fix_db.py").is_file():
        parser.error(f"{options.checkout} is not a checkout of psycopg: it has no tests/fix_db.py")
    well = True
    for group in options.group or GROUPS:
        # A server for each, since some tests leave behind what others then find.
        with Cluster(standbys=0, settings={"max_prepared_transactions": 10}) as cluster:
            failed, ran = run(options.checkout, cluster.primary, group, options.only)
        well = tell(group, failed, ran) and well
    return 0 if well else 1


def run(checkout: Path, node: Node, group: str, only: str) -> tuple[list[str], int]:
    """Run the suite over one group; return the tests that failed, and how many ran."""
    with tempfile.NamedTemporaryFile("r") as outcome, tempfile.TemporaryDirectory() as cache:
        here = str(Path(__file__).parent)
        environment = {**os.environ, "PGDBPOOL_SUITE_GROUP": group, "PGDBPOOL_SUITE_OUTCOME": outcome.name}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        dsn = f"host={node.host} port={node.port} user=postgres dbname=postgres"
        command = [sys.executable, "-m", "pytest", "-p", "lent_connection", "-q", "--tb=no", "-r", ""]
        # Its own cache: the suite refuses to run over that of a run that was interrupted.
        selection = ["-o", f"cache_dir={cache}", "-m", LEFT_OUT, "-k", only, "--test-dsn", dsn, *FILES]
        subprocess.run([*command, *selection], cwd=checkout, env=environment, check=False)
        lines = outcome.read().splitlines()
    if not lines:
        raise SystemExit("the suite did not run to its end")
    return lines[1:], int(lines[0])


def tell(group: str, failed: Iterable[str], ran: int) -> bool:
    """Print what differs in a group; return whether all of it is known, and no more than is tolerated."""
    unknown = [test for test in failed if name_of(test) not in DIFFERENCES]
    count = len(list(failed))
    print(f"\n{group}: {ran - count} of {ran} tests pass; {count} differ, {MOST} are tolerated")
    for test in failed:
        print(f"  {test}: {DIFFERENCES.get(name_of(test), 'NOT KNOWN')}")
    return not unknown and count <= MOST and ran > 0


def name_of(test: str) -> str:
    """Return a test's file and function, without its parameters."""
    return test.removeprefix("tests/").partition("[")[0]


if __name__ == "__main__":
    sys.exit(main())

"""A pytest plugin for psycopg's test-suite: the suite's `conn` is a connection that a block has.

It is loaded by the command in `__main__.py`, inside of the suite's own process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict

import pgdbpool

GROUP = "PGDBPOOL_SUITE_GROUP"
"""The variable that says what kind of group lends the connection."""


OUTCOME = "PGDBPOOL_SUITE_OUTCOME"
"""The variable that names the file for how many tests ran, and which failed."""

passed: set[str] = set()
failed: set[str] = set()


class EndOfTest(Exception):
    """Ends the block of a test as psycopg's `close()` would: without a COMMIT."""


class LentConnection:
    """The fixtures that replace those of the suite."""

    @pytest.fixture
    def conn(self, conn_cls: Any, dsn: str, request: pytest.FixtureRequest) -> Iterator[Any]:
        """A connection lent to a block, with the attributes that psycopg's own begins with."""
        kind = os.environ[GROUP]
        try:
            with pgdbpool.Handler(kind) as db:
                connection = db.connection
                connection.autocommit = False  # psycopg's default, which the tests expect
                connection.execute("SELECT 1")  # with the cleaning: a new session has nothing to clean
                connection.rollback()
                yield connection
                raise EndOfTest
        except EndOfTest:
            pass


def configuration(dsn: str) -> dict[str, Any]:
    """Return a configuration with a group of each kind, as plain as it can be."""
    given = conninfo_to_dict(dsn)
    server = {
        "host": given["host"],
        "port": int(given["port"]),
        "name": given["dbname"],
        "user": given["user"],
    }
    group = {"connection_count": 2, "row_factory": "tuple"}
    return {
        "type": "threaded",
        "db": [server],
        "groups": {"manual": {**group, "autocommit": False}, "autocommit": {**group, "autocommit": True}},
    }


def pytest_sessionstart(session: pytest.Session) -> None:
    """Open the pools."""
    pgdbpool.Connection.init(configuration(session.config.getoption("--test-dsn")))


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Put the fixtures over those of the suite: what is registered last wins."""
    session.config.pluginmanager.register(LentConnection())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note how a test went."""
    if report.when == "call" and report.passed:
        passed.add(report.nodeid)
    elif report.failed:
        failed.add(report.nodeid)


def pytest_sessionfinish() -> None:
    """Close the pools, and write how many tests ran and which failed."""
    pgdbpool.Connection.close()
    if OUTCOME in os.environ:
        lines = [str(len(passed | failed)), *sorted(failed)]
        Path(os.environ[OUTCOME]).write_text("\n".join(lines) + "\n", encoding="utf-8")

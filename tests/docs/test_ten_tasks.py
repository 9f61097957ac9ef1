"""Ten tasks as a new user does them: from README over at most three pages, with at most three commands."""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from samples import ROOT
from support import server, wait_for

from pgdbpool import Connection
from pgdbpool.cluster import Cluster
from pgdbpool.overview import gather

pytestmark = pytest.mark.slow


class Task(NamedTuple):
    """What is to be done, the pages from README on, and the commands, as the last page has them."""

    name: str
    pages: tuple[str, ...]
    commands: tuple[str, ...]
    shows: str


TASKS = [
    Task("see it work, without a PostgreSQL", ("README.md",), ("pgdbpool demo --check",), "transfers"),
    Task("have two groups that are valid", ("README.md",), ("pgdbpool check pgdbpool.yaml",), "SERVED BY"),
    Task(
        "audit the tenants of a group", ("README.md", "doc/guide/command.rst"),
        ("pgdbpool rls pgdbpool.yaml write",), "0 errors",
    ),
    Task(
        "see who holds my connections", ("README.md", "doc/operations/tasks.rst"),
        ("pgdbpool status pgdbpool.yaml --connections",), "SERVER PID",
    ),
    Task(
        "take a standby out for maintenance", ("README.md", "doc/operations/tasks.rst"),
        (
            "pgdbpool drain pgdbpool.yaml --endpoint db2:5432",
            "pgdbpool undrain pgdbpool.yaml --endpoint db2:5432",
        ),
        "in use again",
    ),
    Task(
        "switch over without an error", ("README.md", "doc/operations/tasks.rst"),
        ("pgdbpool pause pgdbpool.yaml --for 30", "pgdbpool resume pgdbpool.yaml"), "held blocks go on",
    ),
    Task(
        "give a busy group more connections", ("README.md", "doc/operations/tasks.rst"),
        ("pgdbpool resize pgdbpool.yaml --group read --connection-count 20",), "connection_count 20",
    ),
    Task(
        "use a new password", ("README.md", "doc/operations/tasks.rst"),
        ("pgdbpool reload pgdbpool.yaml", "pgdbpool expire pgdbpool.yaml"), "idle replaced",
    ),
    Task(
        "find the right size", ("README.md", "doc/operations/sizing.rst"),
        ("pgdbpool size pgdbpool.yaml --processes 8 --threads 4 --cores 16",), "RECOMMENDED",
    ),
    Task(
        "open psql where the reads go", ("README.md", "doc/guide/command.rst"),
        ("pgdbpool shell read pgdbpool.yaml",), "db",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with the configuration of an application that runs."""
    found = tmp_path_factory.mktemp("shop")
    cluster.primary.execute("DROP ROLE IF EXISTS web; CREATE ROLE web LOGIN")
    cluster.wait_in_sync()
    entries = [
        server(node, label=f"db{number}:5432", user="web") for number, node in enumerate(cluster.nodes, 1)
    ]
    db = "".join(f"  - {entry}\n" for entry in entries)
    (found / "pgdbpool.yaml").write_text(
        f"runtime_dir: {found}/run\ndb:\n{db}groups:\n"
        "  read: {target: prefer-standby, connection_count: 2}\n"
        "  write: {target: read-write, autocommit: false, connection_count: 2, tenant: app.tenant}\n"
    )
    Connection.init(found / "pgdbpool.yaml")
    wait_for(lambda: os.path.isdir(found / "run") and gather(str(found / "run"))["processes"])
    yield found
    Connection.reset()
    cluster.primary.execute("DROP ROLE IF EXISTS web")


def links(page: str) -> set[str]:
    """Return the pages that a page links to."""
    text = (ROOT / page).read_text(encoding="utf-8")
    here = posixpath.dirname(page)
    found = {re.sub(r"^https://\S*?/(doc/)", r"\1", link) for link in re.findall(r"\]\(([^)]+)\)", text)}
    for name in re.findall(r":doc:`(?:[^`<]*<)?([^`>]+)>?`", text):
        at = f"doc{name}" if name.startswith("/") else posixpath.normpath(posixpath.join(here, name))
        found.add(f"{at}.rst")
    return found


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_task_takes_three_pages_and_three_commands_at_most(task: Task, place: Path) -> None:
    assert len(task.pages) <= 3
    assert len(task.commands) <= 3
    for page, following in zip(task.pages, task.pages[1:], strict=False):
        assert following in links(page), page
    page = (ROOT / task.pages[-1]).read_text(encoding="utf-8")
    shown = ""
    for command in task.commands:
        assert command in page, f"{task.pages[-1]} does not say {command}"
        shown += run(command, place)
    assert task.shows in shown, shown


def run(command: str, place: Path) -> str:
    words = [sys.executable, "-m", *command.split()]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        words, cwd=place, env={**os.environ, "PYTHONPATH": path}, input="", capture_output=True, text=True,
        timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


ROLES = {"write requests": 5, "run it": 5, "come from another pool": 5}


@pytest.mark.parametrize("role", ROLES)
def test_each_role_has_a_path_of_a_few_pages(role: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {role} \| (.*) \|$", readme, re.MULTILINE)
    assert 2 <= len(re.findall(r"\]\(", row)) <= ROLES[role]
    index = (ROOT / "doc" / "index.rst").read_text(encoding="utf-8")
    (path,) = re.findall(rf"^I {role}\n((?:   .*\n)+)", index, re.MULTILINE)
    assert 2 <= len(re.findall(r":doc:`", path)) <= ROLES[role]


def test_a_block_is_explained_where_it_first_occurs() -> None:
    for page in ("README.md", "doc/index.rst"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert text.index("*block*") == text.index("block") - 1

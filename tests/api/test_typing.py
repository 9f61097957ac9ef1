"""What type checkers report in an application's code: what they should, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SAMPLES = Path(__file__).with_name("typing_samples.py")


# In a string, since older interpreters cannot read it.
TEMPLATES = """
from pgdbpool import Connection, Handler

def template_strings(db: Handler, number: int, table: str) -> None:
    db.query(t"SELECT {number} FROM {table:i}")
    db.fetch(t"SELECT {number}"), db.fetchrow(t"SELECT {number}"), db.fetchval(t"SELECT {number}")
    db.execute(t"DELETE FROM t WHERE i = {number}")
    db.cursor().execute(t"SELECT {number}")
    db.copy(t"COPY (SELECT {number}) TO STDOUT")
    Connection.fetch("read", t"SELECT {number}", tenant=1)
    Connection.execute("write", t"DELETE FROM t WHERE i = {number}")
    Connection.getconn("read").execute(t"SELECT {number}")
    db.executemany(t"INSERT INTO t VALUES ({number})", [])  # mypy pyright
    Connection.fetchmany("read", t"SELECT {number}", [])  # mypy pyright
    db.cursor().execute(t"SELECT {number}", (1,))  # mypy pyright
"""


def wanted(checker: str, samples: str | None = None) -> set[int]:
    """Return the lines of the samples in which this checker is to report an error."""
    lines = enumerate((samples or SAMPLES.read_text(encoding="utf-8")).splitlines(), 1)
    return {number for number, line in lines if checker in line.partition("  # ")[2].split()}


def shown(command: list[str]) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300).stdout


def test_mypy_reports_what_it_should() -> None:
    pytest.importorskip("mypy")
    text = shown([sys.executable, "-m", "mypy", "--strict", "--no-pretty", str(SAMPLES)])
    found = re.findall(r"^(.+?):(\d+): error: ", text, re.MULTILINE)
    assert {int(line) for path, line in found if Path(path).name == SAMPLES.name} == wanted("mypy"), text
    assert {Path(path).name for path, _ in found} == {SAMPLES.name}, text


def pyright_reports(directory: Path, samples: Path, **settings: str) -> dict[int, str]:
    """Return the errors that pyright finds, by line."""
    pytest.importorskip("basedpyright")  # pyright's checker, in a package that brings its own node
    how = {"typeCheckingMode": "standard", "extraPaths": [str(ROOT)], "include": [str(samples)], **settings}
    (directory / "pyrightconfig.json").write_text(json.dumps(how))
    command = ["-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(directory)]
    report = json.loads(shown([sys.executable, *command]))
    return {
        d["range"]["start"]["line"] + 1: d["message"]
        for d in report["generalDiagnostics"]
        if d["severity"] == "error"
    }


def test_pyright_reports_what_it_should(tmp_path: Path) -> None:
    found = pyright_reports(tmp_path, SAMPLES)
    assert set(found) == wanted("pyright"), found


def test_pyright_takes_a_template_string_as_a_statement(tmp_path: Path) -> None:
    samples = tmp_path / "templates.py"
    samples.write_text(TEMPLATES)
    found = pyright_reports(tmp_path, samples, pythonVersion="3.14")
    assert set(found) == wanted("pyright", TEMPLATES), found


@pytest.mark.skipif(sys.version_info < (3, 14), reason="mypy reads what its own interpreter reads")
def test_mypy_takes_a_template_string_as_a_statement(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    samples = tmp_path / "templates.py"
    samples.write_text(TEMPLATES)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-pretty", "--python-version=3.14", str(samples)]
    text = shown(command)
    found = re.findall(r"templates\.py:(\d+): error: ", text)
    assert {int(line) for line in found} == wanted("mypy", TEMPLATES), text

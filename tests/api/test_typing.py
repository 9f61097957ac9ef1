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


def wanted(checker: str) -> set[int]:
    """Return the lines of the samples in which this checker is to report an error."""
    lines = enumerate(SAMPLES.read_text(encoding="utf-8").splitlines(), 1)
    return {number for number, line in lines if checker in line.partition("  # ")[2].split()}


def shown(command: list[str]) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300).stdout


def test_mypy_reports_what_it_should() -> None:
    pytest.importorskip("mypy")
    text = shown([sys.executable, "-m", "mypy", "--strict", "--no-pretty", str(SAMPLES)])
    found = re.findall(r"^(.+?):(\d+): error: ", text, re.MULTILINE)
    assert {int(line) for path, line in found if Path(path).name == SAMPLES.name} == wanted("mypy"), text
    assert {Path(path).name for path, _ in found} == {SAMPLES.name}, text


def test_pyright_reports_what_it_should(tmp_path: Path) -> None:
    pytest.importorskip("basedpyright")  # pyright's checker, in a package that brings its own node
    settings = {"typeCheckingMode": "standard", "extraPaths": [str(ROOT)], "include": [str(SAMPLES)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = ["-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    report = json.loads(shown([sys.executable, *command]))
    found = {
        d["range"]["start"]["line"] + 1: d["message"]
        for d in report["generalDiagnostics"]
        if d["severity"] == "error"
    }
    assert set(found) == wanted("pyright"), found

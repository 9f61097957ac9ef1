"""The samples of the documentation run, and its reference leaves no public name out.

In `doc/`, a `code-block` with `:class: run` is run: Python in one namespace per page, SQL on the primary, and
YAML becomes the file `pgdbpool.yaml`. A block with `:class: output` is what the one before it prints. One
with `:class: file` becomes the file that its caption names, which the samples after it may import. Of a
console session, the commands run and print what is shown. YAML with `:class: check` is a configuration that
is valid. A page that begins with `.. needs: flask` is skipped where there is no flask. In README.md,
`<!-- run -->` marks a block, which finds the tables of the example.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from samples import ALL, README, ROOT, Sample, name, samples

import pgdbpool
from pgdbpool._config.load import load
from pgdbpool.cluster import Cluster, config_yaml

pytestmark = pytest.mark.slow


@pytest.fixture
def room(known_cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory to run samples in, with a `pgdbpool.yaml` for the cluster, and PRIMARY_PORT."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pgdbpool.yaml").write_text(config_yaml(known_cluster))
    monkeypatch.setenv("PRIMARY_PORT", str(known_cluster.primary.port))
    monkeypatch.syspath_prepend(tmp_path)
    before, environ = set(sys.modules), dict(os.environ)
    try:
        yield tmp_path
    finally:
        pgdbpool.Connection.reset()
        os.environ.clear()
        os.environ.update(environ)
        time.tzset()  # Django sets its time zone
        for imported in set(sys.modules) - before:
            module = sys.modules[imported]
            places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
            if any(str(place).startswith(str(tmp_path)) for place in places):
                del sys.modules[imported]


def run(sample: Sample, namespace: dict[str, Any], cluster: Cluster, room: Path) -> str:
    """Run a sample and return what it prints; what it wrote is on the standbys then."""
    printed = io.StringIO()
    if sample.language == "python":
        code = compile("\n" * sample.line + sample.text, str(sample.page), "exec", dont_inherit=True)
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
    elif sample.language == "sql":
        cluster.primary.execute(sample.text)
    elif sample.language == "yaml":
        (room / "pgdbpool.yaml").write_text(sample.text)
    elif sample.language == "console":
        converse(sample)
    else:
        raise AssertionError(f"{name(sample)}: nothing runs {sample.language}")
    cluster.wait_in_sync()
    return printed.getvalue()


def converse(sample: Sample) -> None:
    """Run each command of a console session, and compare what it prints."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    for part in re.split(r"^\$ ", sample.text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        ran = subprocess.run(command, shell=True, env=environ, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, f"{name(sample)}: {command}\n{ran.stdout}{ran.stderr}"
        if shown.strip():
            same = doctest.OutputChecker().check_output(shown.rstrip() + "\n", ran.stdout, doctest.ELLIPSIS)
            assert same, f"{name(sample)}: {command} printed\n{ran.stdout}"


@pytest.mark.parametrize(
    "page", sorted({s.page for s in ALL if s.marks == "run"}), ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_samples_of_a_page_run(page: Path, known_cluster: Cluster, room: Path) -> None:
    for module in re.findall(r"^\.\. needs: (\w+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        pytest.importorskip(module)
    namespace: dict[str, Any] = {"__name__": "sample"}
    printed = ""
    if page == README:
        known_cluster.primary.execute((ROOT / "examples" / "wsgi" / "schema.sql").read_text())
        known_cluster.wait_in_sync()
    for sample in samples(page):
        if sample.marks == "run":
            assert not printed.strip(), f"{name(sample)}: what the sample before it prints is not shown"
            printed = run(sample, namespace, known_cluster, room)
        elif sample.marks == "file":
            (room / sample.caption).parent.mkdir(parents=True, exist_ok=True)
            (room / sample.caption).write_text(sample.text)
        elif sample.marks == "output":
            same = doctest.OutputChecker().check_output(sample.text, printed, doctest.ELLIPSIS)
            assert same, f"{name(sample)}: printed was\n{printed}"
            printed = ""
    assert page == README or not printed.strip(), f"{page}: what the last sample prints is not shown"


@pytest.mark.parametrize("sample", [s for s in ALL if s.language == "python"], ids=name)
def test_every_sample_is_python(sample: Sample) -> None:
    compile(sample.text, name(sample), "exec")


@pytest.mark.parametrize("sample", [s for s in ALL if s.marks == "check"], ids=name)
def test_configurations_are_valid(sample: Sample) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(io.StringIO(sample.text), environ={})


@pytest.mark.parametrize("public", sorted(set(pgdbpool.__all__) - {"__version__"}))
def test_every_public_name_is_in_the_reference(public: str) -> None:
    reference = (ROOT / "doc" / "api.rst").read_text(encoding="utf-8")
    assert re.search(rf"^\.\. auto\w+:: {public}(\(|$)", reference, re.MULTILINE)


def test_the_readme_has_its_example() -> None:
    (example,) = [sample for sample in ALL if sample.page == README and sample.marks == "run"]
    assert len(example.text.splitlines()) <= 12


def test_the_links_of_the_readme_exist_and_work_on_pypi() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README.read_text(encoding="utf-8"))
    assert [link for link in links if not link.startswith("https://")] == []
    ours = re.compile(r"https://\S+/python-dbpool/(?:blob/)?HEAD/([^?]+)")
    paths = [match[1] for match in map(ours.match, links) if match]
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_alerts_name_metrics_that_exist() -> None:
    source = (ROOT / "pgdbpool" / "metrics.py").read_text(encoding="utf-8")
    rules = (ROOT / "doc" / "pgdbpool.rules.yml").read_text(encoding="utf-8")
    expressions = " ".join(
        rule["expr"] for group in yaml.safe_load(rules)["groups"] for rule in group["rules"]
    )
    names = set(re.findall(r"pgdbpool_(\w+?)(?:_total|_bucket)?\b", expressions))
    assert {"timeouts", "wait_seconds"} <= names
    assert [name for name in sorted(names) if not re.search(rf'"(pgdbpool_)?{name}"', source)] == []

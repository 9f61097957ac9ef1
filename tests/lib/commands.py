"""Running the package's commands as a user does, and seeing that nothing is left of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support import wait_for

import pgdbpool
from pgdbpool.cluster._watchdog import processes, tree

ROOT = Path(pgdbpool.__file__).parents[1]
PYTHON = (sys.executable, "-m", "pgdbpool")


@contextlib.contextmanager
def empty_room() -> Iterator[Path]:
    """A place for temporary files that every user can enter; fails if anything is left there at the end."""
    place = Path(tempfile.mkdtemp(prefix="room-"))
    place.chmod(0o777)
    try:
        yield place
        wait_for(lambda: not list(place.iterdir()), what=f"nothing left in {place}: {list(place.iterdir())}")
        mine = lambda: [p.args for p in processes() if any(str(place) in word for word in p.args)]  # noqa: E731
        wait_for(lambda: not mine(), what=f"no process of {place}: {mine()}")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def environment(room: Path, **more: str) -> dict[str, str]:
    """Return the environment of a command: this package, and its temporary files in the room."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "TMPDIR": str(room), **more}


def run(*words: str, room: Path, timeout: float = 60.0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `pgdbpool` with these words to its end."""
    options = {"env": environment(room), "cwd": room, "command": PYTHON, **options}
    command = [*options.pop("command"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)


class Running:
    """A command that runs until it is stopped; what is left of it is killed at the end of the block."""

    def __init__(self, *words: str, room: Path) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [*PYTHON, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(room),
            cwd=room,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        for pid in tree(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.process.wait(10)
        self._reader.join(10)
        self.process.stdout.close()

    @property
    def output(self) -> str:
        """What it has printed by now."""
        return "".join(self.lines)

    def wait_for_output(self, text: str, timeout: float = 30.0) -> str:
        """Wait until it has printed the text."""
        wait_for(
            lambda: text in self.output or self.process.poll() is not None, timeout, f"{text!r} is printed"
        )
        assert text in self.output, self.output
        return self.output

    def family(self) -> set[int]:
        """Return the process ids of the command and everything below it."""
        return set(tree(self.process.pid))

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)


def alive(pids: set[int]) -> set[int]:
    """Return those of the processes that still run."""
    return pids & {process.pid for process in processes()}

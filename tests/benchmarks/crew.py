"""The processes of the peers, asked one after the other, and where they and the server may run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from .legacy import legacy_python
from .peers import PEERS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


class PeerError(RuntimeError):
    """A peer's process could not do what it was asked for."""


class Member:
    """A process that answers: one peer's, or that of another script."""

    def __init__(self, name: str, script: str = "worker.py") -> None:
        self.name = name
        self.label = PEERS[name].label if name in PEERS else name
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
        environment["PYTHONPATH"] = "" if name == "legacy" else str(ROOT)
        environment["PYTHONHASHSEED"] = "0"
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # or each start would compile anew
        self._process = subprocess.Popen(
            [legacy_python() if name == "legacy" else sys.executable, str(HERE / script), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def send(self, do: str, **arguments: Any) -> None:
        """Ask for something; the answer is to be received."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()

    def receive(self, timeout: float = 120.0) -> Any:
        """Return the answer, or None where the peer has no such operation; raises PeerError."""
        assert self._process.stdout is not None
        watch = threading.Timer(timeout, self._process.kill)
        watch.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watch.cancel()
        if not line:
            raise PeerError(f"{self.label}: its process ended, or gave no answer within {timeout:g} s")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.label}: {answer['error']}")
        return answer.get("answer")

    def ask(self, do: str, timeout: float = 120.0, **arguments: Any) -> Any:
        """Send and receive."""
        self.send(do, **arguments)
        return self.receive(timeout)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        # Its pools' threads and connections are of no more use.
        self._process.kill()
        self._process.wait(10)


class Crew:
    """The processes of several peers; a context manager."""

    def __init__(self, names: Iterable[str]) -> None:
        self.members: list[Member] = []
        self._names = tuple(names)

    def __enter__(self) -> Crew:
        try:
            for name in self._names:
                self.members.append(Member(name))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    def open(self, servers: list[dict[str, Any]], size: int, fill: bool = False) -> None:
        """Let each make its pool."""
        for member in self.members:
            member.ask("open", servers=servers, size=size, fill=fill)

    def close(self) -> None:
        """End all."""
        for member in self.members:
            member.close()


def pin(pid: int, cores: Iterable[int]) -> None:
    """Let a process, with all of its threads, run on those cores only."""
    wanted = set(cores)
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), wanted)


def pin_family(pid: int, cores: Iterable[int]) -> None:
    """Let a process and those that it started (a server's backends) run on those cores only."""
    wanted = set(cores)
    pin(pid, wanted)
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            stat = Path(f"/proc/{int(entry)}/stat").read_text()
            if int(stat.rpartition(")")[2].split()[1]) == pid:
                pin(int(entry), wanted)

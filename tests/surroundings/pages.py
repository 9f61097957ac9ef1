"""What a page of doc/ shows, run as it stands there."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

from samples import ROOT, Sample, samples
from support import wait_for

from pgdbpool.cluster import Cluster, config_yaml

HOWTO = ROOT / "doc" / "howto"


def shown(page: str) -> list[Sample]:
    """Return the samples of a how-to in order."""
    return list(samples(HOWTO / f"{page}.rst"))


def write_application(place: Path, cluster: Cluster) -> None:
    """Write the files of the how-to for gunicorn, whose app.py the others use too, for these servers."""
    for sample in shown("gunicorn"):
        if sample.caption:
            (place / sample.caption).write_text(sample.text)
    (place / "pgdbpool.yaml").write_text(config_yaml(cluster))


class Running:
    """A context manager: a server that runs until the end of the block."""

    def __init__(self, place: Path, *command: str, listens: str, **variables: str) -> None:
        self._log = place / "log"
        packages = os.pathsep.join(filter(None, (str(place), str(ROOT), os.environ.get("PYTHONPATH"))))
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=place,
                env={**os.environ, "PYTHONPATH": packages, "PYTHONDONTWRITEBYTECODE": "1", **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            self.port = int(wait_for(lambda: self._found(listens), 30, "the server listens")[1])
            wait_for(lambda: self.ask()[0] != 0, 30, "the application answers")
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(40)
        finally:
            self.process.kill()
            self.process.wait(10)

    def _found(self, pattern: str) -> re.Match[str] | None:
        assert self.process.poll() is None, self.log()
        return re.search(pattern, self.log())

    def log(self) -> str:
        """Return what it has printed."""
        return self._log.read_text(errors="replace")

    def ask(self, path: str = "/") -> tuple[int, str]:
        """Return status and text of an answer; status 0 if there is none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except (OSError, http.client.HTTPException):
            return 0, ""
        finally:
            connection.close()


class Clients:
    """A context manager: threads that ask until the end of the block, and count what they are answered."""

    def __init__(self, server: Running, threads: int = 4) -> None:
        self.answers: Counter[tuple[int, str]] = Counter()
        self._server = server
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        while not self._over.wait(0.01):
            self.answers[self._server.ask()] += 1


def beside(name: str) -> str:
    """Return the path of a program that is installed beside this Python."""
    return str(Path(sys.executable).parent / name)

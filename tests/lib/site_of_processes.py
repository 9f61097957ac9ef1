"""An application under gunicorn whose processes publish their status, and load for it."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from support import wait_for

import pgdbpool

ROOT = Path(pgdbpool.__file__).parents[1]
TOKEN = "a-token-for-the-tests"
PASSWORD = "never-to-be-shown"
PAGE = "/-/pools/"
APPLICATION = """
    import json, os, time
    from pathlib import Path
    from urllib.parse import parse_qs
    import pgdbpool as dbpool
    from pgdbpool.wsgi import StatusApp, mount

    dbpool.Connection.init(json.loads(Path("config.json").read_text()))

    def work(environ, start_response):
        seconds = float(parse_qs(environ["QUERY_STRING"]).get("hold", ["0"])[0])
        status = "200 OK"
        try:
            with dbpool.Handler("read", timeout=5) as db:
                db.fetchval("SELECT pg_sleep(%s)", (seconds,))
            if environ["PATH_INFO"] == "/both":
                with dbpool.Handler("write") as db:
                    db.fetchval("SELECT 1")
        except dbpool.Error:
            status = "503 Service Unavailable"
        start_response(status, [("Content-Type", "text/plain")])
        return [str(os.getpid()).encode()]

    application = mount(work, "/-/pools", StatusApp(token={token!r}, actions=True))
"""


class Site:
    """The application with some workers, on a free port; stopped by its process id."""

    def __init__(
        self, place: Path, config: dict[str, Any], *arguments: str, application: str = APPLICATION
    ) -> None:
        self.place = place
        self.runtime_dir = str(place / "run")
        (place / "config.json").write_text(json.dumps({**config, "runtime_dir": self.runtime_dir}))
        source = textwrap.dedent(application).format(token=TOKEN)
        # Under a name that can be shown: the page tells where blocks begin.
        (place / "site_app.py").write_text(f"exec(compile({source!r}, '/srv/shop/app.py', 'exec'))\n")
        log = self.log = place / "log"
        packages = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "gunicorn",
                    "--bind",
                    "127.0.0.1:0",
                    *arguments,
                    "site_app:application",
                ],
                cwd=place,
                env={**os.environ, "PYTHONPATH": packages, "PYTHONDONTWRITEBYTECODE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            self.port = int(wait_for(self._listening, 20, "gunicorn listens")[1])
            wait_for(self._answers, 20, "the application answers")
        except BaseException:
            self.process.kill()
            self.process.wait(10)
            raise

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{PAGE}"

    def ask(
        self,
        path: str,
        method: str = "GET",
        body: str | None = None,
        token: str | None = TOKEN,
        **headers: str,
    ) -> tuple[int, dict[str, str], str]:
        """Send a request; return status, headers and text."""
        if token is not None:
            headers["Authorization"] = "Basic " + base64.b64encode(f"me:{token}".encode()).decode()
        if body is not None:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read().decode()
        finally:
            connection.close()

    def overview(self) -> dict[str, Any]:
        """Return what `status.json` tells."""
        status, _, text = self.ask(f"{PAGE}status.json")
        assert status == 200, text
        found: dict[str, Any] = json.loads(text)
        return found

    def _listening(self) -> re.Match[str] | None:
        assert self.process.poll() is None, self.log.read_text()
        return re.search(r"Listening at: http://127.0.0.1:(\d+)", self.log.read_text())

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.ask("/")[0] == 200
        return False


class Load:
    """Threads that send requests until the end of the block."""

    def __init__(self, site: Site, threads: int = 6, path: str = "/both?hold=0.002") -> None:
        self.statuses: Counter[int] = Counter()
        self._site, self._path = site, path
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        while not self._over.wait(0.02):
            with contextlib.suppress(OSError, http.client.HTTPException):
                self.statuses[self._site.ask(self._path)[0]] += 1

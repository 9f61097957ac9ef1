"""A real Apache with mod_wsgi on a free port of the loopback, run from a directory of its own."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from programs import program
from support import wait_for

import pgdbpool

ROOT = Path(pgdbpool.__file__).parents[1]
MODULES = Path("/usr/lib/apache2/modules")
SETTINGS = """
ServerRoot {place}
ServerName localhost
PidFile {place}/pid
ErrorLog {place}/error.log
LogLevel info
DefaultRuntimeDir {place}
Listen 127.0.0.1:{port}
{loads}
{user}
StartServers 1
GracefulShutdownTimeout 10
WSGISocketPrefix {place}/wsgi
WSGIDaemonProcess shop processes={processes} threads=4 python-path={packages} home={place} \\
    graceful-timeout=15 shutdown-timeout={shutdown_timeout}
{extra}
WSGIScriptAlias / {place}/app.wsgi process-group=shop {group}
<Directory {place}>
    Require all granted
</Directory>
"""


class Apache:
    """A context manager; `group` is what stands after `process-group` in the line of the application."""

    def __init__(
        self,
        place: Path,
        application: str,
        group: str = "application-group=%{GLOBAL}",
        processes: int = 2,
        shutdown_timeout: int = 6,
        extra: str = "",
    ) -> None:
        self._program = program("apache2", "apache2")
        module = MODULES / f"mod_wsgi.so-{sys.version_info.major}.{sys.version_info.minor}"
        if not module.exists():
            pytest.skip(f"{module.name} is not installed: Debian's package libapache2-mod-wsgi-py3")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.place = place
        self._log = place / "error.log"
        names = ("mpm_event", "authz_core")
        loads = [f"LoadModule {name}_module {MODULES}/mod_{name}.so" for name in names]
        text = SETTINGS.format(
            place=place,
            port=self.port,
            loads="\n".join([*loads, f"LoadModule wsgi_module {module}"]),
            user="User nobody\nGroup nogroup" if os.geteuid() == 0 else "",
            processes=processes,
            packages=os.pathsep.join((str(ROOT), sysconfig.get_path("purelib"))),
            shutdown_timeout=shutdown_timeout,
            group=group,
            extra=extra,
        )
        (place / "httpd.conf").write_text(text)
        self.write(application)
        self._process: subprocess.Popen[bytes] | None = None

    def write(self, application: str) -> None:
        """Put a version of the application in place."""
        (self.place / "app.wsgi").write_text(application)

    def __enter__(self) -> Apache:
        self._process = subprocess.Popen(
            [self._program, "-D", "FOREGROUND", "-f", str(self.place / "httpd.conf")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self.place / "stderr").open("wb"),
            env={**os.environ, "LANG": "C.UTF-8"},
        )
        try:
            wait_for(self._listens, 30, "Apache answers")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
        except OSError:
            return False
        return True

    def signal(self, number: int) -> None:
        """Send the parent a signal, as `apachectl` does."""
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self, timeout: float) -> None:
        """Wait for the end of the parent."""
        assert self._process is not None
        self._process.wait(timeout)

    def log(self) -> str:
        """Return what it has logged."""
        return (self.place / "stderr").read_text() + (self._log.read_text() if self._log.exists() else "")

    def ask(self, path: str = "/", timeout: float = 30.0) -> Any:
        """Return the JSON that a request is answered with, or the status, or the error."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
            return json.loads(body) if answer.status == 200 else answer.status
        except (OSError, http.client.HTTPException) as error:
            return error
        finally:
            connection.close()

    def later(self, path: str) -> Callable[[], Any]:
        """Send a request in a thread; return a function that waits for what it was answered with."""
        answers: list[Any] = []
        thread = Thread(target=lambda: answers.append(self.ask(path)), daemon=True)
        thread.start()

        def wait() -> Any:
            thread.join(60)
            return answers[0]

        return wait

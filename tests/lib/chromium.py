"""A headless Chromium, driven over its DevTools protocol with nothing but the standard library."""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from support import wait_for

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions",
    "--hide-scrollbars", "--force-device-scale-factor=1", "--remote-debugging-port=0",
)  # fmt: skip


class Browser:
    """One page of a Chromium of its own; it keeps what was said on the console and what was asked for."""

    def __init__(self, profile: Path) -> None:
        assert PROGRAM is not None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._sent = 0
        self._process = subprocess.Popen(
            [PROGRAM, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            port_file = profile / "DevToolsActivePort"
            wait_for(lambda: port_file.exists() and port_file.read_text().count("\n"), 60, "Chromium starts")
            port = int(port_file.read_text().split()[0])
            self._socket = _websocket(wait_for(lambda: _page(port), 30, "Chromium has a page"))
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if hasattr(self, "_socket"):
            self._socket.close()
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)

    def call(self, method: str, **params: Any) -> Any:
        """Send a command and return its result."""
        answer = self._ask(method, params)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _ask(self, method: str, params: dict[str, Any]) -> Any:
        """Send a command and return the answer to it."""
        self._sent += 1
        number = self._sent
        self._send(json.dumps({"id": number, "method": method, "params": params}).encode())
        while True:
            message = json.loads(self._receive())
            if message.get("id") == number:
                return message
            self._note(message)

    def go(self, url: str) -> None:
        """Go to an address and wait until the page is there."""
        self.call("Page.navigate", url=url)
        wait_for(
            lambda: self.run("document.readyState") == "complete" and self.run("location.href") == url, 60
        )

    def run(self, expression: str) -> Any:
        """Return the value of an expression in the page; where that is being replaced, in the next one."""
        params = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer: dict[str, Any] = {}

        def evaluated() -> bool:
            answer.update(self._ask("Runtime.evaluate", params))
            return "result" in answer

        wait_for(evaluated, 60, f"an answer to {expression}")
        done = answer["result"]
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def text(self, selector: str = "body") -> str:
        """Return the text that is shown there; nothing while there is no such element."""
        return str(self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def click(self, selector: str) -> None:
        """Click with the mouse in the middle of an element, as a person does: again where it moved away."""

        def clicked() -> bool:
            x, y = self.run(
                f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView();"
                "window.missed = true; e.addEventListener('click', () => { window.missed = false; });"
                "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
            )
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
            return self.run("window.missed") is not True  # nor is it on the page that a click leads to

        wait_for(clicked, 60, f"{selector} is clicked")

    def press(self, key: str) -> None:
        """Press a key, by its name."""
        codes = {"Tab": 9, "Enter": 13}
        for kind, text in (("keyDown", "\r" if key == "Enter" else ""), ("keyUp", "")):
            code = {"code": key, "windowsVirtualKeyCode": codes[key]}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=text, **code)

    def look(self, width: int, height: int = 900, scheme: str = "light", mobile: bool = False) -> None:
        """Have a screen of that size, light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, mobile=mobile,
            deviceScaleFactor=2 if mobile else 1,
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, height: int | None = None) -> bytes:
        """Return a PNG of the whole page, or of its upper part."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(shot["data"])

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message["method"] == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif message["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(str(params["args"]))
        elif message["method"] == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif message["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(str(params["entry"]))

    # Of RFC 6455, what one client and one server on one machine need.

    def _send(self, payload: bytes) -> None:
        length = len(payload)
        size = bytes([0x80 | length]) if length < 126 else b"\xfe" + struct.pack(">H", length)
        if length > 0xFFFF:
            size = b"\xff" + struct.pack(">Q", length)
        self._socket.sendall(b"\x81" + size + bytes(4) + payload)  # a mask of zeros changes nothing

    def _receive(self) -> bytes:
        whole = b""
        while True:
            first, second = self._exactly(2)
            length = second & 0x7F
            if length > 125:
                length = int.from_bytes(self._exactly(2 if length == 126 else 8), "big")
            payload = self._exactly(length)
            if first & 0x0F in (0, 1):  # the others are pings
                whole += payload
                if first & 0x80:
                    return whole

    def _exactly(self, number: int) -> bytes:
        data = b""
        while len(data) < number:
            more = self._socket.recv(number - len(data))
            assert more, "Chromium has hung up"
            data += more
        return data


def _page(port: int) -> str | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/json/list")
        pages = json.loads(connection.getresponse().read())
    except (OSError, ValueError):
        return None
    finally:
        connection.close()
    return next((str(page["webSocketDebuggerUrl"]) for page in pages if page["type"] == "page"), None)


def _websocket(url: str) -> socket.socket:
    parts = urlsplit(url)
    link = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=60)
    key = base64.b64encode(os.urandom(16)).decode()
    link.sendall(
        f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    answer, deadline = b"", time.monotonic() + 10
    while not answer.endswith(b"\r\n\r\n"):
        assert time.monotonic() < deadline
        answer += link.recv(1)
    assert b" 101 " in answer, answer
    return link

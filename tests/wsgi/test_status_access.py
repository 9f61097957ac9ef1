"""Who may see the status page, and who may drain from it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from wsgiref.util import setup_testing_defaults

import pytest
from support import server, wait_for

from pgdbpool import Connection, Handler
from pgdbpool._status.runtime_dir import RuntimeDir
from pgdbpool.overview import gather
from pgdbpool.wsgi import StatusApp, mount

TOKEN = "sixteen-characters"


@pytest.fixture
def place(known_cluster: Any, tmp_path: Path) -> Iterator[str]:
    place = str(tmp_path / "run")
    db = [
        server(known_cluster.nodes[0], label="<b>&one"),
        server(known_cluster.nodes[1], label="two", **{"pass": "hunter2!"}),
    ]
    groups = {"all": {"connection_count": 2}, "write": {"target": "primary", "endpoints": ["<b>&one"]}}
    Connection.init({"db": db, "groups": groups, "runtime_dir": place})
    with Handler("all") as block:
        block.query("SELECT 1")
    wait_for(lambda: os.path.isdir(place) and gather(place)["processes"])
    yield place
    Connection.reset()


def ask(app: Any, path: str = "/", method: str = "GET", form: Any = None, **environ: str) -> Any:
    """Call the application; return status, headers and text."""
    body = urlencode(form).encode() if form is not None else b""
    request: dict[str, Any] = {
        "REQUEST_METHOD": method, "PATH_INFO": path, "REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "localhost:80",
        "SCRIPT_NAME": "/-/pools", "wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body)),
        **environ,
    }  # fmt: skip
    setup_testing_defaults(request)
    answer: list[Any] = []
    text = b"".join(app(request, lambda status, headers: answer.extend([int(status[:3]), dict(headers)])))
    return (*answer, text.decode())


def form_of(app: Any, **environ: str) -> str:
    """Return what the page's forms carry."""
    found = re.search(r'name="form" value="([^"]+)"', ask(app, **environ)[2])
    assert found
    return found[1]


@pytest.mark.parametrize(
    "environ",
    [
        {"REMOTE_ADDR": "192.0.2.1"},
        {"REMOTE_ADDR": ""},
        {"HTTP_X_FORWARDED_FOR": "192.0.2.1"},
        {"HTTP_FORWARDED": "for=192.0.2.1"},
        {"HTTP_HOST": "evil.example"},
        {"HTTP_HOST": "127.0.0.1.evil.example"},
        {"HTTP_HOST": ""},
    ],
)
def test_others_than_this_machine_are_refused_by_default(place: str, environ: dict[str, str]) -> None:
    assert ask(StatusApp())[0] == 200
    assert ask(StatusApp(), REMOTE_ADDR="::1", HTTP_HOST="[::1]:8000")[0] == 200
    status, _, text = ask(StatusApp(), **environ)
    assert status == 403
    assert "two" not in text


def test_a_token_is_asked_for_at_every_address(place: str) -> None:
    app = StatusApp(token=TOKEN)
    for path in ("/", "/status.json", "/page.json", "/status.js"):
        status, headers, _ = ask(app, path)
        assert (status, headers["WWW-Authenticate"].split()[0]) == (401, "Basic")
    for given in ("wrong-wrong-wrong", "", "é"):
        basic = "Basic " + base64.b64encode(f"me:{given}".encode()).decode()
        assert ask(app, HTTP_AUTHORIZATION=basic)[0] == 401
    assert ask(app, HTTP_AUTHORIZATION="Basic !!")[0] == 401
    basic = "Basic " + base64.b64encode(f"me:{TOKEN}".encode()).decode()
    assert ask(app, HTTP_AUTHORIZATION=basic, REMOTE_ADDR="192.0.2.1")[0] == 200
    assert ask(app, HTTP_AUTHORIZATION=f"Bearer {TOKEN}")[0] == 200


def test_a_callable_decides(place: str) -> None:
    app = StatusApp(authorize=lambda environ: environ.get("REMOTE_USER") == "ops")
    assert ask(app)[0] == 403
    assert ask(app, REMOTE_USER="ops", REMOTE_ADDR="192.0.2.1")[0] == 200


def test_unsafe_statements_are_refused() -> None:
    with pytest.raises(ValueError, match="16 at least"):
        StatusApp(token="short")
    with pytest.raises(ValueError, match="authorize or token"):
        StatusApp(token=TOKEN, authorize=lambda environ: True)
    with pytest.raises(ValueError, match="not a path to mount at"):
        mount(StatusApp(), "pools/", StatusApp())


def test_nothing_comes_from_elsewhere_and_nothing_is_kept(place: str) -> None:
    for path in ("/", "/status.json", "/status.css", "/nothing"):
        headers = ask(StatusApp(), path)[1]
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
    page = ask(StatusApp())[2]
    assert not re.search(r"https?://|style=|<script>|\son\w+=", page)


def test_names_are_escaped_and_passwords_not_there(place: str) -> None:
    app = StatusApp(actions=True)
    page, data = ask(app)[2], ask(app, "/status.json")[2]
    assert "&lt;b&gt;&amp;one" in page
    assert "<b>&one" not in page
    assert "hunter2!" not in page + data + ask(app, "/page.json")[2]
    assert {endpoint["label"] for endpoint in json.loads(data)["endpoints"]} == {"<b>&one", "two"}


def test_draining_is_off_unless_it_is_enabled(place: str) -> None:
    form = form_of(StatusApp(actions=True))
    for actions in (False, lambda environ: False):
        app = StatusApp(actions=actions)
        assert "<form" not in ask(app)[2]
        assert ask(app, "/drain", "POST", {"endpoint": "two", "form": form})[0] == 403
    with RuntimeDir(place) as room:
        assert room.orders() == []


@pytest.mark.slow
def test_only_the_page_itself_can_drain(place: str) -> None:
    app = StatusApp(actions=True)
    form = form_of(app)
    good = {"endpoint": "two", "form": form}
    old = "1000000000." + form.partition(".")[2]
    for wrong in (
        {},
        {"form": ""},
        {"form": "x.y"},
        {"form": form[:-1]},
        {"form": old},
        {"form": "\N{FULLWIDTH DIGIT NINE}." + form},
    ):
        assert ask(app, "/drain", "POST", {**good, "form": "", **wrong})[0] == 403
    assert ask(app, "/drain", "POST", good, HTTP_SEC_FETCH_SITE="cross-site")[0] == 403
    assert ask(app, "/drain", "GET")[0] == 405
    assert ask(app, "/", "POST", good)[0] == 405
    assert ask(app, "/drain", "POST", {**good, "x": "y" * 5000})[0] == 413
    assert ask(app, "/drain", "POST", {**good, "endpoint": "three"})[0] == 404
    with RuntimeDir(place) as room:
        assert room.orders() == []
    assert ask(app, "/drain", "POST", good)[:2][0] == 303
    wait_for(lambda: Connection.status().endpoints["two"].state == "draining")
    # Another worker's page is as good: they share the secret.
    assert ask(StatusApp(actions=True), "/undrain", "POST", {**good, "form": form_of(app)})[0] == 303
    wait_for(lambda: Connection.status().endpoints["two"].state == "up")


def test_the_last_endpoint_of_a_group_is_not_drained(place: str) -> None:
    app = StatusApp(actions=True)
    status, _, text = ask(app, "/drain", "POST", {"endpoint": "<b>&one", "form": form_of(app)})
    assert (status, "'write'" in text) == (409, True)
    assert Connection.status().endpoints["<b>&one"].state == "up"


def test_without_a_directory_this_process_is_shown_and_nothing_can_be_drained(known_cluster: Any) -> None:
    try:
        Connection.init({"db": [server(known_cluster.primary, label="one")], "groups": {"g": {}}})
        app = StatusApp(actions=True)
        text = ask(app)[2]
        assert "runtime_dir" in text
        assert str(os.getpid()) in text
        assert "<form" not in text
    finally:
        Connection.reset()


def test_the_guards_of_a_group_are_shown_once_it_has_had_any(known_cluster: Any) -> None:
    groups = {"read": {"target": "standby"}, "write": {"target": "primary"}}
    try:
        Connection.init({"db": [server(node) for node in known_cluster.nodes], "groups": groups})
        assert "Guards" not in ask(StatusApp())[2]
        token = Connection.token("write")
        known_cluster.primary.execute("CHECKPOINT")  # standbys get what is flushed; others may have written
        known_cluster.wait_in_sync()
        Connection.fetchval("read", "SELECT 1", after=token)
        text = ask(StatusApp())[2]
        assert text.count("<dt>Guards</dt><dd>1 passed, 0 failed</dd>") == 1
        assert "<dd>0 waited, 0 from the primary, 0 refused</dd>" in text
    finally:
        Connection.reset()


def test_before_init_there_is_nothing_to_show() -> None:
    assert ask(StatusApp())[0] == 503


def test_it_is_mounted_under_an_application(place: str) -> None:
    def other(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [environ["PATH_INFO"].encode()]

    app = mount(other, "/-/pools", StatusApp())
    assert ask(app, "/-/poolside", SCRIPT_NAME="")[2] == "/-/poolside"
    assert "<!doctype html>" in ask(app, "/-/pools/", SCRIPT_NAME="")[2]
    status, headers, _ = ask(app, "/-/pools", SCRIPT_NAME="/shop")
    assert (status, headers["Location"]) == (302, "pools/")
    assert ask(app, "/-/pools/elsewhere", SCRIPT_NAME="")[0] == 404

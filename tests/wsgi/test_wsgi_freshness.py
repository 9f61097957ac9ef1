"""The middleware that lets a client read its own writes: what it sends, and what it takes."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from random import Random
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
from support import config

import pgdbpool
from pgdbpool import Connection, Handler, Token
from pgdbpool._request.freshness import current_seen
from pgdbpool._util.token import Position
from pgdbpool.wsgi import ReadYourWritesMiddleware, TenantMiddleware
from pgdbpool.wsgi import _freshness as middleware

SECRET = "sixteen characters, or more"


def ask(app: Any, **environ: str) -> tuple[dict[str, str], bytes]:
    """Send one request as a server does; return the headers and the body."""
    setup_testing_defaults(environ)
    found: list[Any] = []
    body = validator(app)(
        {"QUERY_STRING": "", **environ, "wsgi.version": (1, 0)}, lambda s, h, e=None: found.append(h)
    )
    try:
        content = b"".join(body)
    finally:
        body.close()
    return dict(found[0]), content


@pytest.fixture
def pools(known_cluster: Any, mode: str) -> Iterator[Any]:
    known_cluster.primary.execute("CREATE TABLE t (i int)")
    few = {"connection_count": 1}
    groups = {"write": {"target": "primary", **few}, "read": {"target": "standby", "fresh_wait": 5, **few}}
    Connection.init(config(known_cluster.nodes[:2], mode, **groups))
    yield known_cluster
    Connection.reset()


def writing(environ: Any, start_response: Any) -> list[bytes]:
    Connection.execute("write", "INSERT INTO t VALUES (1)")
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"done"]


def reading(environ: Any, start_response: Any) -> list[bytes]:
    seen = current_seen()
    assert seen is not None
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(seen.token).encode()]


def early(environ: Any, start_response: Any) -> Iterator[bytes]:
    """Begin the response, then write, as a generator does."""
    start_response("200 OK", [("Content-Type", "text/plain")])
    Connection.execute("write", "INSERT INTO t VALUES (1)")
    yield b"done"


def fake(positions: list[Position] | None = None) -> Callable[..., Any]:
    """Return an application that writes, as far as its context knows."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        seen = current_seen()
        assert seen is not None
        for position in positions or [Position(7, 1, 1000)]:
            seen.note(position)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b""]

    return app


def through(app: Any, **options: Any) -> ReadYourWritesMiddleware:
    return ReadYourWritesMiddleware(app, secret=SECRET, **options)


def given(**options: Any) -> str:
    """Return the cookie that a request which writes is given, as the client sends it back."""
    headers, _ = ask(through(fake(), **options))
    return headers["Set-Cookie"].partition(";")[0]


@pytest.mark.parametrize("app", [writing, early])
def test_a_request_that_writes_gives_a_cookie_and_the_next_one_sees_it(pools: Any, app: Any) -> None:
    headers, body = ask(through(app))
    assert body == b"done"
    value, _, attributes = headers["Set-Cookie"].partition(";")
    assert attributes == " Path=/; Max-Age=60; HttpOnly; SameSite=Lax"
    _, token = ask(through(reading), HTTP_COOKIE=f"other=1; {value}")
    assert Token.parse(token.decode()) | Connection.token("write") == Connection.token("write")


def test_over_https_the_cookie_is_secure() -> None:
    headers, _ = ask(through(fake(), path="/shop", cookie="mine", max_age=5), **{"wsgi.url_scheme": "https"})
    assert re.fullmatch(
        r"mine_\d+=[\w.-]+; Path=/shop; Max-Age=5; HttpOnly; SameSite=Lax; Secure", headers["Set-Cookie"]
    )


def test_a_request_that_only_reads_sets_none(pools: Any) -> None:
    assert "Set-Cookie" not in ask(through(reading))[0]


def test_a_header_may_carry_it(pools: Any) -> None:
    headers, _ = ask(through(writing, header="X-Seen"))
    assert "Set-Cookie" not in headers
    _, token = ask(through(reading, header="X-Seen"), HTTP_X_SEEN=headers["X-Seen"])
    assert token != b"None"
    assert "X-Seen" not in ask(through(reading, header="X-Seen"), HTTP_X_SEEN=headers["X-Seen"])[0]


def test_what_was_tampered_with_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    good = given()
    assert ask(through(reading), HTTP_COOKIE=good)[1] != b"None"
    name, _, value = good.partition("=")
    text, at, signature = value.split(".")
    other = str(Token([Position(7, 1, 1)]))
    bad = [
        "", "x", value[:-1], value + "A", f"{text}.{at}", f"{other}.{at}.{signature}",
        f"{text}.{int(at, 16) + 1:x}.{signature}", f"{text}.{at}.{signature[::-1]}", "." * 40, "A" * 5000,
        value.replace(".", ";"), f"{text}..{signature}", f"{text}.{at}.{'é' * 22}",
    ]  # fmt: skip
    for each in bad:
        assert ask(through(reading), HTTP_COOKIE=f"{name}={each}")[1] == b"None", each
    foreign = ReadYourWritesMiddleware(reading, secret="another secret, as long")
    assert ask(foreign, HTTP_COOKIE=good)[1] == b"None"
    for others in ("a[]=\x00; ,,;=", 'prefs={"a":1}', "theme=dark mode", "novalue", 'a="\\"' * 2000):
        assert ask(through(reading), HTTP_COOKIE=f"{others}; {good}")[1] == text.encode()
    for later in (61, -61):
        monkeypatch.setattr(middleware, "time", lambda later=later: int(at, 16) + later)
        assert ask(through(reading), HTTP_COOKIE=good)[1] == b"None"


def test_the_cookie_is_dropped_once_each_standby_has_what_was_written(pools: Any) -> None:
    headers, _ = ask(through(writing))
    cookie = headers["Set-Cookie"].partition(";")[0]

    def look(environ: Any, start_response: Any) -> list[bytes]:
        assert Connection.fetchval("read", "SELECT count(*) FROM t") == 1
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b""]

    headers, _ = ask(through(look), HTTP_COOKIE=cookie)
    name = cookie.partition("=")[0]
    assert headers["Set-Cookie"] == f"{name}=; Path=/; Max-Age=0; HttpOnly; SameSite=Lax"


class Client:
    """A browser with several tabs: one jar of cookies for all."""

    def __init__(self) -> None:
        self.jar: dict[str, str] = {}

    def ask(self, app: Any) -> bytes:
        found: list[Any] = []
        environ = {"HTTP_COOKIE": "; ".join(f"{name}={value}" for name, value in self.jar.items())}
        setup_testing_defaults(environ)
        body = b"".join(through(app)(environ, lambda status, headers, error=None: found.extend(headers)))
        for text in (value for header, value in found if header == "Set-Cookie"):
            name, _, value = text.partition(";")[0].partition("=")
            self.jar.pop(name, None)
            if "Max-Age=0" not in text:
                self.jar[name] = value
        return body


def answered(start_response: Any) -> list[bytes]:
    start_response("200 OK", [])
    return [b""]


@pytest.mark.parametrize("slow", ["reads", "writes"])
def test_a_slow_request_takes_no_cookie_of_a_write_that_overtook_it(
    monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    monkeypatch.setattr(Connection, "is_everywhere", lambda token: token.positions[0].lsn < 1500)
    monkeypatch.setattr(middleware, "random", Random(1))  # by chance both may choose the same place
    client = Client()

    def app(environ: Any, start_response: Any) -> list[bytes]:
        seen = current_seen()
        assert seen is not None
        if slow == "writes":
            seen.note(Position(7, 1, 1001))
        client.ask(fake([Position(7, 1, 2000)]))  # of another tab, meanwhile
        return answered(start_response)

    client.ask(fake([Position(7, 1, 1000)]))
    client.ask(app)
    token = Token.parse(client.ask(reading).decode())
    assert token.positions == (Position(7, 1, 2000),)


def test_overlapping_writes_leave_few_cookies_and_the_next_write_takes_them_over() -> None:
    client = Client()
    for number in range(200):
        before, client.jar = client.jar, {}  # each begins before the others end
        client.ask(fake([Position(7, 1, 1000 + number)]))
        client.jar = {**before, **client.jar}
    assert 2 < len(client.jar) <= middleware.PLACES
    client.ask(fake([Position(7, 1, 5000)]))
    assert len(client.jar) == 1
    assert Token.parse(client.ask(reading).decode()).positions == (Position(7, 1, 5000),)


def test_a_request_may_bring_several_values_in_its_header() -> None:
    values = [ask(through(fake([Position(7, 1, lsn)]), header="X-Seen"))[0]["X-Seen"] for lsn in (9, 5)]
    token = ask(through(reading, header="X-Seen"), HTTP_X_SEEN=", ".join([*values, "forged"]))[1]
    assert Token.parse(token.decode()).positions == (Position(7, 1, 9),)


def test_a_write_adds_to_what_the_request_brought() -> None:
    first = given()
    headers, _ = ask(through(fake([Position(8, 1, 5)])), HTTP_COOKIE=first)
    _, token = ask(through(reading), HTTP_COOKIE=headers["Set-Cookie"].partition(";")[0])
    assert Token.parse(token.decode()).positions == (Position(7, 1, 1000), Position(8, 1, 5))


def test_nothing_is_left_in_the_thread_and_other_middleware_goes_with_it() -> None:
    ask(TenantMiddleware(through(fake()), lambda environ: "a"))
    ask(through(TenantMiddleware(fake(), lambda environ: "a")))
    assert current_seen() is None
    assert pgdbpool.current_tenant() is None


def test_an_application_that_fails_before_its_first_piece_sends_nothing() -> None:
    sent: list[Any] = []

    def failing(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [])
        raise ZeroDivisionError
        yield b""

    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    with pytest.raises(ZeroDivisionError):
        list(through(failing)(environ, lambda *arguments: sent.append(arguments)))  # type: ignore[arg-type]
    assert sent == []


def test_a_page_for_an_error_in_the_body_says_what_was_written_before() -> None:
    sent: list[Any] = []

    def body(start_response: Any) -> Iterator[bytes]:
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            start_response("500 Internal Server Error", [("X-Page", "error")], sys.exc_info())
        yield b"sorry"

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        fake()(environ, start_response)
        return body(start_response)

    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)

    def start(status: str, headers: Any, *error: Any) -> Callable[[bytes], None]:
        sent.append((status, dict(headers)))
        return lambda data: None

    assert list(through(app)(environ, start)) == [b"sorry"]  # type: ignore[arg-type]
    status, headers = sent[-1]
    assert (len(sent), status, headers["X-Page"]) == (2, "500 Internal Server Error", "error")
    assert "Set-Cookie" in headers


def test_an_application_that_uses_write_is_served() -> None:
    out: list[bytes] = []

    def old(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])(b"by hand")
        return []

    environ: dict[str, Any] = {}
    setup_testing_defaults(environ)
    list(through(old)(environ, lambda *arguments: out.append))  # type: ignore[arg-type]
    assert out == [b"by hand"]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"secret": "short"}, "the secret has 5"),
        ({"max_age": 0}, "max_age=0 is not"),
        ({"max_age": True}, "max_age=True is not"),
        ({"cookie": "a b"}, "'a b' is not the name"),
        ({"header": "a:"}, "'a:' is not the name"),
        ({"path": "/;x"}, "path='/;x' is not"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=re.escape(what)):
        ReadYourWritesMiddleware(reading, **{"secret": SECRET, **options})


def test_a_lost_write_is_logged_and_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    lost = Position(7, 1, 1000)

    def app(environ: Any, start_response: Any) -> list[bytes]:
        seen = current_seen()
        assert seen is not None
        assert seen.forgives(lost)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b""]

    headers, _ = ask(through(app), HTTP_COOKIE=given())
    assert "Max-Age=0" in headers["Set-Cookie"]
    assert [record.event for record in caplog.records] == ["token.lost"]  # type: ignore[attr-defined]


def test_a_handler_inside_is_guarded(pools: Any) -> None:
    for standby in pools.standbys:
        standby.execute("SELECT pg_wal_replay_pause()")
    try:
        cookie = ask(through(writing))[0]["Set-Cookie"].partition(";")[0]

        def look(environ: Any, start_response: Any) -> list[bytes]:
            with Handler("read") as db, pytest.raises(pgdbpool.StaleReadError), pgdbpool.deadline(0.3):
                db.fetchval("SELECT count(*) FROM t")
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [b""]

        ask(through(look), HTTP_COOKIE=cookie)
    finally:
        for standby in pools.standbys:
            standby.execute("SELECT pg_wal_replay_resume()")

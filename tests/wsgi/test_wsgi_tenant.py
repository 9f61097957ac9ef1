"""The tenant middleware: bound for the request and its streamed body, and for nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest

import pgdbpool
from pgdbpool.wsgi import TenantMiddleware, TenantRefused, from_header, from_host, from_path


def request(app: Any, **environ: str) -> tuple[str, bytes]:
    """Send one request as a server does: iterate over the body, then close it."""
    setup_testing_defaults(environ)
    status: list[str] = []
    body = validator(app)(
        {"QUERY_STRING": "", **environ, "wsgi.version": (1, 0)}, lambda s, h, e=None: status.append(s)
    )
    try:
        content = b"".join(body)
    finally:
        body.close()
    return status[0], content


class Streaming:
    """A body that tells the current tenant at each step, and remembers it at close."""

    closed_with: Any = "not closed"

    def __iter__(self) -> Iterator[bytes]:
        for _ in range(3):
            yield f"{pgdbpool.current_tenant()} ".encode()

    def close(self) -> None:
        Streaming.closed_with = pgdbpool.current_tenant()


def streaming(environ: Any, start_response: Any) -> Streaming:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return Streaming()


def test_the_tenant_is_bound_for_the_request_its_body_and_its_close() -> None:
    app = TenantMiddleware(streaming, from_header("X-Tenant"))
    assert request(app, HTTP_X_TENANT="a") == ("200 OK", b"a a a ")
    assert Streaming.closed_with == "a"
    assert pgdbpool.current_tenant() is None


def test_nothing_is_left_for_the_next_request_of_the_thread() -> None:
    app = TenantMiddleware(streaming, from_header("X-Tenant"), missing=None)
    with ThreadPoolExecutor(1) as threads:
        for tenant, expected in (("a", b"a a a "), (None, b"None None None "), ("b", b"b b b ")):
            environ = {"HTTP_X_TENANT": tenant} if tenant else {}
            assert threads.submit(request, app, **environ).result()[1] == expected


def test_bodies_that_are_read_in_turns_keep_their_own_tenants() -> None:
    app = TenantMiddleware(streaming, from_header("X-Tenant"))
    bodies = [iter(app({"HTTP_X_TENANT": t}, lambda *_: None)) for t in "ab"]
    assert [next(body) for _ in range(3) for body in bodies] == [b"a ", b"b "] * 3


def test_an_application_that_fails_leaves_nothing() -> None:
    def failing(environ: Any, start_response: Any) -> Any:
        raise RuntimeError(pgdbpool.current_tenant())

    with pytest.raises(RuntimeError, match="a"):
        TenantMiddleware(failing, from_header("X-Tenant"))({"HTTP_X_TENANT": "a"}, lambda *_: None)
    assert pgdbpool.current_tenant() is None


def test_a_missing_or_refused_tenant_is_the_callers_4xx() -> None:
    def extract(environ: Any) -> Any:
        if environ.get("HTTP_X_TENANT") == "evil":
            raise TenantRefused("not yours")
        if environ.get("HTTP_X_TENANT") == "gone":
            raise TenantRefused("moved out", status="410 Gone")
        return environ.get("HTTP_X_TENANT")

    app = TenantMiddleware(streaming, extract, missing="401 Unauthorized", refused="404 Not Found")
    assert request(app) == ("401 Unauthorized", b"this request needs a tenant")
    assert request(app, HTTP_X_TENANT="evil") == ("404 Not Found", b"not yours")
    assert request(app, HTTP_X_TENANT="gone") == ("410 Gone", b"moved out")
    for wrong in ("500 Oops", "403", "hello"):
        with pytest.raises(ValueError, match="4xx"):
            TenantMiddleware(streaming, extract, refused=wrong)


def test_the_ready_made_extractors() -> None:
    host = from_host(r"([a-z0-9-]+)\.example\.com")
    assert host({"HTTP_HOST": "Acme.example.com:8000"}) == "acme"
    assert host({"HTTP_HOST": "acme.example.com.evil.org"}) is None
    assert host({}) is None
    path = from_path(r"/t/([^/]+)/")
    assert path({"PATH_INFO": "/t/acme/users"}) == "acme"
    assert path({"PATH_INFO": "/x/t/acme/users"}) is None
    assert from_header("X-Tenant-Id")({"HTTP_X_TENANT_ID": ""}) is None
    with pytest.raises(ValueError, match="no group"):
        from_path("/t/")


def test_requests_side_by_side_keep_their_own_tenants() -> None:
    barrier = threading.Barrier(8)

    def app(environ: Any, start_response: Any) -> list[bytes]:
        barrier.wait(10)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [str(pgdbpool.current_tenant()).encode()]

    wrapped = TenantMiddleware(app, from_header("X-Tenant"))
    with ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(request, wrapped, HTTP_X_TENANT=f"t{i}") for i in range(8)]
        assert [answer.result()[1] for answer in answers] == [f"t{i}".encode() for i in range(8)]

"""A browser that is redirected after its POST reads what it has written, from standbys that lag.

pytest tests/wsgi/test_redirects.py --long     # 1,000 redirects for each application
"""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from site_of_processes import Site
from support import config

from pgdbpool.cluster import Cluster

pytestmark = pytest.mark.slow

BEGINNING = """
    import json
    from pathlib import Path
    import pgdbpool as dbpool
    from pgdbpool.wsgi import ReadYourWritesMiddleware, StatusApp, mount

    dbpool.Connection.init(json.loads(Path("config.json").read_text()))
"""
END = """
    def view(environ, start_response):
        number = environ["PATH_INFO"].strip("/")
        if environ["REQUEST_METHOD"] == "POST":
            write(int(number))
            start_response("303 See Other", [("Location", "/" + number)])
            return [b""]
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [str(count(int(number or 0))).encode()]

    seeing = ReadYourWritesMiddleware(view, secret="of these tests, and no other") if SEEING else view
    application = mount(seeing, "/-/pools", StatusApp(token={token!r}))
"""
PLAIN = """
    def write(number):
        with dbpool.Handler("write") as db:
            db.query("INSERT INTO t VALUES (%s)", (number,))

    def count(number):
        with dbpool.Handler("read") as db:
            return db.fetchval("SELECT count(*) FROM t WHERE i = %s", (number,))
"""
SQLALCHEMY = """
    from sqlalchemy import text
    from sqlalchemy.orm import sessionmaker
    from pgdbpool.contrib.sqlalchemy import RoutingSession, engine

    session = sessionmaker(class_=RoutingSession, writing=engine("write"), reading=engine("read"))

    def write(number):
        with session.begin() as work:
            work.execute(text("INSERT INTO t VALUES (:number)"), dict(number=number))

    def count(number):
        with session() as work:
            return work.scalar(text("SELECT count(*) FROM t WHERE i = :number"), dict(number=number))
"""
DJANGO = """
    import django
    from django.conf import settings

    settings.configure(
        DATABASES=dict(
            default=dict(ENGINE="pgdbpool.contrib.django", OPTIONS=dict(config="config.json", group="write")),
            replica=dict(ENGINE="pgdbpool.contrib.django", OPTIONS=dict(config="config.json", group="read")),
        ),
        DATABASE_ROUTERS=["pgdbpool.contrib.django.routers.ReadWriteRouter"],
        ROOT_URLCONF="none", SECRET_KEY="none", USE_TZ=True,
    )
    django.setup()
    from django.db import close_old_connections, models, transaction

    class T(models.Model):
        i = models.IntegerField(primary_key=True)

        class Meta:
            app_label, db_table, managed = "app", "t", False

    def write(number):
        with transaction.atomic():
            T.objects.create(i=number)
        close_old_connections()

    def count(number):
        try:
            return T.objects.filter(i=number).count()
        finally:
            close_old_connections()
"""
APPLICATIONS = {"plain WSGI": PLAIN, "SQLAlchemy": SQLALCHEMY, "Django": DJANGO}


@pytest.fixture(scope="module")
def servers() -> Iterator[Cluster]:
    with Cluster(standbys=2, settings={"recovery_min_apply_delay": "20ms"}) as cluster:
        cluster.primary.execute("CREATE TABLE t (i int PRIMARY KEY)")
        cluster.wait_in_sync()
        yield cluster


def redirects(site: Site, numbers: range) -> int:
    """Post each number and follow the redirect, as a browser of its own; return how many were then seen."""
    seen = 0
    for number in numbers:
        _, headers, _ = site.ask(f"/{number}", "POST", "", token=None)
        cookie = headers.get("Set-Cookie", "").partition(";")[0]
        connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=30)
        connection.request("GET", headers["Location"], headers={"Cookie": cookie} if cookie else {})
        seen += connection.getresponse().read() == b"1"
        connection.close()
    return seen


def configuration(servers: Cluster) -> dict[str, Any]:
    few = {"connection_count": 2, "min_size": 1}
    return config(
        servers.nodes, "non-threaded",
        write={"target": "primary", "autocommit": False, **few}, read={"target": "prefer-standby", **few},
    )  # fmt: skip


@pytest.mark.parametrize("name", list(APPLICATIONS))
def test_every_redirect_after_a_post_shows_its_write(
    servers: Cluster, tmp_path: Path, name: str, request: pytest.FixtureRequest
) -> None:
    number = 1000 if request.config.getoption("--long") else 40
    first = (1 + list(APPLICATIONS).index(name)) * 10_000
    source = BEGINNING + "    SEEING = True\n" + APPLICATIONS[name] + END
    with Site(tmp_path, configuration(servers), "--workers", "2", application=source) as site:
        assert redirects(site, range(first, first + number)) == number


def test_without_the_middleware_redirects_show_what_was_before(servers: Cluster, tmp_path: Path) -> None:
    source = BEGINNING + "    SEEING = False\n" + PLAIN + END
    with Site(tmp_path, configuration(servers), "--workers", "2", application=source) as site:
        assert redirects(site, range(20)) < 10

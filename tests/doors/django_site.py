"""A site in Django with a view that reads and one that writes, over one of the ways."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import django
from django.conf import settings

from tests.doors.ways import CONNECT_TIMEOUT, SIZE, TIMEOUT, groups, hosts, own

WAY, SERVERS = own()


def database(role: str) -> dict[str, Any]:
    """Return the settings of the database for a role."""
    if WAY.own:
        options = {key: value for key, value in groups()[role].items() if key != "autocommit"}
        options |= {"hold": WAY.hold}
        found = {key: ",".join(str(each[key]) for each in SERVERS) for key in ("host", "port")}
        engine = "pgdbpool.contrib.django"
    else:
        found = hosts(SERVERS, role)
        options = {name: value for name, value in found.items() if name not in ("host", "port")}
        options |= {"connect_timeout": CONNECT_TIMEOUT}
        options |= {"pool": {"min_size": 1, "max_size": SIZE, "timeout": TIMEOUT}}
        engine = "django.db.backends.postgresql"
    return {
        "ENGINE": engine,
        "HOST": found["host"],
        "PORT": found["port"],
        "NAME": "postgres",
        "USER": "bench",
        "OPTIONS": options,
        "CONN_HEALTH_CHECKS": WAY.checks,
        "ATOMIC_REQUESTS": WAY.atomic and role == "write",
    }


settings.configure(
    ALLOWED_HOSTS=["*"],
    DATABASES={"default": database("write"), "replica": database("read")},
    DATABASE_ROUTERS=["pgdbpool.contrib.django.routers.ReadWriteRouter"],
    LOGGING_CONFIG=None,
    ROOT_URLCONF=__name__,
    SECRET_KEY="of a benchmark",
    USE_TZ=True,
)
django.setup()

from django.core.wsgi import get_wsgi_application
from django.db import connections, models, transaction
from django.db.models import F
from django.http import HttpResponse
from django.urls import path


class Item(models.Model):
    name = models.TextField()
    hits = models.IntegerField()

    class Meta:
        app_label, db_table, managed = "shop", "items", False


def show(request: Any) -> HttpResponse:
    """Read one row."""
    return HttpResponse(Item.objects.get(id=3).name)


def add(request: Any) -> HttpResponse:
    """Write one row, in a transaction."""
    with transaction.atomic():
        Item.objects.filter(id=3).update(hits=F("hits") + 1)
    return HttpResponse("done")


def both(request: Any) -> HttpResponse:
    """Read one row and write it."""
    item = Item.objects.using("default").get(id=3)
    item.hits += 1
    item.save(update_fields=["hits"])
    return HttpResponse("done")


urlpatterns = [path("read", show), path("write", add), path("both", both)]
application = get_wsgi_application()


def ask(where: str) -> None:
    """Answer one request, to its end."""
    environ = {
        "REQUEST_METHOD": "GET", "PATH_INFO": f"/{where}", "SERVER_NAME": "bench", "SERVER_PORT": "80",
        "wsgi.input": io.BytesIO(), "wsgi.errors": io.StringIO(), "wsgi.url_scheme": "http",
    }  # fmt: skip
    statuses: list[str] = []
    answer = application(environ, lambda status, headers: statuses.append(status))
    list(answer)
    answer.close()
    if not statuses[0].startswith("200"):
        raise RuntimeError(statuses[0])


OPERATIONS: dict[str, Callable[[], None]] = {
    "a view with a read": lambda: ask("read"),
    "a view with a write": lambda: ask("write"),
    "a view with a read and a write": lambda: ask("both"),
}


def warm() -> None:
    """Nothing is to be opened by hand."""
    for alias in connections:
        connections[alias].ensure_connection()
        connections[alias].close()

"""The accounts of app.py with Django, in one file: `gunicorn django_app:application`.

Models are read from the group `read`, and written in a transaction of the group `write`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import django
from django.conf import settings

CONFIG = os.environ.get("PGDBPOOL_CONFIG") or str(Path(__file__).with_name("pgdbpool.yaml"))

if not settings.configured:
    settings.configure(
        ALLOWED_HOSTS=["127.0.0.1", "localhost"],
        DATABASES={
            alias: {"ENGINE": "pgdbpool.contrib.django", "OPTIONS": {"config": CONFIG, "group": group}}
            for alias, group in (("default", "write"), ("replica", "read"))
        },
        DATABASE_ROUTERS=["pgdbpool.contrib.django.routers.ReadWriteRouter"],
        MIDDLEWARE=["django_app.errors_in_json"],
        ROOT_URLCONF="django_app",
        SECRET_KEY=os.environ.get("SECRET_KEY", "of this example"),
        USE_TZ=True,
    )
    django.setup()

from django.core.wsgi import get_wsgi_application
from django.db import IntegrityError, OperationalError, connections, models, router, transaction
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.views.decorators.http import require_GET, require_POST

from pgdbpool import Connection, ConnectionLostError
from pgdbpool.wsgi import StatusApp, mount

T = TypeVar("T")


class Account(models.Model):
    name = models.TextField()
    balance = models.DecimalField(max_digits=14, decimal_places=2)

    class Meta:
        app_label, db_table, managed = "bank", "accounts", False


class Transfer(models.Model):
    source = models.ForeignKey(Account, models.PROTECT, db_column="source", related_name="+")
    target = models.ForeignKey(Account, models.PROTECT, db_column="target", related_name="+")
    amount = models.DecimalField(max_digits=14, decimal_places=2)
    idempotency_key = models.TextField(null=True)

    class Meta:
        app_label, db_table, managed = "bank", "transfers", False


class Refused(Exception):
    """Ends a request with this status and message; raised inside a transaction, it also rolls back."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def errors_in_json(get_response: Callable[[HttpRequest], Any]) -> Any:
    """Answer errors in JSON: a middleware."""

    def process(request: HttpRequest, error: Exception) -> JsonResponse | None:
        if isinstance(error, Refused):
            return JsonResponse({"error": str(error)}, status=error.status)
        if isinstance(error, OperationalError):  # the servers' fault, or no connection became free
            # After a lost COMMIT the client repeats the request with the same Idempotency-Key.
            unknown = getattr(error.__cause__, "maybe_committed", False)
            found = {"error": "the database is not available", "maybe_committed": unknown}
            return JsonResponse(found, status=503, headers={"Retry-After": "1"})
        return None

    def answer(request: HttpRequest) -> Any:
        return get_response(request)

    answer.process_exception = process  # type: ignore[attr-defined]
    return answer


def reading(function: Callable[[], T]) -> T:
    """Read, and read again on another server when the first one dies meanwhile: it does no harm."""
    try:
        return function()
    except OperationalError as error:
        if not isinstance(error.__cause__, ConnectionLostError):
            raise
        return function()


def server_of(alias: str) -> str:
    """Return the server that the database has a connection to."""
    return str(connections[alias].connection.endpoint.label)


@require_GET
def get_accounts(request: HttpRequest) -> JsonResponse:
    """List the accounts."""
    accounts = reading(lambda: list(Account.objects.order_by("id").values("id", "name", "balance")))
    return JsonResponse({"accounts": accounts, "server": server_of(router.db_for_read(Account))})


@require_POST
def post_transfer(request: HttpRequest) -> JsonResponse:
    """Move an amount in one transaction."""
    source, target, amount = read_form(request)
    key = request.headers.get("Idempotency-Key")
    try:
        with transaction.atomic():
            done = transfer(source, target, amount, key)
            done["server"] = server_of("default")
    except IntegrityError:  # balance >= 0: the database has the last word, see schema.sql
        raise Refused(409, f"account {source} has less than {amount}") from None
    return JsonResponse(done, status=200 if done["repeated"] else 201)


def transfer(source: int, target: int, amount: Decimal, key: str | None) -> dict[str, Any]:
    """Move the amount, and return the transfer with both balances after it."""
    wanted = {"source_id": source, "target_id": target, "amount": amount}
    # Locked in the order of their ids, so that two opposite transfers never wait for each other.
    locked = Account.objects.select_for_update(no_key=True).filter(id__in=[source, target]).order_by("id")
    accounts = {each.id: each for each in locked}
    for number in (source, target):
        if number not in accounts:
            raise Refused(404, f"there is no account {number}")
    if key is None:
        made, new = Transfer.objects.create(**wanted), True
    else:  # two requests with one key at a time: the second waits here for the first one's end
        made, new = Transfer.objects.get_or_create(idempotency_key=key, defaults=wanted)
    if {name: getattr(made, name) for name in wanted} != wanted:
        raise Refused(422, "this Idempotency-Key belongs to another transfer")
    if new:
        for number, change in ((source, -amount), (target, amount)):
            accounts[number].balance += change
            accounts[number].save(update_fields=["balance"])
    return {
        "id": made.id, "source": source, "target": target, "amount": amount, "repeated": not new,
        "source_balance": accounts[source].balance, "target_balance": accounts[target].balance,
    }  # fmt: skip


def read_form(request: HttpRequest) -> tuple[int, int, Decimal]:
    """Return what the form of a transfer says."""
    source, target, amount = (str(request.POST.get(name, "")) for name in ("source", "target", "amount"))
    if not all(re.fullmatch("[0-9]{1,18}", number) for number in (source, target)) or source == target:
        raise Refused(400, "source and target must be the numbers of two accounts")
    if not re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,2})?", amount) or not Decimal(amount):
        raise Refused(400, "amount must be more than 0, with two decimals at most")
    return int(source), int(target), Decimal(amount)


@require_GET
def get_health(request: HttpRequest) -> JsonResponse:
    """Show the pools of this process."""
    reading(Account.objects.exists)
    return JsonResponse({"status": "ok", "pools": Connection.status().to_dict()})


urlpatterns = [
    path("", get_accounts),
    path("accounts", get_accounts),
    path("transfers", post_transfer),
    path("health", get_health),
]
application = mount(get_wsgi_application(), "/-/pools", StatusApp(actions=True))

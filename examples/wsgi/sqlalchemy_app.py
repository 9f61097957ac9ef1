"""The accounts of app.py through SQLAlchemy's ORM: `gunicorn sqlalchemy_app:application`.

A session reads from the group `read` until it writes, and writes in a transaction of the group `write`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs

from sqlalchemy import ForeignKey, create_engine, exc, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from pgdbpool import Connection
from pgdbpool.contrib.sqlalchemy import RoutingSession
from pgdbpool.wsgi import StatusApp, mount

CONFIG = os.environ.get("PGDBPOOL_CONFIG") or str(Path(__file__).with_name("pgdbpool.yaml"))
T = TypeVar("T")


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "accounts"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    balance: Mapped[Decimal]


class Transfer(Base):
    __tablename__ = "transfers"
    id: Mapped[int] = mapped_column(primary_key=True)
    source: Mapped[int] = mapped_column(ForeignKey("accounts.id"))
    target: Mapped[int] = mapped_column(ForeignKey("accounts.id"))
    amount: Mapped[Decimal]
    idempotency_key: Mapped[str | None]


# Nothing is opened before the first request: under `gunicorn --preload` each worker has its own pools.
Session = sessionmaker(
    class_=RoutingSession,
    writing=create_engine(f"postgresql+pgdbpool://write?config={CONFIG}"),
    reading=create_engine(f"postgresql+pgdbpool://read?config={CONFIG}"),
)


class Refused(Exception):
    """Ends a request with this status and message; raised inside a transaction, it also rolls back."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def reading(function: Callable[[], T]) -> T:
    """Read, and read again on another server when the first one dies meanwhile: it does no harm."""
    try:
        return function()
    except exc.OperationalError as error:
        if not error.connection_invalidated:
            raise
        return function()


def get_accounts() -> dict[str, Any]:
    """List the accounts."""
    statement = select(Account).order_by(Account.id)
    with Session() as session:
        accounts = [
            {"id": each.id, "name": each.name, "balance": each.balance} for each in session.scalars(statement)
        ]
        connection = session.connection(bind_arguments={"clause": statement}).connection
        return {"accounts": accounts, "server": connection.driver_connection.endpoint.label}  # type: ignore[union-attr]


def transfer(source: int, target: int, amount: Decimal, key: str | None) -> dict[str, Any]:
    """Move the amount in one transaction, and return the transfer with both balances after it."""
    wanted = {"source": source, "target": target, "amount": amount}
    try:
        with Session.begin() as session:
            # Locked in the order of their ids, so that two opposite transfers never wait for each other.
            found = select(Account).where(Account.id.in_([source, target])).order_by(Account.id)
            accounts = {each.id: each for each in session.scalars(found.with_for_update(key_share=True))}
            for number in (source, target):
                if number not in accounts:
                    raise Refused(404, f"there is no account {number}")
            # Two requests with one key at a time: the second waits here for the first one's end.
            new = insert(Transfer).values(**wanted, idempotency_key=key).on_conflict_do_nothing()
            number = session.scalar(new.returning(Transfer.id))
            repeated = number is None
            if repeated:
                done = session.scalars(select(Transfer).where(Transfer.idempotency_key == key)).one()
                number = done.id
                if {name: getattr(done, name) for name in wanted} != wanted:
                    raise Refused(422, "this Idempotency-Key belongs to another transfer")
            else:
                accounts[source].balance -= amount
                accounts[target].balance += amount
            answer = {
                "id": number, **wanted, "repeated": repeated,
                "source_balance": accounts[source].balance, "target_balance": accounts[target].balance,
                "server": session.connection().connection.driver_connection.endpoint.label,  # type: ignore[union-attr]
            }  # fmt: skip
    except exc.IntegrityError:  # balance >= 0: the database has the last word, see schema.sql
        raise Refused(409, f"account {source} has less than {amount}") from None
    return answer


def get_health() -> dict[str, Any]:
    """Show the pools of this process."""
    reading(get_accounts)
    return {"status": "ok", "pools": Connection.status().to_dict()}


def read_form(environ: dict[str, Any]) -> tuple[int, int, Decimal, str | None]:
    """Return what the form of a transfer says."""
    text = environ["wsgi.input"].read(min(int(environ.get("CONTENT_LENGTH") or 0), 10_000)).decode()
    form = {name: values[-1] for name, values in parse_qs(text).items()}
    source, target, amount = (form.get(name, "") for name in ("source", "target", "amount"))
    if not all(re.fullmatch("[0-9]{1,18}", number) for number in (source, target)) or source == target:
        raise Refused(400, "source and target must be the numbers of two accounts")
    if not re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,2})?", amount) or not Decimal(amount):
        raise Refused(400, "amount must be more than 0, with two decimals at most")
    return int(source), int(target), Decimal(amount), environ.get("HTTP_IDEMPOTENCY_KEY")


def answer_request(environ: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Answer one request with a status and an object."""
    match environ["REQUEST_METHOD"], environ["PATH_INFO"]:
        case "GET", "/" | "/accounts":
            return 200, reading(get_accounts)
        case "POST", "/transfers":
            done = transfer(*read_form(environ))
            return 200 if done["repeated"] else 201, done
        case "GET", "/health":
            return 200, get_health()
    raise Refused(404, "there is nothing at this address")


def accounts(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer one request in JSON."""
    headers = [("Content-Type", "application/json"), ("Cache-Control", "no-store")]
    try:
        status, found = answer_request(environ)
    except Refused as refusal:
        status, found = refusal.status, {"error": str(refusal)}
    except exc.OperationalError as error:  # the servers' fault, or no connection became free
        # After a lost COMMIT the client repeats the request with the same Idempotency-Key.
        unknown = getattr(error.orig, "maybe_committed", False)
        status, found = 503, {"error": "the database is not available", "maybe_committed": unknown}
        headers.append(("Retry-After", "1"))
    body = json.dumps(found, default=str).encode()
    start_response(f"{status} {HTTPStatus(status).phrase}", [*headers, ("Content-Length", str(len(body)))])
    return [body]


application = mount(accounts, "/-/pools", StatusApp(actions=True))

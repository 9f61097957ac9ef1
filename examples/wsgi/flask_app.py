"""The accounts of app.py with Flask and Flask-SQLAlchemy: `gunicorn flask_app:application`.

The pools are opened by `pgdbpool.contrib.flask`; a session of Flask-SQLAlchemy reads from the bind `read`
until it writes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from flask import Flask, jsonify, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import exc, select
from sqlalchemy.dialects.postgresql import insert
from werkzeug.exceptions import HTTPException, NotFound, abort

from pgdbpool import Connection
from pgdbpool.contrib.flask import PgDbPool
from pgdbpool.contrib.flask_sqlalchemy import RoutingSession

application = Flask(__name__)
application.config["PGDBPOOL"] = os.environ.get("PGDBPOOL_CONFIG") or Path(__file__).with_name(
    "pgdbpool.yaml"
)
application.config["PGDBPOOL_DEADLINE"] = 10
application.config["PGDBPOOL_STATUS"] = "/-/pools"
application.config["SQLALCHEMY_DATABASE_URI"] = "postgresql+pgdbpool://write"
application.config["SQLALCHEMY_BINDS"] = {"read": "postgresql+pgdbpool://read"}
PgDbPool(application)
db = SQLAlchemy(application, session_options={"class_": RoutingSession})
T = TypeVar("T")


class Account(db.Model):  # type: ignore[name-defined, misc]
    __tablename__ = "accounts"
    id = db.Column(db.BigInteger, primary_key=True)
    name = db.Column(db.Text, nullable=False)
    balance = db.Column(db.Numeric(14, 2), nullable=False)


class Transfer(db.Model):  # type: ignore[name-defined, misc]
    __tablename__ = "transfers"
    id = db.Column(db.BigInteger, primary_key=True)
    source = db.Column(db.BigInteger, nullable=False)
    target = db.Column(db.BigInteger, nullable=False)
    amount = db.Column(db.Numeric(14, 2), nullable=False)
    idempotency_key = db.Column(db.Text)


def reading(function: Callable[[], T]) -> T:
    """Read, and read again on another server when the first one dies meanwhile: it does no harm."""
    try:
        return function()
    except exc.OperationalError as error:
        if not error.connection_invalidated:
            raise
        db.session.rollback()
        return function()


def server_of(clause: Any = None) -> str:
    """Return the server that a statement of this session goes to."""
    connection: Any = db.session.connection(bind_arguments={"clause": clause}).connection
    return str(connection.driver_connection.endpoint.label)


@application.get("/")
@application.get("/accounts")
def get_accounts() -> Any:
    """List the accounts."""
    statement = select(Account).order_by(Account.id)

    def read() -> dict[str, Any]:
        found = db.session.scalars(statement)
        accounts = [{"id": each.id, "name": each.name, "balance": str(each.balance)} for each in found]
        return {"accounts": accounts, "server": server_of(statement)}

    return jsonify(reading(read))


@application.post("/transfers")
def post_transfer() -> Any:
    """Move an amount in one transaction."""
    source, target, amount = read_form()
    key = request.headers.get("Idempotency-Key")
    wanted = {"source": source, "target": target, "amount": amount}
    # Locked in the order of their ids, so that two opposite transfers never wait for each other.
    found = select(Account).where(Account.id.in_([source, target])).order_by(Account.id)
    accounts = {each.id: each for each in db.session.scalars(found.with_for_update(key_share=True))}
    for account in (source, target):
        if account not in accounts:
            raise NotFound(f"there is no account {account}")
    # Two requests with one key at a time: the second waits here for the first one's end.
    new = insert(Transfer).values(**wanted, idempotency_key=key).on_conflict_do_nothing()
    number = db.session.scalar(new.returning(Transfer.id))
    repeated = number is None
    if repeated:
        done = db.session.scalars(select(Transfer).where(Transfer.idempotency_key == key)).one()
        number = done.id
        if {name: getattr(done, name) for name in wanted} != wanted:
            abort(422, "this Idempotency-Key belongs to another transfer")
    else:
        accounts[source].balance -= amount
        accounts[target].balance += amount
    after = {"source_balance": accounts[source].balance, "target_balance": accounts[target].balance}
    answer = {"id": number, **wanted, **after, "repeated": repeated, "server": server_of()}
    try:
        db.session.commit()  # nothing is promised before
    except exc.IntegrityError:  # balance >= 0: the database has the last word, see schema.sql
        abort(409, f"account {source} has less than {amount}")
    return jsonify(answer), 200 if repeated else 201


def read_form() -> tuple[int, int, Decimal]:
    """Return what the form of a transfer says."""
    source, target, amount = (request.form.get(name, "") for name in ("source", "target", "amount"))
    if not all(re.fullmatch("[0-9]{1,18}", number) for number in (source, target)) or source == target:
        abort(400, "source and target must be the numbers of two accounts")
    if not re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,2})?", amount) or not Decimal(amount):
        abort(400, "amount must be more than 0, with two decimals at most")
    return int(source), int(target), Decimal(amount)


@application.get("/health")
def get_health() -> Any:
    """Show the pools of this process."""
    reading(lambda: db.session.scalar(select(1)))
    return jsonify(status="ok", pools=Connection.status().to_dict())


@application.errorhandler(HTTPException)
def refuse(error: HTTPException) -> Any:
    """Answer a refusal; the session is rolled back at the request's end."""
    return jsonify(error=error.description), error.code


@application.errorhandler(exc.OperationalError)
def wait(error: exc.OperationalError) -> Any:
    """Answer an error that is the servers' fault, or that no connection became free."""
    # After a lost COMMIT the client repeats the request with the same Idempotency-Key.
    unknown = getattr(error.orig, "maybe_committed", False)
    found = jsonify(error="the database is not available", maybe_committed=unknown)
    return found, 503, {"Retry-After": "1"}

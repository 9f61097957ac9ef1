"""Accounts and transfers between them: a WSGI application on pgdbpool, without a framework.

Reads go to the group `read`, which prefers standbys. A transfer is one transaction of the group `write`,
on the primary. README.md says how to run it, what it shows, and what it leaves out.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from html import escape
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote
from uuid import uuid4

import psycopg

import pgdbpool as dbpool
from pgdbpool.wsgi import StatusApp, mount

logger = logging.getLogger("example")
logging.basicConfig(format="%(asctime)s [%(process)d] %(levelname)s %(message)s")

# Once per process, at import. Under `gunicorn --preload` the process is the parent: each worker that it forks
# starts with empty pools of its own, so that no hook is needed.
dbpool.Connection.init(os.environ.get("PGDBPOOL_CONFIG") or Path(__file__).with_name("pgdbpool.yaml"))

BODY_LIMIT = 10_000
RESULT = "result"  # the cookie that carries a transfer's result over the redirect to the page
ACCOUNTS = "SELECT id, name, balance FROM accounts ORDER BY id"
TRANSFERS = "SELECT id, at, source, target, amount FROM transfers ORDER BY id DESC LIMIT %s"


class Response(NamedTuple):
    """What a request is answered with."""

    body: str
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    kind: str = "application/json"


class Refused(Exception):
    """Ends a request with this status and message; raised inside a block, it also rolls back."""

    def __init__(self, status: int, message: str, *headers: tuple[str, str]) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


def bank(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer one request."""
    request = f"{environ['REQUEST_METHOD']} {environ.get('PATH_INFO', '')!r}"
    try:
        response = route(environ)
    except Refused as refusal:
        response = error_response(environ, refusal)
    except psycopg.OperationalError as error:
        # The servers' fault and not the request's: DBOfflineError, PoolTimeout, ConnectionLostError, a
        # statement that ran into its timeout.
        logger.error("%s: %s", request, error)
        message = "the database is not available: try again in a moment"
        if getattr(error, "maybe_committed", False):
            message += (
                ". Whether the transfer went through is not known: look at /transfers, "
                "or repeat it with the same Idempotency-Key"
            )
        response = error_response(environ, Refused(503, message, ("Retry-After", "1")))
    except Exception:
        logger.exception("%s", request)
        response = error_response(environ, Refused(500, "an error of the application, see its log"))
    body = response.body.encode()
    headers = [
        ("Content-Type", f"{response.kind}; charset=utf-8"),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
        *response.headers,
    ]
    start_response(f"{response.status} {HTTPStatus(response.status).phrase}", headers)
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


# The pools of all workers, with buttons to drain a server. Without a token, only for this machine.
application = mount(bank, "/-/pools", StatusApp(actions=True))


def route(environ: dict[str, Any]) -> Response:
    """Call the function for the path and the method."""
    path, method = environ.get("PATH_INFO") or "/", environ["REQUEST_METHOD"]
    for pattern, methods in ROUTES.items():
        if match := re.fullmatch(pattern, path):
            function = methods.get("GET" if method == "HEAD" else method)
            if function is None:
                raise Refused(405, f"{method} is not allowed here", ("Allow", ", ".join(methods)))
            return function(environ, *map(int, match.groups()))
    raise Refused(404, "there is nothing at this address")


def json_response(body: Mapping[str, Any], status: int = 200) -> Response:
    """Answer in JSON; amounts are strings, since a number of JSON is a float to many readers."""

    def other(value: Any) -> str:
        return str(value) if isinstance(value, Decimal) else str(value.isoformat())

    return Response(json.dumps(body, default=other) + "\n", status)


def error_response(environ: dict[str, Any], refusal: Refused) -> Response:
    """Answer an error: a page for a browser, else JSON."""
    if wants_page(environ):
        heading = HTTPStatus(refusal.status).phrase
        body = f'<h1>{heading}</h1><p>{escape(str(refusal))}</p><p><a href="/">Back</a>'
        return Response(html(body), refusal.status, refusal.headers, "text/html")
    return json_response({"error": str(refusal)}, refusal.status)._replace(headers=refusal.headers)


def wants_page(environ: dict[str, Any]) -> bool:
    """Tell a browser from a program."""
    return "text/html" in environ.get("HTTP_ACCEPT", "")


# Reading, from the group `read`.


def read(db: dbpool.Handler, sql: str, params: tuple[Any, ...] = ()) -> list[dbpool.Row]:
    """Return the rows of a SELECT; where its server died under it, those of another server.

    pgdbpool cannot know that a statement of an autocommit group may be sent twice. We do.
    """
    try:
        return db.query(sql, params).fetchall()
    except dbpool.ConnectionLostError:
        return db.query(sql, params).fetchall()


def get_page(environ: dict[str, Any]) -> Response:
    """Show the accounts, the last transfers and the form for another."""
    with dbpool.Handler("read") as db:
        accounts = read(db, ACCOUNTS)
        transfers = read(db, TRANSFERS, (10,))
        server = db.endpoint
    result = cookie(environ, RESULT)
    forget = (("Set-Cookie", f"{RESULT}=; Path=/; Max-Age=0"),) if result else ()
    return Response(render(accounts, transfers, server, result), headers=forget, kind="text/html")


def get_accounts(environ: dict[str, Any]) -> Response:
    """List the accounts."""
    with dbpool.Handler("read") as db:
        rows = read(db, ACCOUNTS)
        return json_response({"accounts": [dict(row) for row in rows], "server": db.endpoint})


def get_account(environ: dict[str, Any], number: int) -> Response:
    """Show one account."""
    with dbpool.Handler("read") as db:
        rows = read(db, "SELECT id, name, balance FROM accounts WHERE id = %s", (number,))
        if not rows:
            raise Refused(404, f"there is no account {number}")
        return json_response({**dict(rows[0]), "server": db.endpoint})


def get_transfers(environ: dict[str, Any]) -> Response:
    """List the last transfers, the newest first."""
    limit = parse_qs(environ.get("QUERY_STRING", "")).get("limit", ["20"])[-1]
    if not re.fullmatch("[0-9]{1,3}", limit) or not 1 <= int(limit) <= 100:
        raise Refused(400, "limit must be a whole number from 1 to 100")
    with dbpool.Handler("read") as db:
        rows = read(db, TRANSFERS, (int(limit),))
        return json_response({"transfers": [dict(row) for row in rows], "server": db.endpoint})


def get_health(environ: dict[str, Any]) -> Response:
    """Show the pools; 503 where not even reading is possible, so that a load balancer looks elsewhere.

    A status alone tells what the last requests have seen. A checkout looks at the socket first, which takes
    no round trip, and finds a server that has gone since.
    """
    groups = {}
    for group in dbpool.Connection.status().groups:
        try:
            with dbpool.Handler(group, timeout=1.0):
                groups[group] = "ok"
        except dbpool.PoolTimeout:
            groups[group] = "busy"
        except dbpool.DBConnectionError as error:
            groups[group] = str(error)
    failed = [group for group, state in groups.items() if state not in ("ok", "busy")]
    word = "down" if "read" in failed else "degraded" if failed else "ok"
    pools = dbpool.Connection.status().to_dict()
    return json_response({"status": word, "groups": groups, "pools": pools}, 503 if word == "down" else 200)


# Writing, in the group `write`.


def post_transfer(environ: dict[str, Any]) -> Response:
    """Transfer money: 201 and the transfer, or 200 where its Idempotency-Key says that it was done before."""
    form = request_fields(environ)
    source, target = account_number(form, "source"), account_number(form, "target")
    amount = str(form.get("amount", ""))
    if not re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,2})?", amount) or not Decimal(amount):
        raise Refused(400, "amount must be more than 0, with two decimals at most, such as 12.50")
    if source == target:
        raise Refused(400, "source and target must be two accounts")
    key = environ.get("HTTP_IDEMPOTENCY_KEY") or form.get("idempotency_key") or None
    if key is not None and not (isinstance(key, str) and re.fullmatch("[!-~]{1,200}", key)):
        raise Refused(400, "Idempotency-Key must be 1 to 200 characters of ASCII without spaces")
    done = transfer(source, target, Decimal(amount), key)
    if not wants_page(environ):
        return json_response(done, 200 if done["repeated"] else 201)
    # The page after the redirect is read from a standby, which may not have the transfer yet: so what the
    # primary answered travels with the browser. A cookie, since everyone can make a link with a query.
    result = (
        f"Transfer {done['id']}: {done['amount']} from account {source}, which now has "
        f"{done['source_balance']}, to account {target}, which now has {done['target_balance']}."
    )
    to_page = ("Location", "/"), ("Set-Cookie", f"{RESULT}={quote(result)}; Path=/; HttpOnly; SameSite=Lax")
    return Response("", 303, to_page)


def transfer(source: int, target: int, amount: Decimal, key: str | None) -> dict[str, Any]:
    """Move the amount in one transaction, and return the transfer with both balances after it.

    Raises Refused, with nothing changed, for an unknown account (404), too little money (409), or a key
    that belongs to another transfer (422).
    """
    wanted = {"source": source, "target": target, "amount": amount}
    try:
        with dbpool.Handler("write") as db:
            # Locked in the order of their ids whichever way the money goes, so that two opposite transfers
            # never wait for each other.
            rows = db.query(
                "SELECT id, balance FROM accounts WHERE id = ANY(%s) ORDER BY id FOR NO KEY UPDATE",
                ([source, target],),
            )
            balances = {row["id"]: row["balance"] for row in rows}
            for account in (source, target):
                if account not in balances:
                    raise Refused(404, f"there is no account {account}")
            # Two requests with one key at a time: the second waits here for the first one's end.
            made = db.query(
                "INSERT INTO transfers (source, target, amount, idempotency_key) VALUES (%s, %s, %s, %s) "
                "ON CONFLICT (idempotency_key) DO NOTHING RETURNING id, at, source, target, amount",
                (source, target, amount, key),
            ).fetchall()
            repeated = not made
            if repeated:
                made = db.query(
                    "SELECT id, at, source, target, amount FROM transfers WHERE idempotency_key = %s", (key,)
                ).fetchall()
                if {name: made[0][name] for name in wanted} != wanted:
                    raise Refused(422, "this Idempotency-Key belongs to another transfer")
            else:
                update = "UPDATE accounts SET balance = balance + %s WHERE id = %s RETURNING balance"
                for account, change in ((source, -amount), (target, amount)):
                    [(balances[account],)] = db.query(update, (change, account))
            server = db.endpoint
    except psycopg.errors.CheckViolation:  # balance >= 0: the database has the last word, see schema.sql
        raise Refused(409, f"account {source} has less than {amount}") from None
    # Only after the block is it committed: nothing is promised before.
    after = {"source_balance": balances[source], "target_balance": balances[target]}
    return {**dict(made[0]), **after, "repeated": repeated, "server": server}


def request_fields(environ: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a form or of a JSON object."""
    length = int(environ.get("CONTENT_LENGTH") or 0)
    if length > BODY_LIMIT:
        raise Refused(413, f"the body is longer than {BODY_LIMIT} bytes")
    kind = environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "application/x-www-form-urlencoded"):
        raise Refused(415, "send application/json or application/x-www-form-urlencoded")
    try:
        text = environ["wsgi.input"].read(length).decode()
        if kind != "application/json":
            return {name: values[-1] for name, values in parse_qs(text, max_num_fields=20).items()}
        # A decimal fraction stays the text that it is, since 0.1 is no float.
        fields = json.loads(text, parse_float=str)
    except (ValueError, RecursionError):
        raise Refused(400, "the body cannot be read: send an object in JSON, or a form") from None
    if not isinstance(fields, dict):
        raise Refused(400, "the body must be an object with source, target and amount")
    return fields


def account_number(form: Mapping[str, Any], name: str) -> int:
    """Return a field that must be the number of an account."""
    value = form.get(name)
    if isinstance(value, bool) or not re.fullmatch("[0-9]{1,18}", str(value)):
        raise Refused(400, f"{name} must be the number of an account")
    return int(str(value))


# The page.


def cookie(environ: dict[str, Any], name: str) -> str:
    """Return a cookie's text, or nothing."""
    try:
        morsel = SimpleCookie(environ.get("HTTP_COOKIE", "")).get(name)
    except CookieError:
        return ""
    return unquote(morsel.value) if morsel else ""


def html(body: str) -> str:
    """Return a whole document."""
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:44em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse}td,th{padding:.2em 1em .2em 0;text-align:left}"
        "td.amount,th.amount{text-align:right;font-variant-numeric:tabular-nums}"
        ".result{background:#e7f5e7;padding:.6em 1em}.from{color:#666}"
    )
    return (
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Accounts</title><style>{style}</style>{body}</html>\n"
    )


def render(accounts: list[dbpool.Row], transfers: list[dbpool.Row], server: str, result: str) -> str:
    """Return the page; whatever came from outside is escaped."""
    rows = "".join(
        f'<tr><td>{row["id"]}<td>{escape(row["name"])}<td class="amount">{row["balance"]}' for row in accounts
    )
    options = "".join(f'<option value="{row["id"]}">{escape(row["name"])}</option>' for row in accounts)
    last = "".join(
        f"<tr><td>{row['id']}<td>{row['at']:%H:%M:%S}<td>{row['source']} to {row['target']}"
        f'<td class="amount">{row["amount"]}'
        for row in transfers
    )
    return html(
        "<h1>Accounts</h1>"
        + (f'<p class="result">{escape(result)}</p>' if result else "")
        + f'<table><tr><th>No.<th>Name<th class="amount">Balance{rows}</table>'
        "<h2>Transfer</h2>"
        '<form method="post" action="/transfers">'
        # A page that is sent twice, by a double click or a reload, transfers once.
        f'<input type="hidden" name="idempotency_key" value="{uuid4()}">'
        f'from <select name="source">{options}</select> to <select name="target">{options}</select> '
        '<input name="amount" inputmode="decimal" placeholder="12.50" size="8" required> '
        "<button>Transfer</button></form>"
        "<h2>Last transfers</h2>"
        f'<table><tr><th>No.<th>Time<th>Accounts<th class="amount">Amount{last}</table>'
        f'<p class="from">Read from {escape(server)} by process {os.getpid()}. A standby may be behind.'
    )


ROUTES: dict[str, dict[str, Callable[..., Response]]] = {
    "/": {"GET": get_page},
    "/accounts": {"GET": get_accounts},
    "/accounts/([0-9]{1,18})": {"GET": get_account},
    "/transfers": {"GET": get_transfers, "POST": post_transfer},
    "/health": {"GET": get_health},
}

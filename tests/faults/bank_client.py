"""A process of the bank: its tellers transfer money through one pool and write down what they were told.

Started by `bank.py` with a `Desk` as JSON. At SIGTERM `install_signal_handlers` ends the pools, within
the desk's `patience`: what is still under way then is cut.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from time import monotonic, sleep
from typing import Any

from pgdbpool import (
    Connection,
    ConnectionLostError,
    DBConnectionError,
    DBQueryError,
    Handler,
    NotInitializedError,
)

Line = dict[str, Any]

ENTER = "INSERT INTO entries (id, source, target, amount) VALUES (%s, %s, %s, %s)"
MOVE = "UPDATE accounts SET balance = balance + %s WHERE id = %s"
AT_ONCE = """
    WITH entered AS (INSERT INTO entries (id, source, target, amount)
                     VALUES (%(id)s, %(source)s, %(target)s, %(amount)s))
    UPDATE accounts SET balance = balance + CASE id WHEN %(target)s THEN 1 ELSE -1 END * %(amount)s
    WHERE id IN (%(source)s, %(target)s)"""


@dataclass
class Desk:
    """What a process is asked to do."""

    number: int
    generation: int
    """How many processes had this number before."""
    patience: float
    seed: str
    tellers: int
    accounts: int
    history: str
    config: dict[str, Any]


@dataclass
class Transfer:
    """One transfer, and what its client was told: `ok`, `none` (refused) or `unknown`."""

    id: str
    source: int
    target: int
    amount: int
    outcome: str = "unknown"
    calls: dict[str, float] = field(default_factory=dict)


class DeclinedError(Exception):
    """The application's own reason to roll a transfer back."""


class Teller:
    """One thread that transfers and reads, in all the ways in which a block can end."""

    def __init__(self, desk: Desk, number: int, history: int, closing: Callable[[], bool]) -> None:
        self.desk = desk
        self.name = f"{desk.number}.{desk.generation}.{number}"
        self.random = Random(f"{desk.seed} {self.name}")
        self.history = history
        self.closing = closing
        self.numbers = itertools.count()
        self.calls: dict[str, float] = {}
        """The longest call of each kind in the current transfer, in seconds."""

    def run(self) -> None:
        while not self.closing():
            self.calls = {}
            try:
                refused = self.read() if self.random.random() < 0.1 else self.transfer()
            except BaseException:
                self.write("unexpected", text=traceback.format_exc())
                raise
            # Who is refused at once would ask as fast as it can.
            sleep(0.05 if refused else self.random.uniform(0.0, 0.02))

    def write(self, kind: str, **fields: Any) -> None:
        line = {"type": kind, "process": self.desk.number, "teller": self.name, **fields}
        os.write(self.history, json.dumps(line).encode() + b"\n")  # opened for appending: a line is whole

    # Transfers.

    def transfer(self) -> bool:
        """Transfer something in some way and write down what came of it; tell if there was no connection."""
        source, target = self.random.sample(range(self.desk.accounts), 2)
        transfer = Transfer(f"{self.name}.{next(self.numbers)}", source, target, self.random.randint(1, 100))
        way = self.random.choice(WAYS)
        error: Exception | None = None
        start = monotonic()
        try:
            way(self, transfer)
        except (DBQueryError, DBConnectionError, DeclinedError, NotInitializedError) as raised:
            error = raised
            if transfer.outcome != "ok":
                maybe = isinstance(raised, DBQueryError) and (raised.maybe_committed or raised.maybe_executed)
                transfer.outcome = "unknown" if maybe else "none"
        except Exception as raised:  # noqa: BLE001  whatever else it is, it is a finding
            error = raised
            self.write("unexpected", text=f"{way.__name__}: {traceback.format_exc()}")
        self.write(
            "transfer",
            **{**vars(transfer), "calls": self.calls},
            way=way.__name__,
            start=start,
            end=monotonic(),
            error=None if error is None else type(error).__name__,
            text=None if error is None else str(error)[:300],
        )
        return isinstance(error, DBConnectionError)

    def book(self, db: Handler, transfer: Transfer) -> None:
        """Send the statements of a transfer, in any order."""
        statements: list[tuple[str, tuple[Any, ...]]] = [
            (ENTER, (transfer.id, transfer.source, transfer.target, transfer.amount)),
            (MOVE, (-transfer.amount, transfer.source)),
            (MOVE, (transfer.amount, transfer.target)),
        ]
        self.random.shuffle(statements)
        for statement, params in statements:
            with self.timed("query"):
                db.query(statement, params)

    def ends_the_block(self, transfer: Transfer) -> None:
        with self.block("write") as db:
            self.book(db, transfer)
        transfer.outcome = "ok"

    def commits_and_goes_on(self, transfer: Transfer) -> None:
        with self.block("write") as db:
            self.book(db, transfer)
            with self.timed("commit"):
                db.commit()
            transfer.outcome = "ok"
            with self.timed("query"):
                db.query("SELECT balance FROM accounts WHERE id = %s", (transfer.source,))

    def commits_in_text(self, transfer: Transfer) -> None:
        with self.block("write") as db:
            self.book(db, transfer)
            with self.timed("commit"):
                db.query("COMMIT")
            transfer.outcome = "ok"

    def commits_by_the_connection(self, transfer: Transfer) -> None:
        with self.block("write") as db:
            self.book(db, transfer)
            conn = db.connection
            with self.timed("commit"):
                conn.commit()
            transfer.outcome = "ok"

    def has_a_savepoint(self, transfer: Transfer) -> None:
        with self.block("write", settings={"bank.teller": self.name}) as db:
            with db.transaction():
                self.book(db, transfer)
        transfer.outcome = "ok"

    def tries_again_in_the_block(self, transfer: Transfer) -> None:
        with self.block("write") as db:
            try:
                self.book(db, transfer)
            except ConnectionLostError:
                db.rollback()
                self.book(db, transfer)
        transfer.outcome = "ok"

    def opens_a_transaction(self, transfer: Transfer) -> None:
        with self.block("auto") as db:
            with self.timed("transaction"):
                with db.transaction():
                    self.book(db, transfer)
            transfer.outcome = "ok"

    def is_one_statement(self, transfer: Transfer) -> None:
        with self.block("auto") as db:
            with self.timed("query"):
                db.query(AT_ONCE, vars(transfer))
            transfer.outcome = "ok"

    def is_one_statement_with_settings(self, transfer: Transfer) -> None:
        with self.block("auto", settings={"bank.teller": self.name}) as db:
            with self.timed("query"):
                db.query(AT_ONCE, vars(transfer))
            transfer.outcome = "ok"

    def travels_in_a_pipeline(self, transfer: Transfer) -> None:
        with self.block("write") as db:
            with self.timed("transaction"):
                with db.connection.pipeline():
                    self.book(db, transfer)
        transfer.outcome = "ok"

    def is_declined(self, transfer: Transfer) -> None:
        with self.block("write") as db:
            self.book(db, transfer)
            raise DeclinedError

    def is_rolled_back(self, transfer: Transfer) -> None:
        with self.block("write") as db:
            self.book(db, transfer)
            with self.timed("query"):
                db.rollback()
        transfer.outcome = "none"

    # Reads.

    def read(self) -> bool:
        """Add up the accounts, on the primary or on a standby; tell if there was no connection."""
        group, found = self.random.choice(("write", "auto", "read")), None
        error: Exception | None = None
        start = monotonic()
        try:
            with self.block(group) as db:
                with self.timed("query"):
                    ((found,),) = db.query("SELECT sum(balance)::bigint FROM accounts").fetchall()
        except (DBQueryError, DBConnectionError, NotInitializedError) as raised:
            error = raised
        name = None if error is None else type(error).__name__
        self.write("read", group=group, start=start, end=monotonic(), sum=found, error=name, calls=self.calls)
        return isinstance(error, DBConnectionError)

    # Time.

    @contextmanager
    def block(self, group: str, **options: Any) -> Iterator[Handler]:
        """Open a block, and take the time of the way in and of the way out."""
        handler = Handler(group, **options)
        with self.timed("checkout"):
            handler.__enter__()
        try:
            yield handler
        except BaseException as error:
            with self.timed("commit"):
                handler.__exit__(type(error), error, error.__traceback__)
            raise
        with self.timed("commit"):
            handler.__exit__(None, None, None)

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        began = monotonic()
        try:
            yield
        finally:
            self.calls[kind] = max(self.calls.get(kind, 0.0), monotonic() - began)


WAYS = (
    Teller.ends_the_block,
    Teller.ends_the_block,
    Teller.commits_and_goes_on,
    Teller.commits_in_text,
    Teller.commits_by_the_connection,
    Teller.has_a_savepoint,
    Teller.tries_again_in_the_block,
    Teller.opens_a_transaction,
    Teller.is_one_statement,
    Teller.is_one_statement_with_settings,
    Teller.travels_in_a_pipeline,
    Teller.is_declined,
    Teller.is_rolled_back,
)


def main() -> None:
    desk = Desk(**json.loads(sys.argv[1]))
    parent, ended = os.getppid(), False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True

    signal.signal(signal.SIGTERM, end)
    history = os.open(desk.history, os.O_WRONLY | os.O_APPEND)
    Connection.init(desk.config)
    Connection.install_signal_handlers(signal.SIGTERM, timeout=desk.patience)
    # Nobody is left working for a driver that was killed.
    closing = lambda: ended or Connection.is_closing() or os.getppid() != parent  # noqa: E731
    first, *others = (Teller(desk, number, history, closing) for number in range(desk.tellers))
    threads = [threading.Thread(target=teller.run) for teller in others]
    for thread in threads:
        thread.start()
    try:
        first.run()
    finally:
        for thread in threads:
            thread.join()
        Connection.close()


if __name__ == "__main__":
    main()

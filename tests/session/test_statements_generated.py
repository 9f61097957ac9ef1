"""The number and kind of the statements in a text, held against what the server makes of the same text."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import psycopg
import pytest

from pgdbpool._session.statement_shape import _analyse as shape
from pgdbpool.cluster import Cluster

PIECES = [
    ";", ";", "'", "''", '"', "\\", "\\'", "$$", "$a$", "$1", "--", "/*", "*/", "/", "*", "-", "+", "(", ")",
    "\n", "\r", "\t", " ", "E'", "e'", "U&'", "N'", "x", "E", "_", "1", "é", "€", "\u00a0", "END",
    "begin atomic", "COMMIT", "case",
]  # fmt: skip
BEGINS = {b"BEGIN", b"START TRANSACTION"}
ENDS = {b"COMMIT", b"ROLLBACK"}
FIXED = [
    "VALUES (1)",
    "(SELECT 1) UNION (SELECT 2)",
    "SHOW TimeZone",
    "SELECT CASE WHEN true THEN CASE 1 WHEN 1 THEN 2 END END",
    "SELECT 1 end",
    "BEGIN",
    "START TRANSACTION",
    "COMMIT",
    "END",
    "ROLLBACK",
    "CREATE OR REPLACE FUNCTION pg_temp.{0}(begin int) RETURNS int BEGIN ATOMIC"
    " SELECT 1 AS end; {1} SELECT (CASE WHEN true THEN 2 END) end; END",
    "create or replace procedure pg_temp.p() begin atomic end",
    "create or replace procedure pg_temp.p() language sql begin {1} atomic select 1; select 2; end",
    "CREATE OR REPLACE RULE r AS ON INSERT TO pg_temp.t DO ALSO (SELECT 1; {1} SELECT 2; SELECT 3 AS {0})",
    "DO $x$ BEGIN PERFORM 1; PERFORM 2; END $x$",
]


class Texts:
    """Makes texts of statements whose constants, names and comments hold what looks like code."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.choice: Callable[[Any], Any] = self.random.choice

    def text(self) -> str:
        statements = [self.statement() for _ in range(self.choice((1, 1, 2, 3)))]
        return ";".join(f"{self.blank()}{statement}{self.blank()}" for statement in statements)

    def statement(self) -> str:
        if self.random.random() < 0.3:
            template: str = self.choice(FIXED)
            return template.replace("{0}", self.name()).replace("{1}", self.blank())
        if self.random.random() < 0.1:
            return f"SELECT {self.junk()}"  # mostly refused
        return (
            f"SELECT {', '.join(f'{self.constant()} AS {self.name()}' for _ in range(self.choice((1, 2))))}"
        )

    def junk(self) -> str:
        return "".join(self.random.choices(PIECES, k=self.random.randrange(8)))

    def name(self) -> str:
        inside = "x" + self.junk().replace('"', '""')
        return self.choice(("", "U&")) + '"' + inside.replace("\\", "\\\\") + '"'

    def blank(self) -> str:
        kind = self.random.random()
        if kind < 0.3:
            return f"/*{self.junk_in_comment()}/*{self.junk_in_comment()}*/;*/"
        if kind < 0.5:
            return f"--{self.junk().translate({10: None, 13: None})}{self.choice((chr(10), chr(13)))}"
        return self.choice((" ", "\n", "\t\n", "\f"))

    def junk_in_comment(self) -> str:
        inside = self.junk().replace("*", ";").replace("/", "'")
        return self.choice(("", "*", "/", "'")) + " " + inside

    def constant(self) -> str:
        """Return a string constant, in one of the ways to write it, perhaps going on in another line."""
        kind = self.choice(("'", "E'", "e'", "N'", "U&'", "$"))
        parts = [self.junk() for _ in range(self.choice((1, 1, 2)))]
        if kind == "$":
            tag = self.choice(("$$", "$b$", "$é1$"))
            return tag + parts[0].replace("$", "'").rstrip("$") + tag + " "
        written = [part.replace("\\", "\\\\") if kind != "'" else part for part in parts]
        if kind == "U&'":
            written = [part.replace("\\", "") for part in parts]
        quote = self.choice(("''", "\\'")) if kind in ("E'", "e'") else "''"
        between = "'" + self.choice((" \n", "\n--;'\n ", "--'\r\n")) + "'"
        inside = between.join(part.replace("'", quote) for part in written)
        return f"{self.choice(('', '1 -/*@*/- 2 ||'))} {kind}{inside}'"


def tags(conn: psycopg.Connection[Any], text: str) -> list[bytes] | None:
    """Return the command tag of each statement in the text, None if the server refuses it."""
    pgconn = conn.pgconn
    pgconn.send_query(text.encode())
    found: list[bytes] = []
    refused = False
    while (result := pgconn.get_result()) is not None:
        refused = refused or result.status == psycopg.pq.ExecStatus.FATAL_ERROR
        if result.status != psycopg.pq.ExecStatus.EMPTY_QUERY:
            found.append(result.command_status or b"")
    if pgconn.transaction_status != psycopg.pq.TransactionStatus.IDLE:
        pgconn.exec_(b"ROLLBACK")
    return None if refused else found


@pytest.mark.slow
def test_statements_are_counted_as_the_server_counts_them(cluster: Cluster) -> None:
    texts = Texts(1)
    accepted = several = 0
    with psycopg.connect(cluster.primary.conninfo(), autocommit=True) as conn:
        conn.execute("CREATE TEMP TABLE t (n int); SET client_min_messages = error")
        for _ in range(2500):
            text = texts.text()
            found = tags(conn, text)
            if found is None:
                continue
            accepted += 1
            several += len(found) > 1
            what = shape(text)
            seen = what.number, what.ends, what.controls
            ends = not ENDS.isdisjoint(found)
            expected = (
                max(1, len(found)),
                ends,
                ends or not {b"BEGIN", b"START TRANSACTION"}.isdisjoint(found),
            )
            assert seen == expected, text
    assert accepted > 1250
    assert several > 400

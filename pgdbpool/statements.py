"""What can be told from a statement's text: how many it holds, what it may do to the session.

This is no SQL parser and need not be: where in doubt it says "several", "alone" or "touches", which
costs a round trip or a cleaning and is never wrong.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, NamedTuple

import psycopg
from psycopg.sql import Composable

_NOT_CODE = re.compile(
    r"""  (?<![\w$])[eE]'[^'\\]*(?:(?:\\.|'')[^'\\]*)*'   # a string with backslash escapes
        | '[^']*(?:''[^']*)*'                 # a string
        | "[^"]*(?:""[^"]*)*"                 # a quoted name
        | (?<![\w$])\$([A-Za-z_]\w{0,62})\$.*?\$\1\$   # a dollar-quoted string, with a tag
        | (?<![\w$])\$\$.*?\$\$              # a dollar-quoted string
        | --[^\n\r]*                            # a comment
        | /\*.*?\*/                           # a comment; of a nested one the tail stays, as code
    """,
    re.VERBOSE | re.DOTALL,
)

# First words, in upper case.
_ALONE = {"COPY", "CALL", "DO"}
_UTILITY = {
    "VACUUM",
    "CREATE",
    "DROP",
    "ALTER",
    "REINDEX",
    "CLUSTER",
    "CALL",
    "DO",
    "DISCARD",
    "ANALYZE",
    "COPY",
}
_ENDS = {"COMMIT", "END", "ROLLBACK", "ABORT"}
_BEGINS = {"BEGIN", "START"}
# What this reads differently from PostgreSQL: nested comments, and a string continued on the next line.
_DOUBTFUL = re.compile(r"/\*(?:(?!\*/).)*?/\*|'[^\S\n\r]*[\n\r]\s*'", re.DOTALL)
_TOUCHES = {
    "SET",
    "RESET",
    "DISCARD",
    "LISTEN",
    "PREPARE",
    "DEALLOCATE",
    "DECLARE",
    "DO",
    "CALL",
    "EXECUTE",
    "LOAD",
}
_LOCAL = {"LOCAL", "TRANSACTION", "CONSTRAINTS"}
# Anywhere in the text, so that it is also found in a quoted name, a CTE or an EXPLAIN ANALYZE.
_REACHES = re.compile(
    r"set_config|pg_settings|advisory|\btemp\b|\btemporary\b|pg_temp|\bsetseed\b|\bwith\s+hold\b"
    r"|dblink_connect",
    re.I,
)
# One of these is in each of them; to look for these takes a twentieth of the time.
_HINTS = ("set_config", "pg_settings", "advisory", "temp", "setseed", "hold", "dblink_connect")
_PIECE, _OVERLAP = 65_536, 1_000
_TAINTS = re.compile(r"\bload\b|dblink_connect", re.I)
_PREPARES = re.compile(r"\bprepare\b", re.I)
_TIMEOUT = re.compile(r"statement_timeout", re.I)
# In whose text a setting's name may be a string or quoted.
_NAMES = {"SET", "RESET", "DO", "CALL", "EXECUTE"}
_QUOTES = re.compile(r"set_config|pg_settings", re.I)


class Shape(NamedTuple):
    """What a statement's text says about it."""

    number: int
    """Statements in the text: the extended protocol, and so a pipeline, takes one."""
    alone: bool
    """It cannot share a pipeline (COPY), or must not (CALL and DO may commit inside)."""
    utility: bool
    """It may be one that PostgreSQL refuses inside a transaction."""
    ends: bool
    """It ends a transaction."""
    commits: bool
    """It asks for a commit."""
    controls: bool
    """It begins or ends a transaction."""
    touches: bool
    """It may leave something behind in the session."""
    prepares: bool
    """It may leave a prepared statement behind."""
    taints: bool
    """It may leave something behind that no statement removes."""
    timeout: bool
    """It may change how long a statement may take."""
    allows: str
    """How long, in PostgreSQL's words, where the text says so."""
    sets: bool
    """It is a SET: that takes no time, and SET TRANSACTION comes before any query of its transaction."""


@lru_cache(maxsize=2048)
def _known(text: str) -> Shape:
    return _analyse(text)


def _analyse(text: str) -> Shape:
    code = _NOT_CODE.sub(" ", text)
    doubtful = _DOUBTFUL.search(text) is not None
    heads = [
        part.split(None, 2)[:2] for part in code.replace("(", " ").split(";") if part.strip(" \t\r\n\f\v()")
    ]
    words = [head[0].upper() for head in heads if head]
    touches = _reaches(text) or any(
        word in _TOUCHES and not (word == "SET" and len(head) > 1 and head[1].upper() in _LOCAL)
        for word, head in zip(words, heads, strict=True)
    )
    timeout = False
    if touches or "SET" in words:
        quoted = doubtful or not _NAMES.isdisjoint(words) or _QUOTES.search(text) is not None
        timeout = _TIMEOUT.search(text if quoted else code) is not None
    return Shape(
        number=max(2 if doubtful else 1, len(words)),
        alone=any(word in _ALONE for word in words),
        utility=any(word in _UTILITY for word in words),
        ends=doubtful or any(word in _ENDS for word in words),
        commits=any(word in ("COMMIT", "END") for word in words),
        controls=doubtful or any(word in _ENDS or word in _BEGINS for word in words),
        touches=touches or doubtful,
        prepares=touches and _PREPARES.search(text) is not None,
        taints=touches and _TAINTS.search(text) is not None,
        timeout=timeout,  # SET LOCAL too, which leaves nothing behind
        allows=_allows(text) if timeout and words == ["SET"] else "",
        sets=words == ["SET"],
    )


def _reaches(text: str) -> bool:
    """Tell whether the text has a word that may leave something in the session: also if that is in its data.

    A long text is looked through in pieces, since no other thread goes on during a search.
    """
    small = text.lower()
    if not any(hint in small for hint in _HINTS):
        return False
    starts = range(0, len(text), _PIECE)
    return any(_REACHES.search(text, start, start + _PIECE + _OVERLAP) for start in starts)


def _allows(text: str) -> str:
    """Return the value in a SET of statement_timeout; empty where it is none."""
    parts = [part for part in text.replace("=", " = ").split() if part.upper() not in ("LOCAL", "SESSION")]
    if len(parts) > 3 and parts[1].lower() == "statement_timeout" and parts[2].upper() in ("=", "TO"):
        return "".join(parts[3:]).strip("';")
    return ""


UNKNOWN = Shape(
    number=1, alone=False, utility=False, ends=False, commits=False, controls=False,
    touches=True, prepares=False, taints=False, timeout=False, allows="", sets=False,
)  # fmt: skip
"""Of what is no text, a template string: psycopg binds it at the server, so it is one statement."""


def shape(query: Any, conn: psycopg.Connection[Any]) -> Shape:
    """Return what the text of a statement says; remembered, since programs repeat themselves."""
    if not isinstance(query, str):  # first, since that is what it mostly is
        if isinstance(query, Composable):
            query = query.as_string(conn)
        elif isinstance(query, bytes):
            query = query.decode("utf-8", "replace")
        else:
            return UNKNOWN
    # A long text holds its data, so it is not likely to come again, nor worth its memory.
    return _known(query) if len(query) <= 4096 else _analyse(query)

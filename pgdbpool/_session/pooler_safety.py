"""Statements that change a session behind a transaction pooler.

The change outlives the transaction and reaches other clients of the pooler, so such a statement is refused.
Changes that end with the transaction are allowed.
"""

from __future__ import annotations

import re
from functools import lru_cache

from .statement_shape import code_of, statements_of

_SETTING = (
    "bind it with `settings=` of the block or the group, or with SET LOCAL inside a transaction, so that it "
    "ends with that"
)
_ROLE = "bind `role` with `settings=` of the block or the group, or with SET LOCAL ROLE inside a transaction"
_DIRECT = "use a group whose server is reached without the pooler"
_LOCK = "take pg_advisory_xact_lock inside a transaction, which ends with that"
_TABLE = "add ON COMMIT DROP, inside a transaction, or use a group whose server is reached without the pooler"
_PREPARED = "leave it to psycopg, with `prepare_threshold` (PgBouncer 1.21 and later)"
CURSOR = "leave WITH HOLD out, inside a transaction"

# Matched against code with single blanks in place of comments and strings.
_KEPT = (
    (r"^SET (?:SESSION )?(?:ROLE|AUTHORIZATION)\b|^RESET (?:ROLE|SESSION)\b", "the role", _ROLE),
    (r"^SET (?!LOCAL\b|TRANSACTION\b|CONSTRAINTS\b)|^RESET\b", "a setting", _SETTING),
    (r"^LISTEN\b", "LISTEN", _DIRECT),
    (r"^(?:PREPARE (?!TRANSACTION\b)|DEALLOCATE\b)", "a prepared statement", _PREPARED),
    (r"^(?:DISCARD|LOAD)\b", "what is loaded or discarded", _DIRECT),
    (r"^DECLARE\b.* WITH HOLD\b", "a cursor WITH HOLD", CURSOR),
    (
        r"\bCREATE (?:OR REPLACE )?(?:(?:GLOBAL|LOCAL) )?TEMP(?:ORARY)?\b(?!.* ON COMMIT DROP\b)"
        r"|\bCREATE\b[^(]*? PG_TEMP ?\.(?!.* ON COMMIT DROP\b)"
        r"|(?<!\bINSERT )(?<!\bMERGE )\bINTO (?:TEMP|TEMPORARY) ",
        "a temporary table", _TABLE,
    ),
    (r"\bPG_(?:TRY_)?ADVISORY_(?:UN)?LOCK", "an advisory lock", _LOCK),
    (r"\bUPDATE (?:PG_CATALOG ?\. ?)?PG_SETTINGS\b|\bSET_LIMIT ?\(", "a setting", _SETTING),
    (
        r"\b(?:SETSEED|DBLINK_CONNECT\w*|PG_REPLICATION_ORIGIN_SESSION_SETUP|ISN_WEAK|SEPGSQL_SETCON) ?\(",
        "what a function changes", _DIRECT,
    ),
)  # fmt: skip
_PATTERNS = tuple((re.compile(pattern), what, remedy) for pattern, what, remedy in _KEPT)
_SET_CONFIG = re.compile(r"\bSET_CONFIG ?\(")
_LOCALLY = re.compile(r"(?:IS_LOCAL ?(?:=>|:=) ?)?TRUE(?: ?:: ?BOOL(?:EAN)?)?")


@lru_cache(maxsize=256)
def left_in_session(text: str) -> str | None:
    """Return why a statement is unsafe behind a transaction pooler, with the remedy; or None."""
    for statement in statements_of(code_of(text)):
        code = " ".join(statement.split()).lstrip("( ").upper()
        for pattern, what, remedy in _PATTERNS:
            if pattern.search(code):
                return refusal(what, remedy)
        if not all(map(_is_local, _arguments(code))):
            return refusal("set_config(..., false)", f"give it `true`, or {_SETTING}")
    return None


def refusal(what: str, remedy: str) -> str:
    where = "in a session that the pooler (`pooler: transaction`) gives to others"
    return f"{what} would stay {where}: {remedy}"


def _arguments(code: str) -> list[str]:
    """Return the arguments of each set_config call; empty if they cannot be parsed."""
    found = []
    for call in _SET_CONFIG.finditer(code):
        depth = 1
        for at in range(call.end(), len(code)):
            depth += {"(": 1, ")": -1}.get(code[at], 0)
            if not depth:
                found.append(code[call.end() : at])
                break
        else:
            found.append("")
    return found


def _is_local(arguments: str) -> bool:
    """Return whether the last argument is the constant `true`."""
    return _LOCALLY.fullmatch(arguments.rpartition(",")[2].strip()) is not None

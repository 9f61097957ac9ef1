"""The log records of the package: each event and its fields, declared once.

All go to the logger `pgdbpool`. A record has its event's name as `event`, and each of its fields as an
attribute of that name, None if it is not known. So a JSON formatter need not parse texts.
"""

from __future__ import annotations

import logging
from logging import DEBUG, INFO, WARNING
from typing import Any

logger = logging.getLogger("pgdbpool")

FIELDS = {
    "by": "Who gave the order: the user, machine and process of the command, or the status page.",
    "attempt": "Which attempt of `run` it was, from 1 on.",
    "correlation_id": "Of the block; see `pgdbpool.correlation`.",
    "endpoint": "The label of the server.",
    "file": "Where the block was entered.",
    "function": "Where the block was entered.",
    "group": "The name of the group.",
    "hook": "Its key in the configuration.",
    "holder": "The name of the thread that the block is in.",
    "lag_bytes": "How far the standby is behind.",
    "lag_seconds": "How far the standby is behind.",
    "line": "Where the block was entered.",
    "order": "What is to be done: `drain`, `expire`, `pause` ...",
    "newest": "The highest timeline of the servers of the same system.",
    "previous": "The role that the server had.",
    "reason": "Why, in words of the server, of the network or of the pool.",
    "role": "`primary` or `standby`.",
    "seconds": "How long it took, or has taken so far.",
    "sqlstate": "The error's, if the server sent one.",
    "stack": "Where the block was entered, as a list of strings, the innermost last; with `leak_stack`.",
    "statement": "The text of the last statement, without its parameters.",
    "timeline": "The timeline of the server.",
}
"""The meaning of each field."""

EVENTS: dict[str, Event] = {}
"""All events by name."""


class Event:
    """One sort of record; calling it logs one, with the caller as the place in the code."""

    __slots__ = ("fields", "level", "meaning", "name")

    def __init__(self, name: str, level: int, meaning: str, *fields: str) -> None:
        self.name = name
        self.level = level
        self.meaning = meaning
        self.fields = fields
        EVENTS[name] = self

    def __call__(self, text: str, *args: Any, exc_info: BaseException | None = None, **fields: Any) -> None:
        """Log the text with the fields that the event declares."""
        if logger.isEnabledFor(self.level):
            extra = {"event": self.name, **fields}
            logger.log(self.level, text, *args, extra=extra, exc_info=exc_info, stacklevel=2)


_PLACE = ("holder", "file", "line", "function", "stack")

ENDPOINT_DOWN = Event(
    "endpoint.down", WARNING, "A server went out of use: it does not accept sessions, or does not answer.",
    "endpoint", "reason",
)  # fmt: skip
ENDPOINT_UP = Event(
    "endpoint.up", WARNING, "A server that was down is in use again.", "endpoint", "seconds"
)  # fmt: skip
ENDPOINT_DRAIN = Event("endpoint.drain", WARNING, "`Connection.drain` took a server out of use.", "endpoint")
ENDPOINT_UNDRAIN = Event(
    "endpoint.undrain", WARNING, "`Connection.undrain` put a server back into use.", "endpoint"
)
ENDPOINT_REMOVED = Event(
    "endpoint.removed", INFO,
    "A changed configuration has no such server any more, or has another by its name.",
    "endpoint",
)  # fmt: skip
ENDPOINT_NAME = Event(
    "endpoint.name", WARNING,
    "A server's host name is not resolved: the addresses that it had the last time serve.",
    "endpoint", "reason",
)  # fmt: skip
ENDPOINT_PASS_FILE = Event(
    "endpoint.pass_file", WARNING, "A `pass_file` cannot be read: the last password that was read serves.",
    "endpoint", "reason",
)  # fmt: skip
ENDPOINT_ROLE = Event(
    "endpoint.role", WARNING, "A server was promoted, or is a standby now.", "endpoint", "role", "previous"
)
ENDPOINT_OUTDATED = Event(
    "endpoint.outdated", WARNING, "Another server was promoted since: no writes go to this one.",
    "endpoint", "timeline", "newest",
)  # fmt: skip
ENDPOINT_REFUSED = Event(
    "endpoint.refused", WARNING,
    "A server that is up refused a connection, for a reason that it did not give the last time.",
    "endpoint", "reason",
)  # fmt: skip
ENDPOINT_SILENT = Event(
    "endpoint.silent",
    DEBUG,
    "A server did not tell its role, its timeline or its limits.",
    "endpoint",
    "reason",
)
ENDPOINT_NO_HISTORY = Event(
    "endpoint.no_history", WARNING,
    "After a promotion, the group's role cannot read which writes of the old timeline are on the new one: "
    "only the primary serves tokens of the old one, and a lost write is not reported.",
    "endpoint", "timeline", "reason",
)  # fmt: skip
ENDPOINT_TOO_SMALL = Event(
    "endpoint.too_small", WARNING,
    "All `processes` together can open more connections than a server admits; told at `init`.",
    "endpoint", "reason",
)  # fmt: skip
GROUP_LAG = Event(
    "group.lag", WARNING, "A standby is further behind than `max_lag`: the group does not use it.",
    "group", "endpoint", "lag_bytes", "lag_seconds",
)  # fmt: skip
GROUP_CAUGHT_UP = Event(
    "group.caught_up", WARNING, "A standby has caught up: the group uses it again.",
    "group", "endpoint", "lag_bytes", "lag_seconds",
)  # fmt: skip
GROUP_SHORT = Event(
    "group.short", WARNING, "The group starts with fewer connections than `min_size`.", "group", "reason"
)
GROUP_UNSERVED = Event(
    "group.unserved", WARNING,
    "The group starts without a server: its blocks fail until one is there. Told at `init`.",
    "group", "reason",
)  # fmt: skip
GROUP_UNSAFE_ROLE = Event(
    "group.unsafe_role", WARNING,
    "The role that logs in bypasses row-level security, and the tenants' `verify` is ``warn``.",
    "group", "reason",
)  # fmt: skip
BACKGROUND_FAILED = Event(
    "background.failed", WARNING,
    "Something went wrong in what is done in the background; it is tried again after a second.", "reason",
)  # fmt: skip
HOOK_FAILED = Event("hook.failed", WARNING, "A hook raised an error.", "group", "hook")
HOOK_FAILED_AGAIN = Event("hook.failed_again", DEBUG, "It raised the same error again.", "group", "hook")
PROCESS_SLOW_DRIVER = Event(
    "process.slow_driver",
    WARNING,
    "psycopg runs in Python, with the system's libpq; once at `init`.",
    "reason",
)
PROCESS_UNPUBLISHED = Event(
    "process.unpublished", WARNING, "The `runtime_dir` cannot be used; it is tried again.", "reason"
)
PROCESS_ORDERED = Event(
    "process.ordered", WARNING,
    "An order of `pgdbpool drain`, `expire`, `pause` ... or of the status page was executed, or was not.",
    "order", "by", "group", "endpoint", "reason",
)  # fmt: skip
CONNECTION_OPENED = Event(
    "connection.opened", DEBUG, "A connection was opened.", "group", "endpoint", "seconds"
)
CONNECTION_CLOSED = Event(
    "connection.closed", DEBUG, "The pool closed a connection.", "group", "endpoint", "reason"
)
BLOCK_LEAKED = Event(
    "block.leaked", WARNING, "A block has had its connection for longer than `leak_after`; once for each.",
    "group", "endpoint", "correlation_id", "seconds", *_PLACE, "statement",
)  # fmt: skip
BLOCK_OVERDUE = Event(
    "block.overdue", WARNING, "A block had its connection for longer than `max_hold`, and it was taken away.",
    "group", "endpoint", "correlation_id", "seconds", *_PLACE, "statement",
)  # fmt: skip
BLOCK_SLOW = Event(
    "block.slow", WARNING, "A block ended that had its connection for longer than `slow_block`.",
    "group", "endpoint", "correlation_id", "seconds", *_PLACE, "statement",
)  # fmt: skip
BLOCK_ROLLBACK_FAILED = Event(
    "block.rollback_failed", WARNING,
    "The ROLLBACK after an exception failed: the connection was closed, which rolls back too.",
    "group", "endpoint", "correlation_id", "reason", "sqlstate",
)  # fmt: skip
COMMIT_NOT_REPLICATED = Event(
    "commit.not_replicated", WARNING,
    "A commit stopped waiting for its synchronous standby, in a group with ``not_replicated: warn``.",
    "group", "endpoint", "correlation_id", *_PLACE, "statement",
)  # fmt: skip
SESSION_LEFT = Event(
    "session.left", WARNING,
    "A connection was closed while its session may have been committing: it counts against "
    "`connection_count` until the server has let it go.",
    "group", "endpoint", "reason",
)  # fmt: skip
SESSION_GONE = Event(
    "session.gone", DEBUG, "Such a session is gone, or is not waited for any longer.",
    "group", "endpoint", "seconds", "reason",
)  # fmt: skip
STATEMENT_SLOW = Event(
    "statement.slow", WARNING, "A statement, or a COMMIT, took longer than `slow_query`.",
    "group", "endpoint", "correlation_id", "seconds", *_PLACE, "statement",
)  # fmt: skip
STATEMENT_RETRIED = Event(
    "statement.retried", DEBUG, "A statement whose connection was lost is sent again on another one.",
    "group", "correlation_id", "reason", "sqlstate",
)  # fmt: skip
TOKEN_LOST = Event(
    "token.lost", WARNING,
    "What a client of `ReadYourWritesMiddleware` has written may be lost: its reads go on without it.",
    "reason",
)  # fmt: skip
RUN_RETRIED = Event(
    "run.retried", DEBUG, "An attempt of `run` failed, and is repeated after so many seconds.",
    "group", "correlation_id", "attempt", "seconds", "reason", "sqlstate",
)  # fmt: skip

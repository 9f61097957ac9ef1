"""Statements that are sent again on another connection, since they cannot have had an effect."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

from ..errors import DBQueryError, QueryDeadlineError, StaleReadError

if TYPE_CHECKING:
    from .block import Block
    from .connection import PooledConnection
    from .stay_block import Lender

Conn = TypeVar("Conn", bound="PooledConnection")
Answer = TypeVar("Answer")

SAME_EVENT = 1.0
"""Seconds in which the end of a server ends its sessions, one after the other."""


def resends(group: Lender, block: Block | None, error: DBQueryError) -> bool:
    """Return whether a failed statement, which had no effect, should be sent again; note it if so.

    The caller sends it outside of its `except`: a second error then does not drag the first one along.
    """
    if not error.repeatable or isinstance(error, QueryDeadlineError):
        return False
    if not isinstance(error, StaleReadError):  # a guard is counted by itself
        group.note_retry(block, error)
    return True


def send_again(
    group: Lender, block: Block | None, another: Callable[[], Conn], attempt: Callable[[Conn], Answer]
) -> Answer:
    """Send a statement again, once.

    A connection that was open when the first one was lost may be lost to the same event: it does not count.

    :param another: makes the block begin again, and returns its connection.
    """
    since = monotonic()
    while True:
        conn = another()
        opened_at = conn.opened_at
        try:
            return attempt(conn)
        except DBQueryError as error:
            same_event = conn.closed and opened_at < since and monotonic() < since + SAME_EVENT
            if not (same_event and resends(group, block, error)):
                raise

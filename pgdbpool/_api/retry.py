"""A unit of work that is repeated if that is harmless."""

from __future__ import annotations

import functools
import random
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from .._error_categories import Category
from .._request import correlation as tracing
from .._request import deadline as deadlines
from .._util import log_events as events
from .._util.token import Token
from ..errors import DBConnectionError, DBOfflineError, NotReplicatedError, classify, one_line
from .handler import Handler
from .pools import Pools

T = TypeVar("T")
P = ParamSpec("P")

_PASSING = (Category.RETRYABLE, Category.CONNECTION_LOST, Category.UNAVAILABLE)


def run(
    group: str,
    function: Callable[[Handler], T],
    *,
    attempts: int = 3,
    tenant: Any = None,
    settings: Mapping[str, Any] | None = None,
    timeout: float | None = None,
    priority: Literal["high", "normal"] = "normal",
    correlation_id: Any = None,
    after: Token | str | None = None,
    idempotent: bool = False,
    backoff: float = 0.05,
    max_backoff: float = 1.0,
    pools: Pools | None = None,
) -> T:
    """Run `function(db)` in a block and return its result; repeat it after a transient failure.

    That is a serialization failure, a deadlock, a lost connection, or a failover: servers that are away or
    have become read-only. The call is repeated if nothing of the attempt can have taken effect: in the
    transaction of a manual-commit group before its first COMMIT, in a group whose target is
    read-only, and if the block got no connection. After a COMMIT whose outcome is unknown, and in an
    autocommit group, it is repeated with `idempotent` only. Effects of the function outside of the
    block are repeated, too.

    :param attempts: the maximum number of attempts.
    :param tenant, settings, timeout, priority, correlation_id, after: those of `Handler`, in each attempt.
    :param idempotent: whether the work may take effect twice.
    :param backoff: seconds before the second attempt; they double, up to `max_backoff`, and a
        random half of them is left out. Nothing is repeated beyond the current deadline.
    :param pools: the set of pools that the group belongs to, instead of the default one.
    :raises Exception: the last attempt's, with their number in its notes and as `attempts`.
    :raises ValueError: `attempts` is less than 1.
    """
    if attempts < 1:
        raise ValueError(f"attempts={attempts!r}: work is tried once at least")
    caller = tracing.caller_of(sys._getframe(1))
    place, attempt = (caller.f_code, caller.f_lasti), 0
    del caller  # it would keep the variables of the caller alive, and with them itself
    while True:
        attempt += 1
        db = (Handler if pools is None else pools.Handler)(
            group,
            timeout=timeout,
            tenant=tenant,
            settings=settings,
            priority=priority,
            correlation_id=correlation_id,
            after=after,
        )
        reads = _reads(db)
        try:
            with db:
                assert db._block is not None
                db._block.place = place
                return function(db)
        except Exception as error:
            delay = min(max_backoff, backoff * 2 ** min(attempt - 1, 30)) * random.uniform(0.5, 1.0)
            left = deadlines.time_left() if deadlines.in_use else None
            in_time = left is None or delay < left
            if attempt >= attempts or not in_time or not _harmless(db, error, reads, idempotent):
                if attempt > 1:
                    _note(error, attempt)
                raise
            db._group.retries += 1
            block = db._block
            events.RUN_RETRIED(
                "group %s: attempt %d failed, again in %.3f s: %s", group, attempt, delay, error,
                group=group, correlation_id=None if block is None else block.correlation_id, attempt=attempt,
                seconds=delay, reason=one_line(error), sqlstate=getattr(error, "sqlstate", None),
            )  # fmt: skip
        time.sleep(delay)


def retrying(group: str, **options: Any) -> Callable[[Callable[Concatenate[Handler, P], T]], Callable[P, T]]:
    """Make a function that takes a block first run as `run` runs it, with the same options.

    >>> @retrying("write", attempts=5)                                  # doctest: +SKIP
    ... def transfer(db, source, target, amount): ...
    >>> transfer(1, 2, 10)                                              # doctest: +SKIP
    """

    def decorate(function: Callable[Concatenate[Handler, P], T]) -> Callable[P, T]:
        @functools.wraps(function)
        def repeated(*args: P.args, **kwargs: P.kwargs) -> T:
            return run(group, lambda db: function(db, *args, **kwargs), **options)

        return repeated

    return decorate


def _reads(db: Handler) -> bool:
    return db._group.config.target in ("read-only", "standby")


def _harmless(db: Handler, error: Exception, reads: bool, idempotent: bool) -> bool:
    """Return whether the failure may be transient, and nothing of the attempt can have taken effect.

    :param reads: whether the group could only read before the attempt.
    """
    block = db._block
    reads = reads and _reads(db)  # a reload may have changed that, before the block had its connection
    category = classify(error)
    passing = category in _PASSING or (category is Category.READ_ONLY and not reads)
    if not passing or (isinstance(error, DBConnectionError) and not isinstance(error, DBOfflineError)):
        return False  # such as a wrong password, which the server will refuse again
    if isinstance(error, NotReplicatedError):
        return False  # the commit is known to be there
    if idempotent or reads or block is None:
        return True
    unknown = getattr(error, "maybe_executed", False) or getattr(error, "maybe_committed", False)
    # In an autocommit block each statement before has taken effect, but before the first connection.
    never_began = isinstance(error, DBConnectionError) and not block.since
    return never_began or (block.manual and not block.committed and not unknown)


def _note(error: Exception, attempts: int) -> None:
    error.attempts = attempts  # type: ignore[attr-defined]
    if add_note := getattr(error, "add_note", None):  # Python 3.11 and later
        add_note(f"pgdbpool.run: the last of {attempts} attempts")

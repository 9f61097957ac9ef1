"""Changes that a block may leave in a session, and the cleaning that undoes them before the next block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg.adapt import AdaptersMap, Transformer

from .. import errors
from .._request.tenant import milliseconds
from .._util import bounds
from .commands import (
    CLEANING,
    CLEANING_TO_READ,
    IDLE,
    INERROR,
    INTRANS,
    NOTHING,
    Command,
    begins,
    deallocate,
)
from .pooler_safety import left_in_session
from .prepared import ROLLBACK, dropping, is_stale
from .short_way import shared
from .state import ConnectionState, Settled, own_names
from .statement_shape import StatementTraits, shape_with_escapes, text_of

if TYPE_CHECKING:
    from psycopg.abc import PQGen

_T = TypeVar("_T")
_WRITTEN_BY = (b"IntervalStyle", b"standard_conforming_strings")
"""Settings that determine how the client writes intervals and literals."""
_SHOWN = (
    *_WRITTEN_BY, b"TimeZone", b"DateStyle", b"search_path", b"application_name", b"session_authorization",
    b"is_superuser", b"default_transaction_read_only",
)  # fmt: skip
"""Settings that the server reports. If `client_encoding` has changed, the connection is closed anyway."""
_ATTRIBUTES = (
    "row_factory", "cursor_factory", "server_cursor_factory", "own_timeout", "_adapters", "_isolation_level",
    "_read_only", "_deferrable", "_begin_statement",
)  # fmt: skip

_kept: dict[Any, Any] = {}
"""The attributes and settings that sessions of a group have in common, kept once for all of them."""
_MOST_KEPT = 64


def _once(key: Any, found: _T) -> _T:
    """Return the object of an earlier session that has the same key, or keep this one."""
    if len(_kept) >= _MOST_KEPT:
        _kept.clear()
    return _kept.setdefault(key, found)  # type: ignore[no-any-return]


class CleanedConnection(ConnectionState):
    """A connection that tracks the changes of a block and undoes them."""

    def only_read(self) -> None:
        """Note that the session refuses writes, which its cleaning must not undo."""
        self.reads = True
        self.cleaning = self.plain_cleaning

    @property
    def plain_cleaning(self) -> tuple[Command, ...]:
        """The commands that clean the session if no prepared statement must be dropped."""
        return CLEANING_TO_READ if self.reads else CLEANING

    def keep_touched(self) -> None:
        """Keep the session as it is (`reset: never`), but forget prepared statements it may have lost."""
        if self.touched:
            self._known.clear()
        self.touched = self.prepares = self.tainted = False
        self.dropping = NOTHING

    def touch(self, what: StatementTraits, query: Any) -> StatementTraits:
        """Note a statement's effects on the session and the transaction; return its shape in this session.

        :raises NotSupportedError: it would change a session that a pooler shares between clients.
        """
        if what.escapes and not self._strings_conform():
            what = shape_with_escapes(query, self)
        if self.local and what.touches and (text := text_of(query, self)) and (kept := left_in_session(text)):
            raise errors.as_query_error(psycopg.NotSupportedError(kept))
        if what.touches:
            self.mark(session=True)
        self.prepares = self.prepares or what.prepares
        if what.prepares:
            self.explicit = False  # it may be PREPARE TRANSACTION
        self.tainted = self.tainted or what.taints
        if what.timeout:
            # The server now limits statements by the block's own timeout. The client waits at least that
            # long, and without bound if the value is unknown.
            self.own_timeout = True
            self.mark(attributes=True)
            allowed = milliseconds(what.allows) or 0.0
            if allowed < 1 or self.patience is None:  # less than a millisecond rounds to 0: no limit
                self.patience = None
            else:
                self.patience = max(self.patience, allowed / 1000 + bounds.CLIENT_GRACE)
        return what

    def _strings_conform(self) -> bool:
        """Return whether a plain string will keep its backslashes when the next statement is parsed."""
        if self.stale:
            return self.conforms  # the cleaning restores the initial value
        return self.pgconn.parameter_status(b"standard_conforming_strings") == b"on"

    def misleads(self) -> bool:
        """Return whether a parameter would be written by settings that the cleaning before it resets."""
        return tuple(map(self.pgconn.parameter_status, _WRITTEN_BY)) != self.shown[: len(_WRITTEN_BY)]

    def _shown(self) -> tuple[bytes | None, ...]:
        """Return the values of the session's settings as reported by the server."""
        return tuple(map(self.pgconn.parameter_status, _SHOWN))

    def restore_attributes(self) -> bool:
        """Restore the connection's attributes after a block, and request a cleaning.

        :returns: False if something may remain that cannot be cleaned.
        """
        # A statement sent with a cleaning is encoded before that runs, so the encoding must not change.
        if self.pgconn.parameter_status(b"client_encoding") != self.client_encoding:
            return False
        # A generator left open (`notifies`, `stream`) still holds the lock.
        if self.turn.locked() or self.tainted or self._tpc or self._num_transactions or self._pipeline:
            return False
        if self.altered:
            self.renew_adapters()
            self.unsure = False
            if not self.handed_out:  # else the object that has the session from now on is settled
                self.settle()
        self.follows, self.in_force = False, None
        if self.touched and not self.local:
            self._known.clear()
        if (self.touched or self.dropping) and not self.local:
            self.ask_for_cleaning()
        self.touched = self.altered = self.prepares = False
        return True

    def settle(self) -> None:
        """Set the attributes that every block begins with, and remove those that the last block added."""
        if (settled := self.settled) is None:
            return
        mine = self.own_dictionary()
        for name in mine.keys() - own_names:
            del mine[name]  # of the block, or of `configure`, whose value comes back
        self.patience, self.prepare_threshold, self.prepared_max, attributes = settled
        mine.update(attributes)
        self._own_adapters()
        self._notice_handlers, self._notify_handlers = map(list, self.own_handlers)
        self.backlog = ()

    def follow_settings(self) -> None:
        """Decode values by the block's settings; see `decoding`."""
        from .decoding import adapters_for

        if self._following is None:
            self._following = adapters_for(self)
        self._adapters, self.follows, self.in_force = AdaptersMap(self._following), True, None

    def ask_for_cleaning(self) -> None:
        """Have the session cleaned before its next statement."""
        plain = self.plain_cleaning
        if self.stale and plain[1] in self.cleaning and not (self.prepares or self.dropping):
            return  # already due
        own = ((deallocate(self.own_statements), None),) if self.prepares else NOTHING
        self.cleaning = (*self.dropping, *plain[:-1], *own, plain[-1])
        self.stale, self.dropping = True, NOTHING

    def forget_statements(self, since: int = 0) -> None:
        """Forget the session's prepared statements, and have them dropped before the next block.

        :param since: psycopg's number of the first statement to forget; 0 for all, including the preamble's.
        """
        prepared = self._prepared
        stale = {key: name for key, name in prepared._names.items() if int(name[5:]) >= since}
        names = list(stale.values())
        for key in stale:
            del prepared._names[key]
        if not since:
            prepared._counts.clear()
            names += self._known.values()
            self._known.clear()
        if not names or self.local:
            return  # a pooler has its own names for them
        # Not part of the cleaning: that ends a transaction, and this one may continue from a savepoint.
        self.dropping += dropping(names)
        self.mark(attributes=True)

    def before_resending(
        self, error: psycopg.Error, preamble: Sequence[Command]
    ) -> tuple[Command, ...] | None:
        """Forget stale prepared statements after such an error; return the commands to send before a retry.

        :returns: None if the statement must not be sent again: in a transaction that was already open, or
            after any other error.
        """
        if not is_stale(error):
            return None
        self.forget_statements()
        status, undo = self.pgconn.transaction_status, NOTHING
        if status == INERROR and begins(preamble):
            undo = ROLLBACK
        elif status != IDLE:
            return None
        dropping, self.dropping = self.dropping, NOTHING
        return (*undo, *dropping, *preamble)

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Wrap a psycopg pipeline: after a failure, forget statements that the server may have skipped."""
        since, outer, self.spoilt = self._prepared._prepared_idx, self.spoilt, False
        try:
            yield
        except BaseException:
            self.spoilt = True
            raise
        finally:
            if self.spoilt:
                self.forget_statements(since)
            self.spoilt = self.spoilt or outer

    def note_definition(self, what: StatementTraits) -> None:
        """Note if a statement may change objects that prepared statements use; see `_rollback_gen`."""
        self.defines = self.defines or (what.utility and not what.controls)

    def _rollback_gen(self) -> PQGen[None]:
        """Roll back, and keep the prepared statements unless the transaction failed or defined something.

        psycopg would drop them all, in one more round trip.
        """
        if (
            self.pgconn.transaction_status != INTRANS or self.defines
            or self._pipeline or self._num_transactions or self._tpc
        ):  # fmt: skip
            yield from super()._rollback_gen()
            self.defines = False
        else:
            yield from self._exec_command(b"ROLLBACK")

    def snapshot_attributes(self, configured: bool) -> None:
        """Record the attributes that every block starts with; called once, when the connection is opened.

        :param configured: whether the application may have added attributes.
        """
        self.client_encoding = self.pgconn.parameter_status(b"client_encoding")
        self.speaks_utf8 = self.client_encoding == b"UTF8"
        self.conforms = self._strings_conform()
        attributes = {name: getattr(self, name) for name in _ATTRIBUTES}
        present = self.own_dictionary() if configured else {}
        more = {name: value for name, value in present.items() if name not in own_names}
        limits = self.patience, self.prepare_threshold, self.prepared_max
        self.settled = Settled(*limits, attributes | more)
        if not more and self._adapters is None:
            # By identity: the values may have any `__eq__`, and live as long as the dictionary.
            self.settled = _once((limits, *map(id, attributes.values())), self.settled)
        shown = self._shown()
        self.shown = _once(shown, shown)
        self.own_handlers = tuple(self._notice_handlers), tuple(self._notify_handlers)
        # An isolation_level, read_only or deferrable that `configure` has set is part of each BEGIN.
        self.plain = not self.local and self.speaks_utf8 and self._get_tx_start_command() == b"BEGIN"
        self.renew_adapters()
        self._own_adapters()

    def _own_adapters(self) -> None:
        """Give the next block a copy of the adapters, so that its own registrations end with it."""
        if self._adapters is not None:
            self._adapters = AdaptersMap(self._adapters)

    def renew_adapters(self) -> None:
        """Forget the objects that have adapted values so far: they keep each class of a parameter."""
        self.adapters_shared, self.dumps, self.readers = None, None, {}

    def share_adapters(self) -> AdaptersMap:
        """Return the adapters shared by cursors that register none."""
        # psycopg would copy the global ones, only to have them copied here.
        copy, independent = shared.of(self._adapters or psycopg.adapters)
        if copy is not self.adapters_shared:
            self.adapters_shared, self.readers = copy, {}
            self.dumps = None if independent is None else Transformer(independent)
        return copy

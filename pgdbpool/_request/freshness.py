"""The writes that reads in the current context must see: up to a token, and those of earlier blocks.

Readers check the plain attribute `in_use` first, so a process without tokens pays nothing.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar

from .._util import log_events as events
from .._util.scoped_value import Binding, Scope, Variable, current
from .._util.token import UNKNOWN, Position, Token
from . import special

in_use = False
"""Whether a token was ever asked for, or given, in this process."""

NOTHING: tuple[Position, ...] = ()


_lock = threading.RLock()  # a signal handler may note a write too


class Seen:
    """The writes that a context has seen: those up to the token it began with, and its blocks' own."""

    __slots__ = ("_outer", "_token", "forgiving", "written")

    def __init__(self, token: Token | str | None = None, *, outer: Seen | None = None) -> None:
        if not in_use:
            use()
        if token is not None and type(token) is not Token:
            token = _parsed(token)
        self._outer = outer
        self._token = token
        self.written: Token | None = None
        """The end of the writes of the blocks inside."""
        self.forgiving = False
        """Whether writes that a failover may have lost are logged and forgotten, in place of an error."""

    @property
    def token(self) -> Token | None:
        """The end of the writes that the next block is to see; None if there are none."""
        own = self._token
        if self._outer is None or (outer := self._outer.token) is None:
            return own
        return outer if own is None else own | outer

    def required(self) -> tuple[Position, ...]:
        """Return the positions that the server of a read must have reached."""
        token = self.token
        return NOTHING if token is None else token.positions

    def note(self, position: Position) -> None:
        """Note that a block inside has written up to here."""
        with _lock:
            self.written = Token([position]) | self.written
            self._token = self.written | self._token
        if self._outer is not None:
            self._outer.note(position)

    def note_unknown(self, system: int) -> None:
        """Note that a block inside may have written, up to an unknown position."""
        self.note(Position(system, 0, UNKNOWN))

    def forgives(self, position: Position) -> bool:
        """Return whether reads go on without a position that was lost; if so, it is forgotten."""
        if not self.forgiving and (self._outer is None or not self._outer.forgives(position)):
            return False
        if self.forgiving:
            events.TOKEN_LOST(
                "a write may have been lost in a failover or a crash: %s", position, reason=str(position)
            )
        self._forget(position)
        return True

    def _forget(self, position: Position) -> None:
        with _lock:
            left = [] if self._token is None else [p for p in self._token.positions if p != position]
            self._token = Token(left) if left else None


_current: Variable[Seen] = ContextVar("pgdbpool_seen", default=None)


def _parsed(token: Token | str) -> Token:
    if isinstance(token, str):
        return Token.parse(token)
    if not isinstance(token, Token):
        raise TypeError(f"{token!r} is not a token: pass one, its text, or None")
    return token


class _ReadYourWrites(Scope[Seen]):
    """The `with` block of `read_your_writes`."""

    def _recreate_cm(self) -> _ReadYourWrites:
        return _ReadYourWrites(self._variable, self._value)

    def __enter__(self) -> Seen:  # type: ignore[override]
        super().__enter__()
        assert self._binding is not None
        return self._binding.value


def read_your_writes(token: Token | str | None = None) -> _ReadYourWrites:
    """Let the blocks inside the `with` block see the writes up to the token, and those of earlier ones.

    A read does not run on a standby that has not replayed them yet; see :doc:`/guide/freshness`. It is
    a context variable: a new thread does not inherit it, `contextvars.copy_context()` passes it on.

    >>> with read_your_writes(token) as seen:                           # doctest: +SKIP
    ...     save(form)
    ...     show(form)
    >>> keep = seen.token                                               # doctest: +SKIP

    :param token: a token or its text, such as one of an earlier request; None for none.
    :raises ValueError: the text is not a token's.
    """
    return _ReadYourWrites(_current, lambda: Seen(token, outer=current(_current)))


def for_block(after: Seen | None) -> Seen | None:
    """Return the record of the writes that a new block must see, to which it adds its own; None without one.

    :param after: the record that this block alone was given.
    """
    outer = current(_current)
    if after is not None:
        after._outer = outer
        return after
    return None if outer is None else Seen(outer=outer)


def set_current(seen: Seen) -> None:
    """Let the blocks in the rest of this context, such as a request's, see these writes."""
    _current.set(Binding(seen))


def current_seen() -> Seen | None:
    """Return the current context's record of seen writes, or None."""
    return current(_current)


def forked() -> None:
    """In a child, forget a lock that a thread of its parent may have held."""
    global _lock
    _lock = threading.RLock()


def use() -> None:
    """Switch tokens on."""
    global in_use
    in_use = True
    special.use()

"""The remains of a connection in the hands of a block that has ended.

The session goes on to the next block in another object: `succeed` makes that one, and leaves the old object
without the session. So a reference that a block has kept, also through a cursor, a transaction, a pipeline or
a COPY, reaches no later block. It is done at the block's end, for connections that were handed out: no other
block pays for it. A reference to libpq itself (`connection.pgconn`) is not guarded.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from itertools import repeat
from operator import attrgetter
from threading import Lock, RLock
from typing import Any, NoReturn
from weakref import ref

import psycopg

from .. import errors
from .connection import PooledConnection
from .state import NOBODYS, OUTSIDE, own_names

_CHOSEN = (
    "row_factory", "cursor_factory", "server_cursor_factory", "_adapters", "_isolation_level", "_read_only",
    "_deferrable", "_begin_statement", "_notice_handlers", "_notify_handlers",
)  # fmt: skip
_ANEW = ("turn", "step", "handed_out", "replacing", "__weakref__", "__dict__")
"""Slots that are not handed over."""


class Ended:
    """The methods of a connection that has gone on to another block: those with an effect refuse."""

    __slots__ = ()

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise errors.BlockClosedError(OUTSIDE)

    # psycopg's objects come through `wait`, those of the pool through `exchange` and `receive`.
    wait = exchange = receive = expose = _refuse
    cursor = execute = pipeline = transaction = notifies = __enter__ = _refuse
    commit = rollback = close = cancel = cancel_safe = _try_cancel = _refuse
    _set_autocommit = _set_isolation_level = _set_read_only = _set_deferrable = _refuse
    set_autocommit = set_isolation_level = set_read_only = set_deferrable = _refuse
    tpc_begin = tpc_prepare = tpc_commit = tpc_rollback = tpc_recover = _refuse
    add_notice_handler = remove_notice_handler = add_notify_handler = remove_notify_handler = _refuse

    def retire(self) -> None:
        """Do nothing: the socket and the slot are another object's."""


class _Kind:
    """The facts about a class of connections."""

    def __init__(self, cls: type[PooledConnection]) -> None:
        # Each class's own: `getattr` would find those of a layer above again and again.
        names = [name for kind in cls.__mro__ for name in vars(kind).get("__slots__", ())]
        self.slots = tuple(name for name in names if name not in _ANEW)
        """The attributes that are not in the instance's dictionary."""
        self.read = attrgetter(*self.slots)
        body = {"__slots__": (), "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        self.ended: type[PooledConnection] = type(cls.__name__, (Ended, cls), body)
        """The class of an object after its end: a subclass of its former one."""
        nobodys = cls.__new__(cls)
        psycopg.Connection.__init__(nobodys, NOBODYS)
        nobodys._closed = True
        self.attributes = {**vars(nobodys)}
        """psycopg's attributes of an object after its end."""


_kinds: dict[type[PooledConnection], _Kind] = {}


def _kind(cls: type[PooledConnection]) -> _Kind:
    return _kinds.get(cls) or _kinds.setdefault(cls, _Kind(cls))


def end(conn: PooledConnection) -> None:
    """Take everything out of a connection, whose session is another object's or closed."""
    kind = _kind(type(conn))
    conn.__class__ = kind.ended
    vars(conn).update(kind.attributes)
    conn.block = conn.slot = None
    conn.lent, conn.turn, conn.backlog = False, Lock(), ()


def succeed(conn: PooledConnection) -> PooledConnection | None:
    """Return the connection that has the session from now on; call this when no block has it.

    :returns: None if another thread is just using the old one, which stays as it was.
    """
    cls = type(conn)
    heir = cls.__new__(cls)
    lock = conn.turn
    if not lock.acquire(blocking=False):
        return None
    try:
        _hand_over(conn, heir)
        heir.replacing = RLock()
        heir.settle()
        end(conn)
    finally:
        lock.release()  # a thread that waits for it finds the connection ended
    return heir


def pass_on(conn: PooledConnection, cls: type[PooledConnection]) -> PooledConnection:
    """Return an object of the class that has the session for now; `adopt` gives the old one another."""
    heir = cls.__new__(cls)
    _hand_over(conn, heir)
    heir.replacing = RLock()
    heir.mark(attributes=True)  # of an object that was handed out, and may go back to the pool itself
    return heir


def _hand_over(conn: PooledConnection, heir: PooledConnection) -> None:
    """Give everything a connection has, including its session, to another object of its class."""
    heir.__dict__ = {**conn.own_dictionary()}  # not `update`, which would have it share its keys
    kind = _kind(type(conn))
    deque(map(setattr, repeat(heir), kind.slots, kind.read(conn)), 0)
    heir.turn, heir.step, heir.handed_out = Lock(), None, False
    for listener in ("notice_handler", "notify_handler"):
        handler = getattr(heir.pgconn, listener)
        setattr(heir.pgconn, listener, partial(handler.func, ref(heir)))
    if heir.slot is not None:
        heir.slot.conn = ref(heir)


def adopt(conn: PooledConnection, other: PooledConnection) -> None:
    """Let a lost connection go on with the session of another one, which is ended.

    The application's changes to the object stay: adapters, handlers, factories, the modes of
    transactions, added attributes.
    """
    kept = {name: value for name, value in vars(conn).items() if name in _CHOSEN or name not in own_names}
    threshold = conn.prepare_threshold
    _hand_over(other, conn)
    vars(conn).update(kept)
    conn.prepare_threshold = threshold
    end(other)

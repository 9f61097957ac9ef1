"""A connection that is out of its pool without a `with` block: its units of work follow one another.

Each transaction, or each statement in autocommit mode, takes the tenant that is current when it begins.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from sys import _getframe
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, cast
from weakref import proxy

import psycopg

from .. import errors
from .._request import freshness
from .block import Binding, Block
from .commands import ACTIVE, BAD, IDLE, INTRANS, OPEN
from .connection import PooledConnection, asked_by_driver, drivers
from .cursors import BlockCursor
from .ended import Ended, adopt, pass_on
from .resending import Answer, resends, send_again
from .server_cursor import BlockServerCursor
from .stay_block import Stay
from .stay_cursors import StayCursor, StayServerCursor

if TYPE_CHECKING:
    from psycopg import Xid
    from psycopg.abc import PQGen
    from psycopg.adapt import AdaptersMap

GIVEN_BACK = "this connection is already given back to its pool: take another with Connection.getconn(group)"
_LOST = (
    "the connection was lost with an open transaction: nothing of it was committed; call rollback() to begin "
    "another"
)
_TOUCHED = (
    "the connection was lost, and with it what was set up in its session: nothing was sent; give it back and "
    "take another"
)


class KeptConnection(PooledConnection):
    """The methods of a connection that is out of its pool; its class while it is."""

    __slots__ = ()
    in_pool: ClassVar[type[PooledConnection]]
    """The class that such a connection has in its pool."""

    @property
    def stay(self) -> Stay:
        """The block that spans the connection's time out of its pool.

        :raises BlockClosedError: it was given back, or is the parent process's.
        """
        if not isinstance(stay := self.block, Stay):
            if self.abandoned:
                self._refuse_use()
            raise errors.BlockClosedError(GIVEN_BACK)
        return stay

    @property
    def tenant(self) -> Any:
        """The tenant of the units of work to come; None for the current one of each."""
        return self.stay.tenant

    @tenant.setter
    def tenant(self, value: Any) -> None:
        """Set it.

        :raises psycopg.ProgrammingError: a transaction is open, which keeps the tenant that it began with.
        """
        if value != self.stay.tenant and self.pgconn.transaction_status in OPEN:
            raise psycopg.ProgrammingError("the tenant can't be changed now: a transaction is open")
        self.stay.tenant = value

    def _check_intrans_gen(self, attribute: str) -> PQGen[None]:
        """Let an attribute be set on a lost connection, which goes on with another session."""
        if not self.closed or self.stay.lost:
            yield from super()._check_intrans_gen(attribute)

    def belong_to(self, owner: object) -> None:
        """Close the connection, and let the pool replace it, once the owner is garbage-collected."""
        self.stay.watch = proxy(owner, self.stay.group.on_drop)

    def be_collectable(self) -> None:
        """Let the group take another connection once nothing but the group refers to this one."""
        self.stay.group.loosen(self)
        self.stay.loose = True

    def _tie(self, stay: Stay) -> None:
        """Have the group refer to the connection, which it is about to take back or to replace."""
        if stay.loose:
            stay.loose = False
            stay.group.tie(self)

    @property
    def pgconn(self) -> Any:
        """libpq's connection; if the application uses it, the session is cleaned after the block."""
        # Asked for some ten times in each operation, so the modules of the driver are remembered.
        try:
            if _getframe(1).f_globals["__name__"] not in drivers and not asked_by_driver(_getframe(1)):
                self.mark(session=True)
        except KeyError:  # code that is executed from a text may have no module
            self.mark(session=True)
        return self.__dict__["pgconn"]

    @pgconn.setter
    def pgconn(self, value: Any) -> None:
        vars(self)["pgconn"] = value

    @property
    def closed(self) -> bool:
        """Whether the connection is closed."""
        return bool(self.__dict__["pgconn"].status == BAD)

    @property
    def adapters(self) -> AdaptersMap:
        """The connection's adapters, which may be changed."""
        self.mark(attributes=True)
        return super().adapters

    # Units of work.

    def renew(self) -> None:
        """Before a statement: begin a unit of work with the tenant of now, unless one is open.

        A connection that the server has closed meanwhile is replaced, if there was nothing in its session.

        :raises ConnectionLostError: it was lost, and something was set up in its session.
        :raises TransactionAbortedError: a transaction was lost with it, and `rollback()` was not called.
        :raises TenantConflictError: the open transaction has another tenant than the current one.
        :raises TenantRequiredError: the group requires a tenant and there is none.
        """
        # Not as an attribute, which looks at the caller: this runs before each statement.
        stay, status = self.stay, self.__dict__["pgconn"].transaction_status
        if self._pipeline or self.riding:
            return
        if status == INTRANS:
            stay.check_tenant()
        if status in (INTRANS, ACTIVE) or self.turn.locked():
            return
        if self.closed or (status == IDLE and self._is_lost()):
            self._get_another(stay)
        idle = self.__dict__["pgconn"].transaction_status == IDLE
        if idle and (binding := stay.bind()) is not stay.binding:
            self._rebind(stay, binding)

    def _is_lost(self) -> bool:
        """Return whether the server has ended the session; another thread's statement finds out by itself."""
        if not self.turn.acquire(blocking=False):
            return False
        try:
            if not (self.ended_by_server or self.poll(0)):
                return False
            return self.pgconn.transaction_status == IDLE and not self.alive()
        except (psycopg.OperationalError, ValueError):
            return True  # another thread has closed it
        finally:
            self.turn.release()

    def renew_alone(self) -> None:
        """Begin a unit of work for a statement that cannot ride, on a server with the writes it must see."""
        self.renew()
        if freshness.in_use:
            self.freshen(self.stay)

    def _rebind(self, stay: Stay, binding: Binding) -> None:
        """Let the next unit of work bind other settings."""
        late = binding.special and not stay.binding.special
        stay.binding = binding
        if late:
            self.lend_to(stay)  # the settings could not be bound before there was a tenant
        stay.settings = self.local + binding.settings
        stay.in_transaction, stay.at_begin = self._local(stay), self._encode(stay)

    def _get_another(self, stay: Stay) -> None:
        """Replace a lost connection, if nothing is lost with it."""
        if stay.lost:
            raise errors.TransactionAbortedError(_LOST) from stay.failure
        if self.touched:
            PooledConnection.close(self)
            raise errors.ConnectionLostError(_TOUCHED)
        self.replace(stay)

    def replace(self, stay: Stay) -> None:
        """Go on with another session of the group in this object."""
        with self.replacing:
            if self.pgconn.transaction_status == IDLE:
                PooledConnection.close(self)
            if not self.closed:
                return  # another thread was here
            cls, stay.lost = type(self), False
            self._tie(stay)
            stay.group.discard(self, "lost")
            stay.part()
            other = stay.take()
            self._continue_with(other, stay, cls)

    def again(self, follow: Callable[[], None], attempt: Callable[[], Answer]) -> Answer:
        """Run a cursor's operation; run it once more if it was lost and cannot have had an effect.

        :param follow: lets the cursor go on with the session that the connection has now.
        """
        self.renew()
        follow()
        try:
            return attempt()
        except errors.DBQueryError as error:
            stay = self.stay
            if (self.closed and self.touched) or not resends(stay.group, stay, error):
                raise
        return send_again(stay.group, stay, partial(self._begin_anew, stay, follow), lambda _: attempt())

    def _begin_anew(self, stay: Stay, follow: Callable[[], None]) -> KeptConnection:
        stay.lost = False
        if self.closed:
            self.replace(stay)
        else:
            self.rollback()
        if freshness.in_use:
            self.freshen(stay)
        follow()
        return self

    def freshen(self, stay: Stay) -> None:
        """Go on with a session of a server that has the writes the block must see.

        :raises StaleReadError: no server has them; or the session is this block's own, and cannot be left.
        """
        seen = stay.sees()
        if seen is None or self.pgconn.transaction_status != IDLE or not self.lacking(seen.required()):
            return
        if self.touched:
            stay.group.fresh(stay, self, stay.timeout)  # waits, or raises
            return
        with self.replacing:
            cls = type(self)
            self._tie(stay)
            other: PooledConnection = pass_on(self, cls.in_pool)
            stay.group.take_over(self, other)
            stay.conn = other
            try:
                other = stay.group.fresh(stay, other, stay.timeout)
            finally:
                self._continue_with(other, stay, cls)

    def _continue_with(self, other: PooledConnection, stay: Stay, cls: type[KeptConnection]) -> None:
        """Go on in this object with the session of another; nothing waits from here on."""
        adopt(self, other)
        stay.group.take_over(other, self)
        stay.conn, self.block, self.lent, self.__class__ = self, stay, True, cls
        self.mark(attributes=True, kept=True)
        stay.in_transaction, stay.at_begin = self._local(stay), self._encode(stay)

    def commit(self) -> None:
        """Commit the open transaction, if any; the next statement begins another, with its tenant.

        :raises TransactionAbortedError: a statement had failed, or the transaction was lost.
        :raises ConnectionLostError: with `maybe_committed`, since the outcome is unknown.
        """
        stay = self.stay
        if stay.lost:
            raise errors.TransactionAbortedError(_LOST) from stay.failure
        if self.closed:
            return
        try:
            super().commit()
        except errors.TransactionAbortedError as error:
            raise error from stay.failure

    def rollback(self) -> None:
        """Roll the open transaction back, if any; one that was lost, cut, or is a parent's, is given up."""
        if self.abandoned:
            return
        self.check_left()
        self.stay.lost = False
        if not self.closed:
            try:
                super().rollback()
            except errors.ConnectionLostError:
                if not self.severed:
                    raise

    # As the connection's, with the tenant of now.

    def send_due(self) -> tuple[Block, bool, bool]:
        """Send the unit of work's due commands."""
        self._renew_within()
        return super().send_due()

    def preamble(self, block: Block) -> Any:
        """Return the commands that must be sent before the next statement."""
        self._renew_within()
        return super().preamble(block)

    def _renew_within(self) -> None:
        """Bind the current tenant even if the turn is already taken; the session is not replaced then."""
        stay = self.stay
        if self._pipeline or self.riding or self.__dict__["pgconn"].transaction_status != IDLE:
            return
        if (binding := stay.bind()) is not stay.binding:
            self._rebind(stay, binding)

    def cursor(self, *args: Any, **kwargs: Any) -> Any:
        """Return a cursor; if the session was lost and held nothing, it is replaced first."""
        if self.closed or self.block is None:
            self.renew()
        return super().cursor(*args, **kwargs)

    def transaction(self, savepoint_name: str | None = None, force_rollback: bool = False) -> Any:
        """Open a transaction, or a savepoint inside an open one."""
        self.renew_alone()
        return super().transaction(savepoint_name, force_rollback)

    def pipeline(self) -> Any:
        """Switch to pipeline mode."""
        self.renew_alone()
        return super().pipeline()

    def tpc_begin(self, xid: Xid | str) -> None:
        """Begin a two-phase transaction with the tenant of now."""
        self.renew_alone()
        super().tpc_begin(xid)

    def tpc_commit(self, xid: Xid | str | None = None) -> None:
        """Commit a two-phase transaction; one that is named may have been prepared in another session."""
        if xid is not None:
            self.renew()
        super().tpc_commit(xid)

    def tpc_rollback(self, xid: Xid | str | None = None) -> None:
        """Roll a two-phase transaction back; one that is named may have been prepared in another session."""
        if xid is not None:
            self.renew()
        super().tpc_rollback(xid)

    # Giving it back.

    def close(self) -> None:
        """Give the connection back to its pool, as `Connection.putconn` does."""
        # The pool and psycopg close a lost connection for good.
        caller = str(_getframe(1).f_globals.get("__name__"))
        if caller.startswith(("pgdbpool._", "psycopg.")):
            super().close()
        else:
            give_back(self)

    def terminate(self) -> None:
        """Close the connection for good; the pool opens another."""
        super().close()
        give_back(self)

    def __enter__(self) -> KeptConnection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Commit at a clean end, roll back after an exception, and give the connection back."""
        if isinstance(self, Returned):
            return  # the block has closed it
        try:
            if kind is None:
                self.commit()
        finally:
            give_back(self)


class Returned(Ended):
    """The methods of a connection that was given back: `close` does nothing, all else refuses."""

    __slots__ = ()

    def _refuse_returned(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise errors.BlockClosedError(GIVEN_BACK)

    again = renew = renew_alone = terminate = _refuse_returned

    def __exit__(self, *raised: object) -> None:
        """Do nothing: it is given back."""


for _name in [name for name, value in vars(Ended).items() if value is Ended._refuse]:
    setattr(Returned, _name, Returned._refuse_returned)
Returned.close = Returned.__exit__  # type: ignore[assignment]


_kept: dict[type[PooledConnection], type[PooledConnection]] = {}
_returned: dict[type[PooledConnection], type[PooledConnection]] = {}


def _class(
    known: dict[type[PooledConnection], type[PooledConnection]],
    methods: type[Any],
    cls: type[PooledConnection],
) -> type[PooledConnection]:
    """Return the class that an object of the pool's class has for a time."""
    found = known.get(cls)
    if found is None:
        bases = (methods, cls) if methods is Returned else _bases(cls)
        found = known.setdefault(
            cls, type(cls.__name__, bases, {"__slots__": (), "__module__": cls.__module__, "in_pool": cls})
        )
    return found


def _bases(cls: type[PooledConnection]) -> tuple[type[Any], ...]:
    return (KeptConnection,) if cls is PooledConnection else (KeptConnection, cls)


def keep(conn: PooledConnection) -> KeptConnection:
    """Let a connection that was just lent go out of its pool."""
    # Not `touched`, as by `expose`: its cursors know what their statements leave in the session. Nor
    # `altered`: the next block has another object, and begins with the attributes it should.
    conn.mark(kept=True)
    if conn.cursor_factory is BlockCursor:
        conn.cursor_factory = StayCursor
    if conn.server_cursor_factory is BlockServerCursor:
        conn.server_cursor_factory = StayServerCursor
    conn.own_dictionary()  # another class would have it share its keys
    conn.__class__ = _class(_kept, KeptConnection, type(conn))
    assert isinstance(conn, KeptConnection)
    return conn


def give_back(conn: PooledConnection) -> None:
    """Give a connection back to its pool, which rolls back an open transaction.

    In a forked child it does nothing for one of the parent's.

    :raises BlockClosedError: it was given back before.
    """
    if conn.abandoned:
        return
    if not isinstance(stay := conn.block, Stay):
        raise errors.BlockClosedError(GIVEN_BACK)
    kept = cast(KeptConnection, conn)
    cls = kept.in_pool
    if stay.loose:
        kept._tie(stay)
    try:
        if vars(conn)["pgconn"].transaction_status in OPEN and not conn.turn.locked():
            conn.give_up()
    except psycopg.Error:
        PooledConnection.close(conn)  # the server rolls back by itself
    finally:
        conn.__class__ = cls
        stay.group.checkin(conn)
        stay.open = False
        stay.failure = None
        if conn.block is None:
            conn.__class__ = _class(_returned, Returned, cls)

"""`Pools`: sets of pools beside the default one, as objects."""

from __future__ import annotations

import _thread
import re
import threading
import warnings
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn
from weakref import finalize

from ..errors import ConfigError
from .connection import Connection, PoolSet, Source, open_sets
from .handler import Handler

if TYPE_CHECKING:
    from typing_extensions import Self

    from .._process.pools import Pools as ProcessPools

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}")


class Pools(PoolSet):
    """A separate set of pools, beside the default one that `Connection` stands for.

    >>> with Pools("reports.yaml") as pools:                            # doctest: +SKIP
    ...     with pools.Handler("read") as db:
    ...         db.query("SELECT 1")
    ...     pools.fetchval("read", "SELECT 1")

    `pools.Handler` opens blocks in its groups as `Handler` does, and `pools.set_name` is its name. It has all
    methods of `Connection` but those for the whole process: `init` (the object is made and closed instead),
    `install_signal_handlers`, `reset` and the two of 1.x. As a `with` block it is closed at the end.
    Keep the object for as long as its pools are needed: if it is dropped, they are closed with a
    `ResourceWarning`.

    :param config: as for `Connection.init`.
    :param wait: as for `Connection.init`.
    :param name: stands before the names of its groups in logs, errors, metrics and the status:
        ``reports/read``. Left out, it is ``pools``, with a number if there are several.
    :raises ConfigError: also if an open set has that name. It also raises the errors of `Connection.init`.
    """

    Handler: ClassVar[type[Handler]]
    """A `Handler` of this set."""

    set_name = "Pools"
    _pools: ProcessPools | None = None
    _lock = threading.RLock()
    _closed, _closed_by = False, ""
    _unopened = "make a set of pools, pools = Pools(config),"
    _until = "in this set of pools: make another Pools(config)"
    _anew = "close this set and make another Pools(config)"

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Make the class that holds the state of the set, and its one instance."""
        state = {"_pools": None, "_lock": threading.RLock(), "_closed": False, "_closed_by": ""}
        made: Any = type(cls)
        own = made(cls.__name__, (cls,), {"__module__": cls.__module__, "__doc__": cls.__doc__, **state})
        own.__qualname__ = cls.__qualname__
        own.Handler = type("Handler", (Handler,), {"__slots__": (), "__doc__": Handler.__doc__, "_home": own})
        found: Self = object.__new__(own)
        return found

    def __init__(
        self, config: Source = None, *, wait: bool | Literal["all"] = True, name: str | None = None
    ) -> None:
        own = type(self)
        if open_sets.get(own.set_name) is own:
            raise ConfigError(f"the set of pools {own.set_name!r} is open already: `reload` changes it")
        finalize(self, _dropped, own).atexit = False  # first: an interruption may follow the opening
        _register(own, name)
        try:
            own._open(config, wait)
        except BaseException:
            own.terminate()  # its name is free again
            raise

    def __enter__(self) -> Self:
        self._current()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        groups = "closed" if self._pools is None else ", ".join(self._pools.groups)
        return f"<{type(self).__name__} {self.set_name!r}: {groups}>"

    def __reduce__(self) -> NoReturn:
        """Refuse a copy: the pools belong to one object and one process."""
        raise TypeError(f"{self!r} cannot be copied or pickled: make another one of the same configuration")

    if not TYPE_CHECKING:  # the attributes of the class are known

        def __getattr__(self, name: str) -> NoReturn:
            what = (
                "is of the whole process: see Connection" if hasattr(Connection, name) else "does not exist"
            )
            raise AttributeError(f"{type(self).__name__}.{name} {what}", name=name, obj=self)

    @classmethod
    def _refuse(cls, by: str) -> ProcessPools | None:
        if open_sets.get(cls.set_name) is not cls:
            return None  # closed before, or not an object's class
        pools = super()._refuse(by)
        open_sets.pop(cls.set_name, None)
        return pools


def _register(own: type[Pools], name: str | None) -> None:
    """Give a set its name, which no other open set has.

    :raises ConfigError: one has it, or it cannot be a name.
    """
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise ConfigError(
            f"name={name!r} cannot be the name of a set of pools: use letters, digits, `_`, `.` and `-`"
        )
    own._closed = False
    for number in count(1):
        own.set_name = name or ("pools" if number == 1 else f"pools-{number}")
        if open_sets.setdefault(own.set_name, own) is own:  # in one step, for other threads
            return
        if name is not None:
            raise ConfigError(f"another set of pools is open by the name {name!r}: give this one its own")


def _dropped(own: type[Pools]) -> None:
    """Close a set whose object was collected while it was open."""
    if own._pools is None:
        return
    by = f"the end of its {own.__name__} object, which was dropped without close()"
    if (pools := own._refuse(by)) is None:
        return
    if pools.config.type == "threaded":
        # This may be the garbage collector's call, in a thread that holds any lock, or under gevent its hub:
        # so it must not wait.
        _thread.start_new_thread(pools.close, (1.0,))
    else:
        pools.close(1.0)
    warnings.warn(
        f"{own.__name__} {own.set_name!r} was dropped without close(): its connections are closed",
        ResourceWarning,
        stacklevel=2,
    )

"""The process's one piece of global state: `Connection.init`, `close`, `status`, and the fork guard."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from time import monotonic
from typing import IO, TYPE_CHECKING, Any, Literal

import psycopg

from .._lending.group import Group, users_of
from .._lending.hold_limits import Holds
from .._process.background import Monitor
from .._process.left_session_watch import Vigil
from .._process.observer import LOOK_TIMEOUT, Observer
from .._process.reload import Changes
from .._request.deadline import deadline
from .._servers.endpoint import Endpoint, Role, State
from .._session import block as blocks
from .._session import rows
from .._util import greenlets
from .._util import log_events as events
from .._util.durations import Tally
from ..errors import ConfigError, NotInitializedError, UnconfiguredGroupError, UnknownEndpointError, one_line
from .one_statement import OneShots

if TYPE_CHECKING:
    from .._config.model import Config, EndpointConfig, GroupConfig
    from .._process.signals import SignalHandlers
    from .._status.publisher import Publisher
    from ..rls import Audit
    from ..stats import EndpointStatus, Status

CUT_WITHIN = 0.5
"""Seconds that cancelling, and waiting for commits, may take if connections are closed under their blocks."""

ASK_WITHIN = 0.1
"""Seconds that a status may wait in lock-free mode for a server that has closed idle connections."""

REFUSE_WITHIN = 1.0
"""Seconds that a change of the configuration has to be over, before new blocks are refused in its middle."""

_ROW_FACTORIES: dict[Any, Any] = {
    "row": rows.row,
    "tuple": psycopg.rows.tuple_row,
    "dict": psycopg.rows.dict_row,
    "namedtuple": psycopg.rows.namedtuple_row,
}


class _Pools:
    """Everything that belongs to one configuration in one process."""

    def __init__(self, config: Config) -> None:
        self.config = self.wanted = config
        self.changing = False
        """Whether the configuration is being changed to the one that is `wanted`."""
        self.publisher: Publisher | None = None
        if config.runtime_dir is not None:
            from .._status.publisher import Publisher  # nothing but this needs it

            self.publisher = Publisher(config.runtime_dir, self, threaded=config.type == "threaded")
        self.endpoints = {e.label: self._endpoint(e) for e in config.endpoints}
        self.groups = {
            name: self._group(group, [self.endpoints[label] for label in group.endpoints])
            for name, group in config.groups.items()
        }
        self._newest: dict[str, tuple[int, Endpoint]] = {}
        """The highest timeline that was seen of each system, and where."""
        self.removed: list[Group] = []
        """Groups that are not in the configuration any more, and may have open blocks."""
        self.monitor = Monitor(
            Observer(self.groups.values()),
            Holds(self.groups.values(), threaded=config.type == "threaded"),
            Vigil(self.groups.values()),
            threaded=config.type == "threaded",
            publisher=self.publisher,
        )
        for endpoint in self.endpoints.values():
            endpoint.groups = [g for g in self.groups.values() if endpoint in g.endpoints]

    @property
    def all_groups(self) -> list[Group]:
        """The groups that blocks may have a connection of."""
        return [*self.groups.values(), *self.removed]

    def _endpoint(self, config: EndpointConfig) -> Endpoint:
        endpoint = Endpoint(config)
        endpoint.on_down = self._went_down
        endpoint.on_up = self._came_up
        endpoint.on_seen = self._seen
        endpoint.on_role = self._changed_role
        endpoint.on_silent = self._fell_silent
        return endpoint

    def _group(self, config: GroupConfig, endpoints: list[Endpoint]) -> Group:
        lock_free = self.config.type == "non-threaded"
        group = Group(
            config,
            endpoints,
            lock_free=lock_free,
            row_factory=_row_factory(config),
            probe=self._step if lock_free else None,
            revive=self._revive if lock_free else None,
        )
        group.on_first_use = self._first_use
        group.await_writer = self._await_writer
        group.on_left = self._wake
        if lock_free and self.publisher is not None:
            group.checkin = self.publisher.after(group)  # type: ignore[method-assign,assignment]
        return group

    def _await_writer(self, group: Group, deadline: float) -> bool:
        patronis = self.monitor.patronis
        if patronis is None:
            return False
        step = self.monitor.step if self.config.type == "non-threaded" else self.monitor.wake
        return patronis.await_writer(group, deadline, step)

    def _first_use(self) -> None:
        """A group is about to be used in this process."""
        self._watch_holds()
        self._begin_publishing()

    def _watch_holds(self) -> None:
        """See to it that the groups' blocks are watched, where there is a limit."""
        if self.monitor.holds.needed:
            self.monitor.wake()

    def apply(self, config: Config) -> list[Group]:
        """Take over a changed configuration; return the groups that are to be closed.

        What is new is complete before the first connection can be made to it.
        """
        old, endpoints = self.endpoints, {}
        for entry in config.endpoints:
            known = old.get(entry.label)
            if known is not None and known.fits(entry):
                known.apply(entry)
            else:
                known = self._endpoint(entry)
            endpoints[entry.label] = known
        members = {name: [endpoints[label] for label in g.endpoints] for name, g in config.groups.items()}
        groups = {
            name: self.groups.get(name) or self._group(group, members[name])
            for name, group in config.groups.items()
        }
        for endpoint in endpoints.values():
            endpoint.groups = [group for name, group in groups.items() if endpoint in members[name]]
        gone = [group for name, group in self.groups.items() if name not in groups]
        # Before the dict without them: whoever looks for open blocks finds them in one of the two.
        self.removed = [*filter(Group.busy, self.removed), *gone]
        self.config, self.endpoints, self.groups = config, endpoints, groups
        for endpoint in old.values():
            if endpoints.get(endpoint.label) is not endpoint:
                endpoint.remove()
                self._forget(endpoint)
        for name, group in groups.items():
            group.apply(config.groups[name], members[name], _row_factory(config.groups[name]))
        self.monitor.observe(Observer(groups.values()))
        self.monitor.holds.watch(self.all_groups)
        self.monitor.vigil.watch(self.all_groups)
        self._watch_holds()
        return gone

    def _step(self) -> None:
        self.monitor.step()

    def _revive(self, endpoints: Collection[Endpoint], deadline: float) -> bool:
        return self.monitor.prober.hasten(endpoints, deadline)

    def _wake(self) -> None:
        self.monitor.wake()

    def _begin_publishing(self) -> None:
        if self.publisher is not None and not self.publisher.needed:
            self.publisher.begin()
            self.monitor.wake()

    def status(self) -> Status:
        """Return a snapshot."""
        from ..stats import Status  # no block needs it

        self._look_at_idle()
        return Status(
            pid=os.getpid(),
            type=self.config.type,
            groups={name: group.status() for name, group in self.groups.items()},
            endpoints={label: _endpoint_status(e) for label, e in self.endpoints.items()},
        )

    @property
    def parent(self) -> int | None:
        """The process that this one was forked from, with the package loaded."""
        return Connection._parent

    def _look_at_idle(self) -> None:
        """Have the servers asked that have closed idle connections: without requests nobody else would."""
        doubtful: set[Endpoint] = set().union(*(group.lost_servers() for group in self.groups.values()))
        for endpoint in doubtful:
            self.monitor.doubts.note(endpoint)
        if self.config.type == "non-threaded":  # no thread goes on with it
            self.monitor.doubts.finish(ASK_WITHIN)
        elif doubtful:
            self.monitor.wake()

    def _went_down(self, endpoint: Endpoint) -> None:
        if self.publisher is not None:
            self.publisher.hurry()
        for group in users_of(endpoint):
            group.drop_idle(endpoint, f"endpoint {endpoint.state.value}")
        if endpoint.state is State.DRAINING:
            self._forget(endpoint)
        else:
            for group in users_of(endpoint):
                group.let_all_go(endpoint)
            self.monitor.prober.watch(endpoint)
            self.monitor.wake()

    def _forget(self, gone: Endpoint) -> None:
        """Let a server that was taken out of use on purpose bar no other one any more."""
        for system, (_, endpoint) in list(self._newest.items()):
            if endpoint is gone:
                del self._newest[system]

    def _fell_silent(self, endpoint: Endpoint) -> None:
        for group in users_of(endpoint):
            group.drop_idle(endpoint, "ping")
        self.monitor.prober.watch(endpoint)
        self.monitor.wake()

    def _changed_role(self, endpoint: Endpoint) -> None:
        for group in users_of(endpoint):
            group.part_with(endpoint)

    def _came_up(self, endpoint: Endpoint) -> None:
        if self.publisher is not None:
            self.publisher.hurry()
        for group in users_of(endpoint):
            group.welcome()
        self.monitor.wake()

    def _seen(self, endpoint: Endpoint) -> None:
        """Hold the timelines of the servers that write against each other."""
        if self.monitor.observer.needed:
            self.monitor.wake()
        system, timeline = endpoint.system, endpoint.timeline
        if system is not None and timeline is not None and timeline > self._newest.get(system, (0, None))[0]:
            self._newest[system] = timeline, endpoint
        newest = 0 if system is None else self._newest.get(system, (0, None))[0]
        for other in [e for e in self.endpoints.values() if e.timeline is not None and e.system == system]:
            outdated = other.timeline is not None and other.timeline < newest
            if outdated and not other.outdated:
                events.ENDPOINT_OUTDATED(
                    "endpoint %s is on timeline %s and another was promoted to %s: no writes go there",
                    other.label, other.timeline, newest,
                    endpoint=other.label, timeline=other.timeline, newest=newest,
                )  # fmt: skip
            other.outdated = outdated
        for group in self.groups.values():
            group.note_timelines()
        for group in users_of(endpoint):
            group.note_writer(endpoint)

    def open(self, *, needed: bool) -> None:
        for group in self.groups.values():
            group.open(needed=needed)
        for endpoint in self.endpoints.values():
            # Not needed for `min_size`, so nobody has asked yet whether it is there.
            if users_of(endpoint) and endpoint.opened == 0 and endpoint.last_error is None:
                probe = endpoint.probe()
                probe.run(endpoint.config.connect_timeout)
                if not probe.accepting:
                    endpoint.mark_down(probe.reason)
        self._await_lag()
        self._begin_publishing()
        if self.config.processes is not None:
            self._warn_of_sizes(self.config.processes)

    def _warn_of_sizes(self, processes: int) -> None:
        """Warn of servers that do not admit what all processes together can open."""
        from ..sizing import ask, demand  # nothing else of a block or of init needs it

        roles = {e.label: e.role.value for e in self.endpoints.values() if e.role}
        for label, need in demand(self.config, processes, roles).items():
            endpoint = self.endpoints[label]
            if label != need.labels[0]:
                continue  # the same server
            lent = ((group, group.borrow(endpoint)) for group in users_of(endpoint))
            group, conn = next(((group, conn) for group, conn in lent if conn), (None, None))
            if group is None or conn is None:
                continue
            try:
                verdict = need.verdict(ask(conn), processes)
            except psycopg.Error as error:
                reason = one_line(error)
                events.ENDPOINT_SILENT(
                    "endpoint %s does not tell its limits: %s", label, reason, endpoint=label, reason=reason
                )
                verdict = ""
            finally:
                group.give_back(conn)
            if verdict:
                events.ENDPOINT_TOO_SMALL(
                    "endpoint %s: %s; `pgdbpool size` recommends sizes", label, verdict,
                    endpoint=label, reason=verdict,
                )  # fmt: skip

    def _await_lag(self) -> None:
        """Wait until the lag of the standbys is known that a group limits."""
        limited = [e for g in self.groups.values() if g.config.max_lag for e in g.endpoints]
        deadline = monotonic() + LOOK_TIMEOUT
        while monotonic() < deadline and any(
            e.state is State.UP and e.role is not Role.PRIMARY and e.lag is None for e in limited
        ):
            if self.config.type == "non-threaded":
                self.monitor.step()
            time.sleep(0.005)

    def close(self, timeout: float) -> None:
        """Close the idle connections, and those in use as their blocks end."""
        self.monitor.close()
        deadline = monotonic() + timeout
        for group in self.groups.values():
            group.close(max(deadline - monotonic(), 0.05))

    def drain(self, timeout: float, but: int = 0, hurry: Callable[[], bool] = lambda: False) -> None:
        """Wait until no block is open but those of that thread."""
        deadline = monotonic() + timeout
        while any(group.busy(but) for group in self.all_groups):
            if monotonic() >= deadline or hurry():
                return
            time.sleep(0.01)  # for checkin to tell would be work in every block

    def blame(self, by: str, but: int) -> None:
        """Note who closes the pools, for what their blocks raise from here on, but those of that thread."""
        for group in self.all_groups:
            group.closed_by = by
            for conn, block in group.held():
                if block.thread != but:
                    conn.cut_by = by

    def terminate(self, by: str, but: int = 0) -> None:
        """Close all connections now, also those in use but by that thread.

        What may be committing has until the end of the time; what runs else is cancelled before.
        """
        self.blame(by, but)
        self.close(CUT_WITHIN)  # first, so that no block goes on with another connection
        deadline = monotonic() + CUT_WITHIN
        lent = [conn for group in self.all_groups for conn in group.lent(but)]
        committing = [conn for conn in lent if conn.begin_sever()]
        for conn in lent:
            if conn not in committing:
                conn.sever(deadline)
        for conn in committing:
            conn.sever(deadline)


def _row_factory(config: GroupConfig) -> Any:
    return _ROW_FACTORIES.get(config.row_factory, config.row_factory)


class Connection(OneShots, Changes):
    """The pools of the process; all methods are class methods."""

    _pools: _Pools | None = None
    _abandoned: list[_Pools] = []
    """A parent's, kept so that nothing of them is collected, and so touched, in a child."""
    _lock = threading.RLock()
    """Re-entrant, since a signal handler may close what it interrupts the opening of."""
    _all: weakref.WeakSet[_Pools] = weakref.WeakSet()
    _closed = False
    _closed_by = ""
    _handlers: SignalHandlers | None = None
    _pid = os.getpid()
    _parent: int | None = None
    """The process that this one was forked from, with the package loaded."""
    _noticing = threading.Lock()

    deadline = staticmethod(deadline)

    @classmethod
    def init(
        cls,
        config: Mapping[str, Any] | str | os.PathLike[str] | IO[str] | None = None,
        *,
        wait: bool | Literal["all"] = True,
    ) -> None:
        """Read the configuration and open the pools, in place of those of an earlier call.

        :param config: a mapping, the path of a YAML file or an open one, or None for the environment.
        :param wait: True opens `min_size` connections of each group, one at least, before returning. A group
            whose servers are all away is a warning in the log: its blocks raise `DBOfflineError` until one is
            there. ``"all"`` raises that error here. False opens nothing until the first block needs it.
        :raises ConfigError: everything that is wrong with the configuration, before anything is opened.
        :raises DBConnectionError: a server is up and refuses a group for what is configured (a wrong
            password, an unknown database, a certificate that is not trusted), and the group has no other. The
            error has each endpoint's own reason. One endpoint of several is a warning.
        :raises ThreadingModelError: gevent has patched the process too late, or in part.
        :raises ValueError: `wait` is another value.
        """
        if wait not in (True, False, "all"):
            raise ValueError(f"wait={wait!r} is none of True, False and 'all'")
        from .._config.load import load  # a quarter of what there is to import, and this alone needs it

        greenlets.check()
        cls._notice_fork()
        pools = _Pools(load(config))
        _warn_of_driver()
        cls._all.add(pools)
        if wait:
            try:
                pools.open(needed=wait == "all")
            except BaseException:
                pools.close(1.0)
                raise
        with cls._lock:
            previous, cls._pools = cls._pools, pools
            cls._closed = False
        if previous is not None:
            previous.close(5.0)

    @classmethod
    def close(cls, timeout: float = 5.0) -> None:
        """Refuse new blocks, wait for those that are open, and close all pools.

        A block that is still open after the timeout finds its connection lost, as after `terminate`. The
        calling thread's own blocks are not waited for: their connections are closed as they end.

        :param timeout: seconds to wait for blocks.
        """
        cls._close(timeout, "Connection.close()")

    @classmethod
    def _close(cls, timeout: float, by: str) -> None:
        pools = cls._refuse(by)
        if pools is not None:
            me = threading.get_ident()
            pools.drain(timeout, me)
            pools.terminate(by, me)

    @classmethod
    def terminate(cls) -> None:
        """Close all pools now, within about a second: what runs is cancelled, and its blocks fail."""
        cls._terminate("Connection.terminate()")

    @classmethod
    def _terminate(cls, by: str) -> None:
        cls._refuse(by)
        for pools in list(cls._all):  # also those that a `close` waits for, or an `init` has replaced
            pools.terminate(by)

    @classmethod
    def is_closing(cls) -> bool:
        """Tell whether new blocks are refused since `close`, `terminate` or a signal ended the pools."""
        return cls._closed

    @classmethod
    def install_signal_handlers(cls, *signals: int, timeout: float = 5.0) -> None:
        """Make signals, SIGTERM and SIGINT if none are named, end the pools before they do what they did.

        From the first signal on new blocks are refused, and those that are open have `timeout` seconds to
        end. Then the pools are closed and the earlier handler is called, or the process ends where there
        was none.
        A second signal ends the wait. For processes of your own: servers have hooks, see
        `pgdbpool.contrib.gunicorn`.

        :param timeout: seconds to wait for blocks.
        :raises ThreadingModelError: this is not the main thread.
        """
        from .._process.signals import SignalHandlers  # nothing but this needs it

        if cls._handlers is not None:
            cls._handlers.uninstall()
        cls._handlers = SignalHandlers(_Leaving(), timeout)
        cls._handlers.install(signals or (signal.SIGTERM, signal.SIGINT))

    @classmethod
    def _refuse(cls, by: str) -> _Pools | None:
        cls._notice_fork()
        # With a bound: in a signal handler, whoever has the lock may wait for what was interrupted here.
        alone = cls._lock.acquire(blocking=False) or (
            not greenlets.in_hub() and cls._lock.acquire(timeout=REFUSE_WITHIN)
        )
        try:
            pools, cls._pools, cls._closed, cls._closed_by = cls._pools, None, True, by
        finally:
            if alone:
                cls._lock.release()
        return pools

    @classmethod
    def reset(cls) -> None:
        """Forget everything, as before the first `init`: for tests."""
        cls.close(timeout=1.0)
        cls._abandoned.clear()
        cls._closed = False
        if cls._handlers is not None:
            cls._handlers.uninstall()
            cls._handlers = None

    @classmethod
    def group(cls, name: str) -> Group:
        """Return the group of that name.

        :raises UnconfiguredGroupError: there is none; names those that there are.
        :raises NotInitializedError: `init` was not called.
        """
        pools = cls._pools
        if pools is None:
            raise cls._refusal()
        try:
            return pools.groups[name]
        except (KeyError, TypeError):
            known = ", ".join(repr(group) for group in pools.groups)
            raise UnconfiguredGroupError(f"no group {name!r} is configured; the groups are {known}") from None

    @classmethod
    def status(cls) -> Status:
        """Return a frozen snapshot of all groups and endpoints.

        :raises NotInitializedError: `init` was not called.
        """
        return cls._current().status()

    @classmethod
    def runtime_dir(cls) -> str | None:
        """Return the directory in which the processes publish their status; None where they do not.

        :raises NotInitializedError: `init` was not called.
        """
        return cls._current().config.runtime_dir

    @classmethod
    def health(cls, timeout: float = 2.0) -> dict[str, Any]:
        """Ask every server now whether it answers, and tell whether each group can be served, as for JSON.

        `status` is `healthy`; or `degraded`, where something is down but every group is served; or
        `unhealthy`, where a group is not. :doc:`guide/health` has all fields. Servers are asked at the same
        time, over an idle connection of the pool, or a new one where there is none.

        :param timeout: seconds for all of it; a server that has not answered by then counts as down.
        :raises NotInitializedError: `init` was not called, or the pools are closed.
        """
        from .._process.health import examine  # nothing but this needs it

        pools = cls._current()
        return examine(pools.groups, pools.endpoints, timeout)

    @classmethod
    def audit_rls(
        cls, group: str, tables: Sequence[str] | None = None, *, ignore: Iterable[str] = ()
    ) -> Audit:
        """Look for ways in which the group's role gets at rows of another tenant; see `pgdbpool.rls`.

        It uses a connection of its own, since a session that has had a tenant shows less.

        :param tables: names of tables, or None for all that the role has privileges on.
        :param ignore: findings to leave out, by `code` or `code:subject`, with `*`.
        :raises ConfigError: the group has no tenant setting, or a table does not exist.
        :raises DBConnectionError: no endpoint is up.
        :raises psycopg.Error: the server could not be asked.
        """
        from ..rls import audit  # nothing but this needs it

        found = cls.group(group)
        if found.config.tenant is None:
            raise ConfigError(f"group {group!r} has no tenant setting: configure `tenant` to audit it")
        role = {name.lower(): value for name, value in found.config.settings.items()}.get("role")
        with found.connect_apart() as conn:
            return audit(conn, list(found.config.tenant.settings), tables, role, ignore=ignore)

    @classmethod
    def drain(cls, label: str) -> None:
        """Take a server out of use in this process: no block gets a connection to it from now on.

        Its idle connections are closed at once, those in use when their blocks end.

        :param label: the endpoint's label, as `status()` has it.
        :raises UnknownEndpointError: there is none of that label; names those that there are.
        """
        cls._endpoint(label).drain()

    @classmethod
    def undrain(cls, label: str) -> None:
        """Put a drained server back into use; the groups even out as connections come back.

        :raises UnknownEndpointError: there is none of that label; names those that there are.
        """
        cls._endpoint(label).undrain()

    @classmethod
    def _endpoint(cls, label: str) -> Endpoint:
        endpoints = cls._current().endpoints
        try:
            return endpoints[label]
        except (KeyError, TypeError):
            from .._config.declarations import show

            known = ", ".join(map(repr, endpoints))
            raise UnknownEndpointError(
                f"no endpoint {show(label)} is configured; the endpoints are {known}"
            ) from None

    @classmethod
    def get_threading_model(cls) -> str:
        """Return `threaded` or `non-threaded` (1.x)."""
        return cls._current().config.type

    @classmethod
    def get_max_pool_size(cls, group: str) -> int:
        """Return the group's `connection_count` (1.x)."""
        return cls.group(group).config.connection_count

    @classmethod
    def _current(cls) -> _Pools:
        cls._notice_fork()
        if cls._pools is None:
            raise NotInitializedError("call pgdbpool.Connection.init(config) first")
        return cls._pools

    @classmethod
    def _refusal(cls) -> NotInitializedError:
        """Return the error for a block that may not begin."""
        if cls._handlers is not None:
            cls._handlers.wait()
        if cls._closed:
            return NotInitializedError(
                f"the pools were closed by {cls._closed_by}: no block can begin before the next init"
            )
        return NotInitializedError("call pgdbpool.Connection.init(config) before the first Handler")

    @classmethod
    def _after_fork_in_child(cls) -> None:
        # The parent's connections, locks and threads are not ours: nothing of them may be closed,
        # written to or waited for. The same configuration starts anew, opened on first use.
        cls._lock = threading.RLock()
        blocks.forked()
        if cls._handlers is not None:
            cls._handlers.forked()
        for old in list(cls._all):  # also those replaced or closed, which blocks may still use
            cls._abandoned.append(old)
            for group in old.all_groups:
                group.abandon()
            if old.publisher is not None:
                old.publisher.abandon()
        cls._all = weakref.WeakSet()
        if cls._pools is not None:
            known = {label: endpoint.name for label, endpoint in cls._pools.endpoints.items()}
            cls._pools = _Pools(cls._pools.config)
            for label, endpoint in cls._pools.endpoints.items():
                name = known.get(label)
                endpoint.name = name.again() if name else None
            cls._all.add(cls._pools)  # for a child of this child
        cls._parent, cls._pid = cls._pid, os.getpid()

    @classmethod
    def _notice_fork(cls) -> None:
        """Do after a fork what Python was to do: uWSGI forks without it, but for `py-call-osafterfork`."""
        if cls._pid != os.getpid():
            with cls._noticing:  # in the child only, so never held by a thread of the parent
                if cls._pid != os.getpid():
                    cls._after_fork_in_child()

    @classmethod
    def _at_exit(cls) -> None:
        # The end of the process closes every connection. To close them here would only disturb
        # daemon threads that are still at work.
        if cls._pools is not None:
            for group in cls._pools.all_groups:
                group.ending = True
            if cls._pools.publisher is not None:
                cls._pools.publisher.close()


class _Leaving:
    """The pools that a signal ends."""

    def __init__(self) -> None:
        self._pools: _Pools | None = None
        self._by = "a signal"

    def refuse(self, number: int) -> None:
        self._by = f"the signal {signal.Signals(number).name}"
        self._pools = Connection._refuse(self._by)

    def finish(self, timeout: float, hurry: Callable[[], bool], main: int) -> None:
        if self._pools is not None:
            self._pools.drain(timeout, hurry=hurry)
            self._pools.terminate(self._by, main)

    def holds(self, thread: int) -> bool:
        return self._pools is not None and any(g.held_by(thread) for g in self._pools.all_groups)

    def end(self) -> None:
        Connection._terminate(self._by)


def _endpoint_status(endpoint: Endpoint) -> EndpointStatus:
    from ..stats import EndpointStatus, Histogram

    at = endpoint.last_error_at
    return EndpointStatus(
        label=endpoint.label,
        state=endpoint.state.value,
        role=endpoint.role.value if endpoint.role else None,
        weight=endpoint.weight,
        timeline=endpoint.timeline,
        outdated=endpoint.outdated,
        lag_bytes=endpoint.lag.bytes if endpoint.lag else None,
        lag_seconds=endpoint.lag.seconds if endpoint.lag else None,
        connections=endpoint.connections,
        last_error=endpoint.last_error,
        seconds_since_error=None if at is None else monotonic() - at,
        round_trip=endpoint.round_trip,
        failovers=endpoint.failovers,
        use=Histogram.of(group.uses.get(endpoint, Tally()) for group in users_of(endpoint)),
        connect=Histogram.of(group.connects.get(endpoint, Tally()) for group in users_of(endpoint)),
    )


def _warn_of_driver() -> None:
    from .._servers.driver import SLOW, driver  # no block needs it

    if (loaded := driver()).fell_back:
        events.PROCESS_SLOW_DRIVER("%s: %s", loaded, SLOW, reason=SLOW)


def _group_of_this_process(cls: type[Connection], name: str) -> Group:
    cls._notice_fork()
    found: Group = _group(cls, name)
    return found


os.register_at_fork(after_in_child=Connection._after_fork_in_child)
if "uwsgi" in sys.modules:  # elsewhere no block pays for it
    _group = Connection.group.__func__  # type: ignore[attr-defined]
    Connection.group = classmethod(_group_of_this_process)  # type: ignore[method-assign,assignment]
atexit.register(Connection._at_exit)

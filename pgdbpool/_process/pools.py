"""The pools of a process: groups, endpoints and the background of one configuration."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from threading import get_ident
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import ref

import psycopg

from .._lending.configured import Beat
from .._lending.group import Group, users_of
from .._lending.hold_limits import HoldWatcher
from .._servers.endpoint import Endpoint, Role, State
from .._session import rows
from .._util import bounds
from .._util import log_events as events
from .._util.durations import Tally
from . import fork
from .background import Monitor
from .left_session_watch import LeftSessionWatch
from .observer import STATUS_TIMEOUT, Observer

if TYPE_CHECKING:
    from .._config.model import Config, EndpointConfig, GroupConfig
    from .._status.publisher import Publisher
    from ..stats import EndpointStatus, Status

ASK_WITHIN = 0.1
"""Seconds that a status may wait in lock-free mode for a server that has closed idle connections."""

_ROW_FACTORIES: dict[Any, Any] = {
    "row": rows.row,
    "tuple": psycopg.rows.tuple_row,
    "dict": psycopg.rows.dict_row,
    "namedtuple": psycopg.rows.namedtuple_row,
}


_existing: set[ref[Pools]] = set()


def every_pools() -> list[Pools]:
    """Return all pools that exist in the process: replaced and closed ones may still have open blocks."""
    return [pools for found in list(_existing) if (pools := found()) is not None]


def pools_in_use() -> list[Pools]:
    """Return the present pools of each set."""
    return [pools for pools in every_pools() if pools.owner._pools is pools]


def forget_parents() -> list[Pools]:
    """In a forked child, abandon all pools of the parent, and return them: none may be collected."""
    found = every_pools()
    _existing.clear()
    for pools in found:
        pools.abandon()
    return found


class Pools:
    """Everything that belongs to one configuration in one process, for the class of one set of pools."""

    def __init__(self, config: Config, owner: Any) -> None:
        self.config = self.wanted = config
        self.owner = owner
        self.set_name: str = owner.set_name
        self._beat = Beat()
        self.paused = False
        """Whether a group may be paused."""
        self._shown: tuple[Config, dict[str, Any]] | None = None
        self.changing = False
        """Whether the configuration is being changed to `wanted`."""
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
        """The highest timeline seen of each system, and its endpoint."""
        self.removed: list[Group] = []
        """Groups that have left the configuration and may have open blocks."""
        self.monitor = Monitor(
            Observer(self.groups.values()),
            HoldWatcher(self.groups.values(), threaded=config.type == "threaded"),
            LeftSessionWatch(self.groups.values()),
            threaded=config.type == "threaded",
            publisher=self.publisher,
            beat=self._beat,
        )
        for endpoint in self.endpoints.values():
            endpoint.groups = [g for g in self.groups.values() if endpoint in g.endpoints]
        _existing.add(ref(self, _existing.discard))  # complete: another thread may end all pools

    @property
    def all_groups(self) -> list[Group]:
        """The groups whose connections blocks may have."""
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
        kind: Callable[..., Group] = Group
        if lock_free and self.publisher is not None:
            kind = self.publisher.publishing_group
        group = kind(
            config,
            endpoints,
            lock_free=lock_free,
            row_factory=_row_factory(config),
            probe=self._step if lock_free else None,
            revive=self._revive if lock_free else None,
            name=self.full_name(config.name),
        )
        group.beat = self._beat
        group.on_first_use = self._first_use
        group.await_writer = self._await_writer
        group.look_sooner = self._look_sooner
        group.on_left = self._wake
        group.on_closed = self.owner._let_end
        group.nested = self._nested
        return group

    def full_name(self, group: str) -> str:
        """Return the group's name with that of its set, unique in the process."""
        return f"{self.set_name}/{group}" if self.set_name else group

    def retire(self) -> None:
        """Have a Handler that is entered later look its group up again."""
        for group in self.groups.values():
            group.retired = True

    def pause(self, groups: Iterable[Group], by: str, seconds: float) -> None:
        """Hold new blocks of groups back for some seconds, or until `resume`."""
        self.paused = True
        until = monotonic() + seconds
        for group in groups:
            group.pause(by, until)

    def resume(self, groups: Iterable[Group]) -> int:
        """Let the blocks of groups go on; return how many were held."""
        held = 0
        for group in groups:
            held += len(group.held_back)
            group.resume()
        self.paused = any(group.paused_by for group in self.groups.values())
        return held

    def _nested(self) -> bool:
        me = get_ident()
        return any(group.held_by(me) for pools in pools_in_use() for group in pools.all_groups)

    def _look_sooner(self, endpoints: Collection[Endpoint]) -> None:
        self.monitor.look_sooner(endpoints)

    def _await_writer(self, group: Group, deadline: float) -> bool:
        patronis = self.monitor.patronis
        if patronis is None:
            return False
        step = self.monitor.step if self.config.type == "non-threaded" else self.monitor.wake
        return patronis.await_writer(group, deadline, step)

    def _first_use(self) -> None:
        """Prepare for the first use of a group in this process."""
        self._watch_holds()
        self._begin_publishing()

    def _watch_holds(self) -> None:
        """Start watching the groups' blocks if there is a limit."""
        if self.monitor.holds.needed:
            self.monitor.wake()

    def apply(self, config: Config) -> list[Group]:
        """Take over a changed configuration; return the groups that are to be closed.

        New parts are complete before the first connection can be made to it.
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
        # Before `groups` without them: a search for open blocks finds each in one of the two.
        self.removed = [*filter(Group.busy, self.removed), *gone]
        self.config, self.endpoints, self.groups = config, endpoints, groups
        for group in gone:
            group.retired = True
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

    def _step(self) -> bool:
        self.monitor.step()
        return self.paused

    def _revive(self, endpoints: Collection[Endpoint], deadline: float) -> bool:
        return self.monitor.prober.hasten(endpoints, deadline)

    def _wake(self) -> None:
        self.monitor.wake()

    def _begin_publishing(self) -> None:
        if self.publisher is not None and not self.publisher.needed:
            self.publisher.begin()
            self.monitor.wake()

    def obey(self, order: Mapping[str, Any]) -> str:
        """Execute an order that was given to all processes; return its effect in words.

        :raises Exception: it cannot be executed; the error says why.
        """
        from .orders import obey  # nothing but this needs it, nor the import below

        return obey(self, order)

    def concerns(self, order: Mapping[str, Any]) -> bool:
        """Return whether an order is for this set: the default set refuses names that no set has."""
        here = (p for p in pools_in_use() if p.config.runtime_dir == self.config.runtime_dir)
        return self._fits(order) or (not self.set_name and not any(pools._fits(order) for pools in here))

    def _fits(self, order: Mapping[str, Any]) -> bool:
        from .._status.answers import fits

        return fits(order, [group.name for group in self.groups.values()], self.endpoints)

    def running_config(self) -> dict[str, Any]:
        """Return the configuration in use, without secrets, with the addresses of names as they are known."""
        from .running_config import running_config  # nothing but this needs it

        if self._shown is None or self._shown[0] is not self.config:
            self._shown = self.config, running_config(self.config)
        names = ((label, endpoint.name) for label, endpoint in self.endpoints.items())
        return {**self._shown[1], "addresses": {label: list(name.known) for label, name in names if name}}

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
        return fork.parent()

    def _look_at_idle(self) -> None:
        """Query the servers that have closed idle connections: without requests nothing else would."""
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
            group.doubt_roles()  # another server may have been promoted in its place
            group.drop_idle(endpoint, f"endpoint {endpoint.state.value}")
        if endpoint.state is State.DRAINING:
            self._forget(endpoint)
        else:
            for group in users_of(endpoint):
                group.let_all_go(endpoint)
            self.monitor.prober.watch(endpoint)
            self.monitor.wake()

    def _forget(self, gone: Endpoint) -> None:
        """Forget the timeline of a drained or removed server, so that it excludes no other."""
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
            group.doubt_roles(but=endpoint)
            group.part_with(endpoint)

    def _came_up(self, endpoint: Endpoint) -> None:
        if self.publisher is not None:
            self.publisher.hurry()
        for group in users_of(endpoint):
            group.on_endpoint_up()
        self.monitor.wake()

    def _seen(self, endpoint: Endpoint) -> None:
        """Compare the timelines of the writable servers."""
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
            # Not needed for `min_size`, so it is not known yet whether it is up.
            if users_of(endpoint) and endpoint.opened == 0 and endpoint.last_error is None:
                probe = endpoint.probe()
                probe.run(endpoint.config.connect_timeout)
                if not probe.accepting:
                    endpoint.mark_down(probe.reason)
        self._await_lag()
        self._begin_publishing()
        if self.config.processes is not None:
            from .size_warnings import warn_of_sizes  # nothing but this needs it

            warn_of_sizes(self.config, self.endpoints, self.config.processes)

    def _await_lag(self) -> None:
        """Wait until the lag of the standbys is known if a group limits it."""
        limited = [e for g in self.groups.values() if g.config.max_lag for e in g.endpoints]
        deadline = monotonic() + STATUS_TIMEOUT
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
        """Wait until only blocks of that thread are open."""
        deadline = monotonic() + timeout
        while any(group.busy(but) for group in self.all_groups):
            if monotonic() >= deadline or hurry():
                return
            time.sleep(0.01)  # a notice from checkin would be work in every block

    def blame(self, by: str, but: int) -> None:
        """Note what closes the pools, for the errors of their blocks, except those of that thread."""
        for group in self.all_groups:
            group.closed_by = by
            for conn, block in group.held():
                if block.thread != but:
                    conn.note_end_of_pools(by)

    def abandon(self) -> None:
        """In a forked child, abandon the parent's pools without touching sockets, locks or threads."""
        for group in self.all_groups:
            group.abandon()
        if self.publisher is not None:
            self.publisher.abandon()

    def renewed(self) -> Pools:
        """Return pools of the same configuration for a forked child; host names keep their last addresses."""
        pools = Pools(self.config, self.owner)
        for label, endpoint in pools.endpoints.items():
            name = self.endpoints[label].name if label in self.endpoints else None
            endpoint.name = name.again() if name else None
        return pools

    def end_with_process(self) -> None:
        """Prepare for the exit of the process, which closes every connection.

        Closing them here would only disturb daemon threads that are still running.
        """
        for group in self.all_groups:
            group.ending = True
        if self.publisher is not None:
            self.publisher.close()

    def terminate(self, by: str, but: int = 0) -> None:
        """Close all connections now, except those in use by that thread.

        A possible commit has until the end of the time; other statements are cancelled first.
        """
        self.blame(by, but)
        self.close(bounds.CUT_WITHIN)  # first, so that no block goes on with another connection
        deadline = monotonic() + bounds.CUT_WITHIN
        lent = [conn for group in self.all_groups for conn in group.lent(but)]
        committing = [conn for conn in lent if conn.refuse_from_now_on()]
        for conn in lent:
            if conn not in committing:
                conn.cut_from_other_thread(deadline)
        for conn in committing:
            conn.cut_from_other_thread(deadline)


def _row_factory(config: GroupConfig) -> Any:
    return _ROW_FACTORIES.get(config.row_factory, config.row_factory)


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

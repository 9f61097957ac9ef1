"""Publishes the status of the pools about once a second, and executes orders; see `runtime_dir`.

In threaded mode the background thread steps it. In lock-free mode a checkout reads orders and a checkin
publishes, each at most once a second.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from .._lending.group import Group
from .._session.statement_text import without_values
from .._util import log_events as events
from ..errors import RuntimeDirError
from ..stats import Status
from .runtime_dir import PublishedFile, RuntimeDir, stands

if TYPE_CHECKING:
    from .._servers.endpoint import Endpoint
    from .._session.connection import PooledConnection

EVERY = 1.0
"""Seconds between two snapshots."""

SOON = 0.1
"""Seconds to the next snapshot after an endpoint went down or came up."""

RETRY_AFTER = 10.0
"""Seconds after which a directory that could not be used is tried again."""

STEP, STEPS = 5, 60
"""Seconds of one step of the history, and the number of steps that are kept."""

EVENTS = 50
"""The number of events that are kept."""

ANSWERS = 20
"""The number of answers to orders that are kept."""

COUNTERS = (
    "checkouts", "timeouts", "opened", "discarded", "waits", "retries", "failovers", "rate_limited", "leaks",
    "overdue", "slow_blocks", "slow_statements", "not_replicated", "guards_passed", "guards_failed",
    "fresh_waits", "fresh_from_primary", "fresh_refused", "wait", "use", "connect",
)  # fmt: skip
"""Monotonic counters of a group; they include processes that have exited."""


class Told(Protocol):
    """The pools of a process; a reload may replace their groups and endpoints."""

    @property
    def groups(self) -> Mapping[str, Group]:
        """The current ones, by name."""

    @property
    def endpoints(self) -> Mapping[str, Endpoint]:
        """The current ones, by name."""

    @property
    def parent(self) -> int | None:
        """The process that this one was forked from after it had loaded the package."""

    paused: bool
    """Whether a group may be paused."""
    set_name: str
    """The name of the set of pools; empty for the default one."""

    def status(self) -> Status:
        """Return a snapshot."""

    def running_config(self) -> dict[str, Any]:
        """Return the configuration in use, without secrets."""

    def concerns(self, order: Mapping[str, Any]) -> bool:
        """Return whether an order is for this set of pools."""

    def obey(self, order: Mapping[str, Any]) -> str:
        """Execute an order; return its effect in words."""


class Publisher:
    """Publishes the status of the pools, and executes orders.

    `_lock` keeps the final snapshot at the exit of the process apart from another thread's. In lock-free
    mode it does nothing.
    """

    def __init__(self, path: str, pools: Told, *, threaded: bool) -> None:
        self._path = path
        self._pools = pools
        self._threaded = threaded
        self._lock: AbstractContextManager[Any] = threading.RLock() if threaded else nullcontext()
        self._room: RuntimeDir | None = None
        self._file: PublishedFile | None = None
        self._started = time.time()
        self._due = 0.0
        self._urgent = False
        self._warned = False
        self._mark: object = None
        self._obeyed = 0
        """The number of the last order."""
        self._answers: deque[dict[str, Any]] = deque(maxlen=ANSWERS)
        self._seen: dict[str, tuple[str, str | None, bool]] = {}
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS)
        self._history = History()
        self.needed = False
        """Whether the process publishes."""
        self._closed = False

    def begin(self) -> None:
        """Start publishing; first execute the orders that are in force."""
        if self._room is None and not self._closed:
            with suppress(OSError, RuntimeDirError), RuntimeDir(self._path) as room:
                self._obey_orders(room)
        self.needed = not self._closed  # from here on the thread executes orders
        self._due = 0.0

    def step(self) -> float:
        """Execute new orders and publish if due; return the seconds until the next step."""
        if not self.needed:
            return EVERY
        if self._room is not None:
            self._obey_orders(self._room)
        now = monotonic()
        if now >= self._due and (self._threaded or self._urgent):
            self._publish()
        if self._pools.paused:
            return SOON
        return max(self._due - now, 0.01) if self._threaded else EVERY

    def publishing_group(self, *args: Any, **options: Any) -> Group:
        """Return a group of lock-free mode, whose checkins publish when due."""
        return _PublishingGroup(self, *args, **options)

    def after_checkin(self) -> None:
        """Publish if due."""
        if monotonic() >= self._due:
            self.begin()
            self._publish()

    def hurry(self) -> None:
        """Publish soon, since an endpoint has changed."""
        self._urgent = True
        self._due = min(self._due, monotonic() + SOON)

    def close(self) -> None:
        """Publish for the last time, and leave the file to the process that sweeps it."""
        with self._lock:
            if self._file is not None:
                self._publish()
            self._close_file()
            self.needed, self._closed = False, True

    def abandon(self) -> None:
        """Close the parent's file in a forked child: it is locked while any process has it open."""
        self.needed, self._closed = False, True
        self._close_file()

    # Publishing.

    def _publish(self) -> None:
        self._due = monotonic() + EVERY
        self._urgent = False
        try:
            with self._lock:
                if not self.needed:
                    return
                snapshot = self._snapshot()
                if self._room is None:
                    self._room = RuntimeDir(self._path, create=True)
                    self._room.snapshots()  # sweeps
                    self._obey_orders(self._room)
                if self._file is None:
                    self._file = self._room.publish(os.getpid(), snapshot)
                elif not self._file.write(snapshot):
                    self._close_file()  # the file was removed: the next snapshot begins another
        except (OSError, RuntimeDirError) as error:
            self._close_file()
            self._due = monotonic() + RETRY_AFTER
            if not self._warned:
                self._warned = True
                events.PROCESS_UNPUBLISHED(
                    "the status of this process is not published: %s", error, reason=str(error)
                )

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._room is not None:
            self._room.close()
        self._file = self._room = None

    def _snapshot(self) -> dict[str, Any]:
        now = time.time()
        status = self._pools.status()
        self._note_events(status, now)
        self._history.add(status, now)
        told, counts = split(status.to_dict())
        for group in self._pools.groups.values():
            if (part := told["groups"].get(group.name)) is not None:
                part["holders"] = [without_values(text) for text in group.long_holders()]
                part["listing"] = group.listing()
        return {
            "set": self._pools.set_name,
            "time": now,
            "started": self._started,
            "parent": self._pools.parent,
            "status": told,
            "counts": counts,
            "events": list(self._events),
            "answers": list(self._answers),
            "config": self._pools.running_config(),
            "history": self._history.told(now),
        }

    def _note_events(self, status: Status, now: float) -> None:
        """Record the changes of the endpoints since the last snapshot."""
        for label, endpoint in status.endpoints.items():
            state = "down" if endpoint.state == "probing" else endpoint.state
            seen = self._seen.get(label)
            self._seen[label] = (state, endpoint.role, endpoint.outdated)
            before, role, outdated = seen or ("up", endpoint.role, endpoint.outdated)
            if state != before:
                kind = {"draining": "drain", "down": "down"}.get(state, "up")
                text = {
                    "drain": "is drained: no new blocks go there",
                    "down": f"is down: {endpoint.last_error or 'no answer'}",
                }.get(kind, "is in use again" if before == "draining" else "is up again")
                self._note(now, kind, label, text)
            if endpoint.role is not None and role is not None and endpoint.role != role:
                self._note(now, "failover", label, f"was {role} and is now {endpoint.role}")
            if endpoint.outdated and not outdated:
                self._note(now, "failover", label, "was left behind by a promotion: no writes go there")

    def _note(self, now: float, kind: str, label: str, text: str) -> None:
        self._events.append({"time": now, "kind": kind, "endpoint": label, "text": text})

    # Orders.

    def _obey_orders(self, room: RuntimeDir) -> None:
        """Execute new orders; a process that has just started executes all standing orders."""
        try:
            mark = room.orders_mark()
            if mark == self._mark:
                return
            self._mark = mark
            orders = room.orders()
        except OSError:
            return  # publishing the next snapshot reports it
        for order in orders:
            if order["n"] <= self._obeyed:
                continue
            self._obeyed = order["n"]
            new = order["time"] >= self._started or stands(order, time.time())
            if new and self._pools.concerns(order):
                self._obey(order)

    def _obey(self, order: Mapping[str, Any]) -> None:
        """Execute an order, and note the answer for the process that gave it."""
        try:
            text, done = self._pools.obey(order), True
        except Exception as error:  # noqa: BLE001  the process that gave the order handles it
            text, done = str(error), False
        self._answers.append({"n": order["n"], "done": done, "text": text})
        what = " ".join(filter(None, (order["do"], order["group"], order["endpoint"])))
        self._note(time.time(), "order", what, f"ordered by {order['by']}: {text}")
        events.PROCESS_ORDERED(
            "%s, ordered by %s: %s", what, order["by"], text,
            order=order["do"], by=order["by"], group=order["group"], endpoint=order["endpoint"], reason=text,
        )  # fmt: skip
        self.hurry()
        self._due = 0.0


class _PublishingGroup(Group):
    """A group without a background thread that could publish: its checkins do it in passing."""

    def __init__(self, publisher: Publisher, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._publisher = publisher

    def checkin(self, conn: PooledConnection) -> None:
        super().checkin(conn)
        self._publisher.after_checkin()


def split(told: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the counters off a status; return the rest, and the counters by the full name of the group."""
    for endpoint in told["endpoints"].values():
        del endpoint["use"], endpoint["connect"]  # sums over the groups
    groups: dict[str, dict[str, Any]] = {group["name"]: group for group in told["groups"].values()}
    told["groups"] = groups
    return told, {name: {key: group.pop(key) for key in COUNTERS} for name, group in groups.items()}


class History:
    """The last minutes in steps of a few seconds, which begin at the same time in all processes."""

    def __init__(self) -> None:
        self._groups: dict[str, deque[list[int]]] = {}
        self._counted: dict[str, tuple[int, int]] = {}
        self._endpoints: dict[str, deque[list[int]]] = {}

    def add(self, status: Status, now: float) -> None:
        """Add the events since the last call; of current values keep the maximum of the step."""
        step = int(now // STEP)
        for group in status.groups.values():
            name = group.name
            row = _row(self._groups, name, step, 5)
            checkouts, timeouts = self._counted.get(name, (0, 0))
            self._counted[name] = group.checkouts, group.timeouts
            row[1] += group.checkouts - checkouts
            row[2] = max(row[2], group.in_use)
            row[3] = max(row[3], group.waiting)
            row[4] += group.timeouts - timeouts
        for label, endpoint in status.endpoints.items():
            row = _row(self._endpoints, label, step, 2)
            row[1] = max(row[1], endpoint.connections)

    def told(self, now: float) -> dict[str, Any]:
        """Return the first step, and rows that each begin with the number of their step.

        A row of a group holds blocks, in use, waiting and time-outs; a row of an endpoint holds connections.
        """
        oldest = int(now // STEP) - STEPS
        steps = [rows[0][0] for rows in self._groups.values()]
        return {
            "first": max(min(steps, default=0), oldest + 1),
            "groups": {name: _since(rows, oldest) for name, rows in self._groups.items()},
            "endpoints": {label: _since(rows, oldest) for label, rows in self._endpoints.items()},
        }


def _row(table: dict[str, deque[list[int]]], name: str, step: int, width: int) -> list[int]:
    rows = table.setdefault(name, deque(maxlen=STEPS))
    if not rows or rows[-1][0] != step:
        rows.append([step] + [0] * (width - 1))
    return rows[-1]


def _since(rows: Sequence[list[int]], oldest: int) -> list[list[int]]:
    return [row for row in rows if row[0] > oldest]

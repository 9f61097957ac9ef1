"""The background tasks of a process: DOWN endpoints, roles and lag, long blocks, sessions left in a commit.

One daemon thread steps it, or in lock-free mode a checkout in passing. Nothing in it waits for a server,
except to cancel a statement after `max_hold`, which is bounded.
"""

from __future__ import annotations

import random
import select
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from .._lending.configured import Beat
from .._lending.group import users_of
from .._lending.hold_limits import HoldWatcher
from .._servers.endpoint import PROBE_AFTER, PROBE_TIMEOUT, Endpoint, State
from .._servers.startup_probe import RESOLVING_AGAIN
from .._servers.suspects import SuspectProbes
from .._util import log_events as events
from ..errors import one_line
from .left_session_watch import LeftSessionWatch
from .observer import Observer, StatusQuery

if TYPE_CHECKING:
    from .._status.publisher import Publisher
    from .patroni import Patronis

WAIT = 0.25
"""Seconds that lock-free requests wait, all together, for the next answer to a probe if no server is up."""

SOONER_AFTER = 0.1
"""Least seconds between two probes that are made sooner for connections that wait."""

RETRY_AFTER = 1.0
"""Seconds after which a part that failed is stepped again."""


class _Part(Protocol):
    @property
    def needed(self) -> bool: ...

    def step(self) -> float: ...


class _Flight:
    """A probe under way; behind a pooler, which may answer alone, a question to the server follows."""

    def __init__(self, endpoint: Endpoint, now: float) -> None:
        self.endpoint = endpoint
        self.until = now + PROBE_TIMEOUT
        """When it is over, unless the server has sent something more by then."""
        self.patience = WAIT
        """Seconds that requests may still wait for it."""
        self.accepting = False
        self._now = endpoint.probe()
        self._then: StatusQuery | None = None

    @property
    def reason(self) -> str:
        """Why the server is not up."""
        return self._now.reason if self._then is None else "the pooler answers, and no server behind it"

    def step(self, now: float) -> bool:
        """Go on as far as possible; return whether it is over.

        In lock-free mode it may be long until the next step, so time is up only if a step finds nothing new.
        """
        part = self._then or self._now
        moves = part.moves
        if part.step():
            if part is not self._now:
                self.accepting = True  # an error is an answer too
            elif self._now.accepting and self.endpoint.config.pooler and users_of(self.endpoint):
                self._then = self._question()
                self.until = now + self.endpoint.config.connect_timeout
                return self.step(now)
            else:
                self.accepting = self._now.accepting
            return True
        if part.moves > moves:
            self.until, self.patience = max(self.until, now + PROBE_TIMEOUT), WAIT
        return now >= self.until

    def _question(self) -> StatusQuery:
        endpoint = self.endpoint
        return StatusQuery(partial(endpoint.conninfo, users_of(endpoint)[0].config), endpoint.arrive)

    def register(self, poller: select.poll) -> bool:
        """Register with the poller the events that this waits for; return whether those are all."""
        if self._then is None:
            return self._now.register(poller)
        self._then.register(poller)
        return not self._then.missing

    def close(self) -> None:
        """Give up."""
        self._now.close()
        if self._then is not None:
            self._then.close()


def _doubtful(endpoint: Endpoint) -> bool:
    """Return whether an endpoint is UP, but has not answered a ping."""
    return endpoint.silent and endpoint.state is State.UP


class Prober:
    """Asks each DOWN endpoint at most twice a second whether it accepts sessions again.

    It also asks once whether an UP endpoint that has not answered a ping is there.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._due: dict[Endpoint, float] = {}
        self._flying: dict[Endpoint, _Flight] = {}

    @property
    def needed(self) -> bool:
        """Whether an endpoint is down."""
        return bool(self._due)

    def hurry(self, endpoint: Endpoint) -> None:
        """Probe a DOWN endpoint now."""
        if endpoint in self._due:
            self._due[endpoint] = min(self._due[endpoint], self._clock())

    def watch(self, endpoint: Endpoint) -> None:
        """Probe the endpoint until it is up; at once if it is, and it did not answer."""
        self._due.setdefault(endpoint, self._clock() if endpoint.silent else self._next())

    def step(self) -> float:
        """Do the work that is due; return the seconds until there may be more to do."""
        if not self._due:
            return PROBE_TIMEOUT
        now = self._clock()
        for endpoint, due in list(self._due.items()):
            if endpoint.state not in (State.DOWN, State.PROBING) and not _doubtful(endpoint):
                self._forget(endpoint)  # drained or removed, or it has answered meanwhile
            elif now >= due or endpoint in self._flying:
                self._probe(endpoint, now)
        if self._flying:
            return 0.01
        return max(0.01, min(self._due.values(), default=now) - now)

    def _probe(self, endpoint: Endpoint, now: float) -> None:
        """Begin a probe or go on with it, and act on its result."""
        doubtful = _doubtful(endpoint)
        flight = self._flying.get(endpoint)
        if flight is None:
            if not doubtful:
                endpoint.state = State.PROBING
            flight = self._flying[endpoint] = _Flight(endpoint, now)
        if not flight.step(now):
            return
        flight.close()
        del self._flying[endpoint]
        if flight.accepting:
            self._forget(endpoint)
            endpoint.mark_up()
            return
        self._due[endpoint] = self._next()
        if doubtful:
            endpoint.mark_down(flight.reason)
            return
        if endpoint.state is State.PROBING:  # and was not drained meanwhile
            endpoint.state = State.DOWN
        endpoint.note_error(flight.reason)

    def hasten(self, endpoints: Collection[Endpoint], deadline: float) -> bool:
        """Go on with the probes of these endpoints for a request that has no other; return whether one is up.

        A probe that only checkouts step hardly ever comes to its end. The wait for a probe without progress
        happens once, so that a silent server does not cost every request time.
        """
        while True:
            self.step()
            if any(endpoint.state is State.UP for endpoint in endpoints):
                return True
            flying = [f for e, f in self._flying.items() if e in endpoints and f.patience > 0]
            began = self._clock()
            if not flying or began >= deadline:
                return False
            poller = select.poll()
            complete = [flight.register(poller) for flight in flying]
            patience = min(deadline - began, max(flight.patience for flight in flying))
            poller.poll((patience if all(complete) else min(patience, RESOLVING_AGAIN)) * 1000)
            for flight in flying:
                flight.patience -= max(self._clock() - began, 0.001)

    def close(self) -> None:
        """Stop probing."""
        self._due.clear()

    def _next(self) -> float:
        return self._clock() + random.uniform(*PROBE_AFTER)

    def _forget(self, endpoint: Endpoint) -> None:
        self._due.pop(endpoint, None)
        if flight := self._flying.pop(endpoint, None):
            flight.close()


class Monitor:
    """Steps its parts: in a thread while one of them is needed, or when it is called."""

    def __init__(
        self,
        observer: Observer,
        holds: HoldWatcher,
        vigil: LeftSessionWatch,
        *,
        threaded: bool,
        publisher: Publisher | None = None,
        beat: Beat | None = None,
    ) -> None:
        self.prober = Prober()
        self.doubts = SuspectProbes()
        self.observer = observer
        self.holds = holds
        self.patronis = self._patronis(observer)
        self.vigil = vigil
        self._next: Observer | None = None
        """The observer's replacement, made by the thread that steps it: none is closed during a query."""
        self.publisher = publisher
        self._lock = threading.RLock() if threaded else None  # a signal handler may come back to it
        self._thread: threading.Thread | None = None
        self._closed = False
        self._news = threading.Lock()
        """Released to wake the thread. An Event could stay locked after an interruption by a signal."""
        self._news.acquire()
        self._beat = Beat() if beat is None else beat
        self._hurried_at = 0.0
        self._failed = ""
        """The last failure of a step; the same failure is not logged again."""

    def step(self) -> float:
        """Do the work that is due, without waiting; return the seconds until there may be more to do."""
        if (left := self._beat.due_at - monotonic()) > 0:
            return left
        now = monotonic()
        self._beat.due_at = soon = now + 0.01
        if self._next is not None:
            self.observer.close()
            self.observer, self._next = self._next, None
            self.patronis = self._patronis(self.observer)
        pause = min(map(self._try, self._parts()))
        if self.publisher is not None:
            pause = min(pause, self._try(self.publisher))
        if self._beat.due_at == soon:  # `wake` was not called meanwhile
            self._beat.due_at = now + pause
        return pause

    def _patronis(self, observer: Observer) -> Patronis | None:
        endpoints = [endpoint for endpoint in observer.writing if endpoint.config.patroni]
        if not endpoints:
            return None
        from .patroni import Patronis  # it brings an HTTP client

        return Patronis(endpoints, self._hurry)

    def _hurry(self, endpoint: Endpoint) -> None:
        self.prober.hurry(endpoint)
        self.observer.hurry(endpoint)

    def look_sooner(self, endpoints: Collection[Endpoint]) -> None:
        """Ask these endpoints now, since a connection waits for one; ten times a second at most."""
        now = monotonic()
        if now - self._hurried_at < SOONER_AFTER:
            return
        self._hurried_at = now
        for endpoint in endpoints:
            self._hurry(endpoint)
        self.wake()

    def _parts(self) -> list[_Part]:
        parts: list[_Part] = [self.prober, self.doubts, self.observer, self.holds, self.vigil]
        return parts if self.patronis is None else [*parts, self.patronis]

    def _try(self, part: _Part) -> float:
        """Step one part; an error in it (no file descriptor is left ...) does not stop the others."""
        try:
            return part.step()
        except Exception as error:  # noqa: BLE001 - no caller could handle it
            reason = f"{type(error).__name__}: {one_line(error)}"
            if reason != self._failed:
                self._failed = reason
                with suppress(Exception):  # the handler of the log may be the part that failed
                    events.BACKGROUND_FAILED(
                        "background task failed, retrying: %s", reason,
                        exc_info=error, reason=reason,
                    )  # fmt: skip
            return RETRY_AFTER

    def _wake_thread(self) -> None:
        """Wake the thread if it waits."""
        with suppress(RuntimeError):  # woken already
            self._news.release()

    def wake(self) -> None:
        """Step again soon; in threaded mode, start the thread if it is not running."""
        self._beat.due_at = 0.0
        if self._lock is None:
            return
        self._wake_thread()
        with self._lock:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="pgdbpool-monitor", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError as error:  # the next `wake` tries again
                    self._thread = None
                    events.BACKGROUND_FAILED(
                        "cannot start the background thread: %s", error, reason=str(error)
                    )

    def observe(self, observer: Observer) -> None:
        """Replace the observer if the new one observes something else."""
        if observer.plan != (self._next or self.observer).plan:
            self._next = observer
            self.wake()

    def close(self) -> None:
        """Stop, and close the connections of the parts."""
        self._closed = True
        self._wake_thread()
        thread = self._thread
        if thread is None:
            self._end()
        elif thread is not threading.current_thread():
            thread.join(1.0)

    def _end(self) -> None:
        self.prober.close()
        self.doubts.close()
        self.observer.close()
        self.holds.close()
        if self.patronis is not None:
            self.patronis.close()
        self.vigil.close()
        if self.publisher is not None:
            self.publisher.close()

    def _run(self) -> None:
        assert self._lock is not None
        while not self._closed:
            self._news.acquire(timeout=max(self.step(), 0.0))
            with self._lock:
                needed = any(part.needed for part in self._parts())
                publishing = self.publisher is not None and self.publisher.needed
                if not needed and not publishing and self._next is None:
                    # Under the lock, so that `wake` starts another or is seen here.
                    self._thread = None
                    return
        self._end()

"""What doc/howto/patroni.rst says, with three members, under a load that writes and one that reads."""

from __future__ import annotations

import itertools
import signal
import threading
from collections import Counter
from collections.abc import Callable
from time import monotonic
from typing import Any

import psycopg
import pytest
from patroni_cluster import TTL, FirstWrite, Member, Patroni, cluster
from support import wait_for

from pgdbpool import Connection, Handler

STRICT = {"synchronous_mode": True, "synchronous_mode_strict": True}
FOUND_WITHIN = 0.3
"""Seconds from when a fresh connection could write to our first commit."""


class Load:
    """A context manager: blocks that write and blocks that read, in threads, or in one if lock-free."""

    def __init__(self, cluster: Patroni, mode: str, **write: Any) -> None:
        self.errors: Counter[str] = Counter()
        self.reader_errors: list[str] = []
        self.commits: list[tuple[float, int]] = []
        self.reads = 0
        self._numbers = itertools.count(1)
        self._over = threading.Event()
        servers = [
            {
                "label": m.name, "host": m.host, "port": m.port, "name": "postgres", "user": "postgres",
                "patroni": m.url,
            }
            for m in cluster.members
        ]  # fmt: skip
        groups = {
            "write": {"target": "primary", "autocommit": False, "connection_count": 4, **write},
            "read": {"target": "prefer-standby", "connection_count": 4},
        }
        Connection.init({"type": mode, "db": servers, "groups": groups})
        works = ([self._write] * 3, [self._read] * 3) if mode == "threaded" else ([self._both], [])
        self._threads = [
            threading.Thread(target=self._loop, args=(work,)) for work in itertools.chain(*works)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        wait_for(lambda: len(self.commits) > 20, 20, "rows are written")
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)
        Connection.reset()

    def _loop(self, work: Callable[[], None]) -> None:
        while not self._over.wait(0.005):
            work()

    def _both(self) -> None:
        self._write()
        self._read()

    def _write(self) -> None:
        number = next(self._numbers)
        try:
            with Handler("write") as db:
                db.query("INSERT INTO done VALUES (%s)", (number,))
                db.commit()
        except psycopg.Error as error:
            self.errors[type(error).__name__] += 1
        else:
            self.commits.append((monotonic(), number))

    def _read(self) -> None:
        try:
            with Handler("read") as db:
                db.fetchval("SELECT count(*) FROM done")
            self.reads += 1
        except psycopg.Error as error:
            self.reader_errors.append(repr(error))

    def committed_after(self, moment: float) -> float | None:
        """Return when the first block after that moment was committed."""
        return next((at for at, _ in self.commits if at > moment), None)

    def lost(self, leader: Member) -> set[int]:
        """Return the rows that were acknowledged and are not there."""
        with leader.connect() as conn:
            there = {number for (number,) in conn.execute("SELECT n FROM done")}
        return {number for _, number in self.commits} - there


def found_in_time(load: Load, first: FirstWrite) -> None:
    at = wait_for(lambda: load.committed_after(first.at - 0.05), 20, "a block is committed")
    took = at - first.at
    print(f"first commit {took:.3f} s after a fresh connection could write; {dict(load.errors)}")
    assert took <= FOUND_WITHIN


REFUSED = {"DBOfflineError", "TargetUnavailableError"}
both = pytest.mark.parametrize("settings", [{}, STRICT], ids=["asynchronous", "strict"])


def wait_for_sync_standby(patroni: Patroni) -> None:
    def named() -> bool:
        members = patroni.leader.ask("/cluster").get("members", [])
        return any(member["role"] == "sync_standby" for member in members)

    wait_for(named, 30, "a synchronous standby")


@both
def test_a_switchover_loses_nothing_and_blocks_wait_for_it(mode: str, settings: dict[str, Any]) -> None:
    with cluster(**settings) as patroni:
        if settings:
            wait_for_sync_standby(patroni)
        with Load(patroni, mode, timeout=20) as load:
            first = FirstWrite(patroni, patroni.leader)
            patroni.switchover()
            leader = first.wait(30)
            found_in_time(load, first)
        assert load.reader_errors == []
        assert not REFUSED & load.errors.keys(), load.errors
        assert load.lost(leader) == set()


@both
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_failover_is_found_at_once_and_readers_see_nothing_of_it(
    mode: str, settings: dict[str, Any], how: signal.Signals
) -> None:
    with cluster(**settings) as patroni:
        if settings:
            wait_for_sync_standby(patroni)
        with Load(patroni, mode, timeout=1) as load:
            old = patroni.leader
            first = FirstWrite(patroni, old)
            old.signal(how)
            leader = first.wait(3 * TTL)
            found_in_time(load, first)
            if how is signal.SIGSTOP:
                old.signal(signal.SIGCONT)
            commits = len(load.commits)
            wait_for(lambda: len(load.commits) > commits + 50, 20, "it goes on")
        assert load.reader_errors == []
        lost = load.lost(leader)
        # Without a synchronous standby, what the leader had not sent on is lost with it.
        assert len(lost) <= (0 if settings else 3), lost


def test_a_restart_of_the_leader_loses_nothing_and_hardly_a_block_is_refused(mode: str) -> None:
    with cluster() as patroni, Load(patroni, mode, timeout=20) as load:
        leader = patroni.leader
        assert "success" in leader.tell("/restart", {}).lower()
        commits = len(load.commits)
        wait_for(lambda: len(load.commits) > commits + 20, 20, "it goes on")
        assert load.reader_errors == []
        assert load.lost(leader) == set()
        # Its Patroni may hang meanwhile, and the others tell of the restart one to two seconds late.
        assert sum(load.errors[name] for name in REFUSED) <= 20, load.errors


def test_during_a_pause_no_block_waits_for_a_leader_that_is_not_replaced(mode: str) -> None:
    with cluster() as patroni:
        patroni.leader.tell("/config", {"pause": True}, "PATCH")
        wait_for(lambda: all(member.ask().get("pause") for member in patroni.members), 20, "the pause")
        with Load(patroni, mode, timeout=20) as load:
            patroni.leader.signal(signal.SIGKILL)
            began = monotonic()
            wait_for(lambda: REFUSED & load.errors.keys(), 20, "a block is refused")
            assert monotonic() - began < 10
            assert load.reader_errors == []

"""What goes wrong with two servers and their network: one fault at a time, each mended before the next."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from random import Random
from typing import Any

import psycopg
from proxy import Proxy

from pgdbpool.cluster import Cluster, ClusterError, Node

VICTIM = "SELECT pid FROM pg_stat_activity WHERE usename = %s ORDER BY random() LIMIT 1"
LEAST = 9
"""Faults of a run, however slow the machine is."""
ALL_ENDED = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s"
ALL_CANCELLED = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE usename = %s"


class Nemesis:
    """Breaks the two servers and the network before them, until its time is over.

    A standby is promoted only when the old primary is dead (of two primaries each could acknowledge) and when
    it had been in sync: with every acknowledged commit on it. The next promotion waits until the old primary
    has rejoined as the new one's standby and is in sync in turn. Until then the new primary acknowledges
    nothing, since it waits for a standby too. A COMMIT that is cancelled while it waits for the standby is a
    success with a warning at the server, and is lost in a failover that follows: no client may count on it.

    :param user: whose backends it ends and cancels.
    :param note: writes a line to a history.
    :param stop_client: ends one of the clients with SIGTERM, and starts another in its place.
    """

    def __init__(
        self,
        cluster: Cluster,
        proxies: Mapping[Node, Proxy],
        user: str,
        random: Random,
        note: Callable[..., None],
        stop_client: Callable[[], None] = lambda: None,
    ) -> None:
        self.cluster = cluster
        self.proxies = proxies
        self.user = user
        self.random = random
        self.note = note
        self.stop_client = stop_client

    def run(self, until: float, recovered: Callable[[float], bool], patience: float) -> None:
        """Go through all faults in random order, again and again; end with everything mended.

        The first are failovers, which so come in the shortest of runs; on a slow machine it goes on until
        there were `LEAST`. After each, wait until `recovered` says that all have recovered since then, or for
        the `patience`.
        """
        deck, struck = FIRST[::-1], 0
        while time.monotonic() < until or struck < LEAST:
            struck += 1
            if not deck:
                deck = self.random.sample(FAULTS, len(FAULTS))
            mended = self.strike(deck.pop())
            while not recovered(mended) and time.monotonic() < mended + patience:
                time.sleep(0.02)
            time.sleep(self.random.uniform(0.1, 1.0))

    def strike(self, fault: Callable[[Nemesis], None]) -> float:
        """Break something and mend it again; return when that was, on the monotonic clock."""
        self.note("fault", at=time.monotonic(), fault=fault.__name__, primary=self.primary.name)
        fault(self)
        self.mend()
        mended = time.monotonic()
        self.note("healed", at=mended, fault=fault.__name__, primary=self.primary.name)
        return mended

    @property
    def primary(self) -> Node:
        return self.cluster.primary

    @property
    def standby(self) -> Node:
        return self.cluster.standbys[0]

    def mend(self) -> None:
        """Bring all back: network, both servers, replication."""
        for proxy in self.proxies.values():
            proxy.start()
            proxy.resume()
        for node in self.cluster.nodes:
            node.resume()
            if not node.running:
                node.launch()
        for node in self.cluster.nodes:
            node.wait_ready()
        for attempts_left in (4, 3, 2, 1, 0):
            try:
                self.cluster.wait_in_sync()
                return
            except psycopg.OperationalError:  # a server that recovers from the loss of a backend
                if not attempts_left:
                    raise
                time.sleep(0.2)
                self.primary.wait_ready()

    def hold(self, shortest: float, longest: float) -> None:
        """Leave things broken for a while; now and then something small goes wrong besides."""
        until = time.monotonic() + self.random.uniform(shortest, longest)
        small = self.random.random() < 0.5
        while time.monotonic() < until:
            time.sleep(0.05)
            if small and self.random.random() < 0.15:
                if self.random.random() < 0.3:
                    self.random.choice(list(self.proxies.values())).reset_all()
                else:
                    self.signal_backend(signal.SIGTERM)

    def signal_backend(self, signum: int) -> None:
        """Send a signal to one of the clients' backends, if the primary answers."""
        if not self.primary.running or self.primary.paused:
            return
        with suppress(psycopg.OperationalError):
            for (pid,) in self.primary.execute(VICTIM, (self.user,)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signum)

    # Servers that end.

    def kill_the_primary(self) -> None:
        self.primary.kill()
        self.hold(0.0, 1.5)

    def kill_the_standby(self) -> None:
        self.standby.kill()
        self.hold(0.0, 4.0)

    def kill_both(self) -> None:
        for node in self.random.sample(self.cluster.nodes, 2):
            node.kill()
        self.hold(0.0, 1.5)

    def kill_a_backend(self) -> None:
        """The server ends all sessions and recovers, as after a crash."""
        self.signal_backend(signal.SIGKILL)
        self.hold(0.2, 0.5)

    def restart_the_primary(self) -> None:
        self.primary.restart(self.random.choice(("fast", "immediate")))

    def restart_the_standby(self) -> None:
        self.standby.restart(self.random.choice(("fast", "immediate")))

    def terminate_backends(self) -> None:
        for _ in range(self.random.randint(1, 5)):
            with suppress(psycopg.OperationalError):
                self.primary.execute(ALL_ENDED, (self.user,))
            time.sleep(self.random.uniform(0.0, 0.2))

    def terminate_what_waits_for_the_standby(self) -> None:
        """Those that have committed, and are ended before the standby knows: the client is told nothing."""
        self.standby.pause()
        self.hold(0.2, 0.5)
        self.terminate_backends()

    # Commits that wait for the standby, and are cut short.

    def cancel_backends(self) -> None:
        """As an administrator may, again and again."""
        for _ in range(self.random.randint(1, 5)):
            with suppress(psycopg.OperationalError):
                self.primary.execute(ALL_CANCELLED, (self.user,))
            time.sleep(self.random.uniform(0.0, 0.2))

    def cancel_what_waits_for_the_standby(self) -> None:
        self.standby.pause()
        self.hold(0.2, 0.5)
        self.cancel_backends()
        self.hold(0.0, 0.5)

    def cancel_what_waits_for_the_replay(self) -> None:
        """The standby has all, and shows none of it: with `remote_apply` commits wait for that too."""
        self.standby.execute("SELECT pg_wal_replay_pause()")
        self.hold(0.2, 1.0)
        self.cancel_backends()
        self.standby.execute("SELECT pg_wal_replay_resume()")

    def stop_a_client_that_commits(self) -> None:
        if self.random.random() < 0.7:
            self.standby.pause()
            self.hold(0.1, 0.5)
        self.stop_client()

    # Servers that hang.

    def pause_the_primary(self) -> None:
        self.primary.pause()
        self.hold(0.1, 5.0)

    def pause_the_standby(self) -> None:
        self.standby.pause()
        self.hold(0.1, 5.0)

    # The network, for those of the clients that have a proxy before their servers.

    def stall_the_network(self) -> None:
        """What was sent arrives late, also what was given up meanwhile."""
        self.proxies[self.primary].stall()
        self.hold(0.1, 5.0)

    def lose_the_network(self) -> None:
        """What was sent never arrives."""
        for node in self.random.choice(([self.primary], self.cluster.nodes)):
            self.proxies[node].stall()
        self.hold(0.5, 4.0)
        for proxy in self.proxies.values():
            proxy.reset_all()

    def refuse(self) -> None:
        self.proxies[self.primary].stop()
        self.hold(0.1, 3.0)

    def reset_connections(self) -> None:
        for _ in range(self.random.randint(1, 10)):
            self.random.choice((self.proxies[self.primary].reset_all, self.proxies[self.primary].close_all))()
            time.sleep(self.random.uniform(0.0, 0.1))

    # Promotions.

    def switch_over(self) -> None:
        self.promote_after(lambda old: old.stop("fast"))

    def fail_over(self) -> None:
        self.promote_after(lambda old: old.kill())

    def fail_over_from_a_hung_primary(self) -> None:
        self.primary.pause()
        self.hold(0.1, 3.0)
        self.promote_after(lambda old: old.kill())

    def fail_over_without_network(self) -> None:
        """The clients' connections to the old primary hang until it has come back as a standby."""
        self.proxies[self.primary].stall()
        self.hold(0.1, 1.0)
        self.promote_after(lambda old: old.kill())

    def fail_over_to_a_standby_that_was_away(self) -> None:
        """What the primary committed alone, and so acknowledged to nobody, is lost."""
        self.fail_over_without_what_was_committed_alone(lambda: None)

    def fail_over_after_cancels(self) -> None:
        self.fail_over_without_what_was_committed_alone(self.cancel_backends)

    def fail_over_after_a_client_was_stopped(self) -> None:
        self.fail_over_without_what_was_committed_alone(self.stop_client)

    def fail_over_to_a_standby_without_a_receiver(self) -> None:
        standby = self.standby
        standby.execute("ALTER SYSTEM SET primary_conninfo = ''")
        standby.execute("SELECT pg_reload_conf()")
        self.hold(0.2, 1.0)
        self.random.choice((self.cancel_backends, self.stop_client))()
        self.primary.kill()
        standby.execute("ALTER SYSTEM RESET primary_conninfo")
        standby.execute("SELECT pg_reload_conf()")
        self.promote_after(lambda old: None)

    def fail_over_without_what_was_committed_alone(self, meanwhile: Callable[[], None]) -> None:
        self.standby.kill()  # one that is paused would still find everything in its socket's buffer
        self.hold(0.2, 1.0)
        meanwhile()
        self.primary.kill()
        self.standby.start()
        self.promote_after(lambda old: None)

    def promote_after(self, fence: Callable[[Node], Any]) -> None:
        old, new = self.primary, self.standby
        fence(old)
        if old.running:
            raise ClusterError(f"{old} still runs: two primaries are not what is tested")
        self.hold(0.0, 0.5)
        new.promote()
        self.hold(0.0, 1.0)
        old.rejoin(new)


FAULTS = [
    Nemesis.kill_the_primary,
    Nemesis.kill_the_standby,
    Nemesis.kill_both,
    Nemesis.kill_a_backend,
    Nemesis.restart_the_primary,
    Nemesis.restart_the_standby,
    Nemesis.terminate_backends,
    Nemesis.terminate_what_waits_for_the_standby,
    Nemesis.cancel_what_waits_for_the_standby,
    Nemesis.cancel_what_waits_for_the_replay,
    Nemesis.stop_a_client_that_commits,
    Nemesis.pause_the_primary,
    Nemesis.pause_the_standby,
    Nemesis.stall_the_network,
    Nemesis.lose_the_network,
    Nemesis.refuse,
    Nemesis.reset_connections,
    Nemesis.switch_over,
    Nemesis.fail_over,
    Nemesis.fail_over_from_a_hung_primary,
    Nemesis.fail_over_without_network,
    Nemesis.fail_over_to_a_standby_that_was_away,
    Nemesis.fail_over_after_cancels,
    Nemesis.fail_over_after_a_client_was_stopped,
    Nemesis.fail_over_to_a_standby_without_a_receiver,
]
FIRST = [
    Nemesis.fail_over,
    Nemesis.fail_over_after_cancels,
    Nemesis.fail_over_after_a_client_was_stopped,
]
"""Those that every run has."""
QUICK = [
    Nemesis.kill_the_primary,
    Nemesis.kill_the_standby,
    Nemesis.kill_a_backend,
    Nemesis.restart_the_primary,
    Nemesis.restart_the_standby,
    Nemesis.terminate_backends,
    Nemesis.refuse,
    Nemesis.reset_connections,
]
"""Those that leave the roles and take a moment."""

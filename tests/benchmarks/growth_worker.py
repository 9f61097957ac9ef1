"""A process with a pool of any size, over fake servers: does its bookkeeping grow with it?

python growth_worker.py threaded
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from contextlib import ExitStack
from itertools import cycle
from time import monotonic

from worker import batch, serve

from pgdbpool import Connection, Handler


class Grown:
    """A pool over so many endpoints, with so many groups of so many connections, all of them open."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self._groups: list[str] = []

    def open(self, ports: list[int], connections: int, groups: int) -> None:
        """Make it, in place of the last one."""
        self._groups = [f"group{number}" for number in range(groups)]
        servers = [{"host": "127.0.0.1", "port": port, "name": "fake", "user": "fake"} for port in ports]
        Connection.init(
            {
                "type": self.mode,
                "db": servers,
                "groups": {name: {"connection_count": connections} for name in self._groups},
            }
        )
        for name in self._groups:
            with ExitStack() as stack:
                for _ in range(connections):
                    stack.enter_context(Handler(name))

    def checkouts(self, batches: int, each: int) -> list[float]:
        """Return the nanoseconds of a checkout with its checkin, the groups in turn, batch by batch."""
        names = cycle(self._groups)

        def do() -> None:
            with Handler(next(names)):
                pass

        return [batch(do, each) for _ in range(batches)]

    def handovers(self, waiters: int, seconds: float) -> float:
        """Return the nanoseconds from one thread's checkout to the next one's, while so many wait."""
        name, counts, end = self._groups[0], [0] * (waiters + 1), monotonic() + 60
        ready = threading.Barrier(waiters + 2)

        def work(number: int) -> None:
            ready.wait()
            while monotonic() < end:
                with Handler(name, timeout=60):
                    counts[number] += 1

        threads = [threading.Thread(target=work, args=(number,)) for number in range(waiters + 1)]
        for thread in threads:
            thread.start()
        with Handler(name):  # until all of them wait
            ready.wait()
            while Connection.status().groups[name].waiting < waiters + 1:
                time.sleep(0.002)
            begun = monotonic()
        time.sleep(seconds)
        done, taken = sum(counts), monotonic() - begun
        end = 0.0
        for thread in threads:
            thread.join()
        return taken / max(1, done) * 1e9

    def lock_ring(self, waiters: int, seconds: float) -> float:
        """Return the nanoseconds from thread to thread of a lock that goes round: what no pool can avoid."""
        queue: deque[threading.Lock] = deque()
        count, end = 0, monotonic() + 60

        def work() -> None:
            nonlocal count
            own = threading.Lock()
            own.acquire()
            queue.append(own)
            while True:
                own.acquire()
                count += 1
                following = queue.popleft() if queue else None
                over = monotonic() >= end
                if not over:
                    queue.append(own)
                if following is not None:
                    following.release()
                if over:
                    return

        threads = [threading.Thread(target=work) for _ in range(waiters + 1)]
        for thread in threads:
            thread.start()
        while len(queue) < waiters + 1:
            time.sleep(0.002)
        begun = monotonic()
        queue.popleft().release()
        time.sleep(seconds)
        done, taken = count, monotonic() - begun
        end = 0.0
        for thread in threads:
            thread.join()
        return taken / max(1, done) * 1e9


if __name__ == "__main__":
    threading.stack_size(256 * 1024)

    serve(Grown(sys.argv[1]))

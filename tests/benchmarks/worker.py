"""The process of one peer: it does what the benchmark asks for, line by line in JSON.

    python worker.py psycopg_pool

It is run as a file, so that a peer with an environment of its own needs nothing else of this package.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, perf_counter_ns
from types import FrameType
from typing import Any

from peers import PEERS, Peer, Unsupported


class Worker:
    """A peer and the commands for it; each returns what is sent back."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.peer: Peer | None = None

    def open(self, servers: list[dict[str, Any]], size: int, fill: bool = False) -> dict[str, Any]:
        """Make the pool, in place of the last one."""
        started = monotonic()
        self.peer = PEERS[self.name](servers, size)
        if fill:
            self.peer.fill()
        return {"seconds": monotonic() - started, "threads": threading.active_count()}

    def latency(self, operation: str, count: int) -> list[int]:
        """Return the nanoseconds of each of so many operations."""
        assert self.peer is not None
        do = self.peer.operation(operation)
        if self.name == "asyncpg":
            return self.peer.run(lambda: _each_async(do, count))  # type: ignore[no-any-return]
        times = []
        for _ in range(count):
            begun = perf_counter_ns()
            do()
            times.append(perf_counter_ns() - begun)
        return times

    def batches(self, operation: str, batches: int, each: int) -> list[float]:
        """Return the nanoseconds of one operation, as each of the batches has it."""
        assert self.peer is not None
        do = self.peer.operation(operation)
        if self.name == "asyncpg":
            return self.peer.run(lambda: _batches_async(do, batches, each))  # type: ignore[no-any-return]
        return [batch(do, each) for _ in range(batches)]

    def steps(self, operation: str) -> dict[str, int]:
        """Count the function calls and the bytecode instructions of one operation."""
        assert self.peer is not None
        do = self.peer.operation(operation)
        for _ in range(60):  # all that is prepared, on each connection, is prepared then
            self.peer.run(do)
        with _counted_calls() as calls:
            self.peer.run(do)
        return {**calls, "bytecodes": _count_bytecodes(lambda: self.peer and self.peer.run(do))}

    def thread_count(self, operation: str) -> int:
        """Return how many threads there are after an operation, this one included."""
        assert self.peer is not None
        self.peer.run(self.peer.operation(operation))
        return threading.active_count()

    def threads(self, operation: str, threads: int, seconds: float) -> dict[str, Any]:
        """Repeat an operation in so many threads at once; return how often each of them did."""
        assert self.peer is not None
        do = self.peer.operation(operation)
        counts, errors = [0] * threads, [0] * threads
        end = 0.0
        ready = threading.Barrier(threads + 1)

        def work(number: int) -> None:
            try:
                self.peer and self.peer.run(do)  # what only the first one does
            except Exception:  # noqa: BLE001  any error of a peer counts as one
                errors[number] += 1
            ready.wait()
            while monotonic() < end:
                try:
                    do()
                except Exception:  # noqa: BLE001
                    errors[number] += 1
                else:
                    counts[number] += 1

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        while ready.n_waiting < threads:
            time.sleep(0.001)
        begun = monotonic()
        end = begun + seconds
        ready.wait()
        for worker in workers:
            worker.join()
        return {"counts": counts, "errors": sum(errors), "seconds": monotonic() - begun}

    def recover(self, operation: str, after: int, within: float) -> dict[str, Any]:
        """Repeat an operation until it succeeds, and then so often; count errors and time the first."""
        assert self.peer is not None
        do = self.peer.operation(operation)
        begun, errors, first = monotonic(), 0, None
        slowest = 0.0
        kinds: dict[str, int] = {}
        successes = 0
        while successes < after and monotonic() < begun + within:
            started = monotonic()
            try:
                self.peer.run(do)
            except Exception as error:  # noqa: BLE001
                errors += 1
                kinds[type(error).__name__] = kinds.get(type(error).__name__, 0) + 1
                time.sleep(0.001)
            else:
                successes += 1
                if first is None:
                    first = monotonic() - begun
            slowest = max(slowest, monotonic() - started)
        return {"first": first, "errors": errors, "kinds": kinds, "slowest": slowest, "done": successes}

    def outage(self, operation: str, seconds: float, every: float) -> dict[str, Any]:
        """Repeat an operation all the time; return when each one began, how long it took, and its error."""
        assert self.peer is not None
        do = self.peer.operation(operation)
        end = monotonic() + seconds
        seen: list[tuple[float, float, str]] = []
        while (begun := monotonic()) < end:
            try:
                self.peer.run(do)
            except Exception as error:  # noqa: BLE001
                seen.append((begun, monotonic(), type(error).__name__))
            else:
                seen.append((begun, monotonic(), ""))
            time.sleep(every)
        return {"seen": seen}

    def memory(self, servers: list[dict[str, Any]], size: int) -> dict[str, float]:
        """Return the bytes of Python's memory that each of so many idle connections has."""
        before = _allocated()
        if self.name == "bare":
            import psycopg
            from peers import libpq

            kept: Any = [psycopg.connect(**libpq(servers), autocommit=True) for _ in range(size)]
        else:
            kept = PEERS[self.name](servers, size)
            kept.fill()
        taken = _allocated() - before
        del kept
        return {"bytes": taken / size}


def _allocated() -> int:
    if not tracemalloc.is_tracing():
        tracemalloc.start()
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def batch(do: Callable[[], Any], each: int) -> float:
    """Return the nanoseconds that one of so many calls takes."""
    begun = perf_counter_ns()
    for _ in range(each):
        do()
    return (perf_counter_ns() - begun) / each


async def _each_async(do: Callable[[], Any], count: int) -> list[int]:
    times = []
    for _ in range(count):
        begun = perf_counter_ns()
        await do()
        times.append(perf_counter_ns() - begun)
    return times


async def _batches_async(do: Callable[[], Any], batches: int, each: int) -> list[float]:
    times = []
    for _ in range(batches):
        begun = perf_counter_ns()
        for _ in range(each):
            await do()
        times.append((perf_counter_ns() - begun) / each)
    return times


@contextmanager
def _counted_calls() -> Iterator[dict[str, int]]:
    counts = {"python": 0, "c": 0}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            counts["python"] += 1
        elif event == "c_call":
            counts["c"] += 1

    sys.setprofile(note)
    try:
        yield counts
    finally:
        sys.setprofile(None)
        counts["python"] -= 1  # this generator's own end
        counts["c"] -= 1  # setprofile


def _count_bytecodes(do: Callable[[], Any]) -> int:
    count = 0

    def note(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return note

    sys.settrace(note)
    try:
        do()
    finally:
        sys.settrace(None)
    return count


def serve(worker: Any) -> None:
    """Answer each line until there is none."""
    answers = sys.stdout
    sys.stdout = sys.stderr
    for line in sys.stdin:
        command = json.loads(line)
        gc.collect()
        try:
            answer = {"answer": getattr(worker, command.pop("do"))(**command)}
        except Unsupported as error:
            answer = {"unsupported": str(error)}
        except Exception as error:  # noqa: BLE001  the benchmark says which peer it was
            cause = error.__context__
            because = f" ({type(cause).__name__}: {cause})" if cause else ""
            answer = {"error": f"{type(error).__name__}: {error}{because}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(Worker(sys.argv[1]))

#!/usr/bin/env bash
# CPython 3.14 (3.14.10); 3.10 to 3.13 and 3.15.2 do as expected. Needs `python3.14` on the path.
#
# Expected: if an exception of a signal's handler (KeyboardInterrupt, a server's time limit) comes during `with lock:`, the
# lock is free after it: CPython has looked for signals nowhere between `__enter__` and the protected block. Happens: 3.14
# looks for them when `__enter__` has returned, so the exception leaves a threading.Lock or RLock locked for good, without
# a trace. All threads that want it wait then, the interrupted one and a pool's others. A process on 3.14 whose handlers
# raise should end after one of them, or let the handler note what it wants and not raise.
set -euo pipefail
command -v python3.14 >/dev/null || {
    echo "python3.14 is not on the path" >&2
    exit 2
}
python3.14 - <<'PYTHON'
import signal, sys, threading, time


class Interruption(BaseException):
    pass


def alarm(*_):
    raise Interruption


def interrupted(kind, seconds):
    """Return how often a loop over `with lock` was interrupted, and after how many of them the lock was locked."""
    number = locked = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        lock, free = kind(), []
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0005)
            while True:
                with lock:
                    pass
        except Interruption:
            number += 1
        other = threading.Thread(target=lambda: free.append(lock.acquire(blocking=False)))
        other.start()
        other.join()
        locked += not free[0]
    return number, locked


signal.signal(signal.SIGALRM, alarm)
same = True
for kind in threading.Lock, threading.RLock:
    number, locked = interrupted(kind, 3)
    print(f"{sys.version.split()[0]}: {kind.__name__}: {number} interruptions, locked after {locked} of them")
    same = same and locked > 0
print("as described" if same else "CHANGED")
sys.exit(not same)
PYTHON

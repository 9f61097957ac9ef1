"""The processes of an embedded cluster: find, freeze and end them; as a script, the cluster's watchdog.

A server is recognised by its own command line (`-D` and a directory of the cluster) and by its user, never by
a number in a file: its files belong to an unprivileged user, who must not be able to make root signal others.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    pid: int
    parent: int
    uid: int
    args: list[str]


def processes() -> list[Process]:
    """Return the living processes of this machine, without zombies."""
    if not os.path.exists("/proc/self/stat"):
        return _processes_by_ps()
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            after_name = Path("/proc", name, "stat").read_text(errors="replace").rpartition(")")[2].split()
            args = Path("/proc", name, "cmdline").read_text(errors="replace").rstrip("\0").split("\0")
            uid = os.stat(f"/proc/{name}").st_uid
        except OSError:
            continue  # it ended while we were looking
        if after_name[0] not in "ZX":
            found.append(Process(int(name), int(after_name[1]), uid, args))
    return found


def _processes_by_ps() -> list[Process]:
    columns = ["ps", "-axww", "-o", "pid=,ppid=,uid=,stat=,command="]
    lines = subprocess.run(columns, capture_output=True, text=True, timeout=10).stdout.splitlines()
    rows = [line.split() for line in lines]
    return [Process(int(row[0]), int(row[1]), int(row[2]), row[4:]) for row in rows if row[3][0] != "Z"]


def tree(root: int) -> list[int]:
    """Return the living processes among `root` and everything below it, parents before their children."""
    parents = {process.pid: process.parent for process in processes()}
    pids = [root]
    for pid in pids:
        pids += [child for child, parent in parents.items() if parent == pid]
    return [pid for pid in pids if pid in parents]


def send(signum: int, pids: Iterable[int]) -> None:
    """Send a signal to each of `pids` that still exists."""
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue


def freeze(root: int) -> list[int]:
    """Stop `root` and everything below it, and return them."""
    send(signal.SIGSTOP, [root])  # first, so that it forks nothing new
    frozen: list[int] = []
    while new := [pid for pid in tree(root) if pid not in frozen]:
        send(signal.SIGSTOP, new)
        frozen += new
    return frozen


def kill_tree(root: int, timeout: float = 10.0) -> None:
    """SIGKILL `root` and everything below it and wait for their end, at most `timeout` seconds."""
    pids = freeze(root)
    send(signal.SIGKILL, pids)
    deadline = time.monotonic() + timeout
    while {process.pid for process in processes()} & set(pids) and time.monotonic() < deadline:
        time.sleep(0.005)
    remove_segments({root})


def remove_segments(creators: set[int]) -> None:
    """Remove the System V segments that killed servers with these pids left behind."""
    try:
        rows = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    except OSError:
        return  # not Linux
    for row in rows:
        segment, creator, attached, uid = row[1], int(row[4]), int(row[6]), int(row[7])
        if creator in creators and attached == 0 and shutil.which("ipcrm"):
            # As its owner, since root without CAP_SYS_ADMIN, as in a container, may not remove it.
            owner = uid if os.geteuid() == 0 else None
            subprocess.run(["ipcrm", "-m", segment], user=owner, capture_output=True, timeout=10)


def servers(base: str, uid: int) -> list[int]:
    """Return the processes of user `uid` that were started with `-D` and a directory below `base`."""
    return [
        process.pid
        for process in processes()
        for option, value in zip(process.args, process.args[1:], strict=False)
        if option == "-D" and value.startswith(base + os.sep) and process.uid == uid
    ]


def remove_cluster(base: str, uid: int, timeout: float = 3.0) -> None:
    """End all servers below `base`, by force after `timeout` seconds, and remove the directory."""
    roots = servers(base, uid)
    for root in roots:
        # An immediate shutdown lets a server remove its shared memory; a paused one must run to receive it.
        send(signal.SIGCONT, tree(root))
        send(signal.SIGQUIT, [root])
    deadline = time.monotonic() + timeout
    while (left := servers(base, uid)) and time.monotonic() < deadline:
        time.sleep(0.005)
    for root in left:
        kill_tree(root)
    remove_segments(set(roots))
    deadline = time.monotonic() + timeout
    while os.path.exists(base) and time.monotonic() < deadline:
        shutil.rmtree(base, ignore_errors=True)


def watch(base: str, uid: int, parent: int) -> None:
    """Wait for the end of the process `parent`, our parent, however it comes, then remove its cluster."""
    # A pipe's write end would stay open in forked workers, and a pid may belong to another process by now:
    # our own parent's id is always right.
    while os.getppid() == parent:
        time.sleep(0.2)
    remove_cluster(base, uid)


if __name__ == "__main__":
    watch(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

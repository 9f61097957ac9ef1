"""The directory in which the processes of one application publish their status, and find orders.

Each process has one file there and holds a lock on it for as long as it lives: a file that can be locked
belongs to a process that has exited, whichever container it ran in. Its counters are added to `gone.json`
before the file is removed, so that sums never shrink.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import stat
import time
import zlib
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

from ..errors import RuntimeDirError

_NAME = re.compile(r"[0-9]+-[0-9a-f]{8}\.status")
_HEADER = b"pgdbpool-1 %010d %08x\n"
_HEADER_SIZE = len(_HEADER % (0, 0))
_SIZE = slice(_HEADER.index(b"%"), _HEADER.index(b"%") + 10)
"""The place of the body's size in a header."""
_LIMIT = 16 << 20
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
KEPT = 60.0
"""Seconds for which an order that does not concern later processes is kept."""
_TRIES = 20
"""How often to read a file that another process is writing, or to try a lock."""


class LockedError(RuntimeDirError):
    """Another process has held the lock of the `runtime_dir` for longer than any use of it takes."""


class RuntimeDir:
    """An open runtime directory, private to this user.

    :param path: its absolute path.
    :param create: create it if it is missing, for this user only; its parent directory must exist.
    :raises RuntimeDirError: it is missing, not a directory, belongs to another user, or others may enter it.
    """

    def __init__(self, path: str, *, create: bool = False) -> None:
        self.path = path
        try:
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(path, 0o700)
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _FLAGS)
        except OSError as error:
            raise RuntimeDirError(
                f"runtime_dir {path!r} cannot be opened: {error.strerror}. It must be a directory, or one "
                "that can be made, of the user that the application runs as"
            ) from error
        found = os.fstat(self._fd)
        me = os.geteuid()
        wrong = ""
        if found.st_uid != me and me != 0:
            wrong = f"it belongs to user {found.st_uid}, and this process runs as {me}: chown {me} {path}"
        elif stat.S_IMODE(found.st_mode) & 0o077:
            wrong = f"others may enter it (mode {stat.S_IMODE(found.st_mode):o}): chmod 700 {path}"
        if wrong:
            self.close()
            raise RuntimeDirError(f"runtime_dir {path!r} is not used: {wrong}")
        self._guest = found.st_uid != me  # root reads, and changes nothing

    def __enter__(self) -> RuntimeDir:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the directory."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # Snapshots.

    def publish(self, pid: int, snapshot: dict[str, Any]) -> PublishedFile:
        """Create the file of this process with its first snapshot."""
        name = f"{pid}-{secrets.token_hex(4)}.status"
        file = PublishedFile(self._open(f".{name}", os.O_RDWR | os.O_CREAT | os.O_EXCL))
        fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(snapshot)
        # Only now may others see it: an unlocked or incomplete file would pass for that of a dead process.
        os.rename(f".{name}", name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        return file

    def snapshots(self) -> list[dict[str, Any]]:
        """Return the last snapshot of each living process; sweep the files of the others."""
        living, dead = [], []
        for name in sorted(filter(_NAME.fullmatch, os.listdir(self._fd))):
            with self._opened(name) as fd:
                if fd is None:
                    continue
                if _abandoned(fd):
                    dead.append(name)
                elif (snapshot := _read(fd)) is not None:
                    living.append(snapshot)
        if dead and not self._guest:
            with contextlib.suppress(RuntimeDirError):  # the next reader will sweep them
                self._sweep(dead)
        return living

    def gone(self) -> dict[str, Any]:
        """Return the counters of processes that have exited, in the shape of a snapshot's status."""
        return self._json("gone.json")

    def _sweep(self, names: list[str]) -> None:
        with self._locked():
            total = self.gone()
            for name in names:
                with self._opened(name) as fd:  # None if another process was faster
                    if fd is not None and (snapshot := _read(fd)) is not None:
                        add_counts(total, snapshot.get("counts", {}))
            self._replace("gone.json", total)
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self._fd)

    # Orders.

    def orders(self) -> list[dict[str, Any]]:
        """Return the orders that are in force or were given a moment ago, by their numbers."""
        found = self._json("orders.json").get("orders")
        return [order for order in found if _is_order(order)] if isinstance(found, list) else []

    def orders_mark(self) -> object:
        """Return a value that changes with each new order; it costs one system call."""
        try:
            found = os.stat("orders.json", dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def order(
        self, do: str, *, by: str, group: str | None = None, endpoint: str | None = None, **more: Any
    ) -> int:
        """Give an order to all processes; return its number, which their answers repeat.

        Processes that start later obey the drains and pauses in force.

        :param by: the operator or program that gives the order, for logs and errors.
        :raises RuntimeDirError: the directory belongs to another user.
        """
        if self._guest:
            raise RuntimeDirError(f"runtime_dir {self.path!r} belongs to another user: act as that user")
        now = time.time()
        with self._locked():
            orders = self.orders()
            # Never reuse a number, even if the file was removed: processes ignore orders that are not new.
            number = max([int(now * 1000), *(int(order["n"]) + 1 for order in orders)])
            new = {"n": number, "do": do, "by": by, "time": now, "group": group, "endpoint": endpoint, **more}
            orders = [order for order in orders if _in_force(order, new, now)]
            self._replace("orders.json", {"orders": [*orders, new]})
        return number

    def secret(self) -> bytes:
        """Return a secret shared by the processes of the application, created at the first call."""
        with self._locked():
            found = self._json("secret.json")
            if not found:
                found = {"secret": secrets.token_hex(32)}
                self._replace("secret.json", found)
        return bytes.fromhex(found["secret"])

    # Files.

    def _open(self, name: str, flags: int) -> int:
        return os.open(name, flags | _FLAGS, 0o600, dir_fd=self._fd)

    def _create(self, name: str, flags: int) -> int:
        """Open a file for writing, and create it if it is missing.

        :raises RuntimeDirError: its name belongs to something else, such as a symbolic link.
        """
        try:
            return self._open(name, flags | os.O_CREAT)
        except OSError as error:
            raise RuntimeDirError(
                f"runtime_dir {self.path!r}: cannot write {name!r}: {error.strerror}; remove it if it is not "
                "a file of pgdbpool's: links are not followed"
            ) from error

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int | None]:
        """Open a file for reading; None if it is missing or not a regular file."""
        try:
            fd = self._open(name, os.O_RDONLY)
        except OSError:
            yield None
            return
        try:
            yield fd if stat.S_ISREG(os.fstat(fd).st_mode) else None
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock on the shared files, for as long as writing one small file takes.

        :raises RuntimeDirError: they cannot be written, or another process keeps the lock.
        """
        try:
            fd = self._create("lock", os.O_RDWR)
            try:
                self._lock(fd)
                yield
            finally:
                os.close(fd)
        except OSError as error:
            raise RuntimeDirError(
                f"runtime_dir {self.path!r} cannot be written: {error.strerror}; its user needs the right to "
                "write there, and its file system room"
            ) from error

    def _lock(self, fd: int) -> None:
        for _ in range(_TRIES):
            try:
                return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # if this lasts, the process that holds it is stopped
                time.sleep(0.01)
        raise LockedError(f"runtime_dir {self.path!r}: a process keeps its lock: is one of them stopped?")

    def _json(self, name: str) -> dict[str, Any]:
        with self._opened(name) as fd:
            if fd is None:
                return {}
            try:
                found = json.loads(os.pread(fd, _LIMIT, 0))
            except ValueError:
                return {}
        return found if isinstance(found, dict) else {}

    def _replace(self, name: str, value: object) -> None:
        fd = self._create(f".{name}", os.O_WRONLY | os.O_TRUNC)
        with open(fd, "w", encoding="utf-8") as file:
            json.dump(value, file)
        os.rename(f".{name}", name, src_dir_fd=self._fd, dst_dir_fd=self._fd)


class PublishedFile:
    """The file of this process; its lock ends with the process, or with `close`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def write(self, snapshot: dict[str, Any]) -> bool:
        """Overwrite the last snapshot; return whether others can see it.

        In place, with a checksum for concurrent readers: a new file each second in each process would be
        work for the file system.
        """
        body = json.dumps(snapshot, separators=(",", ":")).encode()
        data = _HEADER % (len(body), zlib.crc32(body)) + body
        os.pwrite(self.fd, data, 0)
        os.ftruncate(self.fd, len(data))
        return os.fstat(self.fd).st_nlink > 0

    def close(self) -> None:
        """Close the file, which can then be swept; in a forked child it remains the parent's."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def add_counts(total: dict[str, Any], more: dict[str, Any]) -> None:
    """Add numbers, and lists and mappings of numbers, to those of the same name."""
    for name, value in more.items():
        if isinstance(value, dict):
            add_counts(total.setdefault(name, {}), value)
        elif isinstance(value, (list, tuple)):
            known = total.get(name) or [0] * len(value)
            total[name] = [a + b for a, b in zip_longest(known, value, fillvalue=0)]
        else:
            total[name] = total.get(name, 0) + value


def _is_order(found: object) -> bool:
    """Return whether a part of the file, which another program may have edited, is an order."""
    return (
        isinstance(found, dict)
        and {"n": int, "time": float, "do": str, "by": str}.items()
        <= {key: type(value) for key, value in found.items()}.items()
        and {"group", "endpoint"} <= found.keys()
        and (found["do"] != "pause" or isinstance(found.get("until"), float))
    )


def stands(order: Mapping[str, Any], now: float) -> bool:
    """Return whether an order also concerns processes that start now."""
    if order["do"] == "pause":
        return bool(order["until"] > now)
    return order["do"] in ("drain", "undrain", "resume")


def replaces(new: Mapping[str, Any], order: Mapping[str, Any]) -> bool:
    """Return whether a later order takes the place of another one."""
    # The resumption of one group coexists with a pause of all.
    return (
        any({new["do"], order["do"]} <= pair for pair in ({"drain", "undrain"}, {"pause", "resume"}))
        and new["endpoint"] == order.get("endpoint")
        and new["group"] in (None, order.get("group"))
    )


def _in_force(order: Mapping[str, Any], new: Mapping[str, Any], now: float) -> bool:
    """Return whether an order is kept beside a new one."""
    if replaces(new, order):
        return False
    return now - order["time"] < KEPT or stands(order, now)


def _abandoned(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(fd: int) -> dict[str, Any] | None:
    """Return the snapshot in a file; None if it is incomplete."""
    for _ in range(_TRIES):
        data = os.pread(fd, _LIMIT, 0)
        # The body's end, not the file's: a process stopped or killed before `ftruncate` left a longer file.
        size = int(data[_SIZE]) if data[_SIZE].isdigit() else 0
        body = data[_HEADER_SIZE : _HEADER_SIZE + size]
        if data[:_HEADER_SIZE] == _HEADER % (len(body), zlib.crc32(body)):
            found: dict[str, Any] = json.loads(body)
            return found
        time.sleep(0.001)
    return None

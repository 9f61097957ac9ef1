"""The life of a process: start, fork, exit."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from support import server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


Done = subprocess.CompletedProcess[str]


def run(node: Any, mode: str, body: str, timeout: float = 60) -> tuple[Done, float]:
    """Run a program whose pools are open; return when it ended, on the monotonic clock, as well."""
    start = f"""
        import os, sys, threading, time
        from pgdbpool import Connection, Handler
        Connection.init({{
            "type": "{mode}",
            "db": {{"host": "{node.host}", "port": {node.port}, "user": "postgres", "name": "postgres",
                    "connect_timeout": 20, "query_timeout": 20000}},
            "groups": {{"g": {{"connection_count": 3}}, "m": {{"connection_count": 3, "autocommit": False}}}},
        }})
    """
    program = textwrap.dedent(start) + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", program],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return done, time.monotonic()


@pytest.mark.parametrize(
    "body",
    [
        "",
        "db = Handler('g').__enter__()",
        "db = Handler('m').__enter__(); db.query('SELECT 1')",
        "sys.exit(0)",
        "import gc; keep = [Handler('g').__enter__()]; keep.append(keep)",
        """
        if threading and Connection.get_threading_model() == "threaded":
            def forever():
                while True:
                    with Handler("g") as db:
                        db.query("SELECT pg_sleep(0.01)")
            for _ in range(4):
                threading.Thread(target=forever, daemon=True).start()
            time.sleep(0.2)
        """,
        "Connection.close()",
        "Connection.reset()",
    ],
    ids=["idle", "open block", "open transaction", "exit", "cycle", "daemon threads", "closed", "reset"],
)
def test_a_process_that_does_not_close_ends_at_once_and_quietly(
    known_cluster: Any, mode: str, body: str
) -> None:
    # The clock is the same for all processes: how long its start takes is no matter here.
    body = "print(time.monotonic(), flush=True)\n" + textwrap.dedent(body)
    done, ended = run(known_cluster.primary, mode, body)
    assert done.returncode == 0, done
    (began,) = done.stdout.split()
    assert "Traceback" not in done.stderr, done.stderr
    assert "couldn't stop" not in done.stderr, done.stderr
    assert ended - float(began) < 4


def test_children_of_a_process_with_open_pools(known_cluster: Any, mode: str) -> None:
    done, _ = run(
        known_cluster.primary,
        mode,
        """
        def pids():
            with Handler("g") as a, Handler("g") as b:
                return {h.query("SELECT pg_backend_pid()").fetchone()[0] for h in (a, b)}
        parents = pids()
        children = []
        for _ in range(5):
            r, w = os.pipe()
            if os.fork() == 0:
                own = pids()
                os.write(w, (" ".join(map(str, own)) + ";").encode())
                sys.exit(0)   # with all of the interpreter's clean-up
            os.wait()
            children.append({int(p) for p in os.read(r, 1000).decode().rstrip(";").split()})
        for child in children:
            assert len(child) == 2 and not child & parents, (child, parents)
        with Handler("g") as db:
            assert db.query("SELECT 1").fetchone()[0] == 1
        status = Connection.status().groups["g"]
        assert status.discarded == {}, status
        print("fine")
        """,
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done


def test_fork_while_threads_hold_the_pools_locks(known_cluster: Any) -> None:
    done, _ = run(
        known_cluster.primary,
        "threaded",
        """
        stop = False
        def busy():
            while not stop:
                with Handler("g") as db:
                    db.query("SELECT 1")
        threads = [threading.Thread(target=busy) for _ in range(6)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(40):
                if (child := os.fork()) == 0:
                    with Handler("g", timeout=20) as db:
                        ok = db.query("SELECT 1").fetchone()[0] == 1
                    os._exit(0 if ok else 1)
                _, status = os.waitpid(child, 0)
                assert status == 0, status
        finally:
            stop = True
        for thread in threads:
            thread.join()
        print("fine", Connection.status().groups["g"].discarded)
        """,
    )
    assert (done.returncode, done.stdout) == (0, "fine {}\n"), done


def test_importing_is_cheap_and_starts_nothing() -> None:
    program = """
        import threading, sys
        import pgdbpool
        assert threading.active_count() == 1
        assert not any(name.partition(".")[0] in ("gevent", "greenlet") for name in sys.modules)
        for name in ("wsgi", "cli", "cluster", "demo", "rls", "shutdown", "contrib"):
            assert f"pgdbpool.{name}" not in sys.modules, name
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        check=True,
        timeout=20,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_child_of_a_child_leaves_both_alone(known_cluster: Any, mode: str) -> None:
    done, _ = run(
        known_cluster.primary,
        mode,
        """
        import gc
        def pid():
            with Handler("g") as db:
                return db.query("SELECT pg_backend_pid()").fetchone()[0]
        def fork(work):
            r, w = os.pipe()
            if (child := os.fork()) == 0:
                os.write(w, " ".join(map(str, work())).encode())
                gc.collect()
                sys.exit(0)   # with all of the interpreter's clean-up
            os.close(w)
            assert os.waitpid(child, 0)[1] == 0
            return [int(p) for p in os.read(r, 1000).split()]
        def child():
            mine = {pid() for _ in range(6)}
            with Handler("g") as db:   # and one that is in use
                own = db.query("SELECT pg_backend_pid()").fetchone()[0]
                found = fork(lambda: {pid() for _ in range(6)})
                assert db.query("SELECT pg_backend_pid()").fetchone()[0] == own
            mine |= {own, *(pid() for _ in range(6))}
            assert not mine.intersection(found)
            assert Connection.status().groups["g"].discarded == {}
            return [*mine, *found]
        mine = {pid() for _ in range(6)}
        assert not mine.intersection(fork(child))
        for _ in range(3):
            pid()
        assert Connection.status().groups["g"].discarded == {}
        print("fine")
        """,
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done


@pytest.mark.parametrize("lock", ["pool", "group", "process"])
def test_a_lock_that_another_thread_holds_at_the_fork_does_not_stop_the_child(
    known_cluster: Any, lock: str
) -> None:
    done, _ = run(
        known_cluster.primary,
        "threaded",
        f"""
        group = Connection.group("g")
        with Handler("g") as db:
            db.query("SELECT 1")
        lock = {{"pool": group._pool._lock, "group": group._lock, "process": Connection._lock}}["{lock}"]
        held, go = threading.Event(), threading.Event()
        def hold():
            with lock:
                held.set()
                go.wait()
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        if (child := os.fork()) == 0:
            for _ in range(2):
                with Handler("g", timeout=20) as db:
                    assert db.query("SELECT 1").fetchone()[0] == 1
            Connection.close(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        go.set()
        thread.join()
        with Handler("g") as db:
            db.query("SELECT 1")
        print(status)
        """,
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done


def test_multiprocessing_by_fork(known_cluster: Any, mode: str) -> None:
    done, _ = run(
        known_cluster.primary,
        mode,
        """
        import multiprocessing
        def work(token):
            with Handler("m") as db:
                answer, backend = db.query("SELECT %s::text, pg_backend_pid()", (token,)).fetchone()
            assert answer == token
            return os.getpid(), backend
        mine = work("parent")[1]
        with multiprocessing.get_context("fork").Pool(3) as processes:
            seen = processes.map(work, [f"token {n}" for n in range(60)], chunksize=1)
        owners = {}
        for process, backend in seen:
            owners.setdefault(backend, set()).add(process)
        assert all(len(processes) == 1 for processes in owners.values()), owners
        assert mine not in owners
        assert work("parent")[0] == os.getpid()
        print("fine", Connection.status().groups["m"].discarded)
        """,
    )
    assert (done.returncode, done.stdout) == (0, "fine {}\n"), done


def test_the_first_block_of_a_process_may_be_its_last(known_cluster: Any, mode: str) -> None:
    """In a handler of atexit, where Python from 3.12 on starts no thread."""
    node = known_cluster.primary
    config = {"type": mode, "db": server(node), "groups": {"g": {"connection_count": 2}}}
    body = f"""
        import atexit

        def last():
            for _ in range(3):
                with Handler("g") as db:
                    print(db.query("SELECT 1").fetchone()[0])
            Connection.close()
            print("closed")

        Connection.init({config!r}, wait=False)
        atexit.register(last)
    """
    done, _ = run(node, mode, body)
    assert done.stderr == ""
    assert done.stdout.split() == ["1", "1", "1", "closed"]

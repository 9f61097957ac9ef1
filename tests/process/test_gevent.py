"""Under gevent's patch waits let others run, interruptions lose nothing, and a late patch is refused."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from proxy import Proxy

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("gevent") is None, reason="gevent is not installed"),
]

PATCH = "from gevent import monkey; monkey.patch_all()"
START = """
    import os, random, time
    import gevent
    import pgdbpool
    from pgdbpool import Connection, Handler

    def start(**group):
        Connection.init({
            "type": "threaded",
            "db": {"host": "127.0.0.1", "port": int(os.environ["NODE_PORT"]), "user": "postgres",
                   "name": "postgres", "connect_timeout": 2},
            "groups": {"g": {"connection_count": 4, **group},
                       "m": {"connection_count": 4, "autocommit": False, **group}},
        })

    gaps = [0.0]
    def tick():
        last = time.monotonic()
        while True:
            gevent.sleep(0.005)
            now = time.monotonic()
            gaps.append(now - last)
            last = now

    def counts(name):
        deadline = time.monotonic() + 10
        while True:   # what was closed is replaced in the background
            status = Connection.status().groups[name]
            assert (status.in_use, status.waiting) == (0, 0), status
            assert status.size <= status.max_size, status
            if status.size == status.idle:
                return status
            assert time.monotonic() < deadline, status
            gevent.sleep(0.01)
"""


def run(node: Any, body: str, before: str = PATCH, timeout: float = 40) -> str:
    """Run a program in a process that is patched before it imports anything else; return what it prints."""
    program = "\n".join(map(textwrap.dedent, (before, START, body)))
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", program],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NODE_PORT": str(node.port)},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_a_wait_for_the_server_lets_other_greenlets_run(known_cluster: Any) -> None:
    printed = run(
        known_cluster.primary,
        """
        start(ping="always")
        gevent.spawn(tick)
        def statement():
            with Handler("g") as db:
                db.query("SELECT pg_sleep(0.3)")
        def transaction():
            with Handler("m", settings={"work_mem": "1MB"}) as db:
                db.query("CREATE TEMP TABLE t (n int) ON COMMIT DROP")
                with db.connection.cursor().copy("COPY t FROM STDIN") as copy:
                    copy.write_row((1,))
                db.query("SELECT pg_sleep(0.3)")
        def large():
            with Handler("g") as db:
                assert len(db.query("SELECT %s::text", ("x" * 20_000_000,)).fetchone()[0]) == 20_000_000
        def stream():
            with Handler("g") as db:
                list(db.connection.cursor().stream("SELECT n, pg_sleep(0.03) FROM generate_series(1, 10) n"))
        def waits():
            with Handler("g") as db:
                db.query("SELECT 1")
        began = time.monotonic()
        for name in ("statement", "transaction", "stream", "waits"):
            gevent.joinall([gevent.spawn(globals()[name]) for _ in range(8)], raise_error=True)
        took, gone = time.monotonic() - began, [gap for gap in gaps if gap > 0.25]
        large()
        print(f"{took:.2f} s for 24 waits of 0.3 s, largest gap {max(gaps) * 1000:.0f} ms")
        assert took < 6, took   # one after another they are 7.2 s
        # Any kind of wait that lets nobody else run is eight of these; the machine may make one, too.
        assert len(gone) < 4, gone
        for name in "gm":
            counts(name)
        """,
    )
    print(printed)


def test_a_server_that_does_not_answer_stalls_no_greenlet(known_cluster: Any, proxy_to: Any) -> None:
    proxy: Proxy = proxy_to(known_cluster.primary)
    proxy.stall()
    printed = run(
        proxy,
        """
        gevent.spawn(tick)
        try:
            start()
            with Handler("g"):
                pass
        except pgdbpool.DBConnectionError as error:
            print(type(error).__name__, f"largest gap {max(gaps) * 1000:.0f} ms")
        assert len(gaps) > 50, len(gaps)
        assert max(gaps) < 1.5, max(gaps)   # a connect may take 2 s
        """,
    )
    assert "Error" in printed, printed
    print(printed)


def test_each_greenlet_gets_its_own_answer(known_cluster: Any) -> None:
    run(
        known_cluster.primary,
        """
        start(timeout=30)
        def client(number):
            for turn in range(20):
                token = f"{number}-{turn}"
                with Handler(random.choice("gm")) as db:
                    assert db.query("SELECT %s::text, pg_sleep(0.001)", (token,)).fetchone()[0] == token
        gevent.joinall([gevent.spawn(client, n) for n in range(40)], raise_error=True)
        assert counts("g").opened == counts("m").opened == 4
        """,
    )


def test_a_timeout_at_any_moment_leaves_the_counts_exact(known_cluster: Any) -> None:
    printed = run(
        known_cluster.primary,
        """
        start(timeout=30)
        ended = {"fired": 0, "finished": 0}
        def client(number):
            draw = random.Random(number)
            for turn in range(30):
                token, stop = f"{number}-{turn}", gevent.Timeout(draw.choice((0.001, 0.01, 0.05, 1.0, 5.0)))
                stop.start()
                try:
                    with Handler(draw.choice("gm")) as db:
                        assert db.query("SELECT %s::text", (token,)).fetchone()[0] == token
                        db.query("SELECT pg_sleep(%s)", (draw.choice((0, 0.002, 0.01)),))
                        assert db.query("SELECT %s::text", (token,)).fetchone()[0] == token
                    ended["finished"] += 1
                except gevent.Timeout as timeout:
                    assert timeout is stop
                    ended["fired"] += 1
                finally:
                    stop.close()
        greenlets = [gevent.spawn(client, n) for n in range(12)]
        gevent.joinall(greenlets, raise_error=True)
        print(ended)
        assert min(ended.values()) > 50, ended
        sizes = sum(counts(name).size for name in "gm")
        with Handler("g") as db:
            query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgdbpool'"
            deadline = time.monotonic() + 10
            while (sessions := db.query(query).fetchone()[0]) != sizes and time.monotonic() < deadline:
                gevent.sleep(0.05)
            assert sessions == sizes, (sessions, sizes)
        for name in "gm":
            blocks = [Handler(name, timeout=5).__enter__() for _ in range(4)]   # no slot is lost
            for block in blocks:
                block.__exit__(None, None, None)
            counts(name)
        """,
    )
    print(printed)


def test_a_killed_greenlet_gives_its_connection_back(known_cluster: Any) -> None:
    run(
        known_cluster.primary,
        """
        start()
        def holder():
            with Handler("m") as db:
                db.query("SELECT pg_sleep(20)")
        greenlets = [gevent.spawn(holder) for _ in range(6)]   # two of them in the queue
        gevent.sleep(0.3)
        gevent.killall(greenlets)
        assert counts("m").size <= 4
        with Handler("g") as db:
            running = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query ~ 'pg_sleep.20'"
            deadline = time.monotonic() + 5
            while db.query(running + " AND pid <> pg_backend_pid()").fetchone()[0]:
                assert time.monotonic() < deadline
                gevent.sleep(0.02)
        """,
    )


@pytest.mark.parametrize(
    ("before", "body"),
    [
        ("import psycopg; " + PATCH, "start()"),
        ("import pgdbpool; " + PATCH, "start()"),
        ("from gevent import monkey; monkey.patch_all(thread=False)", "start()"),
        ("import gevent", "start(); from gevent import monkey; monkey.patch_all(); Handler('g').__enter__()"),
        (
            "import gevent",
            """
            start()
            if (child := os.fork()) == 0:
                from gevent import monkey
                monkey.patch_all()   # as gunicorn's gevent worker does after --preload
                try:
                    Handler('g').__enter__()
                except pgdbpool.ThreadingModelError:
                    os._exit(42)
            raise SystemExit(0 if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42 else "not refused")
            """,
        ),
    ],
    ids=["after psycopg", "after pgdbpool", "in part", "after init", "after a fork"],
)
def test_a_patch_that_comes_too_late_is_refused(known_cluster: Any, before: str, body: str) -> None:
    caught = "\n".join(
        (
            "try:",
            textwrap.indent(textwrap.dedent(body), "    "),
            "except pgdbpool.ThreadingModelError as error:",
            "    assert 'gunicorn.conf.py' in str(error), error",
            "else:",
            "    raise SystemExit('not refused')",
        )
    )
    run(known_cluster.primary, caught, before)


def test_without_gevent_nothing_of_it_is_imported(known_cluster: Any) -> None:
    program = """
        import sys
        sys.modules["gevent"] = None   # an import of it would fail
        from pgdbpool._util import greenlets
        greenlets.check()
        look, wait = greenlets.polls(0)
        assert look == wait
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        check=True,
        timeout=20,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_health_check_of_a_stopped_server_lets_other_greenlets_run(known_cluster: Any) -> None:
    known_cluster.primary.pause()
    try:
        printed = run(
            known_cluster.primary,
            """
            Connection.init({
                "db": {"host": "127.0.0.1", "port": int(os.environ["NODE_PORT"]), "user": "postgres"},
                "groups": {"g": {}},
            }, wait=False)
            gevent.spawn(tick)
            gevent.sleep(0.01)
            print(Connection.health(1.0)["status"], len(gaps) > 20, flush=True)
            """,
        )
    finally:
        known_cluster.primary.resume()
    assert printed == "unhealthy True\n"

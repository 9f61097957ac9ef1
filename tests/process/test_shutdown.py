"""How pools end: close, terminate, signals, and the interpreter's own end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from support import config, pools_backends, wait_for

import pgdbpool
from pgdbpool import Connection, Handler
from pgdbpool.contrib import gunicorn as hooks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RUNNING = (
    "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgdbpool' AND state = 'active' "
    "AND query LIKE '%pg_sleep%'"
)


@pytest.fixture
def admin(known_cluster: Any) -> Iterator[psycopg.Connection[Any]]:
    with known_cluster.primary.connect(autocommit=True) as connection:
        yield connection


@pytest.fixture
def start(known_cluster: Any) -> Iterator[Callable[..., None]]:
    def init(mode: str = "threaded", **changes: Any) -> None:
        group = {"connection_count": 3, **changes}
        Connection.init(config([known_cluster.primary], mode, g=group, m={**group, "autocommit": False}))

    yield init
    Connection.reset()


def count(admin: psycopg.Connection[Any], sql: str) -> int:
    row = admin.execute(sql).fetchone()
    assert row is not None
    return int(row[0])


class Sleeper(threading.Thread):
    """A block in a thread of its own that runs one statement for some seconds; keeps what it raised."""

    def __init__(self, seconds: float, group: str = "g") -> None:
        super().__init__(daemon=True)
        self.seconds, self.group, self.error, self.finished = seconds, group, None, False
        self.start()

    def run(self) -> None:
        try:
            with Handler(self.group) as db:
                db.query("SELECT pg_sleep(%s)", (self.seconds,))
                db.query("SELECT 1")
            self.finished = True
        except BaseException as error:  # noqa: BLE001  looked at by the test
            self.error = error


# close and terminate.


def test_close_waits_for_open_blocks_and_refuses_new_ones(start: Any, admin: Any) -> None:
    start()
    sleepers = [Sleeper(3), Sleeper(3, "m")]
    wait_for(lambda: count(admin, RUNNING) == 2)
    closer = threading.Thread(target=Connection.close, args=(10,))
    closer.start()
    wait_for(Connection.is_closing)
    with pytest.raises(pgdbpool.NotInitializedError, match="closed"):
        Handler("g")
    assert all(sleeper.is_alive() for sleeper in sleepers)
    closer.join(20)
    assert not closer.is_alive()
    for sleeper in sleepers:
        sleeper.join(10)
        assert sleeper.finished, sleeper.error
    wait_for(lambda: pools_backends(admin) == 0)


def test_close_serves_waiters_that_came_before(start: Any, admin: Any) -> None:
    start(connection_count=1)
    first = Sleeper(2)
    wait_for(lambda: count(admin, RUNNING) == 1)
    second = Sleeper(0.1)
    wait_for(lambda: Connection.status().groups["g"].waiting == 1)
    Connection.close(10)
    for sleeper in (first, second):
        sleeper.join(5)
        assert sleeper.finished, sleeper.error


def test_blocks_that_outlast_the_close_are_cancelled_and_cut(start: Any, admin: Any) -> None:
    start(query_timeout=60_000)
    sleepers = [Sleeper(50), Sleeper(50, "m")]
    wait_for(lambda: count(admin, RUNNING) == 2)
    began = time.monotonic()
    Connection.close(0.3)
    for sleeper in sleepers:
        sleeper.join(10)
        assert isinstance(sleeper.error, pgdbpool.Error), sleeper.error
    assert time.monotonic() - began < 5
    wait_for(lambda: count(admin, RUNNING) == 0)
    wait_for(lambda: pools_backends(admin) == 0)


def test_terminate_ends_blocks_of_all_threads_at_once(start: Any, admin: Any, mode: str) -> None:
    start(mode, query_timeout=60_000)
    sleeper = Sleeper(50, "m") if mode == "threaded" else None
    wait_for(lambda: count(admin, RUNNING) == (sleeper is not None))
    began = time.monotonic()
    with pytest.raises(pgdbpool.ConnectionLostError), Handler("g") as db:
        db.query("SELECT 1")
        Connection.terminate()
        db.query("SELECT 1")
    if sleeper is not None:
        sleeper.join(10)
        assert isinstance(sleeper.error, pgdbpool.Error), sleeper.error
    assert time.monotonic() - began < 5
    wait_for(lambda: pools_backends(admin) == 0)


def test_terminate_cuts_a_close_short(start: Any, admin: Any) -> None:
    start(query_timeout=60_000)
    sleeper = Sleeper(50)
    wait_for(lambda: count(admin, RUNNING) == 1)
    closer = threading.Thread(target=Connection.close, args=(60,))
    closer.start()
    wait_for(Connection.is_closing)
    Connection.terminate()
    closer.join(10)
    assert not closer.is_alive()
    sleeper.join(5)
    assert sleeper.error is not None


def test_terminate_reaches_blocks_of_pools_that_an_init_has_replaced(start: Any, admin: Any) -> None:
    start(query_timeout=60_000)
    sleeper = Sleeper(50)
    wait_for(lambda: count(admin, RUNNING) == 1)
    start()
    assert sleeper.is_alive()
    Connection.terminate()
    sleeper.join(5)
    assert sleeper.error is not None


@pytest.mark.parametrize("group", ["g", "m"])
@pytest.mark.parametrize("how", ["close", "terminate"])
@pytest.mark.parametrize("asleep", [False, True], ids=["idle", "asleep"])
def test_an_open_blocks_error_says_that_the_pools_were_closed_and_why(
    start: Any, admin: Any, how: str, group: str, asleep: bool
) -> None:
    start(query_timeout=60_000)
    errors: list[BaseException] = []
    begun, closed = threading.Event(), threading.Event()

    def ask(db: Handler, statement: str) -> None:
        try:
            db.query(statement)
        except (psycopg.Error, pgdbpool.Error) as error:
            errors.append(error)

    def block() -> None:
        with contextlib.suppress(pgdbpool.Error), Handler(group) as db:
            db.query("SELECT 1")
            begun.set()
            if asleep:
                ask(db, "SELECT pg_sleep(50)")
            closed.wait(10)
            ask(db, "SELECT 2")
            ask(db, "SELECT 3")

    thread = threading.Thread(target=block)
    thread.start()
    begun.wait(10)
    if asleep:
        wait_for(lambda: count(admin, RUNNING) == 1)
    by = f"Connection.{how}()"
    Connection.close(0.05) if how == "close" else Connection.terminate()
    closed.set()
    thread.join(10)
    assert str(errors[0]).startswith(f"the pools were closed by {by}, with this block open: ")
    assert str(errors[0]).count("the pools were closed") == 1
    if group == "g":  # its next statement wants another connection
        assert str(errors[-1]) == f"group 'g' was closed by {by}"
    else:
        assert isinstance(errors[-1], pgdbpool.TransactionAbortedError)
        assert f"closed by {by}" in str(errors[-1].__cause__)
    with pytest.raises(pgdbpool.NotInitializedError, match=f"closed by {re.escape(by)}: no block can begin"):
        Handler(group)


def test_a_lock_free_blocks_error_names_the_cause_of_closed_pools(start: Any) -> None:
    start("non-threaded")
    with pytest.raises(pgdbpool.ConnectionLostError, match=r"closed by Connection.terminate\(\), with"):
        with Handler("g") as db:
            db.query("SELECT 1")
            Connection.terminate()
            db.query("SELECT 1")


def test_a_hook_of_gunicorn_is_named_as_the_cause_of_closed_pools(start: Any, mode: str) -> None:
    start(mode)
    hooks.worker_int(None)
    with pytest.raises(pgdbpool.NotInitializedError, match="closed by gunicorn's worker_int, as the worker"):
        Handler("g")


def test_is_closing_from_the_end_to_the_next_beginning(start: Any, mode: str) -> None:
    assert not Connection.is_closing()
    start(mode)
    assert not Connection.is_closing()
    Connection.close()
    assert Connection.is_closing()
    start(mode)
    assert not Connection.is_closing()
    Connection.terminate()
    assert Connection.is_closing()
    Connection.close()
    Connection.terminate()


# Signals, in a process of its own.


class Program:
    """A program whose pools are open and that handles signals; reads its lines as they come."""

    def __init__(self, node: Any, body: str, mode: str = "threaded", before: str = "") -> None:
        start = f"""
            import os, signal, sys, threading, time
            import pgdbpool
            from pgdbpool import Connection, Handler
            def say(*what):
                sys.stdout.write(" ".join(map(str, what)) + "\\n")  # one write: threads say things
                sys.stdout.flush()
            Connection.init({{
                "type": "{mode}",
                "db": {{"host": "{node.host}", "port": {node.port}, "user": "postgres", "name": "postgres",
                        "query_timeout": 60000}},
                "groups": {{name: {{"connection_count": 3, "autocommit": name == "g"}} for name in "gm"}},
            }})
        """
        program = "\n".join(map(textwrap.dedent, (before, start, body)))
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error::ResourceWarning", "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    def says(self, line: str) -> None:
        assert self.process.stdout is not None
        read = self.process.stdout.readline().strip()
        assert read == line, (read, self.process.stderr.read() if not read and self.process.stderr else "")

    def send(self, number: int) -> float:
        self.process.send_signal(number)
        return time.monotonic()

    def end(self, timeout: float = 10) -> tuple[int, str, str]:
        """Wait for the end; return its code and what else it printed."""
        try:
            out, err = self.process.communicate(timeout=timeout)
        finally:
            self.process.kill()
        return self.process.returncode, out, err


@pytest.fixture
def program(known_cluster: Any) -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def begin(body: str, **kwargs: Any) -> Program:
        programs.append(Program(known_cluster.primary, body, **kwargs))
        return programs[-1]

    yield begin
    for each in programs:
        each.process.kill()
        each.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_process_as_it_did_before(program: Any, mode: str, number: int) -> None:
    idle = program("Connection.install_signal_handlers(); say('ready'); time.sleep(30)", mode=mode)
    idle.says("ready")
    sent = idle.send(number)
    code, _, err = idle.end()
    assert code == -number, err
    assert ("KeyboardInterrupt" in err) == (number == signal.SIGINT), err
    assert time.monotonic() - sent < 4


def test_a_process_that_works_in_blocks_ends_between_two_of_them(
    program: Any, mode: str, known_cluster: Any
) -> None:
    """Whenever the signal comes, no block is cut, none is begun, and nothing is said."""
    known_cluster.primary.execute("CREATE TABLE jobs (n int, done bool)")
    for delay in (0.1, 0.33):
        working = program(
            """
            Connection.install_signal_handlers()
            say("ready")
            n = 0
            while True:
                n += 1
                with Handler("m") as db:
                    db.query("INSERT INTO jobs VALUES (%s, false)", (n,))
                    db.query("SELECT pg_sleep(0.05)")
                    db.query("UPDATE jobs SET done = true WHERE n = %s", (n,))
                with Handler("g") as db:   # says what was told as done
                    db.query("SELECT 1")
                say(n)
            """,
            mode=mode,
        )
        working.says("ready")
        time.sleep(delay)  # any moment
        working.send(signal.SIGTERM)
        code, out, err = working.end()
        assert (code, err) == (-signal.SIGTERM, "")
        done = known_cluster.primary.execute("SELECT n FROM jobs WHERE done ORDER BY n")
        told = [int(line) for line in out.split()]
        assert [n for (n,) in done][: len(told)] == told
        assert len(done) - len(told) in (0, 1)  # committed, and the signal came before it was told
        known_cluster.primary.execute("TRUNCATE jobs")


def test_a_main_thread_that_waits_for_a_connection_ends_by_the_signal(program: Any) -> None:
    waiting = program(
        """
        Connection.install_signal_handlers(timeout=0.3)
        Connection.resize("g", 1)
        def hold():
            with Handler("g") as db:
                say("held")
                try:
                    db.query("SELECT pg_sleep(30)")
                except pgdbpool.Error:
                    pass
        threading.Thread(target=hold, daemon=True).start()
        while not Connection.status().groups["g"].in_use:
            time.sleep(0.01)
        with Handler("g"):
            say("lent")
        """
    )
    waiting.says("held")
    time.sleep(0.2)  # before or in the wait: the end is the same
    waiting.send(signal.SIGTERM)
    code, out, err = waiting.end()
    assert (code, out, err) == (-signal.SIGTERM, "", "")


def test_blocks_of_other_threads_finish_within_the_bound(program: Any, known_cluster: Any) -> None:
    known_cluster.primary.execute("CREATE TABLE jobs (n int)")
    working = program(
        """
        Connection.install_signal_handlers(timeout=20)
        def work(n):
            with Handler("m") as db:
                say("ready")
                db.query("SELECT pg_sleep(1)")
                db.query("INSERT INTO jobs VALUES (%s)", (n,))
            try:
                Handler("m")
            except pgdbpool.NotInitializedError as error:
                say("refused")
            time.sleep(30)
        for n in range(3):
            threading.Thread(target=work, args=(n,)).start()
        time.sleep(30)
        """
    )
    for _ in range(3):
        working.says("ready")
    working.send(signal.SIGTERM)
    code, out, err = working.end()
    assert (code, err) == (-signal.SIGTERM, "")
    assert out.split() in (["refused"] * n for n in range(4))  # as far as they come before the end
    assert known_cluster.primary.execute("SELECT count(*) FROM jobs") == [(3,)]


@pytest.mark.parametrize("place", ["main", "thread"])
def test_a_statement_past_its_bound_is_cancelled(program: Any, admin: Any, place: str) -> None:
    call = (
        "work()" if place == "main" else "threading.Thread(target=work, daemon=True).start(); time.sleep(60)"
    )
    stuck = program(
        f"""
        Connection.install_signal_handlers(timeout=0.3)
        def work():
            with Handler("m") as db:
                say("ready")
                db.query("SELECT pg_sleep(50)")
        {call}
        """
    )
    stuck.says("ready")
    wait_for(lambda: count(admin, RUNNING) == 1)
    sent = stuck.send(signal.SIGTERM)
    assert stuck.end()[0] == -signal.SIGTERM
    assert time.monotonic() - sent < 6
    wait_for(lambda: count(admin, RUNNING) == 0)


def test_a_second_signal_ends_the_wait(program: Any, admin: Any) -> None:
    stuck = program(
        """
        Connection.install_signal_handlers(timeout=50)
        def work():
            with Handler("m") as db:
                db.query("SELECT pg_sleep(50)")
        threading.Thread(target=work, daemon=True).start()
        say("ready")
        while not Connection.is_closing():
            time.sleep(0.01)
        say("closing")
        time.sleep(50)
        """
    )
    stuck.says("ready")
    wait_for(lambda: count(admin, RUNNING) == 1)
    stuck.send(signal.SIGINT)
    stuck.says("closing")
    sent = stuck.send(signal.SIGTERM)
    code, _, err = stuck.end()
    assert code in (-signal.SIGINT, -signal.SIGTERM), err
    assert time.monotonic() - sent < 6
    wait_for(lambda: count(admin, RUNNING) == 0)


def test_earlier_handlers_run_when_all_is_closed(program: Any, mode: str) -> None:
    ends = program(
        """
        def earlier(number, frame):
            say("earlier", signal.Signals(number).name, Connection.is_closing(), threading.active_count())
            sys.exit(7)
        signal.signal(signal.SIGTERM, earlier)
        Connection.install_signal_handlers()
        Connection.install_signal_handlers(signal.SIGTERM, timeout=2)   # once more is no second time
        with Handler("g") as db:
            say("ready")
            db.query("SELECT pg_sleep(0.5)")
            say("finished")
        Handler("g")
        say("not reached")
        """,
        mode=mode,
    )
    ends.says("ready")
    ends.send(signal.SIGTERM)
    code, out, err = ends.end()
    assert (code, err) == (7, "")
    finished, earlier = out.splitlines()
    assert finished == "finished"
    assert re.fullmatch("earlier SIGTERM True [12]", earlier), out


def test_a_block_inside_of_a_block_is_refused_at_once(program: Any) -> None:
    """To wait for the earlier handler there would be to wait for itself."""
    nested = program(
        """
        Connection.install_signal_handlers(timeout=20)
        with Handler("g") as db:
            say("ready")
            db.query("SELECT pg_sleep(0.5)")
            try:
                Handler("g")
            except pgdbpool.NotInitializedError:
                say("refused")
        time.sleep(30)
        """
    )
    nested.says("ready")
    nested.send(signal.SIGTERM)
    assert nested.end() == (-signal.SIGTERM, "refused\n", "")


def test_a_forked_child_handles_signals_for_itself(program: Any) -> None:
    parent = program(
        """
        Connection.install_signal_handlers()
        def use():
            with Handler("g") as db:
                return db.query("SELECT 1").fetchone()[0]
        if (child := os.fork()) == 0:
            use()
            say("child")
            time.sleep(30)
        time.sleep(0.1)
        while True:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                break
            use()
        say(os.waitstatus_to_exitcode(status), Connection.is_closing(), use())
        """,
        mode="non-threaded",
    )
    parent.says("child")
    children = f"/proc/{parent.process.pid}/task/{parent.process.pid}/children"
    os.kill(int(Path(children).read_text().split()[0]), signal.SIGTERM)
    assert parent.end() == (0, f"{-signal.SIGTERM} False 1\n", "")


def test_a_busy_main_thread_calls_the_earlier_handler_once(program: Any) -> None:
    done = program(
        """
        import hashlib
        calls = []
        signal.signal(signal.SIGTERM, lambda *_: calls.append(1))
        Connection.install_signal_handlers(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        began = time.monotonic()
        while time.monotonic() < began + 0.5:  # no handler runs in these; the signal is sent again
            hashlib.pbkdf2_hmac("sha256", b"x", b"y", 300_000)
        while not calls:
            time.sleep(0.01)
        time.sleep(0.3)
        say(len(calls), Connection.is_closing())
        """
    )
    assert done.end() == (0, "1 True\n", "")


def test_other_threads_cannot_install_handlers(start: Any) -> None:
    start()
    errors: list[Exception] = []

    def install() -> None:
        try:
            Connection.install_signal_handlers()
        except pgdbpool.ThreadingModelError as error:
            errors.append(error)

    thread = threading.Thread(target=install)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_reset_puts_the_earlier_handlers_back(start: Any) -> None:
    start()
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    Connection.install_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) != before[0]
    Connection.reset()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_signals_end_a_gevent_process(program: Any, known_cluster: Any) -> None:
    pytest.importorskip("gevent")
    known_cluster.primary.execute("CREATE TABLE jobs (n int)")
    working = program(
        """
        import gevent
        Connection.install_signal_handlers()
        def work(n):
            with Handler("m") as db:
                db.query("SELECT pg_sleep(1)")
                db.query("INSERT INTO jobs VALUES (%s)", (n,))
        greenlets = [gevent.spawn(work, n) for n in range(3)]
        gevent.sleep(0.2)
        say("ready")
        gevent.sleep(30)
        """,
        before="from gevent import monkey; monkey.patch_all()",
    )
    working.says("ready")
    working.send(signal.SIGTERM)
    code, _, err = working.end()
    assert (code, err) == (-signal.SIGTERM, "")
    assert known_cluster.primary.execute("SELECT count(*) FROM jobs") == [(3,)]


# The interpreter's end.


@pytest.mark.parametrize(
    "body",
    [
        "import atexit; atexit.register(Connection.close)",
        """
        import atexit
        atexit.register(Connection.terminate)
        keep = Handler("m").__enter__()
        keep.query("SELECT 1")
        """,
        """
        import atexit
        @atexit.register
        def last_words():
            with Handler("m") as db:
                db.query("SELECT 1")
            Connection.close()
        """,
        """
        def forever():
            while True:
                with Handler("g") as db:
                    db.query("SELECT pg_sleep(0.01)")
        if Connection.get_threading_model() == "threaded":
            for _ in range(3):
                threading.Thread(target=forever, daemon=True).start()
            time.sleep(0.2)
        sys.exit(0)
        """,
    ],
    ids=["close", "terminate", "last block", "daemon threads"],
)
def test_the_end_of_the_interpreter_is_quiet(program: Any, mode: str, body: str) -> None:
    ending = program("say('ready')\n" + textwrap.dedent(body), mode=mode)
    ending.says("ready")
    began = time.monotonic()
    assert ending.end() == (0, "", "")
    assert time.monotonic() - began < 4.5

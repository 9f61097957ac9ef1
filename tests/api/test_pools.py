"""Several sets of pools in one process: `Pools` objects beside the default set."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from support import config, in_child, nobody, pid_of, server, wait_for

import pgdbpool
from pgdbpool import Connection, Handler, Pools
from pgdbpool.contrib import gunicorn as hooks

ROOT = Path(__file__).parents[2]
WHERE = "SELECT current_setting('port')::int"


@pytest.fixture
def start(known_cluster: Any, mode: str) -> Iterator[Callable[..., Pools]]:
    """A function that makes a set over a node, whose group has the name that the default one has."""
    made = weakref.WeakSet[Pools]()
    Connection.init(config([known_cluster.primary], mode, g={"connection_count": 2, "min_size": 1}))

    def make(node: Any = None, **changes: Any) -> Pools:
        name = changes.pop("name", None)
        group = {"connection_count": 2, "min_size": 1, **changes}
        pools = Pools(config([node or known_cluster.standbys[0]], mode, g=group), name=name)
        made.add(pools)
        return pools

    yield make
    for pools in list(made):
        pools.terminate()
    Connection.reset()


def where(pools: Any) -> int:
    return int(pools.fetchval("g", WHERE))


def sessions(node: Any) -> int:
    with node.connect() as admin:
        row = admin.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgdbpool'"
        ).fetchone()
        return int(row[0])


def test_two_sets_with_the_same_groups_are_apart(start: Any, known_cluster: Any) -> None:
    primary, first, second = known_cluster.nodes
    with start(first) as one, start(second) as two:
        assert [where(each) for each in (Connection, one, two)] == [primary.port, first.port, second.port]
        with Handler("g") as default, one.Handler("g") as db, two.Handler("g", timeout=1) as other:
            found = [each.fetchval(WHERE) for each in (default, db, other)]
        assert found == [primary.port, first.port, second.port]
        assert [len(each.status().endpoints) for each in (Connection, one, two)] == [1, 1, 1]
        assert one.status().groups["g"].checkouts == 2


def test_each_set_has_its_own_database(known_cluster: Any, mode: str) -> None:
    with known_cluster.primary.connect(autocommit=True) as admin:
        admin.execute("CREATE DATABASE second")
    group = {"connection_count": 2, "autocommit": False}
    with (
        Pools(config([known_cluster.primary], mode, g=group)) as one,
        Pools(config([server(known_cluster.primary, name="second")], mode, g=group)) as two,
    ):
        one.execute("g", "CREATE TABLE t (i int)")
        with pytest.raises(psycopg.errors.UndefinedTable), two.Handler("g") as db:
            db.query("SELECT FROM t")
        assert two.fetchval("g", "SELECT current_database()") == "second"


def test_every_way_to_a_connection_leads_into_its_set(start: Any, known_cluster: Any) -> None:
    pools, port = start(), known_cluster.standbys[0].port
    assert pools.fetch("g", WHERE)[0][0] == pools.fetchrow("g", WHERE)[0] == port
    assert pools.fetchmany("g", "SELECT current_setting('port')::int + %s", [(0,)])[0][0] == port
    assert pools.execute("g", "SELECT 1") == "SELECT 1"
    conn = pools.getconn("g")
    assert conn.execute(WHERE).fetchone()[0] == port
    pools.putconn(conn)
    assert pgdbpool.run("g", lambda db: db.fetchval(WHERE), pools=pools) == port
    assert pgdbpool.retrying("g", pools=pools)(lambda db: db.fetchval(WHERE))() == port
    assert pools.health()["status"] == "healthy"
    assert pools.group("g").name == "pools/g"


def test_closing_one_set_leaves_the_others(start: Any, known_cluster: Any) -> None:
    first, second = known_cluster.standbys
    one, two = start(first), start(second)
    late = one.Handler("g")
    one.close()
    assert one.is_closing()
    assert not two.is_closing()
    assert not Connection.is_closing()
    assert where(two) == second.port
    assert where(Connection) == known_cluster.primary.port
    for use in (late.__enter__, lambda: one.Handler("g"), lambda: where(one), one.status, one.__enter__):
        with pytest.raises(pgdbpool.NotInitializedError):
            use()
    with pytest.raises(
        pgdbpool.NotInitializedError, match=r"closed by Pools.close\(\): .* make another Pools\(config\)"
    ):
        one.getconn("g")
    Connection.close()
    assert where(two) == second.port
    two.terminate()
    wait_for(lambda: sessions(first) + sessions(second) == 0)


def test_closing_the_default_set_leaves_the_others(start: Any, known_cluster: Any) -> None:
    pools = start()
    Connection.terminate()
    assert where(pools) == known_cluster.standbys[0].port
    Connection.init(config([known_cluster.primary], g={"connection_count": 1}))
    assert where(Connection) == known_cluster.primary.port


def test_a_failing_set_leaves_nothing_and_touches_no_other(start: Any, known_cluster: Any, mode: str) -> None:
    before, threads = Connection._pools, set(threading.enumerate())
    for wrong, error in (
        ({"groups": {}}, pgdbpool.ConfigError),
        (config([server(known_cluster.primary, name="missing")], mode, g={}), pgdbpool.DBConnectionError),
    ):
        with pytest.raises(error):
            Pools(wrong)
    with pytest.raises(pgdbpool.DBOfflineError):
        Pools(config([nobody()], mode, g={}), wait="all")
    assert Connection._pools is before
    assert where(Connection) == known_cluster.primary.port
    wait_for(lambda: set(threading.enumerate()) <= threads, what="no thread is left")
    assert repr(start()) == "<Pools 'pools': g>"  # the name is free again


def test_names_of_sets_are_unique(start: Any) -> None:
    one, two = start(name="reports"), start()
    assert [each.set_name for each in (one, two, start())] == ["reports", "pools", "pools-2"]
    with pytest.raises(pgdbpool.ConfigError, match="another set of pools is open by the name 'reports'"):
        start(name="reports")
    for name in ("", "a/b", "a b", 1):
        with pytest.raises(pgdbpool.ConfigError, match="cannot be the name of a set"):
            start(name=name)
    one.close()
    assert start(name="reports").set_name == "reports"
    with pytest.raises(pgdbpool.UnconfiguredGroupError, match="the groups are 'g'"):
        two.Handler("h")


def test_threads_make_and_use_sets_at_the_same_time(known_cluster: Any) -> None:
    def work(number: int) -> tuple[int, str]:
        node = known_cluster.nodes[number % 3]
        with Pools(config([node], g={"connection_count": 1})) as pools:
            return where(pools) - node.port, pools.set_name

    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(work, range(12)))
    assert {difference for difference, _ in found} == {0}
    with Pools(config([known_cluster.primary], g={})) as pools:
        assert pools.set_name == "pools"  # none is left


@pytest.mark.slow
def test_a_forked_child_has_every_set_anew(start: Any, known_cluster: Any) -> None:
    first, second = known_cluster.standbys
    one, two = start(first), start(second)
    closed = start(first)
    closed.close()
    late = one.Handler("g")
    with one.Handler("g") as db:
        mine = pid_of(db)

        def child() -> None:
            assert (where(one), where(two), where(Connection)) == (
                first.port, second.port, known_cluster.primary.port,
            )  # fmt: skip
            with late as again:
                assert again.fetchval(WHERE) == first.port
                assert pid_of(again) != mine
            one.close()
            assert where(two) == second.port
            assert closed.is_closing()

        in_child(child)
        assert pid_of(db) == mine
    assert where(one) == first.port


def test_a_set_changes_by_itself(start: Any, known_cluster: Any, mode: str) -> None:
    pools = start()
    label = next(iter(pools.status().endpoints))
    pools.resize("g", 3)
    assert (pools.status().groups["g"].max_size, Connection.status().groups["g"].max_size) == (3, 2)
    pools.reload(config([known_cluster.standbys[1]], mode, g={"connection_count": 1}))
    assert where(pools) == known_cluster.standbys[1].port
    with pytest.raises(pgdbpool.UnknownEndpointError):
        pools.drain(label)
    other = {"threaded": "non-threaded", "non-threaded": "threaded"}[mode]
    with pytest.raises(pgdbpool.ConfigError, match=r"close this set and make another Pools\(config\)"):
        pools.reload(config([known_cluster.standbys[1]], other, g={}))
    pools.drain(next(iter(pools.status().endpoints)))
    assert where(Connection) == known_cluster.primary.port


def test_a_server_that_both_sets_use_is_drained_in_one_alone(start: Any, known_cluster: Any) -> None:
    pools = start(known_cluster.primary)
    (label,) = pools.status().endpoints
    Connection.drain(label)
    assert where(pools) == known_cluster.primary.port
    with pytest.raises(pgdbpool.DBOfflineError):
        where(Connection)


def test_a_block_inside_one_of_another_set_passes_a_pause(start: Any, known_cluster: Any) -> None:
    pools = start(timeout=0.05)
    pools.pause("g", 30)
    with Handler("g"):
        assert where(pools) == known_cluster.standbys[0].port
    with pytest.raises(pgdbpool.PoolTimeout, match=r"Pools\.pause\(\)"):
        where(pools)


def test_tenants_and_deadlines_hold_in_each_set(known_cluster: Any, mode: str) -> None:
    group = {"connection_count": 1, "tenant": {"setting": "app.tenant", "verify": "off"}}
    show = "SELECT current_setting('app.tenant')"
    with (
        Pools(config(known_cluster.nodes[:1], mode, g=group)) as one,
        Pools(config(known_cluster.nodes[1:2], mode, g=group)) as two,
        pgdbpool.tenant("a"),
    ):
        assert [each.fetchval("g", show) for each in (one, two)] == ["a", "a"]
        with two.Handler("g", tenant="b", tenant_override=True) as db:
            assert (db.fetchval(show), one.fetchval("g", show)) == ("b", "a")
        with pytest.raises(pgdbpool.DBQueryError), one.deadline(0.05):
            two.fetchval("g", "SELECT pg_sleep(5)")


def test_a_set_that_is_dropped_is_closed_with_a_warning(start: Any, known_cluster: Any) -> None:
    pools = start(name="lost")
    use = pools.Handler
    assert where(pools) == known_cluster.standbys[0].port
    with pytest.warns(ResourceWarning, match=r"Pools 'lost' was dropped without close\(\)"):
        del pools
    with pytest.raises(pgdbpool.NotInitializedError, match="dropped without close"):
        use("g")
    wait_for(lambda: sessions(known_cluster.standbys[0]) == 0)
    assert where(Connection) == known_cluster.primary.port


def test_a_closed_set_is_collected_quietly(start: Any) -> None:
    pools = start()
    pools.close()
    kind = weakref.ref(type(pools))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del pools
        gc.collect()
    assert kind() is None


def test_what_a_set_cannot_do_is_refused(start: Any, known_cluster: Any) -> None:
    pools = start()
    for name in ("init", "install_signal_handlers", "reset", "get_max_pool_size"):
        with pytest.raises(AttributeError, match=rf"Pools\.{name} is of the whole process: see Connection"):
            getattr(pools, name)
    with pytest.raises(AttributeError, match=r"Pools\.nope does not exist"):
        pools.nope  # noqa: B018
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copied(pools)
    with pytest.raises(pgdbpool.ConfigError, match="is open already"):
        pools.__init__({})
    with pytest.raises(pgdbpool.NotInitializedError, match=r"pools = Pools\(config\)"):
        Pools.fetchval("g", WHERE)
    Pools.close()
    assert where(pools) == known_cluster.standbys[0].port


def test_a_class_of_ones_own_can_be_a_set(known_cluster: Any, mode: str) -> None:
    class Reports(Pools):
        """Sets with a constructor of their own."""

        def __init__(self, node: Any) -> None:
            super().__init__(config([node], mode, g={"connection_count": 1}), name="own")

        def port(self) -> int:
            return where(self)

    with Reports(known_cluster.primary) as one:
        assert one.port() == known_cluster.primary.port
        assert (repr(one), isinstance(one, Pools)) == ("<Reports 'own': g>", True)
    with pytest.raises(pgdbpool.NotInitializedError, match=r"closed by Reports.close\(\)"):
        one.port()


@pytest.mark.slow
def test_gunicorns_hooks_end_every_set(start: Any, known_cluster: Any) -> None:
    pools = start()
    hooks.worker_exit(None, type("Worker", (), {"pid": os.getpid()}))
    assert pools.is_closing()
    assert Connection.is_closing()
    other = start()
    Connection.init(config([known_cluster.primary], g={}))
    hooks.worker_int(None)
    assert other.is_closing()
    assert Connection.is_closing()


PROGRAM = """
    import os, signal, sys, threading, time
    from pgdbpool import Connection, Handler, Pools
    def config(port):
        return {{"type": "{mode}", "db": {{"host": "127.0.0.1", "port": port, "user": "postgres",
                 "name": "postgres"}}, "groups": {{"g": {{"connection_count": 2}}}}}}
    Connection.init(config({ports[0]}))
    pools, other = Pools(config({ports[1]})), Pools(config({ports[2]}))
    assert [p.fetchval("g", "SELECT 1") for p in (pools, other, Connection)] == [1, 1, 1]
"""


def run(known_cluster: Any, mode: str, body: str) -> subprocess.CompletedProcess[str]:
    program = textwrap.dedent(PROGRAM) + textwrap.dedent(body)
    ports = [node.port for node in known_cluster.nodes]
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", program.format(mode=mode, ports=ports)],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        "",
        "db = pools.Handler('g').__enter__(); db.query('SELECT 1')",
        "pools.itself = pools",
        "sys.exit(0)",
        "child = os.fork()\nif child: sys.exit(os.waitpid(child, 0)[1])\npools.fetchval('g', 'SELECT 1')",
    ],
    ids=["idle", "open block", "cycle", "exit", "fork"],
)
def test_a_process_ends_quietly_with_open_sets(known_cluster: Any, mode: str, body: str) -> None:
    done = run(known_cluster, mode, body)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_signal_lets_the_blocks_of_every_set_end(known_cluster: Any, mode: str) -> None:
    done = run(
        known_cluster,
        mode,
        """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        Connection.install_signal_handlers(signal.SIGTERM, timeout=5)
        with pools.Handler("g") as db:
            os.kill(os.getpid(), signal.SIGTERM)
            assert db.fetchval("SELECT 1 FROM pg_sleep(0.2)") == 1
            assert all(each.is_closing() for each in (pools, other, Connection))
            print("ended", flush=True)
        other.Handler("g")
        """,
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "ended\n", "")


def test_a_set_dropped_while_its_block_is_open_lets_it_end(start: Any, known_cluster: Any) -> None:
    pools = start()
    db = pools.Handler("g").__enter__()
    with pytest.warns(ResourceWarning):
        del pools
    assert db.fetchval(WHERE) == known_cluster.standbys[0].port
    db.__exit__(None, None, None)
    wait_for(lambda: sessions(known_cluster.standbys[0]) == 0)

"""The embedded cluster does to real servers what it says, and leaves nothing however its process ends."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import yaml
from known import leave

import pgdbpool
from pgdbpool.cluster import Cluster, ClusterError, Node
from pgdbpool.cluster import _installation as install
from pgdbpool.cluster import _watchdog as watchdog

pytestmark = pytest.mark.slow

DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
PACKAGE_ROOT = str(Path(pgdbpool.__file__).parent.parent)
with_15 = pytest.mark.skipif(not DEBIAN_15.exists(), reason="PostgreSQL 15 is not installed")
PROGRAMS = [
    pytest.param({"version": 18}, 18, id="18"),
    pytest.param({"version": 16}, 16, id="16"),
    pytest.param({"bin_dir": DEBIAN_15}, 15, id="15", marks=with_15),
]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can")


def eventually(condition: Callable[[], bool], timeout: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def processes_of(directory: Path) -> list[list[str]]:
    """The command lines that name this directory, the watchdog's included."""
    return [process.args for process in watchdog.processes() if str(directory) in " ".join(process.args)]


def segments_of(pids: list[int]) -> list[str]:
    """The System V segments that these processes made."""
    table = Path("/proc/sysvipc/shm")
    lines = table.read_text().splitlines()[1:] if table.exists() else []
    return [line for line in lines if int(line.split()[4]) in pids]


def refuses(node: Node) -> bool:
    with socket.socket() as client:
        return client.connect_ex((node.host, node.port)) != 0


def timeline(node: Node) -> int:
    return node.position()[1]


# What is started


@pytest.mark.parametrize(("programs", "major"), PROGRAMS)
def test_a_cluster_replicates_and_leaves_nothing(programs: dict[str, object], major: int) -> None:
    began = time.monotonic()
    with Cluster(standbys=2, **programs) as cluster:  # type: ignore[arg-type]
        assert time.monotonic() - began < 60  # about 1 on an idle machine
        assert [node.name for node in cluster.nodes] == ["node1", "node2", "node3"]
        assert (cluster.primary, *cluster.standbys) == tuple(cluster.nodes)
        for node in cluster.nodes:
            assert int(node.execute("SHOW server_version_num")[0][0]) // 10000 == major
            assert node.label == f"127.0.0.1:{node.port}"
            assert node.execute("SELECT pg_is_in_recovery()") == [(node.role == "standby",)]
        cluster.primary.execute("CREATE TABLE t AS SELECT %s::int AS i", (1,))
        cluster.wait_in_sync()
        assert [node.execute("TABLE t") for node in cluster.standbys] == [[(1,)], [(1,)]]
        pids = [node.pid for node in cluster.nodes]
    assert not cluster.directory.exists()
    assert not processes_of(cluster.directory)
    assert not segments_of(pids)
    assert all(refuses(node) and not node.running for node in cluster.nodes)


def test_a_cluster_can_be_started_again() -> None:
    cluster = Cluster(standbys=0)
    for _ in range(2):
        with cluster:
            assert cluster.primary.execute("SELECT 1") == [(1,)]
            assert cluster.standbys == []
            with pytest.raises(ClusterError, match="started already"):
                cluster.start()
    cluster.stop()


def test_settings_reach_the_servers_as_they_are() -> None:
    settings = {"max_connections": 17, "work_mem": "3MB", "our.own": "a\\b 'c'", "jit": False}
    with Cluster(standbys=1, settings=settings) as cluster:
        for node in cluster.nodes:
            shown = [node.execute(f"SHOW {name}")[0][0] for name in settings]
            assert shown == ["17", "3MB", "a\\b 'c'", "off"]


def test_the_environment_names_the_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wheel_16 = install.find_version(16)
    monkeypatch.setenv(install.BIN_VARIABLE, str(wheel_16))
    assert install.find_installation(None, None).bin_dir == install.find_installation(16, None).bin_dir
    assert install.find_installation(18, None).bin_dir == install.find_installation(18, None).bin_dir
    monkeypatch.setenv(install.BIN_VARIABLE, str(tmp_path))
    with pytest.raises(ClusterError, match=r"holds no initdb: name the directory"):
        Cluster().start()


def test_errors_name_the_remedy() -> None:
    with pytest.raises(ClusterError, match=r"no PostgreSQL 9 found: `pip install pgdbpool\[demo\]`"):
        Cluster(version=9).start()
    with pytest.raises(ClusterError, match="use 'trust' or 'scram-sha-256'"):
        Cluster(auth="md5")
    with pytest.raises(ClusterError, match="needs a standby"):
        Cluster(standbys=0, synchronous=True)


def test_a_start_that_fails_shows_the_log_and_leaves_nothing() -> None:
    cluster = Cluster(settings={"no_such_setting": 1})
    with pytest.raises(ClusterError, match="unrecognized configuration parameter"):
        cluster.start()
    assert not cluster.directory.exists()
    assert not processes_of(cluster.directory)


def test_a_port_lost_to_another_program_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    thieves: list[socket.socket] = []
    launch = Node.launch

    def robbed_once(node: Node) -> None:
        if not thieves:
            thieves.append(socket.create_server((node.host, node.port)))
        launch(node)

    monkeypatch.setattr(Node, "launch", robbed_once)
    with Cluster(standbys=0) as cluster, thieves[0]:
        assert cluster.primary.port != thieves[0].getsockname()[1]


# The life of a node


def test_a_stopped_node_refuses_and_keeps_its_port_and_data(known_cluster: Cluster) -> None:
    node = known_cluster.primary
    node.execute("CREATE TABLE t AS SELECT 1 AS i")
    port, pid = node.port, node.pid
    node.stop()
    assert refuses(node)
    assert not node.running
    with pytest.raises(ClusterError, match="does not run"):
        node.pause()
    with pytest.raises(ClusterError, match="does not run"):
        node.wait_ready(1)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind((node.host, port))
    node.start()
    assert (node.port, node.execute("TABLE t")) == (port, [(1,)])
    assert node.pid != pid
    with pytest.raises(ClusterError, match="runs already"):
        node.start()
    known_cluster.wait_in_sync()


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restart_ends_connections(known_cluster: Cluster, mode: str) -> None:
    node = known_cluster.standbys[0]
    with node.connect() as connection:
        node.restart(mode)  # type: ignore[arg-type]
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    assert node.execute("SELECT 1") == [(1,)]
    known_cluster.wait_in_sync()


def test_a_smart_stop_waits_for_clients_within_its_bound(known_cluster: Cluster) -> None:
    node = known_cluster.standbys[0]
    leave(node)
    with node.connect(), pytest.raises(ClusterError, match=r"not down in 0\.2 s"):
        node.stop("smart", timeout=0.2)
    node.stop()


def test_kill_ends_all_processes_at_once_and_the_data_survives(known_cluster: Cluster) -> None:
    node = known_cluster.primary
    node.execute("CREATE TABLE t AS SELECT 1 AS i")
    root = node.pid
    pids = watchdog.tree(root)
    assert len(pids) > 3
    node.kill()
    assert refuses(node)
    assert not set(pids) & {process.pid for process in watchdog.processes()}
    assert not segments_of([root])  # the others make none: what has their number is an older process's
    node.start()
    assert node.execute("TABLE t") == [(1,)]
    known_cluster.wait_in_sync()


def test_a_paused_node_holds_connections_and_answers_after_resume(known_cluster: Cluster) -> None:
    node = known_cluster.standbys[0]
    answers: list[object] = []
    with node.connect() as connection:
        node.pause()
        assert node.paused
        assert node.running
        waiting = threading.Thread(target=lambda: answers.append(connection.execute("SELECT 1").fetchone()))
        waiting.start()
        with pytest.raises(ClusterError, match="not ready in 1 s"):
            node.wait_ready(1)
        known_cluster.wait_in_sync()  # without the paused one
        assert not answers
        node.resume()
        waiting.join(10)
    assert answers == [(1,)]
    assert not node.paused


@pytest.mark.parametrize("end", [Node.stop, Node.kill, Node.restart])
def test_a_paused_node_can_be_ended(known_cluster: Cluster, end: Callable[[Node], None]) -> None:
    node = known_cluster.standbys[1]
    node.pause()
    end(node)
    assert not node.paused


def test_a_standby_that_does_not_catch_up_is_named(known_cluster: Cluster) -> None:
    node = known_cluster.standbys[0]
    node.execute("SELECT pg_wal_replay_pause()")
    known_cluster.primary.execute("CREATE TABLE t ()")
    with pytest.raises(ClusterError, match=r"node2 is at .* after 0\.2 s"):
        known_cluster.wait_in_sync(0.2)
    node.execute("SELECT pg_wal_replay_resume()")
    known_cluster.wait_in_sync()


# The roles


def test_after_a_promotion_the_others_follow(known_cluster: Cluster) -> None:
    old, new, other = known_cluster.nodes
    old.kill()
    new.promote()
    assert (known_cluster.primary, known_cluster.standbys) == (new, [other])
    known_cluster.follow(new)
    new.execute("CREATE TABLE t AS SELECT 1 AS i")
    known_cluster.wait_in_sync()
    assert other.execute("TABLE t") == [(1,)]
    assert timeline(new) == 2
    with pytest.raises(ClusterError, match="a primary already"):
        new.promote()
    with pytest.raises(ClusterError, match="has to rejoin"):
        new.follow(other)


def test_a_standby_that_was_down_follows_when_it_starts(known_cluster: Cluster) -> None:
    _, new, other = known_cluster.nodes
    other.stop()
    new.promote()
    known_cluster.follow(new)
    other.start()
    known_cluster.wait_in_sync()


def test_two_primaries_can_be_had(known_cluster: Cluster) -> None:
    old, new, other = known_cluster.nodes
    new.promote()
    assert (timeline(old), timeline(new)) == (1, 2)
    assert known_cluster.primary is new
    other.promote()
    assert known_cluster.primary is other


@pytest.mark.parametrize("end", [Node.kill, Node.stop, Node.resume], ids=["killed", "stopped", "running"])
def test_an_old_primary_rejoins_and_loses_its_own_writes(
    known_cluster: Cluster, end: Callable[[Node], None]
) -> None:
    old, new, _ = known_cluster.nodes
    old.execute("CREATE TABLE t (i int)")
    known_cluster.wait_in_sync()
    new.promote()
    known_cluster.follow(new)
    known_cluster.wait_in_sync()
    old.execute("INSERT INTO t VALUES (1)")
    new.execute("INSERT INTO t VALUES (2)")
    end(old)
    data = os.open(old.data, os.O_RDONLY)
    try:
        old.rejoin(new)
        assert os.fstat(data).st_nlink > 0, "rewound, not copied anew"
    finally:
        os.close(data)
    known_cluster.wait_in_sync()
    assert [node.execute("TABLE t") for node in known_cluster.nodes if node is not new] == [[(2,)], [(2,)]]
    old.promote()
    assert timeline(old) == 3


def test_a_standby_that_has_what_the_new_primary_lacks_must_rejoin(known_cluster: Cluster) -> None:
    old, new, other = known_cluster.nodes
    new.promote()
    old.execute("CREATE TABLE t ()")
    other.wait_replayed(*old.position())
    other.follow(new)
    with pytest.raises(ClusterError, match=r"if it is ahead of the primary, rejoin\(\) it"):
        known_cluster.wait_in_sync(0.5)
    other.rejoin(new)
    known_cluster.wait_in_sync()


def test_a_node_without_its_data_rejoins_from_a_base_backup(known_cluster: Cluster) -> None:
    node = known_cluster.standbys[1]
    node.kill()
    shutil.rmtree(node.data)
    node.rejoin(known_cluster.primary)
    known_cluster.primary.execute("CREATE TABLE t AS SELECT 1 AS i")
    known_cluster.wait_in_sync()
    assert node.execute("TABLE t") == [(1,)]
    assert "taking a base backup of node1" in node.log.read_text()


def test_a_synchronous_commit_waits_for_a_standby() -> None:
    with Cluster(standbys=1, synchronous=True) as cluster:
        cluster.primary.execute("CREATE TABLE t (i int)")
        assert cluster.standbys[0].execute("TABLE t") == []  # applied, with nothing to wait for
        cluster.standbys[0].pause()
        commit = threading.Thread(target=cluster.primary.execute, args=("INSERT INTO t VALUES (1)",))
        commit.start()
        commit.join(0.3)
        assert commit.is_alive()
        cluster.standbys[0].resume()
        commit.join(10)
        assert cluster.standbys[0].execute("TABLE t") == [(1,)]


# Authentication


@pytest.mark.parametrize("password", [None, "it's a \\ b:c"])
def test_a_password_is_asked_for_and_never_shown(password: str | None) -> None:
    with Cluster(standbys=1, auth="scram-sha-256", password=password) as cluster:
        old, new = cluster.nodes
        assert cluster.password
        assert new.execute("SELECT 1") == [(1,)]
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            new.connect(password="wrong")
        new.promote()
        old.rejoin(new)
        old.stop()
        shutil.rmtree(old.data)
        old.rejoin(new)
        cluster.wait_in_sync()
        for node in cluster.nodes:
            assert cluster.password not in node.log.read_text()
            assert cluster.password not in (node.data / "postgresql.conf").read_text()
        assert cluster.password not in f"{cluster!r}{cluster.nodes!r}{cluster.nodes[0]._home!r}"


@with_15
def test_tls_is_verified_by_the_certificate() -> None:
    with Cluster(standbys=0, bin_dir=DEBIAN_15, tls=True) as cluster:
        root = str(cluster.tls_certificate)
        with cluster.primary.connect(sslmode="verify-full", sslrootcert=root) as connection:
            assert connection.pgconn.ssl_in_use
        with cluster.primary.connect(sslmode="disable") as connection:
            assert not connection.pgconn.ssl_in_use


def test_tls_without_support_is_a_clear_error() -> None:
    with pytest.raises(ClusterError, match="SSL is not supported by this build"):
        Cluster(standbys=0, version=18, tls=True).start()


# The end of the process, its forks, its user

STARTED = """
import os, signal, sys, time
from pgdbpool.cluster import Cluster
cluster = Cluster(standbys=1)
cluster.start()
"""


def python(code: str, program: str = sys.executable, **options: object) -> subprocess.Popen[str]:
    path = os.pathsep.join([PACKAGE_ROOT, os.environ.get("PYTHONPATH", "")])
    defaults = {"env": os.environ | {"PYTHONPATH": path}}
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        [program, "-c", code], stdout=subprocess.PIPE, text=True, **defaults | options
    )


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
def test_a_killed_process_leaves_nothing_though_its_fork_lives(paused: bool) -> None:
    code = f"""{STARTED}
if {paused}:
    for node in cluster.nodes:
        node.pause()
fork = os.fork()
if fork == 0:
    time.sleep(60)
    os._exit(0)
print(cluster.directory, fork, *(node.pid for node in cluster.nodes), flush=True)
time.sleep(60)
"""
    with python(code) as process:
        assert process.stdout is not None
        directory, fork, *pids = process.stdout.readline().split()
        assert processes_of(Path(directory))
        process.kill()
        process.stdout.close()
    try:
        assert eventually(lambda: not processes_of(Path(directory)))
        assert eventually(lambda: not Path(directory).exists())
        assert not segments_of([int(pid) for pid in pids])
        assert int(fork) in {each.pid for each in watchdog.processes()}
    finally:
        os.kill(int(fork), signal.SIGKILL)


def test_a_process_killed_while_it_starts_leaves_nothing() -> None:
    code = """
from pgdbpool import cluster
make_data = cluster.Home.make_data
def tell(home, path):
    make_data(home, path)
    print(home.directory, flush=True)
cluster.Home.make_data = tell
cluster.Cluster().start()
"""
    with python(code) as process:
        assert process.stdout is not None
        directory = Path(process.stdout.readline().strip())
        assert eventually(lambda: any("initdb" in args[0] for args in processes_of(directory)))
        process.kill()
        process.stdout.close()
    assert eventually(lambda: not processes_of(directory) and not directory.exists())


def test_stop_in_a_forked_child_does_nothing() -> None:
    code = f"""{STARTED}
with cluster.primary.connect() as connection:
    fork = os.fork()
    if fork == 0:
        cluster.stop()
        os._exit(0)
    os.waitpid(fork, 0)
    print(connection.execute("SELECT 1").fetchone()[0], cluster.standbys[0].execute("SELECT 2")[0][0])
cluster.stop()
print(cluster.directory.exists())
"""
    with python(code) as process:
        assert process.communicate(timeout=60)[0].split() == ["1", "2", "False"]
    assert process.returncode == 0


def test_a_process_that_forgets_to_stop_ends_at_once_and_leaves_nothing() -> None:
    with python(STARTED + "print(cluster.directory, flush=True)") as process:
        directory = Path(process.communicate(timeout=60)[0].strip())
    assert process.returncode == 0
    assert eventually(lambda: not processes_of(directory) and not directory.exists())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_command_prints_a_configuration_and_ends_on_a_signal(signum: signal.Signals) -> None:
    code = "import sys; from pgdbpool.cluster import main; sys.exit(main(['--standbys', '1']))"
    with python(code) as process:
        assert process.stdout is not None
        lines: list[str] = []
        while not lines or "Ctrl-C" not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], "it ended"
        config = yaml.safe_load("".join(lines))
        with psycopg.connect(host="127.0.0.1", port=config["db"][0]["port"], user="postgres") as connection:
            directory = Path(str(connection.execute("SHOW data_directory").fetchone()[0])).parent  # type: ignore
        process.send_signal(signum)
        assert process.wait(30) == 0
    assert not directory.exists()
    assert [*config["groups"]] == ["read", "write"]


@as_root
def test_root_runs_the_servers_as_an_unprivileged_user(known_cluster: Cluster) -> None:
    account = install.unprivileged_account()
    for node in known_cluster.nodes:
        assert {os.stat(f"/proc/{pid}").st_uid for pid in watchdog.tree(node.pid)} == {account.pw_uid}
    assert stat.S_IMODE(known_cluster.directory.stat().st_mode) == 0o750
    assert known_cluster.directory.stat().st_uid == 0


@as_root
def test_an_ordinary_user_needs_nothing_special() -> None:
    account = install.unprivileged_account()
    system_python = shutil.which(f"python3.{sys.version_info[1]}", path="/usr/local/bin:/usr/bin")
    site = sysconfig.get_path("platlib")
    interpreters = [each for each in (sys.executable, system_python) if each]
    interpreter = next((each for each in interpreters if install.reachable(Path(each), account)), None)
    if interpreter is None or not all(install.reachable(Path(p), account) for p in (PACKAGE_ROOT, site)):
        pytest.skip(f"user {account.pw_name} cannot enter the directories of Python and its packages")
    code = f"""{STARTED}
cluster.standbys[0].kill()
cluster.standbys[0].start()
cluster.primary.execute("CREATE TABLE t AS SELECT 1 AS i")
cluster.wait_in_sync()
print(os.getuid(), os.stat(cluster.directory).st_uid, cluster.standbys[0].execute("TABLE t")[0][0])
cluster.stop()
print(cluster.directory.exists())
"""
    home = tempfile.mkdtemp(prefix="pgdbpool-test-")
    try:
        os.chown(home, account.pw_uid, account.pw_gid)
        environment = {"HOME": home, "TMPDIR": home, "PYTHONPATH": f"{PACKAGE_ROOT}:{site}"}
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        with python(code, interpreter, env=environment, cwd=home, **user) as process:
            uid = str(account.pw_uid)
            assert process.communicate(timeout=60)[0].split() == [uid, uid, "1", "False"]
        assert os.listdir(home) == []
    finally:
        shutil.rmtree(home)


@pytest.fixture
def hidden_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The wheel under a directory that only root can enter, and an empty cache that the servers' user can."""
    spec = importlib.util.find_spec(install.WHEEL)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{install.WHEEL} is not installed")
    wheel = Path(spec.submodule_search_locations[0])
    site = tmp_path / "private"
    site.mkdir(mode=0o700)
    unneeded = shutil.ignore_patterns("include", "*.a", "pginstall")
    shutil.copytree(wheel, site / wheel.name, ignore=unneeded)
    shutil.copytree(wheel.with_name(f"{wheel.name}.libs"), site / f"{wheel.name}.libs")
    monkeypatch.syspath_prepend(site)
    cache = Path(tempfile.mkdtemp(prefix="pgdbpool-test-"))
    cache.chmod(0o755)
    monkeypatch.setattr(install, "CACHE", cache / "cache")
    yield site
    shutil.rmtree(cache)


@as_root
def test_root_copies_programs_that_the_servers_user_cannot_reach(hidden_wheel: Path) -> None:
    umask = os.umask(0o077)
    try:
        with Cluster(standbys=1, version=18) as cluster:
            programs = {each.pid: Path(each.args[0]) for each in watchdog.processes()}
            assert all(programs[node.pid].is_relative_to(install.CACHE) for node in cluster.nodes)
            cluster.primary.execute("CREATE TABLE t AS SELECT 1 AS i")
            cluster.standbys[0].rejoin(cluster.primary)  # needs libpq, which lies beside the programs
            cluster.wait_in_sync()
    finally:
        os.umask(umask)
    [copy] = install.CACHE.iterdir()
    made = copy.stat().st_ctime_ns
    assert install.find_installation(18, None).bin_dir.is_relative_to(copy)
    assert [each.stat().st_ctime_ns for each in install.CACHE.iterdir()] == [made], "copied once"
    found = [path.stat() for path in (install.CACHE, *install.CACHE.rglob("*"))]
    assert all(each.st_uid == 0 and not each.st_mode & 0o022 for each in found)


@as_root
@pytest.mark.parametrize("spoil", [lambda cache: cache.chmod(0o777), lambda cache: os.chown(cache, 1, 1)])
def test_root_refuses_a_cache_that_others_could_have_changed(
    hidden_wheel: Path, spoil: Callable[[Path], None]
) -> None:
    install.CACHE.mkdir()
    spoil(install.CACHE)
    with pytest.raises(ClusterError, match="only root can write"):
        install.find_installation(18, None)


@as_root
def test_root_reports_programs_that_no_other_user_can_run(tmp_path: Path) -> None:
    (tmp_path / "initdb").touch(mode=0o700)
    with pytest.raises(ClusterError, match=r"cannot run .*initdb: install it where others can"):
        install.find_installation(None, tmp_path)


@pytest.mark.skipif(not shutil.which("ps"), reason="no ps")
def test_processes_are_found_without_proc_too() -> None:
    us = next(process for process in watchdog._processes_by_ps() if process.pid == os.getpid())
    same = next(process for process in watchdog.processes() if process.pid == os.getpid())
    assert us[:3] == same[:3]
    assert us.args == " ".join(same.args).split()

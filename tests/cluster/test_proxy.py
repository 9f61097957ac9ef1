"""The proxy counts psycopg's round trips to the last one, and its faults look to a client like real ones."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import psycopg
import pytest
from proxy import Frontend, Proxy
from psycopg.rows import TupleRow

from pgdbpool.cluster import Cluster, Node

Connect = Callable[[], "psycopg.Connection[TupleRow]"]


@pytest.fixture
def node(known_cluster: Cluster) -> Node:
    return known_cluster.primary


@pytest.fixture
def proxy(node: Node, proxy_to: Callable[[Node], Proxy]) -> Proxy:
    return proxy_to(node)


@pytest.fixture
def connect(node: Node, proxy: Proxy) -> Iterator[Connect]:
    """A function that connects through the proxy and sets its counters to zero."""
    with ExitStack() as stack:

        def connect() -> psycopg.Connection[TupleRow]:
            connection = node.connect(port=proxy.port, prepare_threshold=None)
            stack.callback(connection.close)
            proxy.reset_counts()
            return connection

        yield connect


def eventually(condition: Callable[[], bool], timeout: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


def test_a_connect_without_password_is_two_round_trips_and_no_sync(node: Node, proxy: Proxy) -> None:
    with node.connect(port=proxy.port):
        assert (proxy.connections, proxy.round_trips, proxy.syncs) == (1, 2, 0)
    with node.connect(port=proxy.port, sslmode="disable"):
        assert (proxy.connections, proxy.round_trips, proxy.syncs) == (2, 3, 0)


@pytest.mark.parametrize("params", [None, (1,)])
def test_a_statement_is_one_round_trip(proxy: Proxy, connect: Connect, params: tuple[int] | None) -> None:
    connection = connect()
    for count in range(1, 11):
        connection.execute("SELECT %s::int" if params else "SELECT 1", params)
        assert (proxy.round_trips, proxy.syncs) == (count, count)


def test_a_pipeline_of_two_statements_is_one_round_trip(proxy: Proxy, connect: Connect) -> None:
    connection = connect()
    with connection.pipeline():
        connection.execute("SELECT set_config('a.b', %s, true)", ("c",))
        cursor = connection.execute("SELECT current_setting('a.b')")
    assert cursor.fetchone() == ("c",)
    assert (proxy.round_trips, proxy.syncs) == (1, 1)


def test_a_transaction_of_two_statements_is_four_round_trips(proxy: Proxy, connect: Connect) -> None:
    connection = connect()
    with connection.transaction():
        connection.execute("SELECT 1")
        connection.execute("SELECT 2")
    assert (proxy.round_trips, proxy.syncs) == (4, 4)


def test_an_error_is_one_round_trip(proxy: Proxy, connect: Connect) -> None:
    connection = connect()
    with pytest.raises(psycopg.errors.DivisionByZero):
        connection.execute("SELECT 1 / %s", (0,))
    assert (proxy.round_trips, proxy.syncs) == (1, 1)


def test_a_large_statement_and_a_large_answer_are_one_round_trip(proxy: Proxy, connect: Connect) -> None:
    connection = connect()
    sent, received = "a" * 3_000_000, 5_000_000
    row = connection.execute("SELECT length(%s::text), repeat('b', %s)", (sent, received)).fetchone()
    assert row is not None
    assert (row[0], len(row[1])) == (len(sent), received)
    assert (proxy.round_trips, proxy.syncs) == (1, 1)
    assert len(sent) < proxy.bytes_up < len(sent) + 1000
    assert received < proxy.bytes_down < received + 1000


def test_closing_a_connection_is_no_round_trip(proxy: Proxy, connect: Connect) -> None:
    connection = connect()
    connection.close()
    assert eventually(lambda: proxy.open_connections == 0)
    assert (proxy.round_trips, proxy.syncs, proxy.bytes_up) == (0, 0, 5)


def test_counters_sum_over_connections(proxy: Proxy, connect: Connect) -> None:
    first, second = connect(), connect()
    for connection in (first, second, first):
        connection.execute("SELECT 1")
    assert (proxy.connections, proxy.round_trips, proxy.syncs, proxy.open_connections) == (0, 3, 3, 2)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_messages_are_counted_however_tcp_cuts_them(size: int) -> None:
    def message(kind: bytes, body: bytes) -> bytes:
        return kind + struct.pack("!i", 4 + len(body)) + body

    stream = struct.pack("!ii", 8, 80877103) + struct.pack("!ii", 17, 196608) + b"user\0u\0\0\0"
    stream += message(b"Q", b"SELECT 'SSSSQ'\0") + message(b"P", b"\0SELECT 1\0\0\0") + message(b"S", b"")
    stream += message(b"d", b"Q\0\0\0\4" * 9) + message(b"S", b"") + message(b"X", b"")
    frontend = Frontend()
    counts = []
    for start in range(0, len(stream), size):
        counts.append(frontend.feed(stream[start : start + size]))
        if start + size == 8:
            frontend.answered(b"N")
    assert sum(counts) == 3


def test_nothing_is_counted_on_encrypted_connections() -> None:
    frontend = Frontend()
    assert frontend.feed(struct.pack("!ii", 8, 80877103)) == 0
    frontend.answered(b"S")
    assert frontend.feed(b"S\0\0\0\4" * 5) == 0


@pytest.mark.slow
def test_delay_is_paid_once_in_each_direction_and_not_shared(proxy: Proxy, connect: Connect) -> None:
    connections = [connect() for _ in range(5)]
    proxy.delay = 0.3
    threads = [threading.Thread(target=each.execute, args=("SELECT 1",)) for each in connections]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert 0.6 <= time.monotonic() - began < 2.5  # one after the other it would be 3


def test_delay_keeps_the_order_when_it_shrinks() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, Proxy(*server.getsockname()) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port)) as client, server.accept()[0] as accepted:
            proxy.delay = 0.1
            client.send(b"1")
            assert eventually(lambda: proxy.bytes_up == 1)
            proxy.delay = 0.0
            client.send(b"2")
            client.shutdown(socket.SHUT_WR)
            accepted.settimeout(5)
            with accepted.makefile("rb") as stream:
                assert stream.read() == b"12"


def test_a_server_that_refuses_is_a_reset_to_the_client() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with Proxy(*closed.getsockname()) as proxy:
            with pytest.raises(psycopg.OperationalError):
                psycopg.connect(host="127.0.0.1", port=proxy.port, connect_timeout=5)
            assert proxy.open_connections == 0


def test_stop_resets_connections_and_refuses_new_ones_until_start(
    node: Node, proxy: Proxy, connect: Connect
) -> None:
    connection = connect()
    proxy.stop()
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError, match="refused"):
        node.connect(port=proxy.port)
    proxy.start()
    assert connect().execute("SELECT 1").fetchone() == (1,)


@pytest.mark.slow
def test_stall_answers_nothing_and_resume_loses_nothing(node: Node, proxy: Proxy, connect: Connect) -> None:
    connection = connect()
    answers: list[TupleRow | None] = []
    proxy.stall()
    waiting = threading.Thread(target=lambda: answers.append(connection.execute("SELECT 1").fetchone()))
    waiting.start()
    with pytest.raises(psycopg.errors.ConnectionTimeout):
        node.connect(port=proxy.port, connect_timeout=2)
    assert not answers
    proxy.resume()
    waiting.join(10)
    assert answers == [(1,)]


def test_reset_all_sends_rst_and_close_all_fin(proxy: Proxy) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        assert eventually(lambda: proxy.open_connections == 1)
        proxy.close_all()
        assert client.recv(1) == b""
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        assert eventually(lambda: proxy.open_connections == 1)
        proxy.reset_all()
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_both_ends_of_a_broken_connection_end(node: Node, proxy: Proxy, connect: Connect) -> None:
    connection = connect()
    backend = connection.info.backend_pid
    proxy.reset_all()
    assert eventually(lambda: not node.execute("SELECT FROM pg_stat_activity WHERE pid = %s", (backend,)))


def test_a_terminated_backend_tells_the_client_why(node: Node, proxy: Proxy, connect: Connect) -> None:
    connection = connect()
    node.execute("SELECT pg_terminate_backend(%s, 5000)", (connection.info.backend_pid,))
    with pytest.raises(psycopg.errors.AdminShutdown):
        connection.execute("SELECT 1")


def test_copy_passes_in_both_directions(connect: Connect) -> None:
    connection = connect()
    connection.execute("CREATE TEMP TABLE lines (line text)")
    with connection.cursor().copy("COPY lines FROM STDIN") as copy:
        for _ in range(20):
            copy.write("x" * 100_000 + "\n")
    with connection.cursor().copy("COPY lines TO STDOUT") as copy:
        assert sum(len(block) for block in copy) == 20 * 100_001


def test_a_closed_proxy_leaves_no_thread_and_refuses(node: Node) -> None:
    with Proxy(node.host, node.port) as proxy, node.connect(port=proxy.port):
        pass
    assert f"proxy-{proxy.port}" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port))

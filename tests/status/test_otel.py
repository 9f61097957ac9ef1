"""OpenTelemetry's metrics and spans, read back by the SDK's own in-memory readers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support import config, wait_for

import pgdbpool
from pgdbpool import Connection, Handler

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")

from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pgdbpool import otel
from pgdbpool._lending.group import Group

POOL, STATE = otel.POOL, otel.STATE


@pytest.fixture
def pools(known_cluster: Any, mode: str, tmp_path: Any) -> Iterator[None]:
    try:
        groups = {"g": {"connection_count": 2, "min_size": 1}, "tx": {"autocommit": False, "min_size": 1}}
        settings = config(known_cluster.nodes[:1], mode, **groups)
        Connection.init({**settings, "runtime_dir": str(tmp_path / "run")})
        yield
    finally:
        otel.uninstrument()
        Connection.reset()


class Measured:
    """The metrics, by name and attributes."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self.provider = MeterProvider([self._reader])

    def __call__(self, name: str, **attributes: str) -> Any:
        """Return the data point of a metric of the group `g`, or None."""
        wanted = {POOL: "g", **({STATE: attributes["state"]} if attributes else {})}
        data = self._reader.get_metrics_data()
        for resource in data.resource_metrics if data else ():
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    for point in metric.data.data_points:
                        names = (name, f"db.client.connection.{name}")
                        if metric.name in names and point.attributes == wanted:
                            return point
        return None


@pytest.fixture
def measured(pools: None) -> Measured:
    measured = Measured()
    otel.instrument(meter_provider=measured.provider)
    return measured


@pytest.fixture
def spans(pools: None) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    otel.instrument(tracer_provider=provider, spans=True)
    yield exporter
    provider.shutdown()


def finished(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def test_connections_are_counted_by_state(measured: Measured) -> None:
    assert measured("count", state="idle").value == 1
    assert measured("count", state="used").value == 0
    with Handler("g") as db:
        db.query("SELECT 1")
        assert measured("count", state="idle").value == 0
        assert measured("count", state="used").value == 1
    assert measured("max").value == measured("idle.max").value == 2
    assert measured("idle.min").value == 1
    assert measured("pending_requests").value == 0


def test_a_paused_group_is_measured(measured: Measured) -> None:
    assert measured("pgdbpool.paused").value == 0
    Connection.pause("g", 30)
    assert measured("pgdbpool.paused").value == 1
    Connection.resume("g")
    assert measured("pgdbpool.paused").value == 0


@pytest.mark.slow
def test_guards_are_counted(measured: Measured, known_cluster: Any, mode: str) -> None:
    Connection.reset()
    groups = {"g": {"target": "standby", "fresh_wait": 0}, "w": {"target": "primary"}}
    Connection.init(config(known_cluster.nodes, mode, **groups))
    token = Connection.token("w")
    assert token is not None
    known_cluster.primary.execute(
        "CHECKPOINT"
    )  # standbys get what is flushed, and another session may have written
    known_cluster.wait_in_sync()
    Connection.fetchval("g", "SELECT 1", after=token)
    position = token.positions[0]
    with pytest.raises(pgdbpool.StaleReadError):
        Connection.fetchval(
            "g", "SELECT 1", after=pgdbpool.Token([position._replace(lsn=position.lsn + 2**40)])
        )
    assert measured("pgdbpool.guards_passed").value == 1
    assert measured("pgdbpool.guards_failed").value == 1
    assert measured("pgdbpool.fresh_waits").value == 0
    assert measured("pgdbpool.fresh_from_primary").value == 0
    assert measured("pgdbpool.fresh_refused").value == 1


def test_durations_are_measured(measured: Measured) -> None:
    for _ in range(5):
        with Handler("g") as db:
            db.query("SELECT pg_sleep(0.02)")
    used = measured("use_time")
    assert used.count == 5
    assert used.sum >= 0.1
    assert used.explicit_bounds == otel.BOUNDS
    assert measured("wait_time").count == 5
    with Handler("g"), Handler("g") as db:
        db.query("SELECT 1")
    assert measured("create_time").count >= 1


def test_timeouts_and_waiters_are_counted(measured: Measured, mode: str) -> None:
    with Handler("g"), Handler("g"), pytest.raises(pgdbpool.PoolTimeout):
        Handler("g", timeout=0.05).__enter__()
    assert measured("timeouts").value == 1
    if mode == "threaded":

        def wait_too() -> None:
            with Handler("g", timeout=10):
                pass

        waiter = threading.Thread(target=wait_too)
        with Handler("g"), Handler("g"):
            waiter.start()
            wait_for(lambda: measured("pending_requests").value == 1, what="one waits")
        waiter.join()


def test_spans_nest_in_that_of_the_application(spans: InMemorySpanExporter, known_cluster: Any) -> None:
    application = TracerProvider().get_tracer("application")
    with application.start_as_current_span("request") as request, Handler("tx") as db:
        db.query("SELECT %s::text || 'literal'", ("parameter",))
    found = finished(spans)
    assert list(found) == ["checkout tx", "SELECT postgres", "COMMIT postgres"]
    for span in found.values():
        assert span.parent is not None
        assert span.parent.span_id == request.get_span_context().span_id
        assert span.context is not None
        assert span.context.trace_id == request.get_span_context().trace_id
        assert span.kind is trace.SpanKind.CLIENT
    attributes = dict(found["SELECT postgres"].attributes or {})
    assert attributes == {
        "db.system.name": "postgresql",
        "db.namespace": "postgres",
        "db.operation.name": "SELECT",
        "db.query.text": "SELECT %s::text || '...'",
        "server.address": known_cluster.primary.host,
        "server.port": known_cluster.primary.port,
    }


def test_a_failed_statement_is_marked_without_the_values_in_its_error(spans: InMemorySpanExporter) -> None:
    with Handler("g") as db, pytest.raises(pgdbpool.DBQueryError):
        db.query("SELECT %s::int", ("no number",))
    span = finished(spans)["SELECT postgres"]
    assert span.status.status_code is trace.StatusCode.ERROR
    assert span.attributes is not None
    assert span.attributes["db.response.status_code"] == "22P02"
    assert "no number" not in span.to_json()


@pytest.mark.slow
def test_each_way_to_send_a_statement_makes_one_span(spans: InMemorySpanExporter) -> None:
    with Handler("tx") as db:
        db.execute("CREATE TEMPORARY TABLE t (n int)")
        db.executemany("INSERT INTO t VALUES (%s)", [(1,), (2,)])
        assert db.fetchval("SELECT count(*) FROM t") == 2
    Connection.fetch("g", "SHOW server_version")
    names = [span.name for span in spans.get_finished_spans()]
    expected = [
        "checkout tx",
        "CREATE postgres",
        "BATCH INSERT postgres",
        "SELECT postgres",
        "COMMIT postgres",
    ]
    assert names == [*expected, "checkout g", "SHOW postgres"]


@pytest.mark.parametrize(("sets", "size"), [([], 0), ([(1,)], None), ([(1,), (2,)], 2)])
def test_a_batch_has_its_size_in_its_span(
    spans: InMemorySpanExporter, sets: list[Any], size: int | None
) -> None:
    with Handler("tx") as db:
        db.executemany("SELECT %s::int", iter(sets))
    name = "SELECT postgres" if size is None else "BATCH SELECT postgres"
    attributes = finished(spans)[name].attributes
    assert attributes is not None
    assert attributes.get("db.operation.batch.size") == size


def test_operations_are_measured_as_the_conventions_have_it(pools: None, known_cluster: Any) -> None:
    reader = InMemoryMetricReader()
    otel.instrument(meter_provider=MeterProvider([reader]))
    with Handler("tx") as db:
        db.query("select 1")
        db.fetchval("SELECT 2")
    with Handler("g") as db, pytest.raises(pgdbpool.DBQueryError):
        db.query("SELECT 1 / 0")
    data = reader.get_metrics_data()
    assert data is not None
    scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
    assert {(scope.scope.name, scope.scope.version) for scope in scopes} == {
        ("pgdbpool", pgdbpool.__version__)
    }
    (metric,) = [m for scope in scopes for m in scope.metrics if m.name == "db.client.operation.duration"]
    assert metric.unit == "s"
    found = {
        (point.attributes["db.operation.name"], point.attributes.get("db.response.status_code")): point
        for point in metric.data.data_points
    }
    assert {key: point.count for key, point in found.items()} == {
        ("SELECT", None): 2, ("COMMIT", None): 1, ("SELECT", "22012"): 1,
    }  # fmt: skip
    point = found["SELECT", None]
    assert point.explicit_bounds == otel.OPERATION_BOUNDS
    assert dict(point.attributes) == {
        "db.system.name": "postgresql",
        "db.namespace": "postgres",
        "db.operation.name": "SELECT",
        "server.address": known_cluster.primary.host,
        "server.port": known_cluster.primary.port,
    }
    assert found["SELECT", "22012"].attributes["error.type"] == "DivisionByZero"


def test_connections_without_instrumentation_are_unchanged(pools: None) -> None:
    checkout = Group.checkout
    otel.instrument(meter_provider=MeterProvider())
    otel.instrument(meter_provider=MeterProvider(), tracer_provider=TracerProvider(), spans=True)
    assert Group.checkout is not checkout
    otel.uninstrument()
    assert Group.checkout is checkout

"""OpenTelemetry: metrics of the pools and, on request, spans of checkouts and statements (extra `otel`).

The names are those of OpenTelemetry's semantic conventions:
https://opentelemetry.io/docs/specs/semconv/database/
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from time import monotonic
from typing import TYPE_CHECKING, Any

try:
    from opentelemetry import metrics, trace
    from opentelemetry.metrics import CallbackOptions, Observation
    from opentelemetry.trace import SpanKind, Status, StatusCode
except ImportError as error:  # the module's own name would only puzzle
    raise ImportError("pgdbpool.otel needs opentelemetry-api: pip install 'pgdbpool[otel]'") from error

from . import __version__
from ._api.connection import open_pools
from ._process import tracer as tracing
from ._session.statement_text import text_of, without_values
from .stats import GroupStatus

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Tracer, TracerProvider

    from ._session.connection import PooledConnection

__all__ = ["instrument", "uninstrument"]

Observe = Callable[[CallbackOptions], Iterable[Observation]]

POOL, STATE = "db.client.connection.pool.name", "db.client.connection.state"
OPERATION_BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
"""The same for `db.client.operation.duration`, as the conventions specify."""
BOUNDS = (0.00001, 0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
"""Upper bounds of the histograms' buckets in seconds, unless a view of the SDK sets others."""

_FRESHNESS = {
    "guards_passed": ("{guard}", "Guards of reads that must see a token, whose standby had it."),
    "guards_failed": ("{guard}", "Guards whose standby did not have it."),
    "fresh_waits": ("{read}", "Reads that waited for a standby to have it."),
    "fresh_from_primary": ("{read}", "Reads that went to the primary, since no standby had it."),
    "fresh_refused": ("{read}", "Reads that raised StaleReadError."),
}
_WORD = re.compile(r"\s*([A-Za-z]+)")


def instrument(
    *,
    meter_provider: MeterProvider | None = None,
    tracer_provider: TracerProvider | None = None,
    spans: bool = False,
    statements: bool = True,
) -> None:
    """Measure the pools of this process from now on; a later call replaces the effect of an earlier one.

    Call it once in each process, and again in a forked child: exporters do not survive a fork.

    :param meter_provider: the global one if left out.
    :param tracer_provider: the global one if left out.
    :param spans: make a span of each checkout, statement and COMMIT, within the current one.
    :param statements: put the statement's text into its span, without parameters and string literals.
    """
    uninstrument()
    meter = metrics.get_meter("pgdbpool", __version__, meter_provider)
    _observe(meter)
    tracer = trace.get_tracer("pgdbpool", __version__, tracer_provider) if spans else None
    tracing.use(_PoolTracer(meter, tracer, statements))


def uninstrument() -> None:
    """Stop measuring durations and making spans; gauges go with their meter provider."""
    tracing.use(None)


# Gauges.


def _observe(meter: metrics.Meter) -> None:
    def of_each(
        value: Callable[[GroupStatus], int],
    ) -> list[Callable[[CallbackOptions], Iterable[Observation]]]:
        return [lambda options: [Observation(value(group), {POOL: group.name}) for group in _groups()]]

    def count(options: CallbackOptions) -> Iterator[Observation]:
        for group in _groups():
            yield Observation(group.idle, {POOL: group.name, STATE: "idle"})
            yield Observation(group.in_use, {POOL: group.name, STATE: "used"})

    prefix = "db.client.connection."
    meter.create_observable_up_down_counter(
        f"{prefix}count", [count], "{connection}", "Connections, by whether a block has them."
    )
    gauges: dict[str, tuple[Callable[[GroupStatus], int], str, str]] = {
        "idle.max": (lambda group: group.max_size, "{connection}", "Most connections that may be idle."),
        "idle.min": (lambda group: group.min_size, "{connection}", "Connections that are kept."),
        "max": (lambda group: group.max_size, "{connection}", "Most connections that may be open."),
        "pending_requests": (lambda group: group.waiting, "{request}", "Blocks that wait for a connection."),
    }
    for name, (value, unit, meaning) in gauges.items():
        meter.create_observable_up_down_counter(f"{prefix}{name}", of_each(value), unit, meaning)
    meter.create_observable_gauge(
        "pgdbpool.paused", of_each(lambda group: group.paused is not None), "1",
        "Whether the group holds new blocks back.",
    )  # fmt: skip
    meter.create_observable_counter(
        f"{prefix}timeouts", of_each(lambda group: group.timeouts), "{timeout}",
        "Blocks that got no connection in time.",
    )  # fmt: skip
    for name, (unit, meaning) in _FRESHNESS.items():
        meter.create_observable_counter(f"pgdbpool.{name}", of_each(attrgetter(name)), unit, meaning)


def _groups() -> Iterator[GroupStatus]:
    for pools in open_pools():
        yield from pools.status().groups.values()


# Durations and spans.


class _PoolTracer:
    """Measures checkouts, connections and statements, and makes spans if there is a tracer for them."""

    def __init__(self, meter: metrics.Meter, tracer: Tracer | None, statements: bool) -> None:
        def histogram(name: str, meaning: str, bounds: tuple[float, ...] = BOUNDS) -> Any:
            made = meter.create_histogram(
                f"db.client.{name}", "s", meaning, explicit_bucket_boundaries_advisory=bounds
            )
            return made.record

        self._waited = histogram("connection.wait_time", "How long a block waited for an open connection.")
        self._used = histogram("connection.use_time", "How long a block had a connection.")
        self._created = histogram("connection.create_time", "How long it took to open a connection.")
        self._took = histogram(
            "operation.duration", "Duration of database client operations.", OPERATION_BOUNDS
        )
        self._tracer = tracer
        self._texts = statements and tracer is not None

    def checkout(self, group: str, take: Callable[[], PooledConnection]) -> PooledConnection:
        began = monotonic()
        with _span(self._tracer, f"checkout {group}", {POOL: group}) as span:
            conn = take()
            if span is not None:
                span.set_attributes(_server(conn))
        self._waited(monotonic() - began, {POOL: group})
        return conn

    def checkin(self, group: str, seconds: float) -> None:
        self._used(seconds, {POOL: group})

    def connect(self, group: str, seconds: float) -> None:
        self._created(seconds, {POOL: group})

    @contextmanager
    def statement(self, conn: PooledConnection, query: Any, sets: int) -> Iterator[None]:
        text = text_of(query) or ""
        attributes = _server(conn)
        words = ["BATCH"] if sets != 1 else []
        if word := _WORD.match(text):
            words.append(word[1].upper())
        if words:
            attributes["db.operation.name"] = " ".join(words)
        more: dict[str, Any] = {"db.query.text": without_values(text)} if self._texts else {}
        if sets != 1:
            more["db.operation.batch.size"] = sets
        name = " ".join([*words, attributes.get("db.namespace", "")]).strip()
        began = monotonic()
        try:
            with _span(self._tracer, name, {**attributes, **more}):
                yield
        except BaseException as error:
            attributes |= _failure(error)
            raise
        finally:
            self._took(monotonic() - began, attributes)


def _server(conn: PooledConnection) -> dict[str, Any]:
    if conn.closed:
        return {"db.system.name": "postgresql"}
    pgconn = conn.pgconn
    return {
        "db.system.name": "postgresql",
        "db.namespace": pgconn.db.decode(),
        "server.address": pgconn.host.decode(),
        "server.port": int(pgconn.port.decode() or 5432),
    }


def _span(tracer: Tracer | None, name: str, attributes: dict[str, Any]) -> AbstractContextManager[Any]:
    return nullcontext() if tracer is None else _open_span(tracer, name, attributes)


@contextmanager
def _open_span(tracer: Tracer, name: str, attributes: dict[str, Any]) -> Iterator[trace.Span]:
    # The library would record the error's text, and with it values of the refused row.
    with tracer.start_as_current_span(
        name, kind=SpanKind.CLIENT, attributes=attributes, record_exception=False,
        set_status_on_exception=False,
    ) as span:  # fmt: skip
        try:
            yield span
        except BaseException as error:
            span.set_attributes(_failure(error))
            span.set_status(Status(StatusCode.ERROR))
            raise


def _failure(error: BaseException) -> dict[str, str]:
    found = {"error.type": type(error).__name__}
    if sqlstate := getattr(error, "sqlstate", None):
        found["db.response.status_code"] = sqlstate
    return found

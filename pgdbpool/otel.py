"""OpenTelemetry: metrics of the pools and, where wanted, spans of checkouts and statements (extra `otel`).

The names are those of OpenTelemetry's semantic conventions:
https://opentelemetry.io/docs/specs/semconv/database/

Nothing in the pool knows of it: `instrument` puts functions that measure in the place of those they call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from time import monotonic
from typing import TYPE_CHECKING, Any

try:
    from opentelemetry import metrics, trace
    from opentelemetry.metrics import CallbackOptions, Observation
    from opentelemetry.trace import SpanKind, Status, StatusCode
except ImportError as error:  # the module's own name would only puzzle
    raise ImportError("pgdbpool.otel needs opentelemetry-api: pip install 'pgdbpool[otel]'") from error

from . import __version__
from ._api.connection import Connection
from ._lending import group as opening
from ._lending.group import Group
from ._servers.endpoint import Endpoint
from ._session.block import Block
from ._session.commands import IDLE
from ._session.connection import PooledConnection
from ._session.cursors import BlockCursor, BlockServerCursor
from ._session.statement_text import text_of, without_values
from ._session.transactions import TransactingConnection
from .errors import NotInitializedError
from .stats import GroupStatus

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Tracer, TracerProvider

__all__ = ["instrument", "uninstrument"]

Observe = Callable[[CallbackOptions], Iterable[Observation]]

POOL, STATE = "db.client.connection.pool.name", "db.client.connection.state"
OPERATION_BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
"""The same for `db.client.operation.duration`, as the conventions have them."""
BOUNDS = (0.00001, 0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
"""Where the buckets of the histograms end, in seconds, unless a view of the SDK says otherwise."""

_WORD = re.compile(r"\s*([A-Za-z]+)")
_replaced: list[tuple[type[Any], str, Any]] = []
"""What `instrument` has put aside: class, name and the function itself."""


def instrument(
    *,
    meter_provider: MeterProvider | None = None,
    tracer_provider: TracerProvider | None = None,
    spans: bool = False,
    statements: bool = True,
) -> None:
    """Measure the pools of this process from now on, in place of what an earlier call has set up.

    Call it once in each process, also where it was forked after that: OpenTelemetry's exporters do not
    survive a fork.

    :param meter_provider: where the metrics go; the global one if left out.
    :param tracer_provider: where the spans go; the global one if left out.
    :param spans: make a span of each checkout, statement and COMMIT, within the current one.
    :param statements: have the text of the statement in its span, without parameters and without strings
        that are written into it.
    """
    uninstrument()
    meter = metrics.get_meter("pgdbpool", __version__, meter_provider)
    _observe(meter)
    tracer = trace.get_tracer("pgdbpool", __version__, tracer_provider) if spans else None
    _measure(meter, tracer)
    _follow(meter, tracer, statements)


def uninstrument() -> None:
    """Stop measuring durations and making spans; gauges go with their meter provider."""
    while _replaced:
        owner, name, function = _replaced.pop()
        setattr(owner, name, function)


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    function = owner.__dict__[name]
    _replaced.append((owner, name, function))
    setattr(owner, name, make(function))


# What is now.


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
    meter.create_observable_counter(
        f"{prefix}timeouts", of_each(lambda group: group.timeouts), "{timeout}",
        "Blocks that got no connection in time.",
    )  # fmt: skip


def _groups() -> Iterable[GroupStatus]:
    try:
        return Connection.status().groups.values()
    except NotInitializedError:
        return ()


# How long it takes.


def _measure(meter: metrics.Meter, tracer: Tracer | None) -> None:
    def histogram(name: str, meaning: str) -> Callable[[float, dict[str, str]], None]:
        made = meter.create_histogram(
            f"db.client.connection.{name}", "s", meaning, explicit_bucket_boundaries_advisory=BOUNDS
        )
        return made.record

    waited = histogram("wait_time", "How long a block waited for an open connection.")
    used = histogram("use_time", "How long a block had a connection.")
    created = histogram("create_time", "How long it took to open a connection.")

    def checkout(function: Any) -> Any:
        def measured(group: Group, block: Block, timeout: float | None = None) -> PooledConnection:
            began = monotonic()
            with _span(tracer, f"checkout {group.name}", {POOL: group.name}) as span:
                conn: PooledConnection = function(group, block, timeout)
                if span is not None:
                    span.set_attributes(_server(conn))
            waited(monotonic() - began, {POOL: group.name})
            return conn

        return measured

    def back(function: Any) -> Any:
        def measured(group: Group, conn: PooledConnection, *reason: str) -> None:
            since = None if conn.block is None else conn.block.since
            function(group, conn, *reason)
            if since is not None:
                used(monotonic() - since, {POOL: group.name})

        return measured

    def dial(function: Any) -> Any:
        def measured(endpoint: Endpoint, group: Any, *arguments: Any) -> PooledConnection:
            began = monotonic()
            conn: PooledConnection = function(endpoint, group, *arguments)
            created(monotonic() - began, {POOL: group.name})
            return conn

        return measured

    _replace(Group, "checkout", checkout)
    _replace(Group, "checkin", back)
    _replace(Group, "discard", back)
    _replace(opening, "dial", dial)


# Operations: statements and COMMITs.


class _Operations:
    """Measures each operation, and makes a span of it where there is a tracer."""

    def __init__(self, meter: metrics.Meter, tracer: Tracer | None, statements: bool) -> None:
        self._record = meter.create_histogram(
            "db.client.operation.duration", "s", "Duration of database client operations.",
            explicit_bucket_boundaries_advisory=OPERATION_BOUNDS,
        ).record  # fmt: skip
        self._tracer = tracer
        self._texts = statements and tracer is not None

    @contextmanager
    def one(self, conn: PooledConnection, query: Any, sets: int = 1) -> Iterator[None]:
        """Measure the operation that is the body: a statement, or a batch of so many sets of parameters."""
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
            self._record(monotonic() - began, attributes)


def _follow(meter: metrics.Meter, tracer: Tracer | None, statements: bool) -> None:
    operations = _Operations(meter, tracer, statements)

    def sending(function: Any) -> Any:
        def followed(cursor: Any, query: Any, *arguments: Any, **options: Any) -> Any:
            with operations.one(cursor._conn, query):
                return function(cursor, query, *arguments, **options)

        return followed

    def sending_many(function: Any) -> Any:
        def followed(cursor: Any, query: Any, params_seq: Iterable[Any], **options: Any) -> Any:
            sets = params_seq if isinstance(params_seq, Sequence) else list(params_seq)
            with operations.one(cursor._conn, query, len(sets)):
                return function(cursor, query, sets, **options)

        return followed

    def committing(function: Any) -> Any:
        def followed(conn: PooledConnection) -> None:
            if conn.pgconn.transaction_status == IDLE:
                function(conn)
                return
            with operations.one(conn, "COMMIT"):
                function(conn)

        return followed

    _replace(BlockCursor, "execute", sending)
    _replace(BlockCursor, "executemany", sending_many)
    _replace(BlockServerCursor, "execute", sending)
    _replace(TransactingConnection, "commit", committing)


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
    # The library would note the error's text, and with it values of the row that was refused.
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

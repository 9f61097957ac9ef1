"""Metrics for Prometheus, of all processes of an application (extra `metrics`).

They come from the snapshots that the processes publish in the `runtime_dir`, so that any process can answer
for all, and counters do not shrink when a process ends. Without a `runtime_dir` they cover this process only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from itertools import accumulate
from typing import TYPE_CHECKING, Any

try:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector
except ImportError as error:  # the module's own name would only puzzle
    raise ImportError("pgdbpool.metrics needs prometheus-client: pip install 'pgdbpool[metrics]'") from error

from .errors import NotInitializedError, RuntimeDirError
from .overview import gather
from .wsgi._access import AccessCheck, HTTPResponse, Permission

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

__all__ = ["COUNTERS", "GAUGES", "HISTOGRAMS", "MetricsApp", "PoolCollector"]

COUNTERS = {
    "checkouts": ("blocks", "Blocks that got a connection."),
    "waits": ("waits", "Blocks that waited for a connection and got one."),
    "timeouts": ("timeouts", "Blocks that got no connection in time."),
    "rate_limited": ("rate_limited", "Blocks that rate_limit refused."),
    "retries": ("retries", "Statements and units of work that were sent again."),
    "leaks": ("leaks", "Blocks that had a connection for longer than leak_after."),
    "overdue": ("overdue", "Blocks whose connection was taken away after max_hold."),
    "slow_blocks": ("slow_blocks", "Blocks that took longer than slow_block."),
    "slow_statements": ("slow_statements", "Statements that took longer than slow_query."),
    "not_replicated": ("not_replicated", "Commits that stopped waiting for their synchronous standby."),
    "guards_passed": ("guards_passed", "Guards of reads that must see a token, whose standby had it."),
    "guards_failed": ("guards_failed", "Guards whose standby did not have it."),
    "fresh_waits": ("fresh_waits", "Reads that waited for a standby to have it."),
    "fresh_from_primary": ("fresh_from_primary", "Reads that went to the primary, since no standby had it."),
    "fresh_refused": ("fresh_refused", "Reads that raised StaleReadError."),
    "opened": ("connections_opened", "Connections that were opened."),
}
"""Of each group: name in the status; the metric's name between `pgdbpool_` and `_total`, and its help."""

GAUGES = {
    "in_use": ("connections_in_use", "Connections that blocks have."),
    "idle": ("connections_idle", "Connections that wait for a block."),
    "left": ("sessions_left", "Sessions that were left in a commit, and that their servers have not let go."),
    "waiting": ("waiting", "Blocks that wait for a connection."),
    "paused_in": ("paused_processes", "Processes in which the group holds new blocks back."),
    "min_size": ("connections_min", "Connections that are kept, in all processes."),
    "max_size": ("connections_max", "Most connections there can be, in all processes."),
}
"""Of each group, in the same way."""

HISTOGRAMS = {
    "wait": ("wait_seconds", "How long blocks waited for a connection."),
    "use": ("use_seconds", "How long blocks had a connection."),
    "connect": ("connect_seconds", "How long it took to open a connection."),
}
"""Of each group, the last two by endpoint too."""

_ENDPOINT = {
    "lag_bytes": ("endpoint_lag_bytes", "How far a standby is behind; if a group has max_lag."),
    "lag_seconds": ("endpoint_lag_seconds", "How far a standby is behind; if a group has max_lag."),
    "round_trip": ("endpoint_round_trip_seconds", "A round trip on the network, as the kernel measured it."),
}


class PoolCollector(Collector):
    """Collects the metrics of all processes; register it with a registry of `prometheus_client`.

    :param runtime_dir: the directory to read, in place of that of the process's configuration.
    """

    def __init__(self, runtime_dir: str | None = None) -> None:
        self._runtime_dir = runtime_dir

    def describe(self) -> Iterable[Metric]:
        """Return nothing: names are known only with the groups, and the pools may not be open yet."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Return the metrics as they are now; none before `Connection.init`.

        :raises RuntimeDirError: the directory is missing, or other users can use it.
        """
        try:
            view = gather(self._runtime_dir)
        except NotInitializedError:
            return
        serving = sum(not process["forks"] for process in view["processes"])
        yield GaugeMetricFamily("pgdbpool_processes", "Processes that publish their status.", value=serving)
        yield from _of_endpoints(view["endpoints"])
        yield from _of_groups(view["groups"], view["buckets"])


class MetricsApp:
    """A WSGI application that answers with the metrics of all processes; mount it at ``/metrics``.

    Without `authorize` and `token` it answers requests from this machine only; see `StatusApp`. Prometheus
    sends a token with ``authorization: {credentials: ...}``.

    :param authorize: takes the environ and returns whether the request may have the metrics.
    :param token: at least 16 characters.
    :param runtime_dir: the directory to read, in place of that of the process's configuration.
    :raises ValueError: `authorize` and `token` are both given, or the token is too short.
    """

    def __init__(
        self,
        *,
        authorize: Permission | None = None,
        token: str | None = None,
        runtime_dir: str | None = None,
    ) -> None:
        self._access = AccessCheck(authorize, token)
        self._registry = CollectorRegistry()
        self._registry.register(PoolCollector(runtime_dir))

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        status, headers = HTTPStatus.OK, []
        try:
            self._access.admit(environ)
            encode, kind = choose_encoder(environ.get("HTTP_ACCEPT", ""))
            body = encode(self._registry)
        except HTTPResponse as answer:
            status, headers = answer.status, [*answer.headers]
            body, kind = str(answer).encode(), "text/plain; charset=utf-8"
        except (RuntimeDirError, OSError) as error:
            status, body, kind = HTTPStatus.SERVICE_UNAVAILABLE, str(error).encode(), "text/plain"
        headers += [("Content-Type", kind), ("Content-Length", str(len(body)))]
        start_response(f"{status.value} {status.phrase}", headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


def _of_endpoints(endpoints: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    states = GaugeMetricFamily(
        "pgdbpool_endpoint_processes",
        "Processes for which the endpoint is in the state.",
        labels=("endpoint", "state"),
    )
    primary = GaugeMetricFamily(
        "pgdbpool_endpoint_primary", "Whether the endpoint is a primary.", labels=("endpoint",)
    )
    outdated = GaugeMetricFamily(
        "pgdbpool_endpoint_outdated",
        "Whether the endpoint takes writes on an older timeline than another server.",
        labels=("endpoint",),
    )
    for endpoint in endpoints:
        outdated.add_metric((endpoint["label"],), endpoint["outdated"])
        for state in ("up", "down", "draining"):
            states.add_metric((endpoint["label"], state), endpoint["states"].get(state, 0))
        if endpoint["role"] is not None:
            primary.add_metric((endpoint["label"],), endpoint["role"] == "primary")
    yield from (states, primary, outdated)
    for key, (name, meaning) in _ENDPOINT.items():
        gauge = GaugeMetricFamily(f"pgdbpool_{name}", meaning, labels=("endpoint",))
        for endpoint in endpoints:
            if endpoint[key] is not None:
                gauge.add_metric((endpoint["label"],), endpoint[key])
        yield gauge


def _of_groups(groups: Sequence[Mapping[str, Any]], bounds: Sequence[float]) -> Iterator[Metric]:
    yield from _by_group(GaugeMetricFamily, GAUGES, groups)
    yield from _connections(groups)
    yield from _by_group(CounterMetricFamily, COUNTERS, groups)
    yield from _histograms(groups, bounds)


def _by_group(
    family: Any, names: Mapping[str, tuple[str, str]], groups: Sequence[Mapping[str, Any]]
) -> Iterator[Metric]:
    for key, (name, meaning) in names.items():
        metric = family(f"pgdbpool_{name}", meaning, labels=("group",))
        for group in groups:
            metric.add_metric((group["name"],), group[key])
        yield metric


def _connections(groups: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    placed = GaugeMetricFamily("pgdbpool_connections", "Connections.", labels=("group", "endpoint"))
    closed = CounterMetricFamily(
        "pgdbpool_connections_closed", "Connections that the pool closed.", labels=("group", "reason")
    )
    for group in groups:
        for label, number in group["connections"].items():
            placed.add_metric((group["name"], label), number)
        for reason, number in group["discarded"].items():
            closed.add_metric((group["name"], reason), number)
    yield from (placed, closed)


def _histograms(groups: Sequence[Mapping[str, Any]], bounds: Sequence[float]) -> Iterator[Metric]:
    for key, (name, meaning) in HISTOGRAMS.items():
        labels = ("group",) if key == "wait" else ("group", "endpoint")
        histogram = HistogramMetricFamily(f"pgdbpool_{name}", meaning, labels=labels)
        for group in groups:
            tallies = {"": group[key]} if key == "wait" else group[key]
            for label, tally in tallies.items():
                names = (group["name"], label)[: len(labels)]
                ends = [*(repr(bound) for bound in bounds), "+Inf"]
                sums = zip(ends, accumulate(tally["counts"]), strict=True)
                histogram.add_metric(names, list(sums), tally["sum"])
        yield histogram

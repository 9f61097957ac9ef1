"""Metrics for Prometheus, read with Prometheus's own parser."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from site_of_processes import APPLICATION, Site
from support import config, kill_backends, server, wait_for

from pgdbpool import Connection, Handler
from pgdbpool.stats import BUCKETS

prometheus_client = pytest.importorskip("prometheus_client", reason="the extra metrics is not installed")

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from pgdbpool.metrics import COUNTERS, GAUGES, HISTOGRAMS, MetricsApp, PoolCollector  # noqa: E402

MEASURED = (
    APPLICATION
    + """
    from pgdbpool.metrics import MetricsApp
    application = mount(application, "/metrics", MetricsApp(token={token!r}))
"""
)
SENT = 200


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Return the samples by name and values of labels, in the order of the labels' names."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(site: Site) -> dict[tuple[str, ...], float]:
    status, headers, text = site.ask("/metrics")
    assert status == 200, text
    assert headers["Content-Type"].startswith("text/plain; version=")
    return samples(text)


@pytest.mark.slow
def test_the_scrape_of_four_workers_adds_up_to_the_load(known_cluster: Any, tmp_path: Path) -> None:
    servers = [server(node, label=f"db-{number}") for number, node in enumerate(known_cluster.nodes, 1)]
    groups = {"read": {"connection_count": 2}, "write": {"connection_count": 2, "target": "primary"}}
    workers = ("--workers", "4", "--worker-class", "sync")
    with Site(tmp_path, {"db": servers, "groups": groups}, *workers, application=MEASURED) as site:
        wait_for(lambda: len(site.overview()["processes"]) == 4, 20, "all workers publish")
        read = ("pgdbpool_blocks_total", "read")
        wait_for(lambda: scrape(site)[read] == 1, what="the request is counted that has found it running")
        before = scrape(site)
        served: Counter[str] = Counter(site.ask("/both")[2] for _ in range(SENT))
        assert len(served) > 1, "more than one worker was asked"

        def grown(*name: str) -> float:
            return scrape(site)[name] - before[name]

        # A process may tell its status between the two blocks of a request.
        wait_for(lambda: grown("pgdbpool_blocks_total", "write") == SENT, what="all requests are counted")
        assert grown("pgdbpool_blocks_total", "read") == SENT
        assert grown("pgdbpool_wait_seconds_count", "read") == SENT
        used = sum(
            grown("pgdbpool_use_seconds_count", endpoint, "read") for endpoint in ("db-1", "db-2", "db-3")
        )
        assert used == SENT
        found = scrape(site)
        assert found["pgdbpool_processes",] == 4
        assert found["pgdbpool_endpoint_processes", "db-1", "up"] == 4
        assert found["pgdbpool_connections_max", "read"] == 8

        # A worker that dies takes nothing of it away, and its successor adds to it.
        os.kill(int(served.most_common(1)[0][0]), signal.SIGKILL)
        wait_for(lambda: len(site.overview()["processes"]) == 3, what="the dead one is swept")
        assert scrape(site)["pgdbpool_blocks_total", "write"] == found["pgdbpool_blocks_total", "write"]
        wait_for(lambda: scrape(site)["pgdbpool_processes",] == 4, 20, "a new worker")
        site.ask("/both")
        wait_for(lambda: grown("pgdbpool_blocks_total", "write") == SENT + 1, what="counted on")
        assert site.ask("/metrics", token=None)[0] == 401


def test_every_metric_has_its_name_and_its_buckets(known_cluster: Any) -> None:
    registry = prometheus_client.CollectorRegistry()
    registry.register(PoolCollector())
    assert samples(prometheus_client.generate_latest(registry).decode()) == {}, "nothing before init"
    try:
        Connection.init(config(known_cluster.nodes[:1], g={"connection_count": 1}))
        for _ in range(3):
            with Handler("g") as db:
                db.query("SELECT 1")
        found = samples(prometheus_client.generate_latest(registry).decode())
    finally:
        Connection.reset()
    assert found["pgdbpool_blocks_total", "g"] == 3
    assert found["pgdbpool_connections_opened_total", "g"] == 1
    names = {key[0] for key in found}
    assert {f"pgdbpool_{name}_total" for name, _ in COUNTERS.values()} <= names
    assert {f"pgdbpool_{name}" for name, _ in GAUGES.values()} <= names
    for name, _ in HISTOGRAMS.values():
        buckets = [value for key, value in found.items() if key[0] == f"pgdbpool_{name}_bucket"]
        assert buckets == sorted(buckets)
        assert len(buckets) == len(BUCKETS) + 1


def test_metrics_answer_this_machine_alone_by_default() -> None:
    with pytest.raises(ValueError, match="16 at least"):
        MetricsApp(token="short")
    answered: list[str] = []
    environ = {"REQUEST_METHOD": "GET", "REMOTE_ADDR": "192.0.2.1", "HTTP_HOST": "localhost"}
    b"".join(MetricsApp()(environ, lambda status, headers: answered.append(status)))  # type: ignore[arg-type,return-value]
    assert answered == ["403 Forbidden"]


@pytest.mark.slow
def test_without_the_library_the_error_names_the_extra() -> None:
    code = "import sys; sys.modules['prometheus_client'] = None; import pgdbpool.metrics"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'pgdbpool[metrics]'" in done.stderr


def test_the_dashboard_has_every_metric_and_no_other(known_cluster: Any) -> None:
    text = (Path(__file__).parents[2] / "doc" / "grafana-dashboard.json").read_text(encoding="utf-8")
    asked = [target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"]]
    names = set(re.findall(r"\bpgdbpool_\w+", " ".join(asked)))
    try:
        Connection.init(config(known_cluster.nodes[:1], g={"connection_count": 1}))
        families = list(PoolCollector().collect())
    finally:
        Connection.reset()
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
    there = {each.name: {f"{each.name}{end}" for end in endings.get(each.type, ("",))} for each in families}
    assert names <= set().union(*there.values())
    assert {name for name, forms in there.items() if not forms & names} == set()


def states() -> dict[str, str]:
    return {label: endpoint.state for label, endpoint in Connection.status().endpoints.items()}


def test_an_application_without_requests_notices_that_a_server_died(known_cluster: Any, mode: str) -> None:
    (victim, other) = known_cluster.standbys
    servers = [server(victim, label="victim"), server(other, label="other")]
    try:
        Connection.init(config(servers, mode, g={"connection_count": 4, "min_size": 0}))
        with Handler("g"), Handler("g"):
            pass  # one connection to each
        assert Connection.status().groups["g"].idle == 2
        victim.kill()
        wait_for(lambda: states() == {"victim": "down", "other": "up"}, 5)
        assert Connection.status().groups["g"].connections == {"victim": 0, "other": 1}
    finally:
        Connection.reset()


def test_idle_connections_that_were_ended_alone_say_nothing_of_their_server(
    known_cluster: Any, mode: str
) -> None:
    servers = [server(known_cluster.primary, label="db")]
    try:
        Connection.init(config(servers, mode, g={"connection_count": 2, "min_size": 0}))
        with Handler("g"):
            pass
        with known_cluster.primary.connect(autocommit=True) as admin:
            kill_backends(admin)
        wait_for(lambda: Connection.status().groups["g"].discarded == {"lost": 1})
        pools = Connection._pools
        assert pools is not None
        wait_for(lambda: not pools.monitor.doubts.needed, what="the server has answered")
        assert states() == {"db": "up"}
    finally:
        Connection.reset()


@pytest.mark.slow
def test_a_master_that_loaded_the_application_counts_as_no_process(
    known_cluster: Any, tmp_path: Path
) -> None:
    servers = [server(known_cluster.primary, label="db")]
    settings = {"db": servers, "groups": {"read": {"connection_count": 4}, "write": {"connection_count": 1}}}
    workers = ("--workers", "2", "--worker-class", "gthread", "--threads", "2", "--preload")
    with Site(tmp_path, settings, *workers, application=MEASURED) as site:

        def told() -> tuple[float, ...]:
            site.ask("/both")  # until each worker has had a block
            found = scrape(site)
            names = ("pgdbpool_processes",), ("pgdbpool_connections_max", "read")
            return *(found[name] for name in names), found["pgdbpool_endpoint_processes", "db", "up"]

        wait_for(lambda: told() == (2, 8, 2), 20, "two workers and no master")
        assert sum(process["forks"] for process in site.overview()["processes"]) == 1

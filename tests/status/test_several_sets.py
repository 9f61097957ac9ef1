"""Several sets of pools of one process, as status, metrics and orders have them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support import config, wait_for

import pgdbpool
from pgdbpool import Connection, Pools
from pgdbpool._cli.main import main
from pgdbpool.overview import gather
from pgdbpool.wsgi import HealthApp

pytestmark = pytest.mark.slow


class Sets:
    """The default set on the primary, and another one, in one `runtime_dir`; both have a group `g`."""

    def __init__(self, cluster: Any, mode: str, place: Path | None) -> None:
        self.place = str(place)
        directory = {} if place is None else {"runtime_dir": str(place)}
        group = {"connection_count": 2, "min_size": 1, "timeout": 0.1}
        primary, standby = cluster.primary, cluster.standbys[0]
        self.primary, self.standby = (f"127.0.0.1:{node.port}" for node in (primary, standby))
        Connection.init({**config([primary, standby], mode, g=group), **directory})
        self.config = {**config([standby], mode, g=group, h=group), **directory}
        self.reports = Pools(self.config, name="reports")

    def work(self, number: int = 1) -> None:
        """Use both: without threads, this publishes and obeys."""
        for _ in range(number):
            for each in (Connection, self.reports):
                with suppress(pgdbpool.Error):
                    each.fetchval("g", "SELECT 1")

    def view(self) -> dict[str, Any]:
        self.work()
        return gather(self.place)

    def group(self, name: str) -> dict[str, Any]:
        return next(group for group in self.view()["groups"] if group["name"] == name)

    def command(self, capsys: Any, *words: str) -> list[dict[str, Any]]:
        """Give an order over the command line, and return the answers."""
        capsys.readouterr()
        main([*words[:1], self.place, *words[1:], "--json", "--timeout", "5"])
        found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["answers"]
        return found


@pytest.fixture
def sets(known_cluster: Any, tmp_path: Path) -> Iterator[Sets]:
    found = Sets(known_cluster, "threaded", tmp_path / "run")
    wait_for(lambda: {group["name"] for group in found.view()["groups"]} == {"g", "reports/g", "reports/h"})
    yield found
    found.reports.terminate()
    Connection.reset()


def test_each_set_publishes_and_none_hides_another(sets: Sets) -> None:
    sets.work(4)
    wait_for(lambda: sets.group("reports/g")["checkouts"] >= 5)
    view = sets.view()
    assert [(each["pid"], each["type"]) for each in view["processes"]] == [(os.getpid(), "threaded")]
    assert {each["name"]: set(each["connections"]) for each in view["groups"]} == {
        "g": {sets.primary, sets.standby},
        "reports/g": {sets.standby},
        "reports/h": {sets.standby},
    }
    assert {each["label"]: each["states"] for each in view["endpoints"]} == {
        sets.primary: {"up": 1}, sets.standby: {"up": 1},
    }  # fmt: skip
    assert {(each["set"], *each["pids"]) for each in view["configs"]} == {
        ("", os.getpid()), ("reports", os.getpid()),
    }  # fmt: skip
    assert {each["group"] for each in view["connections"]} >= {"g", "reports/g"}


def test_the_counters_of_a_closed_set_stay(sets: Sets) -> None:
    sets.work(4)
    before = sets.group("reports/g")["checkouts"]
    sets.reports.close()
    view = gather(sets.place)
    assert {group["name"] for group in view["groups"]} == {"g"}
    with Pools(sets.config, name="reports") as again:
        sets.reports = again
        assert wait_for(lambda: [g for g in gather(sets.place)["groups"] if g["name"] == "reports/g"])
        assert sets.group("reports/g")["checkouts"] >= before


def test_a_drain_reaches_every_set_that_has_the_server(sets: Sets, capsys: Any) -> None:
    answers = sets.command(capsys, "drain", "--endpoint", sets.standby, "--force")
    assert [(each["set"], each["done"]) for each in answers] == [("", True), ("reports", True)]
    assert Connection.status().endpoints[sets.standby].state == "draining"
    assert sets.reports.status().endpoints[sets.standby].state == "draining"
    drains = [event["pids"] for event in sets.view()["events"] if event["kind"] == "drain"]
    assert drains == [[os.getpid()]]  # one event, of one process
    answers = sets.command(capsys, "drain", "--endpoint", sets.primary, "--force")
    assert [each["set"] for each in answers] == [""]  # the other one has nothing to do with it
    for label in (sets.standby, sets.primary):
        sets.command(capsys, "undrain", "--endpoint", label)
    wait_for(lambda: sets.view()["ok"])


def test_an_order_for_a_group_reaches_its_set_alone(sets: Sets, capsys: Any) -> None:
    (answer,) = sets.command(capsys, "resize", "--group", "reports/g", "--connection-count", "3")
    assert (answer["set"], answer["text"]) == ("reports", "connection_count 3, min_size 1")
    sizes = [each.status().groups["g"].max_size for each in (Connection, sets.reports)]
    assert sizes == [2, 3]
    (answer,) = sets.command(capsys, "pause", "--group", "g")
    assert answer["set"] == ""
    assert sets.reports.fetchval("g", "SELECT 1") == 1
    wait_for(lambda: sets.group("g")["paused_in"] == 1)
    assert sets.group("reports/g")["paused_in"] == 0
    with pytest.raises(pgdbpool.PoolTimeout, match="paused"):
        Connection.fetchval("g", "SELECT 1")
    assert len(sets.command(capsys, "resume")) == 2
    assert Connection.fetchval("g", "SELECT 1") == 1
    assert main(["expire", sets.place, "--group", "x"]) == 1
    assert "there are g, reports/g, reports/h" in capsys.readouterr().err


def test_what_no_set_has_is_refused_by_the_default_one(sets: Sets) -> None:
    orders = [{"group": group, "endpoint": endpoint} for group, endpoint in (("x", None), (None, "x"))]
    for order in orders:
        assert [each._pools.concerns(order) for each in (Connection, sets.reports)] == [True, False]


def test_the_command_shows_every_set(sets: Sets, capsys: Any) -> None:
    sets.work()
    assert main(["status", sets.place]) == 0
    shown = capsys.readouterr().out
    assert "reports/g" in shown
    assert main(["status", sets.place, "--config"]) == 0
    assert "of the set reports, in use by" in capsys.readouterr().out


def test_metrics_of_sets_have_their_own_groups(sets: Sets) -> None:
    pytest.importorskip("prometheus_client")
    from pgdbpool.metrics import PoolCollector

    sets.work(3)
    metrics = {metric.name: metric for metric in PoolCollector(sets.place).collect()}
    groups = [sample.labels["group"] for sample in metrics["pgdbpool_connections_max"].samples]
    assert sorted(groups) == ["g", "reports/g", "reports/h"]
    assert metrics["pgdbpool_processes"].samples[0].value == 1


def test_opentelemetry_counts_every_set(sets: Sets) -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    from pgdbpool.otel import instrument, uninstrument

    reader = InMemoryMetricReader()
    instrument(meter_provider=MeterProvider([reader]))
    try:
        sets.work()
        (resource,) = reader.get_metrics_data().resource_metrics
        found = {metric.name: metric for scope in resource.scope_metrics for metric in scope.metrics}
    finally:
        uninstrument()
    for name in ("db.client.connection.max", "db.client.connection.wait_time"):
        pools = {point.attributes["db.client.connection.pool.name"] for point in found[name].data.data_points}
        assert pools >= {"g", "reports/g"}, name


def test_without_a_directory_the_process_shows_all_its_sets(known_cluster: Any, mode: str) -> None:
    sets = Sets(known_cluster, mode, None)
    try:
        assert {group["name"] for group in gather()["groups"]} == {"g", "reports/g", "reports/h"}
        assert len(gather()["processes"]) == 1
        Connection.close()
        assert {group["name"] for group in gather()["groups"]} == {"reports/g", "reports/h"}
        sets.reports.close()
        with pytest.raises(pgdbpool.NotInitializedError):
            gather()
    finally:
        sets.reports.terminate()
        Connection.reset()


def test_lock_free_sets_publish_and_obey_beside_each_other(
    known_cluster: Any, tmp_path: Path, capsys: Any
) -> None:
    sets = Sets(known_cluster, "non-threaded", tmp_path / "run")
    try:
        wait_for(lambda: {group["name"] for group in sets.view()["groups"]} >= {"g", "reports/g"})
        assert main(["drain", sets.place, "--endpoint", sets.standby, "--force", "--timeout", "0.1"]) == 3
        wait_for(lambda: sets.work() or sets.reports.status().endpoints[sets.standby].state == "draining")
        wait_for(lambda: sets.work() or Connection.status().endpoints[sets.standby].state == "draining")
    finally:
        sets.reports.terminate()
        Connection.reset()


def test_a_probe_can_ask_about_one_set(sets: Sets) -> None:
    def status(app: HealthApp, path: str = "/ready") -> str:
        answers: list[str] = []
        app({"REQUEST_METHOD": "GET", "PATH_INFO": path}, lambda status, headers: answers.append(status))
        return answers[0][:3]

    one, default = HealthApp(pools=sets.reports, max_age=0), HealthApp(max_age=0)
    assert (status(one), status(default)) == ("200", "200")
    sets.reports.close()
    assert (status(one), status(one, "/live"), status(default)) == ("503", "503", "200")

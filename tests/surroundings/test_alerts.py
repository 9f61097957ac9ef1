"""The rules of doc/pgdbpool.rules.yml in promtool, and in a Prometheus that scrapes two instances."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import program
from site_of_processes import APPLICATION, TOKEN, Site
from support import server, wait_for

from pgdbpool.cluster import Cluster

RULES = Path(__file__).parents[2] / "doc" / "pgdbpool.rules.yml"
NAMES = [rule["alert"] for rule in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]]
METRICS = """
    from pgdbpool.metrics import MetricsApp
    application = mount(application, "/metrics", MetricsApp(token={token!r}))
"""
PAGE = {"severity": "page", "job": "shop"}
DB_1 = {"job": "shop", "endpoint": "db-1"}
WELL = {
    "up": "1x60",
    "processes": "4x60",
    "endpoint_primary/db-1": "1x60",
    "endpoint_primary/db-2": "0x60",
    "endpoint_outdated/db-1": "0x60",
    "endpoint_outdated/db-2": "0x60",
    "endpoint_processes/db-1/up": "4x60",
    "endpoint_processes/db-1/down": "0x60",
    "endpoint_processes/db-2/up": "4x60",
    "endpoint_processes/db-2/down": "0x60",
    "timeouts_total//read": "0x60",
    "connections_in_use//read": "1x60",
    "connections_max//read": "8x60",
    "leaks_total//read": "0x60",
    "overdue_total//read": "0x60",
}
"""What an instance tells each minute: by metric, endpoint, and state or group."""


def told(instance: str, changes: dict[str, str]) -> list[dict[str, str]]:
    """Return the series of an instance that is well but for the changes, as promtool has them."""
    found = []
    for key, values in {**WELL, **changes}.items():
        metric, endpoint, last = (*key.split("/"), "", "")[:3]
        labels = {"job": "shop", "instance": instance, "endpoint": endpoint}
        labels["state" if metric == "endpoint_processes" else "group"] = last
        text = ",".join(f'{name}="{value}"' for name, value in labels.items() if value)
        name = metric if metric == "up" else f"pgdbpool_{metric}"
        found.append({"series": f"{name}{{{text}}}", "values": values})
    return found


class Promtool:
    """Runs the rules over what two instances have told."""

    def __init__(self, path: str, place: Path) -> None:
        self._path, self._file = path, place / "rules.test.yml"

    def fires(
        self,
        first: dict[str, str],
        second: dict[str, str] | None = None,
        at: str = "40m",
        **alerts: list[dict[str, str]],
    ) -> None:
        """Assert that exactly these alerts fire, with these labels; the second instance is as the first."""
        series = told("a:80", first) + told("b:80", first if second is None else second)
        expected = [
            {
                "eval_time": at,
                "alertname": name,
                "exp_alerts": [{"exp_labels": labels} for labels in alerts.get(name, [])],
            }
            for name in NAMES
        ]
        assert set(alerts) <= set(NAMES)
        test = {"interval": "1m", "input_series": series, "alert_rule_test": expected}
        rules = {"rule_files": [str(RULES)], "evaluation_interval": "15s", "tests": [test]}
        self._file.write_text(yaml.safe_dump(rules))
        done = subprocess.run(
            [self._path, "test", "rules", str(self._file)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def promtool(tmp_path: Path) -> Promtool:
    return Promtool(program("promtool", "prometheus"), tmp_path)


DOWN = {"endpoint_processes/db-1/up": "0x60", "endpoint_processes/db-1/down": "4x60"}
OUTDATED = {"endpoint_outdated/db-1": "1x60"}
STOPPED = dict.fromkeys(WELL, "_x60") | {"up": "0x60"}


def test_nothing_fires_for_two_instances_that_are_well(promtool: Promtool) -> None:
    promtool.fires({})


def test_no_writable_server_fires_if_the_only_primary_is_down(promtool: Promtool) -> None:
    promtool.fires(DOWN, NobodyTakesWrites=[PAGE], ServerDown=[DB_1])
    promtool.fires(DOWN, {}, ServerDown=[DB_1])  # one instance reaches it


def test_no_writable_server_fires_if_the_role_is_not_known(promtool: Promtool) -> None:
    unknown = {"endpoint_primary/db-1": "_x60"}
    promtool.fires({**DOWN, **unknown}, NobodyTakesWrites=[PAGE], ServerDown=[DB_1])


def test_an_outdated_former_primary_takes_no_writes_and_is_one_of_two(promtool: Promtool) -> None:
    promtool.fires(OUTDATED, NobodyTakesWrites=[PAGE], TwoPrimaries=[{**PAGE, "endpoint": "db-1"}])
    other = {"endpoint_primary/db-2": "1x60"}
    promtool.fires({**OUTDATED, **other}, TwoPrimaries=[{**PAGE, "endpoint": "db-1"}])
    promtool.fires({**OUTDATED, **other, **DOWN}, ServerDown=[DB_1])


def test_a_failover_that_two_instances_see_raises_no_alert(promtool: Promtool) -> None:
    moved = {"endpoint_primary/db-1": "1x10 0x50", "endpoint_primary/db-2": "0x10 1x50"}
    promtool.fires(moved)
    there_and_back = {
        "endpoint_primary/db-1": "1x5 0x5 1x5 0x5 1x40",
        "endpoint_primary/db-2": "0x5 1x5 0x5 1x5 0x40",
    }
    promtool.fires(there_and_back, PrimaryMoves=[{"job": "shop"}])


def test_an_application_that_is_stopped_is_one_page(promtool: Promtool) -> None:
    promtool.fires(
        STOPPED,
        ApplicationSaysNothing=[PAGE],
        InstanceSaysNothing=[{"job": "shop", "instance": f"{name}:80"} for name in "ab"],
    )
    promtool.fires({}, STOPPED, InstanceSaysNothing=[{"job": "shop", "instance": "b:80"}])


def test_a_group_is_nearly_full_on_the_instance_where_it_is(promtool: Promtool) -> None:
    promtool.fires(
        {"connections_in_use//read": "8x60"},
        {},
        GroupNearlyFull=[{"job": "shop", "instance": "a:80", "group": "read"}],
    )


def test_waits_without_a_connection_are_one_page_for_each_group(promtool: Promtool) -> None:
    promtool.fires(
        {"timeouts_total//read": "0x36 1+1x24"}, RequestsGetNoConnection=[{**PAGE, "group": "read"}]
    )


class Prometheus:
    """A Prometheus with the rules, for two instances; alerts do not wait, so that a test need not."""

    def __init__(self, path: str, place: Path, ports: list[int]) -> None:
        rules = re.sub(r"\bfor: \w+", "for: 0s", RULES.read_text())
        (place / "rules.yml").write_text(rules)
        settings = {
            "global": {"scrape_interval": "500ms", "scrape_timeout": "400ms", "evaluation_interval": "500ms"},
            "rule_files": ["rules.yml"],
            "scrape_configs": [
                {
                    "job_name": "shop",
                    "authorization": {"credentials": TOKEN},
                    "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in ports]}],
                }
            ],
        }
        (place / "prometheus.yml").write_text(yaml.safe_dump(settings))
        self._log = place / "prometheus.log"
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [
                    path, f"--config.file={place}/prometheus.yml", f"--storage.tsdb.path={place}/data",
                    "--web.listen-address=127.0.0.1:0",
                ],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        try:
            self._port = wait_for(self._listening, 20, "Prometheus listens")
        except BaseException:
            self.close()
            raise

    def _listening(self) -> str | None:
        assert self._process.poll() is None, self._log.read_text()
        for port in ports_of(self._process.pid):
            return str(port)
        return None

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/api/v1/alerts", timeout=5) as answer:
                alerts = json.load(answer)["data"]["alerts"]
        except urllib.error.HTTPError:  # it starts
            return {"starting"}
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def asked(self, query: str) -> list[dict[str, Any]]:
        """Return what a query finds."""
        url = f"http://127.0.0.1:{self._port}/api/v1/query?query={query}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return json.load(answer)["data"]["result"]  # type: ignore[no-any-return]
        except urllib.error.HTTPError:
            return []

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        finally:
            self._process.kill()
            self._process.wait(10)


def ports_of(pid: int) -> Iterator[int]:
    """Yield the TCP ports that a process listens on."""
    inodes = {link.readlink().name for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    sockets = {name[8:-1] for name in inodes if name.startswith("socket:[")}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                yield int(fields[1].rpartition(":")[2], 16)


def test_prometheus_pages_when_the_primary_of_two_idle_instances_dies(
    known_cluster: Cluster, tmp_path: Path
) -> None:
    path = program("prometheus", "prometheus")
    nodes = known_cluster.nodes[:2]
    settings = {
        "db": [server(node, label=f"db-{number}") for number, node in enumerate(nodes, 1)],
        "groups": {
            "read": {"connection_count": 2, "target": "prefer-standby"},
            "write": {"connection_count": 2, "target": "primary"},
        },
    }
    workers = ("--workers", "2", "--worker-class", "gthread", "--threads", "2")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    application = APPLICATION + METRICS
    with (
        Site(tmp_path / "a", settings, *workers, application=application) as first,
        Site(tmp_path / "b", settings, *workers, application=application) as second,
    ):
        prometheus = Prometheus(path, tmp_path, [first.port, second.port])
        try:
            wait_for(lambda: len(prometheus.asked("pgdbpool_processes==2")) == 2, 30, "both are scraped")
            wait_for(lambda: not prometheus.firing(), 20, "all is well")
            known_cluster.primary.kill()
            expected = {"NobodyTakesWrites", "ServerDown"}
            wait_for(lambda: prometheus.firing() == expected, 20, "the alerts fire, and no others")
            nodes[1].promote()
            wait_for(lambda: prometheus.firing() == {"ServerDown"}, 20, "another takes the writes")
        finally:
            prometheus.close()

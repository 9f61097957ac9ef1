"""`pgdbpool status`: how are the pools of running processes?"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .._cli import output
from .._cli.watch import watch
from .._config.load import load_runtime_dir
from .._util.durations import quantile
from ..errors import ConfigError
from ..overview import gather

OK, FAILED, DEGRADED = 0, 1, 3
NOBODY = "no process publishes its status here"
EVENTS = 5
"""Number of the page's events to show."""

TEXT = """\
Shows the pools of all processes that publish their status: those of one application, which all have the
same `runtime_dir`. It reads the files they write once a second, and connects to no server; of the
configuration it needs the `runtime_dir` alone, and none of the application's variables.

  pgdbpool status /run/shop                   the directory itself
  pgdbpool status pgdbpool.yaml               the configuration that names it
  pgdbpool status                             the one of PGDBPOOL_RUNTIME_DIR, or of PGDBPOOL_CONFIG
  pgdbpool status pgdbpool.yaml --watch       again every second, until q
  pgdbpool status pgdbpool.yaml --connections    each connection: the server's process, its block and place
  pgdbpool status pgdbpool.yaml --config      the configuration that the processes run with
  pgdbpool status pgdbpool.yaml --json | jq '.endpoints[] | {label, state}'
"""
EXITS = """\
0 all endpoints are up; 3 one is down or drained, or a process does not answer; 1 no process
publishes there, or the directory cannot be read; 2 wrong arguments.
"""
SORTS = ("name", "in use", "waiting", "blocks/s", "time-outs", "connections", "for")
"""Columns to sort by; a table without the column keeps its order."""


def add(commands: output.Commands) -> None:
    """Add the sub-command."""
    parser = output.new_parser(
        commands, "status", run, brief="show the pools of running processes", text=TEXT, exits=EXITS
    )
    parser.add_argument("place", metavar="PLACE", nargs="?", help="the runtime_dir, or the pgdbpool.yaml")
    parser.add_argument(
        "--watch", nargs="?", type=_seconds_or_place, const=1.0, metavar="S",
        help="show it again and again, every S seconds (1)",
    )  # fmt: skip
    parser.add_argument("--connections", action="store_true", help="a line for each connection")
    parser.add_argument("--config", action="store_true", help="the configuration in use, without secrets")
    parser.add_argument("--sort", choices=SORTS, default="name", help="the column to sort by (name)")
    parser.set_defaults(refuse=parser.error)


def _seconds_or_place(text: str) -> float | str:
    """Return the seconds of `--watch`, or the place that was meant to precede it."""
    try:
        return output.seconds(text)
    except argparse.ArgumentTypeError:
        if os.path.exists(text):
            return text
        raise


def run(options: argparse.Namespace) -> int:
    """Show the status; with --watch until it is stopped."""
    if isinstance(options.watch, str):
        if options.place is not None:
            options.refuse(
                f"--watch takes seconds, not {options.watch!r}: {options.place} is the place already"
            )
        options.place, options.watch = options.watch, 1.0
    directory = runtime_dir(options.place)
    if options.watch and not options.json:
        return watch(
            lambda before, width, sort: _watched(directory, options, before, width, sort),
            options.watch,
            SORTS,
            options.sort,
        )
    while True:
        view = gather(directory)
        if options.json and options.watch:
            print(json.dumps(view), flush=True)  # a line for each
        elif options.json:
            output.show_json(view)
        else:
            print(_chosen(view, options, Screen(sort=options.sort)))
        if not options.watch:
            return OK if view["ok"] else DEGRADED if view["processes"] else FAILED
        time.sleep(options.watch)


def _watched(
    directory: str, options: argparse.Namespace, before: Mapping[str, Any] | None, width: int, sort: str
) -> tuple[Mapping[str, Any], str]:
    """Return the present view and its text, below a line with the clock."""
    view = gather(directory)
    clock = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(view["time"]))
    number = len(view["processes"])
    head = f"{clock}  {number} process{'' if number == 1 else 'es'}  by {sort}  {directory}"
    return view, head + "\n\n" + _chosen(view, options, Screen(width, sort, before))


class Screen(NamedTuple):
    """How a view is shown."""

    width: int | None = None
    sort: str = "name"
    before: Mapping[str, Any] | None = None
    """An earlier view, to compute rates from."""

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], spare: Sequence[str] = ()) -> str:
        """Return a table in order, which fits on the screen."""
        column = self.sort.upper()
        if column in head:
            at = list(head).index(column)
            rows = sorted(rows, key=lambda row: _number(row[at]), reverse=True)
        return output.table(head, rows, self.width, spare)


def _number(cell: str) -> float:
    try:
        return float(cell.split()[0])
    except (ValueError, IndexError):
        return -1.0


def _chosen(view: Mapping[str, Any], options: argparse.Namespace, screen: Screen) -> str:
    """Return the parts of the status that were asked for."""
    if not view["processes"]:
        return NOBODY
    parts = [
        *([_connections(view, screen)] if options.connections else []),
        *([_configs(view)] if options.config else []),
    ]
    return "\n\n".join(parts) or text(view, screen)


def runtime_dir(place: Any) -> str:
    """Return the given directory, or that of a given configuration.

    :raises ConfigError: it does not exist, or the configuration names none.
    """
    if place is None and (variable := os.environ.get("PGDBPOOL_RUNTIME_DIR")):
        return variable
    if isinstance(place, str) and os.path.isdir(place):
        return os.path.abspath(place)
    origin, found = load_runtime_dir(place)
    if found is None:
        raise ConfigError(
            f"{origin} has no runtime_dir, so its processes publish nothing: "
            "set it to a directory that only they use, such as /run/shop"
        )
    return found


def text(view: Mapping[str, Any], screen: Screen) -> str:
    """Return the text to show."""
    parts = [_endpoints(view, screen), _groups(view, screen), _processes(view, screen)]
    if view["holders"]:
        held = [f"{holder['pid']}  {holder['group']}: {holder['text']}" for holder in view["holders"]]
        parts.append("\n  ".join(["LONG HOLDERS", *held]))
    if view["events"]:
        told = [
            f"{time.strftime('%H:%M:%S', time.gmtime(event['time']))}  {event['endpoint']} {event['text']}"
            for event in view["events"][:EVENTS]
        ]
        parts.append("\n  ".join(["EVENTS (UTC)", *told]))
    return "\n\n".join(parts)


def _endpoints(view: Mapping[str, Any], screen: Screen) -> str:
    rows = []
    for endpoint in view["endpoints"]:
        seen, of = endpoint["states"][endpoint["state"]], sum(endpoint["states"].values())
        error = endpoint["last_error"]
        if error:
            error = f"{error} ({view['time'] - endpoint['error_time']:.0f} s ago)"
        row = [
            endpoint["label"],
            endpoint["state"],
            "all" if seen == of else f"{seen} of {of}",
            (endpoint["role"] or "?") + (" (outdated)" if endpoint["outdated"] else ""),
            str(endpoint["connections"]),
            f"{endpoint['share']:.0%}",
            _lag(endpoint),
            output.milliseconds(endpoint["round_trip"]),
            error or "-",
        ]
        rows.append(row)
    head = ["ENDPOINT", "STATE", "SEEN BY", "ROLE", "CONNECTIONS", "SHARE", "LAG", "NETWORK", "LAST ERROR"]
    return screen.table(head, rows, ("NETWORK", "SHARE", "SEEN BY"))


def _groups(view: Mapping[str, Any], screen: Screen) -> str:
    rows = []
    for group in view["groups"]:
        waits = [quantile(group["wait"]["counts"], view["buckets"], share) for share in (0.5, 0.95, 0.99)]
        numbers = [group[key] for key in ("in_use", "idle", "waiting", "max_size", "timeouts", "checkouts")]
        name = group["name"] + (" (paused)" if group["paused"] else "")
        rate = f"{_rate(view, group, screen):.1f}"
        rows.append([name, *map(str, numbers), rate, *map(output.milliseconds, waits)])
    head = [
        "GROUP", "IN USE", "IDLE", "WAITING", "MAX", "TIME-OUTS", "BLOCKS", "BLOCKS/S", "WAIT P50",
        "WAIT P95", "WAIT P99",
    ]  # fmt: skip
    return screen.table(head, rows, ("WAIT P95", "WAIT P50", "BLOCKS"))


def _rate(view: Mapping[str, Any], group: Mapping[str, Any], screen: Screen) -> float:
    """Return the blocks per second: since the earlier view, or in the last full step of the history."""
    before = screen.before or {"groups": ()}
    for earlier in before["groups"]:
        if earlier["name"] == group["name"] and view["time"] > before["time"]:
            more: float = group["checkouts"] - earlier["checkouts"]
            return max(0.0, more) / float(view["time"] - before["time"])
    last = group["history"][-2:-1]
    return float(last[0][0] / view["step"]) if last else 0.0


def _connections(view: Mapping[str, Any], screen: Screen) -> str:
    rows = [
        [
            str(conn["pid"]),
            conn["group"],
            conn["endpoint"],
            output.optional(conn["server_pid"]),
            conn["state"],
            f"{conn['seconds']:.1f} s",
            conn.get("place") or "-",
            conn.get("thread") or "-",
            output.optional(conn.get("correlation_id")),
            output.optional(conn.get("statement")),
        ]
        for conn in view["connections"]
    ]
    head = [
        "PROCESS", "GROUP", "ENDPOINT", "SERVER PID", "STATE", "FOR", "BLOCK", "THREAD", "CORRELATION",
        "STATEMENT",
    ]  # fmt: skip
    return screen.table(head, rows, ("CORRELATION", "THREAD", "STATEMENT"))


def _configs(view: Mapping[str, Any]) -> str:
    """Return each configuration that is in use, as YAML."""
    import yaml

    parts = []
    for each in view["configs"]:
        config = {key: value for key, value in each["config"].items() if key != "origin"}
        of_set = f" of the set {each['set']}" if each["set"] else ""
        title = f"# {each['config']['origin']}{of_set}, in use by {', '.join(map(str, each['pids']))}"
        parts.append(title + "\n" + yaml.safe_dump(config, sort_keys=False, allow_unicode=True).rstrip())
    return "\n\n".join(parts)


def _processes(view: Mapping[str, Any], screen: Screen) -> str:
    rows = []
    for process in sorted(view["processes"], key=lambda process: process["pid"]):
        seen = f"{process['age']:.1f} s ago" + (", silent" if process["silent"] else "")
        seen += ", forks the others" if process["forks"] else ""
        numbers = [process[key] for key in ("connections", "in_use", "blocks")]
        rows.append([str(process["pid"]), process["type"], seen, *map(str, numbers)])
    return screen.table(["PROCESS", "TYPE", "SEEN", "CONNECTIONS", "IN USE", "BLOCKS"], rows, ("TYPE",))


def _lag(endpoint: Mapping[str, Any]) -> str:
    if endpoint["state"] != "up" or endpoint["lag_bytes"] is None:
        return "-"
    seconds = endpoint["lag_seconds"]
    return f"{endpoint['lag_bytes']} B" + (f", {seconds:.1f} s" if seconds is not None else "")

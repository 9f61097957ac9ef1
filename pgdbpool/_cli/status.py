"""`pgdbpool status`: how are the pools of running processes?"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

from .._cli import output
from .._config.load import load
from .._util.durations import quantile
from ..errors import ConfigError
from ..overview import gather

OK, FAILED, DEGRADED = 0, 1, 3
EVENTS = 5
"""Number of events to show, of those on the page."""

TEXT = """\
Shows the pools of all processes that publish their status: those of one application, which all have the
same `runtime_dir`. It reads the files they write once a second, and connects to no server.

  pgdbpool status /run/shop              the directory itself
  pgdbpool status pgdbpool.yaml          the configuration that names it
  pgdbpool status                        the one of PGDBPOOL_RUNTIME_DIR, or of PGDBPOOL_CONFIG
  pgdbpool status pgdbpool.yaml --watch  again every second, until Ctrl-C
  pgdbpool status pgdbpool.yaml --json | jq '.endpoints[] | {label, state}'
"""
EXITS = """\
0 all endpoints are up; 3 one is down or drained, or a process does not answer; 1 no process
publishes there, or the directory cannot be read; 2 wrong arguments.
"""


def add(commands: output.Commands) -> None:
    """Add the sub-command."""
    parser = output.new_parser(
        commands, "status", run, brief="show the pools of running processes", text=TEXT, exits=EXITS
    )
    parser.add_argument("place", metavar="PLACE", nargs="?", help="the runtime_dir, or the pgdbpool.yaml")
    parser.add_argument(
        "--watch", nargs="?", type=output.seconds, const=1.0, metavar="S", help="show it again and again (1)"
    )


def run(options: argparse.Namespace) -> int:
    """Show the status; with --watch until it is stopped."""
    directory = runtime_dir(options.place)
    while True:
        view = gather(directory)
        if options.json and options.watch:
            print(json.dumps(view), flush=True)  # a line for each
        elif options.json:
            output.show_json(view)
        else:
            clear = "\x1b[H\x1b[2J\x1b[3J" if options.watch and sys.stdout.isatty() else ""
            print(clear + text(view), flush=True)
        if not options.watch:
            return OK if view["ok"] else DEGRADED if view["processes"] else FAILED
        time.sleep(options.watch)


def runtime_dir(place: Any) -> str:
    """Return the given directory, or that of a given configuration.

    :raises ConfigError: it does not exist, or the configuration names none.
    """
    if place is None and (variable := os.environ.get("PGDBPOOL_RUNTIME_DIR")):
        return variable
    if isinstance(place, str) and os.path.isdir(place):
        return os.path.abspath(place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        config = load(place)
    if (found := config.runtime_dir) is None:
        raise ConfigError(
            f"{config.origin} has no runtime_dir, so its processes publish nothing: "
            "set it to a directory that only they use, such as /run/shop"
        )
    return found


def text(view: Mapping[str, Any]) -> str:
    """Return the text to show."""
    if not view["processes"]:
        return "no process publishes its status here"
    parts = [_endpoints(view), _groups(view), _processes(view)]
    if view["holders"]:
        held = [f"{holder['pid']}  {holder['group']}: {holder['text']}" for holder in view["holders"]]
        parts.append("\n  ".join(["Long holders", *held]))
    if view["events"]:
        told = [
            f"{time.strftime('%H:%M:%S', time.gmtime(event['time']))}  {event['endpoint']} {event['text']}"
            for event in view["events"][:EVENTS]
        ]
        parts.append("\n  ".join(["Events (UTC)", *told]))
    return "\n\n".join(parts)


def _endpoints(view: Mapping[str, Any]) -> str:
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
    head = ["Endpoint", "State", "For", "Role", "Connections", "Share", "Lag", "Network", "Last error"]
    return output.table(head, rows)


def _groups(view: Mapping[str, Any]) -> str:
    rows = []
    for group in view["groups"]:
        waits = [quantile(group["wait"]["counts"], view["buckets"], share) for share in (0.5, 0.95, 0.99)]
        numbers = [group[key] for key in ("in_use", "idle", "waiting", "max_size", "checkouts", "timeouts")]
        rows.append([group["name"], *map(str, numbers), *map(output.milliseconds, waits)])
    head = ["Group", "In use", "Idle", "Waiting", "Max", "Blocks", "Time-outs", "Wait p50", "p95", "p99"]
    return output.table(head, rows)


def _processes(view: Mapping[str, Any]) -> str:
    rows = []
    for process in sorted(view["processes"], key=lambda process: process["pid"]):
        seen = f"{process['age']:.1f} s ago" + (", silent" if process["silent"] else "")
        seen += ", forks the others" if process["forks"] else ""
        numbers = [process[key] for key in ("connections", "in_use", "blocks")]
        rows.append([str(process["pid"]), process["type"], seen, *map(str, numbers)])
    return output.table(["Process", "Type", "Seen", "Connections", "In use", "Blocks"], rows)


def _lag(endpoint: Mapping[str, Any]) -> str:
    if endpoint["state"] != "up" or endpoint["lag_bytes"] is None:
        return "-"
    seconds = endpoint["lag_seconds"]
    return f"{endpoint['lag_bytes']} B" + (f", {seconds:.1f} s" if seconds is not None else "")

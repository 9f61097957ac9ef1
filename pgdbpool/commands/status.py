"""The command `pgdbpool status`: the pools of running processes, as text or JSON."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from ..overview import gather, quantile
from ..sources import load

OK, FAILED, DEGRADED = 0, 1, 3
EVENTS = 5
"""Events that are shown, of those that the page shows."""

DESCRIPTION = """\
Shows the pools of all processes that publish their status: those of one application, which all have the
same `runtime_dir`. It reads what they write once a second, and connects to no server.

  pgdbpool status /run/shop              the directory itself
  pgdbpool status pgdbpool.yaml          the configuration that names it
  pgdbpool status                        the one of PGDBPOOL_RUNTIME_DIR, or of PGDBPOOL_CONFIG
  pgdbpool status pgdbpool.yaml --watch  again every second, until Ctrl-C
  pgdbpool status pgdbpool.yaml --json | jq '.endpoints[] | {label, state}'

Exit status: 0 all endpoints are up; 3 one is down or drained, or a process does not answer; 1 no process
publishes there, or the directory cannot be read.
"""
COLOURS = {"up": "32", "down": "31", "draining": "33"}


def add(commands: Any) -> None:
    """Add the command to those of argparse."""
    sub = commands.add_parser(
        "status", help="show the pools of running processes", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    sub.add_argument("place", metavar="PLACE", nargs="?", help="the runtime_dir, or the pgdbpool.yaml")
    sub.add_argument("--json", action="store_true", help="print JSON; with --watch a line for each")
    sub.add_argument(
        "--watch", nargs="?", type=_seconds, const=1.0, metavar="SECONDS", help="show it again and again (1)"
    )
    sub.set_defaults(command=status)


def status(options: argparse.Namespace) -> int:
    """Show the status; with --watch until it is stopped."""
    directory = runtime_dir(options.place)
    while True:
        view = gather(directory)
        if options.json:
            print(json.dumps(view, indent=None if options.watch else 2), flush=True)
        else:
            text = "\n".join(lines(view, sys.stdout.isatty()))
            clear = "\x1b[H\x1b[2J\x1b[3J" if options.watch and sys.stdout.isatty() else ""
            print(clear + text, flush=True)
        if not options.watch:
            return OK if view["ok"] else DEGRADED if view["processes"] else FAILED
        time.sleep(options.watch)


def runtime_dir(place: str | None) -> str:
    """Return the directory that is meant.

    :raises ConfigError: there is none of that name, or the configuration names none.
    """
    if place is None and (variable := os.environ.get("PGDBPOOL_RUNTIME_DIR")):
        return variable
    if place is not None and os.path.isdir(place):
        return os.path.abspath(place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = load(place).runtime_dir
    if found is None:
        raise ConfigError(
            f"{place or 'the environment'} has no runtime_dir, so its processes publish nothing: "
            "set it to a directory of theirs alone, such as /run/shop"
        )
    return found


def lines(view: Mapping[str, Any], colours: bool) -> list[str]:
    """Return the text, line by line."""
    if not view["processes"]:
        return ["no process publishes its status here"]
    found = [*_endpoints(view, colours), "", *_groups(view), "", *_processes(view)]
    if view["holders"]:
        found += ["", "long holders"]
        found += [f"  {h['pid']}  {h['group']}: {h['text']}" for h in view["holders"]]
    if view["events"]:
        found += ["", "events (UTC)"]
        for event in view["events"][:EVENTS]:
            at = time.strftime("%H:%M:%S", time.gmtime(event["time"]))
            found.append(f"  {at}  {event['endpoint']} {event['text']}")
    return found


def _endpoints(view: Mapping[str, Any], colours: bool) -> list[str]:
    rows = [["endpoint", "state", "role", "connections", "share", "lag", "network", "last error"]]
    for endpoint in view["endpoints"]:
        state, of = endpoint["state"], sum(endpoint["states"].values())
        some = f" {endpoint['states'][state]}/{of}" if endpoint["states"][state] < of else ""
        error = endpoint["last_error"]
        if error:
            error = f"{error} ({view['time'] - endpoint['error_time']:.0f} s ago)"
        rows.append(
            [
                endpoint["label"],
                f"{state}{some}",
                (endpoint["role"] or "?") + (" (outdated)" if endpoint["outdated"] else ""),
                str(endpoint["connections"]),
                f"{endpoint['share']:.0%}",
                _lag(endpoint),
                _milliseconds(endpoint["round_trip"]),
                error or "-",
            ]
        )
    table = _table(rows)
    if colours:
        for place, endpoint in enumerate(view["endpoints"], 1):
            state = endpoint["state"]
            table[place] = table[place].replace(state, f"\x1b[{COLOURS[state]}m{state}\x1b[0m", 1)
    return table


def _groups(view: Mapping[str, Any]) -> list[str]:
    rows = [
        ["group", "in use", "idle", "waiting", "max", "blocks", "time-outs", "wait p50", "p95", "p99"],
    ]
    for group in view["groups"]:
        waits = [quantile(group["wait"]["counts"], view["buckets"], share) for share in (0.5, 0.95, 0.99)]
        numbers = [group[key] for key in ("in_use", "idle", "waiting", "max_size", "checkouts", "timeouts")]
        rows.append([group["name"], *map(str, numbers), *map(_milliseconds, waits)])
    return _table(rows)


def _processes(view: Mapping[str, Any]) -> list[str]:
    rows = [["process", "type", "seen", "connections", "in use", "blocks"]]
    for process in sorted(view["processes"], key=lambda process: process["pid"]):
        seen = f"{process['age']:.1f} s ago" + (", silent" if process["silent"] else "")
        numbers = [process[key] for key in ("connections", "in_use", "blocks")]
        rows.append([str(process["pid"]), process["type"], seen, *map(str, numbers)])
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    width = shutil.get_terminal_size((160, 24)).columns if sys.stdout.isatty() else 1000
    return [
        "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip()[:width]
        for row in rows
    ]


def _lag(endpoint: Mapping[str, Any]) -> str:
    if endpoint["state"] != "up" or endpoint["lag_bytes"] is None:
        return "-"
    seconds = endpoint["lag_seconds"]
    return f"{endpoint['lag_bytes']} B" + (f", {seconds:.1f} s" if seconds is not None else "")


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.3g} ms"


def _seconds(text: str) -> float:
    """Return argparse's value for a time between two looks."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 3600")
    return value

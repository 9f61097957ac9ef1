"""`pgdbpool ping`: does every group have a server that answers?"""

from __future__ import annotations

import argparse
import time
from typing import Any

from .._api.connection import Connection
from .._cli import output

TEXT = """\
Asks every server of a configuration at the same time, and reports whether each group can be served, as
`Connection.health()` does in an application. With --wait, it asks until they can, for start-up scripts.
A server that is down does not matter as long as every group has another; with --strict it does. With --any
one group that can be served is enough.

  pgdbpool ping pgdbpool.yaml
  pgdbpool ping pgdbpool.yaml --any --wait 60
  pgdbpool ping pgdbpool.yaml --group write --wait 60 && python migrate.py
"""
EXITS = """\
0 every group can be served, with --any one of them; 1 a group cannot, with --any none; 2 wrong
arguments; with --strict, 3 degraded: served, and a server or a group is not.
"""


def add(commands: output.Commands) -> None:
    """Add the sub-command."""
    parser = output.new_parser(
        commands, "ping", run, brief="ask whether every group can be served", text=TEXT, exits=EXITS
    )
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="the pgdbpool.yaml (default: the environment)"
    )
    parser.add_argument(
        "--group", action="append", metavar="GROUP", help="this group only; may be given several times"
    )
    parser.add_argument(
        "--timeout", type=output.seconds, default=2.0, metavar="S", help="for all answers together (2)"
    )
    parser.add_argument("--any", action="store_true", help="one group that can be served is enough")
    parser.add_argument("--strict", action="store_true", help="exit with 3 if anything is down")
    parser.add_argument("--wait", type=output.seconds, metavar="S", help="keep asking for S seconds")


def run(options: argparse.Namespace) -> int:
    """Ask once, or until every group, or any of them, can be served."""
    Connection.init(options.config, wait=False)
    try:
        for name in options.group or ():
            Connection.group(name)  # says which there are
        deadline = time.monotonic() + (options.wait or 0.0)
        with output.Progress() as progress:
            while True:
                report = _chosen(Connection.health(options.timeout), options.group)
                left = deadline - time.monotonic()
                if _served(report, options.any) or left <= 0:
                    break
                progress(f"waiting for {', '.join(_unserved(report))}, {left:.0f} s left")
                time.sleep(min(0.5, left))
    finally:
        Connection.close(1.0)
    if options.json:
        output.show_json(report)
    else:
        _show(report)
    if not _served(report, options.any):
        return output.EXIT["unhealthy"]
    return output.EXIT["healthy" if report["status"] == "healthy" or not options.strict else "degraded"]


def _served(report: dict[str, Any], one_is_enough: bool) -> bool:
    """Return whether every group can be served, or one of them if that is enough."""
    served = [group["status"] != "unhealthy" for group in report["groups"].values()]
    return any(served) if one_is_enough else all(served)


def _chosen(report: dict[str, Any], names: list[str] | None) -> dict[str, Any]:
    """Return the report for some groups only."""
    if names is None:
        return report
    groups = {name: report["groups"][name] for name in names}
    labels = {label for group in groups.values() for label in (*group["served_by"], *group["not_served_by"])}
    states = {group["status"] for group in groups.values()}
    state = next(word for word in ("unhealthy", "degraded", "healthy") if word in states)
    endpoints = {label: each for label, each in report["endpoints"].items() if label in labels}
    return {**report, "status": state, "groups": groups, "endpoints": endpoints}


def _unserved(report: dict[str, Any]) -> list[str]:
    return [name for name, group in report["groups"].items() if group["status"] == "unhealthy"]


def _show(report: dict[str, Any]) -> None:
    rows = [
        (
            label,
            each["status"],
            output.optional(each["role"]),
            output.milliseconds(each["connect_latency"]),
            output.milliseconds(each["latency"]),
            each["error"] or "",
        )
        for label, each in report["endpoints"].items()
    ]
    print(output.table(("ENDPOINT", "STATUS", "ROLE", "CONNECT", "ROUND TRIP", ""), rows))
    print()
    groups = [
        (name, group["status"], ", ".join(group["served_by"]) or "no server")
        for name, group in report["groups"].items()
    ]
    print(output.table(("GROUP", "STATUS", "SERVED BY"), groups))

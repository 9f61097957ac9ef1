"""`pgdbpool check`: are the configuration and its servers right?"""

from __future__ import annotations

import argparse
from typing import Any

from .._cli import output
from .._config.load import load
from .._diagnosis.advice import advise, status
from .._diagnosis.inspection import Facts, ServerFacts, inspect
from ..errors import ConfigError

TEXT = """\
Reads a configuration as the application would, connects to every endpoint of every group, and prints what it
finds: which server can be reached, with which role, how far it is behind, how long a connection and a round
trip take, and how many connections this configuration can open there. Below the table it lists what should be
fixed, each with its remedy. Nothing is changed.

  pgdbpool check pgdbpool.yaml
  pgdbpool check pgdbpool.yaml --processes 8     do 8 processes fit into max_connections?
  pgdbpool check pgdbpool.yaml --json | jq .status

The columns: CONNECT is the time for a new connection, login included; ROUND TRIP that of one query. OPENS is
the number of connections that all processes can open there, with every server up and with this one alone
left, of the number that it admits for this role; IN USE counts the current sessions of all clients.
"""
EXITS = """\
0 all is well, or there are hints (info) only; 3 every group has a server, and there are
warnings, such as a server that cannot be reached; 1 the configuration is not valid, a group has no server, or
there is another error; 2 wrong arguments.
"""


def add(commands: output.Commands) -> None:
    """Add the sub-command."""
    parser = output.new_parser(
        commands, "check", run, brief="check a configuration and its servers", text=TEXT, exits=EXITS
    )
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="the pgdbpool.yaml (default: the environment)"
    )
    parser.add_argument(
        "--processes", type=output.whole(1, 100_000), metavar="N",
        help="processes that use it (`processes` of the configuration)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Check a configuration."""
    try:
        config = load(options.config)
    except ConfigError as error:
        if not options.json:
            raise
        problems = [{"key": problem.path, "message": problem.message} for problem in error.problems]
        output.show_json({"status": "broken", "problems": problems})
        return 1
    with output.Progress() as progress:
        facts = inspect(config, processes=options.processes, progress=progress)
    findings = advise(config, facts)
    state = status(findings)
    if options.json:
        listed: list[dict[str, Any]] = [
            {name: getattr(finding, name) for name in ("severity", "code", "subject", "message", "remedy")}
            for finding in findings
        ]
        output.show_json({"status": state, "problems": [], **facts.to_dict(), "findings": listed})
    else:
        _show(facts)
        output.show_findings(findings)
        print(f"\n{config.origin}: {output.paint(state)}")
    return output.EXIT[state]


def _show(facts: Facts) -> None:
    head = ("ENDPOINT", "REACHABLE", "ROLE", "TIMELINE", "LAG", "VERSION", "TLS", "CONNECT", "ROUND TRIP")
    head += ("OPENS", "IN USE")  # type: ignore[assignment]
    print(output.table(head, [_row(server) for server in facts.endpoints.values()]))
    print()
    rows = [
        (
            group.name,
            group.target,
            str(group.connection_count),
            ", ".join(group.served_by) or output.paint("no server", output.BAD),
        )
        for group in facts.groups.values()
    ]
    print(output.table(("GROUP", "TARGET", "CONNECTIONS", "SERVED BY"), rows))
    print(f"\n{facts.driver}")


def _row(server: ServerFacts) -> tuple[str, ...]:
    lag = "-"
    if server.lag_bytes is not None:
        lag = f"{server.lag_bytes} B, {server.lag_seconds or 0:.1f} s"
    opens = "-" if server.usable is None or server.pooler else f"? of {server.usable}"
    if server.opens is not None:
        opens = f"{server.opens} to {server.opens_at_most} of {output.optional(server.usable)}"
    return (
        server.label,
        "yes" if server.reachable else "no",
        output.optional(server.role),
        output.optional(server.timeline),
        lag,
        output.optional(server.version),
        server.tls or ("no TLS" if server.reachable else "-"),
        output.milliseconds(server.connect_seconds),
        output.milliseconds(server.round_trip_seconds),
        opens,
        output.optional(server.in_use),
    )

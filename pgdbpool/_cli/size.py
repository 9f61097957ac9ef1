"""`pgdbpool size`: how many connections should each group have?"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from .._cli import output
from .._config.load import load
from .._diagnosis.advice import BROKEN, OK
from .._diagnosis.inspection import Facts, inspect
from ..errors import ConfigError, Problem
from ..sizing import BUSY, HEADROOM, Recommendation, Server, recommend

if TYPE_CHECKING:
    from .._config.model import Config

TEXT = """\
Recommends the `connection_count` of each group, so that all processes together have room on each server, even
if only that one is left. With CONFIG it asks the servers how many connections they admit, and compares that
with the configuration; without it, give the numbers yourself:

  pgdbpool size pgdbpool.yaml --processes 4 --threads 8
  pgdbpool size pgdbpool.yaml --processes 4 --threads 8 --cores 16
  pgdbpool size --processes 4 --threads 8 --max-connections 100 --groups read,write

A group needs no more connections than a process has threads, or greenlets, with a block open at the same
time. --cores, of a database server, determines how many connections keep it busy; more would wait for each
other. --busy is the share of a block's time in which the server works for it.
"""
EXITS = """\
0 the configured sizes fit, or without CONFIG the recommended ones; 1 they do not fit, or a
server cannot be asked; 2 wrong arguments.
"""


def add(commands: output.Commands) -> None:
    """Add the sub-command."""
    parser = output.new_parser(
        commands,
        "size",
        run,
        brief="recommend how many connections groups should have",
        text=TEXT,
        exits=EXITS,
    )
    number = output.whole(1, 1_000_000)
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="a pgdbpool.yaml, whose servers are asked"
    )
    parser.add_argument(
        "--processes", type=number, metavar="N", help="that use it (`processes` of the configuration, or 1)"
    )
    parser.add_argument("--threads", type=number, default=1, metavar="N", help="of a process (1)")
    parser.add_argument("--cores", type=number, metavar="N", help="of each database server")
    parser.add_argument("--busy", type=_share, default=BUSY, metavar="SHARE", help=f"from 0 to 1 ({BUSY})")
    parser.add_argument(
        "--headroom", type=_share, default=HEADROOM, metavar="SHARE",
        help=f"of a server's connections, for others ({HEADROOM})",
    )  # fmt: skip
    parser.add_argument(
        "--max-connections", type=number, metavar="N", help="of each server, in place of asking it"
    )
    parser.add_argument(
        "--reserved", type=output.whole(0, 1_000_000), default=3, metavar="N",
        help="slots reserved for superusers and others; with --max-connections (3)",
    )  # fmt: skip
    parser.add_argument("--groups", default="default", metavar="NAMES", help="without CONFIG: their names")
    parser.set_defaults(usage=parser.error)


def run(options: argparse.Namespace) -> int:
    """Recommend sizes."""
    config: Config | None = None
    if options.config is not None:
        config = load(options.config)
        groups = {group.name: list(group.endpoints) for group in config.groups.values()}
        servers = _servers(config, options)
    elif options.max_connections is None:
        options.usage("name a CONFIG whose servers can be asked, or --max-connections")
    else:
        groups = {name.strip(): ["the server"] for name in options.groups.split(",") if name.strip()}
        servers = {"the server": Server(options.max_connections, options.reserved, options.cores)}
    processes = options.processes or (config and config.processes) or 1
    try:
        found = recommend(
            groups, servers, processes=processes, threads=options.threads, headroom=options.headroom,
            busy=options.busy,
        )  # fmt: skip
    except ValueError as error:
        options.usage(str(error))
    now = {g.name: g.connection_count for g in config.groups.values()} if config else {}
    over = [
        name
        for name, server in servers.items()
        if processes * sum(now.get(group, 0) for group, used in groups.items() if name in used)
        > server.usable
    ]
    good = not over if config else found.fits
    if options.json:
        listed = {name: {"now": now.get(name), **size} for name, size in found.to_dict()["groups"].items()}
        state = OK if good else BROKEN
        output.show_json({"status": state, **found.to_dict(), "groups": listed, "full_servers": over})
    else:
        _show(found, now, over)
    return 0 if good else 1


def _servers(config: Config, options: argparse.Namespace) -> dict[str, Server]:
    """Return the limits of the groups' servers, from the servers or from the arguments."""
    used = {label for group in config.groups.values() for label in group.endpoints}
    if options.max_connections is not None:
        stated = Server(options.max_connections, options.reserved, options.cores)
        return dict.fromkeys([e.label for e in config.endpoints if e.label in used], stated)
    with output.Progress() as progress:
        facts: Facts = inspect(config, progress=progress)
    servers: dict[str, Server] = {}
    problems = []
    pooled = {endpoint.label for endpoint in config.endpoints if endpoint.pooler}
    for label, server in facts.endpoints.items():
        if label in used and (label in pooled or server.pooler):
            problems.append(Problem(label, "is behind a pooler, whose max_client_conn counts"))
        elif label in used and server.limits is None:
            problems.append(Problem(label, server.error or "does not report how many connections it admits"))
        elif label in used and server.limits is not None:
            known = server.limits
            servers[label] = Server(
                known.max_connections, known.reserved, options.cores, known.role_limit, known.database_limit
            )
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigError(f"not every server can be asked; say --max-connections instead:{lines}", problems)
    return servers


def _show(found: Recommendation, now: dict[str, int], over: list[str]) -> None:
    rows = [
        (name, output.optional(now.get(name)), str(size.connection_count), size.limited_by)
        for name, size in found.groups.items()
    ]
    print(output.table(("GROUP", "NOW", "RECOMMENDED", "LIMITED BY"), rows))
    print()
    servers = [
        (name, str(room["usable"]), str(room["opened"]), str(room["max_connections_needed"]))
        for name, room in found.servers.items()
    ]
    print(output.table(("SERVER", "ADMITS", "WOULD BE OPENED", "FOR A CONNECTION PER THREAD"), servers))
    print(f"\n{found.processes} processes with {found.threads} threads each:\n")
    print(f"type: {found.type}\nprocesses: {found.processes}\ngroups:")
    for name, size in found.groups.items():
        print(f"  {name}: {{connection_count: {size.connection_count}}}")
    for name in over:
        print(f"\n{output.paint('error')} {name} admits fewer connections than the configuration can open")
    if not found.fits:
        print(
            f"\n{output.paint('error')} not even one connection for each group and process has room: raise "
            "max_connections, put a pooler (PgBouncer) before the server, or run fewer processes"
        )


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1, such as 0.5")
    return value

"""The command `pgdbpool`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence

import psycopg
import yaml

from .. import Connection, __version__
from .._cli import check as check_command
from .._cli import configuration, output, ping, size, status
from .._demo.demo import (
    DemoError,
    MissingExtra,
    Options,
    Stopped,
    check_installed,
    facts_of_servers,
    run,
    stopping_on_signals,
)
from .._demo.tour import check
from ..cluster import Cluster, ClusterError, config_yaml
from ..errors import Error

DESCRIPTION = """\
A PostgreSQL pool over several servers, for WSGI. These commands show it on real servers, which they start
on free ports of this machine and throw away at the end:

  pgdbpool demo            an application in front of a primary and two standbys, to play with
  pgdbpool demo --check    the same, shown step by step in some seconds
  pgdbpool cluster         the servers alone, with a pgdbpool.yaml for them, to develop against

And these look at your own:

  pgdbpool check           is the configuration right, and are its servers?
  pgdbpool ping            can every group be served right now?
  pgdbpool size            how many connections should each group have?
  pgdbpool rls             what could get at rows of another tenant
  pgdbpool status          the pools of running processes
  pgdbpool config-docs     what a key means, and what it takes
  pgdbpool config-schema   the JSON Schema of a configuration, for editors

`pgdbpool COMMAND --help` has examples.
"""
EPILOG = """\
Exit status: 0 done, or `demo` or `cluster` was stopped by a signal as intended; 1 something failed, the
message says what, or `rls` has findings; 2 wrong arguments, or the extra is missing (pip install
'pgdbpool[demo]'); 3 degraded (`check`, `ping`, `status`); 128 + n if anything else was stopped by signal n.
"""

COMMANDS = (check_command, ping, size, status, configuration)
"""Modules with a function `add`, in the order of the help."""

DEMO = """\
Starts a PostgreSQL primary with streaming standbys and the example application under gunicorn, prints its
address and what to try, and stops everything on Ctrl-C. A server that you kill is started again by itself.

--check goes on a tour by itself, and prints a line for each step: transfers on the primary, reads spread over
the standbys, a standby killed and back under load, refused transfers, and nothing left at the end.

--json prints one line of JSON as soon as everything runs, for scripts: `url`, `config` (the path of the file
that has the password too), and `servers`, each with name, role, host, port and pid. The rest goes to standard
error.
"""
CLUSTER = """\
Starts a PostgreSQL primary with streaming standbys in the foreground and prints a pgdbpool.yaml for them,
with a group `read` and a group `write`. Ctrl-C stops the servers and removes their data.

  pgdbpool cluster > pgdbpool.yaml &

--json prints one line of JSON in its place, for scripts: `servers`, each with name, role, host, port and pid,
and `config`, the same configuration with its password.
"""
RLS = """\
Looks for ways in which the role that a group logs in as could get at rows of another tenant: tables without
row-level security, policies that ignore the tenant or open without one, roles, views and functions that
bypass it. Each finding comes with the SQL that fixes it. Nothing is changed.

  pgdbpool rls pgdbpool.yaml write
  pgdbpool rls pgdbpool.yaml write public.accounts --json
"""


def main(
    argv: Sequence[str] | None = None, *, adjust: Callable[[argparse.Namespace], None] | None = None
) -> int:
    """Run the command with these arguments and return its exit status; wrong ones raise SystemExit.

    :param adjust: changes the parsed options, for a program that has the configuration itself.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    if adjust is not None:
        adjust(options)
    command: Callable[[argparse.Namespace], int] | None = options.command
    if command is None:
        parser.print_help(sys.stderr)
        return 2
    if getattr(options, "worker_class", "") == "sync" and (options.threads or 1) > 1:
        parser.error("a sync worker has one thread: leave --threads out, or use --worker-class gthread")
    if getattr(options, "check", False) and options.json:
        parser.error("--check prints its steps for people: leave --json out")
    logging.getLogger("pgdbpool").addHandler(logging.NullHandler())  # commands report errors themselves
    try:
        with stopping_on_signals():
            return command(options)
    except Stopped as stopped:
        print(f"pgdbpool: stopped by {stopped}, nothing is left", file=sys.stderr)
        endless = command in (demo, cluster) and not getattr(options, "check", False)
        return 0 if endless else 128 + stopped.signum
    except MissingExtra as error:
        _show_error(options, error)
        print(f"pgdbpool: {error}", file=sys.stderr)
        return 2
    except (ClusterError, DemoError, Error, psycopg.Error) as error:
        _show_error(options, error)
        print(f"pgdbpool: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # who reads our output has gone, as in `pgdbpool demo | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1


def _show_error(options: argparse.Namespace, error: Exception) -> None:
    if getattr(options, "json", False):
        output.show_json({"status": "error", "error": str(error), "kind": type(error).__name__})


def demo(options: argparse.Namespace) -> int:
    """Run the demo until it is stopped, or its tour."""
    check_installed("gunicorn", version=options.pg)
    chosen = Options(
        standbys=options.standbys,
        version=options.pg,
        port=options.port,
        workers=options.workers,
        worker_class=options.worker_class,
        threads=options.threads or 4,
        json=options.json,
    )
    if not options.check:
        run(chosen)
    return 0 if check(chosen) else 1


def cluster(options: argparse.Namespace) -> int:
    """Run the servers alone until they are stopped."""
    check_installed(version=options.pg)
    with Cluster(options.standbys, options.pg, auth=options.auth) as servers:
        config = config_yaml(servers)
        if options.json:
            known = {
                "status": "running",
                "servers": facts_of_servers(servers),
                "config": yaml.safe_load(config),
            }
            print(json.dumps(known), flush=True)
        else:
            print(config, end="", flush=True)
        for node in servers.nodes:
            print(f"{node.name}  {node.role:7}  {node.label}  process {node.pid}", file=sys.stderr)
        print("Ctrl-C stops them and removes their data.", file=sys.stderr)
        while True:
            signal.pause()


def rls(options: argparse.Namespace) -> int:
    """Audit the row-level security of a group."""
    Connection.init(options.config, wait=False)
    try:
        audit = Connection.audit_rls(options.group, options.tables or None, ignore=options.ignore)
    finally:
        Connection.close()
    print(json.dumps(audit.to_dict(), indent=2) if options.json else audit)
    return 0 if audit.ok else 1


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "pgdbpool", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"pgdbpool {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    servers = argparse.ArgumentParser(add_help=False)
    servers.add_argument("--standbys", type=output.whole(1, 9), default=2, metavar="N", help="1 to 9 (2)")
    servers.add_argument("--json", action="store_true", help="print what runs where as one line of JSON")
    servers.add_argument("--pg", type=int, choices=(18, 16), help="version of PostgreSQL (18)")

    sub = commands.add_parser(
        "demo", parents=[servers], help="run the example on a cluster", description=DEMO, epilog=EPILOG,
        formatter_class=raw, allow_abbrev=False,
    )  # fmt: skip
    sub.add_argument(
        "--check", action="store_true", help="go on a tour and exit with 0, or 1 if a step fails"
    )
    sub.add_argument(
        "--port", type=output.whole(0, 65535), default=0, metavar="P", help="of the example (a free one)"
    )
    sub.add_argument(
        "--workers", type=output.whole(1, 8), default=2, metavar="N", help="gunicorn's processes (2)"
    )
    sub.add_argument("--worker-class", choices=("sync", "gthread"), default="gthread", help="(gthread)")
    sub.add_argument("--threads", type=output.whole(1, 64), metavar="N", help="of a gthread worker (4)")
    sub.set_defaults(command=demo)

    sub = commands.add_parser(
        "cluster", parents=[servers], help="run a cluster", description=CLUSTER, epilog=EPILOG,
        formatter_class=raw, allow_abbrev=False,
    )  # fmt: skip
    sub.add_argument(
        "--auth", choices=("scram-sha-256", "trust"), default="scram-sha-256",
        help="trust asks for no password: every user of this machine is superuser then (scram-sha-256)",
    )  # fmt: skip
    sub.set_defaults(command=cluster)

    sub = commands.add_parser(
        "rls", help="audit the row-level security of a group", description=RLS, epilog=EPILOG,
        formatter_class=raw, allow_abbrev=False,
    )  # fmt: skip
    sub.add_argument("config", metavar="CONFIG", help="the pgdbpool.yaml")
    sub.add_argument("group", metavar="GROUP", help="a group with a tenant setting")
    sub.add_argument(
        "tables", metavar="TABLE", nargs="*", help="schema.table; all that the role may use if left out"
    )
    sub.add_argument(
        "--ignore", action="append", default=[], metavar="FINDING",
        help="leave out a finding, by code or code:subject, with *; may be given several times",
    )  # fmt: skip
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.set_defaults(command=rls)

    for module in COMMANDS:
        module.add(commands)
    return parser

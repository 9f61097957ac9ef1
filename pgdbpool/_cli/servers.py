"""`pgdbpool demo` and `pgdbpool cluster`: commands that start servers, and end them."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable

import yaml

from .._cli import output
from .._demo.demo import APPS, Options, check_installed, facts_of_servers
from .._demo.demo import run as run_until_stopped
from .._demo.tour import check
from ..cluster import Cluster, config_yaml

DEMO = """\
Starts a PostgreSQL primary with streaming standbys and the example application under gunicorn, prints its
address and what to try, and stops everything on Ctrl-C. If you kill a server, the demo starts it again.

--check runs a tour of its features, and prints a line for each step: transfers on the primary, reads spread
over the standbys, a standby killed and back under load, refused transfers, and nothing left at the end.

--app runs the same example in a framework, over its own door to the pools: sqlalchemy, flask (with
Flask-SQLAlchemy) or django.

--json prints one line of JSON as soon as everything runs, for scripts: `url`, `config` (the path of the file,
which also has the password), and `servers`, each with name, role, host, port and pid. The rest goes to
standard error.
"""
CLUSTER = """\
Starts a PostgreSQL primary with streaming standbys in the foreground and prints a pgdbpool.yaml for them,
with a group `read` and a group `write`. Ctrl-C stops the servers and removes their data.

  pgdbpool cluster > pgdbpool.yaml &

--json prints one line of JSON in its place, for scripts: `servers`, each with name, role, host, port and pid,
and `config`, the same configuration with its password.
"""
EXITS = """\
0 done, or stopped by a signal as intended; 1 something failed, the message says what; 2 wrong
arguments, or the extra is missing (pip install 'pgdbpool[demo]'); 128 + n if --check was stopped by signal n.
"""


def add(commands: output.Commands) -> None:
    """Add the sub-commands."""
    parser = _new_parser(commands, "demo", run_demo, brief="run the example on a cluster", text=DEMO)
    parser.add_argument(
        "--check", action="store_true", help="run the tour and exit with 0, or 1 if a step fails"
    )
    parser.add_argument(
        "--port", type=output.whole(0, 65535), default=0, metavar="P", help="of the example (a free one)"
    )
    parser.add_argument(
        "--workers", type=output.whole(1, 8), default=2, metavar="N", help="gunicorn's processes (2)"
    )
    parser.add_argument(
        "--app",
        choices=tuple(APPS),
        default="plain",
        help="the example in that framework (plain)",
    )
    parser.add_argument("--worker-class", choices=("sync", "gthread"), default="gthread", help="(gthread)")
    parser.add_argument("--threads", type=output.whole(1, 64), metavar="N", help="of a gthread worker (4)")
    parser.set_defaults(refuse=parser.error)

    parser = _new_parser(commands, "cluster", run_cluster, brief="run a cluster", text=CLUSTER)
    parser.add_argument(
        "--auth", choices=("scram-sha-256", "trust"), default="scram-sha-256",
        help="trust asks for no password: every user of this machine is superuser then (scram-sha-256)",
    )  # fmt: skip


def _new_parser(
    commands: output.Commands, name: str, run: Callable[[argparse.Namespace], int], *, brief: str, text: str
) -> argparse.ArgumentParser:
    parser = output.new_parser(commands, name, run, brief=brief, text=text, exits=EXITS)
    parser.add_argument("--standbys", type=output.whole(1, 9), default=2, metavar="N", help="1 to 9 (2)")
    parser.add_argument("--pg", type=int, choices=(18, 16), help="version of PostgreSQL (18)")
    return parser


def runs_until_stopped(options: argparse.Namespace) -> bool:
    """Return whether a signal is the ordinary end of the command."""
    return options.command in (run_demo, run_cluster) and not getattr(options, "check", False)


def run_demo(options: argparse.Namespace) -> int:
    """Run the demo until it is stopped, or its tour."""
    if options.worker_class == "sync" and (options.threads or 1) > 1:
        options.refuse("a sync worker has one thread: leave --threads out, or use --worker-class gthread")
    if options.check and options.json:
        options.refuse("--check prints its steps for people: leave --json out")
    check_installed("gunicorn", *APPS[options.app][1], version=options.pg)
    chosen = Options(
        standbys=options.standbys,
        version=options.pg,
        port=options.port,
        workers=options.workers,
        worker_class=options.worker_class,
        threads=options.threads or 4,
        app=options.app,
        json=options.json,
    )
    if not options.check:
        run_until_stopped(chosen)
    return 0 if check(chosen) else 1


def run_cluster(options: argparse.Namespace) -> int:
    """Run the servers until they are stopped."""
    check_installed(version=options.pg)
    with Cluster(options.standbys, options.pg, auth=options.auth) as cluster:
        config = config_yaml(cluster)
        if options.json:
            known = {
                "status": "running",
                "servers": facts_of_servers(cluster),
                "config": yaml.safe_load(config),
            }
            print(json.dumps(known), flush=True)
        else:
            print(config, end="", flush=True)
        for node in cluster.nodes:
            print(f"{node.name}  {node.role:7}  {node.label}  process {node.pid}", file=sys.stderr)
        print("Ctrl-C stops them and removes their data.", file=sys.stderr)
        while True:
            signal.pause()

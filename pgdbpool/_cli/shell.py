"""`pgdbpool shell`: psql or pgcli on a server that a group would choose."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping

from psycopg.pq import Conninfo

from .._api.connection import Connection
from .._cli import output
from ..errors import ConfigError

TEXT = """\
Opens pgcli, or psql if that is not installed, with the connection that a group would open now: its server by
role, weight and lag, its user, database, TLS and server settings. A tenant is not bound: set it in the shell.

  pgdbpool shell read                     the configuration of the environment
  pgdbpool shell write pgdbpool.yaml
  echo 'SELECT 1' | pgdbpool shell read pgdbpool.yaml --program psql
"""
EXITS = "that of the program; 1 no server can be reached, or there is no such program; 2 wrong arguments.\n"
PROGRAMS = ("pgcli", "psql")


def add(commands: output.Commands) -> None:
    """Add the sub-command."""
    parser = output.new_parser(
        commands, "shell", run, brief="open psql on the server of a group", text=TEXT, exits=EXITS
    )
    parser.add_argument("group", metavar="GROUP")
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="the pgdbpool.yaml (default: the environment)"
    )
    parser.add_argument("--program", choices=PROGRAMS, help="(pgcli where it is installed, else psql)")


def run(options: argparse.Namespace) -> int:
    """Become the program; the password is in its environment, and not in the list of processes."""
    group, config = options.group, options.config
    if os.path.isfile(group) and config is not None and not os.path.exists(config):
        group, config = config, group  # as the other commands have it
    program = next(filter(shutil.which, [options.program] if options.program else PROGRAMS), None)
    if program is None:
        raise ConfigError(f"{options.program or ' and '.join(PROGRAMS)}: not installed, or not on the PATH")
    Connection.init(config, wait=False)
    try:
        label, given = Connection.group(group).would_open()
    finally:
        Connection.close(1.0)
    if options.json:
        output.show_json({"endpoint": label, "program": program})
    else:
        print(f"{group}: {label}", file=sys.stderr, flush=True)
        os.execvpe(program, [program], {**os.environ, **_variables(given)})
    return 0


def _variables(given: Mapping[str, str]) -> dict[str, str]:
    """Return libpq's environment variables for connection parameters."""
    names = {option.keyword.decode(): option.envvar for option in Conninfo.get_defaults()}
    return {
        name.decode(): value
        for key, value in given.items()
        if (name := names.get(key)) is not None and key != "application_name"
    }

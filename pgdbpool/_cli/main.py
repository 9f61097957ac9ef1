"""The command `pgdbpool`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

import psycopg

from .. import __version__
from .._cli import check, configuration, orders, output, ping, rls, servers, shell, size, status
from .._config.declarations import nearest
from .._demo.demo import DemoError, MissingExtra, Stopped, stopping_on_signals
from ..cluster import ClusterError
from ..errors import Error

DESCRIPTION = """\
A PostgreSQL pool over several servers, for WSGI. These commands show it on real servers, which they start
on free ports of this machine and throw away at the end:

  pgdbpool demo            an application in front of a primary and two standbys, to play with
  pgdbpool demo --check    the same, shown step by step in some seconds
  pgdbpool cluster         only the servers, with a pgdbpool.yaml for them, to develop against

And these examine your own:

  pgdbpool check           is the configuration right, and are its servers?
  pgdbpool ping            can every group be served right now?
  pgdbpool size            how many connections should each group have?
  pgdbpool rls             which roles, tables or functions expose another tenant's rows
  pgdbpool status          the pools of running processes
  pgdbpool shell           psql on the server that a group would choose

These act on all processes of a running application, and wait for their answers:

  pgdbpool drain, undrain  take a server out of use, and put it back
  pgdbpool pause, resume   hold new blocks back, as for a switchover, and let them go on
  pgdbpool expire          replace connections
  pgdbpool resize          change the size of a group
  pgdbpool reload          read the configuration again

And these are about the configuration:

  pgdbpool config-docs     the meaning and the values of each key
  pgdbpool config-schema   the JSON Schema of a configuration, for editors

`pgdbpool COMMAND --help` has examples.
"""
EPILOG = """\
Exit status: 0 done, or `demo` or `cluster` was stopped by a signal as intended; 1 something failed, the
message says what, or `rls` has findings; 2 wrong arguments, or the extra is missing (pip install
'pgdbpool[demo]'); 3 degraded (`check`, `ping`, `status`), or a process did
not answer; 128 + n if anything else was stopped by signal n.
"""

COMMANDS = (servers, rls, check, ping, size, status, shell, orders, configuration)
"""Modules with a function `add`, in the order of the help."""


def main(
    argv: Sequence[str] | None = None, *, adjust: Callable[[argparse.Namespace], None] | None = None
) -> int:
    """Run the command with these arguments and return its exit status; wrong ones raise SystemExit.

    :param adjust: changes the parsed options, for a program that has the configuration itself.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser(argv)
    options = parser.parse_args(argv)
    if adjust is not None:
        adjust(options)
    command: Callable[[argparse.Namespace], int] | None = options.command
    if command is None:
        parser.print_help(sys.stderr)
        return 2
    logging.getLogger("pgdbpool").addHandler(logging.NullHandler())  # commands report errors themselves
    try:
        with stopping_on_signals():
            return command(options)
    except Stopped as stopped:
        print(f"pgdbpool: stopped by {stopped}, nothing is left", file=sys.stderr)
        return 0 if servers.runs_until_stopped(options) else 128 + stopped.signum
    except MissingExtra as error:
        _show_error(options, error)
        print(f"pgdbpool: {error}", file=sys.stderr)
        return 2
    except (ClusterError, DemoError, Error, psycopg.Error) as error:
        _show_error(options, error)
        print(f"pgdbpool: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has exited, as in `pgdbpool demo | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1


def _show_error(options: argparse.Namespace, error: Exception) -> None:
    if getattr(options, "json", False):
        output.show_json({"status": "error", "error": str(error), "kind": type(error).__name__})


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "pgdbpool", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"pgdbpool {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    for module in COMMANDS:
        module.add(commands)
    word = next((word for word in argv if not word.startswith("-")), None)
    if word is not None and word not in commands.choices:
        parser.error(
            f"there is no command {word!r}{nearest(word, commands.choices)}; `pgdbpool --help` lists them"
        )
    return parser

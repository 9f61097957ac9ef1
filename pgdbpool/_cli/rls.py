"""`pgdbpool rls`: does row-level security keep the tenants of a group apart?"""

from __future__ import annotations

import argparse

from .._api.connection import Connection
from .._cli import output

TEXT = """\
Looks for ways in which the role that a group logs in as could get at rows of another tenant: tables without
row-level security, policies that ignore the tenant or open without one, roles, views and functions that
bypass it. Each finding comes with the SQL that fixes it. Nothing is changed.

  pgdbpool rls pgdbpool.yaml write
  pgdbpool rls pgdbpool.yaml write public.accounts --json
"""
EXITS = "0 no finding above info; 1 findings, or an error; 2 wrong arguments.\n"


def add(commands: output.Commands) -> None:
    """Add the sub-command."""
    parser = output.new_parser(
        commands, "rls", run, brief="audit the row-level security of a group", text=TEXT, exits=EXITS
    )
    parser.add_argument("config", metavar="CONFIG", help="the pgdbpool.yaml")
    parser.add_argument("group", metavar="GROUP", help="a group with a tenant setting")
    parser.add_argument(
        "tables",
        metavar="TABLE",
        nargs="*",
        default=[],
        help="schema.table; all that the role may use if left out",
    )
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="FINDING",
        help="leave out a finding, by code or code:subject, with *; may be given several times",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Audit the row-level security of a group."""
    Connection.init(options.config, wait=False)
    try:
        audit = Connection.audit_rls(options.group, options.tables or None, ignore=options.ignore)
    finally:
        Connection.close()
    if options.json:
        output.show_json(audit.to_dict())
    else:
        print(audit)
        if not audit.tables:
            print(f"the role of group {options.group!r} may use no table here: is it the right database?")
    return 0 if audit.ok else 1

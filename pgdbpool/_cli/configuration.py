"""`pgdbpool config-schema` and `pgdbpool config-docs`: the keys of a configuration."""

from __future__ import annotations

import argparse
import shutil
import textwrap

from .._cli import output
from .._config.declarations import nearest
from .._config.json_schema import PUBLISHED, Entry, reference, schema
from ..errors import ConfigError

SCHEMA = """\
Prints the JSON Schema of a configuration, with which an editor completes keys, shows their meaning and marks
errors. Editors with a YAML language server (VS Code with the YAML extension, Neovim, Emacs ...) use
it if the first line of the file names it:

  pgdbpool config-schema > pgdbpool.schema.json
  sed -i '1i # yaml-language-server: $schema=./pgdbpool.schema.json' pgdbpool.yaml

The same file is installed with the package; --path says where. `pgdbpool check` finds more than a schema can
express.
"""
DOCS = """\
Prints the meaning, the values and the default of each key of a configuration, or only of the keys that are
named, in full or in part.

  pgdbpool config-docs groups.max_lag
  pgdbpool config-docs timeout
  pgdbpool config-docs --json | jq '.[] | select(.part == "Groups") | .key'
"""
DONE = "0 done; 2 wrong arguments.\n"
FOUND = "0 done; 1 unknown key; 2 wrong arguments.\n"


def add(commands: output.Commands) -> None:
    """Add the sub-commands."""
    parser = output.new_parser(
        commands, "config-schema", run_schema, brief="print the JSON Schema of a configuration", text=SCHEMA,
        exits=DONE,
    )  # fmt: skip
    parser.add_argument("--path", action="store_true", help="print the path of the installed file")
    parser = output.new_parser(
        commands, "config-docs", run_docs, brief="print the meaning of a configuration's keys", text=DOCS,
        exits=FOUND,
    )  # fmt: skip
    parser.add_argument("keys", metavar="KEY", nargs="*", help="such as groups.max_lag, or part of it")


def run_schema(options: argparse.Namespace) -> int:
    """Print the schema, or its path."""
    if not options.path:
        output.show_json(schema())
    elif options.json:
        output.show_json({"path": str(PUBLISHED)})
    else:
        print(PUBLISHED)
    return 0


def run_docs(options: argparse.Namespace) -> int:
    """Print the reference of some keys, or of all."""
    every = list(reference())
    found = every
    if options.keys:
        names = {entry.key for entry in every}
        found = [
            e
            for e in every
            if any(key == e.key or (key not in names and key in e.key) for key in options.keys)
        ]
        for key in options.keys:
            if not any(key in name for name in names):
                short = {name.rpartition(".")[2] for name in names}
                raise ConfigError(f"there is no key {key!r}{nearest(key, names | short)}")
    if options.json:
        output.show_json([entry._asdict() for entry in found])
        return 0
    part = ""
    for entry in found:
        if entry.part != part:
            part = entry.part
            print(f"{output.paint(part.upper(), output.BOLD)}\n")
        print(_entry(entry))
    return 0


def _entry(entry: Entry) -> str:
    width = min(shutil.get_terminal_size().columns, 100)

    def wrapped(text: str) -> str:
        return textwrap.fill(text, width, initial_indent="    ", subsequent_indent="    ")

    lines = [output.paint(entry.key, output.BOLD), wrapped(entry.meaning)]
    lines += [wrapped(f"Takes {entry.allowed}."), wrapped(f"Default: {entry.default}.")]
    return "\n".join(lines) + "\n"

"""`pgdbpool drain`, `expire`, `pause` ...: orders to all running processes of an application."""

from __future__ import annotations

import argparse
import getpass
import os
import socket
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from .._cli import output
from .._cli.status import runtime_dir
from .._config.declarations import nearest
from .._status.answers import Answer, await_quiet, give
from .._status.runtime_dir import RuntimeDir
from ..errors import ConfigError
from ..overview import gather, stranded

DONE, FAILED, UNANSWERED = 0, 1, 3
LONGEST_PAUSE = 3600


class Command(NamedTuple):
    """A sub-command: its purpose and its options."""

    brief: str
    text: str
    options: str


PLACES = """
PLACE is the runtime_dir or the pgdbpool.yaml that names it; without it, PGDBPOOL_RUNTIME_DIR or
PGDBPOOL_CONFIG. Every process that publishes there answers, and the command says which one did not. The
processes log who gave the order. Whoever may write the directory may give one: the user that the
application runs as.
"""
COMMANDS = {
    "drain": Command(
        "take a server out of use",
        """\
Takes a server out of use, for its maintenance: no new block goes there, in the processes that run now and in
those that start later, until `pgdbpool undrain`.

  pgdbpool drain pgdbpool.yaml --endpoint db2:5432
""",
        "endpoint! force",
    ),
    "undrain": Command(
        "put a drained server back into use",
        """\
Puts a drained server back into use; connections even out as they come back.

  pgdbpool undrain pgdbpool.yaml --endpoint db2:5432
""",
        "endpoint!",
    ),
    "expire": Command(
        "replace connections",
        """\
Replaces connections: idle ones at once, those in use when their blocks end. For a changed role or extension.

  pgdbpool expire pgdbpool.yaml --group write
""",
        "group endpoint",
    ),
    "resize": Command(
        "change the size of a group",
        """\
Changes the size of a group's pool in each process. A process that starts later has the configured size.

  pgdbpool resize pgdbpool.yaml --group read --connection-count 20
""",
        "group! sizes",
    ),
    "reload": Command(
        "read the configuration again",
        """\
Has each process read its own pgdbpool.yaml again and apply the changes. An invalid one changes nothing.

  pgdbpool reload pgdbpool.yaml
""",
        "",
    ),
    "pause": Command(
        "hold new blocks back",
        """\
Holds new blocks back, each within its own `timeout`, until `pgdbpool resume`, and waits for the open ones to
end. For a switchover without an error: pause, switch over, resume.

  pgdbpool pause pgdbpool.yaml --for 30
""",
        "group for",
    ),
    "resume": Command(
        "let the blocks of a pause go on",
        """\
Ends a pause.

  pgdbpool resume pgdbpool.yaml
""",
        "group",
    ),
}
EXITS = """\
0 every process has done it; 1 one could not, or no process publishes there; 2 wrong arguments;
3 one did not answer in time, or a block is still open after `pause`.
"""


def add(commands: output.Commands) -> None:
    """Add the sub-commands."""
    for name, command in COMMANDS.items():
        parser = output.new_parser(
            commands, name, run, brief=command.brief, text=command.text + PLACES, exits=EXITS
        )
        parser.add_argument("place", metavar="PLACE", nargs="?", help="the runtime_dir, or the pgdbpool.yaml")
        if "group" in command.options:
            parser.add_argument(
                "--group", metavar="G", required="group!" in command.options, help="this group only"
            )
        if "endpoint" in command.options:
            needed = "endpoint!" in command.options
            parser.add_argument("--endpoint", metavar="E", required=needed, help="the label of the server")
        if "sizes" in command.options:
            size = output.whole(0, 100_000)
            parser.add_argument("--connection-count", type=size, metavar="N", help="the most connections")
            parser.add_argument("--min-size", type=size, metavar="N", help="connections that are kept open")
        if "for" in command.options:
            parser.add_argument(
                "--for", dest="seconds", type=output.whole(1, LONGEST_PAUSE), default=60, metavar="S",
                help="the pause ends by itself after S seconds (60)",
            )  # fmt: skip
        if "force" in command.options:
            parser.add_argument("--force", action="store_true", help="even if a group has no other server")
        parser.add_argument(
            "--timeout", type=output.seconds, default=10.0, metavar="S", help="for all answers together (10)"
        )
        parser.set_defaults(do=name, refuse=parser.error)


def run(options: argparse.Namespace) -> int:
    """Give the order, wait for the answers, and show them."""
    given = vars(options)
    order: dict[str, Any] = {
        key: given[key]
        for key in ("do", "group", "endpoint", "connection_count", "min_size")
        if given.get(key) is not None
    }
    if options.do == "resize" and not {"connection_count", "min_size"} & order.keys():
        options.refuse("say the new size: --connection-count N, --min-size N, or both")
    if options.do == "pause":
        order["until"] = time.time() + options.seconds
    directory = runtime_dir(options.place)
    view = gather(directory)
    _check_names(view, order)
    if options.do == "drain" and not options.force and (why := stranded(view, options.endpoint)):
        raise ConfigError(f"{options.endpoint} is not drained: {why}; --force drains it all the same")
    deadline = time.monotonic() + options.timeout
    with RuntimeDir(directory) as room, output.Progress() as progress:
        answers = give(
            room,
            {**order, "by": _me()},
            deadline,
            lambda missing: progress(f"waiting for {missing} processes"),
        )
        busy: Mapping[tuple[int, str], int] = {}
        if options.do == "pause":
            progress("waiting for the open blocks")
            busy = await_quiet(room, [options.group] if options.group else None, deadline)
    _show(answers, busy, options.json)
    if not answers or any(answer.done is False for answer in answers):
        return FAILED
    return UNANSWERED if busy or any(answer.done is None for answer in answers) else DONE


def _check_names(view: Mapping[str, Any], order: Mapping[str, Any]) -> None:
    """Refuse a group or an endpoint that no process has, before an order is given."""
    for key, part, name in (("group", "groups", "name"), ("endpoint", "endpoints", "label")):
        known = {found[name] for found in view[part]}
        if (given := order.get(key)) is not None and view["processes"] and given not in known:
            names = ", ".join(sorted(known))
            raise ConfigError(f"no process has the {key} {given!r}{nearest(given, known)}; there are {names}")


def _me() -> str:
    """Return the user, machine and process that give the order."""
    try:
        user = os.environ.get("SUDO_USER") or getpass.getuser()
    except (OSError, KeyError):  # no such user is known here
        user = str(os.geteuid())
    return f"{user} on {socket.gethostname()} (process {os.getpid()})"


def _show(answers: list[Answer], busy: Mapping[tuple[int, str], int], as_json: bool) -> None:
    if as_json:
        told = [
            {**answer._asdict(), "open_blocks": busy.get((answer.pid, answer.set), 0)} for answer in answers
        ]
        output.show_json({"answers": told})
        return
    if not answers:
        print("no process publishes its status here, so none took the order")
    words = {True: "done", False: "failed", None: "silent"}
    rows = []
    for answer in answers:
        still = busy.get((answer.pid, answer.set))
        text = answer.text + (f"; {still} blocks are still open" if still else "")
        rows.append((f"{answer.pid} {answer.set}".rstrip(), words[answer.done], text))
    if rows:
        print(output.table(("PROCESS", "OUTCOME", "ANSWER"), rows))

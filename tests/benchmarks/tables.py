"""The results as tables: for the terminal, and for the documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from .peers import PEERS

OPERATIONS = {
    "read": "read",
    "tenant_read": "tenant read",
    "transaction 1": "tenant transaction, 1 statement",
    "transaction 3": "tenant transaction, 3 statements",
    "transaction 10": "tenant transaction, 10 statements",
    "write": "one write",
    "fetchval": "one value",
    "rows": "50 rows",
    "block_write": "transaction, 1 write",
    "deadline_read": "read, deadline in use",
}
MODES = {
    "threaded": "pgdbpool", "non-threaded": "pgdbpool, lock-free", "lock": "a lock, without a pool",
}  # fmt: skip


class Table(NamedTuple):
    """A table of texts."""

    title: str
    head: list[str]
    rows: list[list[str]]


def number(value: float | None) -> str:
    """Write a number with three digits that count."""
    if value is None:
        return ""
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def with_spread(found: Mapping[str, float] | None) -> str:
    """Write a median with its quartiles."""
    if not found:
        return ""
    low, median, high = (number(found[key]) for key in ("low", "median", "high"))
    return median if low == high else f"{median} ({low} to {high})"


def label(peer: str) -> str:
    """Return a peer's name as people read it."""
    return PEERS[peer].label if peer in PEERS else peer


def by_peer(columns: Mapping[str, Mapping[str, Any]], write: Callable[[Any], str]) -> list[list[str]]:
    """Return a row for each peer that any of the columns has, in the order of the peers."""
    seen = {peer for column in columns.values() for peer in column}
    return [
        [label(peer), *(write(column[peer]) if peer in column else "" for column in columns.values())]
        for peer in PEERS
        if peer in seen
    ]


def _round_trips(found: dict[str, Any]) -> Iterable[Table]:
    columns = {OPERATIONS[name]: peers for name, peers in found.items()}
    yield Table("Round trips", ["", *columns], by_peer(columns, number))


def _latency(found: dict[str, Any]) -> Iterable[Table]:
    for place, operations in found.items():
        where = f"{place} network" if place.endswith("ms") else f"loopback, client and server on {place}"
        columns = {f"{OPERATIONS[name]}, µs": peers for name, peers in operations.items()}
        rows = by_peer(
            columns, lambda one: " / ".join(number(one[p]["median"]) for p in ("p50", "p95", "p99"))
        )
        yield Table(f"Latency, {where}: p50 / p95 / p99", ["", *columns], rows)
        columns = {OPERATIONS[name]: peers for name, peers in operations.items()}
        rows = by_peer(columns, lambda one: with_spread(one["ratio"]))
        yield Table(f"Latency, {where}: p50 to that of the held connection", ["", *columns], rows)


def _throughput(found: dict[str, Any]) -> Iterable[Table]:
    columns = {f"{name} connections": peers for name, peers in found["threads"].items()}
    rows = by_peer(columns, lambda one: number(one["value"]["median"]))
    yield Table("Reads per second: threads on connections", ["", *columns], rows)
    rows = by_peer(columns, lambda one: f"{one['share']['median']:.3f}")
    yield Table("Reads of the slowest thread to those of the fastest", ["", *columns], rows)
    columns = {f"{name} processes": peers for name, peers in found["processes"].items()}
    rows = by_peer(columns, lambda one: with_spread(one["value"]))
    yield Table("Reads per second: processes with one connection each", ["", *columns], rows)
    if found["example"]:
        head = ["worker class", "requests per second", "p50, ms", "p99, ms", "failed"]
        keys = ("rate", "p50", "p99", "failed")
        rows = [[kind, *(with_spread(one[key]) for key in keys)] for kind, one in found["example"].items()]
        yield Table("The example under gunicorn, two workers, eight clients", head, rows)
    if found.get("web"):
        columns = {OPERATIONS[name]: peers for name, peers in found["web"].items()}
        rows = by_peer(columns, lambda one: f"{number(one['value']['median'])}, {with_spread(one['ratio'])}")
        title = "One application under gunicorn: requests per second, and to psycopg_pool with check"
        yield Table(title, ["", *columns], rows)


def _bookkeeping(found: dict[str, Any]) -> Iterable[Table]:
    columns = {
        "µs": {peer: with_spread(one["value"]) for peer, one in found["checkout"].items()},
        "to psycopg_pool": {peer: with_spread(one.get("ratio")) for peer, one in found["checkout"].items()},
    }
    yield Table("Checkout and checkin without a query", ["", *columns], by_peer(columns, str))
    names = {"checkout": "without a query", **OPERATIONS}
    columns = {
        names[operation]: {
            peer: f"{number(one['bytecodes'])}, {one['python']}, {one['c']}" for peer, one in peers.items()
        }
        for operation, peers in found["steps"].items()
    }
    title = "Steps of a block: bytecodes, calls of Python, calls of C"
    yield Table(title, ["", *columns], by_peer(columns, str))
    for what, modes in found["growth"].items():
        sizes = next(iter(modes.values()))
        rows = []
        for mode, seen in modes.items():
            rows.append([f"{MODES[mode]}, µs", *(with_spread(seen[size]["value"]) for size in sizes)])
            rows.append([f"{MODES[mode]}, to 1", *(with_spread(seen[size].get("ratio")) for size in sizes)])
        kind = "Handing a connection over" if what == "waiters" else "Checkout and checkin"
        yield Table(f"{kind}, by number of {what}", ["", *sizes], rows)


def _recovery(found: dict[str, Any]) -> Iterable[Table]:
    columns = {}
    for stale, peers in found["restart"].items():
        columns[f"{stale} stale: first success, ms"] = {
            peer: with_spread({key: 1000 * value for key, value in one["first"].items()})
            for peer, one in peers.items()
        }
        columns[f"{stale} stale: errors"] = {
            peer: with_spread(one["errors"]) + ("" if one["recovered"] else ", never recovered")
            for peer, one in peers.items()
        }
    yield Table("After a restart of the server", ["", *columns], by_peer(columns, str))
    promotion = found["promotion"]
    titles = {"outage": "without service, s", "after": "after the promotion, s", "errors": "errors"}
    columns = {
        title: {peer: with_spread(one[key]) for peer, one in promotion.items()}
        for key, title in titles.items()
    }
    yield Table("The primary is killed and a standby promoted", ["", *columns], by_peer(columns, str))


def _footprint(found: dict[str, Any]) -> Iterable[Table]:
    memory = {"bytes": {peer: number(value) for peer, value in found["memory"].items() if peer != "bare"}}
    title = "Memory of an idle connection above a bare one"
    yield Table(title, ["", *memory], by_peer(memory, str))
    names = {name: one for name, one in found["imports"].items() if name != "python"}
    base = found["imports"]["psycopg"]["value"]["median"]
    rows = [
        [f"import {name}", with_spread(one["value"]), number(one["value"]["median"] - base)]
        for name, one in names.items()
    ]
    yield Table("Import", ["", "ms", "above psycopg's, ms"], rows)
    rows = [
        [label(peer), with_spread(one["milliseconds"]), str(one["threads"]), str(one["threads_in_use"])]
        for peer, one in found["init"].items()
    ]
    yield Table("`init` with three servers", ["", "ms", "threads", "threads after a checkout"], rows)


_TABLES: dict[str, Callable[[dict[str, Any]], Iterable[Table]]] = {
    "round_trips": _round_trips,
    "latency": _latency,
    "throughput": _throughput,
    "bookkeeping": _bookkeeping,
    "recovery": _recovery,
    "footprint": _footprint,
}


def tables(part: str, found: dict[str, Any]) -> list[Table]:
    """Return the tables of a part's results."""
    return list(_TABLES[part](found))


def as_text(part: str, found: dict[str, Any]) -> str:
    """Write a part's results for the terminal."""
    return "\n".join(_text(table) for table in tables(part, found))


def _text(table: Table) -> str:
    lines = [table.head, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.head))]
    written = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    ]
    return "\n".join([table.title, "-" * len(table.title), *(line.rstrip() for line in written), ""])


def as_rst(table: Table) -> str:
    """Write a table for the documentation."""
    lines = [f".. list-table:: {table.title}", "   :header-rows: 1", "   :stub-columns: 1", ""]
    for line in (table.head, *table.rows):
        lines += [
            f"   {'*' if not position else ' '} - {cell}".rstrip() for position, cell in enumerate(line)
        ]
    return "\n".join([*lines, ""])

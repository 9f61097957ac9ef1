"""Holds the history of a bank against what is in the database at its end, and knows nothing else.

    python tests/faults/bank_checker.py DIRECTORY

`history.jsonl` has one JSON object a line, written by the tellers and the nemesis as things happen, and
`final.jsonl` what a superuser read when all was over. Neither a pool nor a server is asked here.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

Line = dict[str, Any]

ALLOWED = {"ok": (1,), "unknown": (0, 1), "none": (0,)}
"""How often a transfer may be there, by the outcome that its client was told."""


@dataclass
class Verdict:
    """What is wrong, and what there is to know."""

    violations: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"  {figure}" for figure in self.figures] + [f"  {len(self.violations)} violations"]
        return "\n".join(lines + [f"    {violation}" for violation in self.violations[:20]])


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the objects of a file with one in each line."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def check(directory: Path) -> Verdict:
    """Read the two files in the directory and return the verdict."""
    by_type: defaultdict[str, list[Line]] = defaultdict(list)
    for line in (*read_lines(directory / "history.jsonl"), *read_lines(directory / "final.jsonl")):
        by_type[line["type"]].append(line)
    [plan] = by_type["plan"]
    transfers, reads = by_type["transfer"], by_type["read"]
    verdict = Verdict()
    wrong = verdict.violations
    wrong += (f"unexpected: {line['text']}" for line in by_type["unexpected"])
    wrong += check_entries(transfers, by_type["entry"])
    wrong += check_balances(plan, by_type["account"], by_type["entry"])
    wrong += check_reads(plan, reads)
    wrong += check_bounds(plan, transfers + reads)
    recoveries, slow = check_recovery(plan, transfers, by_type["fault"], by_type["healed"])
    wrong += slow
    verdict.figures += figures(transfers, reads, by_type["fault"], recoveries)
    return verdict


# What must hold.


def check_entries(transfers: list[Line], entries: list[Line]) -> Iterator[str]:
    """Each acknowledged transfer is there once, each unknown one once at most, each refused one never."""
    there: defaultdict[str, list[Line]] = defaultdict(list)
    for entry in entries:
        there[entry["id"]].append(entry)
    for transfer in transfers:
        found = there.pop(transfer["id"], [])
        if len(found) not in ALLOWED[transfer["outcome"]]:
            yield f"{transfer['outcome']}, and {len(found)} times there: {transfer}"
        for entry in found:
            if any(entry[key] != transfer[key] for key in ("source", "target", "amount")):
                yield f"{entry} is not what was asked for: {transfer}"
    for number in there:
        yield f"{number} is there, and nobody has asked for it"


def check_balances(plan: Line, accounts: list[Line], entries: list[Line]) -> Iterator[str]:
    """Each account has what its entries say, and so the sum holds."""
    balances = dict.fromkeys(range(plan["accounts"]), plan["balance"])
    for entry in entries:
        balances[entry["source"]] -= entry["amount"]
        balances[entry["target"]] += entry["amount"]
    found = {account["id"]: account["balance"] for account in accounts}
    if balances.keys() != found.keys():
        yield f"{len(found)} accounts are there, there were {len(balances)}"
    for number in balances.keys() & found.keys():
        if balances[number] != found[number]:
            yield f"account {number} has {found[number]}, its entries say {balances[number]}"


def check_reads(plan: Line, reads: list[Line]) -> Iterator[str]:
    """No moment ever showed half a transfer, on the primary or on the standby."""
    total = plan["accounts"] * plan["balance"]
    for read in reads:
        if read["sum"] not in (total, None):
            yield f"a reader saw the sum {read['sum']}, not {total}: {read}"


def check_bounds(plan: Line, lines: list[Line]) -> Iterator[str]:
    """No call took longer than it may, whatever was broken."""
    for line in lines:
        for kind, seconds in line["calls"].items():
            if seconds > plan["bounds"][kind]:
                yield f"{kind} took {seconds:.1f} s, its bound is {plan['bounds'][kind]:g} s: {line}"


def check_recovery(
    plan: Line, transfers: list[Line], faults: list[Line], healed: list[Line]
) -> tuple[list[float], list[str]]:
    """Return how long each process took to its first success when all was mended, and what is wrong."""
    successes: defaultdict[int, list[float]] = defaultdict(list)
    for transfer in transfers:
        if transfer["outcome"] == "ok":
            successes[transfer["process"]].append(transfer["end"])
    taken, wrong = [], []
    for mended in healed:
        # The next fault comes when all have recovered, or after the bound: it is not in the way before.
        later = [fault["at"] for fault in faults if fault["at"] > mended["at"]]
        until = min([*later, plan["until"]])
        for process in range(plan["processes"]):
            first = min((end for end in successes[process] if end >= mended["at"]), default=float("inf"))
            if first <= mended["at"] + plan["recovery"]:
                taken.append(first - mended["at"])
            elif until >= mended["at"] + plan["recovery"]:
                wrong.append(
                    f"process {process} had no success within {plan['recovery']:g} s after {mended['fault']}"
                )
    return taken, wrong


# What there is to know.


def percentiles(values: Iterable[float]) -> str:
    """Return the distribution of durations, in milliseconds."""
    ordered = sorted(values)
    if not ordered:
        return "none"
    ranks = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}
    parts = [f"{name} {ordered[int(rank * (len(ordered) - 1))] * 1000:.1f}" for name, rank in ranks.items()]
    return ", ".join([*parts, f"worst {ordered[-1] * 1000:.1f} ms"])


def longest_silence(transfers: list[Line]) -> float:
    """Return the longest time without a success of anyone."""
    ends = sorted(transfer["end"] for transfer in transfers if transfer["outcome"] == "ok")
    return max((after - before for before, after in pairwise(ends)), default=float("inf"))


def figures(
    transfers: list[Line], reads: list[Line], faults: list[Line], recoveries: list[float]
) -> Iterator[str]:
    """Yield the counts and times of a run, one line each."""
    outcomes = Counter(transfer["outcome"] for transfer in transfers)
    yield f"{len(transfers)} transfers: " + ", ".join(f"{outcomes[name]} {name}" for name in ALLOWED)
    yield f"{len(reads)} reads, {sum(read['sum'] is None for read in reads)} without an answer"
    yield f"{len(faults)} faults: " + _counts(fault["fault"] for fault in faults)
    yield "acknowledged in: " + percentiles(t["end"] - t["start"] for t in transfers if t["outcome"] == "ok")
    yield "not acknowledged in: " + percentiles(
        t["end"] - t["start"] for t in transfers if t["outcome"] != "ok"
    )
    slowest: dict[str, float] = {}
    for line in transfers + reads:
        for kind, seconds in line["calls"].items():
            slowest[kind] = max(slowest.get(kind, 0.0), seconds)
    yield "slowest calls: " + ", ".join(f"{kind} {seconds:.2f} s" for kind, seconds in slowest.items())
    yield f"longest time without a success: {longest_silence(transfers):.1f} s"
    yield "first success of a process after all was mended: " + percentiles(recoveries)
    yield "errors: " + _counts(
        f"{line['error']}{' (unknown)' if line.get('outcome') == 'unknown' else ''}"
        for line in transfers + reads
        if line["error"]
    )


def _counts(names: Iterable[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(names).most_common()) or "none"


if __name__ == "__main__":
    found = check(Path(sys.argv[1]))
    print(found)
    sys.exit(bool(found.violations))

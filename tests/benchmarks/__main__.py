"""The command: measure, and render what was measured.

python -m tests.benchmarks --quick                # all, in less than two minutes
python -m tests.benchmarks                        # all, in about ten
python -m tests.benchmarks --only latency         # one part; the others stay as they are in the JSON
python -m tests.benchmarks --report               # render the documentation's page from the JSON
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import bookkeeping, footprint, latency, machine, recovery, round_trips, throughput
from .bench import Bench, Part
from .peers import PEERS
from .tables import as_text

PARTS: dict[str, Part] = {
    "round_trips": round_trips.measure,
    "latency": latency.measure,
    "throughput": throughput.measure,
    "bookkeeping": bookkeeping.measure,
    "recovery": recovery.measure,
    "footprint": footprint.measure,
}
ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "build" / "benchmarks.json"
PAGE = ROOT / "doc" / "benchmarks"


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions: less than two minutes")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; may be repeated")
    parser.add_argument("--peers", help=f"only these, with commas between: {','.join(PEERS)}")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results are (%(default)s)")
    parser.add_argument("--report", action="store_true", help="render tables and plots for the documentation")
    options = parser.parse_args(argv)
    if options.report and not options.only and not options.quick:
        return report(options.json)
    names = tuple(options.peers.split(",")) if options.peers else tuple(PEERS)
    if unknown := set(names) - set(PEERS):
        parser.error(f"there is no peer {', '.join(unknown)}: choose from {', '.join(PEERS)}")
    if len(os.sched_getaffinity(0)) < 2:
        print("one core only: what needs two is left out", file=sys.stderr)
    results = read(options.json)
    with Bench(quick=options.quick, peers=names) as bench:
        results["machine"] = machine.describe(bench)
        for name in options.only or PARTS:
            bench.progress.part(name)
            found = PARTS[name](bench)
            results["parts"][name] = {
                "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
                "quick": options.quick,
                "found": found,
            }
            bench.progress.end()
            write(options.json, results)
            print(as_text(name, found), flush=True)
    return report(options.json) if options.report else 0


def read(path: Path) -> dict[str, Any]:
    """Return the results so far."""
    if path.exists():
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    return {"parts": {}}


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the results, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(rounded(results), indent=1, sort_keys=True) + "\n")
    new.replace(path)


def rounded(found: Any) -> Any:
    """Return the results with no more digits than they are worth."""
    if isinstance(found, dict):
        return {key: rounded(value) for key, value in found.items()}
    if isinstance(found, list):
        return [rounded(value) for value in found]
    return float(f"{found:.5g}") if isinstance(found, float) else found


def report(path: Path) -> int:
    """Render the JSON into the documentation's directory."""
    from .report import render  # with matplotlib, which measuring does not need

    if not path.exists():
        print(f"there is no {path}: measure first, python -m tests.benchmarks", file=sys.stderr)
        return 1
    results = read(path)
    write(PAGE / "results.json", results)
    for written in render(results, PAGE):
        print(written.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())

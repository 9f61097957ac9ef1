"""Write the table and the plot of own writes: what `python -m tests.benchmarks.own_writes` has measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

from matplotlib.figure import Figure

HERE = Path(__file__).parent / "benchmarks"
WAYS = {
    "token": ("tokens, ``fresh_wait`` 0.1 s", "tokens, fresh_wait 0.1 s", "#1f6f8b"),
    "token, no wait": ("tokens, no wait", "tokens, no wait", "#7fb3c5"),
    "stick": ("the primary for 5 s", "the primary for 5 s", "#b8b8b8"),
}


def table(found: dict[str, Any]) -> str:
    """Return both tables in reStructuredText."""
    lines = [
        ".. list-table:: Reads that stay on standbys, by how far these are behind",
        "   :header-rows: 1",
        "",
    ]
    lines.append("   * - Way")
    lines += [f"     - {lag} ms" for lag in found["shares"]]
    for way, (name, _, _) in WAYS.items():
        lines.append(f"   * - {name}")
        lines += [f"     - {by[way]['standbys']:.1%}" for by in found["shares"].values()]
    lines += [
        "",
        ".. list-table:: Microseconds of a block of one read, lower quartile",
        "   :header-rows: 1",
        "",
        "   * - Network",
    ]
    names = {
        "without": "without a token",
        "known": "a token that its connection has passed",
        "guarded": "a new token, so with a guard",
    }
    lines += [f"     - {name}" for name in names.values()]
    for place, one in found["latency"].items():
        lines.append(f"   * - {place}")
        lines += [f"     - {one[name]:.0f} ({one[name] / one['without']:.2f})" for name in names]
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any]) -> Figure:
    """Return the shares as bars."""
    mpl.rcParams.update(
        {"svg.hashsalt": "pgdbpool", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots()
    for place, (way, (_, name, colour)) in enumerate(WAYS.items()):
        at = [number + (place - 1) * 0.27 for number in range(len(found["shares"]))]
        shares = [100 * by[way]["standbys"] for by in found["shares"].values()]
        drawn = axes.bar(at, shares, 0.25, color=colour, label=name)
        axes.bar_label(drawn, labels=[f"{share:.0f}" for share in shares], padding=2, fontsize=8)
    axes.set_xticks(range(len(found["shares"])), [f"{lag} ms behind" for lag in found["shares"]])
    axes.set_ylabel("% of reads on standbys")
    axes.set_ylim(0, 112)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=3, frameon=False)
    return figure


if __name__ == "__main__":
    measured = json.loads((HERE / "own_writes.json").read_text())
    (HERE / "own_writes.inc").write_text(table(measured))
    plot(measured).savefig(HERE / "own-writes.svg", metadata={"Date": None})

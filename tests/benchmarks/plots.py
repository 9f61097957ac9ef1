"""The results as plots."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .peers import PEERS
from .tables import MODES, OPERATIONS, label

OURS, THEIRS = "#1f6f8b", "#b8b8b8"

mpl.use("svg")
mpl.rcParams.update(
    {"svg.hashsalt": "pgdbpool", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
)


def bars(axes: Axes, figures: dict[str, dict[str, float]], title: str, unit: str) -> None:
    """Draw a bar for each peer, with its quartiles, ours in colour."""
    names = [peer for peer in PEERS if peer in figures][::-1]
    medians = [figures[name]["median"] for name in names]
    errors = [
        [figures[name]["median"] - figures[name]["low"] for name in names],
        [figures[name]["high"] - figures[name]["median"] for name in names],
    ]
    colours = [OURS if name.startswith("pgdbpool") else THEIRS for name in names]
    drawn = axes.barh([label(name) for name in names], medians, color=colours, xerr=errors, ecolor="#555")
    axes.bar_label(drawn, labels=[f"{value:.3g}" for value in medians], padding=4, fontsize=8)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(unit)
    axes.margins(x=0.15)


def draw(parts: dict[str, Any], directory: Path) -> Iterator[Path]:
    """Write the plots that the results have figures for; yield their files."""
    if found := parts.get("round_trips"):
        chosen = ("read", "tenant_read", "transaction 3")
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        for axes, operation in zip(figure.subplots(1, 3, sharey=True), chosen, strict=True):
            exact = {
                peer: dict.fromkeys(("median", "low", "high"), n) for peer, n in found[operation].items()
            }
            bars(axes, exact, OPERATIONS[operation], "round trips")
        yield _save(figure, directory / "round-trips.svg")
    if found := parts.get("latency"):
        places = [place for place in ("one core", "0.5 ms") if place in found]
        for place in places:
            figure = Figure(figsize=(10, 3.2), layout="constrained")
            chosen = ("read", "tenant_read", "transaction 3")
            for axes, operation in zip(figure.subplots(1, 3, sharey=True), chosen, strict=True):
                medians = {peer: one["p50"] for peer, one in found[place][operation].items()}
                bars(axes, medians, OPERATIONS[operation], "µs, p50")
            yield _save(figure, directory / f"latency-{place.replace(' ', '-')}.svg")
    if found := parts.get("throughput"):
        figure = Figure(figsize=(10, 3.2), layout="constrained")
        for axes, size in zip(figure.subplots(1, 2, sharey=True), (4, 16), strict=True):
            _lines(axes, found["threads"], size)
        axes.set_ylim(bottom=0)  # of both, which share it
        yield _save(figure, directory / "throughput.svg")
    if found := parts.get("bookkeeping"):
        figure = Figure(figsize=(10, 3), layout="constrained")
        left, right = figure.subplots(1, 2)
        quick = {p: one["value"] for p, one in found["checkout"].items() if one["value"]["median"] < 30}
        bars(left, quick, "checkout and checkin without a query", "µs")
        _growth(right, found["growth"])
        yield _save(figure, directory / "bookkeeping.svg")
    if found := parts.get("recovery"):
        figure = Figure(figsize=(10, 3), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        stale = found["restart"]["40"]
        first = {peer: {k: 1000 * v for k, v in one["first"].items()} for peer, one in stale.items()}
        bars(left, first, "first success after a restart, 40 stale", "ms, logarithmic")
        left.set_xscale("log")
        bars(
            right,
            {peer: one["errors"] for peer, one in stale.items()},
            "errors until then and after",
            "errors",
        )
        yield _save(figure, directory / "recovery.svg")


def _lines(axes: Axes, found: dict[str, Any], size: int) -> None:
    threads = sorted(int(name.split()[0]) for name in found if name.endswith(f" on {size}"))
    for peer in PEERS:
        points = [
            (number, found[f"{number} on {size}"][peer]["value"]["median"])
            for number in threads
            if peer in found[f"{number} on {size}"]
        ]
        if len(points) > 1:
            width = 2.2 if peer == "pgdbpool" else 1.0
            axes.plot(
                *zip(*points, strict=True), marker="o", markersize=3, linewidth=width, label=label(peer)
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(threads, [str(number) for number in threads])
    axes.set_title(f"reads per second, {size} connections", loc="left", fontsize=10)
    axes.set_xlabel("threads")
    if size == 16:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _growth(axes: Axes, growth: dict[str, Any]) -> None:
    for what, modes in growth.items():
        for mode, sizes in modes.items():
            points = sorted(
                (int(size), one["ratio"]["median"]) for size, one in sizes.items() if "ratio" in one
            )
            style = "-" if mode == "threaded" else "--"
            name = what if mode == "threaded" else f"{what}: {MODES[mode].removeprefix('pgdbpool, ')}"
            axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=name)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.axhline(1.2, color="#999", linewidth=0.8, linestyle=":")
    axes.set_title("cost by number, to that of one", loc="left", fontsize=10)
    axes.legend(fontsize=7, frameon=False)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    return path

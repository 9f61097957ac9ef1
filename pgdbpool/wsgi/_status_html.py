"""The status page as HTML: a function for each section, which the page's script requests repeatedly."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from .._util.durations import quantile

SHARES = (0.5, 0.95, 0.99)
"""The percentiles of the waits that are shown."""

NOTHING = "\N{EN DASH}"
SYMBOLS = {"up": "●", "down": "▲", "draining": "◆"}
EVENT_SYMBOLS = {"up": "●", "down": "▲", "drain": "◆", "failover": "⇄", "order": "▸"}

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="stylesheet" href="status.css">
<noscript><meta http-equiv="refresh" content="5"></noscript>
<script src="status.js" defer></script>
</head>
<body>
<a class="skip" href="#endpoints">To the endpoints</a>
<header><h1>Database pools</h1>
<div class="live"><span id="news" role="status"></span>
<button id="pause" type="button" hidden>Pause</button></div>
</header>
<main>
{sections}
</main>
</body>
</html>
"""


def page(view: Mapping[str, Any], form: str | None, *, alone: bool) -> str:
    """Return the whole page.

    :param form: the secret in the drain and undrain forms; None leaves the forms out.
    :param alone: whether only this process is shown, since none publishes.
    """
    parts = sections(view, form, alone=alone)
    title = parts.pop("title")
    return PAGE.format(title=escape(title), sections="\n".join(parts.values()))


def sections(view: Mapping[str, Any], form: str | None, *, alone: bool) -> dict[str, str]:
    """Return the page's title as text, and each section as HTML by its id."""
    down = [endpoint["label"] for endpoint in view["endpoints"] if endpoint["state"] == "down"]
    return {
        "title": f"{'▲ ' + ', '.join(down) + ' down' if down else 'All up'} · pgdbpool",
        "summary": _summary(view, alone),
        "endpoints": _endpoints(view, form),
        "groups": _groups(view),
        "holders": _holders(view),
        "events": _events(view),
        "processes": _processes(view),
    }


def _section(name: str, title: str, *parts: str) -> str:
    return (
        f'<section id="{name}" aria-labelledby="{name}-title" tabindex="-1">'
        f'<h2 id="{name}-title">{title}</h2>{"".join(parts)}</section>'
    )


def _summary(view: Mapping[str, Any], alone: bool) -> str:
    endpoints, processes = view["endpoints"], view["processes"]
    states = [endpoint["state"] for endpoint in endpoints]
    silent = sum(process["silent"] for process in processes)
    worst = "down" if "down" in states or silent else "draining" if "draining" in states else "up"
    text = {
        "up": "All endpoints up",
        "draining": f"{states.count('draining')} of {len(states)} endpoints draining",
        "down": f"{states.count('down')} of {len(states)} endpoints down"
        if "down" in states
        else _number(silent, "process does", "processes do") + " not answer",
    }[worst]
    if not processes:
        worst, text = "down", "No process publishes its status"
    busy = sum(group["in_use"] for group in view["groups"])
    waiting = sum(group["waiting"] for group in view["groups"])
    note = (
        '<p class="note">Only this process is shown: configure <code>runtime_dir</code> to see all.</p>'
        if alone
        else ""
    )
    facts = [
        _fact("Processes", str(len(processes))),
        _fact("Connections", str(sum(endpoint["connections"] for endpoint in endpoints))),
        _fact("In use", str(busy)),
        _fact("Waiting", str(waiting), warn=waiting > 0),
        _fact("As of", _clock(view["time"])),
    ]
    return (
        f'<div id="summary"><p class="verdict {worst}"><span aria-hidden="true">{SYMBOLS[worst]}</span> '
        f'{escape(text)}</p><dl class="facts">{"".join(facts)}</dl>{note}</div>'
    )


def _fact(name: str, value: str, *, warn: bool = False) -> str:
    return f"<div class={'warn' if warn else 'calm'}><dt>{name}</dt><dd>{value}</dd></div>"


# Endpoints.


def _endpoints(view: Mapping[str, Any], form: str | None) -> str:
    columns = ["Endpoint", "State", "Connections", "Share", "Lag", "Network", "Last error"]
    if form is not None:
        columns.append("Action")
    rows = [_endpoint(endpoint, view, columns, form) for endpoint in view["endpoints"]]
    return _section("endpoints", "Endpoints", _table(columns, rows))


def _endpoint(
    endpoint: Mapping[str, Any], view: Mapping[str, Any], columns: Sequence[str], form: str | None
) -> list[str]:
    label, state, share = endpoint["label"], endpoint["state"], endpoint["share"]
    role = endpoint["role"] or "role unknown"
    if endpoint["outdated"]:
        role += f", left behind on timeline {endpoint['timeline']}"
    in_state, of = endpoint["states"][state], sum(endpoint["states"].values())
    some = f" <small>in {in_state} of {of} processes</small>" if in_state < of else ""
    error = NOTHING
    if endpoint["last_error"]:
        error = (
            f'<span class="error">{escape(endpoint["last_error"])}</span> '
            f"<small>{_ago(endpoint['error_time'], view['time'])}</small>"
        )
    cells = [
        f"<strong>{escape(label)}</strong> <small>{escape(role)}, weight {endpoint['weight']}</small>",
        f'<span class="state {state}"><span aria-hidden="true">{SYMBOLS[state]}</span> {state}</span>{some}',
        _connections(endpoint, _period(endpoint["history"], view)),
        f'{share:.0%}<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="rest" width="100" height="6"/><rect width="{share * 100:.1f}" height="6"/></svg>',
        _lag(endpoint),
        _duration(endpoint["round_trip"]),
        error,
    ]
    if form is not None:
        undrain = "draining" in endpoint["states"]
        verb = "undrain" if undrain else "drain"
        cells.append(
            f'<form method="post" action="{verb}"><input type="hidden" name="form" value="{form}">'
            f'<input type="hidden" name="endpoint" value="{escape(label)}">'
            f'<button aria-label="{verb.capitalize()} {escape(label)}">{verb.capitalize()}</button></form>'
        )
    return cells


def _connections(endpoint: Mapping[str, Any], period: str) -> str:
    values = [row[0] for row in endpoint["history"]]
    plot = _plot(values, f"connections, last {period}")
    return f"{endpoint['connections']}{plot}<small>0 to {max(values)} in {period}</small>"


def _lag(endpoint: Mapping[str, Any]) -> str:
    if endpoint["state"] != "up" or (endpoint["lag_bytes"] is None and endpoint["lag_seconds"] is None):
        return NOTHING
    parts = [_bytes(endpoint["lag_bytes"] or 0)]
    if endpoint["lag_seconds"] is not None:
        parts.append(_duration(endpoint["lag_seconds"]))
    return ", ".join(parts)


# Groups.


def _groups(view: Mapping[str, Any]) -> str:
    return _section(
        "groups",
        "Groups",
        '<div class="cards">',
        *(_group(group, view) for group in view["groups"]),
        "</div>",
    )


def _group(group: Mapping[str, Any], view: Mapping[str, Any]) -> str:
    step, history = view["step"], group["history"]
    name, busy, waiting = escape(group["name"]), group["in_use"], group["waiting"]
    counts = group["wait"]["counts"]
    waits = " · ".join(_duration(quantile(counts, view["buckets"], share)) for share in SHARES)
    waits = waits.replace(" ", "\N{NO-BREAK SPACE}")
    percentiles = " · ".join(f"p{share * 100:.0f}" for share in SHARES)
    closed = [f"{number:,} {escape(why)}" for why, number in sorted(group["discarded"].items())]
    closed += [f"{group['ended']:,} with their process"] if group["ended"] else []
    facts = [
        *([_fact("Paused by", escape(group["paused"]), warn=True)] if group["paused"] else []),
        _fact("In use", f"{busy} <small>of {group['max_size']}</small>"),
        _fact("Idle", str(group["idle"])),
        _fact("Waiting", str(waiting), warn=waiting > 0),
        _fact("Time-outs", f"{group['timeouts']:,}", warn=any(row[3] for row in history)),
    ]
    lines = [
        _fact(f"Wait at most ({percentiles})", waits),
        _fact("Blocks", f"{group['checkouts']:,}"),
        _fact("Opened", f"{group['opened']:,}"),
        _fact("Closed", ", ".join(closed) or "none"),
        *_freshness(group),
    ]
    blocks = [row[0] / step for row in history[:-1]]  # the last step is not over yet
    period = _period(history, view)
    used, queued = [row[1] for row in history], [row[2] for row in history]
    plots = [
        _figure("Blocks per second", _rate(blocks[-1]), blocks, period),
        _figure("In use, and waiting", f"{busy} + {waiting}", used, period, queued),
    ]
    return (
        f'<article class="card" aria-label="Group {name}"><h3>{name}</h3>'
        f'<dl class="facts">{"".join(facts)}</dl>{"".join(plots)}'
        f'<dl class="lines">{"".join(lines)}</dl></article>'
    )


def _freshness(group: Mapping[str, Any]) -> list[str]:
    """Return the outcomes of reads that must see a token, if the group has had any."""
    passed, failed = group["guards_passed"], group["guards_failed"]
    if not passed + failed + group["fresh_refused"]:
        return []
    reads = {"waited": "fresh_waits", "from the primary": "fresh_from_primary", "refused": "fresh_refused"}
    became = ", ".join(f"{group[key]:,} {what}" for what, key in reads.items())
    return [_fact("Guards", f"{passed:,} passed, {failed:,} failed"), _fact("Reads behind them", became)]


def _figure(
    title: str, value: str, values: Sequence[float], period: str, above: Sequence[float] | None = None
) -> str:
    """Return a plot with its title, its value now, its scale and its span of time."""
    most = max(map(sum, zip(values, above or [0] * len(values), strict=True)), default=0)
    return (
        f"<figure><figcaption>{title} <b>{value}</b></figcaption>"
        f"{_plot(values, f'{title.lower()}, last {period}', above)}"
        f'<div class="axis" aria-hidden="true"><span>{period} ago</span><span>0 to {_rate(most)}</span>'
        "<span>now</span></div></figure>"
    )


def _period(history: Sequence[Any], view: Mapping[str, Any]) -> str:
    return _number(len(history) * view["step"] // 60, "minute", "minutes")


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


# Holders, events, processes.


def _holders(view: Mapping[str, Any]) -> str:
    rows = [
        [str(holder["pid"]), escape(holder["group"]), f"<code>{escape(holder['text'])}</code>"]
        for holder in view["holders"]
    ]
    content = (
        _table(["Process", "Group", "Held by"], rows)
        if rows
        else '<p class="none">No block has held its connection for more than a second.</p>'
    )
    return _section("holders", "Long holders", content)


def _events(view: Mapping[str, Any]) -> str:
    items = []
    for event in view["events"]:
        number = len(event["pids"])
        where = f"{number} processes" if number > 1 else f"process {event['pids'][0]}"
        items.append(
            f'<li><time datetime="{_stamp(event["time"])}">{_clock(event["time"])}</time>'
            f'<span class="state {event["kind"]}" aria-hidden="true">{EVENT_SYMBOLS[event["kind"]]}</span>'
            f"<span><strong>{escape(event['endpoint'])}</strong> {escape(event['text'])} "
            f"<small>{where}, {_ago(event['time'], view['time'])}</small></span></li>"
        )
    content = f'<ol class="timeline">{"".join(items)}</ol>' if items else '<p class="none">Nothing yet.</p>'
    return _section("events", "Events", content)


def _processes(view: Mapping[str, Any]) -> str:
    rows = [
        [
            f"<strong>{process['pid']}</strong>",
            f'<span class="state down">▲ silent for {_duration(process["age"])}</span>'
            if process["silent"]
            else f"{_duration(process['age'])} ago",
            escape(process["type"]) + (", forks the others" if process["forks"] else ""),
            _ago(process["started"], view["time"]),
            str(process["connections"]),
            str(process["in_use"]),
            f"{process['blocks']:,}",
        ]
        for process in sorted(view["processes"], key=lambda process: process["pid"])
    ]
    columns = ["Process", "Seen", "Type", "Started", "Connections", "In use", "Blocks"]
    return _section("processes", "Processes", _table(columns, rows))


# Parts.


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table that a narrow screen shows as a list: each cell knows its column.

    The roles keep it a table for screen readers there: a changed `display` would take them away.
    """
    head = "".join(f'<th scope="col" role="columnheader">{column}</th>' for column in columns)
    body = "".join(
        '<tr role="row">'
        + "".join(
            f'<th scope="row" role="rowheader">{cell}</th>'
            if place == 0
            else f'<td role="cell" data-column="{columns[place]}">{cell}</td>'
            for place, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<table role="table"><thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{body}</tbody></table>'
    )


def _plot(values: Sequence[float], what: str, above: Sequence[float] | None = None) -> str:
    """Return a small area plot; `above` is stacked on it in another colour."""
    over = above or [0] * len(values)
    totals = [a + b for a, b in zip(values, over, strict=True)]
    most = max(totals, default=0)
    scale: Callable[[float], float] = lambda value: 40 - 38 * value / (most or 1)  # noqa: E731
    width = max(len(values) - 1, 1)

    def area(lower: Sequence[float], upper: Sequence[float]) -> str:
        there = [f"{x * 200 / width:.1f},{scale(y):.1f}" for x, y in enumerate(upper)]
        back = [f"{x * 200 / width:.1f},{scale(y):.1f}" for x, y in reversed(list(enumerate(lower)))]
        return " ".join(there + back)

    layers = f'<polygon points="{area([0] * len(values), values)}"/>'
    if above is not None and any(above):
        layers += f'<polygon class="over" points="{area(values, totals)}"/>'
    text = f"{what}: most {most:.3g}, now {totals[-1] if totals else 0:.3g}"
    return (
        f'<svg class="plot" viewBox="0 0 200 40" preserveAspectRatio="none" role="img" aria-label="{text}">'
        f'<line x1="0" x2="200" y1="40" y2="40"/>{layers}</svg>'
    )


def _number(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(at)) + " <small>UTC</small>"


def _stamp(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def _ago(at: float, now: float) -> str:
    seconds = max(now - at, 0.0)
    if seconds < 2:
        return "now"
    for unit, length in (("day", 86_400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            return _number(int(seconds // length), unit, f"{unit}s") + " ago"
    return f"{seconds:.0f} s ago"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    if seconds >= 0.9995 or seconds == 0:
        return f"{seconds:.1f} s" if seconds else "0 s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 0.0009995 else f"{seconds * 1e6:.0f} µs"


def _bytes(number: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TB"

"""One view of all processes of an application, for the status page, the command and metrics."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ._api.connection import Connection, open_pools
from ._status.publisher import STEP, STEPS, History, split
from ._status.runtime_dir import RuntimeDir, add_counts

SILENT_AFTER = 5.0
"""Seconds without news after which a threaded process counts as stopped or stuck."""

AT_LEAST = 12
"""Steps of history that are shown, also if the processes are younger."""

SAME_EVENT = 10.0
"""Seconds within which several processes may notice the same event."""

_ROLES = {"primary": "primary", "read-write": "primary", "standby": "standby", "read-only": "standby"}
"""The role that a target needs."""

_WORST_FIRST = ("down", "probing", "draining", "up")


def gather(runtime_dir: str | None = None) -> dict[str, Any]:
    """Return the overview of the processes that publish in the directory.

    :param runtime_dir: by default that of this process's configuration; if it has none, only
        this process is shown, with all its sets of pools.
    :raises RuntimeDirError: the directory is missing, or others can use it.
    :raises NotInitializedError: it was left out, and `Connection.init` was not called.
    """
    own = runtime_dir is None
    runtime_dir = runtime_dir or own_runtime_dir()
    now = time.time()
    if runtime_dir is None:
        alone = {"time": now, "started": now, "events": [], "history": History().told(now)}
        parts = [split(pools.status().to_dict()) for pools in open_pools()]
        return overview([{**alone, "status": told, "counts": counts} for told, counts in parts], {}, now)
    with RuntimeDir(runtime_dir, create=own) as room:
        snapshots, gone = room.snapshots(), room.gone()
    return overview(snapshots, gone, time.time())


def own_runtime_dir() -> str | None:
    """Return the directory of the default set of pools, or of another one if that is not open.

    :raises NotInitializedError: no set is open.
    """
    pools = next(iter(open_pools()), None)
    return Connection.runtime_dir() if pools is None else pools.config.runtime_dir


def overview(snapshots: Sequence[Mapping[str, Any]], gone: Mapping[str, Any], now: float) -> dict[str, Any]:
    """Combine the snapshots of running processes with the counters of exited ones, at a moment."""
    forking = _forking(snapshots)
    processes = _processes(snapshots, now, forking)
    endpoints, groups = _endpoints(snapshots, now, forking), _groups(snapshots, gone, now, forking)
    return {
        "time": now,
        "ok": bool(processes)
        and all(endpoint["state"] == "up" for endpoint in endpoints)
        and not any(process["silent"] for process in processes),
        "processes": processes,
        "endpoints": endpoints,
        "groups": groups,
        "holders": [
            {"pid": snapshot["status"]["pid"], "group": name, "text": text}
            for snapshot in snapshots
            for name, group in snapshot["status"]["groups"].items()
            for text in group["holders"]
        ],
        "connections": [
            {"pid": snapshot["status"]["pid"], "group": name, **line}
            for snapshot in snapshots
            for name, group in snapshot["status"]["groups"].items()
            for line in group.get("listing", ())
        ],
        "configs": _configs(snapshots),
        "events": _events(snapshots),
        "buckets": next((s["status"]["buckets"] for s in snapshots if "buckets" in s["status"]), []),
        "step": STEP,
    }


def stranded(view: Mapping[str, Any], label: str) -> str | None:
    """Return why the endpoint is indispensable to a group, or None if all groups are served without it."""
    drained = next(endpoint for endpoint in view["endpoints"] if endpoint["label"] == label)
    for group in view["groups"]:
        role = _ROLES.get(group["target"])
        serving = {
            endpoint["label"]
            for endpoint in view["endpoints"]
            if endpoint["state"] == "up"
            and role in (None, endpoint["role"])
            and not _left_behind(endpoint, role)
        }
        concerned = label in group["connections"] and (role is None or drained["role"] in (None, role))
        if concerned and not (serving - {label}).intersection(group["connections"]):
            return f"the group {group['name']!r} has no other {role or 'endpoint'} that is up"
    return None


def _left_behind(endpoint: Mapping[str, Any], role: str | None) -> bool:
    """Return whether an endpoint is a primary on an older timeline than another's."""
    return role == "primary" and bool(endpoint["outdated"])


def _forking(snapshots: Sequence[Mapping[str, Any]]) -> set[int]:
    """Return the processes that serve no requests: others were forked from them, and they had no block."""
    serving = {snapshot["status"]["pid"] for snapshot in snapshots if _blocks(snapshot)}
    pids = {snapshot["status"]["pid"] for snapshot in snapshots}
    return pids.intersection(snapshot.get("parent") for snapshot in snapshots) - serving


def _blocks(snapshot: Mapping[str, Any]) -> int:
    return sum(group["checkouts"] for group in snapshot["counts"].values())


def _processes(snapshots: Sequence[Mapping[str, Any]], now: float, forking: set[int]) -> list[dict[str, Any]]:
    """Return a row for each process, over all its sets of pools."""
    by_pid: dict[int, list[Mapping[str, Any]]] = {}
    for snapshot in snapshots:
        by_pid.setdefault(snapshot["status"]["pid"], []).append(snapshot)
    return [_process(pid, sets, now, pid in forking) for pid, sets in by_pid.items()]


def _process(pid: int, sets: Sequence[Mapping[str, Any]], now: float, forks: bool) -> dict[str, Any]:
    groups = [group for snapshot in sets for group in snapshot["status"]["groups"].values()]
    threaded = [snapshot for snapshot in sets if snapshot["status"]["type"] == "threaded"]
    # A lock-free one publishes nothing while it has no requests, and uWSGI's master runs no Python.
    oldest = max((now - snapshot["time"] for snapshot in threaded), default=0.0)
    return {
        "pid": pid,
        "type": ", ".join(dict.fromkeys(snapshot["status"]["type"] for snapshot in sets)),
        "started": min(snapshot["started"] for snapshot in sets),
        "forks": forks,
        "age": max(oldest if threaded else now - max(snapshot["time"] for snapshot in sets), 0.0),
        "silent": not forks and oldest > SILENT_AFTER,
        "in_use": sum(group["in_use"] for group in groups),
        "connections": sum(group["size"] for group in groups),
        "blocks": sum(map(_blocks, sets)),
    }


def _endpoints(snapshots: Sequence[Mapping[str, Any]], now: float, forking: set[int]) -> list[dict[str, Any]]:
    views: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for snapshot in snapshots:
        for label, endpoint in snapshot["status"]["endpoints"].items():
            views.setdefault(label, []).append((snapshot, endpoint))
    total = sum(endpoint["connections"] for view in views.values() for _, endpoint in view)
    found = []
    for label, view in views.items():
        every = [endpoint for _, endpoint in view]
        view = [pair for pair in view if pair[0]["status"]["pid"] not in forking] or view
        seen = [endpoint for _, endpoint in view]
        states = _states(view)
        state = next(state for state in _WORST_FIRST if state in states)
        newest = max(view, key=lambda pair: pair[0]["time"])[1]
        errors = [
            (snapshot["time"] - endpoint["seconds_since_error"], endpoint["last_error"])
            for snapshot, endpoint in view
            if endpoint["last_error"] is not None
        ]
        error_time, last_error = max(errors, default=(None, None))
        connections = sum(endpoint["connections"] for endpoint in every)
        role = max(view, key=lambda pair: (pair[1]["role"] is not None, pair[0]["time"]))[1]["role"]
        found.append(
            {
                "label": label,
                "state": state,
                "states": dict(states),
                "role": role,
                "weight": newest["weight"],
                "timeline": _most(seen, "timeline"),
                "outdated": any(endpoint["outdated"] for endpoint in seen),
                "lag_bytes": _most(seen, "lag_bytes"),
                "lag_seconds": _most(seen, "lag_seconds"),
                "connections": connections,
                "share": connections / total if total else 0.0,
                "round_trip": min(
                    (e["round_trip"] for e in seen if e["round_trip"] is not None), default=None
                ),
                "last_error": last_error,
                "error_time": error_time,
                "history": _history(snapshots, "endpoints", label, now, width=1),
            }
        )
    return found


def _states(view: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Counter[str]:
    """Return for how many processes an endpoint is in which state, the worst of their sets."""
    found: dict[int, str] = {}
    for snapshot, endpoint in view:
        state = "down" if endpoint["state"] == "probing" else endpoint["state"]
        pid = snapshot["status"]["pid"]
        found[pid] = min(state, found.get(pid, state), key=_WORST_FIRST.index)
    return Counter(found.values())


def _groups(
    snapshots: Sequence[Mapping[str, Any]], gone: Mapping[str, Any], now: float, forking: set[int]
) -> list[dict[str, Any]]:
    names = dict.fromkeys(name for snapshot in snapshots for name in snapshot["status"]["groups"])
    found = []
    for name in names:
        having = [s["status"] for s in snapshots if name in s["status"]["groups"]]
        seen = [status["groups"][name] for status in having]
        serving = [status["groups"][name] for status in having if status["pid"] not in forking] or seen
        counts: dict[str, Any] = {}
        for more in (gone, *(snapshot["counts"] for snapshot in snapshots)):
            add_counts(counts, more.get(name, {}))
        connections: Counter[str] = Counter()
        for group in seen:
            connections.update(group["connections"])
        found.append(
            {
                "name": name,
                **{
                    key: sum(group[key] for group in seen)
                    for key in ("size", "idle", "in_use", "left", "waiting")
                },
                **{key: sum(group[key] for group in serving) for key in ("min_size", "max_size")},
                "target": serving[0]["target"],
                "paused": next((group["paused"] for group in serving if group["paused"]), None),
                "paused_in": sum(group["paused"] is not None for group in serving),
                "connections": dict(connections),
                **counts,
                "ended": _ended(counts, seen),
                "history": _history(snapshots, "groups", name, now, width=4),
            }
        )
    return found


def _configs(snapshots: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each configuration that is in use, with its processes."""
    found: list[dict[str, Any]] = []
    for snapshot in snapshots:
        config, pid, name = snapshot.get("config"), snapshot["status"]["pid"], snapshot.get("set", "")
        same = next((each for each in found if (each["config"], each["set"]) == (config, name)), None)
        if same is not None:
            same["pids"].append(pid)
        elif config is not None:
            found.append({"pids": [pid], "set": name, "config": config})
    return found


def _ended(counts: Mapping[str, Any], groups: Iterable[Mapping[str, Any]]) -> int:
    """Return how many connections ended with their processes, which are not counted as closed."""
    there: int = sum(group["idle"] + group["in_use"] for group in groups)
    closed: int = counts["opened"] - sum(counts["discarded"].values())
    return max(closed - there, 0)


def _events(snapshots: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the events of all processes, newest first; several reports of the same event are merged."""
    merged: list[dict[str, Any]] = []
    latest: dict[tuple[str, str], tuple[dict[str, Any], set[tuple[int, str]]]] = {}
    events = [(event, snapshot) for snapshot in snapshots for event in snapshot["events"]]
    for event, snapshot in sorted(events, key=lambda pair: pair[0]["time"]):
        kind, pid = (event["kind"], event["endpoint"]), snapshot["status"]["pid"]
        reporter = pid, snapshot.get("set", "")
        known, reporters = latest.get(kind, (None, set()))
        if known is None or event["time"] - known["time"] > SAME_EVENT or reporter in reporters:
            known, reporters = latest[kind] = {**event, "pids": []}, set()
            merged.append(known)
        reporters.add(reporter)
        if pid not in known["pids"]:
            known["pids"].append(pid)
    return merged[::-1]


def _history(
    snapshots: Sequence[Mapping[str, Any]], kind: str, name: str, now: float, width: int
) -> list[list[int]]:
    """Return a row for each step of the last minutes, oldest first: the sum over the processes."""
    newest = int(now // STEP)
    first = min((snapshot["history"]["first"] for snapshot in snapshots), default=newest)
    oldest = min(max(first, newest - STEPS + 1), newest - AT_LEAST + 1)
    rows = {step: [0] * width for step in range(oldest, newest + 1)}
    for snapshot in snapshots:
        for step, *values in snapshot["history"][kind].get(name, ()):
            if step in rows:
                rows[step] = [a + b for a, b in zip(rows[step], values, strict=True)]
    return [rows[step] for step in sorted(rows)]


def _most(seen: Iterable[Mapping[str, Any]], key: str) -> Any:
    return max((endpoint[key] for endpoint in seen if endpoint[key] is not None), default=None)

"""The targets, and how the results compare with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .summary import median_of
from .tables import Table, number

Found = dict[str, Any]


class Target(NamedTuple):
    """What is wanted, and where the results have it; by the name under which the page speaks of it."""

    name: str
    what: str
    limit: float
    at_least: bool
    unit: str
    value: Callable[[Found], float | None]
    peer: Callable[[Found], float | None] | None = None


def _trips(operation: str, *peers: str) -> Callable[[Found], float | None]:
    def value(parts: Found) -> float | None:
        seen = parts["round_trips"][operation]
        return min((seen[peer] for peer in peers if peer in seen), default=None)

    return value


def _ratio(place: str, operation: str, *peers: str) -> Callable[[Found], float | None]:
    def value(parts: Found) -> float | None:
        seen = parts["latency"][place][operation]
        found = [median_of(seen, peer, "ratio") for peer in peers]
        return min((one for one in found if one is not None), default=None)

    return value


def _checkout(peer: str) -> Callable[[Found], float | None]:
    return lambda parts: median_of(parts["bookkeeping"]["checkout"], peer, "ratio")


def _throughput(peer: str, to: str) -> Callable[[Found], float | None]:
    def value(parts: Found) -> float | None:
        seen = parts["throughput"]["threads"]["8 on 4"]
        one, other = median_of(seen, peer, "value"), median_of(seen, to, "value")
        return one / other if one and other else None

    return value


def _share(peer: str) -> Callable[[Found], float | None]:
    def value(parts: Found) -> float | None:
        found = median_of(parts["throughput"]["threads"]["8 on 4"], peer, "share")
        return None if found is None else 100 * (1 - found)

    return value


def _web(peer: str) -> Callable[[Found], float | None]:
    return lambda parts: median_of(parts["throughput"]["web"]["read"], peer, "ratio")


def _growth(what: str, size: str) -> Callable[[Found], float | None]:
    def value(parts: Found) -> float | None:
        seen = parts["bookkeeping"]["growth"][what]
        return max(median_of(seen[mode], size, "ratio") or 0.0 for mode in seen if mode != "lock")

    return value


def _restart(peer: str, key: str, scale: float) -> Callable[[Found], float | None]:
    def value(parts: Found) -> float | None:
        found = median_of(parts["recovery"]["restart"]["40"], peer, key)
        return None if found is None else found * scale

    return value


def _import(parts: Found) -> float | None:
    seen = parts["footprint"]["imports"]
    return seen["pgdbpool"]["value"]["median"] - seen["psycopg"]["value"]["median"]  # type: ignore[no-any-return]


CHECKED = ("psycopg_pool-check", "sqlalchemy", "asyncpg")
ONE, TWO = "one core", "two cores"
TARGETS = (
    Target(
        "tenant_trips", "round trips, tenant read with liveness check", 1, False, "",
        _trips("tenant_read", "pgdbpool"), _trips("tenant_read", *CHECKED),
    ),
    Target(
        "transaction_trips", "round trips, tenant transaction of 3 statements", 4, False, "",
        _trips("transaction 3", "pgdbpool"), _trips("transaction 3", *CHECKED),
    ),
    Target(
        "read_ratio", "loopback on one core, plain block with liveness check / bare execute", 0.8, False, "",
        _ratio(ONE, "read", "pgdbpool"), _ratio(ONE, "read", *CHECKED),
    ),
    Target(
        "tenant_ratio", "loopback on one core, tenant read block / bare execute", 0.95, False, "",
        _ratio(ONE, "tenant_read", "pgdbpool"), _ratio(ONE, "tenant_read", *CHECKED),
    ),
    Target(
        "fetchval_ratio", "loopback on one core, Connection.fetchval / bare execute", 0.8, False, "",
        _ratio(ONE, "fetchval", "pgdbpool"),
    ),
    Target(
        "block_write_ratio", "loopback on one core, manual-commit block of one write / bare BEGIN to COMMIT",
        0.7, False, "", _ratio(ONE, "block_write", "pgdbpool"),
    ),
    Target(
        "deadline_ratio", "loopback on one core, plain block with a deadline / bare execute", 0.9, False, "",
        _ratio(ONE, "deadline_read", "pgdbpool"),
    ),
    Target(
        "rows_ratio", "loopback on one core, block of 50 rows by 5 columns / bare execute", 0.92, False, "",
        _ratio(ONE, "rows", "pgdbpool"),
    ),
    Target(
        "read_ratio_two", "loopback on two cores, plain block / bare execute", 1.08, False, "",
        _ratio(TWO, "read", "pgdbpool"), _ratio(TWO, "read", *CHECKED),
    ),
    Target(
        "tenant_ratio_two", "loopback on two cores, tenant read block / bare execute", 1.15, False, "",
        _ratio(TWO, "tenant_read", "pgdbpool"), _ratio(TWO, "tenant_read", *CHECKED),
    ),
    Target(
        "network_ratio", "0.5 ms network, tenant read block / bare execute", 1.03, False, "",
        _ratio("0.5 ms", "tenant_read", "pgdbpool"), _ratio("0.5 ms", "tenant_read", *CHECKED),
    ),
    Target(
        "checkout_ratio", "checkout and checkin, threaded / psycopg_pool", 1.1, False, "",
        _checkout("pgdbpool"), _checkout("psycopg_pool"),
    ),
    Target(
        "lock_free_ratio", "checkout and checkin, lock-free / psycopg_pool", 1.1, False, "",
        _checkout("pgdbpool-lock-free"), _checkout("psycopg_pool"),
    ),
    Target(
        "throughput_ratio", "8 threads on 4 connections, checked reads / psycopg_pool with check", 2.0, True,
        "", _throughput("pgdbpool", "psycopg_pool-check"),
        _throughput("psycopg_pool-check", "psycopg_pool-check"),
    ),
    Target(
        "unfairness", "slowest thread behind the fastest, same run", 10, False, "%",
        _share("pgdbpool"), _share("psycopg_pool-check"),
    ),
    Target(
        "web_ratio", "requests per second under gunicorn, one read / psycopg_pool with check", 1.3, True, "",
        _web("pgdbpool"), _web("psycopg_pool"),
    ),
    Target("endpoints_growth", "bookkeeping at 100 endpoints / at 1", 1.2, False, "",
           _growth("endpoints", "100")),
    Target("connections_growth", "bookkeeping at 1 000 connections / at 1", 1.2, False, "",
           _growth("connections", "1000")),
    Target("waiters_growth", "handing over with 1 000 waiters / with 1", 1.2, False, "",
           _growth("waiters", "1000")),
    Target("groups_growth", "bookkeeping at 100 groups / at 1", 1.2, False, "", _growth("groups", "100")),
    Target(
        "restart_first", "first success after a restart, 40 stale connections", 100, False, "ms",
        _restart("pgdbpool", "first", 1000), _restart("psycopg_pool-check", "first", 1000),
    ),
    Target(
        "restart_errors", "errors after that restart", 0, False, "",
        _restart("pgdbpool", "errors", 1), _restart("psycopg_pool-check", "errors", 1),
    ),
    Target(
        "memory", "Python's memory of an idle connection above a bare one", 1200, False, "bytes",
        lambda parts: parts["footprint"]["memory"].get("pgdbpool"),
        lambda parts: parts["footprint"]["memory"].get("psycopg_pool"),
    ),
    Target("import_time", "import above psycopg's", 30, False, "ms", _import),
)  # fmt: skip


def measured(target: Target, parts: Found, of: Callable[[Found], float | None] | None) -> float | None:
    """Return a figure for a target, or None where its part was not measured."""
    if of is None:
        return None
    try:
        return of(parts)
    except (KeyError, TypeError):
        return None


def as_table(parts: Found) -> Table:
    """Return the targets beside what was measured."""
    rows = []
    for target in TARGETS:
        value, peer = measured(target, parts, target.value), measured(target, parts, target.peer)
        unit = f" {target.unit}" if target.unit else ""
        bound = f"at {'least' if target.at_least else 'most'} {number(target.limit)}{unit}"
        met = ""
        if value is not None:
            met = "yes" if (value >= target.limit if target.at_least else value <= target.limit) else "no"
        rows.append([target.what, bound, _with(value, unit), met, _with(peer, unit)])
    return Table("Targets", ["", "target", "measured", "met", "psycopg_pool or best checked peer"], rows)


def _with(value: float | None, unit: str) -> str:
    return "" if value is None else number(value) + unit

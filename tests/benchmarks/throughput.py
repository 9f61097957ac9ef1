"""How much gets done: by threads that share connections, by processes, and by the example under gunicorn."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pgdbpool._demo import demo
from pgdbpool.cluster import Cluster

from .bench import VERSION, Bench
from .crew import Crew
from .peers import PEERS
from .summary import Rounds, spread
from .web import WORKERS, serving

THREADS, CONNECTIONS, PROCESSES = (1, 2, 8, 32), (4, 16), (2, 4)
OPERATION = "read"
EVENNESS = (8, 4)
"""Threads and connections of the run that tells how even threads are. That takes time: one turn of the
interpreter, 5 ms, is a per cent of half a second."""
CLIENTS = 8
WEB, PAGES = ("pgdbpool", "psycopg_pool-check", "psycopg_pool"), ("read", "tenant_read")
"""The pools under gunicorn, and what a request does there."""


def measure(bench: Bench) -> dict[str, Any]:
    """Return operations per second, with their ratio to the bare connection's, and how even threads are."""
    bench.pin_server()
    found: dict[str, Any] = {"threads": {}, "processes": {}}
    for size in CONNECTIONS:
        with bench.crew(but=["asyncpg"]) as crew:
            crew.open([bench.server], size, fill=False)
            for threads in THREADS:
                seconds = 0.1 if bench.quick else 4.0 if (threads, size) == EVENNESS else 0.5
                found["threads"][f"{threads} on {size}"] = _threads(bench, crew, threads, size, seconds)
    for processes in PROCESSES:
        found["processes"][str(processes)] = _processes(bench, processes)
    found["example"] = _example(bench)
    found["web"] = _web(bench)
    return found


def _threads(bench: Bench, crew: Crew, threads: int, size: int, seconds: float) -> dict[str, Any]:
    rates, shares = Rounds(), Rounds()
    errors: dict[str, int] = {}
    rounds = bench.rounds(1, 4)
    able = [
        member
        for member in crew
        # A pool that does not wait for a connection cannot have more threads than those.
        if threads == 1 or (PEERS[member.name].threads and (member.name != "psycopg2" or threads <= size))
    ]
    bench.progress.steps(len(rounds) * len(able))
    for _ in rounds:
        for member in able:
            bench.progress.step(f"{threads} threads on {size} connections: {member.label}")
            done = member.ask("threads", operation=OPERATION, threads=threads, seconds=seconds)
            rates.add(member.name, sum(done["counts"]) / done["seconds"])
            shares.add(member.name, min(done["counts"]) / max(1, *done["counts"]))
            errors[member.name] = errors.get(member.name, 0) + done["errors"]
    found = rates.summary("bare")
    for peer, share in shares.summary("").items():
        found[peer] |= {"share": share["value"], "errors": errors[peer]}
    return found


def _processes(bench: Bench, processes: int) -> dict[str, Any]:
    rates = Rounds()
    seconds = 0.1 if bench.quick else 0.5
    names = bench.names(but=["asyncpg"])
    with ExitStack() as stack:
        crews = {name: stack.enter_context(Crew([name] * processes)) for name in names}
        for crew in crews.values():
            crew.open([bench.server], 1)
        rounds = bench.rounds(1, 4)
        bench.progress.steps(len(rounds) * len(crews))
        for _ in rounds:
            for name, crew in crews.items():
                bench.progress.step(f"{processes} processes: {PEERS[name].label}")
                for member in crew:
                    member.send("threads", operation=OPERATION, threads=1, seconds=seconds)
                done = [member.receive() for member in crew]
                rates.add(name, sum(one["counts"][0] / one["seconds"] for one in done))
    return rates.summary("bare")


def _example(bench: Bench) -> dict[str, Any]:
    """Measure the example application under gunicorn, where there is wrk."""
    wrk = shutil.which("wrk")
    if wrk is None:
        bench.progress.note("wrk is not installed: the example under gunicorn is left out")
        return {}
    seconds = 1 if bench.quick else 3
    rates: dict[str, list[dict[str, float]]] = {}
    with Cluster(2, VERSION, auth="scram-sha-256") as cluster, ExitStack() as stack:
        demo.create_database(cluster)
        config = demo.write_config(cluster)
        kinds: tuple[demo.WorkerClass, ...] = ("sync", "gthread")
        servers = {
            kind: stack.enter_context(demo.Gunicorn(config, workers=WORKERS, worker_class=kind))
            for kind in kinds
        }
        rounds = bench.rounds(1, 3)
        bench.progress.steps(len(rounds) * len(servers))
        for number in range(-1, len(rounds)):
            for kind, web in servers.items():
                bench.progress.step(f"the example under gunicorn, {kind}")
                found = _ask(wrk, f"{web.url}/accounts/1", seconds)
                if number >= 0:
                    rates.setdefault(kind, []).append(found)
    return {
        kind: {name: spread([one[name] for one in seen]) for name in seen[0]} for kind, seen in rates.items()
    }


def _web(bench: Bench) -> dict[str, Any]:
    """Measure one application over several pools under gunicorn, with threads, where there is wrk."""
    wrk = shutil.which("wrk")
    if wrk is None:
        bench.progress.note("wrk is not installed: the pools under gunicorn are left out")
        return {}
    bench.pin_server()  # all share all cores, as on one host
    seconds = 1 if bench.quick else 3
    rates = {page: Rounds() for page in PAGES}
    with ExitStack() as stack:
        names = [name for name in bench.names() if name in WEB]
        ports = {
            name: stack.enter_context(
                serving(
                    "web_app:application",
                    {"BENCH_PEER": name, "BENCH_SERVERS": json.dumps([bench.server])},
                    threads=4,
                    directory=Path(__file__).parent,
                )
            )
            for name in names
        }
        rounds = bench.rounds(1, 5)
        bench.progress.steps(len(rounds) * len(ports) * len(PAGES))
        for number in range(-1, len(rounds)):
            for page in PAGES:
                for name, port in ports.items():
                    bench.progress.step(f"{page} under gunicorn: {PEERS[name].label}")
                    seen = _ask(wrk, f"http://127.0.0.1:{port}/{page}", seconds)
                    if seen["failed"]:
                        raise RuntimeError(f"{name}: {seen['failed']:.0f} requests failed")
                    if number >= 0:
                        rates[page].add(name, seen["rate"])
    return {page: seen.summary("psycopg_pool-check") for page, seen in rates.items()}


def _ask(wrk: str, url: str, seconds: int) -> dict[str, float]:
    """Return requests per second, milliseconds, and failures from wrk's report."""
    arguments = ["-t1", f"-c{CLIENTS}", f"-d{seconds}s", "--latency", url]
    text = subprocess.run([wrk, *arguments], capture_output=True, text=True, check=True).stdout
    scale = {"us": 0.001, "ms": 1.0, "s": 1000.0}
    found = {"rate": float(re.search(r"Requests/sec:\s+([\d.]+)", text).group(1))}  # type: ignore[union-attr]
    for share in ("50", "99"):
        number, unit = re.search(rf"{share}%\s+([\d.]+)(us|ms|s)", text).groups()  # type: ignore[union-attr]
        found[f"p{share}"] = float(number) * scale[unit]
    failed = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    return found | {"failed": float(failed.group(1)) if failed else 0.0}

"""Round trips of each operation, counted by a proxy between client and server: exact on any machine."""

from __future__ import annotations

from typing import Any

from tests.lib.proxy import Proxy

from .bench import Bench, server

OPERATIONS = (
    "read", "tenant_read", "transaction 1", "transaction 3", "transaction 10", "write",
)  # fmt: skip
WARM, COUNTED = 12, 10


def measure(bench: Bench) -> dict[str, Any]:
    """Return the round trips by operation and peer."""
    node = bench.cluster.primary
    found: dict[str, Any] = {operation: {} for operation in OPERATIONS}
    with bench.crew() as crew, Proxy(node.host, node.port) as proxy:
        bench.progress.steps(len(crew.members))
        for member in crew:
            bench.progress.step(member.label)
            member.ask("open", servers=[server(node, proxy.port)], size=1)
            for operation in OPERATIONS:
                member.ask("latency", operation=operation, count=WARM)  # what is prepared, is prepared then
                proxy.reset_counts()
                if member.ask("latency", operation=operation, count=COUNTED) is not None:
                    found[operation][member.name] = proxy.round_trips / COUNTED
    return found

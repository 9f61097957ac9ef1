"""Tenants stay apart whatever happens: a shorter run of `isolation.py`, always with the same seed."""

from __future__ import annotations

import pytest
from isolation import Plan, run
from support import SURVIVES_INTERRUPTIONS

from pgdbpool.cluster import Cluster

pytestmark = pytest.mark.slow

HAPPENED = (
    "backends killed", "sessions left unclean", "tenant changed by the block", "autocommit switched",
    "nested blocks", "notifications", "blocks with two threads", "tables changed", "tables of a schema read",
)  # fmt: skip


@SURVIVES_INTERRUPTIONS
@pytest.mark.parametrize(("mode", "blocks", "workers"), [("threaded", 3000, 8), ("non-threaded", 1500, 1)])
def test_no_block_sees_or_writes_a_row_of_another_tenant(
    known_cluster: Cluster, mode: str, blocks: int, workers: int
) -> None:
    report = run(Plan(mode, blocks, workers, tenants=20, seed=1), known_cluster.primary)
    assert report.violations == []
    assert report.events["blocks"] == blocks
    assert report.events["statements checked"] > 2 * blocks
    assert [what for what in HAPPENED if not report.events[what]] == []
    assert report.events["interrupts by thread"] + report.events["interrupts by signal"]

"""No read under a token is stale, whatever happens to the servers: a short run of `own_writes.py`."""

from __future__ import annotations

import time

import pytest
from own_writes import MODES, Plan, run


@pytest.mark.parametrize("mode", MODES)
def test_no_read_under_a_token_is_stale_through_lag_crashes_and_promotions(mode: str) -> None:
    plan = Plan(mode, pairs=100_000, seconds=8, seed=int(time.time()))
    report = run(plan)
    print(f"{plan}\n{report}")
    assert report.stale == []
    assert report.silent == 0
    assert report.pairs > 50
    assert report.counts["promote"] > 0


def test_without_tokens_the_same_run_shows_stale_reads() -> None:
    plan = Plan("threaded", pairs=100_000, seconds=4, seed=1, tokens=False)
    report = run(plan)
    print(f"{plan}\n{report}")
    assert len(report.stale) > 10

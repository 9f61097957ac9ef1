"""Nothing is left over after faults: a shorter run of `soak.py`, with a seed that it prints."""

from __future__ import annotations

import time

import pytest
from soak import MODES, Plan, Report, Sample, run

SECONDS = 25.0


@pytest.mark.parametrize("mode", MODES)
def test_after_faults_files_threads_and_backends_are_as_many_as_before(mode: str) -> None:
    plan = Plan(mode, SECONDS, seed=int(time.time()))
    report = run(plan)
    print(f"{plan}\n{report}")
    assert report.changed == []
    assert len(report.samples) > 3
    assert len(report.faults) > 1
    assert report.events["blocks"] > 500
    assert (report.samples[0].threads == 1) is (mode == "non-threaded")
    # Caches still fill in so short a time; a leak of a connection or a statement each would be far more.
    assert report.samples[-1].rss < report.samples[0].rss + 16


def test_growth_is_measured_after_the_first_third() -> None:
    sizes = [10, 30, 50, 60, 61, 62, 63, 64, 65]
    report = Report([Sample(float(at), size, 5, 1, 9) for at, size in enumerate(sizes)])
    assert report.growth == pytest.approx(5)
    assert report.changed == []
    report.samples[3].files += 1
    assert report.changed == [report.samples[3]]

"""Money is neither lost nor made, whatever breaks: a shorter run of `bank.py`, with a seed that it prints."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from bank import MODES, Plan, run
from bank_checker import check, read_lines

SECONDS = 45.0
"""Time for each fault to come once, or nearly so."""


@pytest.mark.parametrize("mode", MODES)
def test_every_transfer_has_the_outcome_that_its_client_was_told(mode: str, tmp_path: Path) -> None:
    plan = Plan(mode, SECONDS, seed=int(time.time()))
    verdict = run(plan, tmp_path)
    print(f"{plan}, history in {tmp_path}\n{verdict}")
    assert verdict.violations == []
    happened = list(read_lines(tmp_path / "history.jsonl"))
    outcomes = {line["outcome"] for line in happened if line["type"] == "transfer"}
    assert outcomes == {"ok", "unknown", "none"}
    assert any(line["error"] == "NotReplicatedError" for line in happened if line["type"] == "transfer")
    assert len({line["fault"] for line in happened if line["type"] == "fault"}) > 5
    assert any(line["primary"] == "node2" for line in happened if line["type"] == "healed")


Lines = list[dict[str, Any]]

PLAN = {
    "type": "plan", "accounts": 2, "balance": 100, "processes": 1, "until": 50.0, "recovery": 5.0,
    "bounds": {"checkout": 1.0, "commit": 1.0},
}  # fmt: skip
TRANSFER = {
    "type": "transfer", "process": 0, "source": 0, "target": 1, "amount": 10, "error": None, "start": 9.0,
}  # fmt: skip


def history() -> tuple[Lines, Lines]:
    """Return a history and a final state in which nothing is wrong."""
    noted: Lines = [PLAN]
    for number, (outcome, end) in enumerate([("ok", 10.0), ("unknown", 11.0), ("none", 12.0), ("ok", 22.0)]):
        calls = {"checkout": 0.1, "commit": 0.1}
        noted.append({**TRANSFER, "id": f"0.0.{number}", "outcome": outcome, "end": end, "calls": calls})
    noted.append({"type": "read", "process": 0, "sum": 200, "error": None, "calls": {}, "end": 9.0})
    noted.append({"type": "fault", "at": 15.0, "fault": "kill"})
    noted.append({"type": "healed", "at": 20.0, "fault": "kill"})
    final: Lines = [{"type": "account", "id": 0, "balance": 80}, {"type": "account", "id": 1, "balance": 120}]
    final += [
        {"type": "entry", "id": f"0.0.{number}", "source": 0, "target": 1, "amount": 10} for number in (0, 3)
    ]
    return noted, final


def violations(directory: Path, noted: Lines, final: Lines) -> list[str]:
    for name, lines in (("history", noted), ("final", final)):
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return check(directory).violations


def test_the_checker_accepts_a_correct_history(tmp_path: Path) -> None:
    noted, final = history()
    assert violations(tmp_path, noted, final) == []
    # What has an unknown outcome may as well be there.
    final[:2] = [{"type": "account", "id": 0, "balance": 70}, {"type": "account", "id": 1, "balance": 130}]
    assert violations(tmp_path, noted, [*final, {**final[-1], "id": "0.0.1"}]) == []


def entry_lost(noted: Lines, final: Lines) -> None:
    final.pop()


def entry_twice(noted: Lines, final: Lines) -> None:
    final.append(final[-1])


def unknown_twice(noted: Lines, final: Lines) -> None:
    final += [{**final[-1], "id": "0.0.1"}] * 2


def refused_is_there(noted: Lines, final: Lines) -> None:
    final.append({**final[-1], "id": "0.0.2"})


def nobody_asked(noted: Lines, final: Lines) -> None:
    final.append({**final[-1], "id": "0.0.9"})


def another_amount(noted: Lines, final: Lines) -> None:
    final[-1]["amount"] = 11


def half_applied(noted: Lines, final: Lines) -> None:
    final[0]["balance"] = 90


def applied_twice(noted: Lines, final: Lines) -> None:
    final[0]["balance"], final[1]["balance"] = 70, 130


def account_gone(noted: Lines, final: Lines) -> None:
    del final[0]


def half_seen(noted: Lines, final: Lines) -> None:
    noted[5]["sum"] = 190


def call_without_bound(noted: Lines, final: Lines) -> None:
    noted[3]["calls"]["commit"] = 1.1


def no_recovery(noted: Lines, final: Lines) -> None:
    noted[4]["end"] = 26.0


def unexpected(noted: Lines, final: Lines) -> None:
    noted.append({"type": "unexpected", "text": "ValueError"})


CRIMES = [
    entry_lost, entry_twice, unknown_twice, refused_is_there, nobody_asked, another_amount, half_applied,
    applied_twice, account_gone, half_seen, call_without_bound, no_recovery, unexpected,
]  # fmt: skip


@pytest.mark.parametrize("crime", CRIMES)
def test_the_checker_finds(crime: Any, tmp_path: Path) -> None:
    noted, final = history()
    crime(noted, final)
    assert violations(tmp_path, noted, final)

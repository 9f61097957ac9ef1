"""Whether a server has what a position stands for: a pure function of what it says."""

from __future__ import annotations

import pytest

from pgdbpool._servers.positions import (
    LONG_HEADER,
    SHORT_HEADER,
    Facts,
    Timelines,
    Verdict,
    judge,
    read,
    written,
)
from pgdbpool._util.token import UNKNOWN, Position, lsn_of, lsn_text

HISTORY = """# a comment
1\t0/300\tno recovery target specified

2\t0/500\tbefore 2026-01-01
"""


def timelines(*unreadable: int) -> Timelines:
    known = Timelines()
    known.note(9, 3, HISTORY)
    for timeline in unreadable:
        known.note(9, timeline, None)
    return known


PASSED, BEHIND, UNPROVEN, LOST = Verdict.PASSED, Verdict.BEHIND, Verdict.UNPROVEN, Verdict.LOST


@pytest.mark.parametrize(
    ("standby", "timeline", "lsn", "verdict"),
    [
        (True, 1, 0x200, PASSED),
        (True, 1, 0x1FF, BEHIND),
        (True, 2, 0x400, UNPROVEN),  # the history of 2 was never asked for
        (True, 3, 0x600, PASSED),
        (True, 3, 0x1FF, BEHIND),
        (True, None, 0x1FF, BEHIND),
        (True, None, 0x600, UNPROVEN),
        (True, 4, 0x600, UNPROVEN),  # its history may not be read
        (False, 1, 0x200, PASSED),
        (False, 1, 0x1FF, LOST),  # a crash, with synchronous_commit off
        (False, 2, 0x600, UNPROVEN),
        (False, 3, 0x600, PASSED),
        (False, 4, 0x600, PASSED),
    ],
)
def test_the_verdict_on_a_position_of_an_early_timeline(
    standby: bool, timeline: int | None, lsn: int, verdict: Verdict
) -> None:
    assert judge(Position(9, 1, 0x200), Facts(9, standby, lsn, timeline), timelines(4)) is verdict


@pytest.mark.parametrize("standby", [True, False])
def test_a_position_behind_the_fork_is_lost_though_it_is_reached(standby: bool) -> None:
    assert judge(Position(9, 1, 0x301), Facts(9, standby, 0x900, 3), timelines()) is LOST
    assert judge(Position(9, 1, 0x300), Facts(9, standby, 0x900, 3), timelines()) is PASSED
    assert judge(Position(9, 2, 0x501), Facts(9, standby, 0x900, 3), timelines()) is LOST


@pytest.mark.parametrize("standby", [True, False])
def test_a_server_on_an_earlier_timeline_proves_nothing(standby: bool) -> None:
    assert judge(Position(9, 5, 0x100), Facts(9, standby, 0x900, 3), timelines()) is UNPROVEN
    assert judge(Position(9, 5, 0xA00), Facts(9, standby, 0x900, 3), timelines()) is BEHIND


def test_a_timeline_that_is_not_in_the_history_of_the_servers_is_lost() -> None:
    known = Timelines()
    known.note(9, 5, "1\t0/300\tno recovery target specified\n")
    assert judge(Position(9, 3, 0x100), Facts(9, True, 0x900, 5), known) is LOST


def test_an_unknown_position_is_at_a_primary_alone() -> None:
    for system in (0, 9):
        assert judge(Position(system, 0, UNKNOWN), Facts(9, True, 0x900, 1), timelines()) is BEHIND
        assert judge(Position(system, 0, UNKNOWN), Facts(9, False, 0x900, 1), timelines()) is PASSED


def test_a_position_of_another_cluster_guards_nothing() -> None:
    assert judge(Position(8, 1, UNKNOWN - 1), Facts(9, True, 1, None), timelines()) is PASSED


def test_facts_are_read_from_the_servers_text_in_any_language() -> None:
    text = "ungültige Eingabesyntax für Typ integer: „pgdbpool 9 s 1/A0 00000003“"
    assert read(text) == Facts(9, True, 0x1000000A0, 3)
    assert read("pgdbpool 9 s 1/A0 c0000003") == Facts(9, True, 0x1000000A0, 3, received=False)
    assert read("pgdbpool 9 s 0/0 -") == Facts(9, True, 0, None)
    assert read('invalid input syntax for type integer: "x"') is None
    assert str(read(text)) == "a standby on timeline 3, at 1/A0"
    assert lsn_of(lsn_text(0x1000000A0)) == 0x1000000A0


def test_where_writes_end() -> None:
    assert written(Facts(9, False, 8192 + 100, 1)) == Position(9, 1, 8292)
    for header in (SHORT_HEADER, LONG_HEADER):
        assert written(Facts(9, False, 8192 + header, 1)) == Position(9, 1, 8192)
    assert written(Facts(9, True, 8192, 1)) is None

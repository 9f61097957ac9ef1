"""A server's part of the write-ahead log, and whether that includes the writes of a token.

A position alone proves nothing: after a failover it may be beyond the new primary's log, or be reached by
other records. So it counts on its own timeline, and on timelines that began after it.
"""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING, NamedTuple

from .._util.token import UNKNOWN, Position, lsn_of, lsn_text

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

# The position is read before the timeline, so a standby that switches timelines in between is not taken to
# have reached it on the old one. Only members of pg_read_all_stats see the timeline that a standby receives.
# Others see that of the control file, marked with a c, which may lag behind. A standby that receives nothing
# reports none.
# https://www.postgresql.org/docs/current/monitoring-stats.html#MONITORING-PG-STAT-WAL-RECEIVER-VIEW
_SYSTEM = "(SELECT system_identifier FROM pg_catalog.pg_control_system())"
_FACTS = f"""
    SELECT system, standby, lsn, pg_catalog.lower(CASE
        WHEN NOT standby THEN pg_catalog.left(pg_catalog.pg_walfile_name(lsn), 8)
        ELSE (SELECT coalesce(
                pg_catalog.lpad(pg_catalog.to_hex(received_tli), 8, '0'),
                CASE WHEN pid IS NOT NULL THEN 'c' || pg_catalog.lpad(pg_catalog.to_hex(greatest(
                    (SELECT timeline_id FROM pg_catalog.pg_control_checkpoint()),
                    (SELECT min_recovery_end_timeline FROM pg_catalog.pg_control_recovery()))), 7, '0') END)
            FROM pg_catalog.pg_stat_get_wal_receiver() WHERE lsn IS NOT NULL) END) AS timeline
    FROM (SELECT standby,
              {_SYSTEM} AS system,
              CASE WHEN standby THEN pg_catalog.pg_last_wal_replay_lsn()
                  ELSE pg_catalog.pg_current_wal_insert_lsn() END AS lsn
          FROM pg_catalog.pg_is_in_recovery() AS standby OFFSET 0) AS here OFFSET 0"""
_TEXT = """pg_catalog.concat_ws(' ', 'pgdbpool', system, CASE WHEN standby THEN 's' ELSE 'p' END,
    coalesce(lsn, '0/0'), coalesce(timeline, '-'))"""
QUERY = f"SELECT {_TEXT} FROM ({_FACTS}) AS facts".encode()
"""The query for a server's facts."""
# The text is not a number, so the cast fails, and with it all later statements in the pipeline.
GUARD = f"""
    SELECT CASE WHEN passed THEN facts ELSE facts::int::text END FROM (
        SELECT {_TEXT} AS facts,
            ($1 <> '0' AND system::text <> $1)
            OR (lsn >= $2::pg_lsn AND timeline = ANY ($3::text[]))
            OR (NOT standby AND $3::text[] = '{{}}') AS passed
        FROM ({_FACTS}) AS facts OFFSET 0) AS guard""".encode()
"""The query that fails unless the server has the writes up to a position."""
KNOWN_GUARD = GUARD.replace(_SYSTEM.encode(), b"$1::text")
"""The same for a session whose server is known, which saves a look into the server's control file."""
_COMMITTED = "pg_catalog.current_setting('transaction_isolation') = 'read committed'"
_REPLAYED = "pg_catalog.pg_last_wal_replay_lsn()"
_FOUND = b"pgdbpool_replayed"
# The first column is evaluated first, so the reported position was replayed before the timeline is read. The
# value of a CASE's ELSE must depend on the server: PostgreSQL would evaluate a constant one beforehand. A
# subquery, or a text result, would each take as long as all of the comparisons.
_FAST_GUARD = f"""
    SELECT {_REPLAYED} AS {_FOUND.decode()}, CASE WHEN {_REPLAYED} >= $1::pg_lsn
            AND (pg_catalog.pg_stat_get_wal_receiver()).received_tli = $2::int AND {_COMMITTED}
        THEN NULL
        ELSE ('pgdbpool 0 s ' || {_REPLAYED}
            || CASE WHEN {_COMMITTED} THEN ' -' ELSE ' snapshot' END)::int
        END""".encode()
"""The same for a session that sees its standby's receiver, in the transaction of the statement.

In `read committed` the statement takes its own snapshot, after the guard. At other levels this guard fails.
"""
_ANSWER = re.compile(r"pgdbpool (\d+) ([sp]) ([0-9A-F]+/[0-9A-F]+) ([0-9a-f]{8}|-|snapshot)")
# A fork may be anywhere in the file; the pattern leaves out other lines and comments.
_HISTORY = "SELECT pg_catalog.pg_read_file('pg_wal/{:08X}.history', 0, 100000, true)"
_FORK = re.compile(r"^\s*(\d+)\s+([0-9A-F]+/[0-9A-F]+)", re.MULTILINE)

PAGE, SHORT_HEADER, LONG_HEADER = 8192, 24, 40
"""Bytes of a page of the log, and of the headers of one and of a file's first."""


class Verdict(enum.Enum):
    """Whether a server has the writes up to a position."""

    PASSED = "has it"
    BEHIND = "is behind"
    UNPROVEN = "cannot be told to have it"
    LOST = "does not have it, and never will"


class Facts(NamedTuple):
    """A server's part of the write-ahead log, at one moment; it never shrinks while the server runs."""

    system: int
    standby: bool
    lsn: int
    timeline: int | None
    """The timeline that a primary writes, or that a standby receives; None if it receives nothing."""
    received: bool = True
    """Whether the session sees a standby's receiver; else the timeline is that of a restartpoint."""
    one_snapshot: bool = False
    """Whether a guard reported them that failed since its transaction has one snapshot for all statements."""

    def __str__(self) -> str:
        role = "a standby" if self.standby else "a primary"
        on = "that receives nothing" if self.timeline is None else f"on timeline {self.timeline}"
        return f"{role} {on}, at {lsn_text(self.lsn)}"


def read(text: str) -> Facts | None:
    """Return the facts in the result of `QUERY`, or in the error of `GUARD`; None if there are none."""
    if (found := _ANSWER.search(text)) is None:
        return None
    system, role, lsn, timeline = found.groups()
    received, one_snapshot = timeline[0] != "c", timeline == "snapshot"
    untold = one_snapshot or timeline == "-"
    number = None if untold else int(timeline if received else timeline[1:], 16)
    return Facts(int(system), role == "s", lsn_of(lsn), number, received, one_snapshot)


def written(facts: Facts) -> Position | None:
    """Return the position at which a primary's writes end; None for a standby, which has no writes.

    If the last record filled its page, the insert position is behind the header of the next page. A standby
    that has replayed everything is before that header.
    """
    if facts.standby or facts.timeline is None:
        return None
    over = facts.lsn % PAGE
    lsn = facts.lsn - over if over in (SHORT_HEADER, LONG_HEADER) else facts.lsn
    return Position(facts.system, facts.timeline, lsn)


class Timelines:
    """The histories of timelines that servers have reported."""

    def __init__(self) -> None:
        self._forks: dict[tuple[int, int], dict[int, int] | None] = {}

    def knows(self, system: int, timeline: int) -> bool:
        """Return whether the history of a timeline was asked for."""
        return (system, timeline) in self._forks

    def note(self, system: int, timeline: int, history: str | None) -> None:
        """Remember the text of a timeline's history; None if the role may not read it."""
        forks = None if history is None else {int(old): lsn_of(at) for old, at in _FORK.findall(history)}
        self._forks[system, timeline] = forks

    def includes(self, system: int, timeline: int, position: Position) -> bool | None:
        """Return whether a later timeline began after the position; None if unknown."""
        forks = self._forks.get((system, timeline))
        if forks is None:
            return None
        fork = forks.get(position.timeline)
        return fork is not None and position.lsn <= fork

    def of(self, position: Position) -> list[int]:
        """Return the timelines that the position is known to be on."""
        known = list(self._forks)
        later = [t for system, t in known if system == position.system and self.includes(system, t, position)]
        return [position.timeline, *later]


def judge(position: Position, facts: Facts, timelines: Timelines) -> Verdict:
    """Return whether a server has the writes up to the position."""
    if position.system not in (0, facts.system):
        return Verdict.PASSED  # it is of another cluster
    if position.lsn == UNKNOWN:
        return Verdict.BEHIND if facts.standby else Verdict.PASSED
    timeline = facts.timeline
    if timeline is None or timeline < position.timeline:
        return Verdict.BEHIND if facts.lsn < position.lsn else Verdict.UNPROVEN
    if timeline > position.timeline:
        if (included := timelines.includes(facts.system, timeline, position)) is None:
            # If the role may not read the history, the primary is as fresh as any server. A standby may still
            # be one that the others have left behind.
            unreadable = timelines.knows(facts.system, timeline)
            return Verdict.PASSED if unreadable and not facts.standby else Verdict.UNPROVEN
        if not included:
            return Verdict.LOST
    if facts.lsn >= position.lsn:
        return Verdict.PASSED
    return Verdict.BEHIND if facts.standby else Verdict.LOST


def guard(position: Position, timelines: Timelines, facts: Facts | None) -> tuple[bytes, list[bytes | None]]:
    """Return the command that fails unless the server has the writes up to the position.

    :param facts: the server's facts from an earlier query in the same session.
    """
    command, system = (GUARD, position.system) if facts is None else (KNOWN_GUARD, facts.system)
    if position.lsn == UNKNOWN:
        return command, [b"%d" % system, b"0/0", b"{}"]
    values = [b"%d" % system, lsn_text(position.lsn).encode()]
    texts = b",".join(b"%08x,c%07x" % (timeline, timeline) for timeline in timelines.of(position))
    return command, [*values, b"{%s}" % texts]


def fast_guard(position: Position) -> tuple[bytes, list[bytes | None]]:
    """Return the same for a session that sees its standby's receiver; see `_FAST_GUARD`."""
    return _FAST_GUARD, [lsn_text(position.lsn).encode(), b"%d" % position.timeline]


def query(facts: Facts | None) -> bytes:
    """Return the query for a server's facts.

    :param facts: its facts from an earlier query in the same session: a primary stays on its timeline.
    """
    if facts is None or facts.standby or facts.timeline is None:
        return QUERY
    return (
        f"SELECT pg_catalog.concat_ws(' ', 'pgdbpool', '{facts.system}', 'p', "
        f"pg_catalog.pg_current_wal_insert_lsn(), '{facts.timeline:08x}')"
    ).encode()


def history_query(timeline: int) -> bytes:
    """Return the query for the history of a timeline, which needs the role pg_read_server_files."""
    return _HISTORY.format(timeline).encode()


def facts_of(result: PGresult) -> Facts | None:
    """Return the facts in the result of `QUERY` or `GUARD`; None for any other result."""
    if result.nfields != 1 or result.ntuples != 1 or (value := result.get_value(0, 0)) is None:
        return None
    return read(value.decode("ascii", "replace"))


def replayed(result: PGresult) -> int:
    """Return the position that a standby has replayed if this is the result of `fast_guard`, else 0."""
    if result.nfields != 2 or result.fname(0) != _FOUND or (value := result.get_value(0, 0)) is None:
        return 0
    return lsn_of(value.decode())


TIMELINES = Timelines()
"""The histories that the servers of this process have reported."""

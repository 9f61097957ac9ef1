"""The status report of a server: role, timeline and position in the write-ahead log."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

HISTORY = 600
"""Positions of the primary that are kept: five minutes of them."""

# pg_control_checkpoint() returns the timeline too, but only after the first checkpoint on it.
# https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-ADMIN-BACKUP
QUERY = b"""
    SELECT standby,
           CASE WHEN NOT standby THEN
               pg_catalog.left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 8) END,
           (SELECT system_identifier FROM pg_catalog.pg_control_system()),
           CASE WHEN standby
               THEN pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_last_wal_replay_lsn(), '0/0')
               ELSE pg_catalog.pg_wal_lsn_diff(pg_catalog.pg_current_wal_flush_lsn(), '0/0') END,
           CASE WHEN standby THEN extract(epoch FROM
               pg_catalog.clock_timestamp() - pg_catalog.pg_last_xact_replay_timestamp()) END
    FROM pg_catalog.pg_is_in_recovery() AS standby"""


class ServerReport(NamedTuple):
    """The status of a server at one moment."""

    standby: bool
    timeline: int | None
    """Of a primary; each promotion begins a higher one."""
    system: str
    """The identifier of the cluster, which is the same on all of its servers."""
    position: int | None
    """Bytes of the write-ahead log that a primary has written or a standby has replayed."""
    replayed_before: float | None
    """Seconds since the commit of the last replayed transaction, by the clock of the standby."""
    at: float
    """When the answer arrived, on the monotonic clock."""


def read(result: PGresult, at: float) -> ServerReport:
    """Parse the result of `QUERY`."""
    values = (result.get_value(0, column) for column in range(5))
    return parse([None if value is None else value.decode() for value in values], at)


def parse(values: Sequence[str | None], at: float) -> ServerReport:
    """Parse the columns of a row of `QUERY`."""
    standby, timeline, system, position, age = values
    return ServerReport(
        standby=standby == "t",
        timeline=None if timeline is None else int(timeline, 16),
        system=system or "",
        position=None if position is None else int(position),
        replayed_before=None if age is None else max(float(age), 0.0),
        at=at,
    )


class Lag(NamedTuple):
    """How far a standby is behind."""

    bytes: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.bytes} bytes and {self.seconds:.1f} s"


def behind(primary: ServerReport, standby: ServerReport) -> Lag | None:
    """Return how far a standby is behind, from one report of each server; None if unknown.

    Seconds are those since the last replayed transaction, by the clock of the standby. The time since the
    primary was ahead takes more than one report, see `PrimaryHistory`.
    """
    if primary.position is None or standby.position is None or primary.system != standby.system:
        return None
    missing = max(primary.position - standby.position, 0)
    return Lag(missing, (standby.replayed_before or 0.0) if missing else 0.0)


class PrimaryHistory:
    """The past positions of the primary, which show how long ago it was at the position of a standby."""

    def __init__(self) -> None:
        self._known: deque[tuple[float, int]] = deque(maxlen=HISTORY)

    def note(self, at: float, position: int) -> None:
        """Remember a position of the primary."""
        if self._known and position < self._known[-1][1]:
            self._known.clear()  # a new primary, which lacks the end of the old log
        self._known.append((at, position))

    def lag(self, report: ServerReport) -> Lag | None:
        """Return how far a standby is behind; None if unknown.

        Seconds are those since the primary was first seen beyond the position of the standby, by the
        clock of this process. So an idle primary means no lag, and the clocks of the servers need not
        agree.
        """
        if not self._known or report.position is None:
            return None
        behind = self._known[-1][1] - report.position
        if behind <= 0:
            return Lag(0, 0.0)
        ahead = next(at for at, position in self._known if position > report.position)
        seconds = report.at - ahead
        if ahead == self._known[0][0] and report.replayed_before is not None:
            # Behind since before the first report: use the standby's own clock until more is known.
            seconds = max(seconds, report.replayed_before)
        return Lag(behind, max(seconds, 0.0))

"""Guards that let no stale read run, and the positions of writes, both in the round trip of the statement.

In `read committed` a statement takes its snapshot after the guard before it, in the same transaction. In
`repeatable read` the guard would take the snapshot that the statement reads by, and only then look at the
position: there it has its own transaction before the statement's. The end of writes is asked for after the
COMMIT, or after the Sync that implies one: before it the commit's record is not written yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg

from .. import errors
from .._request.freshness import Seen
from .._servers.endpoint import Role
from .._servers.positions import (
    TIMELINES,
    Facts,
    Verdict,
    facts_of,
    fast_guard,
    guard,
    judge,
    read,
    replayed,
    written,
)
from .._util.token import UNKNOWN, lsn_text
from . import outcome
from .commands import BEGIN, COMMIT, FATAL, NOTHING, Command
from .liveness import LiveConnection
from .statement_shape import shape

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from psycopg.pq.abc import PGresult

    from .._util.token import Position
    from .block import Block

_MARK = b"pgdbpool_xid"
XID: Command = (b"SELECT pg_catalog.txid_current_if_assigned() AS " + _MARK, None)
"""Asks whether the transaction has written anything."""
SYNC: Command = (b"", None)
"""Stands for a Sync between two commands."""


class GuardedConnection(LiveConnection):
    """A connection that knows how much of the write-ahead log its server has."""

    def lacking(self, positions: Iterable[Position]) -> list[Position]:
        """Return the positions that the server is not known to have."""
        facts = self.proven
        if facts is None:
            return list(positions)
        return [p for p in positions if judge(p, facts, TIMELINES) is not Verdict.PASSED]

    def guards_for(self, seen: Seen) -> tuple[Command, ...]:
        """Return the commands that fail, with all that follow, unless the server has the seen writes.

        :raises StaleReadError: the server is already known to lack them; nothing was sent.
        """
        return self._apart(missing) if (missing := self._missing(seen)) else NOTHING

    def guarded(self, block: Block, seen: Seen, commands: tuple[Command, ...]) -> tuple[Command, ...]:
        """Return the commands that begin a transaction, with the guards that are due.

        :raises StaleReadError: as `guards_for`.
        """
        if (token := seen.token) is None:
            return commands
        positions, facts = token.positions, self.proven
        if facts is not None and len(positions) == 1:  # as `judge` says, in a tenth of the time
            system, timeline, lsn = positions[0]
            if timeline == facts.timeline and system == facts.system:
                if lsn <= facts.lsn:
                    return commands
                if facts.standby and facts.received and lsn != UNKNOWN and self._shares_transaction(block):
                    self.guarding = self.follows = True
                    fast = fast_guard(positions[0])
                    return (commands[0], fast, *commands[1:]) if block.manual else (fast, *commands)
        return self.guards_for(seen) + commands

    def _missing(self, seen: Seen) -> list[Position] | None:
        """Return the seen positions that the server is not known to have; None if no guard is needed.

        :raises StaleReadError: it is known not to have them.
        """
        positions = seen.required()
        if not positions or self._only_writers() or not (missing := self.lacking(positions)):
            return None
        if (behind := self.endpoint.found_behind()) is not None:
            self._check_ahead(missing, behind)
        return missing

    def _apart(self, missing: Iterable[Position]) -> tuple[Command, ...]:
        """Return guards in a separate transaction."""
        self.guarding = self.follows = True
        return BEGIN + tuple(guard(position, TIMELINES, self.proven) for position in missing) + COMMIT

    def _shares_transaction(self, block: Block) -> bool:
        """Return whether a guard may go into the transaction of the next statement.

        An isolation level that is asked for has one snapshot, and its SET has to be the first statement. If
        an operation has several steps (`owner`), the block does not know its statement yet.
        """
        if self.one_snapshot or self.owner or self._isolation_level is not None or block.binding.modes:
            return False
        if self.endpoint.behind_at and self.endpoint.found_behind():
            return False  # the guard may not have to be sent
        what = shape(getattr(block, "statement", None), self)
        return not (what.uncommon or what.special or what.sets)

    def _only_writers(self) -> bool:
        """Return whether its group uses only servers that take writes: these need no guard."""
        return self.keeper is not None and self.keeper.writes

    def _check_ahead(self, missing: Iterable[Position], facts: Facts) -> None:
        """Refuse to send a guard that is known to fail."""
        if any(judge(position, facts, TIMELINES) is Verdict.BEHIND for position in missing):
            raise self._behind(str(facts))

    def _behind(self, what: str) -> errors.StaleReadError:
        label = self.endpoint.label
        error = errors.StaleReadError(
            f"{label} does not have what the block must see: nothing was read; it is {what}",
            servers={label: what},
        )
        error.repeatable = True
        return error

    def note_passed(self, answers: Sequence[PGresult]) -> None:
        """Note the findings of the guards."""
        self._end_guarding(True)
        for answer in answers:
            if (facts := self._found(answer)) is not None:
                self.prove(facts)

    def _found(self, answer: PGresult) -> Facts | None:
        """Return the findings of a guard; None if the answer is not a guard's."""
        known = self.proven
        if known is None or not (lsn := replayed(answer)):
            return facts_of(answer)
        return Facts(known.system, True, lsn, known.timeline)

    def note_failed(self, error: psycopg.Error) -> errors.StaleReadError | None:
        """Return the error for a guard that failed; None if another command did."""
        facts = read(str(error)) if error.sqlstate == "22P02" else None
        self._end_guarding(facts is None)
        if facts is None:
            return None
        if self.proven is not None and not facts.system:
            facts = facts._replace(system=self.proven.system)
        if facts.one_snapshot:  # a default of the server, the database or the role: not to be asked so again
            self.one_snapshot = True
            return self._behind("in a transaction of one snapshot")
        if facts.timeline is not None or self.proven is None:
            self.prove(facts)
        self.endpoint.note_behind(facts)
        return self._behind(f"at {lsn_text(facts.lsn)}")

    def _end_guarding(self, passed: bool) -> None:
        self.guarding, self.follows = False, self.block is not None and bool(self.block.binding.report)
        if self.keeper is not None:
            self.keeper.note_guard(self, passed)

    def prove(self, facts: Facts) -> None:
        """Remember the server's position; behind a pooler the next transaction may be on another server."""
        if not self.endpoint.config.pooler:
            self.proven = facts
            self.endpoint.note_facts(facts)

    # The end of writes.

    def tell_next(self) -> None:
        """Let the exchange of the next statement ask for the end of its writes."""
        self.telling = self.streamed = True  # one test looks for both

    def learns(self) -> Seen | None:
        """Return the object that notes the block's writes; None without one, or on a standby."""
        seen = None if self.block is None else self.block.sees()
        if seen is None or self.reads or self.closed:
            return None
        standby = not self.local and self.pgconn.parameter_status(b"in_hot_standby") == b"on"
        return None if standby else seen

    def tell(self, outcomes: list[list[PGresult]]) -> list[list[PGresult]]:
        """Note the end of writes; return the other answers."""
        *outcomes, told = outcomes
        kept = [results for results in outcomes if not (results and _is_xid(results[0]))]
        asked = [results[0] for results in outcomes if results and _is_xid(results[0])]
        failed = any(result.status == FATAL for results in kept for result in results)
        if not failed and asked and asked[0].get_value(0, 0) is not None:
            self.note_written(facts_of(told[0]) if told else None)
        return kept

    def note_written(self, facts: Facts | None) -> None:
        """Note that the block has written, up to here; None if the server does not give a position."""
        if self.block is None or (seen := self.block.sees()) is None:
            return
        position = None if facts is None else written(facts)
        if facts is None or position is None:
            seen.note_unknown(0 if self.proven is None else self.proven.system)
        else:
            self.prove(facts)
            seen.note(position)

    def lose_track_after(self, error: BaseException) -> None:
        """Note that the block may have written, if the error, or an interrupted COMMIT, leaves that open."""
        if not isinstance(error, errors.ConnectionLostError):
            self.lose_track()
            return
        unknown = error.maybe_executed or error.maybe_committed
        if not (unknown or isinstance(error, errors.NotReplicatedError)) or self.block is None or self.reads:
            return
        statement = getattr(self.block, "statement", None)
        wrote = error.maybe_committed or outcome.may_commit(statement, inside=False)
        if wrote and self.endpoint.role is not Role.STANDBY:
            self.lose_track()

    def lose_track(self) -> None:
        """Note that something may have been written, up to an unknown position."""
        self.note_written(None)


def _is_xid(result: PGresult) -> bool:
    return bool(result.ntuples) and result.fname(0) == _MARK

"""The end of writes: a position in the write-ahead log of each cluster that was written to."""

from __future__ import annotations

import binascii
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable
from struct import Struct
from typing import NamedTuple

UNKNOWN = 2**64 - 1
"""The unknown position of a write that may have been committed: only a primary is known to have it."""

_PACKED = Struct(">QIQ")


class Position(NamedTuple):
    """A position in the write-ahead log of a cluster."""

    system: int
    """The identifier of the cluster, the same on all of its servers; 0 if it is not known."""
    timeline: int
    """Each promotion begins another one; 0 if it is not known."""
    lsn: int

    def __str__(self) -> str:
        return f"{lsn_text(self.lsn)} on timeline {self.timeline}"


class Token:
    """The opaque end of a block's writes; `str` and `parse` convert it to text (27 characters) and back.

    Two tokens joined with ``|`` stand for the writes of both, even in different clusters.
    """

    __slots__ = ("positions",)

    def __init__(self, positions: Iterable[Position]) -> None:
        last: dict[int, Position] = {}
        for position in positions:
            if (known := last.get(position.system)) is None or _order(known) < _order(position):
                last[position.system] = position
        self.positions = tuple(sorted(last.values()))

    @classmethod
    def parse(cls, text: str) -> Token:
        """Return the token of a text.

        :raises ValueError: it is not the text of a token.
        """
        try:
            packed = urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
        except (AttributeError, UnicodeEncodeError, binascii.Error):
            packed = b""
        if (
            not packed
            or len(packed) % _PACKED.size
            or urlsafe_b64encode(packed).rstrip(b"=") != text.encode()
        ):
            raise ValueError(f"{text!r} is not a token: use str() of one") from None
        positions = [Position(*parts) for parts in _PACKED.iter_unpack(packed)]
        if any(position.timeline >> 31 for position in positions):  # an integer at the server
            raise ValueError(f"{text!r} is not a token: use str() of one")
        return cls(positions)

    def __str__(self) -> str:
        return urlsafe_b64encode(b"".join(_PACKED.pack(*p) for p in self.positions)).rstrip(b"=").decode()

    def __repr__(self) -> str:
        return f"Token.parse({str(self)!r})"

    def __or__(self, other: Token | None) -> Token:
        return self if other is None else Token(self.positions + other.positions)

    __ror__ = __or__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Token) and self.positions == other.positions

    def __hash__(self) -> int:
        return hash(self.positions)

    def __reduce__(self) -> tuple[type[Token], tuple[tuple[Position, ...]]]:
        return Token, (self.positions,)


def _order(position: Position) -> tuple[bool, int, int]:
    return position.lsn == UNKNOWN, position.timeline, position.lsn


def lsn_text(lsn: int) -> str:
    """Return a position as PostgreSQL writes it."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def lsn_of(text: str) -> int:
    """Return the position of PostgreSQL's text."""
    high, _, low = text.partition("/")
    return (int(high, 16) << 32) + int(low, 16)

"""The right to one connection of a pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import ref

if TYPE_CHECKING:
    from .._servers.endpoint import Endpoint


class Slot:
    """The right to one connection of a pool, taken for as long as the object lives."""

    __slots__ = ("__weakref__", "conn", "endpoint", "left", "lent")

    def __init__(self) -> None:
        self.left = False
        """Whether its connection is closed, and the server may still be in a commit of the session."""
        self.conn: ref[Any] | None = None
        """Its connection, whoever has that."""
        self.endpoint: Endpoint | None = None
        """Where its connection is, or is being opened to."""
        self.lent = False

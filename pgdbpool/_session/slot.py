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
        """Whether its connection is closed while the server may still be committing in that session."""
        self.conn: ref[Any] | None = None
        """Its connection, idle or in use."""
        self.endpoint: Endpoint | None = None
        """The endpoint that its connection is open, or being opened, to."""
        self.lent = False

"""The session of Flask-SQLAlchemy that reads from one bind and writes to the default one.

    db = SQLAlchemy(session_options={"class_": RoutingSession})

    app.config["SQLALCHEMY_DATABASE_URI"] = "postgresql+pgdbpool://write"
    app.config["SQLALCHEMY_BINDS"] = {"read": "postgresql+pgdbpool://read"}

It needs the extras `sqlalchemy` and `flask`, and Flask-SQLAlchemy.
"""

from __future__ import annotations

from typing import Any

from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.session import Session
from sqlalchemy.exc import UnboundExecutionError

from .sqlalchemy import RoutingSession as _RoutingSession

__all__ = ["RoutingSession"]


class RoutingSession(_RoutingSession, Session):  # type: ignore[misc]
    """A session whose reads go to the bind `reading` until it writes; a model with a bind key goes there.

    :param reading: a key of `SQLALCHEMY_BINDS`, among the `session_options`.
    """

    def __init__(self, db: SQLAlchemy, *, reading: str = "read", **options: Any) -> None:
        engines = db.engines
        if reading not in engines:
            raise UnboundExecutionError(f"SQLALCHEMY_BINDS has no {reading!r}: add it, or set `reading`")
        super().__init__(db=db, writing=engines[None], reading=engines[reading], **options)

"""The file from which a password is read, at `init` and again with new connections."""

from __future__ import annotations

import re

from .declarations import Refused, show

_LIMIT = 65_536


def read_password(path: str) -> str:
    """Return the only line of a file; raises `Refused`."""
    try:
        with open(path, "rb") as file:
            text = file.read(_LIMIT + 1).decode()
    except OSError as error:
        raise Refused(("", f"{show(path)} cannot be read: {error.strerror}")) from None
    except UnicodeDecodeError:
        raise Refused(("", f"{show(path)} is not text in UTF-8")) from None
    password = text.removesuffix("\n").removesuffix("\r")
    if not password or len(password) > _LIMIT or re.search("[\\0\r\n]", password):
        raise Refused(("", f"{show(path)} must hold the password alone, on one line"))
    return password

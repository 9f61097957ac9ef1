"""Whether blocks of this process may have more than a group: a deadline, a correlation id, a token.

Readers check the plain attribute `in_use` first, so that a process without any of them pays for none.
"""

from __future__ import annotations

in_use = False
"""Whether one of them was ever used in this process."""


def use() -> None:
    """Note that one of them is used."""
    global in_use
    in_use = True

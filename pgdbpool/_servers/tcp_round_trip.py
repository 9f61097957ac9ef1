"""The time of a round trip to a server, as the kernel has measured it; nothing is sent for it."""

from __future__ import annotations

import os
import socket
import struct

_MINIMUM = struct.Struct("@148xI")
"""`tcpi_min_rtt` of Linux's `struct tcp_info`, in microseconds: the minimum of the last five minutes.

Not `tcpi_rtt`: a statement that runs longer than the kernel of the server delays an acknowledgement
would look like a slow network.
"""
_UNKNOWN = 0xFFFFFFFF


def round_trip(fileno: int) -> float | None:
    """Return the seconds of a round trip on a socket; None if it was not measured."""
    option = getattr(socket, "TCP_INFO", None)
    if option is None:
        return None
    try:
        with socket.socket(fileno=os.dup(fileno)) as copy:
            info = copy.getsockopt(socket.IPPROTO_TCP, option, _MINIMUM.size)
        (microseconds,) = _MINIMUM.unpack(info)
    except (OSError, struct.error):  # a Unix socket, an old kernel
        return None
    return microseconds / 1_000_000 if 0 < microseconds < _UNKNOWN else None

"""Warnings of servers that are too small for the pools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import psycopg

from .._lending.group import users_of
from .._util import log_events as events
from ..errors import one_line
from ..sizing import ask, demand

if TYPE_CHECKING:
    from .._config.model import Config
    from .._servers.endpoint import Endpoint


def warn_of_sizes(config: Config, endpoints: Mapping[str, Endpoint], processes: int) -> None:
    """Warn of servers that admit fewer connections than all processes together can open."""
    roles = {e.label: e.role.value for e in endpoints.values() if e.role}
    for label, need in demand(config, processes, roles).items():
        endpoint = endpoints[label]
        if label != need.labels[0]:
            continue  # the same server
        lent = ((group, group.borrow(endpoint)) for group in users_of(endpoint))
        group, conn = next(((group, conn) for group, conn in lent if conn), (None, None))
        if group is None or conn is None:
            continue
        try:
            verdict = need.verdict(ask(conn), processes)
        except psycopg.Error as error:
            reason = one_line(error)
            events.ENDPOINT_SILENT(
                "endpoint %s: cannot read its limits: %s", label, reason, endpoint=label, reason=reason
            )
            verdict = ""
        finally:
            group.give_back(conn)
        if verdict:
            events.ENDPOINT_TOO_SMALL(
                "endpoint %s: %s; `pgdbpool size` recommends sizes", label, verdict,
                endpoint=label, reason=verdict,
            )  # fmt: skip

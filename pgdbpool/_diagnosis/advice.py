"""The findings from the facts about a configuration's servers, with their remedies."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .._servers.driver import SLOW
from ..rls import Finding
from .inspection import Facts, ServerFacts

if TYPE_CHECKING:
    from .._config.model import Config, EndpointConfig, GroupConfig

OK, DEGRADED, BROKEN = "ok", "degraded", "broken"

_RANK = {"error": 0, "warning": 1, "info": 2}


def status(findings: list[Finding]) -> str:
    """Return `broken` if something does not work, `degraded` if something may fail, or else `ok`."""
    worst = min((_RANK[finding.severity] for finding in findings), default=2)
    return (BROKEN, DEGRADED, OK)[worst]


def advise(config: Config, facts: Facts) -> list[Finding]:
    """Return the findings, the worst first; each has a remedy."""
    found = [*_driver(facts), *_servers(config, facts), *_groups(config, facts), *_primaries(facts)]
    return sorted(found, key=lambda finding: (_RANK[finding.severity], finding.code, finding.subject))


def _driver(facts: Facts) -> Iterator[Finding]:
    if facts.driver.fell_back:
        yield Finding(
            "warning", "slow-driver", str(facts.driver), SLOW,
            "run the application in the main interpreter, or install psycopg[binary] for this Python",
        )  # fmt: skip


def _servers(config: Config, facts: Facts) -> Iterator[Finding]:
    for endpoint in config.endpoints:
        server = facts.endpoints[endpoint.label]
        users = [group for group in config.groups.values() if endpoint.label in group.endpoints]
        if not users:
            remedy = "name it in `endpoints` of a group, or remove it from `db`"
            yield Finding("info", "unused-endpoint", endpoint.label, "no group uses it", remedy)
        if server.patroni is False:
            yield Finding(
                "warning", "patroni", endpoint.label, f"no answer from Patroni at {endpoint.patroni}",
                "give the address of its REST API in `patroni`, and let this machine ask it",
            )  # fmt: skip
        if not server.reachable:
            # Serious by itself only if a group is left without a server, which is reported there.
            yield Finding("warning", "unreachable", endpoint.label, server.error or "no answer", _why(server))
            continue
        if server.error:
            yield Finding(
                "info", "not-told", endpoint.label, f"it does not tell all: {server.error}",
                "let the role execute pg_control_system() and pg_control_checkpoint()",
            )  # fmt: skip
        yield from _sizes(facts, server)
        yield from _tls(endpoint, server)
        yield from _pooler(endpoint, server, users)
        yield from _settings(endpoint, server, users)


def _why(server: ServerFacts) -> str:
    """Return the remedy for a server to which no connection can be opened."""
    text = (server.error or "").lower()
    for words, remedy in (
        (("password", "authentication", "pg_hba"), "fix `user`, `pass` or `pass_file`, or pg_hba.conf"),
        (
            ("too many", "remaining connection slots"),
            "see `pgdbpool size`; raise max_connections or the limit",
        ),
        (("does not exist",), "fix `name` or `user`, or create the missing object"),
        (("ssl", "certificate"), "fix `ssl` and `sslrootcert`, or the server's certificate"),
        (("translate host name", "resolve", "name or service"), "fix `host`, or the name's DNS entry"),
        (("no answer", "timeout"), "see whether a firewall drops packets, and whether the server hangs"),
        (("starting up", "shutting down", "recovery"), "wait until it has started"),
    ):
        if any(word in text for word in words):
            return remedy
    return "start the server, or fix `host` and `port`"


def _sizes(facts: Facts, server: ServerFacts) -> Iterator[Finding]:
    if server.demand is None or server.limits is None or server.label != server.demand.labels[0]:
        return
    if verdict := server.demand.verdict(server.limits, facts.processes or 1):
        usual = server.demand.usual > server.limits.usable
        remedy = f"`pgdbpool size` recommends connection counts; or set max_connections to {_room(server)}"
        yield Finding("error" if usual else "warning", "too-many-connections", server.label, verdict, remedy)


def _room(server: ServerFacts) -> int:
    assert server.demand is not None
    assert server.limits is not None
    return server.demand.most + server.limits.reserved


def _tls(endpoint: EndpointConfig, server: ServerFacts) -> Iterator[Finding]:
    params = endpoint.conninfo_params()
    host = str(params.get("hostaddr") or params.get("host") or "")
    if _local(host):
        return
    if server.tls is None:
        remedy = "`ssl: verify-full` with `sslrootcert`, and a certificate at the server"
        yield Finding(
            "warning", "not-encrypted", endpoint.label, f"the connection to {host} is not encrypted", remedy
        )
    elif params.get("sslmode") not in ("verify-full", "verify-ca"):
        remedy = "`ssl: verify-full` with `sslrootcert`"
        yield Finding(
            "info", "not-verified", endpoint.label, "the server's certificate is not verified", remedy
        )


def _local(host: str) -> bool:
    """Return whether a host is this machine."""
    if not host or host.startswith(("/", "@")) or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _pooler(endpoint: EndpointConfig, server: ServerFacts, users: list[GroupConfig]) -> Iterator[Finding]:
    label = endpoint.label
    preparing = [g for g in users if g.prepare_threshold is not None]
    if server.pooler and endpoint.pooler is None:
        yield Finding(
            "warning", "pooler", label, "a pooler stands before the server, and the configuration has none",
            "`pooler: transaction` if it gives each transaction another session; nothing if it keeps one for "
            "each client",
        )  # fmt: skip
    elif endpoint.pooler and not server.pooler:
        yield Finding(
            "info", "no-pooler", label, "no pooler stands before the server, but the configuration has one",
            "remove `pooler`: each transaction then binds less",
        )  # fmt: skip
    if (server.pooler or endpoint.pooler) and preparing:
        names = ", ".join(group.name for group in preparing)
        yield Finding(
            "warning", "prepared-statements", label,
            f"group {names} prepares statements behind a pooler (prepare_threshold "
            f"{preparing[0].prepare_threshold})",
            "`prepare_threshold: null`, unless it is PgBouncer 1.21 or later with max_prepared_statements",
        )  # fmt: skip


def _settings(endpoint: EndpointConfig, server: ServerFacts, users: list[GroupConfig]) -> Iterator[Finding]:
    label = endpoint.label
    role = endpoint.user if isinstance(endpoint.user, str) else "app"

    def remedy(name: str, value: str) -> str:
        there = f"ALTER ROLE {role} SET {name} = '{value}'"
        return there if endpoint.pooler or server.pooler else f"{there}; or `options: {{{name}: {value}}}`"

    if server.settings.get("client_connection_check_interval") == "0":
        yield Finding(
            "info", "client_connection_check_interval", label,
            "a statement whose client has gone runs on to its end",
            remedy("client_connection_check_interval", "2s"),
        )  # fmt: skip
    if server.settings.get("idle_in_transaction_session_timeout") == "0" and any(
        not group.autocommit for group in users
    ):
        yield Finding(
            "info", "idle_in_transaction_session_timeout", label,
            "a process that hangs within a transaction keeps its locks for ever",
            remedy("idle_in_transaction_session_timeout", "60s"),
        )  # fmt: skip
    unbound = [
        group.name
        for group in users
        if not (endpoint.query_timeout if group.query_timeout is None else group.query_timeout)
    ]
    if unbound:
        yield Finding(
            "warning", "query_timeout", label,
            f"statements of group {', '.join(unbound)} may run for ever, on a server that hangs too",
            "`query_timeout: 30s`, or another bound that no statement needs",
        )  # fmt: skip


def _groups(config: Config, facts: Facts) -> Iterator[Finding]:
    for name, group in facts.groups.items():
        declared = config.groups[name]
        if not group.served_by:
            reasons = "; ".join(f"{label}: {text}" for label, text in group.errors.items())
            yield Finding(
                "error", "no-server", name, f"no server takes its connections: {reasons}",
                "fix one of the servers, or `endpoints` and `target` of the group",
            )  # fmt: skip
        for label, text in group.errors.items():
            server = facts.endpoints[label]
            if group.served_by and server.reachable and "the target is" not in text:
                yield Finding(
                    "warning", "refused", name, f"not by {label}: {text}", "fix the reported problem"
                )
        for finding in group.rls:
            severity: Any = finding.severity
            if declared.tenant is not None and declared.tenant.verify != "error" and severity == "error":
                severity = "warning"  # that is how the group takes it
            remedy = finding.remedy or f"`pgdbpool rls CONFIG {name}` has more"
            yield Finding(severity, f"rls-{finding.code}", name, finding.message, remedy)
        limit = declared.max_lag
        for label in declared.endpoints if limit is not None else ():
            server = facts.endpoints[label]
            over = limit is not None and (
                (limit.bytes is not None and (server.lag_bytes or 0) > limit.bytes)
                or (limit.seconds is not None and (server.lag_seconds or 0) > limit.seconds)
            )
            if over:
                message = f"{label} is {server.lag_bytes} bytes behind, more than max_lag: it gets no blocks"
                yield Finding("warning", "lag", name, message, "see why replication to it is slow")


def _primaries(facts: Facts) -> Iterator[Finding]:
    """Find primaries that were promoted from the same data: writes to one are lost to the other."""
    kin: dict[str, list[ServerFacts]] = {}
    for server in facts.endpoints.values():
        if server.role == "primary" and server.system:
            kin.setdefault(server.system, []).append(server)
    for servers in kin.values():
        places = {server.demand.labels if server.demand else (server.label,) for server in servers}
        timelines = {server.timeline for server in servers}
        if len(places) > 1 and len(timelines) > 1:
            newest = max(servers, key=lambda server: server.timeline or 0)
            for server in servers:
                if server.timeline != newest.timeline:
                    yield Finding(
                        "error", "two-primaries", server.label,
                        f"takes writes on timeline {server.timeline}, and {newest.label} was promoted to "
                        f"{newest.timeline}",
                        f"stop it, and make it a standby of {newest.label} (pg_rewind)",
                    )  # fmt: skip

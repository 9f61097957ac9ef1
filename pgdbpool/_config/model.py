"""The configuration as the package uses it: frozen dataclasses that declare every key once.

`sources.load` reads a dict, a YAML file or the environment into a `Config`; the reference page is generated
from the declarations here.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args

import psycopg
from psycopg.conninfo import conninfo_to_dict

from .declarations import Key, Setting, settings_of
from .setting_types import Pattern, ServerSettings, TenantName
from .text_types import Directory, Factory, File, Host, Label, Provided, ProvidedSecret, Secret, Text, Url
from .value_types import (
    Flag,
    Ignored,
    Integer,
    Labels,
    LagLimit,
    MaxLag,
    Milliseconds,
    Number,
    Seconds,
    Section,
    Subclass,
    Word,
)

Model = Literal["threaded", "non-threaded"]
SslMode = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]
Target = Literal["any", "read-write", "read-only", "primary", "standby", "prefer-standby"]
Balance = Literal["round-robin", "least-connections", "random"]
Ping = Literal["auto", "always", "never"]
RowFactory = Literal["row", "tuple", "dict", "namedtuple"]
Reset = Literal["auto", "always", "never"]
Pooler = Literal["transaction"]
TenantType = Literal["uuid", "int", "text", "regex"]
Verify = Literal["error", "warn", "off"]
NotReplicated = Literal["error", "warn"]

HOUR, DAY, YEAR = 3600, 86_400, 31_536_000
CONNECTION_COUNT = 10
LIKELY = 600
"""Seconds longer than any caller would wait for a connection; see `Seconds`."""

NO_SERVICE: Mapping[str, str] = MappingProxyType({})

KEEPALIVES: dict[str, str | int] = {
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
"""These find a dead network when nothing else does; Linux by itself takes 15 minutes to 2 hours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointConfig:
    """One server: its address, its login, and the settings with which every session on it starts.

    A part that is None was left out: libpq finds its own default for it (``PG*`` variables, password file,
    service file). The password, the conninfo and the server settings never appear in the repr.
    """

    label: Annotated[
        str,
        Key(
            Label(),
            "Name of the server in `endpoints` of the groups, in logs and in the status. Two servers never "
            "have the same one.",
            default="``host:port``, with libpq's own if they are left out",
        ),
    ]
    host: Annotated[
        str | None,
        Key(Host(), "Host name, address, or directory of the Unix socket of one server.", libpq="host"),
    ] = None
    port: Annotated[int | None, Key(Integer(1, 65535), "Port of the server.", libpq="port")] = None
    dbname: Annotated[str | None, Key(Text(), "Database.", name="name", libpq="dbname")] = None
    user: Annotated[
        str | Callable[[], str] | None,
        Key(
            Provided(),
            "Role that logs in; a function without parameters is called for each new connection.",
            libpq="user",
        ),
    ] = None
    password: Annotated[
        str | Callable[[], str] | None,
        Key(
            ProvidedSecret(or_empty=True),
            "Password; a function without parameters is called for each new connection, and again if "
            "the server refuses the result. Better places for a fixed one are `pass_file`, ``${VARIABLE}`` "
            "and libpq's password file.",
            name="pass",
            libpq="password",
        ),
    ] = field(default=None, repr=False)
    pass_file: Annotated[
        str | None,
        Key(
            File(),
            "File with only the password, read again when it has changed; the newline at its end is dropped.",
        ),
    ] = None
    conninfo: Annotated[
        str | None,
        Key(
            Secret(),
            "URI (``postgresql://user@host:5432/dbname``) or keyword string in place of the parts, with any "
            "parameter of libpq. A part written beside it adds to it, and must not contradict it.",
        ),
    ] = field(default=None, repr=False)
    sslmode: Annotated[
        SslMode | None,
        Key(
            Word(get_args(SslMode), flags=("require", "disable")),
            "Use of TLS, in libpq's words. Only ``verify-full`` verifies the server's identity.",
            name="ssl",
            libpq="sslmode",
        ),
    ] = None
    sslrootcert: Annotated[
        str | None,
        Key(File(word="system"), "Certificates of the trusted authorities.", libpq="sslrootcert"),
    ] = None
    sslcert: Annotated[str | None, Key(File(), "Certificate of the client.", libpq="sslcert")] = None
    sslkey: Annotated[str | None, Key(File(), "Private key of the client.", libpq="sslkey")] = None
    sslcrl: Annotated[str | None, Key(File(), "Revoked certificates.", libpq="sslcrl")] = None
    connect_timeout: Annotated[
        float,
        Key(
            Seconds(HOUR, likely=LIKELY),
            "Longest time to open one connection, name resolution, TLS and login included.",
            default="``5`` s; ``10`` s with only one server",
            libpq="connect_timeout",
        ),
    ] = 5.0
    query_timeout: Annotated[
        int,
        Key(
            Milliseconds(zero="none"),
            "Longest time for one statement. PostgreSQL cancels it (``statement_timeout``); a server that "
            "does not answer at all is given up a little later.",
        ),
    ] = 5000
    session_tmp_buffer: Annotated[
        int | None,
        Key(Integer(1, 16_384, "MB"), "Memory of a session for temporary tables (``temp_buffers``)."),
    ] = None
    weight: Annotated[
        int,
        Key(Integer(1, 1000), "Share of a group's connections, in proportion to the other servers' weights."),
    ] = 1
    application_name: Annotated[
        str | None,
        Key(Text(), "Name in ``pg_stat_activity`` and the server's log.", libpq="application_name"),
    ] = None
    options: Annotated[
        Mapping[str, str],
        Key(ServerSettings(), "Server settings that every session starts with.", default="none"),
    ] = field(default_factory=lambda: MappingProxyType({}), repr=False, hash=False)
    pooler: Annotated[
        Pooler | None,
        Key(
            Word(get_args(Pooler)),
            "``transaction`` for a proxy, such as PgBouncer, that gives each transaction another session: "
            "then nothing depends on the session. `query_timeout` is bound for each transaction, `options` "
            "and `session_tmp_buffer` are refused, and ``PGOPTIONS`` is left out. PgBouncer in session mode "
            "needs it too, since it refuses ``options`` at start-up; a proxy that only forwards bytes does "
            "not.",
        ),
    ] = None
    patroni: Annotated[
        str | None,
        Key(
            Url(),
            "Patroni's REST API on the server's host, such as ``http://pg1:8008``. With it, blocks of groups "
            "that write wait within `timeout` while Patroni moves or restarts the primary.",
        ),
    ] = None
    keepalives: Annotated[
        bool | None, Key(Flag(digits=True), "Whether TCP keepalives are sent.", libpq="keepalives")
    ] = None
    keepalives_idle: Annotated[
        int | None,
        Key(
            Seconds(32_767, zero="the system's", whole=True),
            "Silence before the first keepalive.",
            default=f"``{KEEPALIVES['keepalives_idle']}`` s",
            libpq="keepalives_idle",
        ),
    ] = None
    keepalives_interval: Annotated[
        int | None,
        Key(
            Seconds(32_767, zero="the system's", whole=True),
            "Time between unanswered keepalives.",
            default=f"``{KEEPALIVES['keepalives_interval']}`` s",
            libpq="keepalives_interval",
        ),
    ] = None
    keepalives_count: Annotated[
        int | None,
        Key(
            Integer(0, 127, zero="the system's"),
            "Unanswered keepalives after which the connection is lost.",
            default=f"``{KEEPALIVES['keepalives_count']}``",
            libpq="keepalives_count",
        ),
    ] = None
    tcp_user_timeout: Annotated[
        int | None,
        Key(
            Milliseconds(zero="the system's"),
            "Time that data may stay unacknowledged before the connection is lost.",
            default=f"``{KEEPALIVES['tcp_user_timeout']}`` ms",
            libpq="tcp_user_timeout",
        ),
    ] = None

    def conninfo_params(self, service: Mapping[str, str] = NO_SERVICE) -> dict[str, str | int]:
        """Return libpq's parameters for `psycopg.conninfo.make_conninfo`, all but `options`.

        A service's own keepalives go before the defaults of this package.

        Parts left out are absent, so that libpq's own defaults hold for them; so are those that a
        function provides.
        """
        params: dict[str, str | int] = {**conninfo_parts(self.conninfo)} if self.conninfo else {}
        params.pop("options", None)
        params.setdefault("fallback_application_name", "pgdbpool")
        if not str(self.host or params.get("host") or "").startswith(("/", "@")):
            params = {key: value for key, value in KEEPALIVES.items() if key not in service} | params
        for setting in ENDPOINT_KEYS.values():
            value = getattr(self, setting.field)
            if setting.key.libpq and value is not None and not callable(value):
                # libpq takes integers only: true is 1, and a fraction of a second counts as a whole one.
                params[setting.key.libpq] = value if isinstance(value, str) else math.ceil(value)
        return params

    def server_options(self, query_timeout_ms: int | None = None, inherited: str | None = None) -> str:
        """Return libpq's `options`: the statement timeout, temporary buffers and settings of a session.

        Those of the conninfo, or else those `inherited` from a service, or else of ``PGOPTIONS``, come first:
        libpq would drop them otherwise. A transaction pooler takes none: give libpq the empty string too, or
        it sends ``PGOPTIONS``.
        """
        if self.pooler:
            return ""
        timeout = self.query_timeout if query_timeout_ms is None else query_timeout_ms
        settings = {"statement_timeout": str(timeout)}
        if self.session_tmp_buffer is not None:
            settings["temp_buffers"] = f"{self.session_tmp_buffer}MB"
        settings.update(self.options)
        own_options = conninfo_parts(self.conninfo).get("options") if self.conninfo else None
        inherited = inherited if own_options is None else own_options
        if inherited is None:
            inherited = os.environ.get("PGOPTIONS", "")
        own = (f"-c {name}={_escaped(value)}" for name, value in settings.items())
        return " ".join([inherited, *own]).strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantSetting:
    """One setting of a tenant as users write it; a `TenantConfig` holds one or several."""

    setting: Annotated[
        str,
        Key(
            TenantName(),
            "Setting that holds the tenant. Policies read it: "
            "``NULLIF(current_setting('app.current_tenant_id', true), '')``.",
            default="required, unless there are `settings`",
        ),
    ]
    type: Annotated[
        TenantType,
        Key(
            Word(get_args(TenantType)),
            "Type of its value; any other value is refused before anything is sent.",
        ),
    ] = "text"
    pattern: Annotated[
        str | None,
        Key(
            Pattern(),
            "Python regular expression that the whole value must match; only with ``type: regex``.",
            nullable=False,
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantConfig:
    """The tenant of blocks: setting names with the types and patterns of their values, in order."""

    settings: Annotated[
        Mapping[str, tuple[TenantType, str | None]],
        Key(
            Section("a non-empty mapping of setting names to types or to {type: ..., pattern: ...}"),
            "Several settings, in place of `setting`, `type` and `pattern`: "
            "``{app.tenant_id: uuid, app.region: {type: regex, pattern: '[a-z]{2}'}}``.",
            default="the one in `setting`",
        ),
    ] = field(hash=False)
    required: Annotated[
        bool, Key(Flag(), "Whether a block without a tenant is refused, before anything is sent.")
    ] = True
    verify: Annotated[
        Verify,
        Key(
            Word(get_args(Verify), flags=("error", "off")),
            "What happens at connect if the role bypasses row-level security (a superuser, "
            "``BYPASSRLS``), so that tenants would have no effect: ``error`` refuses it, ``warn`` logs it.",
        ),
    ] = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimit:
    """How often blocks of a group may begin, in each process."""

    per_second: Annotated[
        float,
        Key(Number(1_000_000), "Blocks that may begin in a second, in the long run.", default="required"),
    ]
    burst: Annotated[
        int,
        Key(
            Integer(1, 1_000_000),
            "Blocks that may begin at once after a quiet time.",
            default="`per_second`, rounded up",
        ),
    ]
    max_wait: Annotated[
        float,
        Key(
            Seconds(DAY, zero="refused at once"),
            "Longest wait for a block's turn; a longer one raises `RateLimitExceeded` at once.",
        ),
    ] = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupConfig:
    """One named pool: how many connections, to which servers, and how they are lent."""

    name: str
    connection_count: Annotated[
        int,
        Key(Integer(1, 10_000), "Maximum number of open connections of the group, over all its servers."),
    ] = CONNECTION_COUNT
    min_size: Annotated[
        int,
        Key(
            Integer(0, 10_000),
            "Connections that are kept open when idle; at most `connection_count`.",
            default="the same as `connection_count`",
        ),
    ]
    autocommit: Annotated[
        bool,
        Key(
            Flag(),
            "Whether each statement is a separate transaction; otherwise a block is one transaction, from "
            "its first statement to `commit()` or the block's end. A block can change it for itself: "
            "``db.connection.autocommit``.",
        ),
    ] = True
    endpoints: Annotated[
        tuple[str, ...], Key(Labels(), "Labels of the servers that the group uses.", default="all servers")
    ]
    target: Annotated[
        Target,
        Key(
            Word(get_args(Target)),
            "Which servers take the group's connections, by their current role.",
        ),
    ] = "any"
    max_lag: Annotated[
        MaxLag | None,
        Key(
            LagLimit(),
            "How far a standby may be behind the primary; one that is further behind gets no connection of "
            "the group until it has caught up to half of that. The primary must be among the servers. It is "
            "measured about twice a second, over one more connection to each server.",
            default="no limit",
            nullable=False,
        ),
    ] = None
    fresh_wait: Annotated[
        float,
        Key(
            Seconds(HOUR, zero="not at all"),
            "How long a read that must see a token (``read_your_writes``, ``after``) waits for a standby "
            "that has not replayed it. Then it goes to the primary, or raises `StaleReadError` if `target` "
            "does not admit that.",
        ),
    ] = 0.1
    balance: Annotated[
        Balance,
        Key(Word(get_args(Balance)), "How the next connection's server is chosen; each honours weights."),
    ] = "round-robin"
    timeout: Annotated[float, Key(Seconds(DAY, likely=LIKELY), "Longest wait for a connection.")] = 10.0
    max_waiting: Annotated[
        int,
        Key(
            Integer(0, 1_000_000, zero="no bound"),
            "Maximum number of threads that wait for a connection; one more is refused at once.",
        ),
    ] = 0
    reserved: Annotated[
        int,
        Key(
            Integer(0, 9999, zero="none"),
            "Connections that only ``Handler(name, priority='high')`` may take when no others are left; "
            "fewer than `connection_count`.",
        ),
    ] = 0
    rate_limit: Annotated[
        RateLimit | None,
        Key(
            Section("a mapping, or blocks per second"),
            "How often blocks may begin, in each process. Its keys are below; a number alone is short for "
            "``{per_second: number}``.",
            default="no limit",
            nullable=False,
        ),
    ] = None
    max_lifetime: Annotated[
        float,
        Key(Seconds(YEAR, zero="never"), "Age at which a connection is replaced, once it is not in use."),
    ] = 3600.0
    max_idle: Annotated[
        float,
        Key(
            Seconds(YEAR, zero="never"),
            "Idle time after which a connection above `min_size` is closed.",
        ),
    ] = 600.0
    max_uses: Annotated[
        int,
        Key(
            Integer(0, 1_000_000_000, zero="no bound"),
            "Blocks after which a connection is replaced.",
        ),
    ] = 0
    num_workers: Annotated[
        int, Key(Integer(1, 64), "Threads that open connections in the background; threaded model only.")
    ] = 1
    connect_timeout: Annotated[
        float | None,
        Key(
            Seconds(HOUR, likely=LIKELY),
            "Overrides the servers' ``connect_timeout``.",
            default="the server's",
        ),
    ] = None
    query_timeout: Annotated[
        int | None,
        Key(Milliseconds(zero="none"), "Overrides the servers' ``query_timeout``.", default="the server's"),
    ] = None
    ping: Annotated[
        Ping,
        Key(
            Word(get_args(Ping)),
            "When a checkout asks the server whether the connection lives, which takes a round trip: "
            "``auto`` after `ping_after`, ``always``, or ``never``. A closed socket is seen without asking.",
        ),
    ] = "auto"
    ping_after: Annotated[
        float,
        Key(Seconds(YEAR, zero="always"), "Idle time after which ``ping: auto`` asks."),
    ] = 30.0
    ping_timeout: Annotated[
        float,
        Key(
            Seconds(HOUR, likely=LIKELY),
            "Longest wait for the answer; after it a new connection shows whether the server is down.",
        ),
    ] = 2.0
    prepare_threshold: Annotated[
        int | None,
        Key(
            Integer(0, 1_000_000, zero="at the first"),
            "Executions of a statement after which it is prepared at the server; null is never. A number "
            "requires a ``pooler`` that supports prepared statements, as PgBouncer 1.21 and later "
            "(``max_prepared_statements``).",
            default="``5``; null if a server of the group has a ``pooler``",
        ),
    ] = 5
    row_factory: Annotated[
        RowFactory | Callable[..., Any],
        Key(
            Factory(get_args(RowFactory)),
            "Type of rows: ``row`` answers to index and column name; a name or a callable is a row factory "
            "of psycopg.",
        ),
    ] = "row"
    connection_class: Annotated[
        type[psycopg.Connection[Any]] | None,
        Key(
            Subclass(psycopg.Connection),
            "Class of the connections: its additions to psycopg's are available on ``db.connection``.",
            default="psycopg's",
        ),
    ] = None
    configure: Annotated[
        Callable[[Any], object] | None,
        Key(
            Factory(()),
            "Called with each new connection before it is lent, for example to register types. Attributes it "
            "sets on the connection hold in every block, except ``autocommit``. If it fails, the "
            "connection is closed and counts as one that could not be opened.",
        ),
    ] = None
    on_checkout: Annotated[
        Callable[[Any], object] | None,
        Key(
            Factory(()),
            "Called with the connection as a block gets it. If it fails, the block raises `HookError` and "
            "the connection is replaced.",
        ),
    ] = None
    on_checkin: Annotated[
        Callable[[Any], object] | None,
        Key(
            Factory(()),
            "Called with the connection as a block gives it back. If it fails, the connection is "
            "replaced, and the block does not notice.",
        ),
    ] = None
    on_discard: Annotated[
        Callable[[Any, str], object] | None,
        Key(
            Factory(()),
            "Called with a connection that is about to be closed, and the reason. A failure is logged.",
        ),
    ] = None
    on_failover: Annotated[
        Callable[[str, str], object] | None,
        Key(
            Factory(()),
            "Called with the labels of the old server and the new one when another server takes the group's "
            "writes; for the targets ``primary`` and ``read-write``. A failure is logged.",
        ),
    ] = None
    sqlprepare: Annotated[
        bool,
        Key(
            Flag(),
            'Whether ``"SQLPrepare"."PrepareQueries"()`` is called on every new connection; refused if a '
            "server has a ``pooler``.",
        ),
    ] = False
    tenant: Annotated[
        TenantConfig | None,
        Key(
            Section("a mapping, or the name of a setting, such as app.current_tenant_id"),
            "The tenant of blocks: a setting that row-level security reads, bound for each block. Its "
            "keys are below; a name alone is short for ``{setting: name}``.",
            default="none",
            nullable=False,
        ),
    ] = None
    settings: Annotated[
        Mapping[str, str],
        Key(
            ServerSettings(),
            "Server settings that are bound for each block, and end with it; the block's override them. "
            "``default_transaction_isolation``, ``default_transaction_read_only`` and "
            "``default_transaction_deferrable`` are part of each transaction's BEGIN.",
            default="none",
        ),
    ] = field(default_factory=lambda: MappingProxyType({}), repr=False, hash=False)
    reset: Annotated[
        Reset,
        Key(
            Word(get_args(Reset)),
            "When a session is cleaned, with the next borrower's first statement: ``auto`` if the last one "
            "may have changed it, ``always``, or ``never``.",
        ),
    ] = "auto"

    not_replicated: Annotated[
        NotReplicated,
        Key(
            Word(get_args(NotReplicated)),
            "Reaction to a commit that stopped waiting for its synchronous standby, and so is on the primary "
            "and perhaps nowhere else: ``error`` raises `NotReplicatedError`, ``warn`` logs it. It is always "
            "raised while the pools are being closed.",
        ),
    ] = "error"

    leak_after: Annotated[
        float | None,
        Key(
            Seconds(YEAR),
            "Time after which a block that still has its connection causes one warning, with its thread, the "
            "place where it was entered, and its last statement.",
            default="never",
        ),
    ] = None
    leak_stack: Annotated[
        bool,
        Key(
            Flag(),
            "Whether reports of a block include the whole stack of its entry, which takes some microseconds "
            "for each block.",
        ),
    ] = False
    max_hold: Annotated[
        float | None,
        Key(
            Seconds(YEAR),
            "Time after which a block loses its connection: its statement is cancelled, and raises "
            "`HoldExceededError`. In the non-threaded model the next checkout of the process checks this.",
            default="none",
        ),
    ] = None
    slow_block: Annotated[
        float | None,
        Key(
            Seconds(YEAR),
            "Duration from which a block is logged at its end as slow.",
            default="never",
        ),
    ] = None
    slow_query: Annotated[
        float | None,
        Key(
            Seconds(YEAR),
            "Duration from which a statement, or a COMMIT, is logged as slow, without its parameters.",
            default="never",
        ),
    ] = None
    annotate: Annotated[
        bool,
        Key(
            Flag(),
            "Whether the server sees the correlation id of each block, at the end of ``application_name``, "
            "bound for the transaction in the statement's own round trip.",
        ),
    ] = False

    @property
    def writes(self) -> bool:
        """Whether the group requires servers that take writes."""
        return self.target in ("primary", "read-write")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole configuration that passed every check."""

    type: Annotated[
        Model,
        Key(
            Word(get_args(Model), other=(("lock-free", "non-threaded"),)),
            "``threaded`` for servers that run requests in threads; ``non-threaded``, which takes no lock "
            "and starts no pool thread, for those that run one request at a time in a process.",
        ),
    ] = "threaded"
    endpoints: Annotated[
        tuple[EndpointConfig, ...],
        Key(
            Section("a mapping (one server) or a non-empty list of mappings"),
            "The servers; their keys are below.",
            name="db",
            default="required",
        ),
    ]
    groups: Annotated[
        Mapping[str, GroupConfig],
        Key(
            Section("a non-empty mapping of group names to mappings"),
            "The pools by name; their keys are below.",
            default="required",
        ),
    ] = field(hash=False)
    runtime_dir: Annotated[
        str | None,
        Key(
            Directory(),
            "Directory in which each process publishes its status about once a second, for the status page, "
            "``pgdbpool status`` and metrics: one for each application, owned by its user (mode 700). It is "
            "created if its parent exists.",
            default="nothing is published",
        ),
    ] = None
    processes: Annotated[
        int | None,
        Key(
            Integer(1, 100_000),
            "Number of processes that use this configuration, for example ``${WEB_CONCURRENCY}``. With it, "
            "``Connection.init`` warns if all of them together can open more than the servers admit.",
            default="not known",
        ),
    ] = None
    origin: str = "dict"


CONFIG_KEYS = settings_of(Config)
ENDPOINT_KEYS = settings_of(EndpointConfig)
GROUP_KEYS = settings_of(GroupConfig)
_IGNORED_KEY = Key(Ignored(), "Taken from version 1 and ignored, with a `DeprecationWarning`.")
_IGNORED = Setting("connection_retry_sleep", "connection_retry_sleep", _IGNORED_KEY, "not set", nullable=True)
DB_KEYS = {**ENDPOINT_KEYS, _IGNORED.name: _IGNORED}
RATE_KEYS = settings_of(RateLimit)
TENANT_KEYS = {**settings_of(TenantSetting), **settings_of(TenantConfig)}


def conninfo_parts(conninfo: str) -> dict[str, str]:
    """Return the parameters of a URI or keyword string; raises psycopg's error, which quotes it."""
    return {name: str(value) for name, value in conninfo_to_dict(conninfo).items() if value is not None}


def _escaped(value: str) -> str:
    """Return a value for libpq's `options`, if a backslash keeps white space from ending it."""
    return re.sub(r"([\s\\])", r"\\\1", value, flags=re.ASCII)

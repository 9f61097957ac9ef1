"""The names of the keys in other pools, drivers and servers, for a hint at the right key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .declarations import nearest, show


def _words(**keys: str) -> dict[str, str]:
    """Return the key by each of its words, its own included: in lower case and without separators."""
    found = {}
    for key, words in keys.items():
        name = key.removesuffix("_")
        found.update(dict.fromkeys([*words.split(), _plain(name)], name))
    return found


def _plain(word: str) -> str:
    return re.sub(r"[\W_]", "", word[:60].lower())


_OF_ALL = _words(
    db="databases database servers server endpoints hosts nodes master primary replica replicas slave slaves "
    "standby standbys connections dsn dsns url uri",
    groups="group pools pool",
    type="mode model threading threadingmodel threadmodel poolclass",
    processes="workers workercount numprocesses",
    runtime_dir="rundir statusdir statedir",
)
_OF_SERVERS = _words(
    host="hostname server address addr hostaddr servername master primary replica replicas slave standby",
    name="dbname database db databasename catalog",
    user="username login owner",
    pass_="password passwd pwd secret pgpassword",
    pass_file="passfile passwordfile",
    conninfo="dsn uri url jdbcurl databaseurl connectionstring connstring connstr connection conn",
    ssl="sslmode tls usessl sslenabled",
    sslrootcert="ca cafile sslca cacert rootcert tlscafile",
    sslcert="certfile clientcert tlscert",
    sslkey="keyfile clientkey tlskey",
    connect_timeout="connecttimeout connectiontimeout logintimeout dialtimeout",
    query_timeout="statementtimeout commandtimeout sockettimeout readtimeout querytimeoutms",
    session_tmp_buffer="tempbuffers tmpbuffer",
    application_name="appname applicationname application",
    options="searchpath schema charset clientencoding timezone serversettings parameters initsql "
    "connectioninitsql",
    pooler="pgbouncer poolmode",
    keepalives="keepalive tcpkeepalive",
)
_OF_GROUPS = _words(
    connection_count="maxsize size poolsize maxpoolsize maximumpoolsize maxconn maxconns maxconnections "
    "maxoverflow maxactive maxtotal maxopenconns connectionlimit poollimit connections poolmaxsize",
    min_size="minconn minconns minidle minimumidle minpoolsize minconnections minpool initialsize "
    "poolminsize maxidleconns",
    timeout="pooltimeout acquiretimeout checkouttimeout maxwait maxwaitmillis connectiontimeout waittimeout "
    "borrowtimeout gettimeout",
    connect_timeout="connecttimeout logintimeout",
    query_timeout="statementtimeout commandtimeout sockettimeout readtimeout",
    max_lifetime="poolrecycle recycle maxage maxconnlifetime connmaxlifetime connmaxage",
    max_idle="idletimeout maxidletime maxidleseconds maxconnidletime maxinactiveconnectionlifetime",
    max_uses="maxqueries maxusage maxrequests",
    max_waiting="maxqueue queuelimit waitqueuesize maxwaiters",
    ping="poolpreping preping testonborrow check healthcheck validate connectiontestquery validationquery",
    ping_after="healthcheckperiod keepalivetime validationtimeout pinginterval",
    row_factory="cursorclass cursorfactory rowclass",
    prepare_threshold="prepare preparedstatements preparethreshold statementcachesize",
    reset="resetonreturn poolresetonreturn resetquery serverresetquery",
    configure="onconnect setup init afterconnect",
    slow_query="echo logstatements logmindurationstatement slowthreshold slowquerythreshold",
    leak_after="leakdetectionthreshold removeabandonedtimeout",
    target="targetsessionattrs readonly role master primary replica replicas slave standby",
    balance="loadbalance loadbalancehosts strategy policy",
    max_lag="lag maxreplicationlag replicationlag maxreplicalag",
    endpoints="servers hosts host nodes db replicaset",
    autocommit="isolationlevel transaction",
    num_workers="workers numhelperthreads",
)
_PLACES = (("of a group", _OF_GROUPS), ("of a server in `db`", _OF_SERVERS), ("of the top level", _OF_ALL))


def hint(word: object, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" for an unknown key: by another pool's word for it, or by its letters."""
    if not isinstance(word, str):
        return ""
    keys = set(known)
    if own := synonym(word, keys):
        return f"; did you mean {show(own)}?"
    plain = _plain(word)
    elsewhere = (
        f"; did you mean {show(words[plain])} {place}?" for place, words in _PLACES if plain in words
    )
    return next(elsewhere, "") or nearest(word, keys)


def synonym(word: str, known: Iterable[str]) -> str:
    """Return the key that another pool or driver calls by this word; usually the empty string."""
    keys = set(known)
    key = dict(_PLACES).get(_fitting(keys), {}).get(_plain(word), "")
    return key if key in keys else ""


def _fitting(keys: set[str]) -> str:
    """Return the place to which these keys belong."""
    shares: Mapping[str, int] = {place: len(keys.intersection(words.values())) for place, words in _PLACES}
    place = max(shares, key=lambda name: shares[name])
    return place if shares[place] > 2 else ""

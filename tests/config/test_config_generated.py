"""A thousand configurations, one thing wrong in each: only `ConfigError`, and it names the key."""

from __future__ import annotations

import copy
import io
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from pgdbpool._config.load import load
from pgdbpool._config.model import DB_KEYS, GROUP_KEYS, RATE_KEYS, TENANT_KEYS
from pgdbpool.errors import ConfigError

SECRET = "pl4nted-s3cret"
EACH = 100

BASES: list[dict[str, Any]] = [
    {
        "db": {"host": "a", "name": "shop", "user": "web", "pass": SECRET},
        "groups": {"default": {"connection_count": 20, "autocommit": True}},
    },
    {
        "type": "non-threaded",
        "db": [
            {
                "label": "primary",
                "host": "10.0.0.1",
                "port": 5433,
                "pass": SECRET,
                "options": {"work_mem": "8MB"},
            },
            {"label": "standby", "conninfo": f"postgresql://web:{SECRET}@10.0.0.2/shop", "weight": 3},
        ],
        "groups": {
            "read": {"endpoints": ["standby", "primary"], "target": "prefer-standby", "min_size": 2},
            "write": {"endpoints": ["primary"], "target": "read-write", "timeout": "2s"},
        },
    },
    {
        "db": [
            {
                "host": "a",
                "pass": SECRET,
                "ssl": "require",
                "query_timeout": "2min",
                "session_tmp_buffer": 64,
            },
            {"host": "b", "pass": SECRET, "connect_timeout": 2.5, "application_name": "shop"},
            {"host": "c", "pass": SECRET, "keepalives_idle": 30},
        ],
        "groups": {
            "jobs": {
                "ping": "always",
                "max_lifetime": 600,
                "row_factory": "tuple",
                "rate_limit": {"per_second": 2.5, "burst": 10, "max_wait": "500ms"},
            }
        },
    },
    {
        "db": [
            {"label": "direct", "host": "a", "pass": SECRET},
            {"label": "pooled", "host": "b", "pass": SECRET, "pooler": "transaction"},
        ],
        "groups": {
            "shop": {
                "tenant": {"setting": "app.tenant_id", "type": "uuid", "verify": "warn"},
                "settings": {"work_mem": "8MB", "app.key": SECRET},
            },
            "region": {
                "tenant": {
                    "setting": "app.region",
                    "type": "regex",
                    "pattern": "[a-z]{2}",
                    "required": False,
                },
                "reset": "always",
                "not_replicated": "warn",
            },
        },
    },
]
ENVIRONMENTS: list[dict[str, str]] = [
    {"DATABASE_URL": f"postgresql://web:{SECRET}@a/shop"},
    {
        "DATABASE_URL": f"postgresql://web:{SECRET}@a:5433/shop?sslmode=prefer",
        "DATABASE_URL_READ": f"host=b user=web password={SECRET}",
        "PGDBPOOL_CONNECTION_COUNT": "5",
        "PGDBPOOL_READ_TARGET": "standby",
    },
    {
        "PGDBPOOL_GROUPS": "read,write",
        "DATABASE_URL": f"postgresql://web:{SECRET}@a/shop",
        "PGDBPOOL_TYPE": "lock-free",
        "PGDBPOOL_TIMEOUT": "2s",
        "PGDBPOOL_TENANT": "app.tenant_id",
        "PGDBPOOL_WRITE_SETTINGS": f"{{work_mem: 8MB, app.key: {SECRET}}}",
    },
]

# What each key takes, written down a second time: the declarations are what is tested here.
SERVER_KEYS = {
    **dict.fromkeys(
        ["label", "host", "name", "user", "pass", "conninfo", "application_name", "patroni"], "text"
    ),
    **dict.fromkeys(["pass_file", "sslrootcert", "sslcert", "sslkey", "sslcrl"], "file"),
    **dict.fromkeys(["port", "session_tmp_buffer", "weight", "keepalives_count"], "integer"),
    **dict.fromkeys(["connect_timeout", "keepalives_idle", "keepalives_interval"], "seconds"),
    **dict.fromkeys(["query_timeout", "tcp_user_timeout"], "milliseconds"),
    "ssl": "word",
    "pooler": "word",
    "options": "settings",
    "keepalives": "switch",
}
POOL_KEYS = {
    **dict.fromkeys(
        ["connection_count", "min_size", "max_waiting", "reserved", "num_workers", "prepare_threshold"],
        "integer",
    ),
    "max_uses": "integer",
    **dict.fromkeys(["configure", "on_checkout", "on_checkin", "on_discard"], "function"),
    **dict.fromkeys(["on_failover", "connection_class"], "function"),
    **dict.fromkeys(["timeout", "max_lifetime", "max_idle", "connect_timeout", "fresh_wait"], "seconds"),
    **dict.fromkeys(["ping_after", "ping_timeout", "leak_after", "max_hold"], "seconds"),
    **dict.fromkeys(["slow_block", "slow_query"], "seconds"),
    **dict.fromkeys(["autocommit", "sqlprepare", "leak_stack", "annotate"], "flag"),
    **dict.fromkeys(["target", "balance", "ping", "reset", "not_replicated", "row_factory"], "word"),
    "query_timeout": "milliseconds",
    "endpoints": "labels",
    "settings": "settings",
    "rate_limit": "rate",
    "tenant": "tenant",
    "max_lag": "lag",
}
LIMIT_KEYS = {"per_second": "number", "burst": "integer", "max_wait": "seconds"}
OWNER_KEYS = {
    **dict.fromkeys(["setting", "pattern"], "text"),
    **dict.fromkeys(["type", "verify"], "word"),
    "required": "flag",
    "settings": "types",
}
CONTAINERS: list[Any] = [[], {}, ["x"], {"x": 1}, [[]], [SECRET], {"pass": SECRET}]
WRONG_TYPES: dict[str, list[Any]] = {
    "text": CONTAINERS,
    "file": CONTAINERS,
    "integer": [*CONTAINERS, "5", "many", "", 1.5, True, False, "5s"],
    "seconds": [*CONTAINERS, "5", "soon", "", "5 s s", True, False, "5d"],
    "milliseconds": [*CONTAINERS, "5", "soon", "", 1.5, True, False, "0.5ms"],
    "word": [*CONTAINERS, 5, 1.5, "", "nonsense", "Any"],
    "flag": [*CONTAINERS, 0, 1, "", "true", 1.5],
    "switch": [*CONTAINERS, 2, "", "true", 1.5],
    "function": [*CONTAINERS, 5, "", "print", "builtins:nothing", "builtins:True", True],
    "labels": [5, "primary", True, {}, [], [5], [None], [["primary"]], {"pass": SECRET}],
    "settings": [5, "work_mem=1", True, [], {"a b": 1}, {"x": None}, {"x": [SECRET]}, {"": "x"}, {"x": {}}],
    "lag": [
        SECRET,
        [SECRET],
        {},
        {SECRET: 1},
        {"bytes": [SECRET]},
        {"bytes": "many"},
        {"seconds": -1},
        {"bytes": 0},
        True,
        5,
    ],
    "tenant": [
        *(
            5,
            1.5,
            True,
            None,
            "",
            "tenant",
            "app.",
            [],
            {},
            ["app.t"],
            {"setting": "tenant"},
            {"type": "uuid"},
        ),
        *({"setting": "app.t", "type": "regex"}, {"setting": "app.t", "pattern": "x"}, {"app.t": "uuid"}),
        *({"settings": {"app.t": 5}}, {"settings": {"app.t": "uuid", "APP.T": "uuid"}}, {"pass": SECRET}),
    ],
    "rate": [True, None, "", "fast", [], {}, [5], -1, float("nan"), {"burst": 5}, {"pass": SECRET}],
    "number": [*CONTAINERS, "5", "", True, False, "5s"],
    "types": [5, "app.t", True, None, [], {}, {"t": "uuid"}, {"app.t": "uid"}, {"app.t": [SECRET]}, {1: 2}],
}
# In a dict these are no text either; in YAML they are text as they stand.
NOT_TEXT: list[Any] = [5, 1.5, True, b"x", object(), ("x",), "a\0b", "\udce4"]
RANGES: dict[str, list[Any]] = {
    "port": [0, -1, 65536, 10**400],
    "session_tmp_buffer": [0, -1, 16385],
    "weight": [0, -1, 1001],
    "keepalives_count": [-1, 128],
    "keepalives_idle": [-1, 32768, "10h", 0.5],
    "query_timeout": [-1, 2**31, "999h", -(10**30)],
    "tcp_user_timeout": [-1, 2**31],
    "connect_timeout": [0, -1, 3601, "2h", float("nan"), float("inf"), "0s"],
    "connection_count": [0, -1, 10_001, 10**400],
    "min_size": [-1, 10_001],
    "max_waiting": [-1, 10**9],
    "reserved": [-1, 10_000],
    "per_second": [0, -0.1, 10**7, float("nan"), float("inf"), 10**400],
    "burst": [0, -1, 10**7],
    "max_wait": [-1, 86_401, "25h"],
    "num_workers": [0, 65],
    "prepare_threshold": [-1, 10**9],
    "timeout": [0, -0.1, 86_401, "25h", float("-inf")],
    "max_lifetime": [-1, 10**9],
    "max_idle": [-1, 10**400],
    "ping_after": [-1, float("nan")],
    "ping_timeout": [0, 3601, "0ms"],
    "setting": ["tenant", "app.", f"{'a' * 64}.t", "app.1", "app.té", "app.a b", "app.x\n"],
    "pattern": ["(", "[z-a]", "x{2}{3}{", "(?P<a>x)(?P<a>y)", "*"],
}


@dataclass
class Wrong:
    """A source with one thing wrong, and what the message must name."""

    source: Any
    name: str
    environ: dict[str, str] = field(default_factory=dict)


def entries(tree: dict[str, Any]) -> list[tuple[str, dict[str, Any], Mapping[str, str]]]:
    """Return path, mapping and keys of each server, group and tenant."""
    db = tree["db"]
    servers = (
        {"db": db} if isinstance(db, dict) else {f"db[{index}]": server for index, server in enumerate(db)}
    )
    found: list[tuple[str, dict[str, Any], Mapping[str, str]]] = []
    found += [(path, server, SERVER_KEYS) for path, server in servers.items()]
    for name, group in tree["groups"].items():
        found.append((f"groups.{name}", group, POOL_KEYS))
        if "tenant" in group:
            found.append((f"groups.{name}.tenant", group["tenant"], OWNER_KEYS))
        if "rate_limit" in group:
            found.append((f"groups.{name}.rate_limit", group["rate_limit"], LIMIT_KEYS))
    return found


def carried(rng: random.Random, tree: dict[str, Any]) -> Any:
    """Return the tree as a dict, or as YAML where YAML can say it."""
    if rng.random() < 0.5:
        return tree
    try:
        text = yaml.safe_dump(tree, sort_keys=rng.random() < 0.5, default_flow_style=rng.random() < 0.3)
    except (yaml.YAMLError, ValueError):
        return tree
    return io.StringIO(text)


def wrong_type(rng: random.Random, tree: dict[str, Any]) -> Wrong:
    path, entry, keys = rng.choice(entries(tree))
    key = rng.choice(list(keys))
    if keys[key] in ("text", "file") and rng.random() < 0.5:
        entry[key] = rng.choice(NOT_TEXT)
        return Wrong(tree, f"{path}.{key}")
    entry[key] = rng.choice(WRONG_TYPES[keys[key]])
    return Wrong(carried(rng, tree), f"{path}.{key}")


def out_of_range(rng: random.Random, tree: dict[str, Any]) -> Wrong:
    path, entry, keys = rng.choice(entries(tree))
    key = rng.choice([key for key in keys if key in RANGES])
    entry[key] = rng.choice(RANGES[key])
    return Wrong(carried(rng, tree), f"{path}.{key}")


def unknown_key(rng: random.Random, tree: dict[str, Any]) -> Wrong:
    path, entry, keys = rng.choice([*entries(tree), ("", tree, dict.fromkeys(["type", "db", "groups"], ""))])
    name = misspelt(rng, rng.choice(list(keys)), {*keys, "connection_retry_sleep"})
    entry[name] = rng.choice([SECRET, 5, None, [SECRET], {"x": SECRET}])
    return Wrong(carried(rng, tree), f"{path}.{name}".removeprefix("."))


def misspelt(rng: random.Random, word: str, known: set[str]) -> str:
    """Return a word with one letter too many, too few, or another one."""
    place = rng.randrange(len(word))
    letter = rng.choice("abcdefghijklmnopqrstuvwxyz")
    wrong = rng.choice(
        [
            word[:place] + letter + word[place:],
            word[:place] + word[place + 1 :],
            word[:place] + letter + word[place + 1 :],
        ]
    )
    return wrong if wrong and wrong not in known and not wrong.startswith("_") else word + "x"


def missing_part(rng: random.Random, tree: dict[str, Any]) -> Wrong:
    key = rng.choice(["db", "groups"])
    fault = rng.choice(["absent", "empty", "null", "scalar", "entry"])
    if fault == "absent":
        del tree[key]
    elif fault == "entry":
        # A group may be null, which is a group without keys; a server may not.
        tree[key] = [rng.choice([None, 5, "x"])] if key == "db" else {"g": rng.choice([5, "x", [], True])}
        return Wrong(carried(rng, tree), "db[0]" if key == "db" else "groups.g")
    else:
        tree[key] = {"empty": [], "null": None, "scalar": rng.choice([5, "x", True])}[fault]
    return Wrong(carried(rng, tree), key)


def contradiction(rng: random.Random, tree: dict[str, Any]) -> Wrong:
    """Things that are right each for itself."""
    path, entry, keys = rng.choice(entries(tree))
    if keys is OWNER_KEYS:
        changes: list[tuple[dict[str, Any], str]] = [
            ({"settings": {"app.t": "uuid"}}, "setting"),
            ({"type": "int", "pattern": "x"}, "pattern"),
        ]
    elif keys is LIMIT_KEYS:
        entry.pop("per_second", None)
        changes = [({"burst": 5}, "rate_limit")]
        path, _, _ = path.rpartition(".")
    elif keys is POOL_KEYS:
        servers = tree["db"] if isinstance(tree["db"], list) else [tree["db"]]
        servers[-1].update(label="last", pooler="transaction")
        for unpooled in ("options", "session_tmp_buffer"):
            servers[-1].pop(unpooled, None)
        changes = [
            ({"connection_count": 3, "min_size": 4}, "min_size"),
            ({"connection_count": 3, "min_size": 1, "reserved": 3}, "reserved"),
            ({"endpoints": ["nowhere"]}, "endpoints[0]"),
            ({"endpoints": ["last"], "sqlprepare": True}, "sqlprepare"),
            ({"settings": {"statement_timeout": 5}, "query_timeout": 5}, "settings.statement_timeout"),
            ({"settings": {"App.T": SECRET}, "tenant": "app.t"}, "settings['App.T']"),
            ({"settings": {"APP.X": SECRET, "app.x": SECRET}}, "settings['app.x']"),
        ]
    else:
        entry.pop("label", None)
        entry.pop("options", None)
        uri = f"postgresql://web:{SECRET}@h:5432/shop?sslmode=require"
        fresh = {
            "conninfo": uri,
            "host": "h",
            "port": 5432,
            "pass": SECRET,
            "ssl": "require",
            "label": "only",
        }
        changes = [
            ({**fresh, "host": "k"}, "host"),
            ({**fresh, "port": 5433}, "port"),
            ({**fresh, "pass": "other"}, "pass"),
            ({**fresh, "ssl": "disable"}, "ssl"),
            ({**fresh, "user": "wob"}, "user"),
            ({**fresh, "pass_file": __file__}, "pass_file"),
            ({**fresh, "options": {"statement_timeout": 5}}, "options.statement_timeout"),
            ({"conninfo": f"host=a,b password={SECRET}", "label": "only"}, "conninfo"),
            ({"conninfo": f"{uri}&pool_size=5", "label": "only"}, "conninfo"),
            ({"conninfo": f"mysql://web:{SECRET}@h", "label": "only"}, "conninfo"),
            ({**fresh, "pooler": "transaction", "options": {"app.key": SECRET}}, "options"),
            ({**fresh, "pooler": "transaction", "session_tmp_buffer": 8}, "session_tmp_buffer"),
            ({"pooler": "transaction", "conninfo": f"host=h options='-c x.y={SECRET}'"}, "conninfo"),
        ]
        entry.clear()
    change, key = rng.choice(changes)
    entry.update(change)
    return Wrong(carried(rng, tree), f"{path}.{key}")


def wrong_name(rng: random.Random, tree: dict[str, Any]) -> Wrong:
    """Keys that are no names, and labels and groups that cannot be told apart or printed."""
    key = rng.choice([1, None, True, 1.5, "", "a\nb", ("a", "b"), 10**30])
    shown = "a list" if isinstance(key, tuple) else repr(key)
    path, entry, keys = rng.choice([*entries(tree), ("groups", tree["groups"], {})])
    if keys is SERVER_KEYS and rng.random() < 0.5 and path != "db":
        other = rng.choice([server for server in tree["db"] if server is not entry])
        entry["label"] = other["label"] = "same"
        tree["groups"] = {"g": {}}
        return Wrong(carried(rng, tree), "'same'")
    entry[key] = {} if path == "groups" else SECRET
    return Wrong(tree if isinstance(key, tuple) else carried(rng, tree), f"{path}[{shown}]")


def bad_yaml(rng: random.Random, tree: dict[str, Any]) -> Wrong:
    """A good text with one line made bad; the message names the file and a line."""
    lines = yaml.safe_dump(tree, default_flow_style=False).splitlines()
    place = rng.choice([index for index, line in enumerate(lines) if re.fullmatch(r"[ -]*\w+: \S+", line)])
    key = lines[place].partition(":")[0]
    broken = [
        f"{key}: '{SECRET}",
        f'{key}: "{SECRET}',
        f"{key}: [{SECRET}",
        f"{key}: {{{SECRET}: {SECRET}",
        f"{key}: *{SECRET}",
        f"{key}: !{SECRET} x",
        f"{key}: !!int {SECRET}",
        f"{key}: !!binary {SECRET}",
        f"{key}: !!python/name:os.{SECRET}",
        f"{key}: @{SECRET}",
        f"{key}: `{SECRET}`",
        f"{key}: %{SECRET}",
        f"{key}: {SECRET}: {SECRET}",
        f"{key}: a\x00b",
        f"{key}: a\x07b",
        f"{key}\t: {SECRET}\n\t- x",
        f"{key.replace('-', ' ')}: x\n{lines[place].replace('-', ' ')}",
        f"{key}: '\\' {SECRET}'",
        f"{key}: |9x\n{SECRET}",
    ]
    text = "\n".join([*lines[:place], rng.choice(broken), *lines[place + 1 :]])
    return Wrong(io.StringIO(text), "stream, line ")


def unset_variable(rng: random.Random, tree: dict[str, Any]) -> Wrong:
    path, entry, keys = rng.choice(entries(tree))
    key = rng.choice([key for key in keys if keys[key] not in ("labels", "settings", "types")])
    variable = f"UNSET_{rng.randrange(1000)}"
    entry[key] = rng.choice([f"${{{variable}}}", f"x${{{variable}}}y", f"${{EMPTY:-}}${{{variable}}}"])
    wrong = Wrong(io.StringIO(yaml.safe_dump(tree)), f"{path}.{key}: the variable {variable} is not set")
    wrong.environ.update({"EMPTY": "", "PASS": SECRET})
    return wrong


def bad_variable(rng: random.Random, _: dict[str, Any]) -> Wrong:
    """A variable of the environment with a value that its key does not take."""
    environ = dict(rng.choice(ENVIRONMENTS))
    names = environ.get("PGDBPOOL_GROUPS", "default,read" if len(environ) > 1 else "default").upper()
    group = rng.choice(["", *(f"{name}_" for name in names.split(","))])
    key = rng.choice([key for key in POOL_KEYS if key != "endpoints"])
    variable = f"PGDBPOOL_{group}{key.upper()}"
    environ[variable] = rng.choice(
        ["nonsense", "[1]", "-1", "-1.5", "5 d", ".nan", "1e999", "{", "\udce4", "0x10"]
    )
    if rng.random() < 0.2:
        variable = "PGDBPOOL_TYPE"
        environ[variable] = rng.choice(["thread", "null", "5", "true"])
    return Wrong(None, variable, environ)


def bad_environment(rng: random.Random, _: dict[str, Any]) -> Wrong:
    """An unknown variable, a server that is none, a group that is none, a file that is none."""
    environ = dict(rng.choice(ENVIRONMENTS))
    url = rng.choice([name for name in environ if name.startswith("DATABASE_URL")])
    bad_urls = [
        f"mysql://web:{SECRET}@a/shop",
        f"postgresql://web:{SECRET}@a:99999/shop",
        f"postgresql://web:{SECRET}@a,b/shop",
        f"postgresql://web:{SECRET}@a/shop?sslmode=on",
        f"postgresql://web:{SECRET}@a/shop?pool={SECRET}",
        f"postgresql://web:%zz{SECRET}@a/shop",
        f"host=a password='{SECRET}",
        f"host=a pass={SECRET}",
        SECRET,
    ]
    known = {f"PGDBPOOL_{key.upper()}" for key in GROUP_KEYS}
    misnamed = "PGDBPOOL_" + misspelt(rng, rng.choice(list(POOL_KEYS)), set(POOL_KEYS)).upper()
    variable, value = rng.choice(
        [
            (url, rng.choice(bad_urls)),
            (misnamed if misnamed not in known else "PGDBPOOL_XYZ", SECRET),
            ("PGDBPOOL_ENDPOINTS", "a"),
            ("PGDBPOOL_NOWHERE_TIMEOUT", "5"),
            ("PGDBPOOL_GROUPS", rng.choice(["a b", "read,,write", ",", "é"])),
            ("PGDBPOOL_CONFIG", rng.choice(["/no/such/file.yaml", "/", f"postgresql://u:{SECRET}@h"])),
        ]
    )
    environ[variable] = value
    return Wrong(None, variable, environ)


FAULTS: list[Callable[[random.Random, dict[str, Any]], Wrong]] = [
    wrong_type,
    out_of_range,
    unknown_key,
    missing_part,
    contradiction,
    wrong_name,
    bad_yaml,
    unset_variable,
    bad_variable,
    bad_environment,
]


@pytest.fixture(autouse=True)
def plain_libpq(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PGHOST", "PGPORT", "PGSERVICE"):
        monkeypatch.delenv(name, raising=False)


def test_the_configurations_to_be_broken_are_valid() -> None:
    for tree in BASES:
        as_dict = load(copy.deepcopy(tree))
        as_yaml = load(io.StringIO(yaml.safe_dump(tree)), {})
        assert as_dict.endpoints == as_yaml.endpoints
        assert as_dict.groups == as_yaml.groups
        assert SECRET not in repr(as_dict) + repr(as_yaml)
    for environ in ENVIRONMENTS:
        assert SECRET not in repr(load(None, environ))


def test_every_key_can_be_made_wrong_here() -> None:
    assert SERVER_KEYS.keys() == DB_KEYS.keys() - {"connection_retry_sleep"}
    assert POOL_KEYS.keys() == GROUP_KEYS.keys()
    assert OWNER_KEYS.keys() == TENANT_KEYS.keys()
    assert LIMIT_KEYS.keys() == RATE_KEYS.keys()
    assert len(FAULTS) * EACH == 1000


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_one_wrong_thing_is_one_error_that_names_it(fault: Callable[..., Wrong]) -> None:
    for seed in range(EACH):
        rng = random.Random(seed)
        wrong = fault(rng, copy.deepcopy(rng.choice(BASES)))
        about = f"seed {seed}: {wrong}" + (
            wrong.source.getvalue() if isinstance(wrong.source, io.StringIO) else ""
        )
        with pytest.raises(ConfigError) as caught:
            load(wrong.source, wrong.environ)
        error = caught.value
        assert wrong.name in str(error), f"{about}\n{error}"
        assert len(str(error).splitlines()) == 1 + len(error.problems), about
        assert SECRET not in f"{error} {error!r} {error.args!r} {error.problems!r}", about
        assert error.__context__ is None, about

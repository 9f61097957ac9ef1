"""The JSON Schema says of a configuration what loading it says, and the reference has every key."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from samples import ALL, name

from pgdbpool import ConfigError
from pgdbpool._cli.main import main
from pgdbpool._config.json_schema import PUBLISHED, reference, schema
from pgdbpool._config.load import load

ROOT = Path(__file__).parents[2]
VALIDATOR = jsonschema.Draft7Validator(schema())

GROUPS: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"connection_count": 5}, True),
    ({"connection_count": 0}, False),
    ({"connection_count": "5"}, False),
    ({"connection_count": True}, False),
    ({"conection_count": 5}, False),
    ({"timeout": 2.5}, True),
    ({"timeout": "500ms"}, True),
    ({"timeout": "5 days"}, False),
    ({"timeout": 0}, False),
    ({"max_idle": 0}, True),
    ({"query_timeout": "30s"}, True),
    ({"query_timeout": None}, True),
    ({"query_timeout": 1.5}, False),
    ({"autocommit": False}, True),
    ({"autocommit": "no"}, False),
    ({"target": "read-write"}, True),
    ({"target": "master"}, False),
    ({"endpoints": ["a"]}, True),
    ({"endpoints": []}, False),
    ({"endpoints": "a"}, False),
    ({"max_lag": {"bytes": "16MB", "seconds": 10}}, True),
    ({"max_lag": {}}, False),
    ({"max_lag": {"byte": 1}}, False),
    ({"max_lag": None}, False),
    ({"prepare_threshold": None}, True),
    ({"rate_limit": 10}, True),
    ({"rate_limit": {"per_second": 10, "burst": 3}}, True),
    ({"rate_limit": {"burst": 3}}, False),
    ({"rate_limit": 0}, False),
    ({"row_factory": "dict"}, True),
    ({"row_factory": "psycopg.rows:dict_row"}, True),
    ({"row_factory": "dictionary"}, False),
    ({"settings": {"work_mem": "64MB", "jit": False, "a.b": 1}}, True),
    ({"settings": {"work mem": "64MB"}}, False),
    ({"settings": {"work_mem": None}}, False),
    ({"tenant": "app.tenant_id"}, True),
    ({"tenant": "tenant_id"}, False),
    ({"tenant": {"setting": "app.t", "type": "uuid", "required": False, "verify": "warn"}}, True),
    ({"tenant": {"setting": "app.t", "verify": True}}, True),
    ({"tenant": {"type": "uuid"}}, False),
    ({"tenant": {"settings": {"app.a": "uuid", "app.b": {"type": "regex", "pattern": "x"}}}}, True),
    ({"tenant": {"settings": {"app.a": "guid"}}}, False),
    ({"tenant": {"settings": {}}}, False),
]
SERVERS: list[tuple[Any, bool]] = [
    ({"host": "a"}, True),
    ({"host": "a,b"}, False),
    ({"host": "a", "port": 5432}, True),
    ({"host": "a", "port": 0}, False),
    ({"host": "a", "port": None}, True),
    ({"host": "a", "prot": 1}, False),
    ({"host": "a", "ssl": True}, True),
    ({"host": "a", "ssl": "verify"}, False),
    ({"host": "a", "keepalives": 1}, True),
    ({"host": "a", "keepalives": 2}, False),
    ({"host": "a", "pass": ""}, True),
    ({"host": "a", "pass": 5}, False),
    ({"host": "a", "pooler": "transaction"}, True),
    ({"host": "a", "pooler": "session"}, False),
    ({"host": "a", "keepalives_idle": 1.5}, False),
    ({"host": "a", "connection_retry_sleep": 1}, True),
    ([{"host": "a"}, {"host": "b"}], True),
    ([], False),
    ("a", False),
    (None, False),
]
TREES: list[tuple[Any, bool]] = [
    ({"db": {"host": "a"}}, False),
    ({"groups": {"g": {}}}, False),
    ({"db": {"host": "a"}, "groups": {}}, False),
    ({"db": {"host": "a"}, "groups": {"g": None}}, True),
    ({"db": {"host": "a"}, "groups": {"g": {}}, "type": "lock-free", "processes": 4}, True),
    ({"db": {"host": "a"}, "groups": {"g": {}}, "type": "threads"}, False),
    ({"db": {"host": "a"}, "groups": {"g": {}}, "processes": 0}, False),
    ({"db": {"host": "a"}, "groups": {"g": {}}, "pool": {}}, False),
]
CASES = [
    *(({"db": {"host": "a", "label": "a"}, "groups": {"g": group}}, good) for group, good in GROUPS),
    *(({"db": server, "groups": {"g": {}}}, good) for server, good in SERVERS),
    *TREES,
]


def test_the_schema_is_one() -> None:
    jsonschema.Draft7Validator.check_schema(schema())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("tree", "good"), CASES, ids=lambda value: json.dumps(value)[:80])
def test_the_schema_and_loading_agree(tree: Any, good: bool) -> None:
    assert VALIDATOR.is_valid(tree) is good
    if good:
        load(tree)
    else:
        with pytest.raises(ConfigError):
            load(tree)


@pytest.mark.parametrize("sample", [s for s in ALL if s.marks == "check"], ids=name)
def test_the_samples_of_the_documentation_pass(sample: Any) -> None:
    errors = [error.message for error in VALIDATOR.iter_errors(yaml.safe_load(io.StringIO(sample.text)))]
    assert not errors


def test_variables_stand_for_any_scalar() -> None:
    group: dict[str, Any] = {
        "connection_count": "${COUNT:-5}",
        "autocommit": "${AUTO}",
        "timeout": "${T}",
        "target": "${X}",
    }
    group |= {"max_lag": {"bytes": "${B}"}, "settings": {"work_mem": "${M}"}, "rate_limit": "${R}"}
    group |= {"tenant": {"setting": "app.t", "type": "${TYPE}"}}
    tree = {"db": {"host": "${HOST}", "port": "${PORT}"}, "groups": {"g": group}, "processes": "${N}"}
    assert VALIDATOR.is_valid(tree)


@pytest.mark.slow
def test_the_published_schema_is_in_step() -> None:
    assert json.loads(PUBLISHED.read_text(encoding="utf-8")) == schema(), "run python doc/generate_config.py"
    done = subprocess.run(
        [sys.executable, ROOT / "doc" / "generate_config.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_key_has_a_schema_and_a_description() -> None:
    tree = schema()
    for properties in (
        tree["properties"],
        *(part.get("properties", {}) for part in tree["definitions"].values()),
    ):
        for key, each in properties.items():
            assert each["description"]
            assert len(each) > 1 or key == "connection_retry_sleep", f"{key} has no schema: see `Kind.schema`"


def test_the_reference_has_the_keys_of_the_page() -> None:
    page = (ROOT / "doc" / "configuration-reference.rst").read_text(encoding="utf-8")
    assert [entry.key for entry in reference()] == re.findall(r"^\.\. confval:: (\S+)", page, re.MULTILINE)


# The commands


def test_config_schema_prints_the_published_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config-schema"]) == 0
    assert capsys.readouterr().out == PUBLISHED.read_text(encoding="utf-8")
    assert main(["config-schema", "--path"]) == 0
    assert Path(capsys.readouterr().out.strip()) == PUBLISHED
    assert main(["config-schema", "--path", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(PUBLISHED)}


def test_config_docs_explains_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config-docs", "groups.max_lag"]) == 0
    said = capsys.readouterr().out
    assert "How far a standby may be behind" in said
    assert "groups.target" not in said
    assert main(["config-docs"]) == 0
    said = capsys.readouterr().out
    assert all(f"{entry.key}\n" in said for entry in reference())
    assert "``" not in said
    assert main(["config-docs", "timeout", "--json"]) == 0
    keys = {entry["key"] for entry in json.loads(capsys.readouterr().out)}
    assert {"groups.timeout", "db.connect_timeout"} <= keys
    assert all("timeout" in key for key in keys)


def test_config_docs_of_an_unknown_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config-docs", "max_lga"]) == 1
    assert "did you mean 'max_lag'" in capsys.readouterr().err

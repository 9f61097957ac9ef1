"""What a `Row` is: a tuple that answers to the names of its columns."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import psycopg
import pytest

from pgdbpool import Row
from pgdbpool._session.rows import row as row_factory


@pytest.fixture
def ask(known_cluster: Any) -> Any:
    """A function that returns the first row of a query, as psycopg itself makes it."""
    with psycopg.connect(known_cluster.primary.conninfo(), row_factory=row_factory) as conn:
        yield lambda query: conn.execute(query).fetchone()


def test_a_value_answers_to_index_name_and_attribute(ask: Any) -> None:
    row = ask("SELECT 1 AS id, 'pen' AS name, 2.5 AS price")
    assert (row[0], row["id"], row.id) == (1, 1, 1)
    assert (row[-2], row["name"], row.name) == ("pen", "pen", "pen")
    assert row[0:2] == (1, "pen")
    assert row[:] == (*row,) == tuple(row)
    number, name, _ = row
    assert (number, name, len(row)) == (1, "pen", 3)


def test_an_unknown_name_is_reported_with_the_known_ones(ask: Any) -> None:
    row = ask("SELECT 1 AS id, 'pen' AS name")
    with pytest.raises(KeyError, match="no column 'nmae'; the columns are id, name"):
        row["nmae"]
    for index in (2, -3, 10**30):
        with pytest.raises(IndexError):
            row[index]
    with pytest.raises(TypeError):
        row[None]
    with pytest.raises(AttributeError, match=r"'Row\(id, name\)' object has no attribute 'nmae'"):
        row.nmae  # noqa: B018
    assert (row.get("name"), row.get("nmae"), row.get("nmae", 3)) == ("pen", None, 3)


def test_it_is_a_mapping_on_request(ask: Any) -> None:
    row = ask("SELECT 1 AS id, 'pen' AS name")
    assert dict(row) == {"id": 1, "name": "pen"} == dict(row.items())
    assert row.keys() == ("id", "name")
    assert row.values() == (1, "pen")
    assert type(row.values()) is tuple
    assert {**row} == dict(row)
    assert "id" in row
    assert "pen" not in row
    assert ["id"] not in row


def test_it_is_equal_to_a_tuple_and_hashed_and_ordered_as_one(ask: Any) -> None:
    row = ask("SELECT 1 AS id, 'pen' AS name")
    assert row == (1, "pen")
    assert row != (1, "ink")
    assert hash(row) == hash((1, "pen"))
    assert row < (2, "")
    assert row == ask("SELECT 1 AS other, 'pen' AS names")
    assert repr(row) == "<Row id=1 name='pen'>"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_it_survives_pickle_and_copy(ask: Any, protocol: int) -> None:
    row = ask("SELECT 1 AS id, ARRAY[1, 2] AS list")
    for other in (pickle.loads(pickle.dumps(row, protocol)), copy.copy(row), copy.deepcopy(row)):
        assert type(other) is type(row)
        assert (other, other["list"], other.list) == (row, [1, 2], [1, 2])
    assert copy.deepcopy(row).list is not row.list


def test_of_columns_with_one_name_the_last_answers_to_it(ask: Any) -> None:
    row = ask("SELECT 1 AS n, 2 AS m, 3 AS n")
    assert (row["n"], row.n, row.get("n"), row[0]) == (3, 3, 3, 1)
    assert row.keys() == ("n", "m", "n")
    assert dict(row) == {"n": 3, "m": 2} == dict(row.items())
    assert pickle.loads(pickle.dumps(row)).keys() == row.keys()


def test_a_column_takes_no_method_away(ask: Any) -> None:
    names = ("keys", "count", "_0", "__class__", "a b", "class", "0")
    row = ask("SELECT " + ", ".join(f'{i} AS "{name}"' for i, name in enumerate(names, 1)))
    assert row.keys() == names
    assert row.count(2) == 1
    assert [row[name] for name in row.keys()] == [1, 2, 3, 4, 5, 6, 7]  # noqa: SIM118
    assert dict(row)["keys"] == 1
    assert isinstance(row, Row)
    assert pickle.loads(pickle.dumps(row)) == row


def test_a_row_may_have_no_column_or_the_most_that_postgresql_has(ask: Any) -> None:
    empty = ask("SELECT")
    assert (tuple(empty), dict(empty), len(empty)) == ((), {}, 0)
    wide = ask("SELECT " + ", ".join(f"{i} AS c{i}" for i in range(1664)))
    assert (wide["c1663"], wide.c1663, wide[1663], wide[-1]) == (1663,) * 4

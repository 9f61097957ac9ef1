"""`classify` has a category for each error: by the package's own class, by SQLSTATE, by psycopg's class."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

import pgdbpool
from pgdbpool import Category, classify, errors

C = Category

# For each category, errors that the server, psycopg or the package raises.
EXAMPLES: dict[Category, list[str | type[BaseException]]] = {
    C.CONNECTION_LOST: [
        "08006", "08P01", "57P01", "57P02", "57P04", "57P05", "40003",
        psycopg.OperationalError, pgdbpool.ConnectionLostError, pgdbpool.NotCleanError, ConnectionResetError,
    ],
    C.UNAVAILABLE: ["57P03", "57000", pgdbpool.DBOfflineError, pgdbpool.TargetUnavailableError],
    C.RETRYABLE: ["40001", "40P01", "40000"],
    C.READ_ONLY: ["25006"],
    C.TIMEOUT: [
        "57014", "55P03", "25P03", "25P04",
        pgdbpool.QueryDeadlineError, pgdbpool.DeadlineExceeded,
        psycopg.errors.ConnectionTimeout, TimeoutError,
    ],
    C.RESOURCE: [
        "53300", "53100", "53200", "54001",
        pgdbpool.PoolTimeout, pgdbpool.PoolExhausted, pgdbpool.TooManyWaiting, pgdbpool.RateLimitExceeded,
    ],
    C.CONSTRAINT: ["23505", "23503", "23514", "23502", "23P01", "44000", "40002", psycopg.IntegrityError],
    C.DATA: ["22012", "22P02", "22003", "21000", psycopg.DataError],
    C.PERMISSION: [
        "42501", "28P01", "28000", "0P000",
        pgdbpool.TenantRequiredError, pgdbpool.TenantConflictError, pgdbpool.UnsafeRoleError,
    ],
    C.SYNTAX: ["42601", "42P01", "42703", "42883", "0A000", "3D000", "3F000"],
    C.STATE: ["25P02", "25001", "24000", "34000", "55006", "26000", pgdbpool.TransactionAbortedError],
    C.RAISED: ["P0001", "P0002", "38000", "2F005", "ZZ123"],
    C.SERVER: ["XX000", "XX001", "58030", "F0000", "HV000"],
    C.USAGE: [
        pgdbpool.ConfigError, pgdbpool.NotInitializedError, pgdbpool.UnconfiguredGroupError,
        pgdbpool.ThreadingModelError, pgdbpool.SettingError, pgdbpool.BlockClosedError,
        psycopg.ProgrammingError, psycopg.InterfaceError, psycopg.NotSupportedError,
    ],
    C.OTHER: [ValueError, KeyError, KeyboardInterrupt],
}  # fmt: skip
CASES = [(example, category) for category, examples in EXAMPLES.items() for example in examples]


CODES = sorted(code for code in psycopg.errors._sqlcodes if len(code) == 5 and code[:2] != "01")


def own_classes(root: type[errors.Error] = errors.Error) -> Iterator[type[errors.Error]]:
    yield root
    for cls in root.__subclasses__():
        if cls.__module__ == "pgdbpool.errors":
            yield from own_classes(cls)


def named(example: str | type[BaseException]) -> BaseException:
    if not isinstance(example, str):
        return example("x")
    error = psycopg.errors.lookup(example)("x") if example != "ZZ123" else psycopg.DatabaseError("x")
    error.sqlstate = example
    return error


def test_every_category_has_an_example() -> None:
    assert set(EXAMPLES) == set(Category)


@pytest.mark.parametrize(
    ("example", "category"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_an_error_has_its_category(example: str | type[BaseException], category: Category) -> None:
    assert classify(named(example)) is category


@pytest.mark.parametrize("cls", sorted(set(own_classes()), key=lambda cls: cls.__name__))
def test_each_class_of_the_package_has_a_category(cls: type[errors.Error]) -> None:
    assert isinstance(classify(cls("x")), Category)
    # A statement's error is always psycopg's as well, which has the SQLSTATE.
    assert classify(cls("x")) is not Category.OTHER or cls is pgdbpool.DBQueryError


@pytest.mark.parametrize("sqlstate", CODES)
def test_each_sqlstate_that_psycopg_knows_has_a_category_of_the_list(sqlstate: str) -> None:
    error = psycopg.errors.lookup(sqlstate)("x")
    own = errors.as_query_error(error)
    assert classify(own) is not Category.OTHER
    if not sqlstate.startswith(("P0", "38", "39", "2F", "09", "0Z", "20")):
        assert classify(own) is not Category.RAISED  # which is also what an unknown class is


def test_an_aborted_transaction_is_classified_by_its_cause() -> None:
    error = pgdbpool.TransactionAbortedError("x")
    error.__cause__ = psycopg.errors.SerializationFailure("y")
    assert classify(error) is Category.RETRYABLE

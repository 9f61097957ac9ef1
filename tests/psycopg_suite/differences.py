"""Tests of psycopg's suite that fail over a lent connection, each with its reason.

doc/psycopg-suite.rst shows them.
"""

from __future__ import annotations

MOST = 25
"""Failing tests that are tolerated in each kind of group."""

_CLASS = "A block's cursors are of a subclass of psycopg's, in ``cursor_factory`` too."
_COMMIT = (
    "COMMIT of a failed transaction raises ``TransactionAbortedError``; psycopg's rolls back in silence."
)

DIFFERENCES = {
    "test_connection.py::test_auto_transaction_fail": _COMMIT,
    "test_connection.py::test_cursor_factory": _CLASS,
    "test_connection.py::test_server_cursor_factory": _CLASS,
    "test_cursor.py::test_default_cursor": _CLASS,
    "test_cursor.py::test_str": _CLASS,
    "test_errors.py::test_exception_class_fallback": (
        "A statement's error is of a subclass of psycopg's class, so that it is a ``DBQueryError`` too."
    ),
    "test_pipeline.py::test_outer_transaction_error": _COMMIT,
    "test_prepared.py::test_evict_lru": (
        "It expects the session's first prepared statement, and an earlier block has prepared some."
    ),
    "test_transaction.py::test_named_savepoints_successful_exit": (
        "It replaces a private method to see BEGIN, which travels with the first statement instead."
    ),
}
"""By file and function."""

"""Which running statements may be committing, and which commit did not wait for its synchronous standby.

If a COMMIT is cancelled while it waits for its standby, the server commits locally all the same and answers
success with a WARNING. So a statement that may be committing is never cancelled.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import pq

from ..errors import is_last_word
from .statement_shape import code_of, text_of

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

_SEVERITY = pq.DiagnosticField.SEVERITY_NONLOCALIZED
_SQLSTATE = pq.DiagnosticField.SQLSTATE
_ROUTINE = pq.DiagnosticField.SOURCE_FUNCTION

_READS = re.compile(
    r"\s*(?:\(\s*)*(?:SELECT|TABLE|VALUES|SHOW|WITH|FETCH|COPY\s+[\w.]+\s*(?:\([\w\s,]*\))?\s*TO\s"
    r"|COPY\s*\(.*\)\s*TO\s)",
    re.IGNORECASE | re.DOTALL,
)
_WRITES = re.compile(r"\b(?:INSERT|UPDATE|DELETE|MERGE|INTO|SHARE|CALL|PROGRAM)\b", re.IGNORECASE)
_CALL = re.compile(r"((?:[\w$]+\s*\.\s*)*[\w$]+)\s*\(")
_ENDS = re.compile(r"(?:^|;)\s*(?:COMMIT|END|ROLLBACK|ABORT|PREPARE\s+TRANSACTION)\b", re.IGNORECASE)

# Words that may precede a parenthesis without writing: keywords, and functions built into every server.
_WORDS = """
    all and any as between by case copy cross distinct else except exists filter from group having in inner
    intersect interval is join lateral left like ilike limit materialized not offset on or order over
    partition recursive right select set sets similar some table then union using values when where with
    within row rows array cube rollup grouping
    bigint bit bytea char character date decimal double float int integer json jsonb numeric real smallint
    text time timestamp timestamptz uuid varbit varchar varying
    abs age any_value array_agg array_append array_length array_position array_remove array_to_string avg
    bit_length bool_and bool_or cast ceil ceiling char_length coalesce concat concat_ws corr count cume_dist
    current_database current_schema current_setting current_user date_bin date_part date_trunc decode
    dense_rank div encode every exp extract first_value floor format format_type generate_series
    generate_subscripts greatest grouping has_schema_privilege has_table_privilege initcap json_agg
    json_array_elements json_build_array json_build_object json_object_agg jsonb_agg jsonb_array_elements
    jsonb_array_length jsonb_build_array jsonb_build_object jsonb_each jsonb_each_text jsonb_extract_path
    jsonb_extract_path_text jsonb_object_agg jsonb_object_keys jsonb_path_exists jsonb_path_query
    jsonb_pretty jsonb_set jsonb_strip_nulls jsonb_typeof lag last_value lead least length ln log lower
    lpad ltrim make_date make_interval make_time make_timestamp make_timestamptz max md5 min mod mode now
    nth_value ntile nullif num_nonnulls num_nulls octet_length overlay percent_rank percentile_cont
    percentile_disc pg_backend_pid pg_column_size pg_database_size pg_get_expr pg_get_viewdef
    pg_is_in_recovery pg_postmaster_start_time pg_relation_size pg_size_pretty pg_sleep
    pg_table_size pg_total_relation_size pg_typeof plainto_tsquery position power quote_ident
    quote_literal random rank regexp_count regexp_match regexp_matches regexp_replace regexp_split_to_array
    regexp_split_to_table repeat replace reverse round row_number row_to_json rpad rtrim sha256 sign
    split_part sqrt starts_with statement_timestamp stddev string_agg string_to_array strpos substr
    substring sum timezone to_char to_date to_json to_jsonb to_number to_regclass to_timestamp to_tsquery
    to_tsvector translate treat trim trunc ts_headline ts_rank unnest upper variance version
    websearch_to_tsquery width_bucket
"""
_HARMLESS = frozenset(_WORDS.split())


def stopped_waiting(notice: PGresult) -> bool:
    """Return whether the notice says that a commit stopped waiting for its synchronous standby.

    Only untranslated fields are compared: a trigger may raise 01000 too, and the text depends on
    `lc_messages`.
    """
    field = notice.error_field
    return (
        field(_SEVERITY) == b"WARNING"
        and field(_SQLSTATE) == b"01000"
        and field(_ROUTINE) == b"SyncRepWaitForLSN"
    )


def ends_session(result: PGresult) -> bool:
    """Return whether an error or notice is the server's last message of the session; not libpq's own."""
    severity, sqlstate = result.error_field(_SEVERITY) or b"", result.error_field(_SQLSTATE) or b""
    return is_last_word(severity.decode() or None, sqlstate.decode())


def may_commit(statement: Any, inside: bool) -> bool:
    """Return whether a running statement may be committing something.

    :param inside: whether it runs in an explicit transaction, which continues after it.
    """
    try:
        text = text_of(statement, None)
    except psycopg.Error:  # only the connection's own adapters can write a value into it
        text = None
    if text is None:
        return True
    code = code_of(text, escaping="\\" in text, name=" quoted_name")
    return _ENDS.search(code) is not None if inside else not _only_reads(code)


def _only_reads(code: str) -> bool:
    """Return whether every statement, and every function called, is known to be read-only."""
    parts = [part for part in code.split(";") if part.strip()]
    if not parts or not all(map(_READS.match, parts)) or _WRITES.search(code):
        return False
    names = ("".join(name.split()) for name in _CALL.findall(_without_aliases(code)))
    called = (name.lower().removeprefix("pg_catalog.") for name in names)
    return _HARMLESS.issuperset(called)


def _without_aliases(code: str) -> str:
    """Return the code without names before lists of columns, which look like calls: `COPY t (a)`."""
    code = re.sub(r"\A(\s*COPY)\s+[\w.]+\s*\(", r"\1 (", code, flags=re.IGNORECASE)
    return re.sub(r"\bAS\s+\w+\s*\(", "AS (", code, flags=re.IGNORECASE)

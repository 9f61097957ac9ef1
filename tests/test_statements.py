"""What the text of a statement says about it."""

from __future__ import annotations

import pytest

from pgdbpool.statements import _OVERLAP, _PIECE
from pgdbpool.statements import _analyse as shape


@pytest.mark.parametrize(
    ("text", "changes", "allows"),
    [
        ("SET statement_timeout = '500ms'", True, "500ms"),
        ("set local statement_timeout to 1500", True, "1500"),
        ("SET SESSION statement_timeout='10 s';", True, "10s"),
        ("SET statement_timeout TO DEFAULT", True, "DEFAULT"),
        ("RESET statement_timeout", True, ""),
        ("SET \"statement_timeout\" = '10s'", True, ""),
        ("EXECUTE p('statement_timeout', '10s')", True, ""),
        ("SET lock_timeout = 5; SET statement_timeout = 5", True, ""),
        ("SELECT set_config('statement_timeout', '5s', false)", True, ""),
        ("DO $$ BEGIN SET statement_timeout = '5s'; END $$", True, ""),
        ("SELECT length('a temp note on statement_timeout')", False, ""),
        ("SELECT 1", False, ""),
    ],
)
def test_whether_it_changes_how_long_a_statement_may_take(text: str, changes: bool, allows: str) -> None:
    assert (shape(text).timeout, shape(text).allows) == (changes, allows)


@pytest.mark.parametrize("between", ["\n", " \n", "\t\r\n  ", "\n\n\n", " \v\n\f"])
def test_a_string_that_goes_on_in_the_next_line_is_doubtful(between: str) -> None:
    assert shape(f"SELECT 'a'{between}'b'").number == 2
    assert shape(f"SELECT 'a'{between}, 'b'").number == 1


def test_a_quote_with_many_lines_is_read_in_one_go() -> None:
    assert shape("SELECT '" + "\n" * 300_000 + "x'").number == 1  # minutes, if each line were tried anew


@pytest.mark.parametrize("at", [0, _PIECE - 6, _PIECE - 1, _PIECE, 2 * _PIECE + _OVERLAP - 3])
@pytest.mark.parametrize("word", ["set_config", "CREATE TEMP", "with   hold", "pg_advisory_lock"])
def test_a_word_is_found_anywhere_in_a_long_text(at: int, word: str) -> None:
    text = "SELECT 1 /* " + "." * at + f" {word} " + "." * (3 * _PIECE) + " */"
    assert shape(text).touches
    assert not shape(text.replace(word, "contemplate")).touches

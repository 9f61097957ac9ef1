"""What the text of a statement says about it."""

from __future__ import annotations

from time import process_time

import pytest

from pgdbpool._session.statement_shape import _OVERLAP, _PIECE
from pgdbpool._session.statement_shape import _analyse as shape


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


@pytest.mark.parametrize("between", ["\n", " \n", "\t\r\n  ", "\n\n\n", " \v\n\f", " -- ';\n \t--'\n"])
@pytest.mark.parametrize("kind", ["", "E", "U&", "N"])
def test_a_constant_that_goes_on_in_the_next_line_is_one(between: str, kind: str) -> None:
    assert shape(f"SELECT {kind}'a;'{between}';b'").number == 1
    assert shape(f"SELECT {kind}'a'{between}, 'b'; SELECT 1").number == 2
    assert shape(f"SELECT E'a'{between}'\\';SET x = 1'").number == 1
    assert shape(f"SELECT E'a'{between}, '\\';SET x = 1").touches


@pytest.mark.parametrize(
    "body", ["BEGIN ATOMIC SELECT 1; SELECT CASE 1 WHEN 1 THEN 2 END; END", "BEGIN ATOMIC END"]
)
def test_the_end_of_a_functions_body_ends_no_transaction(body: str) -> None:
    what = shape(f"CREATE OR REPLACE FUNCTION f(begin atomic) RETURNS int {body}")
    assert (what.number, what.ends, what.commits, what.controls) == (1, False, False, False)
    what = shape(f"CREATE PROCEDURE f() {body}; SELECT 1; COMMIT")
    assert (what.number, what.ends, what.commits, what.controls) == (3, True, True, True)


def test_the_actions_of_a_rule_are_one_statement_with_it() -> None:
    assert shape("CREATE RULE r AS ON INSERT TO t DO ALSO (SELECT 1; SELECT ';)'; SELECT 2)").number == 1


@pytest.mark.parametrize(
    "text",
    [
        "SELECT '" + "\n" * 300_000 + "x'",
        "SELECT E'a'" + "\n" * 300_000 + "x",
        "SELECT E'a'" + "\n-- x -- ' --" * 30_000 + "x",
        "SELECT E'" + "'\\" * 150_000,
        "".join(f"$a{n}$ " for n in range(50_000)),
        "SELECT 1 " + "/*" * 150_000,
        "SELECT 1 " + "/* ' */ " * 50_000,
        "CREATE FUNCTION f BEGIN ATOMIC" + "(" * 150_000 + ";" + ")" * 150_000,
        "CREATE FUNCTION BEGIN ATOMIC x;" * 10_000,
        "SELECT " + "(" * 150_000 + ";" * 150_000,
    ],
    ids=lambda text: text[:30].encode("unicode_escape").decode(),
)
def test_a_long_text_is_read_in_one_go(text: str) -> None:
    began = process_time()
    assert shape(text).number == 1
    assert process_time() - began < 5  # minutes, if any part were read anew from each place


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, _PIECE - 6, _PIECE - 1, _PIECE, 2 * _PIECE + _OVERLAP - 3])
@pytest.mark.parametrize("word", ["set_config", "CREATE TEMP", "with   hold", "pg_advisory_lock"])
def test_a_word_is_found_anywhere_in_a_long_text(at: int, word: str) -> None:
    text = "SELECT 1 /* " + "." * at + f" {word} " + "." * (3 * _PIECE) + " */"
    assert shape(text).touches
    assert not shape(text.replace(word, "contemplate")).touches

"""Text for people: columns, carets, counts, lists."""

from __future__ import annotations

from lora_fx.text import caret, columns, count, listing, nearest, percent


def test_columns_are_aligned_without_trailing_blanks():
    assert columns([("a", "bb", ""), ("ccc", "d", "e")]) == "  a    bb\n  ccc  d   e"


def test_caret_stands_under_the_word_also_behind_tabs():
    assert caret("\ta: b", 3, 5, 1) == "    3 | \ta: b\n      | \t   ^"


def test_caret_does_not_run_over_the_end_of_the_line():
    assert caret("ab", 1, 2, 99).endswith("| " + " ^")


def test_caret_stands_under_the_word_also_behind_wide_characters_and_accents():
    shown, marks = caret('{n: "日本e\u0301", m: 3}', 3, 13, 1).splitlines()
    assert shown == '    3 | {n: "日本e\u0301", m: 3}'
    assert marks == "      | " + " " * 13 + "^"


def test_caret_shows_the_surroundings_of_its_column_in_a_long_line():
    shown, marks = caret("a" * 500 + "WRONG" + "b" * 500, 3, 501, 5).splitlines()
    assert shown == "    3 | …" + "a" * 49 + "WRONG" + "b" * 46 + "…"
    assert marks == "      | " + " " * 50 + "^^^^^"


def test_words():
    assert (count(1, "site"), count(1200, "site")) == ("1 site", "1,200 sites")
    assert listing("abc", most=2) == "a, b … and 1 more"
    assert nearest("alhpa", ["alpha", "r"]) == ("alpha",)


def test_shares_have_two_digits_and_no_exponents():
    assert [percent(part, 1000) for part in (0, 1, 123, 994, 999, 1000, 2500)] == [
        "0 %", "0.1 %", "12 %", "99 %", "100 %", "100 %", "250 %",
    ]  # fmt: skip
    assert percent(3, 0) == "0 %"

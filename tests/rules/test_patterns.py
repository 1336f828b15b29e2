"""Patterns: what matches, what is no pattern, and that no name can make matching slow."""

from __future__ import annotations

import copy
import pickle
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_fx.errors import RefusedError
from lora_fx.rules.automaton import Automaton, Choice, Concatenation, Repeat, literal
from lora_fx.rules.globs import PatternError
from lora_fx.rules.patterns import NamePattern, ShapePattern, automaton_of, nearest_names, parse_dimension

MATCHES = [
    ("fc1", "fc1", True),
    ("fc1", "a.fc1", False),
    ("fc1", "fc10", False),
    ("*", "fc1", True),
    ("*", "a.fc1", False),
    ("*", "", True),
    ("a.*", "a.b", True),
    ("a.*.c", "a.b.c", True),
    ("a.*.c", "a.b.b.c", False),
    ("a*c", "abc", True),
    ("a*c", "a.c", False),
    ("**", "", True),
    ("**", "a.b.c", True),
    ("**.q_proj", "q_proj", True),
    ("**.q_proj", "a.b.q_proj", True),
    ("**.q_proj", "aq_proj", False),
    ("h.**", "h", True),
    ("h.**", "h.0.attn", True),
    ("h.**", "hh.0", False),
    ("a.**.b", "a.b", True),
    ("a.**.b", "a.x.y.b", True),
    ("a.**.b", "axb", False),
    ("**.a.**", "x.a.y", True),
    ("**.a.**", "a", True),
    ("a.**.**.b", "a.b", True),
    ("**.{q,v}_proj", "x.v_proj", True),
    ("**.{q,v}_proj", "x.k_proj", False),
    ("{a,b.c}.d", "b.c.d", True),
    ("{a,{b,c}d}", "cd", True),
    ("{a*,b}", "axy", True),
    ("{a,}b", "b", True),
    ("h.{0..11}.c", "h.0.c", True),
    ("h.{0..11}.c", "h.11.c", True),
    ("h.{0..11}.c", "h.12.c", False),
    ("h.{0..11}.c", "h.01.c", False),
    ("h.{0..3,9}.c", "h.3.c", True),
    ("h.{0..3,9}.c", "h.9.c", True),
    ("h.{0..3,9}.c", "h.4.c", False),
    ("{007..11}", "7", True),
    ("fc[12]", "fc2", True),
    ("fc[12]", "fc3", False),
    ("l[a-c]", "lb", True),
    ("l[!a-c]", "ld", True),
    ("l[!a-c]", "lb", False),
    ("a[!x]b", "a.b", False),
    ("fc?", "fc1", True),
    ("fc?", "fc", False),
    ("a?b", "a.b", False),
    (r"a\*", "a*", True),
    (r"a\*", "ab", False),
    ("re:.*", "a.b", True),
    (r"re:.*\.(q|v)_proj", "a.q_proj", True),
    (r"re:(q|v)_proj", "a.q_proj", False),
    (r"re:^h\.\d+$", "h.12", True),
    (r"re:h\.\d{1,2}", "h.123", False),
    (r"re:(?:ab)+?c", "ababc", True),
    (r"re:[^.]+", "a.b", False),
    (r"re:[\w.-]+", "a.b-c", True),
    (r"re:a{2,}", "aaaa", True),
    (r"re:a{2}", "aaa", False),
    (r"re:a|b|", "", True),
    (r"re:a{,2}", "a{,2}", True),
]


@pytest.mark.parametrize(("pattern", "name", "expected"), MATCHES)
def test_pattern_matches(pattern, name, expected):
    assert NamePattern(pattern).matches(name) is expected


WRONG = [
    ("", "the pattern is empty", 0),
    ("a..b", "empty segment", 2),
    (".a", "empty segment", 0),
    ("a.", "empty segment", 1),
    ("a.b**", "`**` stands for whole segments", 3),
    ("**a", "`**` stands for whole segments", 0),
    ("a.{q,v", "`{` without `}`", 2),
    ("a.q}", "unbalanced `}`", 3),
    ("a.[bc", "`[` without `]`", 2),
    ("a.[]", "`[]` is empty", 2),
    ("a]", "unbalanced `]`", 1),
    ("{5..2}", "runs backwards", 1),
    ("{0..99999}", "more than 10,000 numbers", 1),
    ("h.{3,a..c}", "`..` stands between two numbers", 5),
    ("h.{0..}", "`..` stands between two numbers", 3),
    ("l[c-a]", "the range runs backwards", 1),
    ("a\\", "a backslash at the end", 1),
    ("re:", "the expression is empty", 3),
    ("re:(a", "`(` without `)`", 3),
    ("re:a)", "`)` without `(`", 4),
    ("re:[a", "`[` without `]`", 3),
    ("re:*a", "nothing to repeat before `*`", 3),
    ("re:a**", "two repetitions in a row", 4),
    ("re:a$b", "`$` stands only at the end", 4),
    ("re:(?=a)b", "look-around", 3),
    (r"re:(a)\1", "back-references are not supported", 6),
    (r"re:\bword", "`\\b` is not supported", 3),
    ("re:a{3,1}", "runs backwards", 4),
    ("re:a{5000}", "more than 1,000 repetitions", 4),
    ("re:((a{900}){900}){900}", "needs more than 50,000 states", 0),
    ("re:[z-a]", "the range is not one", 4),
    ("{" * 60 + "}" * 60, "nested deeper than 50 levels", 50),
    ("re:" + "(" * 60 + "a" + ")" * 60, "nested deeper than 50 levels", 53),
    ("{" + "1" * 5000 + "..2}", "`..` stands between two numbers", 1),
    ("re:a{" + "1" * 5000 + "}", "more than 1,000 repetitions", 4),
    ("a" * 60_000, "has more than 50,000 characters", 0),
    ("{0..9999}" * 5_000, "needs more than 50,000 states", 0),
]


@pytest.mark.parametrize(("pattern", "message", "offset"), WRONG)
def test_text_that_is_no_pattern_is_reported_with_its_offset(pattern, message, offset):
    with pytest.raises(PatternError) as caught:
        NamePattern(pattern)
    assert message in str(caught.value)
    assert caught.value.offset == offset


@pytest.mark.parametrize(
    "pattern",
    ["re:(a+)+b", "re:(a|a)*b", "re:(a|aa)+b", "re:(.*)(.*)(.*)(.*)b", "**.*a*a*a*a*a*a*a*b", "{a,aa}" * 9 + "b"],
)
def test_hostile_name_costs_a_step_a_character(pattern):
    compiled = Automaton(
        Choice((literal("x"), automaton_of(pattern).expression))
    )  # without an end that can be asked for first
    states = len(compiled._steps)
    assert not compiled.matches("a" * 5_000)
    assert 0 < compiled.work <= 60 * states, "the same few state sets again and again"


def test_memory_of_all_automata_together_is_bounded(monkeypatch):
    monkeypatch.setattr("lora_fx.rules.automaton._MOST_REMEMBERED", 500)
    compiled = Automaton(
        Concatenation(
            (
                Repeat(Choice((literal("a"), literal("b")))),
                literal("a"),
                Repeat(Choice((literal("a"), literal("b"))), 12, 12),
            )
        )
    )
    names = [format(number, "016b").replace("0", "a").replace("1", "b") for number in range(3_000)]
    expected = re.compile("[ab]*a[ab]{12}")
    assert [compiled.matches(name) for name in names] == [bool(expected.fullmatch(name)) for name in names]
    assert Automaton.remembered <= 500
    assert 0 < len(compiled._after) <= 500


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0), (0, 11), (7, 130), (95, 1204), (990, 1010), (10**17 - 5, 10**17 + 5)]
)
def test_a_range_of_numbers_means_each_of_them_and_no_other(low, high):
    pattern = NamePattern(f"{{{low}..{high}}}")
    around = range(max(0, low - 120), high + 120)
    assert [number for number in around if pattern.matches(str(number))] == list(range(low, high + 1))
    assert not pattern.matches(f"0{low}")


def test_states_follow_the_length_of_a_pattern_and_not_the_numbers_in_its_ranges():
    small, large = (NamePattern("h" + ".{0..9999}" * count).states for count in (10, 20))
    assert large < 2.1 * small < 6_000


@pytest.mark.parametrize("ranges", ["a-cb-d", "x-za-bm", "a", "aa-a"])
def test_classes_accept_what_any_of_their_ranges_accepts(ranges):
    pattern, reference = NamePattern(f"[{ranges}]"), re.compile(f"[{ranges}]")
    assert [pattern.matches(chr(i)) for i in range(200)] == [bool(reference.fullmatch(chr(i))) for i in range(200)]


@pytest.mark.parametrize("pattern", ["re:(.*a){100}.{50}", "re:.*(a.{30}){10}"])
def test_work_follows_the_length_of_a_name(pattern):
    draw = random.Random(0)
    name = "".join(draw.choice("ab") for _ in range(1_600))
    automata = [Automaton(automaton_of(pattern).expression) for _ in range(2)]
    for automaton, length in zip(automata, (800, 1_600)):
        automaton.matches(name[:length])
    assert 0 < automata[1].work <= 2.6 * automata[0].work
    assert automata[1].work <= 1_600 * len(automata[1]._steps)


def test_a_name_that_no_model_has_is_refused_in_few_words():
    with pytest.raises(RefusedError, match="20,000 characters") as caught:
        NamePattern("**").matches("a" * 20_000)
    assert len(str(caught.value)) < 300


pieces = st.recursive(
    st.sampled_from(["a", "b", "\\.", ".", "[ab]", "[^a]", "\\d", "\\w"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        inner.map(lambda text: f"({text})"),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)


@given(pieces, st.text("ab.1", max_size=6))
def test_expressions_mean_what_pythons_mean(pattern, name):
    assert NamePattern(f"re:{pattern}").matches(name) == bool(re.fullmatch(pattern, name))


def reference(pattern: list[str], name: list[str]) -> bool:
    """Match segment lists the slow and obvious way."""
    if not pattern:
        return not name
    if pattern[0] == "**":
        return reference(pattern[1:], name) or (bool(name) and reference(pattern, name[1:]))
    return (
        bool(name)
        and bool(re.fullmatch(pattern[0].replace("*", ".*").replace("?", "."), name[0]))
        and reference(pattern[1:], name[1:])
    )


segments = st.lists(st.sampled_from(["a", "b", "*", "**", "a*", "*b", "?"]), min_size=1, max_size=5)


@given(segments, st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=5))
def test_globs_mean_what_an_obvious_reference_means(pattern, name):
    assert NamePattern(".".join(pattern)).matches(".".join(name)) == reference(pattern, name)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_patterns_are_values(duplicate):
    pattern = NamePattern("**.{q,v}_proj")
    assert duplicate(pattern) == pattern
    assert hash(duplicate(pattern)) == hash(pattern)


NAMES = [f"blocks.{i}.{site}" for i in range(3) for site in ("attn.q_proj", "attn.k_proj", "mlp.fc1", "mlp.fc2")]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("blocks.*.mlp.c_fc", "blocks.0.mlp.fc1"),
        ("blocks.*.attn.query", "blocks.0.attn.q_proj"),
        ("**.{q,v}_porj", "blocks.0.attn.q_proj"),
        ("block.*.attn.k_proj", "blocks.0.attn.k_proj"),
        (r"re:.*\.fc3", "blocks.0.mlp.fc1"),
    ],
)
def test_what_looks_like_the_pattern_is_suggested(pattern, expected):
    assert nearest_names(NamePattern(pattern), NAMES)[0] == expected


def test_nothing_is_suggested_for_what_looks_like_nothing():
    assert nearest_names(NamePattern("**.embedding_table"), NAMES) == ()


SHAPES = [
    ([16, 8], (16, 8), None),
    ([16, 8], (16, 9), "in = 9 is not 8"),
    (["*", 8], (1, 8), None),
    ([">=1024", "*"], (1024, 1), None),
    ([">=1024", "*"], (512, 1), "out = 512 is not >=1024"),
    ([">8", "<4"], (9, 3), None),
    ([">8", "*"], (8, 3), "out = 8 is not >8"),
    (["<=8", "512..4096"], (8, 4096), None),
    (["<=8", "512..4096"], (8, 4097), "in = 4097 is not 512..4096"),
    (["3*d", "d"], (48, 16), None),
    (["3*d", "d"], (48, 17), "in = 17 is not d = 16"),
    (["3*d", "d"], (47, 16), "out = 47 is not a multiple of 3"),
    (["d", "4*d"], (4, 16), None),
    (["d", "d"], (4, 8), "in = 8 is not d = 4"),
    (["a", "b", "a"], (4, 8, 4), None),
    (["a", "b"], (4, 8, 3), "it has 3 dimensions, not 2"),
]


@pytest.mark.parametrize(("pattern", "shape", "problem"), SHAPES)
def test_shape_matches_or_tells_why_not(pattern, shape, problem):
    compiled = ShapePattern(tuple(map(parse_dimension, pattern)))
    assert compiled.explain(shape) == problem
    assert compiled.values() == pattern


@pytest.mark.parametrize("text", ["", "x*d", "3d", "dd", ">=", "5..", "9..2", "0*d", "-3"])
def test_text_that_is_no_size_is_an_error(text):
    with pytest.raises(PatternError):
        parse_dimension(text)

"""What reading rules costs follows their size: counted in calls and in characters of the error, not in seconds."""

from __future__ import annotations

import functools
import gc
import io
import sys
import time
from collections.abc import Callable

import pytest

from lora_fx.errors import MOST_SHOWN, LoraFxError, NoMatchError, RuleError
from lora_fx.planning.decide import decide
from lora_fx.planning.explain import explain
from lora_fx.planning.plan import Plan
from lora_fx.planning.planned import Inventory
from lora_fx.planning.sites import Site
from lora_fx.rules.lint import lint
from lora_fx.rules.patterns import NamePattern
from lora_fx.rules.reader import read_rules, read_stream
from lora_fx.rules.tree import MOST_BYTES
from tests.support.hostile import KINDS

SIZE = 4_000


def read(text: str) -> str:
    """Return what is said of rules: the error, or the warnings."""
    try:
        return "\n".join(lint(read_stream(io.BytesIO(text.encode()[:MOST_BYTES]), "rules.yaml"))[1])
    except RuleError as error:
        return str(error) if len(error.problems) <= MOST_SHOWN else "too many problems" * SIZE


def calls_of(do: Callable[[], str]) -> tuple[int, str]:
    """Return how many functions are called while something is done, and what comes of it."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    gc.disable()
    sys.setprofile(count)
    try:
        said = do()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls, said


@pytest.mark.parametrize("kind", KINDS)
def test_twice_as_many_characters_cost_twice_as_much(kind):
    read(KINDS[kind](100))  # what is made once
    texts = KINDS[kind](SIZE), KINDS[kind](2 * SIZE)
    (small, _), (large, said) = (calls_of(functools.partial(read, text)) for text in texts)
    assert large <= 2.3 * small + 3_000
    assert large <= 100 * 2 * SIZE
    assert len(said) < 100_000


def test_a_count_of_calls_sees_what_is_quadratic():
    def pairs(n: int) -> str:
        return "".join(str(max(a, b)) for a in range(n) for b in range(n))

    (small, _), (large, _) = (calls_of(functools.partial(pairs, n)) for n in (20, 40))
    assert large > 3.5 * small


def test_of_very_many_problems_the_first_are_told_with_how_many_more_there_are():
    with pytest.raises(RuleError) as caught:
        read_stream(io.BytesIO(KINDS["one key again and again"](10_000).encode()), "rules.yaml")
    assert (len(caught.value.problems), caught.value.more) == (200, 1_802)
    first, *_, last = str(caught.value).splitlines()
    assert first == "2,002 problems in rules.yaml"
    assert last == "… and 1,802 more problems"


def test_of_very_many_warnings_the_first_are_told():
    warnings = lint(read_stream(io.BytesIO(KINDS["rules that match the same"](20_000).encode()), "rules.yaml"))[1]
    assert len(warnings) == 201
    assert warnings[-1].endswith("more warnings")


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"version": 1, "rules": [{"match": {"name": "a\0b"}}]}, "U+0000 cannot stand in rules"),
        ({"version": 1, "rules": [{"match": {"name": "a\ud800b"}}]}, "U+D800 cannot stand in rules"),
        ({"version": 1, "rules": [{"match": {"name": "a"}, "lora": {"r": 10**400}}]}, "more than 18 digits"),
        ({"version": 1, "rules": [{"match": {"name": "a"}, 10**5000: 1}]}, "more than 18 digits"),
        ({"version": 1, "rules": [{"match": {"name": "a"}, "lora": {"r": 2**40}}]}, "r must be at most 65536"),
        ({"version": 1, "rules": [{"match": {"shape": [2**63, 1]}}]}, "more than 18 digits"),
        ({"version": 1, "rules": [{"match": {"shape": [f"{'9' * 5000}*d", 1]}}]}, "is not a size"),
        ({"version": 1, "rules": [{"match": {"name": "x" * 4_000_000}}]}, "more than 100,000 entries"),
    ],
    ids=range(8),
)
def test_what_no_name_and_no_number_can_be_is_refused_in_a_dict_too(rules, words):
    with pytest.raises(RuleError) as caught:
        read_rules(rules)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize(
    "name", ["a" * 5_000 + ".yaml", "a\0.yaml", "a\ud800.yaml", "/dev/zero", "/dev/null/rules.yaml"]
)
def test_a_path_that_leads_to_no_file_is_an_error_of_ours(name):
    with pytest.raises(RuleError) as caught:
        read_rules(name)
    assert len(str(caught.value)) < 1_000


# -- many rules and many sites


def inventory(number: int) -> Inventory:
    sites = tuple(Site(f"h.{layer}.fc", "linear", ("Linear",), (8, 8)) for layer in range(number))
    return Inventory("Small", sites, (), 1)


def many(number: int, **rule: object) -> dict[str, object]:
    return {"version": 1, "rules": [{"match": {"name": f"**.{layer}.fc*"}, **rule} for layer in range(number)]}


def test_each_rule_is_asked_once_about_each_site(monkeypatch):
    asked = []
    matches = NamePattern.matches
    monkeypatch.setattr(NamePattern, "matches", lambda pattern, name: asked.append(name) or matches(pattern, name))
    decide(read_rules(many(30)), inventory(40))
    assert len(asked) == 30 * 40


def test_what_many_rules_miss_is_told_of_the_first():
    with pytest.raises(NoMatchError) as caught:
        decide(read_rules(many(1_000)), inventory(10))
    assert (len(caught.value.unmatched), caught.value.more) == (200, 790)
    assert str(caught.value).endswith("… and 790 more rules")
    assert len(str(caught.value)) < 60_000


def test_notes_name_a_few_of_many_rules():
    rules = many(300)
    rules["rules"].append({"name": "last", "match": {"name": "**"}, "expect": "any"})
    plan = Plan.of(decide(read_rules(rules), inventory(300)))
    assert any(note.startswith("rule 'last' also matches 300 sites") and "294 more" in note for note in plan.notes)
    assert max(map(len, plan.notes)) < 500


def test_explain_tells_of_many_sites_and_rules_the_first_and_those_that_match():
    rules, model = read_rules(many(230)), inventory(230)
    plan = Plan.of(decide(rules, model))
    text = explain(plan, rules, model, "h.229.fc", lambda planned: "")
    assert "and 29 more rules that do not match" in text
    assert "rule 230" in text
    assert "matches, and decides" in text
    assert explain(plan, rules, model, "h.*.fc", lambda planned: "").endswith("… and 30 more sites")


@pytest.mark.fuzz
def test_a_megabyte_of_any_kind_takes_seconds_and_not_minutes(record_property):
    """What this machine takes is shown; the bound is one that only another order of growth passes."""
    took = {}
    for kind, make in KINDS.items():
        text = make(MOST_BYTES - 1_000)
        start = time.perf_counter()
        said = read(text)
        took[kind] = time.perf_counter() - start
        assert len(said) < 200_000
        assert took[kind] < 20, kind
    slowest = max(took, key=took.__getitem__)
    record_property("figures", f"1 MB of each of {len(KINDS)} kinds; slowest '{slowest}', {took[slowest]:.1f} s")


def test_errors_of_long_rules_stay_errors_of_ours():
    for text in ("\0", "\x85" * 100, "a: !!binary x", "? [a]", "\ufeff", "%YAML 9.9\n---\na: 1"):
        with pytest.raises(LoraFxError):
            read_stream(io.BytesIO(text.encode()), "rules.yaml")

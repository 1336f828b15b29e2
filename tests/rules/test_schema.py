"""The JSON schema says what the reader says."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from lora_fx.errors import RuleError
from lora_fx.rules.reader import read_rules
from lora_fx.rules.schema import json_schema, schema_text
from tests.rules.test_rules import GOOD

SHIPPED = Path(__file__).parents[2] / "rules"


def with_lora(**lora: object) -> dict[str, object]:
    return {"version": 1, "rules": [{"match": {"name": "a"}, "lora": lora}]}


def with_rule(**rule: object) -> dict[str, object]:
    return {"version": 1, "rules": [{"match": {"name": "a"}, **rule}]}


GOOD_RULES = [
    yaml.safe_load(GOOD),
    with_lora(),
    with_lora(r=1, alpha=0.5, dropout=0.0, init="random", rslora=False, dora=True, bias=True, adapter="a_1"),
    with_lora(share="outer", divide_r="experts"),
    with_lora(share="none", divide_r=8),
    with_rule(skip="because"),
    with_rule(expect=0),
    with_rule(expect="any"),
    with_rule(slices={"of": {"q": "0..4", "k": ["4..6", "8..9"]}, "adapt": ["q", "k"]}),
    {"version": 1, "rules": [{"match": {"shape": [1, "*", ">=3", "2*d", "4..5"]}}], "train": ["a"]},
]
BAD_RULES = [
    {},
    [],
    {"version": 1},
    {"version": 2, "rules": [{"match": {"name": "a"}}]},
    {"version": 1, "rules": []},
    {"version": 1, "rules": {}},
    {"version": 1, "rules": [{}]},
    {"version": 1, "rules": [{"match": {}}]},
    {"version": 1, "rules": [{"match": {"name": 3}}]},
    {"version": 1, "rules": [{"match": {"name": []}}]},
    {"version": 1, "rules": [{"match": {"nam": "a"}}]},
    {"version": 1, "rules": [{"match": {"op": "conv"}}]},
    {"version": 1, "rules": [{"match": {"shape": []}}]},
    {"version": 1, "rules": [{"match": {"shape": [0]}}]},
    {"version": 1, "rules": [{"match": {"shape": ["big"]}}]},
    {"version": 1, "rules": [{"match": {"shape": [1, 2, 3, 4, 5, 6]}}]},
    {"version": 1, "rules": [{"match": {"name": "a"}}], "train": "a"},
    {"version": 1, "rules": [{"match": {"name": "a"}}], "train": []},
    {"version": 1, "rules": [{"match": {"name": "a"}}], "extra": 1},
    with_lora(r=0),
    with_lora(share="C"),
    with_lora(share=True),
    with_lora(divide_r="all"),
    with_lora(divide_r=0),
    with_lora(divide_r=1.5),
    with_lora(divide_r=True),
    with_lora(r="8"),
    with_lora(r=1.5),
    with_lora(alpha=0),
    with_lora(alpha=1e308),
    with_lora(r=2**40),
    with_lora(dropout=1),
    with_lora(dropout=-1),
    with_lora(init="other"),
    with_lora(dora="yes"),
    with_lora(adapter="a.b"),
    with_lora(rank=3),
    with_rule(skip=True),
    with_rule(skip=""),
    with_rule(skip="a", lora={}),
    with_rule(skip="a", slices={"of": ["q", "k"], "adapt": ["q"]}),
    with_rule(expect=-1),
    with_rule(expect="some"),
    with_rule(expect=True),
    with_rule(slices={"of": ["q"], "adapt": ["q"]}),
    with_rule(slices={"of": ["q", "q"], "adapt": ["q"]}),
    with_rule(slices={"of": ["q", "k"]}),
    with_rule(slices={"of": ["q", "k"], "adapt": []}),
    with_rule(slices={"of": {"q": "4", "k": 3}, "adapt": ["q"]}),
]
ONLY_THE_READER_KNOWS = {
    "a pattern's own syntax": {"version": 1, "rules": [{"match": {"name": "a..b"}}]},
    "names are unique": {
        "version": 1,
        "rules": [{"name": "a", "match": {"name": "a"}}, {"name": "a", "match": {"name": "b"}}],
    },
    "adapted parts exist": with_rule(slices={"of": ["q", "k"], "adapt": ["v"]}),
    "rows do not overlap": with_rule(slices={"of": {"q": "0..4", "k": "2..6"}, "adapt": ["q"]}),
    "ranges are not empty": with_rule(slices={"of": {"q": "4..4", "k": "5..6"}, "adapt": ["q"]}),
    "sizes and ranges are not mixed": with_rule(slices={"of": {"q": 4, "k": "5..6"}, "adapt": ["q"]}),
}


def schema_accepts(rules: object) -> bool:
    return jsonschema.Draft202012Validator(json_schema()).is_valid(rules)


def reader_accepts(rules: object) -> bool:
    try:
        read_rules(rules)
    except RuleError:
        return False
    return True


def test_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("rules", GOOD_RULES, ids=range(len(GOOD_RULES)))
def test_both_accept_good_rules(rules):
    assert schema_accepts(rules)
    assert reader_accepts(rules)


@pytest.mark.parametrize("rules", BAD_RULES, ids=range(len(BAD_RULES)))
def test_both_refuse_bad_rules(rules):
    assert not schema_accepts(rules)
    assert not reader_accepts(rules)


@pytest.mark.parametrize("what", ONLY_THE_READER_KNOWS)
def test_what_a_schema_cannot_say_the_reader_still_refuses(what):
    assert schema_accepts(ONLY_THE_READER_KNOWS[what])
    assert not reader_accepts(ONLY_THE_READER_KNOWS[what])


def test_shipped_schema_is_up_to_date():
    assert (SHIPPED / "lora-fx.schema.json").read_text(encoding="utf-8") == schema_text()


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_satisfy_the_schema_and_name_it(path):
    assert schema_accepts(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=lora-fx.schema.json\n")

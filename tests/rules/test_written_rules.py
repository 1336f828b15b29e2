"""RuleSet.to_yaml: the text of a rule file that every reader of YAML reads as the same rules."""

from __future__ import annotations

import pytest
import yaml

from lora_fx.rules.reader import read_rules
from lora_fx.rules.ruleset import RuleSet
from lora_fx.rules.writing import rule_file
from tests.rules.test_rules import GOOD

ODD = {
    "rules": [
        {
            "name": "odd: # names\n\"'",
            "match": {"name": ["re:^$", "a.\\*.b", "**.ü\u202e", "- x", "y"], "shape": [3, ">=4", "*"]},
            "lora": {"r": 3, "alpha": 4 * 2 / 3, "dropout": 1e-5},
            "slices": {"of": {"n": 3, "yes": "3..5", "1": ["5..6", "6..9"], "on": 2, "a b": 1}, "adapt": ["n", "1"]},
            "per_call": True,
            "expect": 0,
        },
        {"match": {"op": ["linear", "matmul"], "class": "Linear"}, "lora": {"alpha": 1e9, "init": "pissa_niter_4"}},
        {"match": {"name": "off"}, "skip": "no"},
    ],
    "train": ["null", "**.norm"],
    "tokens": [{"name": "**.embed", "ids": [3, 5]}],
    "bias": "all",
}


def same(one: RuleSet, other: RuleSet) -> bool:
    return one.to_dict() == other.to_dict()


@pytest.mark.parametrize("given", [GOOD, ODD, "all-linear", "attention", "mlp", "qkvo", "wide"], ids=str)
def test_rules_come_back_from_their_text(given, tmp_path):
    path = tmp_path / "rules.yaml"
    if given == GOOD:
        path.write_text(GOOD)
        given = path
    elif given == ODD:  # parts of a weight are sizes or ranges, not both
        odd = {
            **ODD["rules"][0],
            "slices": {"of": {"n": "0..3", "yes": "3..5", "1": ["5..6", "6..9"]}, "adapt": ["n", "1"]},
        }
        given = {**ODD, "rules": [odd, *ODD["rules"][1:]]}
    rules = read_rules(given)
    path.write_text(rules.to_yaml(), encoding="utf-8")
    assert same(read_rules(path), rules)
    assert same(read_rules(yaml.safe_load(rules.to_yaml())), rules)


def test_what_is_as_by_default_is_left_out():
    text = read_rules({"rules": [{"name": "all", "match": {"name": "*"}, "lora": {"r": 4, "dora": True}}]}).to_yaml()
    assert (
        text
        == 'version: 1\nrules:\n  - name: all\n    match:\n      name:\n        - "*"\n    lora:\n      r: 4\n      alpha: 16\n      dora: true\n'
    )


def test_remarks_stand_before_the_rules_and_cannot_become_any():
    text = rule_file(read_rules("attention").to_dict(), "first\nrules: [\x1b\n\nlast")
    assert text.startswith("## first\n## rules: [\\x1b\n##\n## last\nversion: 1\n")
    assert same(read_rules(yaml.safe_load(text)), read_rules("attention"))

"""`tokens` and `bias` at the top of a rule file."""

from __future__ import annotations

from typing import Any

import pytest

from lora_fx import RuleError
from lora_fx.rules.reader import read_rules
from lora_fx.rules.schema import json_schema


def rules(**top: Any) -> dict[str, Any]:
    return {"version": 1, "rules": [{"match": {"name": "q"}}], **top}


def tokens(ids: Any, **more: Any) -> dict[str, Any]:
    return rules(tokens=[{"name": "words", "ids": ids, **more}])


def test_ids_are_numbers_and_ranges_in_any_order():
    (read,) = read_rules(tokens([9, "3..6", 0])).tokens
    assert read.ids == (0, 3, 4, 5, 9)
    assert [pattern.text for pattern in read.name] == ["words"]
    assert read.adapter == ""


def test_rules_written_out_are_the_same_rules():
    for given in (tokens([9, "3..6"], adapter="b"), rules(bias="all"), rules(bias="lora_only"), rules(bias="none")):
        read = read_rules(given)
        again = read_rules(read.to_dict())
        assert (again.rules[0].lora, again.all_biases) == (read.rules[0].lora, read.all_biases)
        assert [(rule.ids, rule.adapter) for rule in again.tokens] == [(rule.ids, rule.adapter) for rule in read.tokens]


def test_lora_only_is_the_default_of_every_rule():
    assert [rule.lora.bias for rule in read_rules(rules(bias="lora_only")).rules if rule.lora] == [True]
    assert [rule.lora.bias for rule in read_rules(rules()).rules if rule.lora] == [False]


WRONG: dict[str, dict[str, Any]] = {
    "ids names a row twice: 4": tokens([4, "3..6"]),
    "'6..6' is no range of rows": tokens(["6..6"]),
    "'a' is no range of rows": tokens(["a"]),
    "ids must be at least 0, found -1": tokens([-1]),
    "ids must be an integer, found": tokens([1.5]),
    "ids is an empty list": tokens([]),
    "ids must be a list": tokens(4),
    "ids names more than 100,000 rows": tokens(["0..200000"]),
    "tokens lacks 'ids'": rules(tokens=[{"name": "words"}]),
    "tokens lacks 'name'": rules(tokens=[{"ids": [1]}]),
    "unknown key 'rows' in tokens(.|\n)*here it is called 'ids'": rules(tokens=[{"name": "w", "rows": [1]}]),
    "unknown key 'trainable_token_indices'(.|\n)*here it is called 'tokens'": rules(trainable_token_indices=[1]),
    "tokens must be a list": rules(tokens={"words": [1]}),
    "must be a name of letters": tokens([1], adapter="a b"),
    "bias must be a string": rules(bias=True),
    "bias 'al' is unknown(.|\n)*did you mean 'all'": rules(bias="al"),
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_is_told(words):
    with pytest.raises(RuleError, match=words):
        read_rules(WRONG[words])


def test_schema_says_the_same():
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_schema())
    assert validator.is_valid(tokens([9, "3..6"], adapter="b") | {"bias": "all"})
    assert not validator.is_valid(tokens([-1]))
    assert not validator.is_valid(tokens(["a"]))
    assert not validator.is_valid(rules(bias="some"))

"""Plans with rows of an embedding that are trained alone: what they hold, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lora_fx
from tests.support.wordmodels import WORDS, fill, model, rows_in, rules, trained

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "beyond the end": ({}, rules([3, 20, 25]), r"words +has 20 rows, and not 20, 25"),
    "padding": ({"padding_idx": 3, "tied": False}, rules(), r"row 3 is its padding_idx"),
    "adapted": ({}, rules() | {"rules": [{"match": {"name": ["**.q", "words"]}}]}, r"words +has an adapter"),
    "adapted by another name": ({}, rules() | {"rules": [{"match": {"name": ["**.q", "head"]}}]}, r"head +has an"),
    "trained whole": ({}, rules() | {"train": ["words"]}, r"words.weight +is trained whole"),
    "by several entries": (
        {},
        rules() | {"tokens": [{"name": "words", "ids": [1]}, {"name": "**", "ids": [2]}]},
        "several",
    ),
    "whose": (
        {},
        rules() | {"rules": [{"match": {"name": "**.q"}}, {"match": {"name": "**.k"}, "lora": {"adapter": "b"}}]},
        "does not say whose its rows are",
    ),
    "nobody's": ({}, rules() | {"tokens": [{"name": "words", "ids": [1], "adapter": "c"}]}, "c is none of the rules'"),
}


@pytest.mark.parametrize(("options", "given", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_before_anything_changes(options, given, words):
    caller = model(**options)
    for call in (lora_fx.plan, lora_fx.apply):
        with pytest.raises(lora_fx.RefusedError, match=words):
            call(caller, given)
    assert torch.equal(caller(WORDS), model(**options)(WORDS))


def test_embedding_that_is_not_there_is_named():
    given = rules() | {"tokens": [{"name": "wrods", "ids": [1]}]}
    with pytest.raises(lora_fx.NoMatchError, match=r"tokens matched none of the embeddings\n.*wrods\n.*nearest +words"):
        lora_fx.plan(model(), given)


def test_adapter_is_not_added_to_a_weight_of_which_another_trains_rows():
    tuned = trained()
    for name in ("words", "head"):
        with pytest.raises(lora_fx.RefusedError, match=name):
            lora_fx.add(tuned, {"rules": [{"match": {"name": name}, "lora": {"r": 2}}]}, adapter="b")
    other = lora_fx.apply(model(), {"rules": [{"match": {"name": "words"}, "lora": {"r": 2}}]}, backend="modules")
    with pytest.raises(lora_fx.RefusedError, match="words"):
        lora_fx.add(other, rules(), adapter="b")
    assert len(lora_fx.list_adapters(tuned)) == len(lora_fx.list_adapters(other)) == 1


def test_rows_of_two_adapters_of_one_plan():
    given = {
        "rules": [
            {"match": {"name": "**.q"}, "lora": {"adapter": "a", "r": 2}},
            {"match": {"name": "**.k"}, "lora": {"adapter": "b", "r": 2}},
        ],
        "tokens": [{"name": "words", "ids": ["0..2"], "adapter": "a"}, {"name": "words", "ids": [1], "adapter": "b"}],
    }
    tuned = lora_fx.apply(model(), given, backend="modules")
    assert [tuple(p.shape) for name in "ab" for p in rows_in(tuned, name).values()] == [(2, 6), (1, 6)]
    fill(tuned, "b")
    lora_fx.use(tuned, "a")
    assert torch.equal(tuned(WORDS), model()(WORDS))


def test_saved_plan_has_the_rows():
    plan = lora_fx.plan(model(), rules())
    again = lora_fx.Plan.from_json(plan.to_json())
    assert again == plan
    tuned = lora_fx.apply(model(), again, backend="modules")
    assert len(rows_in(tuned)) == 1
    changed = plan.to_json().replace('"ids": [\n    3,', '"ids": [\n    4,')
    assert changed != plan.to_json()
    with pytest.raises(lora_fx.StalePlanError, match="tokens"):
        lora_fx.apply(model(), lora_fx.Plan.from_json(changed), backend="modules")

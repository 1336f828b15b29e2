"""Rules without a file: a target, a rank and an alpha."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import NoMatchError, RuleError
from lora_fx.rules.reader import read_rules
from lora_fx.rules.short import short_rules


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.up = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 16)

    def forward(self, x):
        return self.up(self.q_proj(x) + self.v_proj(x))


@pytest.fixture
def model():
    return nn.ModuleDict({"a": Block(), "b": Block()})


def chosen(plan):
    return {site.path: (site.lora.r, site.lora.alpha) for site in plan.adapted}


@pytest.mark.parametrize(
    ("short", "expected"),
    [
        ({"r": 4}, {"a.q_proj": (4, 8), "a.v_proj": (4, 8), "b.q_proj": (4, 8), "b.v_proj": (4, 8)}),
        ({"target": "attention"}, dict.fromkeys(("a.q_proj", "a.v_proj", "b.q_proj", "b.v_proj"), (8, 16))),
        ({"target": "attention", "alpha": 3}, dict.fromkeys(("a.q_proj", "a.v_proj", "b.q_proj", "b.v_proj"), (8, 3))),
        ({"target": "*.up", "r": 2, "alpha": 5}, {"a.up": (2, 5), "b.up": (2, 5)}),
        ({"target": ["up"], "r": 2}, {"a.up": (2, 4), "b.up": (2, 4)}),
        ({"target": ["a.q_proj", "v_proj"], "r": 1}, dict.fromkeys(("a.q_proj", "a.v_proj", "b.v_proj"), (1, 2))),
    ],
)
def test_target_rank_and_alpha_stand_for_rules(model, short, expected):
    assert chosen(lora_fx.plan(model, **short)) == expected
    assert chosen(lora_fx.plan(model, read_rules(short_rules(**short).to_dict()))) == expected


def test_model_is_adapted_in_one_line():
    model, x = Block(), torch.randn(2, 8)
    tuned = lora_fx.apply(model, r=2, target="up")
    assert torch.equal(tuned(x), model(x))
    assert [site.path for site in lora_fx.inspect(tuned).sites] == ["up"]


def test_plan_of_a_target_can_be_saved_and_applied(model):
    plan = lora_fx.Plan.from_json(lora_fx.plan(model, target="up", r=2).to_json())
    assert chosen(plan) == {"a.up": (2, 4), "b.up": (2, 4)}
    lora_fx.apply(model, plan, backend="modules")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "nothing says what is to be adapted"),
        ({"rules": "attention", "r": 4}, "r cannot stand beside rules or a plan"),
        ({"rules": "attention", "target": "up", "alpha": 4}, "target and alpha cannot stand beside rules or a plan"),
        ({"r": 0}, "r must be at least 1"),
        ({"r": True}, "r must be an integer"),
        ({"target": []}, "target is an empty list"),
        ({"target": [3]}, "name must be a string"),
        ({"target": 3}, "name must be a string"),
        ({"target": "a.[", "r": 2}, "a.["),
    ],
)
def test_what_stands_for_no_rules_is_refused(model, call, message):
    with pytest.raises(RuleError) as caught:
        lora_fx.plan(model, **call)
    assert message in str(caught.value)


def test_each_target_must_match_something(model):
    with pytest.raises(NoMatchError, match="k_proj"):
        lora_fx.plan(model, target=["q_proj", "k_proj"])


def test_dict_needs_no_version_and_a_wrong_one_is_refused(model):
    rules = {"rules": [{"match": {"name": "*.up"}}]}
    assert lora_fx.plan(model, rules).adapted == lora_fx.plan(model, {"version": 1, **rules}).adapted
    with pytest.raises(RuleError, match="version must be 1"):
        lora_fx.plan(model, {"version": 2, **rules})


def test_a_rank_of_nothing_is_one_problem(model):
    with pytest.raises(RuleError, match="r must be at least 1") as refused:
        lora_fx.plan(model, target="up", r=0)
    assert "problems" not in str(refused.value)

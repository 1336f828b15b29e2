"""Groups of parameters for optimizers: LoRA+, weight decay, one adapter alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_fx
from tests.support.twoadapters import BOTH, DORA, alone, model, two


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(9, 6), nn.LayerNorm((2, 6)), nn.Linear(6, 6)

    def forward(self, ids):
        return self.head(self.norm(self.words(ids)))


RULES = {"version": 1, "rules": [{"match": {"name": "{words,head}"}, "lora": {"r": 2}}], "train": ["norm"]}


def by_name(groups):
    return {group["name"]: group for group in groups}


def test_b_learns_faster_by_the_ratio_and_embeddings_at_a_rate_of_their_own():
    tuned = lora_fx.apply(Small(), RULES)
    groups = by_name(lora_fx.param_groups(tuned, lr=1e-4, lora_plus=16, lr_embedding=3e-6))
    assert {name: group["lr"] for name, group in groups.items()} == {
        "A": 1e-4,
        "B": 16e-4,
        "embedding": 3e-6,
        "rest": 1e-4,
    }
    assert [p.shape for p in groups["B"]["params"]] == [(6, 2)]
    assert len(groups["embedding"]["params"]) == 2


def test_groups_are_those_of_pefts_optimizer():
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    theirs = peft.get_peft_model(copy.deepcopy(Small()), peft.LoraConfig(r=2, target_modules=["words", "head"]))
    made = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    expected = sorted(
        (group["lr"], group["weight_decay"], tuple(p.shape)) for group in made.param_groups for p in group["params"]
    )
    tuned = lora_fx.apply(Small(), {"version": 1, "rules": RULES["rules"]})
    groups = lora_fx.param_groups(tuned, lr=1e-4, lora_plus=16, weight_decay=0.1)
    ours = sorted((group["lr"], group["weight_decay"], tuple(p.shape)) for group in groups for p in group["params"])
    assert ours == expected


def test_biases_norms_and_magnitudes_do_not_decay():
    rules = {"version": 1, "rules": [{"match": {"name": "head"}, "lora": {"r": 2, "dora": True, "bias": True}}]}
    tuned = lora_fx.apply(Small(), {**rules, "train": ["norm"]})
    decays = {
        id(p): group["weight_decay"]
        for group in lora_fx.param_groups(tuned, lr=1.0, weight_decay=0.5)
        for p in group["params"]
    }
    assert {name: decays[id(p)] for name, p in tuned.named_parameters() if id(p) in decays} == {
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "head.bias": 0.0,
        "head.lora_A.default.weight": 0.5,
        "head.lora_B.default.weight": 0.5,
        "head.lora_magnitude_vector.default.weight": 0.0,
    }


def test_every_trained_parameter_is_in_one_group_and_an_optimizer_takes_them():
    tuned = lora_fx.apply(Small(), RULES)
    groups = lora_fx.param_groups(tuned, lr=1e-3, lora_plus=4, weight_decay=0.1)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in lora_fx.parameters(tuned))
    assert len(found) == len(set(found))
    torch.optim.AdamW(groups)


def test_one_adapters_parameters_are_its_own():
    tuned = two()
    own = {id(p) for p in lora_fx.parameters(tuned, "b")}
    assert own == {id(p) for name, p in tuned.named_parameters() if ".b." in name}
    assert {id(p) for g in lora_fx.param_groups(tuned, "b", lr=1.0) for p in g["params"]} == own


def test_what_is_frozen_is_not_given_and_not_counted():
    tuned = alone(BOTH, "a")
    before = lora_fx.inspect(tuned).trainable
    lora_fx.add(tuned, alone(DORA, "b"), adapter="b", trainable=False)
    given = [p for group in lora_fx.param_groups(tuned, lr=1.0) for p in group["params"]]
    assert {id(p) for p in given} == {id(p) for p in lora_fx.parameters(tuned, "default")}
    assert lora_fx.inspect(tuned).trainable == before
    with pytest.raises(ValueError, match="nothing that is trained requires a gradient"):
        lora_fx.param_groups(tuned, "b", lr=1.0)


@pytest.mark.parametrize(
    "bad", [{"lr": 0}, {"lr": float("nan")}, {"lr": 1.0, "lora_plus": -1}, {"lr": 1.0, "weight_decay": -1}]
)
def test_rates_that_cannot_be_are_errors(bad):
    with pytest.raises(ValueError, match="rates must be positive"):
        lora_fx.param_groups(alone(BOTH, "a"), **bad)


def test_a_name_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="no adapter is called 'c'; there are a, b"):
        lora_fx.parameters(two(), "c")
    with pytest.raises(lora_fx.RefusedError):
        list(lora_fx.parameters(model()))


def test_modules_trained_whole_belong_to_the_adapter_that_trains_them():
    tuned = lora_fx.apply(Small(), RULES)
    assert len(list(lora_fx.parameters(tuned, "default"))) == len(list(lora_fx.parameters(tuned)))
    own = {id(parameter) for parameter in lora_fx.parameters(tuned)}
    lora_fx.add(tuned, RULES, adapter="b")
    assert {id(parameter) for parameter in lora_fx.parameters(tuned, "default")} == own
    added = {name for name, p in tuned.named_parameters() if id(p) in {id(q) for q in lora_fx.parameters(tuned, "b")}}
    assert len(added) == len(own)
    assert all(".b." in name for name in added)

"""recipe: rules and a rate for each task that is known, with reasons and sources; others are refused by name."""

from __future__ import annotations

import math

import pytest
import torch
import yaml
from torch import nn

import lora_fx
from lora_fx.errors import RefusedError
from lora_fx.planning.recipes import NOT_FOR, TASKS, RateProbe
from tests.support.zoo import Encoder, Mlp

transformers = pytest.importorskip("transformers")
SMALL = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
}  # fmt: skip


def llama() -> nn.Module:
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def bert() -> nn.Module:
    with torch.device("meta"):
        return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))


def test_a_language_model_gets_adapters_on_all_linear_layers_of_its_blocks_and_ten_times_the_rate():
    made = lora_fx.recipe(llama(), "instruction")
    plan = lora_fx.plan(llama(), made.rules)
    assert {site.path.rpartition(".")[2] for site in plan.adapted} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert {(site.lora.r, site.lora.alpha) for site in plan.adapted} == {(32, 32)}
    assert math.isclose(made.lr, 2e-4)
    assert made.probe is None
    assert f"{plan.trainable:,} parameters" in str(made)


@pytest.mark.parametrize("task", TASKS)
def test_each_setting_has_a_reason_and_a_source(task):
    model = bert()
    made = lora_fx.recipe(model, task)
    assert made.task == task
    assert all(one.why and one.source and one.value for one in made.choices)
    assert {"sites", "r", "alpha", "lr", "init"} <= {one.name for one in made.choices}
    for one in made.choices:
        assert one.why in str(made)
        assert one.source in str(made)
    assert math.isclose(made.lr, 10 * TASKS[task].full_lr)
    assert lora_fx.plan(model, yaml.safe_load(made.to_yaml())).trainable == lora_fx.plan(model, made.rules).trainable


def test_a_classifier_trains_its_head_whole_and_a_diffusion_model_its_attention():
    plan = lora_fx.plan(bert(), lora_fx.recipe(bert(), "classification").rules)
    assert [module.path for module in plan.train] == ["classifier"]
    assert {site.lora.alpha for site in plan.adapted} == {32}
    images = lora_fx.plan(bert(), lora_fx.recipe(bert(), "text-to-image").rules)
    assert {site.path.split(".")[4] for site in images.adapted} == {"attention"}
    assert {(site.lora.r, site.lora.alpha) for site in images.adapted} == {(4, 4)}
    with pytest.raises(RefusedError, match="no head that is known by its name"):
        lora_fx.recipe(Mlp(64), "classification")
    with pytest.raises(RefusedError, match="no attention that can be adapted"):
        lora_fx.recipe(Mlp(64), "text-to-image")


def test_the_rate_of_full_fine_tuning_can_be_given_and_narrow_models_get_a_lower_rank():
    made = lora_fx.recipe(Encoder(), "instruction", full_lr=3e-5)
    assert math.isclose(made.lr, 3e-4)
    lora = made.rules.rules[0].lora
    assert (lora.r, lora.alpha) == (16, 32)  # the layers are 16 wide; with alpha / r, alpha stays
    assert "which was given" in str(made)
    assert "above the width of most layers" in str(made)


def test_experts_are_told_that_their_rank_is_divided():
    with torch.device("meta"):
        config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
        mixtral = transformers.MixtralForCausalLM(config)
    inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    assert "experts" in {one.name for one in lora_fx.recipe(mixtral, "instruction", inputs).choices}
    assert "experts" not in {one.name for one in lora_fx.recipe(llama(), "instruction").choices}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("instructions", r"no recipe for 'instructions'[\s\S]*did you mean 'instruction'"),
        ("poetry", r"no recipe for 'poetry'[\s\S]*classification[\s\S]*take one of these"),
        (None, "no recipe for None"),
        *((task, f"no recipe for '{task}'[\\s\\S]*LoRA learns less") for task in NOT_FOR),
    ],
)
def test_other_tasks_are_refused_with_those_that_are_known(task, message):
    with pytest.raises(RefusedError, match=message):
        lora_fx.recipe(nn.Linear(3, 3), task)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"full_lr": 0}, ValueError, "full_lr has 0"),
        ({"full_lr": True}, ValueError, "full_lr has True"),
        ({"rates": [1e-3, float("inf")], "data": []}, ValueError, "rates has inf"),
        ({"rates": []}, ValueError, "rates is empty"),
        ({"rates": [1e-3]}, ValueError, "loss and rates are for data"),
        ({"loss": print}, ValueError, "loss and rates are for data"),
        ({"data": [(torch.zeros(2, 16),)]}, RefusedError, "probing needs 4 batches or more"),
    ],
)
def test_bad_numbers_and_too_little_data_are_refused(given, kind, message):
    with pytest.raises(kind, match=message):
        lora_fx.recipe(Mlp(), "instruction", **given)


def test_a_probe_tells_its_best_rate_and_whether_it_is_at_the_edge():
    probe = RateProbe((1e-4, 1e-3, 1e-2), (0.5, 0.4, math.nan), 0.7, 6, 1, "all in one batch")
    assert probe.best == 1e-3
    assert (
        str(probe).splitlines()[0] == "3 rates, 6 steps each, all in one batch; loss on 1 batch held out, 0.7000 before"
    )
    assert "diverged" in str(probe)
    assert "probe further" not in str(probe)
    assert "probe further" in str(RateProbe((1e-4, 1e-3), (0.5, 0.4), 0.7, 6, 2, "all in one batch"))

"""What a plan says that each optimisation will do to a block, or why not, is what it does."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.planning.plan import Plan
from tests.support import zoo
from tests.support.paddedmodels import bert, in_float32, padded

BY_NAME = ("attention", "halve", "liveness", "loss")
ASKED = ("stack", "recompute", *BY_NAME)


def rules(**lora: Any) -> dict[str, Any]:
    return {"version": 1, "rules": [{"match": {"name": "**.layer.**"}, "lora": {"r": 2, **lora}}]}


def inputs() -> dict[str, torch.Tensor]:
    given = padded()
    return {**given, "labels": torch.where(given["attention_mask"].bool(), given["input_ids"], -100)}


def foreseen(plan: Plan) -> list[dict[str, str]]:
    return [{one.name: one.reason for one in region.by_name} for region in plan.regions]


def stepped(model: nn.Module, plan: Plan) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = lora_fx.apply(model, plan, optimise=ASKED).train()
        tuned(**inputs()).loss.backward()
    return tuned


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return in_float32(lambda: bert("BertForMaskedLM"))


def test_what_is_foreseen_of_blocks_and_sites_is_done(model: nn.Module) -> None:
    plan = lora_fx.plan(model, rules(), inputs())
    report = lora_fx.inspect(stepped(model, plan))
    for told, region in zip(foreseen(plan), report.regions, strict=True):
        assert set(told.values()) == {""}
        assert told.keys() - {"compile"} == set(region.optimised) - {"stack", "recompute"}
    assert [set(told) - set(foreseen(plan)[0]) for told in foreseen(plan)] == [set(), set(), {"labels"}]
    heads = [site.path for site in plan.sites if "loss" in site.passes]
    assert heads == [late.path for late in report.late] == ["cls.predictions.decoder"]
    assert Plan.from_json(plan.to_json()) == plan
    assert "by name: bert.encoder.layer.2: attention, compile, halve, labels, liveness" in str(plan)


def test_why_something_is_not_done_is_foreseen_in_the_same_words(model: nn.Module) -> None:
    plan = lora_fx.plan(model, rules(dropout=0.1), inputs())
    last, report = foreseen(plan)[2], lora_fx.inspect(stepped(model, plan)).regions[2]
    told = {f"{name}: {last[name]}" for name in ("labels", "liveness")}
    assert told == set(report.given_up)
    assert last["attention"] == last["compile"] == ""


def test_of_each_site_it_is_told_what_is_done_and_why_not() -> None:
    def told(path: str) -> list[str]:
        lines = lora_fx.explain(zoo.Gpt(), path, zoo.rules(r=2), (zoo.tokens(2, 6),)).splitlines()
        return [line.strip() for line in lines if line.startswith(("  in training: ", "  by name"))]

    assert (
        told("h.0.c_attn")[0] == "in training: fuse, recompute; no stack (no other adapted layer multiplies its input)"
    )
    assert told("h.0.c_proj")[0].startswith("in training: fuse; no stack (no other adapted layer multiplies its input)")
    assert told("h.0.c_proj")[1].startswith("by name, to h.0: ")
    assert "no liveness (" in told("h.0.c_proj")[1]

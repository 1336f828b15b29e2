"""Adapters that PEFT reads and writes compute the same there and here."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import AdapterMismatchError
from lora_fx.files.adapter.names import target_modules
from lora_fx.files.adapter.patterns import Patterns
from tests.files.adapter.test_adapter_files import MIXED, adapted, logits, model
from tests.files.adapter.test_wrong_adapters import rewrite
from tests.support import zoo
from tests.support.zoo import rules


def test_list_of_targets_never_claims_another_module():
    modules = ["lin", "block.lin", "block.other"]
    assert target_modules(["block.other"], modules) == ["block.other"]
    assert target_modules(["lin"], modules) == "^(lin)$"


def test_patterns_are_read_as_peft_reads_them():
    patterns = {"^a.b": 2, "b": 3, "x|c.y$": 4, r"^e\.\d+$": 5}
    paths = ("a.b", "c.b", "c.d", "x", "a.c.y", "x.a", "e.12", "a.e.1")
    assert [Patterns(patterns).value(path, 8) for path in paths] == [2, 3, 8, 4, 4, 8, 5, 8]


def test_hostile_pattern_in_a_file_costs_no_more_than_another():
    assert Patterns({"(a|a)*b": 4}).value("a" * 200, 8) == 8


PEFT_CASES = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["query", "value"]},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["output"]},
    "dora": {"r": 3, "use_dora": True, "target_modules": ["query", "intermediate"]},
    "dora-rslora-bias": {
        "r": 3,
        "use_dora": True,
        "use_rslora": True,
        "bias": "lora_only",
        "target_modules": ["query"],
    },
    "patterns": {
        "r": 4,
        "target_modules": ["query", "dense"],
        "rank_pattern": {"layer.1.attention.query": 2, r"^layer\.[02]\.attention\.dense": 3},
        "alpha_pattern": {"dense": 32},
    },
    "expression": {"r": 2, "target_modules": r".*\.(key|output)"},
    "heads": {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"]},
    "ends-of-names": {"r": 2, "target_modules": ["query"], "modules_to_save": ["norm1", "classifier", "score"]},
    "bias": {"r": 2, "target_modules": ["query"], "bias": "lora_only"},
    "bias of lora_B": {
        "r": 2,
        "use_rslora": True,
        "lora_bias": True,
        "target_modules": ["query", "dense"],
        "alpha_pattern": {"dense": 3},
    },
}


def jitter(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("case", PEFT_CASES)
@pytest.mark.filterwarnings("ignore")
def test_adapter_that_peft_wrote_computes_the_same_here(case, tmp_path):
    theirs = peft.get_peft_model(model(), peft.LoraConfig(**PEFT_CASES[case]))
    jitter(theirs)
    theirs.save_pretrained(tmp_path)
    ours = lora_fx.load(model(), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs.eval()), rtol=1e-5, atol=1e-5)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(logits(lora_fx.merge(ours)), logits(merged), rtol=1e-5, atol=1e-5)


def test_module_that_peft_would_have_saved_and_the_file_has_not_is_named(tmp_path):
    peft.get_peft_model(model(), peft.LoraConfig(**PEFT_CASES["heads"])).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop("base_model.model.classifier.bias"))
    with pytest.raises(AdapterMismatchError) as caught:
        lora_fx.load(model(), tmp_path)
    assert caught.value.mismatches == (("classifier.bias", "missing", "[5]"),)


OUR_CASES = {
    "plain": rules("**.{query,value}"),
    "mixed": MIXED,
    "dora": rules("**.query", dora=True),
    "bias": rules("**.{query,output}", bias=True),
    "rslora": rules("**.output", rslora=True),
}


@pytest.mark.parametrize("case", OUR_CASES)
@pytest.mark.filterwarnings("error:Found missing adapter keys", "ignore:.*:DeprecationWarning")
def test_adapter_that_we_wrote_computes_the_same_in_peft(case, tmp_path):
    ours = adapted(OUR_CASES[case])
    lora_fx.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(model(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_root_level_name_that_peft_would_match_elsewhere_is_pinned(tmp_path):
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.inner = nn.Linear(16, 16), zoo.Mlp()

        def forward(self, x):
            return self.inner(self.fc1(x))

    torch.manual_seed(0)
    base = Nested().eval()
    ours = lora_fx.apply(base, rules("fc1", init="random"), backend="modules")
    lora_fx.save(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(theirs(zoo.features(2, 3)), ours(zoo.features(2, 3)), rtol=1e-5, atol=1e-5)

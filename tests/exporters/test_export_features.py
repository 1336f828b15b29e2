"""What an adapted model has, as the targets of export count it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapters.attach import all_attached
from lora_fx.exporters.gguf import LAYOUTS
from lora_fx.exporters.gguf import _reason as gguf_reason
from lora_fx.exporters.target import features as features_of
from tests.support.zoo import rules


class BiasOfItsOwn(nn.Module):
    """A raw matrix beside a bias that belongs to no site."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return x @ self.w + self.bias


@pytest.mark.parametrize(
    ("layer", "name", "trained"),
    [(nn.Linear(6, 6), "0", True), (nn.Linear(6, 6, bias=False), "0", False), (BiasOfItsOwn(), "0.w", False)],
    ids=["bias", "no bias", "a bias of no site"],
)
def test_model_has_trained_biases_where_a_rule_trains_one(layer, name, trained):
    tuned = lora_fx.apply(nn.Sequential(layer), rules(name, bias=True), (torch.randn(2, 6),), backend="modules")
    assert [path for feature, path in features_of(tuned) if feature == "bias"] == [name] * trained
    llama = LAYOUTS["LlamaForCausalLM"]
    reasons = [gguf_reason(path, adapter, llama, False) for path, adapter in all_attached(tuned)]
    assert ["an adapter in GGUF holds no biases" in str(reason) for reason in reasons] == [trained]

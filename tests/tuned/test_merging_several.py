"""What a merge makes of several adapters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from tests.support.twoadapters import BACKENDS, given, model, pairs, two


@BACKENDS
@pytest.mark.parametrize("chosen", ["b", ["a", "b"], {"a": 0.5, "b": -1.0}])
def test_a_merge_folds_what_is_in_use(inputs, chosen):
    tuned = two(inputs)
    lora_fx.use(tuned, chosen)
    merged = lora_fx.merge(tuned)
    assert set(merged.state_dict()) == set(model().state_dict())
    assert torch.allclose(merged(given()), tuned(given()), atol=1e-6)
    if chosen == "b":
        assert torch.equal(merged.blocks[0].q.weight, model().blocks[0].q.weight)


def test_five_adapters_in_bfloat16_are_rounded_once():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16))
    rules = {"version": 1, "rules": [{"match": {"name": "0"}, "lora": {"r": 2, "init": "random"}}]}
    tuned = lora_fx.apply(layer, rules, backend="modules")
    for number in range(4):
        lora_fx.add(tuned, rules, adapter=f"a{number}")
    lora_fx.use(tuned, [adapter.name for adapter in lora_fx.list_adapters(tuned)])
    exact = layer[0].weight.detach().double()
    for A, B in (pair for one in lora_fx.list_adapters(tuned) for pair in pairs(tuned, one.name)):
        exact = exact + 8.0 * B.double() @ A.double()
    half_a_step = 2.0 ** (torch.frexp(exact).exponent - 9)  # bfloat16 has 8 bits
    error = (lora_fx.merge(tuned)[0].weight.double() - exact).abs()
    assert (error <= half_a_step + 1e-6).all()


def test_without_an_adapter_in_use_there_is_nothing_to_merge():
    tuned = two()
    lora_fx.use(tuned, None)
    with pytest.raises(lora_fx.MergeError, match=r"no adapter is in use.*\n.*lora_fx.remove"):
        lora_fx.merge(tuned)

"""Several adapters on banks of experts, in all ways in which transformers runs them, and in half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

pytest.importorskip("transformers")

import lora_fx
from lora_fx.adapters.rawweight import known_experts
from lora_fx.adapters.rawweight.experts import routed_experts
from tests.support.moe import FEW_CROSSED, IDS, IMPLEMENTATIONS, model, rules, two

EXPERTS = rules("**.experts.*_proj")


def logits(tuned: nn.Module, ids: Tensor = IDS) -> Tensor:
    result: Tensor = tuned(input_ids=ids, use_cache=False).logits
    return result


@FEW_CROSSED
def test_what_is_used_of_several_adapters_on_banks_is_what_is_merged(implementation: str, kind: str):
    tuned = two(implementation, EXPERTS, rules("**.experts.*_proj", "**.q_proj", r=4, share="outer"), kind)
    base = logits(model(implementation, kind))
    for chosen in ("a", "b", ["a", "b"], {"a": 0.5, "b": -1.0}, None):
        lora_fx.use(tuned, chosen)
        result = logits(tuned)
        assert_close(result, logits(lora_fx.merge(tuned)) if chosen else base, atol=1e-4, rtol=1e-4)
        assert torch.equal(result, base) == (chosen is None)
        with torch.no_grad():
            assert_close(logits(tuned), result, atol=1e-5, rtol=1e-4)


@IMPLEMENTATIONS
def test_combined_swapped_and_dropped_adapters_of_banks(implementation: str, tmp_path: Any):
    tuned = two(implementation, EXPERTS, rules("**.experts.*_proj", r=3, share="A"))
    weights = {"a": 1.0, "b": 0.5}
    lora_fx.use(tuned, weights)
    wanted = logits(tuned)
    for method in ("cat", "svd"):
        options = {"r": 5} if method == "svd" else {}
        lora_fx.combine(tuned, weights, adapter=method, method=method, **options)
        lora_fx.use(tuned, method)
        assert_close(logits(tuned), wanted, atol=1e-4, rtol=1e-4)
    lora_fx.save(tuned, tmp_path, adapter="cat")
    lora_fx.add(tuned, tmp_path, adapter="again")
    lora_fx.use(tuned, "again")
    assert_close(logits(tuned), wanted, atol=1e-4, rtol=1e-4)
    lora_fx.swap(tuned, tmp_path, adapter="svd")
    lora_fx.drop(tuned, "a")
    lora_fx.use(tuned, "svd")
    assert_close(logits(tuned), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("implementation", "dtype"), [("eager", torch.float16), ("grouped_mm", torch.bfloat16)], ids=str
)
def test_experts_of_mixtral_are_one_operation_in_half_precision_whose_router_is_in_float32(
    implementation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    calls: list[torch.dtype] = []

    def counted(facts: Any, routing: Any, x: Tensor, weights: Tensor, banks: Any) -> Tensor:
        calls.append(weights.dtype)
        return routed_experts(facts, routing, x, weights, banks)

    base = model(implementation).to(dtype)
    tuned = lora_fx.apply(base, EXPERTS | {"rules": [{**EXPERTS["rules"][0], "lora": {"r": 2}}]}, {"input_ids": IDS})
    monkeypatch.setattr(known_experts, "routed_experts", counted)
    assert torch.equal(logits(tuned), logits(base.requires_grad_(False)))
    assert len(calls) >= 2
    assert set(calls) == {torch.float32}
    factors = list(lora_fx.parameters(tuned))
    with torch.no_grad():
        for factor in factors:
            factor.copy_(torch.randn(factor.shape, generator=torch.Generator().manual_seed(factor.numel())) * 0.3)
    results = []
    for apart in (False, True):
        with monkeypatch.context() as patch:
            if apart:
                patch.setattr("lora_fx.adapters.layers.experts_output", lambda *_: None)
            output = tuned.model.layers[1].mlp(HIDDEN.to(dtype).requires_grad_())
            results.append([output, *torch.autograd.grad(output.float().sin().sum(), factors[4:])])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= 0.03 * other.abs().max()


HIDDEN = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(4))

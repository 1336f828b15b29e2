"""Quantised bases: adapters train on them, merging gives plain weights, and quantising again says what it takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import LoraFxWarning, MergeError
from lora_fx.models.quantised import is_quantised
from lora_fx.tuned.requantise import merged_and_requantised
from tests.support.exporting import rule, tuned_of, written
from tests.support.kinds import OUTPUT, distance
from tests.support.zoo import randomise_

torchao = pytest.importorskip("torchao")

from torchao.quantization import (  # noqa: E402
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)

KINDS = {"int8": Int8WeightOnlyConfig(), "int4": IntxWeightOnlyConfig(torch.int4), "float8": Float8WeightOnlyConfig()}
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
each_kind = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    quantize_(model, KINDS[kind])
    return model


def adapted(kind: str, **lora: object) -> nn.Module:
    return tuned_of(base(kind), written(rule("*", r=4, alpha=8, **lora)), (X,), "auto")


def out(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(X)


@each_kind
def test_adapter_changes_nothing_until_training(kind):
    model = base(kind)
    assert torch.equal(out(lora_fx.apply(model, written(rule("*", r=4)), (X,))), out(model))


@each_kind
@pytest.mark.parametrize("dora", [False, True])
def test_merging_gives_plain_weights_that_compute_the_same(kind, dora):
    tuned = adapted(kind, dora=dora)
    merged = lora_fx.merge(tuned)
    assert all(
        type(parameter) is nn.Parameter and parameter.dtype == torch.float32 for parameter in merged.parameters()
    )
    assert distance(out(merged), out(tuned)) < OUTPUT


@each_kind
def test_removing_gives_the_quantised_base(kind):
    removed = lora_fx.remove(adapted(kind))
    assert is_quantised(removed[0].weight)
    assert torch.equal(out(removed), out(base(kind)))


@each_kind
def test_adapter_is_saved_and_loaded_on_the_quantised_base(kind, tmp_path):
    tuned = adapted(kind)
    lora_fx.save(tuned, tmp_path)
    assert torch.equal(out(lora_fx.load(base(kind), tmp_path)), out(tuned))


@each_kind
def test_quantising_again_is_done_on_request_and_tells_its_cost(kind):
    tuned = adapted(kind)
    with pytest.warns(LoraFxWarning, match=r"of the adapter's change"):
        again = lora_fx.merge(tuned, requantize=lambda module: quantize_(module, KINDS[kind]))
    assert is_quantised(again[0].weight)
    model, costs = merged_and_requantised(tuned, lambda module: quantize_(module, KINDS[kind]))
    assert torch.equal(out(model), out(again))
    assert [cost.path for cost in costs] == ["0", "2"]
    exact = lora_fx.merge(tuned)[0].weight
    assert costs[0].largest == float((model[0].weight.dequantize() - exact).abs().max()) > 0
    assert 0 < costs[0].share < 0.5


def test_quantising_again_needs_something_that_was_quantised():
    plain = tuned_of(nn.Sequential(nn.Linear(64, 32)), written(rule("*")), (X,))
    with pytest.raises(MergeError, match="nothing to quantise again"):
        lora_fx.merge(plain, requantize=lambda module: module)


def test_function_that_does_not_quantise_is_an_error():
    with pytest.raises(MergeError, match="as plain as before") as caught:
        lora_fx.merge(adapted("int8"), requantize=lambda module: module)
    assert [path for path, _ in caught.value.problems] == ["0"]


def test_merged_export_has_no_quantised_weight_left_and_is_verified(tmp_path):
    tuned = tuned_of(
        base("int8"), written(rule("0", r=4, alpha=8)), (X,)
    )  # the other layer is quantised and not adapted
    result = lora_fx.export(tuned, tmp_path / "x", "merged", (X,), verify=True)
    assert result.difference < 1e-5


def test_only_the_adapter_trains():
    tuned = lora_fx.apply(base("int8"), written(rule("*", r=4)), (X,)).train()
    randomise_(tuned)
    tuned(X).sum().backward()
    assert all(parameter.grad is not None for parameter in lora_fx.parameters(tuned))
    assert all("lora" in name for name, parameter in tuned.named_parameters() if parameter.grad is not None)

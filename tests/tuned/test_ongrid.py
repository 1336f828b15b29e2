"""Merged into quantised weights, an adapter keeps its effect where the inputs of its layers leave room for it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.adapters.factors.rounding import Moment, guided_codes
from lora_fx.errors import LoraFxWarning, MergeError, RefusedError
from lora_fx.models.grids import Grid, codes_of, grid_of, with_codes
from lora_fx.models.quantised import is_quantised
from lora_fx.tuned import moments
from lora_fx.tuned.ongrid import merged_on_grid
from tests.support.exporting import rule, written

torchao = pytest.importorskip("torchao")

from torchao.quantization import (  # noqa: E402
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
INT4 = IntxWeightOnlyConfig(torch.int4, granularity=PerGroup(32))
WIDTH = 128


def inputs(rows: int, decay: float, seed: int) -> torch.Tensor:
    """Return rows whose variance falls with the direction, as k^-decay; the directions are the same for all seeds."""
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)))[0]
    spread = torch.arange(1, WIDTH + 1).float() ** (-decay / 2)
    return (torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)) * spread) @ turn


def batches(decay: float) -> list[tuple[torch.Tensor]]:
    return [(inputs(512, decay, seed),) for seed in range(4)]


def base(config: object = INT4, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 64)).to(dtype).eval()
    quantize_(model, config)
    return model


def trained(decay: float, config: object = INT4, steps: int = 7, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a quantised model whose adapters were trained a little towards other weights."""
    (x,) = batches(decay)[0]
    x = x.to(dtype)
    tuned = lora_fx.apply(base(config, dtype), written(rule("*", r=4, alpha=4)), (x,)).train()
    with torch.no_grad():
        goal = tuned(x) + 0.05 * x @ torch.randn(WIDTH, 64, generator=torch.Generator().manual_seed(5)).to(dtype)
    optimizer = torch.optim.Adam(lora_fx.parameters(tuned), 2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (tuned(x) - goal).square().mean().backward()
        optimizer.step()
    return tuned.eval()


def distance_of(model: nn.Module, tuned: nn.Module, decay: float) -> float:
    """Return how far a model is from the adapted one on rows that nobody has seen, over how far the base is."""
    x = inputs(256, decay, 99)
    with torch.no_grad(), lora_fx.disabled(tuned):
        plain = tuned(x)
    with torch.no_grad():
        return float((model(x) - tuned(x)).norm() / (plain - tuned(x)).norm())


def test_what_the_nearest_codes_lose_is_kept_by_those_that_are_chosen_by_inputs():
    tuned = trained(2.0)
    model, sites = merged_on_grid(tuned, batches(2.0))
    assert [site.path for site in sites] == ["0", "2"]
    assert all(site.nearest < 0.1 for site in sites)
    assert all(site.kept > 0.7 for site in sites)
    assert all(0 < site.changed < 0.5 for site in sites)
    assert distance_of(model, tuned, 2.0) < 0.3
    nearest = base()
    for layer, exact in zip(nearest[::2], lora_fx.merge(tuned)[::2], strict=True):
        codes = grid_of(layer.weight).nearest(exact.weight)
        layer.weight = nn.Parameter(with_codes(layer.weight, codes), requires_grad=False)
    assert distance_of(nearest, tuned, 2.0) > 0.9


def test_the_merged_model_has_the_scales_of_its_base_and_the_adapted_one_is_as_before():
    tuned = trained(2.0)
    before = {name: tensor.clone() for name, tensor in lora_fx.adapter_state(tuned).items()}
    model, sites = merged_on_grid(tuned, batches(2.0))
    for site in sites:
        weight, old = model.get_submodule(site.path).weight, base().get_submodule(site.path).weight
        assert is_quantised(weight)
        assert type(weight) is type(old)
        assert torch.equal(weight.scale, old.scale)
        assert site.changed == float((codes_of(weight) != codes_of(old)).float().mean())
        assert (codes_of(weight).min(), codes_of(weight).max()) >= (-8, -8)
        assert codes_of(weight).max() <= 7
    assert all(torch.equal(before[name], tensor) for name, tensor in lora_fx.adapter_state(tuned).items())
    assert torch.equal(lora_fx.remove(tuned)(inputs(5, 2.0, 1)), base()(inputs(5, 2.0, 1)))
    assert not any(module._forward_pre_hooks for module in (*tuned.modules(), *model.modules()))


def test_where_inputs_vary_in_all_directions_it_is_said_that_the_grid_cannot_hold_the_adapter():
    tuned = trained(0.0)
    with pytest.warns(LoraFxWarning, match=r"cannot hold the adapter at 2 of 2 weights[^|]*\n *0 +\d+% of the"):
        _, sites = merged_on_grid(tuned, batches(0.0))
    assert sites[0].kept < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_hold_it_in_any_dtype(dtype):
    tuned = trained(1.0, Int8WeightOnlyConfig(), dtype=dtype)
    model, sites = merged_on_grid(tuned, [(x.to(dtype),) for (x,) in batches(1.0)])
    assert all(site.kept >= site.nearest for site in sites)
    assert all(site.kept > 0.8 for site in sites)
    assert model[0].weight.dtype == dtype


def test_adapter_that_changes_nothing_changes_no_code():
    tuned = lora_fx.apply(base(), written(rule("*", r=4)), batches(1.0)[0])
    _, sites = merged_on_grid(tuned, batches(1.0))
    assert [(site.kept, site.changed) for site in sites] == [(1.0, 0.0), (1.0, 0.0)]


def test_layers_are_noted_in_several_runs_where_their_moments_are_too_large_together(monkeypatch):
    tuned = trained(2.0)
    monkeypatch.setattr(moments, "_BYTES", 1)
    _, sites = merged_on_grid(tuned, batches(2.0))
    assert all(site.kept > 0.7 for site in sites)


def test_only_the_adapters_that_are_named_are_merged():
    tuned = trained(2.0)
    lora_fx.add(tuned, written(rule("2", r=4, alpha=1, init="random")), adapter="other")
    _, one = merged_on_grid(tuned, batches(2.0))
    _, both = merged_on_grid(tuned, batches(2.0), adapters=["default", "other"])
    assert one[0] == both[0]
    assert one[1] != both[1]


def test_codes_that_are_not_written_one_by_one_are_refused_by_name():
    tuned = lora_fx.apply(base(Float8WeightOnlyConfig()), written(rule("*", r=4)), batches(1.0)[0])
    with pytest.raises(RefusedError, match="nothing was merged") as caught:
        merged_on_grid(tuned, batches(1.0))
    assert str(caught.value).count("a Float8Tensor, whose codes are not written one by one") == 2


def test_plain_models_single_batches_and_layers_out_of_reach_are_errors():
    plain = lora_fx.apply(nn.Sequential(nn.Linear(WIDTH, 4)), written(rule("*")), batches(1.0)[0])
    with pytest.raises(MergeError, match="nothing to quantise again"):
        merged_on_grid(plain, batches(1.0))
    with pytest.raises(RefusedError, match="1, where two are needed"):
        merged_on_grid(trained(1.0, steps=1), batches(1.0)[:1])
    tuned = trained(1.0, steps=1)
    empty = (torch.zeros(0, WIDTH),)
    with pytest.raises(RefusedError, match="does not reach"):
        merged_on_grid(tuned, [empty, empty])


def test_codes_of_independent_inputs_and_those_of_values_on_the_grid_are_the_nearest():
    torch.manual_seed(0)
    grid = Grid(torch.rand(6, 40) + 0.5, torch.zeros(6, 40), -8, 7)
    target, independent, mixed = torch.randn(6, 40) * 3, Moment(), Moment()
    independent.add(torch.diag(torch.rand(40) + 0.1))
    mixed.add(torch.randn(100, 40) @ torch.randn(40, 40))
    assert torch.equal(guided_codes(target, grid, independent), grid.nearest(target))
    codes = torch.randint(-8, 8, (6, 40)).float()
    assert torch.equal(guided_codes(grid.values(codes), grid, mixed), codes)
    assert mixed.size(grid.values(guided_codes(target, grid, mixed)) - target) < mixed.size(
        grid.values(grid.nearest(target)) - target
    )


def test_a_grid_is_that_of_the_weight_or_none():
    weight = base()[0].weight
    grid = grid_of(weight)
    assert torch.equal(grid.values(codes_of(weight)), weight.dequantize())
    assert torch.equal(with_codes(weight, codes_of(weight)).dequantize(), weight.dequantize())
    assert grid_of(torch.randn(4, 4)) is None
    wrong = copy.deepcopy(weight)
    wrong.block_size = (1, 64)
    assert grid_of(wrong) is None

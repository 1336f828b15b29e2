"""Merged onto GGUF's Q4_0 or the codes of compressed-tensors, an adapter keeps its effect; others read the same codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import LoraFxWarning, MergeError, RefusedError
from lora_fx.models.grids import q4_0_grid
from lora_fx.models.packed import held_weight
from lora_fx.tuned.ongrid import merged_on_grid
from tests.support.codedmodels import INT4, compress_, copied, numbers
from tests.support.exporting import rule, written

gguf = pytest.importorskip("gguf")
WIDTH = 128


def q4_0(weight: torch.Tensor) -> np.ndarray:
    return gguf.quantize(weight.detach().float().numpy(), gguf.GGMLQuantizationType.Q4_0)


def values(blocks: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0))


def inputs(rows: int, decay: float, seed: int) -> torch.Tensor:
    """Return rows whose variance falls with the direction, as k^-decay; the directions are the same for all seeds."""
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)))[0]
    spread = torch.arange(1, WIDTH + 1).float() ** (-decay / 2)
    return (torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)) * spread) @ turn


def batches(decay: float, dtype: torch.dtype) -> list[tuple[torch.Tensor]]:
    return [(inputs(512, decay, seed).to(dtype),) for seed in range(4)]


def tuned_on(decay: float, dtype: torch.dtype = torch.float32, on_grid: bool = True) -> nn.Module:
    """Return a model with an adapter as training gives it: A lies where the inputs do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 64)).eval()
    if on_grid:
        for layer in model[::2]:
            layer.weight.data = values(q4_0(layer.weight))
    return adapted(model.to(dtype), decay, dtype)


def adapted(model: nn.Module, decay: float, dtype: torch.dtype) -> nn.Module:
    """Return the model with adapters of ‖ΔW‖ = 0.02 ‖W‖ on inputs of a decay."""
    x = inputs(64, decay, 7).to(dtype)
    tuned = lora_fx.apply(model, written(rule("*", r=4, alpha=4)), (x,))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer, rows in ((tuned[0], x), (tuned[2], torch.tanh(lora_fx.remove(tuned)[0](x)))):
            layer.lora_A.default.weight.copy_(torch.randn(4, 64, generator=generator) @ rows.float() / 8)
            layer.lora_B.default.weight.copy_(torch.randn(layer.out_features, 4, generator=generator))
            change = layer.lora_B.default.weight @ layer.lora_A.default.weight
            layer.lora_B.default.weight.mul_(0.02 * held_weight(layer, "weight").float().norm() / change.norm())
    return tuned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_is_what_llama_cpps_quantiser_makes_of_the_merged_model(dtype: torch.dtype):
    tuned = tuned_on(2.0, dtype)
    model, sites = merged_on_grid(tuned, batches(2.0, dtype), grid="q4_0")
    assert [site.path for site in sites] == ["0", "2"]
    assert all(site.nearest <= 0.1 and site.kept >= 0.7 for site in sites), sites
    x = inputs(256, 2.0, 99)
    exact, base = lora_fx.merge(tuned), lora_fx.remove(tuned)
    for path in ("0", "2"):
        weight, before = model.get_submodule(path).weight, base.get_submodule(path).weight
        assert type(model.get_submodule(path)) is nn.Linear
        assert weight.dtype is dtype
        held = values(q4_0(weight))
        assert torch.equal(held.to(dtype), weight), "GGUF's quantiser finds the same codes and scales"
        assert torch.equal(q4_0_grid(weight).scale, q4_0_grid(before).scale)
        assert np.array_equal(q4_0(held), q4_0(weight))
    layer = [one.get_submodule("0").weight.float() for one in (exact, base)]
    lost = (values(q4_0(model[0].weight)) - layer[0]) @ x.T
    assert lost.norm() <= 0.35 * ((layer[0] - layer[1]) @ x.T).norm(), "on rows that nobody has seen"
    nearest = (values(q4_0(layer[0])) - layer[0]) @ x.T
    assert nearest.norm() >= 0.85 * ((layer[0] - layer[1]) @ x.T).norm(), "plain conversion drowns it"


def test_where_no_codes_can_hold_it_that_is_said():
    with pytest.warns(LoraFxWarning, match="the grid cannot hold the adapter at 2 of 2 weights"):
        _, sites = merged_on_grid(tuned_on(0.0), batches(0.0, torch.float32), grid="q4_0")
    assert all(site.kept < 0.5 for site in sites)


def test_the_grid_is_that_of_ggufs_own_quantiser():
    torch.manual_seed(1)
    weight = torch.randn(6, 96) * torch.logspace(-4, 2, 6)[:, None]
    weight[0, :32] = 0
    grid = q4_0_grid(weight)
    codes = grid.nearest(weight)
    blocks = q4_0(grid.values(codes))
    assert torch.equal(values(blocks), grid.values(codes))
    assert torch.equal(values(blocks)[0, :32], torch.zeros(32))
    theirs = values(q4_0(weight))
    assert (theirs != grid.values(codes)).float().mean() < 0.02, "they divide by d before it is rounded to float16"
    assert (grid.values(codes) - weight).norm() <= (theirs - weight).norm() * 1.001
    assert torch.equal(grid.nearest(theirs), grid.nearest(grid.values(grid.nearest(theirs))))
    assert q4_0_grid(torch.randn(4, 40)) is None
    assert q4_0_grid(torch.full((4, 32), 1e9)) is None


def test_rows_that_have_no_blocks_and_grids_that_are_not_known_are_refused_by_name():
    tuned = lora_fx.apply(nn.Sequential(nn.Linear(40, 4)), written(rule("*")), (torch.randn(2, 40),))
    data = [(torch.randn(3, 40),)] * 2
    with pytest.raises(RefusedError, match=r"0 +rows of 40: Q4_0 takes multiples of 32"):
        merged_on_grid(tuned, data, grid="q4_0")
    with pytest.raises(RefusedError, match="no such grid"):
        merged_on_grid(tuned, data, grid="q4_k")
    with pytest.raises(MergeError, match="no adapter is in use"):
        merged_on_grid(tuned, data, grid="q4_0", adapters=[])


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_a_compressed_model_keeps_its_scales_and_is_read_by_its_own_library(symmetric: bool):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 64)).eval()
    compress_(model, INT4 | {"symmetric": symmetric})
    compressors.ModelCompressor().compress_model(model)
    tuned = adapted(model, 2.0, torch.float32)
    merged, sites = merged_on_grid(tuned, batches(2.0, torch.float32))
    assert all(site.nearest <= 0.1 and site.kept >= 0.7 for site in sites), sites
    x, exact = inputs(256, 2.0, 99), lora_fx.merge(tuned)
    for path, site in zip(("0", "2"), sites, strict=True):
        layer, before = merged.get_submodule(path), model.get_submodule(path)
        assert torch.equal(layer.weight_scale, before.weight_scale)
        assert 0 < site.changed < 0.5
        assert float((numbers(layer) != numbers(before)).float().mean()) == pytest.approx(site.changed)
    assert torch.equal(copied(merged)(x), merged(x)), "the library decompresses the same"
    assert (merged(x) - exact(x)).norm() <= 0.35 * (copied(model)(x) - exact(x)).norm()

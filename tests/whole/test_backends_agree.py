"""Two backends, one meaning: the same plan gives the same keys, outputs and gradients, graph or module."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from tests.support.rounding import assert_same_sums
from tests.support.zoo import SHAPES, ZOO, Specimen, randomise_, rules

specimens = pytest.mark.parametrize("specimen", ZOO, ids=lambda specimen: specimen.name)
# torch's fused encoder layer rounds differently from its slow path at other shapes; which of them runs depends on
# whether gradients are wanted, so train mode compares in grad mode and eval mode without, as they are used
MODES = ((False, False), (True, True))


def run(model: nn.Module, specimen: Specimen, shape: tuple[int, int], training: bool, grad: bool) -> Tensor:
    args, kwargs = specimen.inputs(*shape)
    model.train(training)
    with torch.set_grad_enabled(grad):
        return model(*args, **kwargs)


def both(specimen: Specimen, **lora: object) -> tuple[nn.Module, nn.Module]:
    """Return copies of the model adapted on either backend, as `apply` gives it."""
    return copy.deepcopy(_both(specimen, tuple(lora.items())))


@functools.cache
def _both(specimen: Specimen, lora: tuple[tuple[str, object], ...]) -> tuple[nn.Module, nn.Module]:
    model, given = specimen.build(), specimen.sample()
    graph = lora_fx.apply(model, rules(specimen.rule, **dict(lora)), given)
    modules = lora_fx.apply(model, rules(specimen.rule, **dict(lora)), given, backend="modules")
    return graph, modules


@pytest.mark.slow
@specimens
@pytest.mark.parametrize("training", [False, True])
def test_adapted_model_starts_bit_equal_to_its_base_at_every_shape(specimen: Specimen, training: bool):
    base = specimen.build().requires_grad_(False)
    for tuned in both(specimen):
        for shape in SHAPES:
            expected = run(base, specimen, shape, training, grad=training)
            assert torch.equal(run(tuned, specimen, shape, training, grad=training), expected), shape


@specimens
@pytest.mark.parametrize("lora", [{}, {"dora": True}, {"dropout": 0.3}, {"rslora": True, "bias": True}], ids=str)
@pytest.mark.sampled(2)
def test_backends_give_the_same_outputs_and_gradients(specimen: Specimen, lora: dict[str, object]):
    graph, modules = both(specimen, **lora)
    randomise_(graph)
    modules.load_state_dict(graph.state_dict())
    for training, grad in MODES:
        for shape in SHAPES:
            results = []
            for tuned in (graph, modules):
                torch.manual_seed(7)
                tuned.zero_grad()
                result = run(tuned, specimen, shape, training, grad)
                if grad:
                    result.square().sum().backward()
                results.append((result.detach(), [p.grad for p in lora_fx.parameters(tuned)]))
            (one, ones), (other, others) = results
            assert torch.equal(one, other), (training, shape)
            assert [a is None for a in ones] == [b is None for b in others]
            if grad:
                pairs = [(a, b) for a, b in zip(ones, others, strict=True) if a is not None]
                assert_same_sums(*zip(*pairs, strict=True), additions=shape[0] * shape[1])


@specimens
def test_base_keys_stay_and_both_backends_add_the_same(specimen: Specimen):
    base = specimen.build().state_dict()
    graph, modules = both(specimen)
    assert set(base) < set(graph.state_dict())
    assert list(graph.state_dict()) == list(modules.state_dict())
    added = set(graph.state_dict()) - set(base)
    assert all(".lora_A.default.weight" in key or ".lora_B.default.weight" in key for key in added)


@specimens
def test_merged_model_computes_what_the_adapted_model_computes(specimen: Specimen):
    tuned, _ = both(specimen)
    randomise_(tuned)
    merged = lora_fx.merge(tuned)
    for shape in SHAPES:
        expected = run(tuned, specimen, shape, training=False, grad=False)
        torch.testing.assert_close(run(merged, specimen, shape, False, False), expected, rtol=1e-5, atol=1e-5)
    assert set(merged.state_dict()) == set(specimen.build().state_dict())
    assert type(merged) is type(specimen.build())


@specimens
def test_removing_gives_the_base_back_bit_by_bit(specimen: Specimen):
    tuned, _ = both(specimen)
    randomise_(tuned)
    base, removed = specimen.build(), lora_fx.remove(tuned)
    assert {k: v.tolist() for k, v in removed.state_dict().items()} == {
        k: v.tolist() for k, v in base.state_dict().items()
    }
    for shape in SHAPES:
        assert torch.equal(run(removed, specimen, shape, False, False), run(base, specimen, shape, False, False))


@specimens
def test_disabled_model_computes_what_its_base_computes(specimen: Specimen):
    base = specimen.build().requires_grad_(False)
    tuned, _ = both(specimen)
    randomise_(tuned)
    with lora_fx.disabled(tuned):
        for shape in SHAPES:
            assert torch.equal(run(tuned, specimen, shape, False, False), run(base, specimen, shape, False, False))
    adapted = run(tuned, specimen, (2, 6), False, False)
    assert not torch.equal(adapted, run(base, specimen, (2, 6), False, False))


@specimens
def test_adapter_survives_saving_and_loading_bit_by_bit(specimen: Specimen, tmp_path):
    tuned, _ = both(specimen)
    randomise_(tuned)
    lora_fx.save(tuned, tmp_path)
    loaded = lora_fx.load(specimen.build(), tmp_path, specimen.sample())
    for shape in SHAPES:
        expected = run(tuned, specimen, shape, False, False)
        assert torch.equal(run(loaded, specimen, shape, False, False), expected)

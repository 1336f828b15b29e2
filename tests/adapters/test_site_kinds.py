"""Every kind of site computes W + scaling · B A: against the plain model with that sum in it, on both backends."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.tuned.build import record_in
from tests.support.compoundkinds import ATTENTION, EXPERTS
from tests.support.layerkinds import LAYERS, SUBCLASSES
from tests.support.rawkinds import OTHERS, PRODUCTS, VIEWED
from tests.support.sitekinds import (
    BACKENDS,
    Kind,
    assert_starts_as_its_base,
    crossed,
    dense_weights,
    factors,
    factors_of,
    flat,
    gradients,
    randomise_,
    reference,
    relative,
    run,
    same_values,
)

KINDS = [*LAYERS, *SUBCLASSES, *PRODUCTS, *VIEWED, *OTHERS, *ATTENTION, *EXPERTS]
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Largest relative error: some hundred roundings of sums."""
HALF = 0.06
"""In bfloat16, with 8 bits: the base's own products round to 0.004, a few of them in a row to more."""
DROPOUT, DRAWS = 0.25, 60
every = pytest.mark.parametrize("kind, backend", crossed(KINDS))
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@functools.cache
def _adapted(name: str, backend: str, dtype: torch.dtype) -> nn.Module:
    kind = next(kind for kind in KINDS if kind.name == name)
    return kind.adapted(backend, dtype, DROPOUT)


def started(kind: Kind, backend: str = "modules", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return an adapted model as `apply` gives it, with dropout."""
    return copy.deepcopy(_adapted(kind.name, backend, dtype))


def trained(kind: Kind, backend: str = "modules", dtype: torch.dtype = torch.float32) -> nn.Module:
    tuned = started(kind, backend, dtype)
    randomise_(tuned)
    return tuned


@every
@pytest.mark.sampled(2)
def test_adapted_model_starts_bit_equal_to_its_base(kind: Kind, backend: str):
    assert_starts_as_its_base(kind, started(kind, backend), torch.float32)


@every_kind
def test_adapted_model_in_bfloat16_starts_bit_equal_to_its_base(kind: Kind):
    assert_starts_as_its_base(kind, started(kind, "modules", torch.bfloat16), torch.bfloat16)


@every
def test_output_and_gradients_are_those_of_the_dense_weights(kind: Kind, backend: str):
    tuned, sample = trained(kind, backend), kind.sample()
    result, expected = run(tuned, sample, grad=True), reference(kind, tuned, sample)
    assert relative(result, expected) <= CLOSE[torch.float32]
    assert relative(run(tuned, sample, grad=False), expected) <= CLOSE[torch.float32]
    assert relative(expected, run(kind.build(), sample)) > 1e-2, "the adapter has an effect at all"
    for slope, wanted in zip(gradients(result, tuned), gradients(expected, tuned), strict=True):
        assert wanted.abs().max() > 0
        assert relative(slope, wanted) <= CLOSE[torch.float32] * 5


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.double], ids=lambda kind: kind.name)
def test_output_and_gradients_in_float64_are_exact(kind: Kind):
    tuned, sample = trained(kind, "modules", torch.float64), kind.sample(torch.float64)
    result, expected = run(tuned, sample, grad=True), reference(kind, tuned, sample)
    assert relative(result, expected) <= CLOSE[torch.float64]
    for slope, wanted in zip(gradients(result, tuned), gradients(expected, tuned), strict=True):
        assert relative(slope, wanted) <= CLOSE[torch.float64] * 5


@every_kind
def test_output_in_bfloat16_is_that_of_the_dense_weights_within_its_rounding(kind: Kind):
    tuned, sample = trained(kind, "modules", torch.bfloat16), kind.sample(torch.bfloat16)
    assert all(factor.dtype == torch.float32 for factor in factors(tuned).values())
    result = run(tuned, sample)
    assert result.dtype == run(kind.build(torch.bfloat16), sample).dtype
    assert relative(result, reference(kind, tuned, sample)) <= HALF


@every_kind
def test_merged_model_is_plain_and_computes_the_same(kind: Kind):
    tuned, sample, base = trained(kind), kind.sample(), kind.build()
    merged = lora_fx.merge(tuned)
    assert relative(run(merged, sample), run(tuned, sample)) <= CLOSE[torch.float32]
    assert list(merged.state_dict()) == list(base.state_dict())
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]
    assert all(type(parameter) is nn.Parameter for parameter in merged.parameters())
    state = merged.state_dict()
    for name, weight in dense_weights(kind, tuned).items():
        assert relative(state[name], weight) <= 1e-6
    untouched = set(state) - set(kind.weights)
    if not kind.name.startswith(("shared", "tied")):  # their weight has another name too
        assert all(torch.equal(state[name], base.state_dict()[name]) for name in untouched)


@every_kind
def test_merged_model_in_bfloat16_is_rounded_once(kind: Kind):
    tuned = trained(kind, "modules", torch.bfloat16)
    state = lora_fx.merge(tuned).state_dict()
    for name, weight in dense_weights(kind, tuned).items():
        assert state[name].dtype == torch.bfloat16
        assert torch.equal(state[name], weight.to(torch.bfloat16)) or relative(state[name], weight) < 2**-8


@every
def test_removed_and_switched_off_models_are_their_base_bit_by_bit(kind: Kind, backend: str):
    tuned, base, sample = trained(kind, backend), kind.build(), kind.sample()
    removed = lora_fx.remove(tuned)
    assert same_values(removed, base)
    assert [type(module) for module in removed.modules()] == [type(module) for module in base.modules()]
    for training in (False, True):
        assert torch.equal(run(removed, sample, training), run(base, sample, training))
    base.requires_grad_(False)
    with lora_fx.disabled(tuned):
        for training in (False, True):
            assert torch.equal(run(tuned, sample, training), run(base, sample, training))


@every_kind
def test_plan_tells_what_is_adapted_and_factors_stand_beside_the_keys_of_the_base(kind: Kind):
    tuned = started(kind)
    plan = record_in(tuned).plan
    layouts = {site.site.weight: ("bank " if site.site.is_banked else "") + site.site.layout for site in plan.adapted}
    assert layouts == dict(kind.weights)
    base = kind.build().state_dict()
    added = [name for name in tuned.state_dict() if name not in base]
    assert [name for name in tuned.state_dict() if name in base] == list(base)
    assert all(".lora_A.default.weight" in f".{name}" or ".lora_B.default.weight" in f".{name}" for name in added)
    for name in kind.weights:
        A, B = factors_of(tuned, name)
        assert A.requires_grad
        assert B.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("kind, _", crossed(KINDS, ["auto"]))
@pytest.mark.sampled(2)
def test_saved_adapter_loads_bit_equal_into_a_fresh_base(kind: Kind, _: str, tmp_path):
    tuned, sample = trained(kind), kind.sample()
    lora_fx.save(tuned, tmp_path)
    assert_same(tuned, lora_fx.load(kind.build(), tmp_path, sample), kind)


@pytest.mark.parametrize("kind, _", crossed(KINDS, ["auto"]))
@pytest.mark.sampled(2)
def test_saved_adapter_loads_without_example_inputs(kind: Kind, _: str, tmp_path):
    tuned = trained(kind)
    lora_fx.save(tuned, tmp_path)
    assert_same(tuned, lora_fx.load(kind.build(), tmp_path), kind)


def assert_same(tuned: nn.Module, loaded: nn.Module, kind: Kind) -> None:
    assert same_values(tuned, loaded)
    for training in (False, True):
        assert torch.equal(run(tuned, kind.sample(), training), run(loaded, kind.sample(), training))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.linear and kind.drops], ids=lambda kind: kind.name)
def test_dropout_acts_and_its_mean_is_the_adapter_without(kind: Kind):
    tuned, sample = trained(kind), kind.sample()
    expected = run(tuned, sample)
    draws = torch.stack([run(tuned, sample, training=True, seed=seed) for seed in range(DRAWS)]).double()
    deviation = draws.std(0)
    assert deviation.max() > 1e-3 * expected.abs().max()
    error = (draws.mean(0) - expected).abs()
    assert (error <= 6 * deviation / DRAWS**0.5 + 1e-5 * expected.abs().max()).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.linear and kind.drops], ids=lambda kind: kind.name)
def test_dropout_acts_on_every_weight(kind: Kind):
    sample = kind.sample()
    for name in kind.weights:
        tuned = trained(kind)
        with torch.no_grad():
            for other in kind.weights:
                if other != name:
                    factors_of(tuned, other)[0].zero_()
        first, second = (run(tuned, sample, training=True, seed=seed) for seed in (1, 2))
        assert not torch.equal(first, second), name
        assert torch.equal(run(tuned, sample, training=True, seed=1), first)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.drops], ids=lambda kind: kind.name)
def test_weight_that_is_changed_before_it_multiplies_has_no_dropout(kind: Kind):
    tuned, sample = trained(kind), kind.sample()
    assert torch.equal(run(tuned, sample, training=True), run(tuned, sample))


def crossings() -> list[Any]:
    """Return four of the eight crossings of backend, dtype and dropout for each kind: every two of their values meet.

    All three meet over two kinds: the next one has the other four.
    """
    return [
        pytest.param(kind, backend, dtype, dropout, id=f"{kind.name}-{dropout}-{dtype}-{backend}")
        for number, kind in enumerate(KINDS)
        for b, backend in enumerate(BACKENDS)
        for d, dtype in enumerate((torch.float32, torch.bfloat16))
        for p, dropout in enumerate((0.0, 0.1))
        if (b + d + p + number) % 2 == 0
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "backend", "dtype", "dropout"), crossings())
@pytest.mark.sampled(3)
def test_crossings(kind: Kind, backend: str, dtype: torch.dtype, dropout: float):
    tuned, sample = kind.adapted(backend, dtype, dropout), kind.sample(dtype)
    assert_starts_as_its_base(kind, tuned, dtype)
    randomise_(tuned)
    expected = reference(kind, tuned, sample)
    allowed = HALF if dtype == torch.bfloat16 else CLOSE[dtype]
    assert relative(run(tuned, sample), expected) <= allowed
    if dropout == 0:
        assert relative(run(tuned, sample, training=True, grad=True), reference(kind, tuned, sample, True)) <= allowed
    assert relative(run(lora_fx.merge(tuned), sample), run(tuned, sample)) <= allowed
    assert same_values(lora_fx.remove(tuned), kind.build(dtype))


def test_the_reference_tells_a_wrong_adapter():
    kind = KINDS[0]
    tuned, sample = trained(kind), kind.sample()
    expected = reference(kind, tuned, sample)
    with torch.no_grad():
        factors_of(tuned, "0.weight")[1].add_(1e-3)
    assert relative(run(tuned, sample), expected) > CLOSE[torch.float32]
    assert flat((torch.zeros(2), None, {"a": torch.ones(1)})).tolist() == [0, 0, 1]

"""DoRA at every kind of site: m · V / ‖V‖, as the plain model with that weight in it computes, on both backends."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx.errors import RefusedError
from lora_fx.tuned.build import record_in
from tests.support.compoundkinds import EXPERTS
from tests.support.dorakinds import KINDS, dora_reference, dora_rules, dora_weights, magnitude_of, started, trained
from tests.support.sitekinds import (
    Kind,
    assert_starts_as_its_base,
    crossed,
    factors,
    factors_of,
    gradients,
    relative,
    run,
    same_values,
)

every = pytest.mark.parametrize("kind, backend", crossed(KINDS))
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
DROPOUT, DRAWS = 0.25, 60
BY_NAME = {kind.name: kind for kind in KINDS}
SEVERAL = [
    BY_NAME[name]
    for name in ("linear", "Conv1D of transformers", "conv2d uneven", "embedding", "a child's raw parameter")
]
some = pytest.mark.parametrize("kind", SEVERAL, ids=lambda kind: kind.name)


@every
@pytest.mark.sampled(2)
def test_model_starts_bit_equal_to_its_base(kind: Kind, backend: str):
    assert_starts_as_its_base(kind, started(kind, backend, dropout=DROPOUT), torch.float32, kind.raw)


@every_kind
def test_model_in_bfloat16_starts_bit_equal_to_its_base(kind: Kind):
    assert_starts_as_its_base(kind, started(kind, "modules", torch.bfloat16, DROPOUT), torch.bfloat16, kind.raw)


@every_kind
def test_lengths_start_as_those_of_the_base_in_the_shape_of_peft(kind: Kind):
    tuned = started(kind)
    plain = dict(kind.build().named_parameters(remove_duplicate=False))
    total = 0
    for name, layout in kind.weights.items():
        stored, lengths = plain[name].detach(), magnitude_of(tuned, name)
        norms = torch.linalg.vector_norm(stored.t() if layout == "in_out" else stored.flatten(1), dim=1)
        assert relative(lengths.flatten(), norms) <= 1e-6
        is_layer = isinstance(tuned.get_submodule(name.rpartition(".")[0]), nn.Conv1d | nn.Conv2d | nn.Conv3d)
        ones = (1,) * (stored.dim() - 2)
        assert lengths.shape == ((1, len(stored), *ones) if is_layer else norms.shape)
        assert lengths.requires_grad
        total += sum(factor.numel() for factor in (*factors_of(tuned, name), lengths))
    assert record_in(tuned).plan.trainable == total


@every
@pytest.mark.sampled(2)
def test_output_and_gradients_are_those_of_the_weights(kind: Kind, backend: str):
    tuned, sample = trained(kind, backend), kind.sample()
    result, expected = run(tuned, sample, grad=True), dora_reference(kind, tuned, sample)
    assert relative(result, expected) <= 1e-5
    assert relative(run(tuned, sample), expected) <= 1e-5
    assert relative(expected, run(kind.build(), sample)) > 1e-2, "the adapter has an effect at all"
    for slope, wanted in zip(gradients(result, tuned), gradients(expected, tuned), strict=True):
        assert wanted.abs().max() > 0
        assert relative(slope, wanted) <= 1e-4 or is_without_length(kind, wanted)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.double], ids=lambda kind: kind.name)
def test_output_and_gradients_in_float64(kind: Kind):
    tuned, sample = trained(kind, "modules", torch.float64), kind.sample(torch.float64)
    result, expected = run(tuned, sample, grad=True), dora_reference(kind, tuned, sample)
    assert relative(result, expected) <= 1e-12
    for slope, wanted in zip(gradients(result, tuned), gradients(expected, tuned), strict=True):
        assert relative(slope, wanted) <= 1e-11 or is_without_length(kind, wanted)


def is_without_length(kind: Kind, gradient: Tensor) -> bool:
    """Whether it is nothing but rounding: a weight whose rows are normalised before they multiply has no lengths."""
    return kind.name == "normalised" and float(gradient.abs().max()) <= 100 * torch.finfo(gradient.dtype).eps


@every
@pytest.mark.sampled(2)
def test_merged_weights_are_these(kind: Kind, backend: str):
    tuned, sample = trained(kind, backend), kind.sample()
    merged, base = lora_fx.merge(tuned), kind.build()
    assert list(merged.state_dict()) == list(base.state_dict())
    assert relative(run(merged, sample), run(tuned, sample)) <= 1e-5
    for name, weight in dora_weights(kind, tuned).items():
        assert relative(merged.state_dict()[name], weight) <= 1e-6


@every_kind
def test_merged_model_in_bfloat16_is_rounded_once(kind: Kind):
    tuned = trained(kind, "modules", torch.bfloat16)
    state = lora_fx.merge(tuned).state_dict()
    for name, weight in dora_weights(kind, tuned).items():
        assert state[name].dtype == torch.bfloat16
        ulp = torch.finfo(torch.bfloat16).eps * weight.abs()
        assert ((state[name].double() - weight.double()).abs() <= 0.5 * ulp + 1e-6).all()


@every
def test_removing_and_switching_off_give_the_base_bit_by_bit(kind: Kind, backend: str):
    tuned, base, sample = trained(kind, backend), kind.build(), kind.sample()
    removed = lora_fx.remove(tuned)
    assert same_values(removed, base)
    assert torch.equal(run(removed, sample), run(base, sample))
    with lora_fx.disabled(tuned):
        assert torch.equal(run(tuned, sample), run(base.requires_grad_(False), sample))


@pytest.mark.slow
@pytest.mark.parametrize("kind, _", crossed(KINDS, ["auto"]))
@pytest.mark.sampled(2)
def test_saved_adapter_loads_bit_equal_into_a_fresh_base(kind: Kind, _: str, tmp_path):
    tuned, sample = trained(kind, dropout=DROPOUT), kind.sample()
    lora_fx.save(tuned, tmp_path)
    for loaded in (lora_fx.load(kind.build(), tmp_path, sample), lora_fx.load(kind.build(), tmp_path)):
        assert same_values(tuned, loaded)
        for training in (False, True):
            assert torch.equal(run(loaded, sample, training), run(tuned, sample, training))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.drops], ids=lambda kind: kind.name)
def test_dropout_reaches_the_product_alone(kind: Kind):
    tuned, sample = trained(kind, dropout=DROPOUT), kind.sample()
    first, second = (run(tuned, sample, training=True, seed=seed) for seed in (1, 2))
    assert not torch.equal(first, second)
    with torch.no_grad():
        for name in kind.weights:
            factors_of(tuned, name)[0].zero_()
    assert relative(run(tuned, sample, training=True), run(tuned, sample)) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.linear and kind.drops], ids=lambda kind: kind.name)
def test_mean_over_dropouts_is_the_output_without(kind: Kind):
    tuned, sample = trained(kind, dropout=DROPOUT), kind.sample()
    expected = run(tuned, sample)
    draws = torch.stack([run(tuned, sample, training=True, seed=seed) for seed in range(DRAWS)]).double()
    assert ((draws.mean(0) - expected).abs() <= 6 * draws.std(0) / DRAWS**0.5 + 1e-5 * expected.abs().max()).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.drops and kind.double], ids=lambda kind: kind.name)
def test_gradients_under_dropout_are_those_of_small_steps(kind: Kind):
    tuned, sample = trained(kind, "modules", torch.float64, DROPOUT), kind.sample(torch.float64)
    lengths = [magnitude_of(tuned, name) for name in kind.weights]
    with torch.no_grad():
        slopes = [torch.randn_like(one) for one in lengths]
    (run(tuned, sample, True, True).square().sum() / 2).backward()
    expected = sum(float((one.grad * slope).sum()) for one, slope in zip(lengths, slopes, strict=True))

    def loss(step: float) -> float:
        with torch.no_grad():
            for one, slope in zip(lengths, slopes, strict=True):
                one.add_(step * slope)
            value = float(run(tuned, sample, True, True).square().sum() / 2)
            for one, slope in zip(lengths, slopes, strict=True):
                one.sub_(step * slope)
        return value

    found = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert abs(found - expected) <= 1e-5 * (1 + abs(expected))


# -- around an adapter


@some
def test_two_adapters_with_weights_add_what_each_adds(kind: Kind):
    tuned, sample = trained(kind), kind.sample()
    lora_fx.add(tuned, kind.rules(), adapter="plain")
    lora_fx.add(tuned, dora_rules(kind), adapter="second")
    with torch.no_grad():
        for name, factor in factors(tuned).items():
            if "default" not in name:
                factor.copy_(0.4 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(len(name))))
    alone = {}
    for name in ("default", "plain", "second"):
        lora_fx.use(tuned, name)
        alone[name] = run(tuned, sample)
    base = run(kind.build(), sample)
    shares = {"default": 0.7, "plain": -0.3, "second": 1.0}
    lora_fx.use(tuned, shares)
    expected = base + sum(share * (alone[name] - base) for name, share in shares.items())
    assert relative(run(tuned, sample), expected) <= 1e-5
    assert relative(run(lora_fx.merge(tuned), sample), expected) <= 1e-5


@pytest.mark.parametrize("kind", SEVERAL[:4], ids=lambda kind: kind.name)
def test_each_row_of_a_batch_has_an_adapter_of_its_own(kind: Kind):
    tuned, (x,) = trained(kind).eval(), kind.sample().args
    lora_fx.add(tuned, kind.rules(), adapter="plain")
    with torch.no_grad():
        for name, factor in factors(tuned).items():
            if "plain" in name:
                factor.copy_(torch.randn(factor.shape, generator=torch.Generator().manual_seed(2)))
    batch = torch.cat([x, x])[:3]
    names, expected = ["default", None, "plain"], []
    for row, name in zip(batch, names, strict=True):
        with lora_fx.use(tuned, name):
            expected.append(tuned(row[None]))
    with lora_fx.rows(tuned, names):
        assert relative(tuned(batch), torch.cat(expected)) <= 1e-6


@some
def test_copies_pickles_compilers_and_checkpoints_compute_the_same(kind: Kind):
    tuned, sample = trained(kind).eval(), kind.sample()
    expected = run(tuned, sample, grad=True)
    for other in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        assert same_values(other, tuned)
        assert torch.equal(run(other, sample, grad=True), expected)
    compiled = torch.compile(tuned, backend="eager", fullgraph=True)
    assert relative(compiled(*sample.args).flatten(), expected) <= 1e-6
    again = checkpoint(tuned, *sample.args, use_reentrant=False).flatten()
    for slope, wanted in zip(gradients(again, tuned), gradients(expected, tuned), strict=True):
        assert relative(slope, wanted) <= 1e-6


@some
def test_training_changes_lengths_and_resumes_from_a_state(kind: Kind):
    tuned, sample = started(kind), kind.sample()
    optimizer = torch.optim.SGD(lora_fx.parameters(tuned), lr=0.05)
    before = [magnitude_of(tuned, name).detach().clone() for name in kind.weights]
    for _ in range(3):
        optimizer.zero_grad()
        run(tuned, sample, True, True).square().mean().backward()
        optimizer.step()
    assert not any(torch.equal(magnitude_of(tuned, n), old) for n, old in zip(kind.weights, before, strict=True))
    fresh = started(kind)
    lora_fx.load_adapter_state(fresh, lora_fx.adapter_state(tuned))
    assert torch.equal(run(fresh, sample), run(tuned, sample))
    other = started(kind)
    lora_fx.swap(other, lora_fx.adapter_state(tuned), adapter="default")
    assert torch.equal(run(other, sample), run(tuned, sample))


@some
def test_lengths_are_not_decayed(kind: Kind):
    tuned = started(kind)
    groups = lora_fx.param_groups(tuned, lr=1e-3, weight_decay=0.1)
    lengths = {id(magnitude_of(tuned, name)) for name in kind.weights}
    found = [group["weight_decay"] for group in groups for p in group["params"] if id(p) in lengths]
    assert found == [0.0] * len(lengths)


@some
def test_under_autocast_it_starts_as_its_base_and_trains(kind: Kind):
    tuned, base, sample = started(kind), kind.build().requires_grad_(False), kind.sample()
    with torch.autocast("cpu", torch.bfloat16):
        result = run(tuned, sample, True, True)
        assert torch.equal(result, run(base, sample, True, True))
    result.float().square().sum().backward()
    assert all(bool(magnitude_of(tuned, name).grad.any()) for name in kind.weights)


# -- what is refused


@pytest.mark.parametrize("kind", EXPERTS, ids=lambda kind: kind.name)
def test_banks_of_matrices_are_refused_by_name(kind: Kind):
    plan = lora_fx.plan(kind.build(), dora_rules(kind), kind.sample())
    assert {site.reason for site in plan.refused if site.site.is_banked} == {
        "DoRA would compute the whole bank of matrices at each use of some of them; leave out `dora`"
    }
    with pytest.raises(RefusedError, match="DoRA would compute the whole bank"):
        lora_fx.apply(kind.build(), dora_rules(kind), kind.sample())


def test_an_adapter_for_each_call_is_refused_by_name():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, layer)
    rules = {"rules": [{"match": {"name": "0"}, "lora": {"r": 2, "dora": True}, "per_call": True}]}
    plan = lora_fx.plan(model, rules, (torch.ones(2, 4),))
    assert plan.refused[0].reason == "DoRA and an adapter for each call are not combined; leave out one"


def test_several_adapters_with_dropout_at_a_weight_that_is_read_are_refused():
    kind = BY_NAME["a child's raw parameter"]
    tuned, sample = trained(kind, dropout=DROPOUT).train(), kind.sample()
    lora_fx.add(tuned, dora_rules(kind, DROPOUT), adapter="second")
    lora_fx.use(tuned, ["default", "second"])
    with pytest.raises(RefusedError, match="one input for several adapters with dropout"):
        tuned(*sample.args)
    assert run(tuned, sample).isfinite().all()

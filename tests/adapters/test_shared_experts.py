"""Experts that share a factor: they compute W + scaling · B A with one A or one B for all, wherever they go."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import lora_fx
from lora_fx.adapters.attach import all_attached
from lora_fx.exporters.base_graph import base_graph_parts
from lora_fx.files.adapter.codec import form_of, misfit
from lora_fx.planning.plan import Plan
from tests.adapters.test_known_experts import NUMBER, Mixture, adapted, close, given, is_one_operation, qwen
from tests.adapters.test_known_experts import run as stepped
from tests.support.compoundkinds import EXPERTS
from tests.support.kept import copy_of
from tests.support.sitekinds import (
    BACKENDS,
    RANK,
    Kind,
    crossed,
    factors,
    factors_of,
    randomise_,
    reference,
    relative,
    run,
    same_values,
)
from tests.support.zoo import randomise_ as randomise_all_

CLOSE = 1e-5
every = pytest.mark.parametrize("kind, backend", crossed(EXPERTS))
every_kind = pytest.mark.parametrize("kind", EXPERTS, ids=lambda kind: kind.name)
SHARES = ("A", "B", "outer")
shared_kinds = pytest.mark.parametrize(
    "kind, share",
    [
        pytest.param(kind, share, id=f"{kind.name}-{share}")
        for kind in EXPERTS
        for share in (SHARES if kind.quick else ("outer",))
    ],
)


def rules(kind: Kind, share: str = "outer", **lora: Any) -> dict[str, Any]:
    written = kind.rules()
    written["rules"][0]["lora"] |= {"share": share, **lora}
    return written


def started(kind: Kind, share: str = "outer", backend: str = "modules", **lora: Any) -> nn.Module:
    return copy_of(_started, kind.name, share, backend, **lora)


def _started(name: str, share: str, backend: str, **lora: Any) -> nn.Module:
    kind = next(kind for kind in EXPERTS if kind.name == name)
    return lora_fx.apply(kind.build(), rules(kind, share, **lora), kind.sample(), backend=backend)


def trained(kind: Kind, share: str = "outer", backend: str = "modules", **lora: Any) -> nn.Module:
    tuned = started(kind, share, backend, **lora)
    randomise_(tuned)
    return tuned


def loop() -> Kind:
    return EXPERTS[0]


# -- values


@pytest.mark.slow
@shared_kinds
@pytest.mark.sampled(2)
def test_factors_are_one_for_all_experts_or_one_for_each_and_the_plan_counts_them(kind: Kind, share: str):
    plan = lora_fx.plan(kind.build(), rules(kind, share), kind.sample())
    tuned = started(kind, share)
    for name in kind.weights:
        (lora,) = {site.lora for site in plan.adapted if site.site.weight == name}
        expected = share if share != "outer" else "B" if "down" in name else "A"
        members = tuple(factor.shape[0] for factor in factors_of(tuned, name))
        number = tuned.get_parameter(name).shape[0]
        assert lora.share == expected
        assert members == ((1, number) if expected == "A" else (number, 1))
    assert plan.trainable == sum(factor.numel() for factor in factors(tuned).values())
    assert "one A for all" in str(plan) or share == "B"
    assert Plan.from_json(plan.to_json()) == plan


@every
def test_model_starts_bit_equal_to_its_base(kind: Kind, backend: str):
    tuned, base, sample = started(kind, backend=backend), kind.build().requires_grad_(False), kind.sample()
    for grad in (False, True):
        assert torch.equal(run(tuned, sample, grad=grad), run(base, sample, grad=grad))


@pytest.mark.parametrize(
    "kind, backend, share",
    [
        pytest.param(kind, backend, share, id=f"{kind.name}-{backend}-{share}",
                     marks=[] if kind.quick or (backend, share) == ("modules", "outer") else [pytest.mark.slow])
        for kind in EXPERTS
        for backend in BACKENDS
        for share in SHARES
    ],
)  # fmt: skip
@pytest.mark.sampled(2)
def test_output_and_gradients_are_those_of_the_dense_weights(kind: Kind, backend: str, share: str):
    tuned, sample = trained(kind, share, backend), kind.sample()
    result, expected = run(tuned, sample, grad=True), reference(kind, tuned, sample)
    assert relative(result, expected) <= CLOSE
    assert relative(run(tuned, sample), expected) <= CLOSE
    assert relative(expected, run(kind.build(), sample)) > 1e-2, "the adapter has an effect at all"
    loss = torch.arange(result.numel()).cos()
    ours, theirs = (
        torch.autograd.grad((output * loss).sum(), list(factors(tuned).values())) for output in (result, expected)
    )
    for slope, wanted in zip(ours, theirs, strict=True):
        assert wanted.abs().max() > 0
        assert relative(slope, wanted) <= CLOSE * 5


@every_kind
def test_merged_weights_are_the_dense_ones(kind: Kind):
    tuned, sample = trained(kind), kind.sample()
    assert relative(run(lora_fx.merge(tuned), sample), run(tuned, sample)) <= CLOSE
    assert same_values(lora_fx.remove(tuned), kind.build())


def test_dropout_drops_the_input_of_each_product():
    tuned, sample = trained(loop(), dropout=0.5), loop().sample()
    results = {tuple(run(tuned, sample, training=True, seed=seed).tolist()) for seed in range(4)}
    assert len(results) == 4
    assert relative(run(tuned, sample), reference(loop(), tuned, sample)) <= CLOSE


# -- as one operation


def apart(tuned: nn.Module) -> Any:
    """Return the same adapter with a factor for each expert, of equal values."""
    whole = adapted(implementation=tuned.experts.config._experts_implementation)
    with torch.no_grad():
        for (_, one), (_, other) in zip(all_attached(tuned), all_attached(whole), strict=True):
            other.lora_A.weight.copy_(one.lora_A.matrix)
            other.lora_B.weight.copy_(one.lora_B.matrix)
    return whole


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("share", SHARES)
def test_one_operation_has_the_values_and_summed_gradients_of_factors_for_each_expert(share: str, implementation: str):
    tuned = adapted(implementation=implementation, share=share)
    result, expected = stepped(tuned), stepped(apart(tuned))
    assert is_one_operation(result[0])
    own = [parameter.shape for parameter in lora_fx.parameters(tuned)]
    summed = [
        slope if slope.shape == shape else slope.sum(0, keepdim=True)
        for slope, shape in zip(expected[3:], own, strict=True)
    ]
    close(result, [*expected[:3], *summed])
    assert sum(slope.shape[0] == 1 for slope in result[3:]) == 2
    assert torch.equal(result[0], expected[0])


@pytest.mark.parametrize("share", SHARES)
def test_parts_of_the_backward_pass_add_up(share: str, monkeypatch: pytest.MonkeyPatch):
    tuned = adapted(share=share)
    expected = stepped(tuned)
    for entries in (1, 64, 1 << 30):
        monkeypatch.setattr("lora_fx.adapters.rawweight.experts._ENTRIES", entries)
        close(stepped(tuned), expected, 1e-5)


def test_gradients_can_be_differentiated_and_frozen_factors_get_none():
    tuned = adapted(share="outer")
    parameters = list(lora_fx.parameters(tuned))
    slopes = []
    for model in (tuned, apart(tuned)):
        x, index, weights = given()
        (slope,) = torch.autograd.grad(model(x, index, weights).sin().sum(), x, create_graph=True)
        slopes.append(torch.autograd.grad(slope.square().sum(), (x, weights)))
    close(list(slopes[0]), list(slopes[1]))
    parameters[0].requires_grad_(False)
    x, index, weights = given()
    tuned(x, index, weights).sum().backward()
    assert [parameter.grad is None for parameter in parameters] == [True, False, False, False]


def test_half_precision_is_right_within_rounding():
    tuned, wide = adapted(dtype=torch.bfloat16, share="outer"), adapted(share="outer")
    with torch.no_grad():
        for one, other in zip(wide.parameters(), tuned.parameters(), strict=True):
            one.copy_(other)
    x, index, weights = given(torch.bfloat16)
    result = stepped(tuned, inputs=(x, index, weights))
    wanted = stepped(
        wide, inputs=(x.detach().float().requires_grad_(), index, weights.detach().float().requires_grad_())
    )
    assert is_one_operation(result[0])
    for a, b in zip(result, wanted, strict=True):
        assert (a.float() - b).abs().max() <= 0.03 * b.abs().max()


def test_a_bank_of_one_expert_is_the_same_shared_or_not():
    torch.manual_seed(0)
    base = Mixture(qwen(), "eager")
    base.experts.num_experts = 1
    for name in ("gate_up_proj", "down_proj"):
        base.experts._parameters[name] = nn.Parameter(base.experts._parameters[name][:1].detach())
    x, _, weights = given()
    index, results = torch.zeros(len(x), 1, dtype=torch.int64), []
    for share in ("none", "outer"):
        lora = {"r": 2, "share": share}
        tuned = lora_fx.apply(base, {"rules": [{"match": {"name": "**"}, "lora": lora}]}, (x, index, weights[:, :1]))
        randomise_all_(tuned)
        inputs = (x.detach().requires_grad_(), index, weights[:, :1].detach().requires_grad_())
        results.append(stepped(tuned, inputs=inputs))
    close(*results, 1e-6)


# -- files, copies, other adapters


@pytest.mark.slow
@shared_kinds
@pytest.mark.sampled(2)
def test_saving_and_loading_keeps_every_bit_and_the_sharing(kind: Kind, share: str, tmp_path: Any):
    tuned, sample = trained(kind, share, dropout=0.2), kind.sample()
    lora_fx.save(tuned, tmp_path / "a")
    loaded = lora_fx.load(kind.build(), tmp_path / "a", sample)
    assert same_values(tuned, loaded)
    assert torch.equal(run(loaded, sample), run(tuned, sample))
    lora_fx.save(loaded, tmp_path / "b")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert len(files[0]) == len(files[1])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_reads_the_file_as_factors_for_each_expert_and_hands_them_back(tmp_path: Any):
    peft = pytest.importorskip("peft")
    kind = next(one for one in EXPERTS if one.name == "Mixtral, eager")
    tuned, sample = trained(kind), kind.sample()
    lora_fx.save(tuned, tmp_path)
    theirs = peft.PeftModel.from_pretrained(kind.build(), tmp_path).eval()
    assert relative(run(theirs.base_model.model, sample), run(tuned, sample)) <= CLOSE
    back = lora_fx.from_peft(lora_fx.to_peft(tuned), sample)
    assert relative(run(back, sample), run(tuned, sample)) <= CLOSE
    assert {one.spec.lora.share for _, one in all_attached(back)} == {"none"}


def test_factors_that_differ_are_no_shared_ones():
    tuned = trained(loop(), "A")
    (_, one), *_ = all_attached(tuned)
    form = form_of(one.spec.site, one.owner)
    A, B = torch.randn(3 * RANK, 6), torch.randn(8, 3 * RANK)
    assert misfit(form, (), "A", A, B) == "its experts share A, and their lora_A differ"
    assert misfit(form, (), "A", A[:RANK].repeat(3, 1), B) is None
    assert misfit(form, (), "B", A, B) == "its experts share B, and their lora_B differ"
    assert misfit(form, (), "none", A, B) is None
    assert misfit(form, ((0, 1),), "A", A, B) == "its experts share A, and it is no whole bank"


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_and_pickles_compute_the_same(backend: str):
    tuned, sample = trained(loop(), backend=backend), loop().sample()
    for twin in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        assert torch.equal(run(twin, sample), run(tuned, sample))
        assert same_values(twin, tuned)


@every_kind
def test_adapters_that_share_and_that_do_not_add_up(kind: Kind):
    sample, base = kind.sample(), kind.build()
    tuned = trained(kind)
    lora_fx.add(tuned, rules(kind, "none", init="random"), adapter="whole")
    lora_fx.add(tuned, rules(kind, "A", init="random", r=3), adapter="A")
    weights = {"default": 0.5, "whole": -1.0, "A": 2.0}
    lora_fx.use(tuned, weights)
    merged = lora_fx.merge(tuned)
    assert relative(run(merged, sample), run(tuned, sample)) <= CLOSE
    for name in kind.weights:
        parts = [(one, weights[one.spec.adapter]) for _, one in all_attached(tuned) if one.spec.site.weight == name]
        deltas = [share * one.delta() for one, share in parts]
        assert len(deltas) == 3
        assert relative(merged.get_parameter(name), base.get_parameter(name) + sum(deltas)) <= 1e-6
    lora_fx.combine(tuned, weights, adapter="sum")
    lora_fx.use(tuned, "sum")
    assert relative(run(tuned, sample), run(merged, sample)) <= CLOSE


def test_swap_takes_what_is_shared_and_refuses_what_is_not(tmp_path: Any):
    sample, kind = loop().sample(), loop()
    shared, whole = trained(kind, "A"), trained(kind, "none")
    lora_fx.save(shared, tmp_path / "shared")
    lora_fx.save(whole, tmp_path / "whole")
    fresh = started(kind, "A")
    before = fresh.state_dict()
    with pytest.raises(lora_fx.AdapterMismatchError, match=r"file lora_A for each expert +model one for all"):
        lora_fx.swap(fresh, tmp_path / "whole", adapter="default")
    with pytest.raises(lora_fx.AdapterMismatchError, match=r"\[3, 2, 6\] +model float32 \[1, 2, 6\]"):
        lora_fx.swap(fresh, lora_fx.adapter_state(whole), adapter="default")
    assert all(torch.equal(before[key], value) for key, value in fresh.state_dict().items())
    lora_fx.swap(fresh, tmp_path / "shared", adapter="default")
    assert torch.equal(run(fresh, sample), run(shared, sample))
    other = started(kind, "A")
    lora_fx.swap(other, lora_fx.adapter_state(shared), adapter="default")
    assert same_values(other, shared)
    roomy = started(kind, "none", r=4)
    lora_fx.swap(roomy, tmp_path / "shared", adapter="default")
    assert relative(run(roomy, sample), run(shared, sample)) <= CLOSE


def test_an_adapter_with_more_room_stays_shared(tmp_path: Any):
    sample, kind = loop().sample(), loop()
    tuned = trained(kind)
    lora_fx.save(tuned, tmp_path)
    other = started(kind, "none")
    lora_fx.add(other, tmp_path, adapter="b", rank=5)
    lora_fx.use(other, "b")
    assert relative(run(other, sample), run(tuned, sample)) <= CLOSE
    assert {one.lora_A.weight.shape[:2] for _, one in all_attached(other) if one.spec.lora.share == "A"} >= {(1, 5)}


@every_kind
def test_data_for_exported_graphs_computes_the_same(kind: Kind):
    tuned, sample = trained(kind), kind.sample()
    lora_fx.add(tuned, rules(kind, "none", init="random", r=4), adapter="whole")
    parts = base_graph_parts(tuned)
    for name, values in parts.adapters.items():
        parts.model.load_state_dict({**parts.model.state_dict(), **values})
        lora_fx.use(tuned, name)
        assert relative(run(parts.model, sample), run(tuned, sample)) <= CLOSE


def test_print_and_inspect_tell_it(tmp_path: Any):
    tuned = trained(loop())
    assert "gate_up_proj: lora r=2 scaling=1.5 adapter=default share=A" in repr(tuned)
    lora_fx.save(tuned, tmp_path)
    from lora_fx.files.adapter.contents import contents_of

    assert "a factor that all experts share" in contents_of(tmp_path).features


def test_tokens_meet_no_factor_of_an_expert_that_has_none():
    tuned = adapted(share="A")
    stepped(tuned)
    (_, up), _ = all_attached(tuned)
    assert not up.lora_B.weight.grad[NUMBER - 1].any()
    assert up.lora_A.weight.grad.shape[0] == 1

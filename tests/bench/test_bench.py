"""`lora-fx bench`: what is counted is right and the same each time; what is timed says when it says nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lora_fx
from lora_fx.bench import counters, peer
from lora_fx.bench.analytic import Flops, Linear
from lora_fx.bench.subjects import LB, OURS, SPREAD, FrozenBase, loss_of
from lora_fx.errors import InvariantError, RefusedError
from tests.support import zoo
from tests.support.clitools import small
from tests.support.zoo import rules

N, M, OUT, R = 6, 16, 32, 4
LINEAR = Linear(N, M, OUT, R)


def single(r: int = R) -> tuple[nn.Module, Tensor]:
    """Return an adapted linear layer and its input."""
    tuned = lora_fx.apply(nn.Sequential(nn.Linear(M, OUT, bias=False)), rules("**", r=r))
    return tuned, torch.randn(N, M)


def step_of(model: nn.Module, x: Tensor, input_gradient: bool = True):
    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(x.detach().requires_grad_(input_gradient)).sum().backward()

    return step


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    with counters.frozen_heap():
        yield


# -- counters


def test_flops_of_a_product_are_two_for_each_multiplication():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert counters.flops(lambda: a @ b) == 2 * 3 * 5 * 7


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda: torch.zeros(3, 7).addmm_(torch.zeros(3, 5), torch.zeros(5, 7)), 2 * 3 * 5 * 7),
        (lambda: torch.zeros(2, 3, 7).baddbmm_(torch.zeros(2, 3, 5), torch.zeros(2, 5, 7)), 2 * 2 * 3 * 5 * 7),
        (lambda: torch.zeros(3, 5) @ torch.zeros(5), 2 * 3 * 5),
        (lambda: torch.addmv(torch.zeros(3), torch.zeros(3, 5), torch.zeros(5)), 2 * 3 * 5),
        (lambda: torch.zeros(5) @ torch.zeros(5), 2 * 5),
        (lambda: nn.functional.scaled_dot_product_attention(*torch.zeros(3, 1, 2, 4, 8)), 2 * 2 * 2 * 4 * 4 * 8),
    ],
    ids=["in place", "batched in place", "vector", "added vector", "two vectors", "attention"],
)
def test_flops_that_torch_does_not_count_itself_are_counted(work, expected):
    with torch.no_grad():
        assert counters.flops(work) == expected


def test_flops_of_a_backward_pass_of_attention_are_counted():
    q, k, v = torch.zeros(3, 1, 2, 4, 8).requires_grad_()
    forward = 2 * 2 * 2 * 4 * 4 * 8

    def step() -> None:
        nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()

    assert counters.flops(step) == forward + 5 * forward // 2  # torch's formula: the scores are computed again


def test_aten_calls_are_those_of_both_passes():
    x = torch.ones(3, requires_grad=True)
    assert counters.tallied(lambda: x * 2).calls == 1
    assert counters.tallied(lambda: (x * 2).sum().backward()).calls > 3


def test_saved_bytes_count_every_storage_once_and_no_weight():
    layer, x = nn.Linear(M, OUT), torch.randn(N, M)

    def forward() -> None:
        layer(x) + torch.sin(layer(x).detach() * layer.bias)

    product = 4 * N * OUT
    assert counters.saved_bytes(lambda: layer(x), layer.parameters()) == 4 * N * M
    assert counters.saved_bytes(lambda: (layer(x), layer(x)), layer.parameters()) == 4 * N * M
    assert counters.saved_bytes(forward, layer.parameters()) == 4 * N * M + 2 * product
    assert counters.saved_bytes(lambda: layer(x.requires_grad_())) == 4 * (N * M + M * OUT)


def test_peak_is_of_what_is_live_at_once():
    x = torch.zeros(1000)

    def one_by_one() -> None:
        for _ in range(3):
            torch.add(x, 1)

    def together() -> Tensor:
        return torch.cat([torch.add(x, 1), torch.add(x, 2)])

    assert counters.tallied(one_by_one).peak == 4 * 1000
    assert counters.tallied(together).peak == 4 * (1000 + 1000 + 2000)
    assert counters.tallied(lambda: x.view(10, 100)).peak == 0


def test_two_counts_of_the_same_step_are_equal():
    base = FrozenBase.of(*small())
    ours = base.adapted(OURS, "attention")
    ours.step()
    first, second = (counters.counted(ours.step, ours.forward, ours.own()) for _ in range(2))
    assert first == second
    assert min(first.flops, first.saved_bytes, first.peak_bytes, first.aten_calls) > 0


def test_counting_leaves_the_graphs_of_an_adapted_model_in_use():
    base = FrozenBase.of(zoo.Encoder(), (zoo.tokens(2, 5),))
    ours = base.adapted(OURS, rules("**.{query,value}", r=2))
    ours.step()
    before = [region.misses for region in lora_fx.inspect(ours.model).regions]
    counters.counted(ours.step, ours.forward, ours.own())
    after = lora_fx.inspect(ours.model).regions
    assert [region.misses for region in after] == before
    assert all(region.hits for region in after)
    with FlopCounterMode(display=False):
        ours.step()
    assert "a global module hook" in lora_fx.inspect(ours.model).regions[0].misses


# -- formulas


@pytest.mark.parametrize("input_gradient", [True, False])
@pytest.mark.parametrize("backend", ["auto", "modules"])
@pytest.mark.sampled(2)
def test_formula_of_one_linear_is_what_is_counted(input_gradient: bool, backend: str):
    layer, x = nn.Sequential(nn.Linear(M, OUT)), torch.randn(N, M)
    tuned = lora_fx.apply(layer, rules("**", r=R), (x,), backend)
    assert counters.flops(step_of(tuned, x, input_gradient)) == LINEAR.factored(input_gradient).total
    with torch.no_grad():
        assert counters.flops(lambda: tuned(x)) == LINEAR.factored().forward


def test_flops_of_modules_are_those_that_torch_counts():
    tuned, x = single()
    with FlopCounterMode(display=False) as theirs:
        step_of(tuned, x)()
    assert theirs.get_total_flops() == counters.flops(step_of(tuned, x)) == LINEAR.factored().total


def test_formula_of_a_frozen_linear_is_what_is_counted():
    layer, x = nn.Linear(M, OUT).requires_grad_(False), torch.randn(N, M)
    assert counters.flops(step_of(layer, x)) == LINEAR.base().total == 4 * N * M * OUT
    assert LINEAR.base(input_gradient=False) == Flops(2 * N * M * OUT, 0)


@pytest.mark.parametrize("rebuilt", [False, True])
def test_formula_of_a_merged_linear_is_what_is_counted(rebuilt: bool):
    weight, A, B, x, dY = (torch.randn(*shape) for shape in ((OUT, M), (R, M), (OUT, R), (N, M), (N, OUT)))

    def step() -> None:
        x @ (weight + B @ A).T
        z, h = dY @ B, x @ A.T
        z.T @ x, dY.T @ h
        dY @ (weight + (B @ A if rebuilt else 0))

    assert counters.flops(step) == LINEAR.merged(rebuilt=rebuilt).total


def test_formula_of_a_model_is_the_lower_bound_and_the_sum_over_sites():
    sample = (zoo.tokens(2, 5),)
    base = FrozenBase.of(zoo.Encoder(), sample)
    lower, ours = base.frozen(LB), base.adapted(OURS, rules("**.layer.**", r=R))
    plan = lora_fx.plan(base.model, rules("**.layer.**", r=R), sample)
    sites = [Linear(10, inputs, outputs, R) for outputs, inputs in (site.shape for site in plan.adapted)]
    assert len(sites) == 18
    for model in (lower, ours):
        model.step()
    expected = counters.flops(lower.step) + sum(site.adapter().total for site in sites)
    assert counters.flops(ours.step) == expected


# -- what is compared


def test_lower_bound_goes_back_through_every_layer_and_trains_nothing():
    base = FrozenBase.of(*small())
    seen: list[str] = []
    lower = base.frozen(LB)
    for name, module in lower.model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_full_backward_hook(lambda *_, name=name: seen.append(name))
    lower.step()
    assert base.embedding == "embed"
    assert len(seen) == 10
    assert all(parameter.grad is None for parameter in lower.model.parameters())


def test_first_floating_input_takes_the_gradient():
    base = FrozenBase.of(zoo.Mlp(), (zoo.features(2, 3),))
    lower = base.frozen(LB)
    lower.step()
    assert lower.leaf is not None
    assert lower.leaf.grad.abs().sum() > 0
    assert not base.sample.args[0].requires_grad


def test_subjects_share_the_storage_of_the_base_and_leave_the_model_alone():
    model, inputs = small()
    base = FrozenBase.of(model, inputs)
    full = base.full()
    full.step()
    for subject in (base.frozen(LB), base.adapted(OURS, "attention"), full):
        assert subject.model.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for name, parameter in full.model.named_parameters())


def test_second_factors_are_not_zero():
    tuned = FrozenBase.of(*small()).adapted(OURS, "attention").model
    values = torch.cat([p.flatten() for name, p in tuned.named_parameters() if "lora_B" in name])
    assert abs(values.std() - SPREAD) < SPREAD / 5


def test_another_dtype_is_that_of_weights_and_inputs():
    base = FrozenBase.of(zoo.Mlp(), (zoo.features(2, 3),), torch.bfloat16)
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.bfloat16}
    assert base.sample.args[0].dtype == torch.bfloat16
    ours = base.adapted(OURS, rules("**", r=2))
    assert {parameter.dtype for parameter in lora_fx.parameters(ours.model)} == {torch.float32}


def test_loss_is_the_models_own_or_of_its_first_floating_tensor():
    own = torch.tensor(3.0)
    assert loss_of({"loss": own, "logits": torch.ones(2)}) is own
    assert loss_of((torch.zeros(2, dtype=torch.long), torch.tensor([2.0, 9.0]))) == 4
    with pytest.raises(RefusedError, match="no floating point tensor"):
        loss_of(torch.zeros(2, dtype=torch.long))


def test_loss_of_what_ends_in_a_norm_has_a_gradient():
    x = torch.randn(3, 8, requires_grad=True)
    loss_of(nn.functional.layer_norm(x, (8,))).backward()
    assert x.grad.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("model", "inputs", "reason"),
    [
        (lambda: nn.Linear(4, 4, device="meta"), (torch.zeros(1, 4),), "no values"),
        (lambda: nn.Linear(4, 4), None, "no inputs to measure with"),
        (lambda: OneHot(), (torch.zeros(1, dtype=torch.long),), "nowhere to go"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, inputs, reason: str):
    with pytest.raises(RefusedError, match=reason):
        FrozenBase.of(model(), inputs)


class OneHot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(nn.functional.one_hot(ids, 4).float())


# -- PEFT


def test_peft_is_given_the_same_adapters():
    pytest.importorskip("peft")
    base = FrozenBase.of(*small())
    mixed = {"version": 1, "rules": [
        {"match": {"name": "**.q_proj"}, "lora": {"r": 2, "alpha": 6}},
        {"match": {"name": "**.{k,v}_proj"}, "lora": {"r": 4, "alpha": 5}},
    ]}  # fmt: skip
    ours = base.adapted(OURS, mixed)
    theirs = peer.peft_subject(base, ours.model)
    assert peer.check_parity(ours, theirs) < 1e-5
    assert ours.model.training
    assert theirs.model.training


def test_peft_that_computes_something_else_is_found():
    pytest.importorskip("peft")
    base = FrozenBase.of(*small())
    ours = base.adapted(OURS, "attention")
    theirs = peer.peft_subject(base, ours.model)
    with torch.no_grad():
        next(p for name, p in theirs.model.named_parameters() if "lora_B" in name).mul_(1.5)
    with pytest.raises(InvariantError, match="their times mean nothing"):
        peer.check_parity(ours, theirs)


@pytest.mark.parametrize(
    ("model", "inputs", "given", "path", "reason"),
    [
        (zoo.Encoder, (zoo.tokens(1, 3),), {**rules("**.query", r=2)["rules"][0], "slices": {"of": ["a", "b"], "adapt": ["a"]}},
         "layer.0.attention.query", "parts of a weight"),
        (lambda: Raw(), (torch.randn(2, 4),), rules("weight_in", r=2)["rules"][0], "weight_in", "what the model itself owns"),
    ],
    ids=["slices", "raw parameter"],
)  # fmt: skip
def test_sites_that_peft_cannot_adapt_are_refused_by_name(model, inputs, given, path: str, reason: str):
    pytest.importorskip("peft")
    base = FrozenBase.of(model(), inputs)
    ours = base.adapted(OURS, {"version": 1, "rules": [given]})
    with pytest.raises(RefusedError) as caught:
        peer.peft_subject(base, ours.model)
    assert reason in dict(caught.value.refusals)[path]


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight_in = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight_in)

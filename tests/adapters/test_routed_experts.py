"""Adapted experts: only what rows are routed to is computed, and less is kept than the frozen model keeps."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx.adapters.rawweight.factored import Factored
from lora_fx.adapters.rawweight.views import WeightView
from lora_fx.adapters.rawweight.weight import LoRAWeight, Part
from tests.support.zoo import randomise_

MEMBERS, OUT, IN, R, ROWS = 3, 6, 8, 2, 7
OFFSETS = torch.tensor([3, 3, 6], dtype=torch.int32)
"""The second member gets no rows, and the last row belongs to none."""
GROUPED_MM = getattr(F, "grouped_mm", None) or torch._grouped_mm  # its name before torch 2.10


def picked(weight: Tensor, x: Tensor) -> Tensor:
    """Two members, picked by an index tensor, one after the other."""
    first, second = torch.tensor(2), torch.tensor(0)
    return F.linear(x, weight[first]) + F.linear(x * x, weight[second])


def picked_with_bias(weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(x.view(1, *x.shape), weight[torch.tensor(1)], torch.arange(6, dtype=x.dtype))


def gated(weight: Tensor, x: Tensor) -> Tensor:
    """What enters is a product of two tensors, as in a gated expert."""
    return F.linear(F.silu(x[:, :8]) * x.sin(), weight[torch.tensor(2)])


def grouped(weight: Tensor, x: Tensor) -> Tensor:
    product = GROUPED_MM if isinstance(weight, LoRAWeight) else by_hand
    return product(x, weight.transpose(-2, -1), offs=OFFSETS)[:6]


def by_hand(x: Tensor, matrices: Tensor, offs: Tensor) -> Tensor:
    starts = [0, *offs.tolist()[:-1]]
    return torch.cat([x[a:b] @ matrix for a, b, matrix in zip(starts, offs.tolist(), matrices, strict=True)])


products = pytest.mark.parametrize("product", [picked, picked_with_bias, gated, grouped], ids=lambda p: p.__name__)
Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Operands:
    """A frozen bank, the factors B and A of its adapter, and rows."""

    base: Tensor
    rows: Tensor
    columns: Tensor
    x: Tensor

    @staticmethod
    def random(dtype: torch.dtype = torch.float32, wants: bool = True) -> Operands:
        factors = torch.float32 if dtype == torch.bfloat16 else dtype
        base, x = torch.randn(MEMBERS, OUT, IN, dtype=dtype), torch.randn(ROWS, IN, dtype=dtype)
        rows, columns = torch.randn(MEMBERS, OUT, R, dtype=factors), torch.randn(MEMBERS, R, IN, dtype=factors)
        return Operands(base, rows.requires_grad_(), columns.requires_grad_(), x.requires_grad_(wants))

    @property
    def shown(self) -> LoRAWeight:
        view = WeightView.of((MEMBERS, OUT, IN), banked=True)
        return LoRAWeight(Part(self.base, Factored(view, self.rows, self.columns, R, 0.5), None))

    @property
    def whole(self) -> Tensor:
        return self.base.to(self.rows.dtype) + 0.5 * self.rows @ self.columns

    @property
    def wanting(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in (self.x, self.rows, self.columns) if tensor.requires_grad)


@products
@pytest.mark.parametrize("wants", [True, False])
def test_product_and_gradients_are_those_of_the_whole_weight(product: Product, wants: bool):
    given = Operands.random(wants=wants)
    one, other = product(given.shown, given.x), product(given.whole, given.x)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    gradients = (torch.autograd.grad(result.sin().sum(), given.wanting) for result in (one, other))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@products
def test_product_can_be_differentiated_twice(product: Product):
    given = Operands.random()
    slopes = []
    for weight in (given.shown, given.whole):
        first = torch.autograd.grad(product(weight, given.x).sin().sum(), given.wanting, create_graph=True)
        slopes.append(torch.autograd.grad(sum(gradient.sin().sum() for gradient in first), given.wanting))
    for a, b in zip(*slopes, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@products
def test_half_precision_base_with_float32_factors_is_right_within_rounding(product: Product):
    given = Operands.random(torch.bfloat16)
    result, expected = product(given.shown, given.x), product(given.whole, given.x.float())
    assert result.dtype == torch.bfloat16
    assert (result.float() - expected).abs().max() <= 0.02 * expected.abs().max()
    gradients = (torch.autograd.grad(either.sum(), given.wanting) for either in (result, expected))
    for a, b in zip(*gradients, strict=True):
        assert (a.float() - b.float()).abs().max() <= 0.02 * b.abs().max()


def kept(run: Callable[[], Tensor]) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run()
    return saved


def test_rows_that_are_a_product_are_not_kept_but_their_factors_which_are_kept_anyway():
    given = Operands.random()
    gate, up = given.x.exp(), given.x.sin()
    entering = gate * up
    member = given.shown[torch.tensor(1)]
    memory = {tensor.untyped_storage()._cdata for tensor in kept(lambda: F.linear(entering, member))}
    assert entering.untyped_storage()._cdata not in memory
    assert {gate.untyped_storage()._cdata, up.untyped_storage()._cdata} <= memory


def test_rows_that_were_changed_in_place_since_are_kept_themselves():
    given = Operands.random()
    gate = given.x.sin()
    entering = gate * given.x.cos()
    with torch.no_grad():
        gate.zero_()  # a gradient through the product itself would be an error of torch from here on
    products = F.linear(entering, given.shown[torch.tensor(1)]), F.linear(entering.detach(), given.whole[1])
    gradients, expected = (torch.autograd.grad(result.sum(), given.columns)[0] for result in products)
    torch.testing.assert_close(gradients, expected)


def test_gated_experts_can_be_checkpointed_and_offloaded():
    given = Operands.random()

    def run(x: Tensor) -> Tensor:
        return gated(given.shown, x)

    expected = torch.autograd.grad(run(given.x).sum(), given.wanting)
    runs = [torch.autograd.grad(checkpoint(run, given.x, use_reentrant=False).sum(), given.wanting)]
    with torch.autograd.graph.save_on_cpu():
        result = run(given.x).sum()
    runs.append(torch.autograd.grad(result, given.wanting))
    for gradients in runs:
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


# -- whole models

pytest.importorskip("transformers")
_spec = importlib.util.spec_from_file_location(
    "benchmark_of_experts", Path(__file__).parents[2] / "benchmarks" / "experts.py"
)
assert _spec is not None
assert _spec.loader is not None
experts = importlib.util.module_from_spec(_spec)
__import__("sys").modules[_spec.name] = experts  # dataclasses look it up there
_spec.loader.exec_module(experts)
implementations = pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])


def case(implementation: str, kind: type[nn.Module] = experts.Block):
    return experts.Case(kind, implementation, tokens=128)


def small(implementation: str):
    return experts.Case(experts.Block, implementation, experts.Shape("Mixtral", 8, 2, 224, 64), tokens=12)


@implementations
def test_adapted_experts_start_bit_equal_to_their_base(implementation: str):
    given = small(implementation)
    base, x = given.base(), given.input()
    tuned = lora_fx.apply(base, experts.RULES, (x[:, :8],))
    assert torch.equal(tuned(x), base(x))
    assert torch.equal(tuned(x.clone().requires_grad_()), base(x))


@implementations
def test_implementations_of_experts_agree(implementation: str):
    given = small(implementation)
    x = given.input().requires_grad_()
    results = []
    for specimen in (given, small("eager")):
        tuned = lora_fx.apply(specimen.base(), experts.RULES, (x[:, :8].detach(),))
        randomise_(tuned)
        tuned(x).square().sum().backward()
        results.append([tuned(x), *(p.grad for p in lora_fx.parameters(tuned))])
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize(
    "kind", [experts.Block, pytest.param(experts.Layer, marks=pytest.mark.slow)], ids=lambda kind: kind.__name__
)
def test_adapted_experts_compute_little_more_than_frozen_ones_and_keep_less(implementation: str, kind: type[nn.Module]):
    given = case(implementation, kind=kind)
    base, x = given.base(), given.input()
    tuned = experts.adapted(base, x)
    assert experts.flops(tuned, x) <= 1.05 * experts.flops(base, x)
    assert experts.saved_bytes(tuned, x) <= (0.7 if kind is experts.Block else 0.95) * experts.saved_bytes(base, x)
    assert experts.saved_bytes(tuned, x, weights=True) <= experts.saved_bytes(base, x, weights=True)
    assert experts.peak_bytes(tuned, x) <= 1.3 * experts.peak_bytes(base, x)  # of which the gradients are a sixth here


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_in_bfloat16_with_a_router_in_float32_compute_little_more_and_keep_less(implementation: str):
    given = experts.Case(experts.Block, implementation, experts.MIXTRAL, 128, torch.bfloat16)
    base, x = given.base(), given.input()
    tuned = experts.adapted(base, x)
    assert experts.flops(tuned, x) <= 1.05 * experts.flops(base, x)
    assert experts.saved_bytes(tuned, x) <= 0.8 * experts.saved_bytes(base, x)


@pytest.mark.slow
@implementations
def test_experts_that_share_a_factor_cost_no_more(implementation: str):
    tokens = 32 if implementation == "batched_mm" else 128  # which copies the weights of its experts for each
    given = experts.Case(experts.Block, implementation, tokens=tokens)
    base, x = given.base(), given.input()
    lora = {"r": experts.RANK, "share": "outer"}
    shared = lora_fx.apply(base, {"rules": [{"match": {"op": "experts"}, "lora": lora}]}, (x[:, :16],))
    randomise_(shared)
    plain = experts.adapted(base, x)
    for measure in (experts.flops, experts.saved_bytes, experts.peak_bytes):
        assert measure(shared, x) <= measure(plain, x), measure.__name__
    numbers = [sum(p.numel() for p in lora_fx.parameters(model)) for model in (shared, plain)]
    assert numbers[1] - numbers[0] == experts.RANK * 7 * (512 + 512), "A of one bank and B of the other, of 8 experts"


def test_experts_that_no_row_is_routed_to_are_not_computed():
    given = case("eager")
    base, x = given.base(), given.input()
    tuned = experts.adapted(base, x)
    one = x[:, :1]
    assert experts.flops(tuned, one) <= 1.05 * experts.flops(base, one)
    grads = copy.deepcopy(tuned)
    experts.step(grads, one)
    touched = {tuple(p.grad.flatten(1).abs().sum(1).nonzero().flatten().tolist()) for p in lora_fx.parameters(grads)}
    assert len(touched) == 1
    assert len(touched.pop()) == 2


def test_measure_of_kept_bytes_sees_what_is_kept():
    given = case("grouped_mm")
    base, x = given.base(), given.input()
    assert experts.saved_bytes(experts.Case.base(given).requires_grad_(True), x) > 1.15 * experts.saved_bytes(base, x)

"""One adapted layer as one autograd function: values, gradients and gradients of gradients, whatever is done around it.

The reference is what a textbook would write, in float64, with the mask that the layer's seed stands for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx.adapters.factors.dora import row_norms_factored
from lora_fx.adapters.fused import forward, masks, terms
from lora_fx.bench.analytic import Linear
from lora_fx.bench.counters import flops
from tests.support import zoo

IN, OUT, RANK, ALPHA = 6, 5, 3, 5.5
SCALING = ALPHA / RANK
EXACT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Of the largest entry: sums of a dozen products; one rounding of values, and one of each summand, in half precision."""
SHAPES = {
    "1-D": lambda: torch.randn(IN),
    "2-D": lambda: torch.randn(4, IN),
    "3-D": lambda: torch.randn(2, 3, IN),
    "4-D": lambda: torch.randn(2, 1, 3, IN),
    "transposed": lambda: torch.randn(2, IN, 3).transpose(1, 2),
    "expanded": lambda: torch.randn(1, 1, IN).expand(2, 3, IN),
    "sliced": lambda: torch.randn(2, 7, 2 * IN)[:, 1::2, ::2],
    "no rows": lambda: torch.randn(0, IN),
    "no tokens": lambda: torch.randn(2, 0, IN),
}


def adapted(
    kind: str = "linear",
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    random: bool = True,
    **lora: Any,
) -> nn.Module:
    """Return one adapted layer in training, always with the same values."""
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT, bias=bias) if kind == "linear" else Conv1D(OUT, IN)
    rules = zoo.rules("0", r=RANK, alpha=ALPHA, **lora)
    tuned = lora_fx.apply(nn.Sequential(layer).to(dtype), rules, backend="modules")
    if random:
        zoo.randomise_(tuned)
    return tuned.train()[0]


def tensors_of(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return A, B and, for DoRA, m."""
    tensors = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
    return tensors | (
        {"m": layer.lora_magnitude_vector["default"].weight} if hasattr(layer, "lora_magnitude_vector") else {}
    )


def rows_of(layer: nn.Module) -> Tensor:
    """Return the base weight as [out, in]."""
    weight = layer.get_parameter("weight").detach()
    return weight.t() if isinstance(layer, Conv1D) else weight


def norms_of(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return ‖W + scaling · B A‖ of each row, a constant."""
    return torch.linalg.vector_norm(W + SCALING * (B @ A), dim=1).detach()


def reference(layer: nn.Module, x: Tensor, seed: Tensor | None, wide: dict[str, Tensor]) -> Tensor:
    """Return base + scaling · B A dropout(x) (DoRA: stretched) in the dtype of x and of `wide`, which holds A, B, m."""
    weight = rows_of(layer).to(x.dtype)
    bias = torch.zeros(OUT, dtype=x.dtype) if layer.bias is None else layer.bias.detach().to(x.dtype)
    inner = x
    p = layer.lora_dropout["default"].p if hasattr(layer, "lora_dropout") else 0.0
    if seed is not None and p:
        mask = masks.kept(seed, x.numel() // IN, IN, p, x.dtype).view(x.shape)
        inner = x * mask / masks.keeping(p)
    total = x @ weight.t() + SCALING * (inner @ wide["A"].t()) @ wide["B"].t()
    if "m" not in wide:
        return total + bias
    return wide["m"] / norms_of(weight, wide["A"], wide["B"]) * total + bias


def assert_is_reference(layer: nn.Module, x: Tensor, slope: bool = True) -> None:
    """Assert that value and gradients of the layer are those of the reference in float64."""
    x = x.to(layer.weight.dtype).detach().requires_grad_(slope)
    torch.manual_seed(3)
    y = layer(x)
    assert "_Adapted" in type(y.grad_fn).__name__, "the fused function is what is examined"
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    wanted = {name: tensor for name, tensor in tensors_of(layer).items() if tensor.requires_grad}
    gradients = torch.autograd.grad(y, [*wanted.values(), *([x] if slope else [])], cotangent)

    torch.manual_seed(3)
    seed = masks.new_seed(x) if hasattr(layer, "lora_dropout") else None
    wide_x = x.detach().double().requires_grad_(slope)
    wide = {
        name: tensor.detach().double().requires_grad_(tensor.requires_grad)
        for name, tensor in tensors_of(layer).items()
    }
    expected_y = reference(layer, wide_x, seed, wide)
    sources = [wide[name] for name in wanted] + ([wide_x] if slope else [])
    expected = torch.autograd.grad(expected_y, sources, cotangent.double())
    for name, one, other in zip(["y", *wanted, "x"], (y, *gradients), (expected_y, *expected), strict=False):
        assert one.shape == other.shape
        scale = float(other.detach().abs().max()) if other.numel() else 1.0
        largest = float((one.detach().double() - other.detach()).abs().max()) if other.numel() else 0.0
        assert largest <= EXACT[x.dtype] * max(scale, 1e-3), f"{name} differs by {largest} of {scale}"
    assert [tensor.dtype for tensor in gradients[: len(wanted)]] == [tensor.dtype for tensor in wanted.values()]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("p", [0.0, 0.5, 0.1, 0.01])
@pytest.mark.parametrize("kind", ["linear", "no bias", "Conv1D"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.sampled(2)
def test_value_and_gradients_are_those_of_the_formula(shape: str, kind: str, p: float, dora: bool):
    layer = adapted(kind.split()[0] if kind != "no bias" else "linear", bias=kind != "no bias", dropout=p, dora=dora)
    assert_is_reference(layer, SHAPES[shape]())


@pytest.mark.parametrize("factors", ["float32", "the base's"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"dora": True}], ids=["plain", "dropout", "dora"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_value_and_gradients_are_right_in_every_dtype(kind: str, options: dict[str, Any], dtype: Any, factors: str):
    layer = adapted(kind, dtype, **options)
    if factors != "float32":
        for module in (*layer.lora_A.modules(), *layer.lora_B.modules()):
            module.to(dtype)
    assert_is_reference(layer, SHAPES["3-D"]())


@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"dora": True}], ids=["plain", "dropout", "dora"])
@pytest.mark.parametrize(
    "frozen", [("A",), ("B",), ("A", "B"), ("m",), ()], ids=lambda names: "+".join(names) or "none"
)
@pytest.mark.parametrize("slope", [True, False], ids=["x with gradient", "first layer"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(slope: bool, frozen: tuple[str, ...], options: Any):
    layer = adapted(**options)
    for name, tensor in tensors_of(layer).items():
        tensor.requires_grad_(name not in frozen)
    if slope or any(tensor.requires_grad for tensor in tensors_of(layer).values()):
        assert_is_reference(layer, SHAPES["3-D"](), slope)


@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"dora": True}], ids=["plain", "dropout", "dora"])
def test_gradcheck_and_gradgradcheck(kind: str, options: dict[str, Any]):
    layer = adapted(kind, **options)
    names, values = list(tensors_of(layer)), [tensor.detach().clone() for tensor in tensors_of(layer).values()]
    norms = None if "m" not in names else norms_of(rows_of(layer), values[0], values[1])

    def run(x: Tensor, *given: Tensor) -> Tensor:
        tensors = dict(zip(names, given, strict=True))
        # the norm counts as a constant, which numerical gradients would not know
        scale = None if norms is None else tensors["m"] / norms
        seed, p = (torch.tensor(5), 0.5) if options.get("dropout") else (None, 0.0)
        facts = terms.Facts(SCALING, kind == "Conv1D", p, seed)
        term = terms.Term(facts, layer.get_parameter("weight"), layer.bias, tensors["A"], tensors["B"], scale)
        return forward.adapted((term,), x)[0]

    given = [value.requires_grad_() for value in (torch.randn(2, 2, IN, dtype=torch.float64), *values)]
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"dora": True}], ids=["plain", "dropout", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_zero_b_is_the_layer_alone_bit_by_bit(kind: str, dtype: torch.dtype, options: dict[str, Any]):
    layer = adapted(kind, dtype, random=False, **options)
    x = SHAPES["3-D"]().to(dtype).requires_grad_()
    y, alone = layer(x), layer.base_forward(x)
    assert torch.equal(y, alone)
    cotangent = torch.randn_like(y)
    slopes = [torch.autograd.grad(result, x, cotangent)[0] for result in (y, alone)]
    assert torch.equal(*slopes)
    with torch.no_grad():
        assert torch.equal(layer(x), alone)


@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_many_rows_are_dropped_out_in_parts_with_the_same_result(kind: str, monkeypatch):
    monkeypatch.setattr(masks, "_ENTRIES", 1)
    assert_is_reference(adapted(kind, dropout=0.5), torch.randn(200, IN))


class Widest(TorchDispatchMode):
    """Remembers the largest float32 tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.numbers = max(self.numbers, result.numel())
        return result


def test_a_bfloat16_base_with_float32_adapters_casts_the_factors_and_not_x():
    layer, x = adapted(dtype=torch.bfloat16), torch.randn(64, IN, dtype=torch.bfloat16).requires_grad_()
    factors = tensors_of(layer)
    with Widest() as widest:
        slopes = torch.autograd.grad(layer(x).sum(), [x, *factors.values()])
    assert widest.numbers == max(factor.numel() for factor in factors.values()) < x.numel(), "only gradients of factors"
    assert [gradient.dtype for gradient in slopes] == [torch.bfloat16, torch.float32, torch.float32]


def test_a_float16_base_with_float32_adapters_multiplies_in_float32_whose_range_gradients_need():
    layer = adapted(dtype=torch.float16)
    x = torch.full((2, IN), 1e-4, dtype=torch.float16)
    (slope,) = torch.autograd.grad(layer(x), tensors_of(layer)["A"], torch.full((2, OUT), 1e-4, dtype=torch.float16))
    assert 0 < float(slope.abs().max()) < torch.finfo(torch.float16).tiny / 16


def penalty(run: Callable[[Tensor], Tensor], x: Tensor, trained: list[Tensor]) -> list[Tensor]:
    """Return gradients, and the gradients of their squared norm."""
    first = torch.autograd.grad(run(x).square().sum(), [x, *trained], create_graph=True)
    return [*first, *torch.autograd.grad(sum(gradient.square().sum() for gradient in first), [x, *trained])]


@pytest.mark.parametrize("calls", [1, 2], ids=["once", "called twice"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_gradient_penalty_is_that_of_the_formula(calls: int, dora: bool):
    layer = adapted(dora=dora)
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)

    def repeated(step: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return step if calls == 1 else lambda x: step(F.pad(step(x), (0, IN - OUT)))  # A is in the history of x then

    trained = list(tensors_of(layer).values())
    gradients = penalty(repeated(layer), x, trained)
    expected = penalty(repeated(lambda x: reference(layer, x, None, tensors_of(layer))), x, trained)
    torch.testing.assert_close(gradients, expected, rtol=1e-11, atol=1e-11)


def test_two_backward_calls_add_up():
    layer = adapted(dropout=0.5)
    loss = layer(torch.randn(4, IN, dtype=torch.float64)).square().sum()
    loss.backward(retain_graph=True)
    once = [tensor.grad.clone() for tensor in tensors_of(layer).values()]
    loss.backward()
    assert all(
        torch.equal(tensor.grad, 2 * first) for tensor, first in zip(tensors_of(layer).values(), once, strict=True)
    )
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_output_may_be_changed_in_place():
    for shape in ("1-D", "2-D", "3-D"):
        for options in ({}, {"dora": True}, {"dropout": 0.5}):
            layer, x = adapted(**options), SHAPES[shape]().double()
            torch.manual_seed(3)
            F.relu(layer(x), inplace=True).sum().backward()
            gradients = [tensor.grad.clone() for tensor in tensors_of(layer).values()]
            layer.zero_grad()
            torch.manual_seed(3)
            F.relu(layer(x)).sum().backward()
            assert all(torch.equal(a, b.grad) for a, b in zip(gradients, tensors_of(layer).values(), strict=True))


def test_change_in_place_before_the_backward_pass_is_an_error():
    for change in ("A", "B", "x"):
        layer, x = adapted(), torch.randn(4, IN, dtype=torch.float64)
        y = layer(x)
        with torch.no_grad():
            (x if change == "x" else tensors_of(layer)[change]).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_what_is_saved_is_x_once_and_r_numbers_a_row():
    layer, x = adapted(dropout=0.1), torch.randn(50, IN, dtype=torch.float64, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    sizes = sorted(tensor.numel() for tensor in saved if tensor.untyped_storage().data_ptr() not in own)
    assert sizes == [50 * RANK, 50 * IN]


@pytest.mark.parametrize("slope", [True, False], ids=["x with gradient", "first layer"])
@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}], ids=["plain", "dropout"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
@pytest.mark.sampled(2)
def test_flops_of_a_step_are_those_of_the_formula(kind: str, options: dict[str, Any], slope: bool):
    layer, x = adapted(kind, **options), torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=slope)
    assert flops(lambda: layer(x).sum().backward()) == Linear(10, IN, OUT, RANK).factored(slope).total


# -- DoRA


def dense_norms(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return torch.linalg.vector_norm(W.double() + SCALING * B.double() @ A.double(), dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_factored_norms_are_those_of_the_sum(dtype: torch.dtype):
    W, A, B = (torch.randn(shape, dtype=dtype) for shape in ((50, 40), (4, 40), (50, 4)))
    W[0], W[1], B[1], B[2] = 0, 0, 0, 0
    norms, expected = row_norms_factored(W, A, B, SCALING), dense_norms(W, A, B)
    assert float(((norms - expected).abs() / expected.clamp_min(1e-30)).max()) < 1e-6
    assert norms[1] == 0
    zero = row_norms_factored(W, A, 0 * B, SCALING)
    assert torch.equal(zero, torch.linalg.vector_norm(W, dim=1))


def test_norm_of_a_row_that_the_adapter_nearly_cancels_is_finite_and_not_zero():
    A, B = torch.randn(3, IN), torch.randn(50, 3)
    for apart in (0.0, 1e-7, 1e-5, 1e-3, 1e-1):
        W = -SCALING * (B @ A) * (1 + apart)
        lengths = torch.linalg.vector_norm(W, dim=1)
        norms = row_norms_factored(W, A, B, SCALING)
        assert bool((norms > 0).all())
        assert float(((norms - dense_norms(W, A, B)).abs() / lengths).max()) < 2e-3, (
            "root of the rounding of W's square"
        )


def test_dora_of_a_row_of_zeros_is_that_row_with_finite_gradients():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(IN, OUT))
    base[0].weight.data[2] = 0
    tuned = lora_fx.apply(base, zoo.rules("0", r=RANK, dora=True), backend="modules")
    x = torch.randn(4, IN)
    assert torch.equal(tuned(x), base(x))
    tuned(x).square().sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in lora_fx.parameters(tuned))
    assert all(bool(parameter.isfinite().all()) for parameter in lora_fx.merge(tuned).parameters())


def test_dora_step_is_that_of_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(IN, 16), nn.Tanh(), nn.Linear(16, OUT))
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=True, target_modules=["0", "2"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ours = lora_fx.apply(base, zoo.rules(["0", "2"], r=RANK, alpha=ALPHA, dora=True), backend="modules")
    zoo.randomise_(ours)
    mine = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    other = {name.removeprefix("base_model.model."): parameter for name, parameter in theirs.named_parameters()}
    with torch.no_grad():
        for name, parameter in mine.items():
            other[name].copy_(parameter)
    x = torch.randn(8, IN)
    losses = [model(x).square().sum() for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    assert len(mine) == 6
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter.grad, other[name].grad, rtol=1e-5, atol=1e-5)

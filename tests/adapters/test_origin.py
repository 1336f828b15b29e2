"""A layer whose input is a layer norm's output keeps the norm's input, which autograd has anyway."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_fx.adapters.fused.origin import origin, told_layer_norm
from tests.adapters.test_fused import IN, OUT, adapted, tensors_of

NORMS = {
    "affine": lambda: nn.LayerNorm(IN),
    "no bias": lambda: nn.LayerNorm(IN, bias=False),
    "plain": lambda: nn.LayerNorm(IN, elementwise_affine=False),
    "of two dimensions": lambda: nn.LayerNorm((3, IN), eps=0.3),
}
norms = pytest.mark.parametrize("kind", NORMS)


def norm_of(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    norm = NORMS[kind]().to(dtype).requires_grad_(False)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def given(dtype: torch.dtype = torch.float64) -> Tensor:
    numbers = torch.randn(2, 3, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return (3 * numbers + 2).to(dtype).requires_grad_()


def slopes(layer: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(run(x).sin().sum(), [x, *tensors_of(layer).values()])


@norms
def test_gradients_and_gradients_of_gradients_are_right(kind: str):
    layer, norm = adapted(), norm_of(kind)
    assert origin(norm(given()))[1] is not None, "it is what is examined"
    factors = tuple(tensors_of(layer).values())

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return layer(norm(x))

    assert torch.autograd.gradcheck(run, (given(), *factors))
    assert torch.autograd.gradgradcheck(run, (given(), *factors))


@norms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_norm_is_made_again_within_rounding(kind: str, dtype: torch.dtype):
    x = norm_of(kind, dtype)(given(dtype))
    kept, make = origin(x)
    assert make is not None
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            torch.testing.assert_close(make(*kept), x)


def test_norm_in_float32_of_bfloat16_is_made_again_and_one_whose_mean_is_rounded_is_kept():
    x = given(torch.bfloat16)
    mixed, rounded = nn.LayerNorm(IN)(x), nn.LayerNorm(IN).bfloat16()(x)
    kept, make = origin(mixed)
    assert make is not None
    torch.testing.assert_close(make(*kept), mixed)
    assert origin(rounded) == ((rounded,), None)


@norms
def test_norm_in_bfloat16_that_tells_its_epsilon_is_made_again_bit_by_bit(kind: str):
    norm = norm_of(kind, torch.bfloat16)
    x = told_layer_norm(given(torch.bfloat16), norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    assert torch.equal(x, norm(given(torch.bfloat16)))
    kept, make = origin(x)
    assert make is not None
    assert all(tensor is not x for tensor in kept)
    for context in (torch.no_grad(), torch.enable_grad(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            made = make(*kept)
            assert made.dtype is torch.bfloat16
            assert torch.equal(made, x)


def test_output_of_a_norm_is_not_kept():
    layer, norm, x = adapted(), norm_of("affine"), given()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = norm(x)
        layer(y)
    memory = {tensor.untyped_storage()._cdata for tensor in saved}
    assert y.untyped_storage()._cdata not in memory
    assert x.untyped_storage()._cdata in memory


def test_output_that_was_changed_in_place_since_is_kept_itself():
    layer, norm, x = adapted(), norm_of("affine"), given()
    y = norm(x)
    with torch.no_grad():
        y.mul_(2)
    expected = torch.autograd.grad(layer(y.detach()).sum(), tensors_of(layer)["A"])[0]
    torch.testing.assert_close(torch.autograd.grad(layer(y).sum(), tensors_of(layer)["A"])[0], expected)
    again = given()
    through = norm(again * 1)
    with torch.no_grad():
        through.grad_fn._saved_input.mul_(2)
    assert origin(through) == ((through,), None)


def test_output_may_be_changed_in_place_afterwards():
    layer, norm = adapted(), norm_of("affine")

    def run(x: Tensor) -> Tensor:
        y = norm(x)
        z = layer(y)
        return z + y.mul_(3)[..., :OUT]

    expected = slopes(layer, lambda x: layer(norm(x)) + (norm(x) * 3)[..., :OUT], given())
    for one, other in zip(slopes(layer, run, given()), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_norms_that_are_checkpointed_or_kept_elsewhere_are_left_alone():
    layer, norm = adapted(), norm_of("affine")
    expected = slopes(layer, lambda x: layer(norm(x)), given())

    def moved(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            y = norm(x)
        assert origin(y) == ((y,), None)
        return layer(y)

    def norm_alone(x: Tensor) -> Tensor:
        y = checkpoint(norm, x, use_reentrant=False)
        assert origin(y) == ((y,), None)
        return layer(y)

    def both(x: Tensor) -> Tensor:
        return checkpoint(lambda x: layer(norm(x)), x, use_reentrant=False)

    def layer_alone(x: Tensor) -> Tensor:
        return checkpoint(layer, norm(x), use_reentrant=False)

    for run in (moved, norm_alone, both, layer_alone):
        for one, other in zip(slopes(layer, run, given()), expected, strict=True):
            torch.testing.assert_close(one, other)

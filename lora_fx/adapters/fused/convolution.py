"""Convolutions by frozen filters that keep nothing of their input: torch's own keep it, whatever is frozen.

The gradient of the input is the transposed convolution of dy with the filters, and needs no x; that of frozen filters
is not asked for.  So a layer with LoRA-FA keeps h = A x alone, r channels of it, as a linear layer does (`forward`).

Source: Zhang et al. 2023, arXiv:2308.03303, §3; the gradient by `torch.nn.grad`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import grad

from lora_fx.adapters.factors.kinds import Convolution, ConvolutionA
from lora_fx.adapters.fused.eligible import is_plain, is_watched
from lora_fx.adapters.fused.terms import autocast_dtype
from lora_fx.adapters.selection import Chosen
from lora_fx.models.layers import bias_of, has_hooks

_OF_INPUT: dict[int, Callable[..., Tensor]] = {1: grad.conv1d_input, 2: grad.conv2d_input, 3: grad.conv3d_input}


class Settings(NamedTuple):
    """How a convolution goes over its input."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    """Zeros on both sides, the same number."""
    dilation: tuple[int, ...]
    groups: int


def settings_without_input(layer: Any, chosen: Chosen, x: Tensor) -> Settings | None:
    """Return the settings of a convolution whose input need not be kept, since no filters need a gradient.

    None for another layer, and where torch's own operations have to run: under autocast, hooks, modes and a compiler,
    and with padding that is not of zeros or not the same on both sides.
    """
    if not isinstance(layer, Convolution) or not (torch.is_grad_enabled() and x.requires_grad):
        return None
    holder: Any = layer._modules["lora_A"]
    factors = [holder._modules[name] for name, _ in chosen]
    if not all(type(A) is ConvolutionA and not has_hooks(A) and not A.weight.requires_grad for A in factors):
        return None
    weight, bias = layer._parameters["weight"], bias_of(layer)
    if weight is None or weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    padding = _padding_of(layer)
    is_usual = is_plain(x) and is_plain(weight) and x.dim() == weight.dim()
    if padding is None or not is_usual or autocast_dtype(x.device.type) is not None or is_watched():
        return None
    return Settings(layer.stride, padding, layer.dilation, layer.groups)


def _padding_of(layer: Any) -> tuple[int, ...] | None:
    """Return how many zeros a convolution puts on both sides, by dimension; None if it does otherwise."""
    if layer.padding_mode != "zeros":
        return None
    if not isinstance(layer.padding, str):
        return tuple(layer.padding)
    border = layer._reversed_padding_repeated_twice  # of "same" and "valid": the last dimension first, both sides
    before, after = border[-2::-2], border[-1::-2]
    return tuple(before) if before == after else None


def convolved(run: Callable[[Tensor], Tensor], settings: Settings, filters: Tensor, x: Tensor) -> Tensor:
    """Return run(x), and keep the filters for the gradient of x, and nothing else.

    Args:
        run: convolves x with the filters, with a bias or without, neither of which needs a gradient.
        settings: how.
        filters: [out, in / groups, kernel…].
        x: [batch, in, …].
    """
    result: Tensor = _Convolved.apply(run, settings, filters, x)  # type: ignore[no-untyped-call]
    return result


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], settings: Settings, filters: Tensor, x: Tensor) -> Tensor:
        ctx.settings, ctx.shape = settings, x.shape
        ctx.save_for_backward(filters)
        return run(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (filters,) = ctx.saved_tensors
        of_input = _OF_INPUT[filters.dim() - 2]
        return None, None, None, of_input(ctx.shape, filters, gradient, *ctx.settings)

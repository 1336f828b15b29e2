"""Convolutions as matrices: what each position of the result sees of the input is one row, channel by channel.

conv(x, W)           patches(x) · W.flatten(1)ᵀ                     [in · k, out], k the size of the kernel
conv(x, A) → 1 · 1   patches(x) · A.flatten(1)ᵀ · B.flatten(1)ᵀ     a LoRA, where both see the same patches
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from lora_fx.remerging.algebra.operations import GraphCall, NotLinear

_CONVOLVE: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)


@dataclass(frozen=True, slots=True)
class Patches:
    """The rows that a convolution sees of an input; equal ones are equal rows."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int

    @property
    def is_pointwise(self) -> bool:
        """Whether each row is one position of the input, and all are seen in order."""
        once, none = (1,) * len(self.kernel), (0,) * len(self.kernel)
        return (self.kernel, self.stride, self.padding, self.groups) == (once, once, none, 1)

    @property
    def positions(self) -> int:
        """How many positions of the input one row has."""
        return math.prod(self.kernel)

    @property
    def span(self) -> tuple[int, ...]:
        """Sizes of an input that has several rows."""
        return tuple(d * (k - 1) + 3 for d, k in zip(self.dilation, self.kernel, strict=True))

    def channels(self, width: int) -> int:
        """Return how many channels the input of a convolution has whose rows have so many columns."""
        return width // self.positions * self.groups

    def difference(self, other: "Patches") -> str:
        """Return how the rows of another convolution are other ones."""
        if self.groups != 1:
            return in_groups(self.groups)
        name = next(field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name))
        return f"its {name} is {getattr(other, name)}, that of the convolution {getattr(self, name)}"

    def applied(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the convolution of x with a weight."""
        settings = (self.stride, self.padding, self.dilation, self.groups)
        result: Tensor = _CONVOLVE[len(self.kernel) - 1](x, weight, bias, *settings)
        return result


def in_groups(groups: int) -> str:
    """Return why a product beside a convolution in groups is left alone."""
    return (
        f"the convolution has {groups} groups, and its weight has for each output only the channels of one: there is "
        "no place for a product of all; train the layer with lora_fx to have one that can be folded"
    )


def patches_of(call: GraphCall, kernel: tuple[int, ...]) -> Patches:
    """Return what a convolution with a kernel of these sizes sees.

    Raises:
        NotLinear: it pads with something else than zeros, is transposed, or its settings are computed.
    """
    if call.get("padding_mode", "zeros") != "zeros" or call.get("transposed", False):
        raise NotLinear(call.node, "its convolution is transposed, or pads with something else than zeros")
    stride, dilation = (_sizes(call, name, 1, kernel) for name in ("stride", "dilation"))
    padding = call.get("padding", 0)
    if padding == "same" and all(d * (k - 1) % 2 == 0 for d, k in zip(dilation, kernel, strict=True)):
        padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    elif padding == "valid":
        padding = 0
    padding = padding if padding == "same" else _sizes(call, "", padding, kernel)
    groups = call.get("groups", 1)
    if isinstance(groups, fx.Node):
        raise NotLinear(call.node, "the settings of its convolution are computed")
    return Patches(kernel, stride, padding, dilation, groups)


def _sizes(call: GraphCall, name: str, otherwise: Any, kernel: tuple[int, ...]) -> tuple[int, ...]:
    value = call.get(name, otherwise)
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(size, int) for size in sizes):
        raise NotLinear(call.node, "the settings of its convolution are computed")
    return sizes * len(kernel) if len(sizes) == 1 else sizes

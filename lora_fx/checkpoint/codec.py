"""Factors as PEFT keeps them in a file, and back.

A linear's are what they are.  A convolution's have its shape; a grouped one's A becomes one block for each group, which
is the same map with g · r ranks.  A bank of experts is one matrix: A [bank · r, in], B [out, r · bank].  A raw
parameter has the factors of what is stored, whichever way round it multiplies.  Parts of a fused weight become n · r
ranks with zeros in B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fx.adapters.attach import Attached
from lora_fx.adapters.factors import ConvolutionA, SlicedB
from lora_fx.sites import CONVOLUTIONS, Site


@dataclass(frozen=True, slots=True)
class Form:
    """How the factors of a site are laid out in a file."""

    op: str
    bank: int | None
    out_features: int
    inner: tuple[int, ...]
    """Sizes of the inputs: (in,), or (in / groups, kernel…)."""
    groups: int
    flipped: bool
    """Whether the file has the factors of the transposed matrix: a raw [in, out] parameter's."""

    @property
    def factor(self) -> int:
        """How many times r the file's A has rows."""
        return self.groups * (self.bank or 1)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B in the file, for an inner dimension of `rank`."""
        if self.op in CONVOLUTIONS and len(self.inner) > 1:
            ones = tuple(1 for _ in self.inner[1:])
            first = (self.groups * rank, self.groups * self.inner[0], *self.inner[1:])
            return first, (self.out_features, rank, *ones)
        inputs, outputs = self.inner[0], self.out_features
        if self.flipped:
            inputs, outputs = outputs, inputs
        return (self.factor * rank, inputs), (outputs, self.factor * rank)


def form_of(site: Site, groups: int, is_layer: bool) -> Form:
    """Return the form of a site; `groups` are those of its convolution, `is_layer` whether its owner's class is known.

    A functional convolution's weight counts as a matrix.
    """
    out_features, in_features = site.features
    inner = site.shape[1:] if site.op in CONVOLUTIONS and is_layer else (in_features,)
    bank = site.bank if site.is_banked else None
    flipped = site.layout == "in_out" and bool(site.parameter) and bank is None
    return Form(site.op, bank, out_features, inner, groups if is_layer else 1, flipped)


def encoded(found: Attached) -> tuple[Tensor, Tensor]:
    """Return the factors A and B of an adapter as a file holds them."""
    A: Tensor = found.lora_A.weight
    if isinstance(found.lora_A, ConvolutionA):
        return _blocks(A, found.lora_A.groups), found.lora_B.weight
    B = found.lora_B.matrix
    if found.spec.is_banked:
        return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    if found.spec.layout == "in_out" and not found.spec.path_is_owner:
        return B.t(), A.t()
    return A, B


def _blocks(filters: Tensor, groups: int) -> Tensor:
    """Return filters [r, in / g, …] as [g · r, in, …], each group's in its own channels."""
    if groups == 1:
        return filters
    r, channels = filters.shape[:2]
    whole = filters.new_zeros(groups, r, groups, channels, *filters.shape[2:])
    for group in range(groups):
        whole[group, :, group] = filters
    return whole.flatten(0, 1).flatten(1, 2)


def fits(found: Attached, A: Tensor, B: Tensor) -> str | None:
    """Return why the factors of a file are not such as this adapter's can be; None if they are."""
    if isinstance(found.lora_A, ConvolutionA) and found.lora_A.groups > 1:
        again = _blocks(_first_block(A, found.lora_A.groups), found.lora_A.groups)
        if not torch.equal(again, A):
            return "its lora_A mixes the groups of the convolution, which no merged weight can do"
    if isinstance(found.lora_B, SlicedB):
        outside = _whole(found, B).contiguous().clone()
        cells = outside.view(*outside.shape[:-1], found.lora_B.parts, found.spec.lora.r)
        cells[..., found.lora_B.rows.cpu(), found.lora_B.columns.cpu(), :] = 0
        if bool(outside.any()):
            return "its lora_B has values outside of the slices"
    return None


def _first_block(A: Tensor, groups: int) -> Tensor:
    rows, channels = A.shape[0] // groups, A.shape[1] // groups
    return A[:rows, :channels]


def decode(found: Attached, A: Tensor, B: Tensor) -> None:
    """Copy the factors of a file into an adapter, in place; `fits` must hold."""
    if found.spec.layout == "in_out" and not found.spec.path_is_owner and not found.spec.is_banked:
        A, B = B.t(), A.t()
    if isinstance(found.lora_A, ConvolutionA):
        A = _first_block(A, found.lora_A.groups) if found.lora_A.groups > 1 else A
    elif found.spec.is_banked:
        A = A.reshape(found.spec.shape[0], -1, A.shape[1])
    matrix = _whole(found, B)
    with torch.no_grad():
        found.lora_A.weight.copy_(A)
        found.lora_B.weight.copy_(
            found.lora_B.blocks_of(matrix.to(found.lora_B.rows.device)) if isinstance(found.lora_B, SlicedB) else matrix
        )


def _whole(found: Attached, B: Tensor) -> Tensor:
    """Return B [.., out, ranks] of a file's B."""
    if not found.spec.is_banked:
        return B
    return B.reshape(B.shape[0], -1, found.spec.shape[0]).permute(2, 0, 1)

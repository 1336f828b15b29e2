"""Adapters as plain factors, which most formats hold in one way or another."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.adapters.attach import all_attached
from lora_fx.files.adapter.codec import encoded, scaled


@dataclass(frozen=True, slots=True)
class PlainAdapter:
    """The adapter of one layer: ΔW = scaling · B A."""

    path: str
    A: Tensor
    """[r, in], or a convolution's [r, in, kernel…]; parts of a weight have r rows each."""
    B: Tensor
    """[out, r], or [out, r / groups, 1…]; zero where no part is adapted."""
    scaling: float
    magnitude: Tensor | None = None
    """DoRA's lengths of all outputs, [out], or a convolution's [1, out, 1…]."""

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.A.shape[0])

    @property
    def alpha(self) -> float:
        """What formats that take alpha / rank as the scaling have to hold."""
        return self.scaling * self.rank

    def with_scaling(self, scaling: float) -> "PlainAdapter":
        """Return the same adapter with another scaling, made up for in B."""
        if scaling == self.scaling:
            return self
        return replace(self, B=multiplied(self.B, self.scaling / scaling), scaling=scaling)

    def with_rank(self, rank: int) -> "PlainAdapter":
        """Return the same adapter, of matrices, with a higher rank: zero rows in A, zero columns in B."""
        more = rank - self.rank
        return replace(self, A=F.pad(self.A, (0, 0, 0, more)), B=F.pad(self.B, (0, more)))


def multiplied(factor: Tensor, ratio: float) -> Tensor:
    """Return a factor times a number, in its own dtype where that holds the product, else in float32: readers round it.

    Half precision, rounded here and again by what the reader computes, would lose more than the adapter has.
    """
    product = scaled(factor, ratio)
    narrow = product.to(factor.dtype)
    return narrow if torch.equal(narrow.to(product.dtype), product) else product


def plain_adapters(tuned: nn.Module) -> Iterator[PlainAdapter]:
    """Yield the adapter of every adapted layer, in model order, as new tensors on the CPU.

    A scaling of 0 becomes a B of zeros: llama.cpp and LyCORIS take an alpha of 0 for one that is not given.
    """
    for path, attached in all_attached(tuned):
        A, B = (_on_cpu(factor) for factor in encoded(attached))
        magnitude = None if (lengths := attached.lengths()) is None else _on_cpu(lengths)
        scaling = attached.spec.scaling
        yield PlainAdapter(path, A, B if scaling else torch.zeros_like(B), scaling or 1.0, magnitude)


def evened(tuned: nn.Module) -> list[PlainAdapter]:
    """Return the adapters, of matrices, with the scaling of the first and the rank of the largest."""
    adapters = list(plain_adapters(tuned))
    rank = max(adapter.rank for adapter in adapters)
    return [adapter.with_scaling(adapters[0].scaling).with_rank(rank) for adapter in adapters]


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

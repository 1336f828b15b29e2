"""What `forward` and `backward` compute with: layers with their adapters, and their products by A."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.adapters.fused.masks import keeping, kept_in_parts
from lora_fx.models.packed import PackedWeight
from lora_fx.models.torch_internals import any_autocast_enabled

Produce = Callable[..., Tensor]
Runs = tuple[tuple[int, int], ...]


class Facts(NamedTuple):
    """What is to be done with the tensors of a term."""

    scaling: float
    in_out: bool = False
    """Whether the weight is stored as [in, out]."""
    p: float = 0.0
    """Probability of dropout; 0 for none."""
    seed: Tensor | None = None
    """Of the dropout, None without; layers that share one share their mask."""
    merged: bool = False
    """Whether x meets W + scaling · B A instead of both apart (see `contraction`); not with dropout or two dtypes."""
    runs: Runs = ()
    """Where only parts of the rows of W are adapted, their first rows and ends: B has the blocks, A r rows for each."""

    @property
    def factor(self) -> float:
        """What B A is multiplied by: the scaling, and that of dropout, which then costs no pass over a mask."""
        return self.scaling / keeping(self.p) if self.p else self.scaling


class Term(NamedTuple):
    """One layer with its adapter: its tensors, and what is to be done with them."""

    facts: Facts
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: Tensor | None = None
    """DoRA's m / ‖V‖ [out], the norm being a constant for gradients; None for plain LoRA."""

    def as_multiplied(self, dtype: torch.dtype) -> "Term":
        """Return the term with its factors as they meet an x of a dtype.

        float32 factors are cast to bfloat16, as by autocast: their rounding changes y by less than y's own.
        With float16, small gradients need the range of float32.
        """
        if dtype is torch.bfloat16 and self.A.dtype is torch.float32:
            return Term(self.facts, self.weight, self.bias, self.A.to(dtype), self.B.to(dtype), self.scale)
        return self

    def layer(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return what the frozen layer would compute with a weight, as it computes it."""
        if isinstance(weight, PackedWeight):
            return weight.multiplied(x)
        if not self.facts.in_out:
            return F.linear(x, weight, self.bias)
        rows = x.reshape(-1, x.shape[-1])
        result = torch.mm(rows, weight) if self.bias is None else torch.addmm(self.bias, rows, weight)
        return result.view(*x.shape[:-1], result.shape[-1])

    def met(self) -> Tensor:
        """Return the weight that x meets, as it is stored: W, or W + scaling · B A computed again."""
        if not self.facts.merged:
            return self.weight
        left, right = (self.A.t(), self.B.t()) if self.facts.in_out else (self.B, self.A)
        return torch.addmm(self.weight, left, right, alpha=self.facts.factor)

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield (columns of y, rows of h, block of B) of each adapted part; of a whole weight one."""
        r, start = self.B.shape[1], 0
        for number, (first, end) in enumerate(self.facts.runs or ((0, self.B.shape[0]),)):
            yield slice(first, end), slice(number * r, (number + 1) * r), self.B[start : start + end - first]
            start += end - first

    def whole_factor(self) -> Tensor:
        """Return B as [out, rows of A], with zeros where nothing is adapted."""
        if not self.facts.runs:
            return self.B
        out_features = self.weight.shape[1 if self.facts.in_out else 0]
        columns = [
            F.pad(block, (0, 0, outputs.start, out_features - outputs.stop)) for outputs, _, block in self.blocks()
        ]
        return torch.cat(columns, dim=1)


class Group(NamedTuple):
    """What is computed, without the tensors, for the autograd function."""

    facts: tuple[Facts, ...]
    bundles: tuple[tuple[int, ...], ...]
    """Numbers of the terms that meet the same dropout(x) in the same way."""
    produce: Produce | None
    """Makes x from the inputs again in the backward pass; None if x itself is the input."""
    inputs: int
    shows: bool
    """Whether x is a result too, for others that use it; only where it is made."""
    halved: tuple[bool, ...] = ()
    """Of the inputs that x is made from: whether they are kept in bfloat16, where they are in float32; () for none."""

    def parted(self, tensors: Sequence[Any]) -> tuple[list[Tensor], list[Term]]:
        """Return the inputs and the terms out of one flat list of tensors."""
        start = self.inputs
        terms = [Term(fact, *tensors[start + 5 * i : start + 5 * i + 5]) for i, fact in enumerate(self.facts)]
        return list(tensors[:start]), terms


def bundled(terms: Sequence[Term]) -> tuple[tuple[int, ...], ...]:
    """Return the numbers of the terms that meet the same dropout(x) in the same way."""
    if len(terms) == 1:
        return _ALONE
    bundles: dict[tuple[torch.dtype, bool, float, int], list[int]] = {}
    for number, (facts, _, _, A, _, _) in enumerate(terms):
        bundles.setdefault((A.dtype, facts.merged, facts.p, id(facts.seed)), []).append(number)
    return tuple(map(tuple, bundles.values()))


_ALONE = ((0,),)


def inner_products(group: Group, x: Tensor, terms: Sequence[Term], merged: bool) -> list[Tensor | None]:
    """Return h = A dropout(x)ᵀ of the terms that are merged, or of those that are not, [r, N], in the dtype of A."""
    products: list[Tensor | None] = [None] * len(terms)
    for bundle in group.bundles:
        facts = terms[bundle[0]].facts
        if facts.merged != merged:
            continue
        factors = [terms[number].A for number in bundle]
        below = joined(factors)
        rows = x.reshape(-1, x.shape[-1])
        parts = [
            torch.mm(below, dropped(rows, part, mask, below.dtype).t())
            for part, mask in masks_of(rows.shape[0], rows.shape[1], facts, below.dtype)
        ]
        for number, part in zip(bundle, parted_like(joined(parts, dim=1), factors), strict=True):
            products[number] = part
    return products


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype in which products are made under autocast; None without autocast."""
    if not any_autocast_enabled() or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear multiplies x; autocast leaves float64 alone."""
    dtype = x.dtype
    if dtype is torch.float64 or not any_autocast_enabled():
        return dtype
    return autocast_dtype(x.device.type) or dtype


def cast_as_products(x: Tensor) -> Tensor:
    """Return x as a linear multiplies it: under autocast in its dtype, else as it is."""
    dtype = product_dtype(x)
    return x if x.dtype is dtype else x.to(dtype)


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Return matrices below (dim 0) or beside (dim 1) each other; one alone is returned as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim)


def parted_like(whole: Tensor, parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the parts of a tensor that stand below each other, with as many rows as the given ones."""
    return (whole,) if len(parts) == 1 else whole.split_with_sizes([part.shape[0] for part in parts])


def masks_of(rows: int, columns: int, facts: Facts, dtype: torch.dtype) -> Iterator[tuple[slice | None, Tensor | None]]:
    """Yield (which rows of x, their mask in the factors' dtype); (None, None) for all without dropout.

    The mask is of ones and zeros, and may be written to.  dropout(x) is one times the other here: what it is divided
    by is in the factor.
    """
    if facts.seed is None:
        yield None, None
    else:
        yield from kept_in_parts(facts.seed, rows, columns, facts.p, dtype)


def dropped(rows: Tensor, part: slice | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return dropout(x) of the rows that a mask is for, in the factors' dtype; the mask is used up."""
    wide = rows if part is None else rows[part]
    wide = wide if wide.dtype == dtype else wide.to(dtype)
    return wide if mask is None else mask.mul_(wide)


def add_product(rows: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """Add scaling · left right to the rows in place, with one rounding."""
    if left.dtype == rows.dtype:
        torch.addmm(rows, left, right, alpha=scaling, out=rows)  # as addmm_, and FLOP counters know it
    else:
        rows.add_(torch.mm(left, right), alpha=scaling)

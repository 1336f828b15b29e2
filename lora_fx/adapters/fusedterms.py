"""What `fused` and `fusedbackward` compute with: layers with their adapters, and their products by A."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.adapters.masks import keeping, kept

Produce = Callable[..., Tensor]
Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Term:
    """One layer with its adapter: its tensors, and what is to be done with them."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: Tensor | None
    """DoRA's m / ‖V‖ [out], the norm being a constant for gradients; None for plain LoRA."""
    scaling: float
    in_out: bool
    p: float
    """Probability of dropout; 0 for none."""
    seed: Tensor | None
    """Of the dropout; layers that share one share their mask."""
    merged: bool = False
    """Whether x meets W + scaling · B A instead of both apart (see `contraction`); not with dropout or two dtypes."""
    runs: Runs = ()
    """Where only parts of the rows of W are adapted, their first rows and ends: B has the blocks, A r rows for each."""

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.A, self.B, self.scale

    @property
    def facts(self) -> Facts:
        return Facts(self.scaling, self.in_out, self.p, self.seed, self.merged, self.A.dtype, self.runs)


@dataclass(frozen=True, slots=True)
class Facts:
    """A term without its tensors."""

    scaling: float
    in_out: bool
    p: float
    seed: Tensor | None
    merged: bool
    dtype: torch.dtype
    """Of the factors."""
    runs: Runs


@dataclass(frozen=True, slots=True)
class Group:
    """What is computed, for the autograd function."""

    facts: tuple[Facts, ...]
    produce: Produce | None
    """Makes x from the inputs again in the backward pass; None if x itself is the input."""
    inputs: int
    shows: bool
    """Whether x is a result too, for others that use it; only where it is made."""

    def parted(self, tensors: Sequence[Any]) -> tuple[list[Tensor], list[Site]]:
        """Return the inputs and the sites' tensors out of one flat list."""
        rest = tensors[self.inputs :]
        sites = [Site(fact, *rest[5 * i : 5 * i + 5]) for i, fact in enumerate(self.facts)]
        return list(tensors[: self.inputs]), sites

    @property
    def bundles(self) -> list[tuple[int, ...]]:
        """Numbers of the sites that meet the same dropout(x) in the same way."""
        found: dict[tuple[torch.dtype, bool, float, int], list[int]] = {}
        for number, fact in enumerate(self.facts):
            found.setdefault((fact.dtype, fact.merged, fact.p, id(fact.seed) if fact.p else 0), []).append(number)
        return [tuple(each) for each in found.values()]


@dataclass(slots=True)
class Site:
    facts: Facts
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: Tensor | None

    def layer(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return what the frozen layer would compute with a weight, as it computes it."""
        if not self.facts.in_out:
            return F.linear(x, weight, self.bias)
        rows = x.reshape(-1, x.shape[-1])
        result = torch.mm(rows, weight) if self.bias is None else torch.addmm(self.bias, rows, weight)
        return result.view(*x.shape[:-1], result.shape[-1])

    def met(self) -> Tensor:
        """Return the weight that x meets, as it is stored: W, or W + scaling · B A made anew."""
        if not self.facts.merged:
            return self.weight
        left, right = (self.A.t(), self.B.t()) if self.facts.in_out else (self.B, self.A)
        return torch.addmm(self.weight, left, right, alpha=self.facts.scaling)

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
        columns = []
        for outputs, _, block in self.blocks():
            columns.append(F.pad(block, (0, 0, outputs.start, out_features - outputs.stop)))
        return torch.cat(columns, dim=1)


def inner_products(group: Group, x: Tensor, sites: list[Site], merged: bool) -> list[Tensor | None]:
    """Return h = A dropout(x)ᵀ of the sites that are merged, or of those that are not, [r, N], in the dtype of A."""
    rows = x.reshape(-1, x.shape[-1])
    found: list[Tensor | None] = [None] * len(sites)
    for bundle in group.bundles:
        members = [sites[number] for number in bundle]
        if members[0].facts.merged != merged:
            continue
        below = below_each_other([each.A for each in members])
        h = torch.mm(below, dropped(rows, members[0], below.dtype).t())
        parts = torch.split(h, [each.A.shape[0] for each in members]) if len(members) > 1 else (h,)
        for number, part in zip(bundle, parts, strict=True):
            found[number] = part
    return found


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype in which products are made under autocast; None without autocast."""
    if not torch._C._is_any_autocast_enabled() or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear multiplies x; autocast leaves float64 alone."""
    return x.dtype if x.dtype is torch.float64 else autocast_dtype(x.device.type) or x.dtype


def cast_as_products(x: Tensor) -> Tensor:
    """Return x as a linear multiplies it: under autocast in its dtype, else as it is."""
    dtype = product_dtype(x)
    return x if x.dtype == dtype else x.to(dtype)


def below_each_other(factors: Sequence[Tensor]) -> Tensor:
    return factors[0] if len(factors) == 1 else torch.cat(tuple(factors))


def dropped(rows: Tensor, site: Site, dtype: torch.dtype) -> Tensor:
    """Return dropout(x) in the factors' dtype."""
    mask = mask_of(site, rows, dtype)
    wide = rows if rows.dtype == dtype else rows.to(dtype)
    return wide if mask is None else mask.mul_(wide)


def mask_of(site: Site, rows: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the mask with the scale in it; None without dropout."""
    seed, p = site.facts.seed, site.facts.p
    if seed is None or not p:
        return None
    return kept(seed, rows.shape[0], rows.shape[1], p, dtype).mul_(1 / keeping(p))


def add_product(rows: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """Add scaling · left right to the rows in place, with one rounding."""
    if left.dtype == rows.dtype:
        torch.addmm(rows, left, right, alpha=scaling, out=rows)  # as addmm_, and FLOP counters know it
    else:
        rows.add_(torch.mm(left, right), alpha=scaling)

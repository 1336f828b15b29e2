"""base + scaling · B A dropout(x) for one or more frozen linears on the same x, as one differentiable operation.

What it saves for the backward pass is x (once for all layers), A x, and references to the weights; nothing is cast,
scaled, masked or added in a tensor of its own that outlives the call.  Of several layers on one x the A products are
one product, with all A below each other, and so are their gradients.

Forward, for layer i:    hᵢ = Aᵢ dropout(x)ᵀ              yᵢ = x Wᵢᵀ + bᵢ, then += scalingᵢ · hᵢᵀ Bᵢᵀ in place
Backward:                zᵢ = scalingᵢ · Bᵢᵀ dyᵢᵀ         dBᵢᵀ = scalingᵢ · hᵢ dyᵢ        dAᵢ = zᵢ dropout(x)
                         dx = Σ dyᵢ Wᵢ, then += dropout'(Σ zᵢᵀ Aᵢ) in place
Shapes: x [.., in], W [out, in] (with `in_out` [in, out]), A [r, in], B [out, r], h and z [r, N] for N rows of x.

The thin products are written so that the long side of the result is its last: with r rows of N columns a matrix
library needs a half to a quarter of the time that N rows of r columns take it.

Source: Hu et al. 2021, arXiv:2106.09685, §4.1; what must be saved: Cherniuk et al. 2023, arXiv:2312.03415.  DoRA: see
`dora.py`; here y = t + (m/‖V‖ - 1)(t - b), with t the sum above.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.adapters.masks import keeping, kept

Produce = Callable[..., Tensor]


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

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.A, self.B, self.scale


@dataclass(frozen=True, slots=True)
class _Facts:
    """A term without its tensors."""

    scaling: float
    in_out: bool
    p: float
    seed: Tensor | None
    dtype: torch.dtype
    """Of the factors."""


@dataclass(frozen=True, slots=True)
class _Group:
    """What is computed, for the autograd function."""

    facts: tuple[_Facts, ...]
    produce: Produce | None
    """Makes x from the inputs again in the backward pass; None if x itself is the input."""
    inputs: int
    shows: bool
    """Whether x is a result too, for others that use it; only where it is made."""

    def parted(self, tensors: Sequence[Any]) -> tuple[list[Tensor], list[_Site]]:
        """Return the inputs and the sites' tensors out of one flat list."""
        rest = tensors[self.inputs :]
        sites = [_Site(fact, *rest[5 * i : 5 * i + 5]) for i, fact in enumerate(self.facts)]
        return list(tensors[: self.inputs]), sites

    @property
    def bundles(self) -> list[tuple[int, ...]]:
        """Numbers of the sites that meet the same dropout(x)."""
        found: dict[tuple[torch.dtype, float, int], list[int]] = {}
        for number, fact in enumerate(self.facts):
            found.setdefault((fact.dtype, fact.p, id(fact.seed) if fact.p else 0), []).append(number)
        return [tuple(each) for each in found.values()]


@dataclass(slots=True)
class _Site:
    facts: _Facts
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: Tensor | None

    def base(self, x: Tensor) -> Tensor:
        """Return what the frozen layer computes, as it computes it."""
        if not self.facts.in_out:
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(-1, x.shape[-1])
        result = torch.mm(rows, self.weight) if self.bias is None else torch.addmm(self.bias, rows, self.weight)
        return result.view(*x.shape[:-1], result.shape[-1])

    @property
    def matrix(self) -> Tensor:
        """W as [out, in]."""
        return self.weight.t() if self.facts.in_out else self.weight


def adapted(terms: Sequence[Term], x: Tensor) -> tuple[Tensor, ...]:
    """Return what the layers compute from x with their adapters; nothing is changed.

    Bit-equal to the layers alone while B = 0 (DoRA: and m = ‖W‖).
    """
    if len(terms) == 1 and not torch.is_grad_enabled():
        found = _flat(terms[0], x)
        if found is not None:
            return (found,)
    return adapted_from(terms, x, None, (x,), False)


def _flat(term: Term, x: Tensor) -> Tensor | None:
    """Return what one layer computes, in as few operations as can be; None where there is more to it."""
    if term.in_out or term.scale is not None or term.p or term.A.dtype != x.dtype:
        return None
    y = F.linear(x, term.weight, term.bias)
    if not y.is_contiguous():
        return None
    rows, given = (y, x) if x.dim() == 2 else (y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]))
    torch.addmm(rows, torch.mm(given, term.A.t()), term.B.t(), alpha=term.scaling, out=rows)
    return y


def adapted_from(
    terms: Sequence[Term], x: Tensor, produce: Produce | None, inputs: Sequence[Tensor], shows: bool
) -> tuple[Tensor, ...]:
    """Return the results of all terms on x, and x last if it `shows`; x is made again for gradients, and not kept.

    Args:
        terms: the layers, all on x.
        x: what `produce` makes of the inputs, computed without gradients.
        produce: differentiable, draws nothing and writes nothing in place; None: the one input is x.
        inputs: what x is made of.
        shows: whether x is wanted as well.
    """
    facts = tuple(_Facts(each.scaling, each.in_out, each.p, each.seed, each.A.dtype) for each in terms)
    group = _Group(facts, produce, len(inputs), shows)
    tensors = (*inputs, *(tensor for each in terms for tensor in each.tensors))
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors):
        return _Adapted.apply(group, x, *tensors)  # type: ignore[no-any-return, no-untyped-call]
    results = _forward(group, x, group.parted(tensors)[1])[0]
    return (*results, x) if shows else tuple(results)


# -- forward


def _forward(group: _Group, x: Tensor, sites: list[_Site]) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """Return all y, all h, and what DoRA keeps: y before its scale and without the bias."""
    inner = _inner(group, x, sites)
    results, unscaled = [], []
    for site, h in zip(sites, inner, strict=True):
        y = site.base(x).contiguous()
        rows = y.view(-1, y.shape[-1])
        _add_product(rows, h.t(), site.B.t(), site.facts.scaling)
        plain = None
        if site.scale is not None:
            plain = rows if site.bias is None else rows - site.bias
            y = torch.addcmul(rows, plain, (site.scale - 1).to(y.dtype)).view_as(y)
        results.append(y)
        unscaled.append(plain)
    return results, inner, unscaled


def _inner(group: _Group, x: Tensor, sites: list[_Site]) -> list[Tensor]:
    """Return h = A dropout(x)ᵀ of all sites, [r, N], in the dtype of A."""
    rows = x.reshape(-1, x.shape[-1])
    found: list[Tensor] = [rows] * len(sites)
    for bundle in group.bundles:
        members = [sites[number] for number in bundle]
        below = _below([each.A for each in members])
        h = torch.mm(below, _dropped(rows, members[0], below.dtype).t())
        parts = torch.split(h, [each.A.shape[0] for each in members]) if len(members) > 1 else (h,)
        for number, part in zip(bundle, parts, strict=True):
            found[number] = part
    return found


def _below(factors: Sequence[Tensor]) -> Tensor:
    return factors[0] if len(factors) == 1 else torch.cat(tuple(factors))


def _dropped(rows: Tensor, site: _Site, dtype: torch.dtype) -> Tensor:
    """Return dropout(x) in the factors' dtype."""
    mask = _mask(site, rows, dtype)
    wide = rows if rows.dtype == dtype else rows.to(dtype)
    return wide if mask is None else mask.mul_(wide)


def _mask(site: _Site, rows: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the mask with the scale in it; None without dropout."""
    seed, p = site.facts.seed, site.facts.p
    if seed is None or not p:
        return None
    return kept(seed, rows.shape[0], rows.shape[1], p, dtype).mul_(1 / keeping(p))


def _add_product(rows: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """Add scaling · left right to the rows in place, with one rounding."""
    if left.dtype == rows.dtype:
        torch.addmm(rows, left, right, alpha=scaling, out=rows)  # as addmm_, and FLOP counters know it
    else:
        rows.add_(torch.mm(left, right), alpha=scaling)


# -- backward


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: _Group, x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        results, inner, unscaled = _forward(group, x, group.parted(tensors)[1])
        ctx.group, ctx.given = group, len(tensors)
        ctx.save_for_backward(*tensors, *inner, *unscaled)
        ctx.set_materialize_grads(False)
        return (*results, x) if group.shows else tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, group = ctx.saved_tensors, ctx.group
        tensors, kept_ones = saved[: ctx.given], saved[ctx.given :]
        needs = ctx.needs_input_grad[2:]
        with _without_autocast(tensors[0].device.type):
            if torch.is_grad_enabled() or any(grad is not None and _is_batched(grad) for grad in grads):
                return (None, None, *_differentiable(group, tensors, needs, grads))
            return (None, None, *_Backward(group, tensors, needs, kept_ones).gradients(grads))


def _is_batched(grad: Tensor) -> bool:
    """Whether it stands for many gradients: vmap has no rules for products in place."""
    functions = torch._C._functorch
    return bool(functions.is_legacy_batchedtensor(grad) or functions.is_batchedtensor(grad))


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """Return a context in which products keep their dtypes, as in the forward, which is not fused under autocast."""
    if torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


class _Backward:
    """The gradients of one group."""

    def __init__(self, group: _Group, tensors: Sequence[Any], needs: Sequence[bool], kept_ones: Sequence[Any]) -> None:
        self.group, self.needs = group, needs
        self.inputs, self.sites = group.parted(tensors)
        count = len(self.sites)
        self.inner, self.unscaled = kept_ones[:count], kept_ones[count:]
        self.found: list[Tensor | None] = [None] * len(tensors)
        self.of_x = any(needs[: group.inputs])

    def _place(self, site: int, tensor: int) -> int:
        return self.group.inputs + 5 * site + tensor

    def _needs(self, site: int, tensor: int) -> bool:
        return self.needs[self._place(site, tensor)]

    def gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        x, sources = self._x()
        rows = x.detach().reshape(-1, x.shape[-1])
        dx: Tensor | None = None
        z: dict[int, Tensor] = {}
        for number, grad in enumerate(grads[: len(self.sites)]):
            if grad is None:
                continue
            dy = self._of_scale(number, grad.reshape(-1, grad.shape[-1]))
            z[number] = self._of_factor_b(number, dy)
            if self.of_x:
                matrix = self.sites[number].matrix
                dx = torch.mm(dy, matrix) if dx is None else torch.addmm(dx, dy, matrix, out=dx)
        for bundle in self.group.bundles:
            self._of_factor_a([each for each in bundle if each in z], z, rows, dx)
        self._of_inputs(x, sources, dx, grads[-1] if self.group.shows else None)
        return self.found

    def _x(self) -> tuple[Tensor, list[Tensor]]:
        """Return x, and what it was made of, for its gradient."""
        if self.group.produce is None:
            return self.inputs[0], []
        with torch.enable_grad():
            needs = self.needs[: self.group.inputs]
            sources = [each.detach().requires_grad_(need) for each, need in zip(self.inputs, needs, strict=True)]
            return self.group.produce(*sources), sources

    def _of_scale(self, number: int, dy: Tensor) -> Tensor:
        """Return the gradient before DoRA's scale, and note that of the scale."""
        scale = self.sites[number].scale
        if scale is None:
            return dy
        if self._needs(number, 4):
            self.found[self._place(number, 4)] = (dy * self.unscaled[number]).sum(0, dtype=scale.dtype)
        return dy * scale.to(dy.dtype)

    def _of_factor_b(self, number: int, dy: Tensor) -> Tensor:
        """Return z = scaling · Bᵀ dyᵀ, and note the gradient of B."""
        site, h = self.sites[number], self.inner[number]
        wide = dy if dy.dtype == site.B.dtype else dy.to(site.B.dtype)
        if self._needs(number, 3):
            self.found[self._place(number, 3)] = torch.mm(h, wide).mul_(site.facts.scaling).t()
        return torch.mm(site.B.t(), wide.t()).mul_(site.facts.scaling)

    def _of_factor_a(self, bundle: list[int], z: dict[int, Tensor], rows: Tensor, dx: Tensor | None) -> None:
        """Note the gradients of A of sites with the same dropout(x), and add theirs to dx in place."""
        if not bundle:
            return
        members = [self.sites[number] for number in bundle]
        below = _below([each.A for each in members])
        beside = _below([z[number] for number in bundle])
        mask = _mask(members[0], rows, below.dtype)
        if dx is not None and mask is None:
            _add_product(dx, beside.t(), below, 1.0)
        elif dx is not None:
            assert mask is not None
            dx.add_(torch.mm(beside.t(), below).mul_(mask))
        if any(self._needs(number, 2) for number in bundle):
            wide = rows if rows.dtype == below.dtype else rows.to(below.dtype)
            of_all = torch.mm(beside, wide if mask is None else mask.mul_(wide))
            for number, part in zip(bundle, torch.split(of_all, [each.A.shape[0] for each in members]), strict=True):
                if self._needs(number, 2):
                    self.found[self._place(number, 2)] = part

    def _of_inputs(self, x: Tensor, sources: list[Tensor], dx: Tensor | None, shown: Tensor | None) -> None:
        if not self.of_x:
            return
        whole = None if dx is None else dx.view(x.shape)
        if shown is not None:
            whole = shown if whole is None else whole.add_(shown)
        if whole is None or not sources:
            self.found[0] = whole
            return
        wanted = [number for number, source in enumerate(sources) if source.requires_grad]
        found = torch.autograd.grad(x, [sources[number] for number in wanted], whole, allow_unused=True)
        for number, gradient in zip(wanted, found, strict=True):
            self.found[number] = gradient


def _differentiable(
    group: _Group, tensors: Sequence[Any], needs: Sequence[bool], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return the gradients by autograd, which can be differentiated again: create_graph=True.

    Of views: a layer that is called twice has its A in the history of its x too, and that way does not count here.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        views = [tensor.view_as(tensor) if need else tensor for tensor, need in zip(tensors, needs, strict=True)]
        inputs, sites = group.parted(views)
        x = inputs[0] if group.produce is None else group.produce(*inputs)
        results = [_plain(site, x) for site in sites] + ([x] if group.shows else [])
        pairs = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
        outputs = [result.view_as(result) for result, _ in pairs]  # x may be its own gradient's source
    wanted = [view for view, need in zip(views, needs, strict=True) if need]
    slopes = torch.autograd.grad(outputs, wanted, [grad for _, grad in pairs], create_graph=again, allow_unused=True)
    found = iter(slopes)
    return [next(found) if need else None for need in needs]


def _plain(site: _Site, x: Tensor) -> Tensor:
    """Return what one site computes, in operations that autograd knows."""
    base, wide = site.base(x), x.to(site.A.dtype)
    mask = _mask(site, x.reshape(-1, x.shape[-1]), site.A.dtype)
    inner = F.linear(wide if mask is None else wide * mask.view_as(wide), site.A)
    delta = F.linear(inner * site.facts.scaling, site.B)
    total = base + delta.to(base.dtype)
    if site.scale is None:
        return total
    return total + (site.scale - 1).to(base.dtype) * (total if site.bias is None else total - site.bias)

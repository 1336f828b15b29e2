"""The backward pass of `fused`, where its formulas are."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.adapters.fused.masks import kept
from lora_fx.adapters.fused.terms import (
    Group,
    Term,
    add_product,
    dropped,
    inner_products,
    joined,
    masks_of,
    parted_like,
)
from lora_fx.models.quantised import dense


class Backward:
    """The gradients of one group.

    For one linear, in = 3, out = 2, r = 1, scaling s = 2, on a single row, without dropout:

        x = [1, 2, 3]   W = [[1, 0, 0], [0, 1, 0]]   A = [[1, 0, 1]]   B = [[1], [3]]
        forward     h = A xᵀ = [[4]]              y = x Wᵀ + s hᵀ Bᵀ = [1, 2] + 2 · 4 · [1, 3] = [9, 26]
        given       dy = [1, 1]
        z  [r, N]   s Bᵀ dyᵀ = 2 · (1 + 3)        = [[8]]
        dB [out, r] (s h dy)ᵀ = (2 · 4 · [1, 1])ᵀ = [[8], [8]]
        dA [r, in]  z x = 8 · [1, 2, 3]           = [[8, 16, 24]]
        dx [N, in]  dy W + zᵀ A = [1, 1, 0] + 8 · [1, 0, 1] = [9, 1, 8]

    Only dA needs x: where every A is frozen x is not kept, and `shape` is its shape.  Then h is a result too, so that
    gradients of gradients find their way from dB to x; its own gradient dh adds to z in dx.
    """

    def __init__(
        self,
        group: Group,
        tensors: Sequence[Any],
        needs: Sequence[bool],
        kept_ones: Sequence[Any],
        shape: Sequence[int] | None = None,
    ) -> None:
        self.group, self.needs, self.shape = group, needs, shape
        self.inputs, self.terms = group.parted(tensors)
        count = len(self.terms)
        self.inner, self.unscaled = kept_ones[:count], kept_ones[count:]
        self.tensor_grads: list[Tensor | None] = [None] * len(tensors)
        """One for each of the tensors; None where none is needed."""
        self.of_x = any(needs[: group.inputs])

    def _place(self, term: int, tensor: int) -> int:
        return self.group.inputs + 5 * term + tensor

    def _needs(self, term: int, tensor: int) -> bool:
        return self.needs[self._place(term, tensor)]

    def gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        x, sources = self._x()
        dtype = self.terms[0].weight.dtype if x is None else x.dtype
        self.terms = [term.as_multiplied(dtype) for term in self.terms]  # autograd casts their gradients back
        rows = None if x is None else x.detach().reshape(-1, x.shape[-1])
        inner = self._inner(rows)
        dx: Tensor | None = None
        z: dict[int, Tensor] = {}
        for number, grad in enumerate(grads[: len(self.terms)]):
            if grad is None:
                continue
            dy = grad.reshape(-1, grad.shape[-1])
            if self._needs(number, 1):  # of the bias; DoRA leaves it as it is
                self.tensor_grads[self._place(number, 1)] = dy.sum(0)
            dy = self._of_scale(number, dy)
            z[number] = self._of_factor_b(number, dy, inner[number])
            if self.of_x:
                term = self.terms[number]
                met = dense(term.met())
                matrix = met.t() if term.facts.in_out else met
                if dx is None:
                    dx = torch.mm(dy, matrix)
                else:
                    add_product(dx, dy, matrix, 1.0)
        if x is None:
            dx = self._of_inner(grads[len(self.terms) :], z, dx, dtype)
        for bundle in self.group.bundles:
            self._of_factor_a([number for number in bundle if number in z], z, rows, dx)
        self._of_inputs(x, sources, dx, grads[-1] if self.group.shows else None)
        return self.tensor_grads

    def _of_inner(
        self, grads: Sequence[Tensor | None], z: dict[int, Tensor], dx: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        """Add the gradients of h to z, in place; return dx, made now if it is wanted and no y had a gradient."""
        given = {number: grad for number, grad in enumerate(grads) if grad is not None}
        for number, grad in given.items():
            z[number] = z[number] + grad if number in z else grad
        if not given or dx is not None or not self.of_x:
            return dx
        rows, columns = next(iter(given.values())).shape[1], self.terms[0].A.shape[1]
        return torch.zeros((rows, columns), dtype=dtype, device=self.terms[0].A.device)

    def _inner(self, rows: Tensor | None) -> list[Any]:
        """Return h of all terms; those of merged ones were not needed in the forward pass and are made here."""
        if rows is None or not any(facts.merged for facts in self.group.facts):
            return list(self.inner)
        made = inner_products(self.group, rows, self.terms, merged=True)
        return [old if new is None else new for old, new in zip(self.inner, made, strict=True)]

    def _x(self) -> tuple[Tensor | None, list[Tensor]]:
        """Return x, None where it was not kept, and what it was made of, for its gradient."""
        if self.group.produce is None:
            return self.inputs[0], []
        with torch.enable_grad():
            needs = self.needs[: self.group.inputs]
            sources = [tensor.detach().requires_grad_(need) for tensor, need in zip(self.inputs, needs, strict=True)]
            return self.group.produce(*sources), sources

    def _of_scale(self, number: int, dy: Tensor) -> Tensor:
        """Return the gradient before DoRA's scale, and note that of the scale."""
        scale = self.terms[number].scale
        if scale is None:
            return dy
        if self._needs(number, 4):
            self.tensor_grads[self._place(number, 4)] = (dy * self.unscaled[number]).sum(0, dtype=scale.dtype)
        return dy * scale.to(dy.dtype)

    def _of_factor_b(self, number: int, dy: Tensor, h: Tensor) -> Tensor:
        """Return z = scaling · Bᵀ dyᵀ, and note the gradient of B."""
        term = self.terms[number]
        wide = dy if dy.dtype == term.B.dtype else dy.to(term.B.dtype)
        blocks = list(term.blocks())
        if self._needs(number, 3):
            slopes = [torch.mm(h[inner], wide[:, outputs]) for outputs, inner, _ in blocks]
            self.tensor_grads[self._place(number, 3)] = joined(slopes, dim=1).mul_(term.facts.factor).t()
        products = [torch.mm(block.t(), wide[:, outputs].t()) for outputs, _, block in blocks]
        return joined(products).mul_(term.facts.factor)

    def _of_factor_a(self, bundle: list[int], z: dict[int, Tensor], rows: Tensor | None, dx: Tensor | None) -> None:
        """Note the gradients of A of terms with the same dropout(x), and add theirs to dx in place."""
        if not bundle:
            return
        members = [self.terms[number] for number in bundle]
        below = joined([term.A for term in members])
        beside = joined([z[number] for number in bundle])
        if members[0].facts.merged:
            dx = None  # it is whole
        of_all: Tensor | None = None
        wanted = any(self._needs(number, 2) for number in bundle)
        for part, mask in masks_of(beside.shape[1], below.shape[1], members[0].facts, below.dtype):
            left = beside if part is None else beside[:, part]
            if dx is not None:
                _add_outer(dx if part is None else dx[part], left.t(), below, mask)
            if wanted and rows is not None:
                wide = dropped(rows, part, mask, below.dtype)
                of_all = torch.mm(left, wide) if of_all is None else torch.addmm(of_all, left, wide, out=of_all)
        if of_all is not None:
            for number, gradient in zip(bundle, parted_like(of_all, [term.A for term in members]), strict=True):
                if self._needs(number, 2):
                    self.tensor_grads[self._place(number, 2)] = gradient

    def _of_inputs(self, x: Tensor | None, sources: list[Tensor], dx: Tensor | None, shown: Tensor | None) -> None:
        if not self.of_x:
            return
        shape = self.shape if x is None else x.shape
        whole = None if dx is None or shape is None else dx.view(*shape)
        if shown is not None:
            whole = shown if whole is None else whole.add_(shown)
        if whole is None or x is None or not sources:
            self.tensor_grads[0] = whole
            return
        wanted = [number for number, source in enumerate(sources) if source.requires_grad]
        gradients = torch.autograd.grad(x, [sources[number] for number in wanted], whole, allow_unused=True)
        for number, gradient in zip(wanted, gradients, strict=True):
            self.tensor_grads[number] = gradient


def _add_outer(rows: Tensor, left: Tensor, right: Tensor, mask: Tensor | None) -> None:
    """Add left right, or what the mask keeps of it, to the rows in place."""
    if mask is None:
        add_product(rows, left, right, 1.0)
    elif left.dtype == rows.dtype:
        rows.addcmul_(torch.mm(left, right), mask)
    else:
        rows.add_(torch.mm(left, right).mul_(mask))


def differentiable(
    group: Group,
    tensors: Sequence[Any],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
    inner: Sequence[Tensor] = (),
    shape: Sequence[int] | None = None,
) -> list[Tensor | None]:
    """Return the gradients by autograd, which can be differentiated again: create_graph=True.

    Of views: a layer that is called twice has its A in the history of its x too, and that way does not count here.
    Where x of this shape was not kept, zeros stand for it, and `inner`, which are results as well, are what they lack
    of h: no gradient but A's depends on x otherwise.
    """
    again = torch.is_grad_enabled()
    if shape is not None:
        zeros = torch.zeros(*shape, dtype=tensors[1].dtype, device=tensors[1].device, requires_grad=needs[0])
        tensors = (zeros, *tensors[1:])
    with torch.enable_grad():
        views = [tensor.view_as(tensor) if need else tensor for tensor, need in zip(tensors, needs, strict=True)]
        inputs, terms = group.parted(views)
        x = inputs[0] if group.produce is None else group.produce(*inputs)
        kept_of: Sequence[Tensor | None] = inner if shape is not None else [None] * len(terms)
        made = [_plain(term.as_multiplied(x.dtype), x, h) for term, h in zip(terms, kept_of, strict=True)]
        results = [y for y, _ in made] + ([x] if group.shows else []) + ([h for _, h in made] if inner else [])
        pairs = [(y, grad) for y, grad in zip(results, grads, strict=True) if grad is not None and y.requires_grad]
        outputs = [result.view_as(result) for result, _ in pairs]  # x may be its own gradient's source
    if not pairs:  # what has a gradient needs none: all of that term is frozen
        return [None] * len(needs)
    wanted = [view for view, need in zip(views, needs, strict=True) if need]
    slopes = torch.autograd.grad(outputs, wanted, [grad for _, grad in pairs], create_graph=again, allow_unused=True)
    remaining = iter(slopes)
    return [next(remaining) if need else None for need in needs]


def _plain(term: Term, x: Tensor, kept_inner: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what one term computes, and h, in operations that autograd knows; `kept_inner` is added to h."""
    base, wide = term.layer(x, term.weight), x.to(term.A.dtype)
    seed = term.facts.seed
    if seed is not None:
        wide = wide * kept(seed, x.shape[:-1].numel(), x.shape[-1], term.facts.p, wide.dtype).view(x.shape)
    own = F.linear(wide, term.A)
    inner = own if kept_inner is None else own + kept_inner.t().view_as(own)
    delta = F.linear(inner * term.facts.factor, term.whole_factor())
    total, h = base + delta.to(base.dtype), own.flatten(0, -2).t() if own.dim() > 1 else own.unsqueeze(1)
    if term.scale is None:
        return total, h
    return total + (term.scale - 1).to(base.dtype) * (total if term.bias is None else total - term.bias), h

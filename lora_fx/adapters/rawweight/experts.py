"""Routed experts with adapters on both banks as one autograd function, base, gate and routing weights included.

For each expert e and the rows x of the tokens that are routed to it, with weights w and the frozen banks U and D:

    forward     u = x Uₑᵀ + s · h₁ᵀ B₁ᵀ,  h₁ = A₁ xᵀ      m = act(u's first half) ⊙ u's second half
                y = m Dₑᵀ + s · h₂ᵀ B₂ᵀ,  h₂ = A₂ mᵀ      out[tokens] += w ⊙ y
    backward    p = g Dₑ + z₂ᵀ A₂,  z₂ = s B₂ᵀ gᵀ, with g = dout[tokens]
                dw = Σ p ⊙ m      dB₂ᵀ = s (w ⊙ h₂) g      dA₂ = (w ⊙ z₂) m      dm = w ⊙ p, and du from that
                dx += du Uₑ + z₁ᵀ A₁,  z₁ = s B₁ᵀ duᵀ      dB₁ᵀ = s h₁ du      dA₁ = z₁ x

What is kept is the hidden states (not where A₁ is frozen), u, h₁, h₂ and the routing: the rows are gathered again, m is
made again, and y, which autograd keeps for dw, is not needed as g · (m D'ᵀ) = (g D') · m, D' being D with its adapter.
The base's own gathered rows, gated products and results are what makes it keep more.

The forward pass does what transformers' own does, with the same tensors in the same order, so that its bits are those
of the frozen experts while B = 0; which forward that is, and that it is one that is known, `known_experts` says.

Source: Hu et al. 2021, arXiv:2106.09685, §4.1, eq. 3; Shazeer et al. 2017, arXiv:1701.06538, §2.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.adapters.rawweight.routed import not_kept
from lora_fx.models.torch_internals import grouped_mm, is_batched

Gate = Callable[[Tensor], Tensor]
Tensors = Sequence[Tensor]


class ExpertFacts(NamedTuple):
    """What is to be done with the tensors."""

    activation: Gate
    scalings: tuple[float, float]
    grouped: bool
    """Whether all experts are multiplied at once, as `grouped_mm` does, or one by one, as `eager` does."""

    def gate(self, both: Tensor) -> Tensor:
        """Return act(first half) ⊙ second half of the columns."""
        first, second = both.chunk(2, dim=-1)
        return self.activation(first) * second


class Banks(NamedTuple):
    """Both frozen banks, [experts, out, in], and their adapters' factors, [experts, r, in] and [experts, out, r].

    A factor that all experts share is [1, .., ..].
    """

    up: Tensor
    down: Tensor
    A1: Tensor
    B1: Tensor
    A2: Tensor
    B2: Tensor


@dataclass(frozen=True)
class Routing:
    """Which rows meet which expert: pairs of a token and one of its experts, sorted by expert."""

    experts: tuple[int, ...]
    """Those that any row meets, and how many each."""
    counts: tuple[int, ...]
    places: Tensor
    """Of the sorted pairs among all pairs."""
    tokens: Tensor
    slot_first: bool
    """Whether all pairs are in the order (place among a token's experts, token), or (token, place)."""

    @staticmethod
    def of(index: Tensor, number: int, grouped: bool) -> "Routing | None":
        """Return the routing of `index` [tokens, top k], in the order in which the forward takes the pairs.

        None if there is an expert that the banks do not have, but for the one number after the last, which is skipped.
        """
        flat = index.reshape(-1) if grouped else index.t().reshape(-1)
        places = torch.sort(flat)[1] if grouped else torch.sort(flat, stable=True)[1]
        counts = torch.bincount(flat, minlength=number).tolist()
        if len(counts) > number + (not grouped):
            return None
        met = tuple(expert for expert in range(number) if counts[expert])
        sizes = tuple(counts[expert] for expert in met)
        places = places[: sum(sizes)]
        tokens = places // index.shape[1] if grouped else places % index.shape[0]
        return Routing(met, sizes, places, tokens, not grouped)

    def in_order(self, weights: Tensor) -> Tensor:
        """Return the weight [rows] of every sorted pair, of [tokens, top k]."""
        return (weights.t() if self.slot_first else weights).reshape(-1).index_select(0, self.places)

    def back(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Return the values of the sorted pairs as [tokens, top k]; of pairs that meet no expert, zero."""
        flat = values.new_zeros(shape.numel()).index_copy_(0, self.places, values)
        return flat.view(shape[1], shape[0]).t() if self.slot_first else flat.view(shape)

    def of_each(self, bank: Tensor) -> list[Tensor]:
        """Return the matrices of the experts that any row meets; one for all where they share it."""
        matrices = bank.unbind()
        return [matrices[expert if len(matrices) > 1 else 0] for expert in self.experts]

    def parts(self, width: int) -> "Iterator[tuple[slice, slice, Routing]]":
        """Yield (which experts, which rows, their routing) by parts, small enough for a processor to keep at hand."""
        first, start = 0, 0
        while first < len(self.counts):
            last, end = first + 1, start + self.counts[first]
            while last < len(self.counts) and end + self.counts[last] - start <= _ENTRIES // width:
                last, end = last + 1, end + self.counts[last]
            experts, rows = slice(first, last), slice(start, end)
            part = Routing(
                self.experts[experts], self.counts[experts], self.places[rows], self.tokens[rows], self.slot_first
            )
            yield experts, rows, part
            first, start = last, end


def routed_experts(facts: ExpertFacts, routing: Routing, x: Tensor, weights: Tensor, banks: Banks) -> Tensor:
    """Return what the experts make of the hidden states x [tokens, width], weighted and summed.

    Args:
        facts: what is to be done.
        routing: of the tokens.
        x: the hidden states.
        weights: [tokens, top k], in the dtype of x or in float32.
        banks: frozen, in that dtype too; factors may be in float32.
    """
    result: Tensor = _Experts.apply(facts, routing, x, weights, *banks)  # type: ignore[no-untyped-call]
    return result


_ENTRIES = 3 << 16
"""Entries of u that a part of the backward pass has, but at least one expert's: measured."""


def _add_low(total: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """Add scaling · left right to the total in place; in mixed precision rounded to its dtype first."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, alpha=scaling, out=total)
    else:
        total.add_(torch.mm(left, right).mul_(scaling).to(total.dtype))


def _cast(rows: Tensor, like: Tensor) -> Tensor:
    return rows if rows.dtype == like.dtype else rows.to(like.dtype)


def _one_by_one(
    facts: ExpertFacts, routing: Routing, x: Tensor, weights: Tensor, banks: Banks, h1: Tensor, h2: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return the result and every expert's u, as the eager forward computes them; fill h₁ and h₂ [r, rows]."""
    out, kept = torch.zeros_like(x), []
    counts, matrices = routing.counts, _with_transposed(banks)
    for tokens, weight, one, two, up, down, A1, B1, A2, B2 in zip(
        routing.tokens.split_with_sizes(counts),
        weights.unsqueeze(-1).split_with_sizes(counts),
        h1.split_with_sizes(counts, 1),
        h2.split_with_sizes(counts, 1),
        *map(routing.of_each, matrices),
        strict=True,
    ):
        entering = x.index_select(0, tokens)
        both = F.linear(entering, up)
        _add_low(both, torch.mm(A1, _cast(entering, A1).t(), out=one).t(), B1, facts.scalings[0])
        kept.append(both)
        made = facts.gate(both)
        total = F.linear(made, down)
        _add_low(total, torch.mm(A2, _cast(made, A2).t(), out=two).t(), B2, facts.scalings[1])
        out.index_add_(0, tokens, total.mul_(weight))
    return out, kept


def _all_at_once(
    facts: ExpertFacts, routing: Routing, x: Tensor, weights: Tensor, banks: Banks, h1: Tensor, h2: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return the result and u of all rows, as the grouped forward computes them; fill h₁ and h₂ [r, rows]."""
    ends = torch.tensor(_ends(routing, banks.up.shape[0]), dtype=torch.int32, device=x.device)

    def product(rows: Tensor, bank: Tensor, A: Tensor, B: Tensor, inner: Tensor, scaling: float) -> Tensor:
        total, counts = grouped_mm(rows, bank.transpose(-2, -1), offs=ends), routing.counts
        for part, result, one, low, first, second in zip(
            _cast(rows, A).t().split_with_sizes(counts, 1),
            total.split_with_sizes(counts),
            inner.split_with_sizes(counts, 1),
            inner.t().split_with_sizes(counts),
            routing.of_each(A),
            routing.of_each(B.mT),
            strict=True,
        ):
            torch.mm(first, part, out=one)
            _add_low(result, low, second, scaling)
        return total

    both = product(x.index_select(0, routing.tokens), banks.up, banks.A1, banks.B1, h1, facts.scalings[0])
    total = product(facts.gate(both), banks.down, banks.A2, banks.B2, h2, facts.scalings[1])
    across = weights.unsqueeze(-1)
    total = total.mul_(across) if total.dtype == weights.dtype else total * across
    back = torch.empty_like(routing.places)
    back[routing.places] = torch.arange(len(back), device=x.device)
    out = total.index_select(0, back).view(x.shape[0], -1, x.shape[1]).sum(dim=1)
    return _cast(out, x), [both]


def _with_transposed(banks: Banks) -> Banks:
    return banks._replace(B1=banks.B1.mT, B2=banks.B2.mT)


def _ends(routing: Routing, number: int) -> list[int]:
    """Return where the rows of each expert end, of those without rows too."""
    counts, ends, end = dict(zip(routing.experts, routing.counts, strict=True)), [], 0
    for expert in range(number):
        end += counts.get(expert, 0)
        ends.append(end)
    return ends


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, facts: ExpertFacts, routing: Routing, x: Tensor, weights: Tensor, *given: Tensor) -> Tensor:
        banks = Banks(*given)
        inner = [A.new_empty(A.shape[1], len(routing.tokens)) for A in (banks.A1, banks.A2)]
        sorted_weights = routing.in_order(weights)
        run = _all_at_once if facts.grouped else _one_by_one
        out, kept = run(facts, routing, x, sorted_weights, banks, *inner)
        ctx.facts, ctx.routing = facts, routing
        ctx.save_for_backward(x if ctx.needs_input_grad[6] else None, weights, *banks, *inner, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, *others = ctx.saved_tensors
        banks, (h1, h2), kept = Banks(*others[:6]), others[6:8], others[8:]
        if torch.is_grad_enabled() or is_batched(gradient):
            return None, None, *_differentiable(ctx, gradient, x, weights, banks)
        made = _Backward(ctx.facts, ctx.routing, banks, x, ctx.needs_input_grad[2:])
        of_weights = made.run(gradient, kept, h1, h2, ctx.routing.in_order(weights))
        of_weights = ctx.routing.back(of_weights, weights.shape)
        A1, B1, A2, B2 = made.of_factors
        of_both = (None if B is None else B.mT for B in (B1, B2))
        return None, None, made.of_x, of_weights, None, None, A1, next(of_both), A2, next(of_both)


class _Backward:
    """The gradients, by the formulas above, part by part."""

    def __init__(
        self, facts: ExpertFacts, routing: Routing, banks: Banks, x: Tensor | None, needs: Sequence[bool]
    ) -> None:
        self.facts, self.routing, self.banks, self.x = facts, routing, banks, x
        number = len(routing.experts)  # a factor that is shared gets a sum
        self.of_factors = [
            None if not need else like.new_empty(like.shape) if 1 < number == len(like) else like.new_zeros(like.shape)
            for like, need in zip((banks.A1, banks.B1.mT, banks.A2, banks.B2.mT), needs[4:], strict=True)
        ]
        """Of A₁, B₁ᵀ, A₂ and B₂ᵀ; None for those that need none."""
        self.wants_x = needs[0]
        self.of_x: Tensor | None = None

    def run(self, gradient: Tensor, kept: Tensors, h1: Tensor, h2: Tensor, weights: Tensor) -> Tensor:
        """Fill in the gradients of x and the factors; return that of the sorted weights."""
        of_weights = torch.empty_like(weights)
        self.of_x = torch.zeros_like(gradient) if self.wants_x else None
        parts = list(self.routing.parts(self.banks.up.shape[1]))
        longest = max(rows.stop - rows.start for _, rows, _ in parts)
        wide, inner = (gradient.new_empty(longest, columns) for columns in self.banks.down.shape[1:])  # for all parts
        for experts, rows, part in parts:
            both = kept[0][rows] if self.facts.grouped else _below(kept[experts])
            room = wide[: rows.stop - rows.start]
            g = torch.index_select(gradient, 0, part.tokens, out=room)
            of_both = self._down(part, g, both, h2[:, rows], weights[rows], of_weights[rows], inner[: len(room)])
            self._up(part, of_both, h1[:, rows], room)
        return of_weights

    def _down(
        self, part: Routing, g: Tensor, both: Tensor, h2: Tensor, weights: Tensor, of_weights: Tensor, room: Tensor
    ) -> Tensor:
        """Return the gradient of u; note those of the weights, A₂ and B₂."""
        with torch.enable_grad():
            source = both.detach().requires_grad_()
            made = self.facts.gate(source)
        m, narrow = made.detach(), weights.to(h2.dtype)
        p, z = self._through(part, g, self.banks.down, self.banks.A2, self.banks.B2, self.facts.scalings[1], room)
        self._sum(part, h2 * (narrow * self.facts.scalings[1]), g, self.of_factors[3])
        self._sum(part, z.mul_(narrow), m, self.of_factors[2])
        of_weights.copy_(torch.sum(p * m.to(torch.promote_types(m.dtype, weights.dtype)), 1))
        (of_both,) = torch.autograd.grad(made, source, p.mul_(weights.unsqueeze(-1)))
        return of_both

    def _up(self, part: Routing, of_both: Tensor, h1: Tensor, room: Tensor) -> None:
        """Note the gradients of x, A₁ and B₁."""
        if self.of_x is None:
            z = self._inner(part, of_both, self.banks.B1, self.facts.scalings[0])
        else:
            of_rows, z = self._through(
                part, of_both, self.banks.up, self.banks.A1, self.banks.B1, self.facts.scalings[0], room
            )
            self.of_x.index_add_(0, part.tokens, of_rows)
        self._sum(part, h1 * self.facts.scalings[0], of_both, self.of_factors[1])
        if self.x is not None:
            self._sum(part, z, torch.index_select(self.x, 0, part.tokens, out=room), self.of_factors[0])

    @staticmethod
    def _inner(part: Routing, g: Tensor, B: Tensor, scaling: float) -> Tensor:
        """Return z = scaling · Bᵀ gᵀ [r, rows]."""
        if len(B) == 1:
            return torch.mm((B[0].t() * scaling).contiguous(), _cast(g, B).t())
        first, last = part.experts[0], part.experts[-1] + 1
        across = B.new_empty(last - first, B.shape[2], B.shape[1])
        matrices = torch.mul(B[first:last].mT, scaling, out=across).unbind()  # strided, it takes four times as long
        z = B.new_empty(B.shape[2], g.shape[0])
        columns = _cast(g, B).t().split_with_sizes(part.counts, 1)
        for expert, right, result in zip(part.experts, columns, z.split_with_sizes(part.counts, 1), strict=True):
            torch.mm(matrices[expert - first], right, out=result)
        return z

    def _through(
        self, part: Routing, g: Tensor, bank: Tensor, A: Tensor, B: Tensor, scaling: float, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return g W + zᵀ A [rows, in], which is put into the total, and z."""
        z = self._inner(part, g, B, scaling)
        for left, inner, result, weight, first in zip(
            g.split_with_sizes(part.counts), z.t().split_with_sizes(part.counts), total.split_with_sizes(part.counts),
            part.of_each(bank), part.of_each(A), strict=True,
        ):  # fmt: skip
            torch.mm(left, weight, out=result)
            _add_low(result, inner, first, 1.0)
        return total, z

    @staticmethod
    def _sum(part: Routing, narrow: Tensor, wide: Tensor, total: Tensor | None) -> None:
        """Put narrow [r, rows] · wide [rows, n] of every expert into the total [experts, r, n], or add up all.

        Nothing is done where it is not wanted.
        """
        if total is None:
            return
        if len(total) == 1:
            total[0].addmm_(narrow, _cast(wide, narrow))
            return
        lefts, rights = narrow.split_with_sizes(part.counts, 1), _cast(wide, narrow).split_with_sizes(part.counts)
        for left, right, result in zip(lefts, rights, part.of_each(total), strict=True):
            torch.mm(left, right, out=result)


def _below(parts: Tensors) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _differentiable(
    ctx: Any, gradient: Tensor, x: Tensor | None, weights: Tensor, banks: Banks
) -> tuple[Tensor | None, ...]:
    """Return the gradients by autograd, which can be differentiated again: create_graph=True."""
    again, routing = torch.is_grad_enabled(), ctx.routing
    if x is None:
        raise not_kept()
    given = (x, weights, *banks)
    with torch.enable_grad():
        views = [t.view_as(t) if need else t for t, need in zip(given, ctx.needs_input_grad[2:], strict=True)]
        out = _plain(ctx.facts, routing, views[0], routing.in_order(views[1]), Banks(*views[2:]))
    wanted = [view for view, need in zip(views, ctx.needs_input_grad[2:], strict=True) if need]
    slopes = iter(torch.autograd.grad(out, wanted, gradient, create_graph=again, allow_unused=True))
    return tuple(next(slopes) if need else None for need in ctx.needs_input_grad[2:])


def _plain(facts: ExpertFacts, routing: Routing, x: Tensor, weights: Tensor, banks: Banks) -> Tensor:
    """Return the result by operations that autograd knows."""

    def product(rows: Tensor, bank: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        low = F.linear(F.linear(rows.to(A.dtype), A) * scaling, B)
        return F.linear(rows, bank) + low.to(rows.dtype)

    out = torch.zeros_like(x)
    pairs = zip(routing.tokens.split_with_sizes(routing.counts), weights.split_with_sizes(routing.counts), strict=True)
    for (tokens, weight), matrices in zip(pairs, zip(*map(routing.of_each, banks), strict=True), strict=True):
        up, down, A1, B1, A2, B2 = matrices
        made = facts.gate(product(x.index_select(0, tokens), up, A1, B1, facts.scalings[0]))
        total = product(made, down, A2, B2, facts.scalings[1]) * weight.unsqueeze(-1)
        out = out.index_add(0, tokens, _cast(total, out))
    return out

"""base + scaling · B A dropout(x) for one or more frozen linears on the same x, as one differentiable operation.

What it saves for the backward pass is x (once for all layers; nothing where x is a norm's output, or where every A is
frozen as in LoRA-FA), A x, and references to the weights; nothing is cast, scaled, masked or added in a tensor of its
own that outlives the call.  Of several layers on one x the A products are one product, with all A below each other, and
so are their gradients.

Forward, for layer i:    hᵢ = Aᵢ dropout(x)ᵀ              yᵢ = x Wᵢᵀ + bᵢ, then += scalingᵢ · hᵢᵀ Bᵢᵀ in place
Backward:                zᵢ = scalingᵢ · Bᵢᵀ dyᵢᵀ         dBᵢᵀ = scalingᵢ · hᵢ dyᵢ        dAᵢ = zᵢ dropout(x)
                         dx = Σ dyᵢ Wᵢ, then += dropout'(Σ zᵢᵀ Aᵢ) in place
Merged (`contraction`):  Wᵢ + scalingᵢ · Bᵢ Aᵢ stands for Wᵢ in both passes, made again as hᵢ is; nothing is added
Shapes: x [.., in], W [out, in] (with `in_out` [in, out]), A [r, in], B [out, r], h and z [r, N] for N rows of x.

With dropout, dropout(x) only drops, and scalingᵢ holds the 1 over the probability of keeping.

The thin products are written so that the long side of the result is its last: with r rows of N columns a matrix
library needs a half to a quarter of the time that N rows of r columns take it.

Source: Hu et al. 2021, arXiv:2106.09685, §4.1; what must be saved: Cherniuk et al. 2023, arXiv:2312.03415; frozen A:
Zhang et al. 2023, arXiv:2308.03303, §3.  DoRA: see
`dora.py`; here y = t + (m/‖V‖ - 1)(t - b), with t the sum above.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.adapters.fused.backward import Backward, differentiable
from lora_fx.adapters.fused.origin import kept_of
from lora_fx.adapters.fused.terms import (
    Group,
    Produce,
    Term,
    add_product,
    autocast_dtype,
    bundled,
    cast_as_products,
    inner_products,
)
from lora_fx.errors import RefusedError
from lora_fx.models.torch_internals import is_batched, unsafe_view


def adapted(terms: Sequence[Term], x: Tensor) -> tuple[Tensor, ...]:
    """Return what the layers compute from x with their adapters; nothing is changed.

    Bit-equal to the layers alone while B = 0 (DoRA: and m = ‖W‖).
    """
    x = cast_as_products(x)
    if len(terms) == 1 and not torch.is_grad_enabled():
        output = _flat(terms[0], x)
        if output is not None:
            return (output,)
    return adapted_from(terms, x, None, (x,), False)


def _flat(term: Term, x: Tensor) -> Tensor | None:
    """Return what one layer computes, in as few operations as can be; None where there is more to it."""
    facts, weight, _, A, B, scale = term.as_multiplied(x.dtype)
    if facts.in_out or scale is not None or facts.p or facts.runs or A.dtype != x.dtype:
        return None
    y = term.layer(x, weight)
    if not y.is_contiguous():
        return None
    rows, h = y, F.linear(x, A)
    if y.dim() != 2:
        rows, h = y.view(-1, y.shape[-1]), h.view(-1, h.shape[-1])
    torch.addmm(rows, h, B.t(), alpha=facts.scaling, out=rows)
    return y


def adapted_from(
    terms: Sequence[Term],
    x: Tensor,
    produce: Produce | None,
    inputs: Sequence[Tensor],
    shows: bool,
    halved: tuple[bool, ...] = (),
) -> tuple[Tensor, ...]:
    """Return the results of all terms on x, and x last if it `shows`; x is made again for gradients, and not kept.

    Args:
        terms: the layers, all on x.
        x: what `produce` makes of the inputs, computed without gradients.
        produce: differentiable, draws nothing and writes nothing in place; None: the one input is x.
        inputs: what x is made of.
        shows: whether x is wanted as well.
        halved: which of the inputs are kept in bfloat16, if they are in float32.
    """
    with_x = shows and any(tensor.requires_grad for tensor in inputs)  # else x gets no gradient, and none is asked for
    facts, tensors = [], list(inputs)
    for term in terms:
        facts.append(term.facts)
        tensors += term[1:]  # type: ignore[arg-type]
    group = Group(tuple(facts), bundled(terms), produce, len(inputs), with_x, halved)
    if torch.is_grad_enabled() and _wants_gradient(tensors):
        made = _Adapted.apply(group, terms, x, *tensors)[: len(terms) + with_x]  # type: ignore[no-untyped-call]
        return (*made, x) if shows and not with_x else tuple(made)
    results = outputs_of(group, x, terms)[0]
    return (*results, x) if shows else tuple(results)


def _wants_gradient(tensors: Sequence[Tensor | None]) -> bool:
    for tensor in tensors:  # noqa: SIM110 - as a generator it would be called for each of them, in each layer
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def outputs_of(
    group: Group, x: Tensor, terms: Sequence[Term]
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """Return all y, all h (of merged terms none), and what DoRA keeps: y before its scale and without the bias."""
    terms = [term.as_multiplied(x.dtype) for term in terms]
    inner = inner_products(group, x, terms, merged=False)
    results, unscaled = [], []
    for term, h in zip(terms, inner, strict=True):
        y = term.layer(x, term.met()).contiguous()
        rows = y.view(-1, y.shape[-1])
        if h is not None:
            for outputs, inner_rows, block in term.blocks():
                add_product(rows[:, outputs], h[inner_rows].t(), block.t(), term.facts.factor)
        plain = None
        if term.scale is not None:
            plain = rows if term.bias is None else rows - term.bias
            y = torch.addcmul(rows, plain, (term.scale - 1).to(y.dtype)).view_as(y)
        results.append(_alone(y))
        unscaled.append(plain)
    return results, inner, unscaled


def _alone(made: Tensor) -> Tensor:
    """Return a tensor that is no view, on the same memory: as a result, a view could not be written to in place."""
    return unsafe_view(made, made.shape) if made._is_view() else made


def _needs_x(group: Group, needs: Sequence[bool]) -> bool:
    """Whether x, or what makes it, is kept: only for gradients of A, of DoRA's scale, and of what x is made of."""
    of_each = [needs[group.inputs + 5 * term : group.inputs + 5 * term + 5] for term in range(len(group.facts))]
    return group.produce is not None or any(of_a or of_scale for _, _, of_a, _, of_scale in of_each)


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, terms: Sequence[Term], x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        results, inner, unscaled = outputs_of(group, x, terms)
        inputs, others = tensors[: group.inputs], tensors[group.inputs :]
        keeps = _needs_x(group, ctx.needs_input_grad[3:])
        kept, ctx.restore = kept_of(inputs, group.produce is not None, group.halved) if keeps else ((), None)
        shown = [] if keeps else [_alone(h) for h in inner if h is not None]  # nothing is merged with a frozen A
        inner = [*shown] or inner
        ctx.group, ctx.kept, ctx.others, ctx.shape = group, len(kept), len(others), None if keeps else x.shape
        ctx.save_for_backward(*kept, *others, *inner, *unscaled)
        ctx.set_materialize_grads(False)
        if not keeps:
            return (*results, *shown)
        return (*results, x) if group.shows else tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, group = ctx.saved_tensors, ctx.group
        inputs = saved[: ctx.kept] if ctx.restore is None else ctx.restore(*saved[: ctx.kept])
        inputs = inputs if ctx.shape is None else (None,)
        tensors, kept_ones = (*inputs, *saved[ctx.kept :][: ctx.others]), saved[ctx.kept + ctx.others :]
        if any(group.halved) and torch.is_grad_enabled():
            raise RefusedError(
                "gradients of gradients need the inputs that were kept in bfloat16",
                advice='leave "halve" out of `optimise`',
            )
        needs = ctx.needs_input_grad[3:]
        device = tensors[group.inputs].device.type
        cast = autocast_dtype(device) is not None  # what the forward saved has been cast: products keep their dtypes
        with torch.autocast(device, enabled=False) if cast else contextlib.nullcontext():
            if torch.is_grad_enabled() or any(grad is not None and is_batched(grad) for grad in grads):
                inner = () if ctx.shape is None else kept_ones[: len(group.facts)]
                return (None, None, None, *differentiable(group, tensors, needs, grads, inner, ctx.shape))
            return (None, None, None, *Backward(group, tensors, needs, kept_ones, ctx.shape).gradients(grads))

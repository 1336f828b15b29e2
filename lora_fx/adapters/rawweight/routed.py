"""Products of rows with the members of a bank that they are routed to, base and low-rank part in one autograd function.

y = x W + scaling · (x Aᵀ) B, where W is frozen.  A frozen product keeps nothing for its gradient; this one keeps x, and
only where x cannot be had from what autograd keeps anyway: what enters the last matrix of a gated expert is a
product act(g) · u, whose factors are kept for its own gradient.  Where A is frozen, x is not kept at all.  The narrow
matrices lie with their long side last, for which matrix kernels are several times faster.

Source: Hu et al. 2021, arXiv:2106.09685, §4.1, eq. 3; one autograd function that keeps x alone: Cherniuk et al. 2023,
arXiv:2312.03415.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_fx.adapters.rawweight.factored import Factored
from lora_fx.adapters.rawweight.products import Call
from lora_fx.errors import RefusedError
from lora_fx.models.torch_internals import moves_tensors, packing


@dataclass(frozen=True)
class Run:
    """Rows that meet the same matrix: `rows` of x, and a member of the bank, or the one matrix if that is None."""

    member: int | None
    rows: slice

    def of(self, matrices: Tensor) -> Tensor:
        return matrices if self.member is None else matrices[self.member]


def runs_of(name: str, call: Call, low: Factored, rows: int) -> tuple[Run, ...] | None:
    """Return which rows meet which matrix in a linear or a grouped product; None where it is not known here.

    Groups whose ends are known only on another device are left to torch's own kernels.
    """
    if name == "linear":
        return (Run(None, slice(0, rows)),) if len(low.view.shape) == 2 else None
    offsets = call.operand(2, "offs")
    if offsets is None or offsets.device.type != "cpu" or len(low.view.shape) != 3:
        return None
    ends = itertools.pairwise([0, *offsets.tolist()])
    return tuple(Run(member, slice(a, b)) for member, (a, b) in enumerate(ends) if b > a)


def source(x: Tensor) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    """Return what is kept to have x again, each in the shape of x, and what makes any rows of x of the same of each.

    Where x is a product, and autograd keeps its factors anyway, these; else x itself.
    """
    node = x.grad_fn
    if type(node).__name__ == "MulBackward0" and not moves_tensors(packing()):
        with contextlib.suppress(RuntimeError):  # changed in place since, so no longer what was multiplied
            factors = (node._saved_self, node._saved_other)  # type: ignore[union-attr]
            if all(factor is not None and factor.shape == x.shape and factor.dtype == x.dtype for factor in factors):
                return factors, torch.mul
    return (x,), _itself


def _itself(x: Tensor) -> Tensor:
    return x


def not_kept() -> RefusedError:
    """Return the error for gradients of gradients where A is frozen."""
    return RefusedError(
        "gradients of gradients, and several at once, need the input of the experts, not kept where A is frozen",
        advice="leave out `lora_fa`, or let A require a gradient",
    )


def routed_product(
    base: Callable[[], Tensor], runs: Sequence[Run], x: Tensor, weight: Tensor, low: Factored
) -> Tensor | None:
    """Return x W + scaling · (x Aᵀ) B in the dtype of the base's product; None if the weight shows no matrices.

    Args:
        base: computes x W, plus a bias if there is one.
        runs: which rows meet which matrix; other rows are as the base leaves them.
        x: [.., in].
        weight: W as [.., in, out], frozen.
        low: its low-rank part, of one matrix as [out, in].
    """
    matrices = low.matrices()
    if matrices is None:
        return None
    A, B = (matrices[0].mT, matrices[1]) if weight.dim() == 3 else (matrices[1], matrices[0].mT)
    result: Tensor = _Routed.apply(base, runs, low.scaling, source(x), x, weight, A, B)  # type: ignore[no-untyped-call]
    return result


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, base: Any, runs: Any, scaling: float, source: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor
    ) -> Tensor:
        total: Tensor = base()
        total = total if total.is_contiguous() else total.contiguous()
        flat, x = total.flatten(0, -2), x.flatten(0, -2)
        inner = A.new_empty(x.shape[0] * A.shape[-2])
        for run, h in _each(runs, inner, A.shape[-2]):
            torch.mm(run.of(A), x[run.rows].to(A.dtype).t(), out=h).mul_(scaling)
            _add(flat[run.rows], h.t(), run.of(B))
        tensors, ctx.make = source if ctx.needs_input_grad[6] else ((), None)
        ctx.runs, ctx.scaling = runs, scaling
        ctx.save_for_backward(weight, A, B, inner, *tensors)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, A, B, inner, *kept = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4]
        if torch.is_grad_enabled():
            if ctx.make is None:
                raise not_kept()
            x = ctx.make(*kept)
            return None, None, None, None, *_differentiable(ctx.runs, ctx.scaling, gradient, x, weight, A, B, wanted)
        flat, kept = gradient.flatten(0, -2), [factor.flatten(0, -2) for factor in kept]
        of_x = flat.new_empty(flat.shape[0], weight.shape[-2]) if wanted else None
        met = len(ctx.runs) == (A.shape[0] if A.dim() == 3 else 1)
        new = torch.empty if met else torch.zeros
        of_B = new(B.shape, dtype=B.dtype, device=B.device)
        of_A = None if ctx.make is None else new(A.shape, dtype=A.dtype, device=A.device)
        for run, h in _each(ctx.runs, inner, A.shape[-2]):
            g = flat[run.rows]
            wide = g.to(A.dtype)
            z = torch.mm(run.of(B).contiguous(), wide.t()).mul_(ctx.scaling)  # strided, it takes four times as long
            torch.mm(h, wide, out=run.of(of_B))
            if of_A is not None:
                torch.mm(z, ctx.make(*(factor[run.rows] for factor in kept)).to(A.dtype), out=run.of(of_A))
            if of_x is not None:
                _add(torch.mm(g, run.of(weight).t(), out=of_x[run.rows]), z.t(), run.of(A))
        if of_x is not None:
            of_x[ctx.runs[-1].rows.stop if ctx.runs else 0 :].zero_()  # rows that meet no matrix
            of_x = of_x.view(*gradient.shape[:-1], weight.shape[-2])
        return None, None, None, None, of_x, None, of_A, of_B


def _each(runs: Sequence[Run], inner: Tensor, r: int) -> Iterator[tuple[Run, Tensor]]:
    """Yield every run, with its part of the memory for the inner products as [r, rows]."""
    for run in runs:
        yield run, inner[run.rows.start * r : run.rows.stop * r].view(r, run.rows.stop - run.rows.start)


def _add(total: Tensor, x: Tensor, matrix: Tensor) -> None:
    """Add x M to the total, in place; in mixed precision, x M is rounded to the dtype of the total first."""
    if total.dtype == x.dtype:
        torch.addmm(total, x, matrix, out=total)
    else:
        total.add_(torch.mm(x, matrix).to(total.dtype))


def _differentiable(
    runs: Sequence[Run], scaling: float, gradient: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, wanted: bool
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, W, A and B by torch's own products, to be differentiated again."""
    flat, of_result = x.flatten(0, -2), gradient.flatten(0, -2)
    met = [flat[run.rows] @ run.of(weight) for run in runs]
    low = [((flat[run.rows].to(A.dtype) @ run.of(A).mT) * scaling) @ run.of(B) for run in runs]
    results = [one + other.to(one.dtype) for one, other in zip(met, low, strict=True)]
    inputs = [tensor for tensor in ((x, A, B) if wanted else (A, B)) if tensor.requires_grad]
    grads = torch.autograd.grad(
        results, inputs, [of_result[run.rows] for run in runs], create_graph=True, allow_unused=True
    )
    gradients = dict(zip(map(id, inputs), grads, strict=True))
    return gradients.get(id(x)), None, gradients.get(id(A)), gradients.get(id(B))

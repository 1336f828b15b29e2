"""The fused product as operators of torch, `lora_fx::adapted` and its backward pass, for code that a compiler makes.

A compiler sees one operation, of whose results it knows the shapes: it writes what lies between such operations as
kernels of its own, decides what is kept for the backward pass, and calls this code for the products, which are in place
here and would not be if it saw them one by one.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_fx.adapters.fused.backward import Backward
from lora_fx.adapters.fused.forward import outputs_of
from lora_fx.adapters.fused.terms import Facts, Group, Term, bundled

_PER_TERM = 5
"""Flags of each term: weight stored as [in, out], bias, scale, number of its seed (-1: none), gradients that need x."""


def as_operands(terms: Sequence[Term]) -> tuple[tuple[float, ...], tuple[int, ...], list[Tensor], list[Tensor]]:
    """Return terms as (numbers, flags, tensors, seeds), what the operators are given; parts of weights it cannot hold.

    `numbers` and `flags` say what is done with the tensors, and are constants for a compiler.
    """
    numbers: list[float] = []
    flags: list[int] = []
    tensors: list[Tensor] = []
    seeds: list[Tensor] = []
    for term in terms:
        facts = term.facts
        seed = -1
        if facts.seed is not None:
            seed = next((number for number, known in enumerate(seeds) if known is facts.seed), len(seeds))
            seeds += [facts.seed] if seed == len(seeds) else []
        numbers += [facts.scaling, facts.p]
        needs_x = term.A.requires_grad or term.scale is not None
        flags += [facts.in_out, term.bias is not None, term.scale is not None, seed, needs_x]
        tensors += [tensor for tensor in term[1:] if tensor is not None]
    return tuple(numbers), tuple(map(int, flags)), tensors, seeds


def _terms(
    numbers: Sequence[float], flags: Sequence[int], tensors: Sequence[Tensor], seeds: Sequence[Tensor]
) -> list[Term]:
    """Return the terms that `as_operands` was given."""
    following, terms = iter(tensors), []
    for number in range(len(flags) // _PER_TERM):
        in_out, bias, scale, seed, _ = flags[_PER_TERM * number : _PER_TERM * (number + 1)]
        scaling, p = numbers[2 * number : 2 * number + 2]
        facts = Facts(scaling, bool(in_out), p, seeds[seed] if seed >= 0 else None)
        weight, added = next(following), next(following) if bias else None
        A, B = next(following), next(following)
        terms.append(Term(facts, weight, added, A, B, next(following) if scale else None))
    return terms


def adapted_operands(
    x: Tensor, numbers: Sequence[float], flags: Sequence[int], tensors: list[Tensor], seeds: list[Tensor]
) -> list[Tensor]:
    """Return what each term computes from x; stands in compiled code."""
    dtype = tensors[0].dtype
    made = torch.ops.lora_fx.adapted(x if x.dtype is dtype else x.to(dtype), tensors, seeds, numbers, flags)
    return list(made[: len(flags) // _PER_TERM])


@torch.library.custom_op("lora_fx::adapted", mutates_args=())
def _adapted(
    x: Tensor, tensors: Sequence[Tensor], seeds: Sequence[Tensor], numbers: Sequence[float], flags: Sequence[int]
) -> list[Tensor]:
    terms = _terms(numbers, flags, tensors, seeds)
    results, inner, unscaled = outputs_of(_group(terms), x, terms)
    kept = (*inner, *unscaled)
    return [*results, *(_own(tensor) for tensor in kept if tensor is not None)]


def _group(terms: Sequence[Term]) -> Group:
    return Group(tuple(term.facts for term in terms), bundled(terms), None, 1, False)


def _own(tensor: Tensor) -> Tensor:
    """Return the tensor, with memory of its own: results of an operator may not share theirs."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


@_adapted.register_fake
def _(
    x: Tensor, tensors: Sequence[Tensor], seeds: Sequence[Tensor], numbers: Sequence[float], flags: Sequence[int]
) -> list[Tensor]:
    terms = [term.as_multiplied(x.dtype) for term in _terms(numbers, flags, tensors, seeds)]
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    widths = [term.weight.shape[1 if term.facts.in_out else 0] for term in terms]
    results = [x.new_empty((*x.shape[:-1], width)) for width in widths]
    inner = [term.A.new_empty((term.A.shape[0], rows)) for term in terms]
    scaled = zip(terms, widths, strict=True)
    return [*results, *inner, *(x.new_empty((rows, width)) for term, width in scaled if term.scale is not None)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, tensors, seeds, numbers, flags = inputs
    results = len(flags) // _PER_TERM
    kept = [x] if any(flags[_PER_TERM - 1 :: _PER_TERM]) else []
    ctx.numbers, ctx.flags, ctx.counts = numbers, flags, (len(kept), len(tensors), len(seeds))
    ctx.save_for_backward(*kept, *tensors, *seeds, *output[results:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    saved, (kept, count, seeds) = list(ctx.saved_tensors), ctx.counts
    x, saved = saved[0] if kept else None, saved[kept:]
    parts = saved[:count], saved[count : count + seeds], saved[count + seeds :]
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    results = len(ctx.flags) // _PER_TERM
    given = [grad is not None for grad in grads[:results]]
    wanted = _wanted(needs, given, ctx.flags)
    made: Iterator[Tensor] = iter(())
    if any(wanted):
        slopes = [grad for grad in grads[:results] if grad is not None]
        made = iter(torch.ops.lora_fx.adapted_backward(slopes, x, *parts, ctx.numbers, ctx.flags, given, wanted))
    of_x, *others = (next(made) if want else None for want in wanted)
    return of_x, others, [None] * seeds, None, None


def _wanted(needs: Sequence[bool], given: Sequence[bool], flags: Sequence[int]) -> list[bool]:
    """Return of which tensors there will be gradients: those asked for, of terms whose result has one."""
    wanted, following = [needs[0] and any(given)], iter(needs[1:])
    for number, present in enumerate(given):
        _, bias, scale, _, _ = flags[_PER_TERM * number : _PER_TERM * (number + 1)]
        wanted += [next(following) and present for _ in range(3 + bias + scale)]
    return wanted


_adapted.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("lora_fx::adapted_backward", mutates_args=())
def _adapted_backward(
    grads: Sequence[Tensor], x: Tensor | None, tensors: Sequence[Tensor], seeds: Sequence[Tensor],
    kept: Sequence[Tensor], numbers: Sequence[float], flags: Sequence[int], given: Sequence[bool],
    wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    terms = _terms(numbers, flags, tensors, seeds)
    inner, rest = list(kept[: len(terms)]), iter(kept[len(terms) :])
    unscaled = [next(rest) if term.scale is not None else None for term in terms]
    flat: list[Any] = [x]
    needs, following = [wanted[0]], iter(wanted[1:])
    for term in terms:
        flat += term[1:]
        needs += [tensor is not None and next(following) for tensor in term[1:]]
    slopes = iter(grads)
    every = [next(slopes) if present else None for present in given]
    shape = (*grads[0].shape[:-1], terms[0].A.shape[1])
    made = Backward(_group(terms), flat, needs, [*inner, *unscaled], shape).gradients(every)
    return [_own(made[place]) for place, need in enumerate(needs) if need]  # type: ignore[arg-type]


@_adapted_backward.register_fake
def _(
    grads: Sequence[Tensor], x: Tensor | None, tensors: Sequence[Tensor], seeds: Sequence[Tensor],
    kept: Sequence[Tensor], numbers: Sequence[float], flags: Sequence[int], given: Sequence[bool],
    wanted: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    terms, following = _terms(numbers, flags, tensors, seeds), iter(wanted[1:])
    made = [grads[0].new_empty((*grads[0].shape[:-1], terms[0].A.shape[1]))] if wanted[0] else []
    for term in (term.as_multiplied(grads[0].dtype) for term in terms):
        for tensor in term[1:]:
            if tensor is not None and next(following):
                is_b = tensor is term.B
                made.append(tensor.new_empty(tensor.shape[::-1]).t() if is_b else torch.empty_like(tensor))
    return made

"""What region graphs call where several adapted layers have the same input, or one whose making is cheap to repeat.

A layer that must go operation by operation (see `fusing`) does so here too, and random numbers are drawn in the order
of the layers, as if each had been called alone.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_fx.adapters.fused.forward import adapted, adapted_from
from lora_fx.adapters.fused.terms import Produce, Term, autocast_dtype, cast_as_products


def adapted_siblings(x: Tensor, *layers: Any) -> tuple[Tensor, ...]:
    """Return what each adapted layer computes from x; their A products are one product."""
    terms = _terms(layers, x)
    return adapted(terms, x) if len(terms) == len(layers) else _apart(terms, layers, x)


def _terms(layers: Sequence[Any], x: Tensor) -> list[Term]:
    """Return the terms of the layers, up to the first that is none."""
    terms = []
    for layer in layers:
        term = layer.adapted_term(x)
        if term is None:
            break
        terms.append(term)
    return terms


def _apart(terms: Sequence[Term], layers: Sequence[Any], x: Tensor) -> tuple[Tensor, ...]:
    """Return what each layer computes from x, one after the other; the first of them are the terms."""
    return (*(adapted((term,), x)[0] for term in terms), *(layer.adapted_forward(x) for layer in layers[len(terms) :]))


def _of_tensors(produce: Produce, given: Sequence[Any]) -> tuple[Produce, tuple[Tensor, ...]]:
    """Return a function of the tensors among the arguments, the others being fixed, and the tensors."""
    tensors = tuple(value for value in given if isinstance(value, Tensor))
    if len(tensors) == len(given):
        return produce, tensors
    fixed = [_TENSOR if isinstance(value, Tensor) else value for value in given]

    def of_tensors(*inputs: Tensor) -> Tensor:
        following = iter(inputs)
        return produce(*(next(following) if value is _TENSOR else value for value in fixed))

    return of_tensors, tensors


_TENSOR = object()


def _under_autocast(produce: Produce, device: str, dtype: torch.dtype) -> Produce:
    """Return what makes x as it was made under autocast, and cast as products cast it, also in the backward pass."""

    def as_then(*inputs: Tensor) -> Tensor:
        with torch.autocast(device, dtype=dtype):
            return cast_as_products(produce(*inputs))

    return as_then


def making(
    produce: Produce, layers: int, shows: bool, name: str, halved: frozenset[int] = frozenset()
) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function of layers and inputs: what the layers compute from x = produce(*inputs), which is not kept.

    Args:
        produce: as for `adapted_from`.
        layers: how many of the arguments are layers; the rest are the inputs.
        shows: whether x is the last result.
        name: of the function, for graphs.
        halved: which of the inputs are kept in bfloat16 where they are tensors in float32.
    """

    def adapted_making(*arguments: Any) -> tuple[Tensor, ...]:
        called, given = arguments[:layers], arguments[layers:]
        make, inputs = _of_tensors(produce, given)
        half = tuple(number in halved for number, value in enumerate(given) if isinstance(value, Tensor))
        cast = autocast_dtype(inputs[0].device.type)
        if cast is not None and shows:  # others want it as it was before the cast
            x = make(*inputs)
            return (*adapted_siblings(x, *called), x)
        make = make if cast is None else _under_autocast(make, inputs[0].device.type, cast)
        with torch.no_grad():
            x = make(*inputs)
        terms = _terms(called, x)
        if len(terms) == layers:
            return adapted_from(terms, x, make, inputs, shows, half if halved else ())
        x = make(*inputs)
        results = _apart(terms, called, x)
        return (*results, x) if shows else results

    adapted_making.__name__ = adapted_making.__qualname__ = name
    adapted_making.makes = layers  # type: ignore[attr-defined]  # by which passes know it
    adapted_making.halving = functools.partial(making, produce, layers, shows, name)  # type: ignore[attr-defined]
    return adapted_making

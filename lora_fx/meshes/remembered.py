"""Operators on the meta device that meet the same shapes again: what they make is known, and not worked out again.

The blocks of a model are alike, so all but the first ask what was asked before; torch works most answers out in Python,
which takes ten times as long as making a tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_fx.bench.counters import operands
from lora_fx.models.together import PLAIN

_Shape = tuple[torch.Size, tuple[int, ...], torch.dtype]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What an operator gives back for some shapes."""

    flops: int
    shapes: tuple[_Shape, ...] = ()
    """Of new tensors."""
    is_one: bool = False
    """It is a tensor, and no tuple of them."""
    written: str | int | None = None
    """Where among the arguments the tensor is that is written to, and given back."""


class RememberedKernels:
    """What operators have made of which shapes, and its FLOPs: of those that make new tensors, or write to one."""

    def __init__(self, run: Callable[..., Any], flops: Callable[..., int]) -> None:
        """Take what runs an operator, and what counts it: of the operator, its arguments, and then the result."""
        self._run, self._flops = run, flops
        self._known: dict[object, _Answer | None] = {}
        """By what was given; None for what has to be run each time."""
        self._views: dict[Any, bool] = {}
        """Whether an operator's schema says that it returns what it was given, and does not write to it."""

    def call(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, int]:
        """Return what an operator does, and its FLOPs."""
        if func not in self._views:
            self._views[func] = any(one.alias_info and not one.alias_info.is_write for one in func._schema.returns)
        key = None if self._views[func] else _key((func, args, kwargs))
        known = self._known.get(key) if key is not None else None
        if known is None:
            before = _storages(args, kwargs) if key is not None else []
            result = self._run(func, args, kwargs)
            flops = self._flops(func, args, kwargs, result)
            if key is not None and key not in self._known:
                same = key == _key((func, args, kwargs)) and before == _storages(args, kwargs)
                self._known[key] = _answer(result, flops, args, kwargs) if same else None
            return result, flops
        if known.written is not None:
            return (kwargs if isinstance(known.written, str) else args)[known.written], known.flops
        made = tuple(map(_made, known.shapes))
        return (made[0] if known.is_one else made), known.flops


def _made(shape: _Shape) -> Tensor:
    size, stride, dtype = shape
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _key(value: Any) -> object:
    """Return what tells arguments apart; None where a tensor is more than a shape on the meta device."""
    if isinstance(value, Tensor):
        plain = type(value) in PLAIN and value.is_meta and value.layout is torch.strided and not value.is_complex()
        return (value.shape, value.stride(), value.dtype) if plain else None
    if isinstance(value, dict):
        value = (*value, *value.values())
    if isinstance(value, list | tuple):
        keys = [_key(one) for one in value]
        return None if None in keys else tuple(keys)
    return type(value), value


def _storages(args: Any, kwargs: Any) -> list[int]:
    return [one.untyped_storage()._cdata for one in operands((*args, *kwargs.values()))]


def _answer(result: Any, flops: int, args: Any, kwargs: Any) -> _Answer | None:
    """Return what an operator has given back that left its arguments as they were; None where that is not all.

    A tensor may share its memory without the schema saying so (`_unsafe_view`).
    """
    for where, value in (*enumerate(args), *kwargs.items()):
        if value is result and isinstance(value, Tensor):
            return _Answer(flops, written=where)
    made = result if isinstance(result, tuple) else (result,)
    if not all(isinstance(one, Tensor) and _key(one) for one in made):
        return None
    storages = {one.untyped_storage()._cdata for one in made}
    shapes = tuple((one.shape, one.stride(), one.dtype) for one in made)
    sizes = [one.untyped_storage().nbytes() for one in made]
    alone = len(storages) == len(made) and storages.isdisjoint(_storages(args, kwargs))
    if not alone or sizes != [_made(shape).untyped_storage().nbytes() for shape in shapes]:
        return None
    return _Answer(flops, shapes, made is not result)

"""Plain Python objects that hold tensors (a KV cache, a config): what they are, copies of them, and comparing them."""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.capture.calls.arguments import is_constant

IDENTITIES = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, enum.Enum)
"""What is compared by identity, and holds nothing that a capture looks into."""


def is_plain_object(value: object) -> bool:
    """Whether the value is an instance of a Python class with attributes of its own, and not part of a model."""
    if isinstance(value, (nn.Module, Tensor, torch.Generator, dict, list, tuple, set, *IDENTITIES)):
        return False
    return not is_constant(value) and isinstance(getattr(value, "__dict__", None), dict)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor that can be reached from the value through attributes, lists, tuples and dicts."""
    return (tensor for tensor in _walk(value) if isinstance(tensor, Tensor))


def _walk(value: Any) -> Iterator[Tensor | nn.Module]:
    waiting, seen = [value], set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, (Tensor, nn.Module)):
            yield part
        elif isinstance(part, (list, tuple)):
            waiting.extend(part)
        elif isinstance(part, dict):
            waiting.extend(part.values())
        elif is_plain_object(part):
            waiting.extend(vars(part).values())


def copied(value: Any, tensor: Callable[[Tensor], Tensor]) -> Any:
    """Return a deep copy of the value with every tensor replaced by `tensor(it)`; the value stays unchanged.

    Modules that it holds are not copied.

    Args:
        value: any value; reached are tensors in attributes, lists, tuples and dicts.
        tensor: gives what stands for a tensor in the copy; asked once for a tensor that is held twice.
    """
    memo: dict[int, Any] = {id(part): tensor(part) if isinstance(part, Tensor) else part for part in _walk(value)}
    return copy.deepcopy(value, memo)


def objects_differ(one: Any, other: Any, tensors_differ: Callable[[Tensor, Tensor], bool]) -> bool:
    """Whether two values of the same making (a copy and its original, after the same calls) differ anywhere."""

    def pairs(a: Any, b: Any) -> Pairs | None:
        if type(a) is not type(b):
            return None
        if isinstance(a, Tensor):
            return None if tensors_differ(a, b) else []
        if isinstance(a, (list, tuple)):
            return list(zip(a, b, strict=True)) if len(a) == len(b) else None
        if isinstance(a, dict):
            return [(a[key], b[key]) for key in a] if list(a) == list(b) else None
        if is_plain_object(a):
            return [(vars(a), vars(b))]
        return None if is_constant(a) and a != b else []

    return differ_anywhere(one, other, pairs)


Pairs = list[tuple[Any, Any]]


def differ_anywhere(one: Any, other: Any, pairs: Callable[[Any, Any], Pairs | None]) -> bool:
    """Whether two values differ; `pairs` gives the parts of two that have yet to be compared, None if they differ."""
    waiting, seen = [(one, other)], set()
    while waiting:
        a, b = waiting.pop()
        if a is b or (id(a), id(b)) in seen:
            continue
        seen.add((id(a), id(b)))
        parts = pairs(a, b)
        if parts is None:
            return True
        waiting.extend(parts)
    return False

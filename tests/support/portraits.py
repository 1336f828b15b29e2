"""Portraits: what a call left behind, copied into plain values, and the first place where two of them differ."""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_OURS = ("lora_", "_lora_fx")


@dataclass(frozen=True)
class Picture:
    """A tensor as it was, and which of the call's arguments it is or shares memory with."""

    kind: str
    value: Tensor
    stride: tuple[int, ...]
    is_argument: tuple[int, ...]
    on_memory_of: tuple[int, ...]


@dataclass(frozen=True)
class Thing:
    """Anything else: the name of its class and what is inside."""

    kind: str
    inside: Any


def portrait(value: Any, arguments: tuple[Tensor, ...] = (), seen: frozenset[int] = frozenset()) -> Any:
    """Return a copy of the value's facts; `arguments` are the tensors that it may be an alias of."""
    if isinstance(value, _PLAIN):
        return value
    if id(value) in seen:
        return "seen above"
    seen = seen | {id(value)}
    if isinstance(value, Tensor):
        return _picture(value, arguments)
    if isinstance(value, nn.Module):
        return Thing(type(value).__name__, "module")
    if isinstance(value, dict):
        return Thing(type(value).__name__, [(key, portrait(item, arguments, seen)) for key, item in value.items()])
    if isinstance(value, (tuple, list)):
        return Thing(type(value).__name__, [portrait(item, arguments, seen) for item in value])
    return _object(value, arguments, seen)


def _object(value: Any, arguments: tuple[Tensor, ...], seen: frozenset[int]) -> Any:
    kind = type(value).__name__
    if isinstance(value, (types.FunctionType, types.MethodType, types.GeneratorType)):
        return Thing(kind, value.__name__)
    if kind == "ndarray":
        return Thing(kind, value.tolist())
    if kind == "Random":
        return Thing(kind, hash(value.getstate()))
    if isinstance(value, torch.Generator):
        return Thing(kind, portrait(value.get_state()))
    if kind == "Generator":  # numpy's
        return Thing(kind, str(value.bit_generator.state))
    if dataclasses.is_dataclass(value) or isinstance(value, types.SimpleNamespace):
        return Thing(kind, portrait(vars(value), arguments, seen))
    return Thing(kind, repr(value)) if type(value).__repr__ is not object.__repr__ else Thing(kind, None)


def _picture(value: Tensor, arguments: tuple[Tensor, ...]) -> Picture:
    return Picture(
        kind="Tensor" if isinstance(value, nn.Parameter) else type(value).__name__,
        value=value.detach().clone(),
        stride=value.stride(),
        is_argument=tuple(index for index, argument in enumerate(arguments) if argument is value),
        on_memory_of=tuple(index for index, argument in enumerate(arguments) if _memory(argument) == _memory(value)),
    )


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def portrait_of_state(model: nn.Module, parameters: bool = True) -> Any:
    """Return the facts of every module of the model, what lora_fx has added apart."""
    facts = {}
    for path, module in model.named_modules():
        if any(part.startswith("lora_") for part in path.split(".")):
            continue
        own = {key: value for key, value in vars(module).items() if key not in _INTERNAL and not key.startswith(_OURS)}
        tables = (own, module._buffers, module._parameters if parameters else {})
        facts[path] = Thing(type(module).__name__, portrait(tables))
    return facts


def difference(one: Any, other: Any, where: str = "", tolerance: float = 0.0) -> str | None:
    """Return where and how two portraits differ first; None if nowhere."""
    if type(one) is not type(other):
        return f"{where}: {_short(one)} instead of {_short(other)}"
    if isinstance(one, Picture):
        return _pictures_differ(one, other, where, tolerance)
    if isinstance(one, Thing):
        if one.kind != other.kind:
            return f"{where}: a {one.kind} instead of a {other.kind}"
        return difference(one.inside, other.inside, where, tolerance)
    if isinstance(one, dict):
        return difference(list(one.items()), list(other.items()), where, tolerance)
    if isinstance(one, (tuple, list)) and len(one) == len(other):
        for index, (a, b) in enumerate(zip(one, other)):
            reason = difference(a, b, "", tolerance)
            if reason is not None:
                return f"{where}[{_short(index, a)}]{reason}"
        return None
    return None if one == other or one != one else f"{where}: {_short(one)} instead of {_short(other)}"


def _short(value: Any, item: Any = None) -> str:
    if isinstance(value, bytes):
        return "bytes"
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], (str, int)):
        return str(item[0])
    return str(value)[:60]


def _pictures_differ(one: Picture, other: Picture, where: str, tolerance: float) -> str | None:
    for name in ("kind", "stride", "is_argument", "on_memory_of"):
        if getattr(one, name) != getattr(other, name):
            return f"{where}.{name}: {getattr(one, name)} instead of {getattr(other, name)}"
    a, b = one.value, other.value
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{where}: {list(a.shape)} {a.dtype} instead of {list(b.shape)} {b.dtype}"
    same = a.eq(b) | (a.ne(a) & b.ne(b))
    if bool(same.all()):
        return None
    if not (a.is_floating_point() or a.is_complex()):
        return f"{where}: other values"
    largest = (a - b)[~same].abs().max().item()
    return None if largest <= tolerance * (1 + b.abs().max().item()) else f"{where}: off by {largest:.2g}"

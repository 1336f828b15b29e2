"""Plain Python objects that hold tensors (a KV cache, a config): what they are, copies of them, and comparing them."""

import enum
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.capture.calls.arguments import CONSTANTS, is_constant
from lora_fx.models.copying import copied_value

IDENTITIES = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, enum.Enum)
"""What is compared by identity, and holds nothing that a capture looks into."""
_NO_OBJECTS = (nn.Module, Tensor, dict, list, tuple, set, *IDENTITIES, *CONSTANTS)
_TENSORS = frozenset({Tensor, nn.Parameter})
_EXACT = frozenset({type(None), bool, int, str, bytes, torch.dtype, torch.device})
"""Types of constants that equal themselves."""
_STRINGS = {str}
_LEAVES = frozenset({*_EXACT, float, Tensor, nn.Parameter})
"""Types of much of what is in arguments, in which there is nothing more."""


def is_plain_object(value: object) -> bool:
    """Whether the value is an instance of a Python class with attributes of its own, and not part of a model."""
    kind = type(value)
    if issubclass(kind, _NO_OBJECTS) or torch.Generator in kind.__mro__:  # whether it is one is a question in Python
        return False
    if getattr(value, "__class__", kind) is not kind and isinstance(value, _NO_OBJECTS):  # it stands for another
        return False
    return isinstance(getattr(value, "__dict__", None), dict)


class StandIn:
    """Base of the mixins of objects that report what happens to them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keep the class's own hook from hearing of a subclass that is not its own."""


_SUBCLASSES: dict[tuple[type, type], type] = {}


def subclass_of(kind: type, mixin: type[StandIn]) -> type:
    """Return the subclass of `kind` with the behaviour of `mixin`, the same at every call.

    Raises:
        TypeError: the class allows none.
    """
    if (kind, mixin) not in _SUBCLASSES:
        body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        _SUBCLASSES[kind, mixin] = type(kind)(kind.__name__, (mixin, kind), body)
    return _SUBCLASSES[kind, mixin]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor that can be reached through attributes, lists, tuples and dicts, in the order of these."""
    return iter([part for part in reachable(value) if isinstance(part, Tensor)])


def reachable(value: Any, ends: tuple[type, ...] = ()) -> list[Any]:
    """Return the value and what is in it: items of lists, tuples and dicts, the dicts of the attributes of objects.

    Objects of the types in `ends` are left out, with what is in them.
    """
    found: list[Any] = []
    waiting = [value]
    seen: dict[int, Any] = {}  # with the part itself: attributes that a property makes would be gone
    while waiting:
        part = waiting.pop()
        kind = type(part)
        if id(part) in seen or (ends and isinstance(part, ends)):
            continue
        seen[id(part)] = part
        found.append(part)
        if kind in _LEAVES:
            continue
        if issubclass(kind, (list, tuple)):
            waiting.extend(reversed(part))
        elif issubclass(kind, dict):
            waiting.extend(reversed(dict.values(part)))
        elif is_plain_object(part):
            waiting.append(vars(part))
    return found


def copied(value: Any, tensor: Callable[[Tensor], Tensor]) -> Any:
    """Return a deep copy of the value with every tensor replaced by `tensor(it)`; the value stays unchanged.

    Modules that it holds are not copied.

    Args:
        value: any value; reached are tensors in attributes, lists, tuples and dicts.
        tensor: gives what stands for a tensor in the copy; asked once for a tensor that is held twice.
    """
    kept = [part for part in reachable(value) if isinstance(part, (Tensor, nn.Module))]
    memo: dict[int, Any] = {id(part): tensor(part) if isinstance(part, Tensor) else part for part in kept}
    return copied_value(value, memo)


class Undo:
    """The contents of some lists, dicts and sets, kept so that they can be put back."""

    def __init__(self, containers: Iterable[Any]) -> None:
        self._kept = [(container, _contents(container)) for container in containers]

    def __call__(self) -> None:
        for container, contents in self._kept:
            kind = _plain_type(container)
            kind.clear(container)
            fill = kind.extend if kind is list else kind.update
            fill(container, contents)


def _contents(container: Any) -> Any:
    # by the methods of the plain types: a subclass may do something else when it is listed, and dict.copy lists it
    kind = _plain_type(container)
    return dict(dict.items(container)) if kind is dict else kind.copy(container)


def _plain_type(container: Any) -> Any:
    return next(kind for kind in (list, dict, set) if isinstance(container, kind))


def objects_differ(
    one: Any,
    other: Any,
    tensors_differ: Callable[[Tensor, Tensor], bool],
    kind: Callable[[Any], type] = type,
    attributes: Callable[[Any], dict[str, Any]] = vars,
) -> bool:
    """Whether two values of the same making (a copy and its original, after the same calls) differ anywhere.

    Args:
        one: a value.
        other: the other one.
        tensors_differ: whether two tensors differ.
        kind: gives the class that must be the same.
        attributes: gives the attributes of an object that count.
    """
    waiting = [(one, other)]
    seen: dict[tuple[int, int], Any] = {}  # with the two themselves: the dict that `attributes` made would be gone
    while waiting:
        a, b = waiting.pop()
        if a is b or (id(a), id(b)) in seen:
            continue
        seen[id(a), id(b)] = (a, b)
        if type(a) in _TENSORS and type(a) is type(b):
            if tensors_differ(a, b):
                return True
            continue
        if kind(a) is not kind(b) or (isinstance(a, Tensor) and tensors_differ(a, b)):
            return True
        if type(a) is dict and [*map(type, a)] == [*map(type, b)] == [str] * len(a):
            mine, parts, others, other_parts = list(a), list(a.values()), list(b), list(b.values())
        else:
            (mine, parts), (others, other_parts) = _taken_apart(a, attributes), _taken_apart(b, attributes)
        if mine != others:
            return True
        for part, other_part in zip(parts, other_parts, strict=True):
            if type(part) in _EXACT and type(other_part) in _EXACT:
                if type(part) is not type(other_part) or part != other_part:
                    return True
            elif part is not other_part:
                waiting.append((part, other_part))
    return False


def _taken_apart(value: Any, attributes: Callable[[Any], dict[str, Any]]) -> tuple[Any, list[Any]]:
    """Return what of a value is compared with `==`, and the parts in it that are compared in turn."""
    if isinstance(value, (list, tuple)):
        return len(value), list(value)
    if isinstance(value, dict):
        keys = list(value)
        return (keys if {*map(type, keys)} == _STRINGS else list(map(_key, keys))), list(dict.values(value))
    if isinstance(value, (set, frozenset)):
        return Counter(map(_key, value)), []
    if isinstance(value, functools.partial):
        return None, [value.args, value.keywords]
    if is_plain_object(value):
        return None, [attributes(value)]
    return value if is_constant(value) and value == value else None, []  # None for nan, which differs from itself


def _key(key: Any) -> Any:
    """Return what stands for a key: an object as a key has been copied."""
    return key if is_constant(key) else type(key)

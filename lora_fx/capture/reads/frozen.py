"""What a value outside of a graph was when the graph was captured, and how a guard sees that it still is.

A constant is compared, a function or class must be the same object, a container or object is taken apart.  What can
change in a way that no comparison shows (a generator, an open file, an array) cannot be frozen.
"""

import enum
import functools
import logging
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lora_fx.capture.calls.arguments import CONSTANTS
from lora_fx.capture.calls.objects import is_plain_object
from lora_fx.capture.reads.libraries import is_library_module
from lora_fx.capture.reads.opennumbers import refuse_open
from lora_fx.models.code import attribute

_MOST_PARTS = 256
UNCHANGING = (
    type, types.FunctionType, types.ModuleType, types.WrapperDescriptorType, types.MethodDescriptorType,
    types.GenericAlias, property, staticmethod, classmethod, enum.Enum, logging.Logger, re.Pattern, typing.TypeVar,
    type(functools.lru_cache(lambda: None)), type(list[int] | None), type(typing.Any), type(typing.Callable),
)  # fmt: skip
"""What is compared by identity; whatever such a thing reads in turn is seen where its code runs."""


_COMPARED = (*CONSTANTS, *UNCHANGING)
"""What `==` distinguishes as well as a guard can."""


class Unfreezable(Exception):
    """A value can change in a way that no comparison shows; the text is its type."""


Name = Callable[[object], str]
"""Returns the name under which a guard knows an object."""


@dataclass(frozen=True, slots=True)
class Constant:
    value: Any

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Constant) or type(self.value) is not type(other.value):
            return False
        return self.value is other.value or bool(self.value == other.value)

    def conditions(self, access: str, name: Name, depth: int = 0) -> Iterator[str]:
        if self.value is None or isinstance(self.value, bool):
            yield f"{access} is {self.value}"
        elif self.value != self.value:  # not a number
            yield f"{access} != {access}"
        elif type(self.value) is str:
            yield f"{access} == {name(self.value)}"
        else:
            yield f"type({access}) is {name(type(self.value))}"
            yield f"{access} == {name(self.value)}"


@dataclass(frozen=True, slots=True)
class Same:
    """One and the same object."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def conditions(self, access: str, name: Name, depth: int = 0) -> Iterator[str]:
        yield f"{access} is {name(self.value)}"


@dataclass(frozen=True, slots=True)
class OfType:
    """Any object of a type: a tensor, or an object whose attributes are compared where they are read."""

    kind: type

    def conditions(self, access: str, name: Name, depth: int = 0) -> Iterator[str]:
        yield f"type({access}) is {name(self.kind)}"


@dataclass(frozen=True, slots=True)
class Inside:
    """The submodule at a path."""

    path: str

    def conditions(self, access: str, name: Name, depth: int = 0) -> Iterator[str]:
        yield f"{access} is {name(self)}"


@dataclass(frozen=True, slots=True)
class Flat:
    """A container of constants and of what is compared by identity."""

    kind: type
    items: tuple[Any, ...]
    types: tuple[type, ...]
    """1 == 1.0 == True, and they promote differently."""
    access: str
    """How the items are got from the container."""

    def conditions(self, access: str, name: Name, depth: int = 0) -> Iterator[str]:
        yield f"type(v{depth} := {access}) is {name(self.kind)}"
        items = self.access.format(f"v{depth}")
        yield f"{items} == {name(self.items)}"
        if any(issubclass(kind, (int, float, complex)) for kind in self.types):
            yield f"(*map(type, {items}),) == {name(self.types)}"


@dataclass(frozen=True, slots=True)
class Parts:
    """A container or object, part by part: (expression for the part, what it was)."""

    kind: type
    size: str | None
    """Expression for the number of parts, where it may change."""
    parts: tuple[tuple[str, Any], ...]

    def conditions(self, access: str, name: Name, depth: int = 0) -> Iterator[str]:
        yield f"type(v{depth} := {access}) is {name(self.kind)}"
        if self.size is not None:
            yield f"{self.size.format(f'v{depth}')} == {len(self.parts)}"
        for part, frozen in self.parts:
            yield from frozen.conditions(part.format(f"v{depth}"), name, depth + 1)


Frozen = Constant | Same | OfType | Inside | Flat | Parts
"""Each gives the conditions that must all hold of what an access gives: of `[1, "a"]` at `x` they are
`type(v0 := x) is c0`, `(*v0,) == c1` and `(*map(type, (*v0,)),) == c2`."""


class Freezer:
    """Freezes values; submodules of one module are known by their paths."""

    def __init__(self, paths: dict[int, str] | None = None) -> None:
        self.paths = paths or {}
        self._left = 0
        self._open: set[int] = set()

    def freeze(self, value: Any) -> Frozen:
        """Return what the value is now.

        Raises:
            Unfreezable: if it, or something in it, cannot be compared later.
        """
        self._left = _MOST_PARTS
        self._open.clear()
        return self._freeze(value)

    def _freeze(self, value: Any) -> Frozen:
        self._left -= 1
        if self._left < 0:
            raise Unfreezable("with too much in it to be compared at every call")
        refuse_open(value)
        if isinstance(value, CONSTANTS):
            return Constant(value)
        if isinstance(value, Tensor):
            return OfType(type(value))
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, UNCHANGING) or type(value) is object:
            return Same(value)
        if id(value) in self._open:
            raise Unfreezable(f"of type {type(value).__name__} that contains itself")
        self._open.add(id(value))
        try:
            return self._taken_apart(value)
        finally:
            self._open.discard(id(value))

    def module(self, value: nn.Module) -> Frozen:
        """Return what stands for a module."""
        return Inside(self.paths[id(value)]) if id(value) in self.paths else Same(value)

    def _taken_apart(self, value: Any) -> Frozen:
        if isinstance(value, (list, tuple, dict, set, frozenset)):
            return self._container(value)
        if isinstance(value, types.MethodType):
            return self._parts(type(value), None, {"{}.__func__": value.__func__, "{}.__self__": value.__self__})
        if isinstance(value, functools.partial):
            parts = {"{}.func": value.func, "{}.args": value.args, "{}.keywords": value.keywords}
            return self._parts(type(value), None, parts)
        if isinstance(value, types.BuiltinFunctionType):
            if not isinstance(value.__self__, (types.ModuleType, type, types.NoneType)):
                raise Unfreezable(f"a method of a {type(value.__self__).__name__}")
            return Same(value)
        if is_library_module(type(value).__module__) and type(value) is not types.SimpleNamespace:
            raise Unfreezable(f"of type {type(value).__name__}")
        return self._object(value)

    def _container(self, value: Any) -> Frozen:
        kind = type(value)
        if isinstance(value, (set, frozenset)):
            if not all(isinstance(item, CONSTANTS) for item in value):
                raise Unfreezable("a set of objects")
            return Flat(kind, (frozenset(value),), (kind,), "(frozenset({}),)")
        if isinstance(value, dict):
            return self._dict(kind, value)
        if all(isinstance(item, _COMPARED) for item in value):
            return Flat(kind, tuple(value), tuple(map(type, value)), "(*{},)")
        return self._parts(kind, "len({})", {f"{{}}[{index}]": item for index, item in enumerate(value)})

    def _dict(self, kind: type, value: dict[Any, Any]) -> Frozen:
        keys, values = tuple(value), tuple(dict.values(value))
        if not all(isinstance(key, (str, int, type(None))) for key in keys):
            raise Unfreezable("a dict with objects as keys")
        if all(isinstance(item, _COMPARED) for item in values):
            both = (*keys, *values)
            return Flat(kind, both, tuple(map(type, both)), "(*{0}, *dict.values({0}))")
        return self._parts(
            kind, "len({})", {f"dict.__getitem__({{}}, {_literal(key)})": dict.get(value, key) for key in keys}
        )

    def _object(self, value: Any) -> Frozen:
        kind = type(value)
        if not is_plain_object(value):
            raise Unfreezable(f"of type {kind.__name__}")
        own = {f"{{}}.__dict__[{_quoted(name)}]": part for name, part in vars(value).items()}
        shared = {
            attribute("{}", _braced(name)): part for name, part in _class_containers(kind) if name not in vars(value)
        }
        return self._parts(kind, f"len({{}}.__dict__) + {len(shared)}", own | shared)

    def _parts(self, kind: type, size: str | None, parts: dict[str, Any]) -> Parts:
        return Parts(kind, size, tuple((access, self._freeze(part)) for access, part in parts.items()))


def _literal(key: str | int | None) -> str:
    """Return the key of a dict as source; a member of a string or integer enum as the plain value that it equals."""
    if isinstance(key, str):
        return _quoted(str.__str__(key))
    return repr(key if key is None else int(key))


def _quoted(key: object) -> str:
    """Return the key as it may stand in a text that is formatted later."""
    return _braced(repr(key))


def _braced(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _class_containers(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the lists, dicts and sets that the objects of a class share."""
    for base in reversed(kind.__mro__[:-1]):
        if not is_library_module(base.__module__):
            yield from (
                (name, value)
                for name, value in vars(base).items()
                if type(value) in (list, dict, set) and not name.startswith("__")
            )

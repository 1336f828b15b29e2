"""A call's arguments, flattened: where each leaf is, and what must hold of the structure around the leaves.

An access is a Python expression over `args` and `kwargs`, such as `kwargs['position_embeddings'][0]`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from lora_fx.models.code import attribute

CONSTANTS = (
    type(None), bool, int, float, complex, str, bytes, type(Ellipsis),
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


def is_constant(value: object) -> bool:
    """Whether the value can be written into a graph and compared with `==`."""
    if isinstance(value, (tuple, list, torch.Size)):
        return all(is_constant(item) for item in value)
    return isinstance(value, CONSTANTS)


@dataclass(frozen=True, slots=True)
class GuardCheck:
    """A Python expression that must be true of a call, and the reason to give when it is not."""

    expression: str
    reason: str


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor, constant or opaque object among the arguments."""

    access: str
    name: str
    """For people: `hidden_states`, `position_embeddings[0]`."""
    value: Any


@dataclass(slots=True)
class FlatCall:
    """The leaves of a call in order, and the checks of its structure."""

    leaves: list[Leaf] = field(default_factory=list)
    structure: list[GuardCheck] = field(default_factory=list)

    def tensors(self) -> Iterator[Leaf]:
        return (leaf for leaf in self.leaves if isinstance(leaf.value, Tensor))

    def shape_free(self) -> tuple[object, ...]:
        """Return what must be equal for two calls to have a chance at the same graph (sizes apart)."""
        facts: list[object] = []
        for check in self.structure:
            facts.append(check.expression)
        for leaf in self.leaves:
            value = leaf.value
            if isinstance(value, Tensor):
                facts.append((leaf.access, value.dtype, value.device, value.dim()))
            elif is_constant(value):
                facts.append((leaf.access, type(value), repr(value)))
            else:
                facts.append((leaf.access, type(value)))
        return tuple(facts)


def positional_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return what a function calls its positional arguments."""
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(
        parameter.name for parameter in signature(function).parameters.values() if parameter.kind in positional
    )


def flatten(args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str] = ()) -> FlatCall:
    """Return the call's leaves and what must hold of tuples, lists and dicts around them.

    `names` are those of the positional arguments, for people.
    """
    keywords = f"kwargs.keys() == {set(kwargs)!r}" if kwargs else "not kwargs"
    positional = GuardCheck(f"len(args) == {len(args)}", "number of positional arguments")
    flat = FlatCall(structure=[positional, GuardCheck(keywords, "keyword arguments")])
    for index, value in enumerate(args):
        name = names[index] if index < len(names) else f"argument {index}"
        _flatten(value, f"args[{index}]", name, flat)
    for key, value in kwargs.items():
        _flatten(value, f"kwargs[{key!r}]", key, flat)
    return flat


def _flatten(value: Any, access: str, name: str, flat: FlatCall) -> None:
    kind = type(value)
    if kind in (tuple, list) and not is_constant(value):
        flat.structure.append(
            GuardCheck(f"type({access}) is {kind.__name__} and len({access}) == {len(value)}", f"structure of {name}")
        )
        for index, item in enumerate(value):
            _flatten(item, f"{access}[{index}]", f"{name}[{index}]", flat)
    elif kind is dict and all(type(key) in (str, int) for key in value):
        flat.structure.append(
            GuardCheck(f"type({access}) is dict and tuple({access}) == {tuple(value)!r}", f"keys of {name}")
        )
        for key, item in value.items():
            _flatten(item, f"{access}[{key!r}]", f"{name}[{key!r}]", flat)
    elif _is_named_tuple(kind):
        flat.leaves.append(Leaf(f"type({access})", f"type of {name}", kind))
        for field_name, item in zip(kind._fields, value, strict=True):
            _flatten(item, attribute(access, field_name), f"{name}.{field_name}", flat)
    else:
        flat.leaves.append(Leaf(access, name, value))


def _is_named_tuple(kind: type) -> TypeGuard[type[NamedTuple]]:
    return issubclass(kind, tuple) and "_fields" in vars(kind)


def rebuild(
    args: tuple[Any, ...], kwargs: dict[str, Any], leaf: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the same structure with every leaf replaced by `leaf(value)`, visited in the order of `flatten`."""
    return tuple(_rebuild(value, leaf) for value in args), {key: _rebuild(v, leaf) for key, v in kwargs.items()}


def _rebuild(value: Any, leaf: Callable[[Any], Any]) -> Any:
    kind = type(value)
    if kind in (tuple, list) and not is_constant(value):
        return kind(_rebuild(item, leaf) for item in value)
    if kind is dict and all(type(key) in (str, int) for key in value):
        return {key: _rebuild(item, leaf) for key, item in value.items()}
    if _is_named_tuple(kind):
        return kind(*(_rebuild(item, leaf) for item in value))
    return leaf(value)

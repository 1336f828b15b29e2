"""Give one module object other behaviour: its class becomes a dynamic subclass of its own class.

Overriding `forward` on the instance breaks deepcopy, `load_state_dict(assign=True)` and activation checkpointing;
replacing the module loses its class, attributes and hooks.  A subclass `class Linear(Mixin, Linear)` keeps them all.
The subclass is made on demand, one per (class, mixin), bears the name of the original, and pickles as the original
class plus the mixin.
"""

import copyreg
import functools
import types
from collections.abc import Callable
from types import FunctionType
from typing import Any, Generic, TypeVar

from torch import nn

from lora_fx.models.overrides import FOLLOWS

_Item = TypeVar("_Item")
_ORIGIN = "_lora_fx_origin"
MADE_BY = "_lora_fx_made_by"
"""Attribute of a mixin that was made on demand: (function, arguments) that make it."""


class Swapped:
    """Base of all mixins: makes their subclasses copy and pickle."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        if not is_swapped(type(self)):  # somebody (FSDP2) has made a subclass of ours: theirs to copy
            return super().__reduce_ex__(protocol)  # type: ignore[return-value]
        original, mixins = layers_of(type(self))
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *rest = reduced
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            arguments = tuple(original if argument is type(self) else argument for argument in arguments)
        recipes = tuple(getattr(mixin, MADE_BY, mixin) for mixin in mixins)
        return (_rebuild, (recipes, function, arguments), *rest)


def layers_of(kind: type) -> tuple[type, tuple[type, ...]]:
    """Return the class without swaps and the mixins on top of it, the innermost first."""
    mixins: list[type] = []
    while is_swapped(kind):
        kind, mixin = origin(kind)
        mixins.insert(0, mixin)
    return kind, tuple(mixins)


def _rebuild(mixins: tuple[Any, ...], function: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    module = function(*arguments)
    for mixin in mixins:
        swap(module, mixin if isinstance(mixin, type) else mixin[0](*mixin[1]))
    return module


@functools.cache
def swapped_class(original: type, mixin: type) -> type:
    """Return the subclass of `original` with the behaviour of `mixin`, the same object at every call."""
    names = ("__module__", "__qualname__", "__doc__")
    body = {name: getattr(original, name) for name in names} | {_ORIGIN: (original, mixin)}
    forward: Any = getattr(mixin, "forward", nn.Module.forward)
    if forward is not nn.Module.forward:  # of its own, or of the mixin that it was made from
        body["forward"] = _shown_as(original.forward, forward)  # type: ignore[attr-defined]
    made: type = type(original)(original.__name__, (*_laid_out_as(original), mixin, original), body)
    return made


def _laid_out_as(original: type) -> tuple[type, ...]:
    """Return what a subclass must list first to have the memory layout of its class, or Python keeps modules from it.

    Of a class whose first base is abstract, a protocol or generic (`class Layer(Interface, nn.Module)`) an empty one on
    the same base; of most classes nothing.
    """
    root: Any = original
    while root.__dictoffset__:
        root = root.__base__
    if root is object:
        return ()
    return (types.new_class("Layout", (Generic[_Item] if root is Generic else root,)),)


def _shown_as(original: Callable[..., Any], function: FunctionType) -> FunctionType:
    """Return a function that does what `function` does and has the signature of `original`.

    Trainers and `generate` ask `inspect.signature(model.forward)` which arguments a model takes.
    """
    twin = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(twin, original)
    setattr(twin, FOLLOWS, True)
    return twin


def origin(kind: type) -> tuple[type, type]:
    """Return (original class, mixin) of a class that `swapped_class` made."""
    pair: tuple[type, type] = kind.__dict__[_ORIGIN]
    return pair


def is_swapped(kind: type) -> bool:
    """Whether `swapped_class` made the class."""
    return _ORIGIN in kind.__dict__


def swap(module: nn.Module, mixin: type) -> None:
    """Give the module the behaviour of the mixin, in place; its attributes and parameters stay as they are."""
    kind: type = type(module)
    module.__class__ = swapped_class(kind, mixin)


def take_off(module: nn.Module, mixin: type) -> None:
    """Take the swaps to this mixin (or one that is made from it) off the module, in place; others stay."""
    original, mixins = layers_of(type(module))
    kept = [other for other in mixins if not issubclass(other, mixin)]
    module.__class__ = original
    for other in kept:
        swap(module, other)


def unswap(module: nn.Module) -> None:
    """Give the module its own class back, in place; a module that was not swapped stays as it is."""
    while is_swapped(type(module)):
        module.__class__ = origin(type(module))[0]


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that the module has without swaps."""
    kind: Any = type(module)
    while _ORIGIN in kind.__dict__:
        kind = kind.__dict__[_ORIGIN][0]
    return kind  # type: ignore[no-any-return]


def unswapped(kind: type) -> type:
    """Return the class without swaps."""
    while _ORIGIN in kind.__dict__:
        kind = kind.__dict__[_ORIGIN][0]
    return kind

"""The sizes that the calls of one kind of block were seen with: which of them vary."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lora_fx.capture.calls.arguments import flatten
from lora_fx.capture.tracing.inputs import VaryingSizes

_Shapes = tuple[tuple[int, ...], ...]


@dataclass(slots=True)
class Sizes:
    """For calls of one structure: the shapes of the first, and where later ones differed."""

    first: dict[tuple[object, ...], _Shapes] = field(default_factory=dict)
    seen_varying: dict[tuple[object, ...], VaryingSizes] = field(default_factory=dict)

    def noted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], None]:
        """Return a function that remembers the sizes of a call."""
        return functools.partial(self._note, *_structure(args, kwargs))

    def _note(self, key: tuple[object, ...], shapes: _Shapes) -> None:
        first = self.first.setdefault(key, shapes)
        here = frozenset(
            (index, dim)
            for index, (one, other) in enumerate(zip(first, shapes, strict=False))
            for dim, (a, b) in enumerate(zip(one, other, strict=True))
            if a != b
        )
        self.seen_varying[key] = self.seen_varying.get(key, frozenset()) | here

    def varying(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> VaryingSizes:
        """Return which sizes of such a call are known to vary, as (tensor, dimension), tensors counted once."""
        key, _ = _structure(args, kwargs)
        return self.seen_varying.get(key, frozenset())


def _structure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[object, ...], _Shapes]:
    flat = flatten(args, kwargs)
    tensors: dict[int, Tensor] = {id(leaf.value): leaf.value for leaf in flat.tensors()}
    places = tuple((leaf.access, leaf.value.dim()) for leaf in flat.tensors())
    return (places, len(tensors)), tuple(tuple(tensor.shape) for tensor in tensors.values())

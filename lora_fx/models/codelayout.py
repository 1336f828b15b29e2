"""What the layers of quantisation libraries hold, class by class: how to read it, to share it, to make it anew.

The libraries are not imported: whoever has one of their layers has done that.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.models.grids import Grid
from lora_fx.models.swap import original_class


def _by_own_forward(layer: Any, x: Tensor) -> Tensor:
    kind: Any = original_class(layer)
    result: Tensor = kind.forward(layer, x)
    return result


@dataclass(frozen=True, slots=True)
class CodeLayout:
    """How one class of layers holds its weight."""

    codes: Callable[[Any], Tensor | None]
    """Returns the parameter with the codes; None where there is none yet."""
    problem: Callable[[Any], str]
    """Why the layer cannot be adapted as it is now; "" if it can."""
    dtype: Callable[[Any], torch.dtype | None]
    """Of the numbers that the codes stand for; None where the layer has lost it."""
    read: Callable[[Any], Tensor]
    """Returns these numbers, [out, in], a tensor that nobody writes to."""
    again: Callable[[Any, Tensor], nn.Module]
    """Returns a layer that holds other numbers, quantised with the settings of this one; this one stays unchanged."""
    copied: Callable[[Any], Iterator[tuple[object, object]]] = lambda _: iter(())
    """Yields each object of the layer that a copy shares or gets in another way, with what stands in the copy."""
    settle: Callable[[Any], None] = lambda _: None
    """Keeps a copy, in place, from what would spoil its training."""
    broken: Callable[[Any], str] = lambda _: ""
    """Why the layer, once adapted, cannot be called now; "" if it can."""
    grid: Callable[[Any], Grid | None] = lambda _: None
    """Returns the grid of the numbers, if `again` keeps it; numbers on it then keep their codes."""
    run: Callable[[Any, Tensor], Tensor] = _by_own_forward
    """Returns what the layer computes of x without its adapters."""


def held(name: str) -> Callable[[Any], Tensor | None]:
    """Return a function that returns the parameter of a name of a layer, or None."""
    return lambda layer: layer._parameters.get(name)


def bare(layer: Any) -> Any:
    """Return a shallow copy of a layer with tables of its own."""
    made = object.__new__(original_class(layer))
    vars(made).update({name: copy.copy(v) if isinstance(v, dict) else v for name, v in vars(layer).items()})
    return made


def shallow(value: Any) -> Any:
    """Return a copy of an object that holds what it holds."""
    made = object.__new__(type(value))
    vars(made).update(vars(value))
    return made

"""Kinds of calls of a model: what is seen in one of a kind holds for all of them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lora_fx.adapters.selection import Switch


def seen_in(model: nn.Module, name: str, switches: Sequence[Switch]) -> set[Any]:
    """Return the kinds of calls that a model has noted under a name since adapters were added for the last time."""
    additions = [switch.additions for switch in switches]
    if model.__dict__.get(name, ([], None))[0] != additions:
        model.__dict__[name] = (additions, set())
    kinds: set[Any] = model.__dict__[name][1]
    return kinds


def kind_of(
    module: nn.Module, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any], given: Sequence[Tensor]
) -> tuple[object, ...]:
    """Return what calls have in common in which layers see the batch in the same places.

    Sizes do not count, but for those of 1, which hide an order, and whether it is the batch that comes first or second.
    """
    flags = [
        (name, value)
        for name, value in (*enumerate(args), *sorted(kwargs.items()))
        if value is None or isinstance(value, bool | int | float | str)
    ]
    tensors = [
        (value.is_floating_point(), [size == 1 for size in value.shape], [size == batch for size in value.shape[:2]])
        for value in given
    ]
    return (module.training, tuple(sorted(kwargs)), str(flags), str(tensors))

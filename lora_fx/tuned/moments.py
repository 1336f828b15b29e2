"""X Xᵀ of what linear layers are given on data: of some batches to round by, of others to see what that gives."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from lora_fx.adapters.attach import Attached
from lora_fx.adapters.factors.rounding import Moment
from lora_fx.discovery.inputs import Noted, note_inputs
from lora_fx.errors import RefusedError
from lora_fx.models.samples import Sample, batches_of

_HELD_OUT = 4
"""One batch in so many is not used for rounding, but to see what it gives."""
_BYTES = 1 << 30
"""Of X Xᵀ, what is there at once: a model of many layers runs on the data several times."""


class Given(NamedTuple):
    """A linear layer whose inputs are looked at."""

    path: str
    """Of the site."""
    owner: str
    width: int
    """Columns of its weight."""


class Moments(NamedTuple):
    """X Xᵀ [in, in] of the inputs of a layer."""

    rounding: Moment
    held: Moment


def parted(data: Iterable[object]) -> tuple[list[Sample], list[Sample]]:
    """Return the batches to round by, and those that are held back.

    Raises:
        RefusedError: there are fewer than two.
    """
    batches = batches_of(data)
    if len(batches) < 2:
        facts = [("batches", f"{len(batches)}, where two are needed: one to round by, one to see what it gives")]
        raise RefusedError("codes are chosen by data", facts, "give data=[batch, batch, …]")
    held = max(1, len(batches) // _HELD_OUT)
    return batches[:-held], batches[-held:]


def at_once(layers: Sequence[Given]) -> Iterator[list[Given]]:
    """Yield the layers in their order, so many at a time as their X Xᵀ may be there at once."""
    some: list[Given] = []
    for layer in layers:
        if some and sum(2 * 4 * one.width**2 for one in (*some, layer)) > _BYTES:
            yield some
            some = []
        some.append(layer)
    yield some


def moments_of(
    model: nn.Module, layers: Sequence[Given], rounding: Sequence[Sample], held: Sequence[Sample]
) -> Mapping[str, Moments]:
    """Return what the layers are given when the model runs on the batches, by their paths.

    Raises:
        RefusedError: a layer is never called, or is given NaN or infinite values.
    """
    first, second = (_met(model, layers, batches) for batches in (rounding, held))
    return {path: Moments(first[path], second[path]) for path in first}


def _met(model: nn.Module, layers: Sequence[Given], batches: Sequence[Sample]) -> dict[str, Moment]:
    met = {layer.path: Moment() for layer in layers}
    note_inputs(model, [Noted(layer.owner, layer.path, met[layer.path]) for layer in layers], batches)
    if missed := [(path, "never called with a row that counts") for path, moment in met.items() if not moment.count]:
        raise RefusedError("the data does not reach these; nothing was merged", missed, "give other batches")
    return met


def is_linear(tuned: nn.Module, owner: str, adapter: Attached) -> bool:
    """Whether a site is the weight of a linear layer."""
    return isinstance(tuned.get_submodule(owner), nn.Linear) and adapter.spec.parameter == "weight"

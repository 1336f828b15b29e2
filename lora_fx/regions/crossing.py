"""Give a block zeros in the place of padding of another sequence, which its attention to that sequence forbids.

An encoder that has left out its padding would otherwise be asked for it by every block of the decoder.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_fx.liveness.padding import Remembered, Rows, rows_attended
from lora_fx.liveness.rows import LazyRows, is_adopted
from lora_fx.passes.pack import Packing
from lora_fx.regions.laterows import LateRows
from lora_fx.regions.packed import PackedRows


@dataclass(slots=True)
class Crossing:
    """An input that is rows of another sequence, and whether its padding is proven to count for nothing."""

    packing: Packing
    proven: bool = False
    why_not: str = ""
    found: Remembered = field(default_factory=Remembered)

    def covers(self, module: nn.Module, inputs: tuple[Any, ...], rows: Rows) -> bool:
        """Whether the masks of a call forbid all rows that are left out."""
        masks = tuple(inputs[index] for index in self.packing.masks)
        if any(type(mask) is LazyRows for mask in masks):
            return False
        sizes = (rows.batch, rows.length)
        own: Rows | None = self.found.of(
            masks, sizes, lambda: rows_attended(self.packing.mask_of(module, *inputs), *sizes)
        )
        return rows.drops_only_dead_of(own)


Crossings = dict[int, Crossing]
"""By the place of the input."""
Waiting = tuple[Crossing, Rows]
"""What is to be proven, and the rows that are left out of it."""


def crossed(crossings: Crossings, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the inputs of a call with plain tensors in the place of packed rows of other sequences, where proven."""
    given = list(inputs)
    for crossing, packed in _served(crossings, module, inputs):
        value = inputs[crossing.packing.hidden]
        if crossing.proven and not value.lazy_value.is_whole:
            value.lazy_value.note_taken()
            given[crossing.packing.hidden] = packed.filled()
    return tuple(given)


def waiting_for_proof(crossings: Crossings, module: nn.Module, inputs: tuple[Any, ...]) -> list[Waiting]:
    """Return what is to be proven on a call."""
    served = _served(crossings, module, inputs)
    return [(crossing, packed.call.rows) for crossing, packed in served if not (crossing.proven or crossing.why_not)]


def _served(crossings: Crossings, module: nn.Module, inputs: tuple[Any, ...]) -> Iterator[tuple[Crossing, PackedRows]]:
    """Yield the inputs that are packed rows of which a call needs no others."""
    for place, crossing in crossings.items():
        packed = _packed_behind(inputs[place])
        if packed is not None and crossing.covers(module, inputs, packed.call.rows):
            yield crossing, packed


def _packed_behind(value: Any) -> PackedRows | None:
    """Return the packed rows that a tensor stands for, also where it could have been computed for single rows only."""
    if type(value) is not LazyRows or is_adopted(value):
        return None
    source = value.lazy_value.source
    if isinstance(source, LateRows):
        return _packed_behind(source.all_rows())
    return source if isinstance(source, PackedRows) else None

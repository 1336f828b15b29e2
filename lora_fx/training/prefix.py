"""Frozen blocks below everything that is trained compute the same for the same data: keep what they computed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from lora_fx.adapters.attach import all_attached
from lora_fx.errors import RefusedError
from lora_fx.files.prefixes import Directory
from lora_fx.models.wrappers import seen_through
from lora_fx.regions.prefix.blocks import keep, kept_blocks, leave
from lora_fx.regions.prefix.chains import frozen_chains
from lora_fx.regions.prefix.entries import KeptOutputs
from lora_fx.regions.prefix.state import Kept
from lora_fx.tuned.build import record_in
from lora_fx.tuned.report import PrefixReport, report_of


class PrefixCache:
    """What `cached_prefix` gives: how often frozen blocks were not computed, and what is kept of them."""

    def __init__(self, kept: Kept, blocks: list[str]) -> None:
        self._kept = kept
        self._blocks = blocks
        self._last: PrefixReport | None = None

    @property
    def report(self) -> PrefixReport:
        """Which blocks, hits, misses, bytes, and why calls went by: up to now, or to the end of the context."""
        return self._last or report_of(self._kept, self._blocks)

    def _end(self) -> None:
        """Let the report be what it is now, and nothing be kept any more."""
        self._last = self.report
        self.clear()

    def clear(self) -> None:
        """Forget what is in memory; counts, and files in the directory, stay."""
        self._kept.entries.clear()

    def __str__(self) -> str:
        return str(self.report)


@contextlib.contextmanager
def cached_prefix(
    tuned: nn.Module, capacity: int = 1 << 30, directory: str | os.PathLike[str] | None = None
) -> Iterator[PrefixCache]:
    """Return a context in which blocks below everything trained answer data that comes again by what they computed.

    The leading blocks of a list (`layers.0` to `layers.5`, if the first adapter is in `layers.6`) are functions of the
    batch alone: in the second epoch their output is that of the first.  It is kept for each row of a batch where rows
    are shown to be what they are, bit by bit, beside any others (so batches may be shuffled); else for whole calls.
    Losses and gradients are those without it, bit by bit.

    A row is known by the bytes of all that it is a function of: the first block's arguments, masks and positions, the
    weights (read once at each call), the code, dtypes, modes, and the switches by which torch chooses its kernels.
    What is no function of these is computed as ever, and `report.otherwise` says why: dropout or batch norm in train
    mode, hooks, KV caches, arguments that require a gradient.

    Args:
        tuned: an adapted model; the same object inside, and as it was after it.  Copies and files of it have nothing
            of this.
        capacity: bytes of the processor's memory that may be taken.  What is kept stays; what finds no room is
            computed.
        directory: where outputs are written besides, a safetensors file each, for later runs too; of the user's own,
            as what lies there is believed.  None: nowhere.

    Raises:
        RefusedError: the model is not adapted, no block lies below all that is trained, or such a context is open.
        ValueError: `capacity` is no number of bytes.
        OSError: the directory cannot be made.
    """
    if type(capacity) is not int or capacity < 0:
        raise ValueError(f"capacity is {capacity!r}; it must be a number of bytes, from 0 on")
    model = seen_through(tuned)
    record_in(model)
    if any(state.kept is not None for _, _, state in kept_blocks(model)):
        raise RefusedError("the output of this model's frozen blocks is kept already")
    if not frozen_chains(model):
        first = next(path for path, _ in all_attached(model))
        advice = "adapt upper layers only, as in {match: {name: '**.layers.{6..11}.**'}}"
        raise RefusedError("no block lies below all that is trained", [("the first adapter", first)], advice)
    kept = Kept(KeptOutputs(capacity, None if directory is None else Directory(Path(directory))))
    regions = keep(model, kept)
    cache = PrefixCache(kept, [path for path, _, _ in kept_blocks(model)])
    try:
        yield cache
    finally:
        leave(model, regions)
        cache._end()

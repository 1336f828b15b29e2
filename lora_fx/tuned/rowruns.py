"""Runs of a copy of the base on a call's inputs with their rows told apart: they show where rows are in its layers."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.rows import AdapterRows, Layout, Seen, change, nearly_one_token, tell_apart
from lora_fx.adapters.selection import Selection
from lora_fx.capture.calls.objects import copied, tensors_in
from lora_fx.tuned.rowpicks import PickedEntries
from lora_fx.tuned.switching import switches_in

Guess = tuple[int | None, ...]
"""For each tensor of a call the dimension that is the batch; None for what all rows share."""
Inputs = dict[nn.Module, list[tuple[torch.Size, list[Tensor]]]]
"""For each adapted layer, call by call, the shape of its input and sums for each entry of each dimension."""


class _SeenEntries(Seen):
    """The same, and of each entry alone; and which inputs have entries that were picked by values."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[nn.Module, list[Tensor]] = {}
        """For each layer, call by call, sums over the last dimension, [..., sums]."""
        self.picked: dict[nn.Module, torch.Size] = {}
        self.picks: PickedEntries | None = None

    def note(self, layer: nn.Module, x: Tensor) -> None:
        """Note an input of a layer."""
        picks = self.picks
        if picks is not None and picks.has(x):
            self.picked.setdefault(layer, x.shape)
        with picks.apart() if picks is not None else contextlib.nullcontext():
            super().note(layer, x)
            features = (x.unsqueeze(-1) if isinstance(layer, nn.Embedding) else x).detach().float()
            weights = torch.randn((features.shape[-1], 2), generator=torch.Generator().manual_seed(0))
            sums = features.nan_to_num(0.0, 0.0, 0.0) @ weights.to(features.device)
            self.entries.setdefault(layer, []).append(sums)


@dataclass(slots=True, eq=False)
class RowRuns:
    """Runs of a twin for one call."""

    twin: nn.Module
    batch: int
    guess: Guess
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    _entries: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    picked: dict[nn.Module, torch.Size] = field(default_factory=dict)
    """Layers whose input has entries that were picked by values in the first run."""

    def first(self) -> Inputs:
        """Return what a run shows that others are compared with."""
        seen = _SeenEntries()
        self._run(seen, follows=True)
        self._entries, self.picked = seen.entries, seen.picked
        return seen.inputs

    def inputs(self, moved: bool, alike_inside: bool = False) -> Inputs:
        """Return for each adapted layer, call by call, sums of its input for each entry of each dimension.

        Args:
            moved: whether the last row of the batch, changed, stands first, and each other one place later.
            alike_inside: whether each row is to be nearly one token, as input or behind the embedding of ids.
        """
        seen = Seen()
        self._run(seen, moved=moved, alike_inside=alike_inside)
        return seen.inputs

    def hearing(
        self, layouts: Mapping[nn.Module, Mapping[int, Layout]], tolerance: float
    ) -> Iterator[tuple[nn.Module, torch.Size]]:
        """Yield the layers in whose input some entry of a row changes with another row, and the input's shape.

        Args:
            layouts: of each layer: where the batch is in its inputs, by how many dimensions they have.
            tolerance: how far entries may change, of how far rows are apart.
        """
        for changed in changed_rows(self.batch):
            seen = _SeenEntries()
            self._run(seen, changed=changed)
            still = [row for row in range(self.batch) if row not in changed]
            for layer, calls in self._entries.items():
                again = seen.entries.get(layer, [])
                pairs = list(zip(calls, again, strict=False))
                if len(calls) != len(again) or any(
                    not _are_still(one, other, layouts[layer].get(_dims(layer, one)), still, self.batch, tolerance)
                    for one, other in pairs
                ):
                    yield layer, calls[0].shape

    def _run(
        self,
        seen: Seen,
        moved: bool = False,
        alike_inside: bool = False,
        changed: Sequence[int] = (),
        follows: bool = False,
    ) -> None:
        args, kwargs = copied((self.args, self.kwargs), lambda tensor: tensor.detach().clone())
        with contextlib.ExitStack() as stack:
            for switch in switches_in(self.twin):
                stack.enter_context(switch.chosen_here(Selection(rows=AdapterRows((None,), seen=seen))))
            stack.enter_context(torch.no_grad())
            alter = _alike_inside(self.batch, self.guess, moved) if alike_inside else None
            rowwise = set[int]()
            alter = _noisy_inside(self.batch, self.guess, changed, rowwise) if changed else alter
            for module in self.twin.modules() if alter is not None else ():
                if isinstance(module, nn.Embedding) and alter is not None:
                    stack.callback(module.register_forward_hook(alter).remove)
            ids = [value for name, value in kwargs.items() if name.endswith("input_ids")]
            for tensor, axis in zip(tensors_in((args, kwargs)), self.guess, strict=True):
                if axis is not None:
                    rows, are_ids = tensor.movedim(axis, 0), any(tensor is one for one in ids)
                    rowwise.add(tensor.untyped_storage().data_ptr())
                    tell_apart(rows, are_ids, alike_inside)
                    for row in changed:
                        change(rows, are_ids, row)
                    if moved:
                        change(rows, are_ids)
                        rows.copy_(rows.roll(1, 0))
            if follows and isinstance(seen, _SeenEntries):
                seen.picks = stack.enter_context(PickedEntries(tensors_in((args, kwargs)), self.batch))
            self.twin.eval().forward(*args, **kwargs)


def changed_rows(batch: int) -> Iterator[list[int]]:
    """Yield sets of rows such that for any two rows, in either order, one set has the first and not the second.

    >>> list(changed_rows(3))
    [[0, 2], [1], [0, 1], [2]]
    """
    for bit in range((batch - 1).bit_length()):
        for value in (0, 1):
            yield [row for row in range(batch) if row >> bit & 1 == value]


def _dims(layer: nn.Module, sums: Tensor) -> int:
    """Return how many dimensions the input of a layer had whose entries' sums these are."""
    return sums.dim() - int(isinstance(layer, nn.Embedding))


def _are_still(
    before: Tensor, after: Tensor, layout: Layout | None, still: Sequence[int], batch: int, tolerance: float
) -> bool:
    """Whether these rows have the entries that they had before others were changed."""
    if before.shape != after.shape:
        return False
    if layout is None:
        return True
    rows, others = (layout.split(one, batch).flatten(1) for one in (before, after))
    spread = (rows - rows.roll(1, 0)).abs().amax()
    return bool(((rows - others)[list(still)].abs() <= tolerance * spread + 1e-6 * rows.abs().amax()).all())


def _noisy_inside(
    batch: int, guess: Guess, changed: Sequence[int], rowwise: Collection[int]
) -> Callable[..., Tensor | None]:
    """Return a hook of an embedding after which some rows are others at each token.

    Args:
        batch: number of rows.
        guess: where they may be.
        changed: rows that become others.
        rowwise: memory of the inputs that have rows: what is looked up for others, as positions, has none.
    """
    axes = [axis for axis in dict.fromkeys(guess) if axis is not None]

    def alter(_module: nn.Module, given: Any, output: Tensor) -> Tensor | None:
        axis = next((axis for axis in axes if output.dim() > 2 and output.shape[axis] == batch), None)
        if axis is None or not given or given[0].untyped_storage().data_ptr() not in rowwise:
            return None
        made = output.clone()
        rows = made.movedim(axis, 0)
        noise = torch.randn(rows[0].shape, generator=torch.Generator().manual_seed(1)).to(rows)
        for row in changed:
            rows[row] += noise * rows[row].float().std(correction=0).clamp(min=1e-3).to(rows)
        return made

    return alter


def _alike_inside(batch: int, guess: Guess, moved: bool) -> Callable[..., Tensor | None]:
    """Return a hook of an embedding after which each row is nearly one token; ids stay, since models count some."""
    axes = [axis for axis in dict.fromkeys(guess) if axis is not None]

    def alike(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        axis = next((axis for axis in axes if output.dim() > 2 and output.shape[axis] == batch), None)
        if axis is None:
            return None
        rows = output.movedim(axis, 0).roll(-int(moved), 0)
        made = torch.stack([nearly_one_token(row, number) for number, row in enumerate(rows)])
        return made.roll(int(moved), 0).movedim(0, axis)

    return alike

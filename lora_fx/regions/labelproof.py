"""Compare the code of a program for rows that are asked for with the forward, and run whichever leaves out most."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_fx.capture.calls.ambient import RandomState
from lora_fx.liveness.asked import Asked, asked_of
from lora_fx.models.torch_internals import pytree
from lora_fx.regions.checking import ModuleCall, Replay, difference, with_noise
from lora_fx.regions.gradients import Run, gradients_differ, rounded_otherwise, values_differ, with_far_rows
from lora_fx.regions.labelling import Labelled
from lora_fx.regions.program import Program


def prove_labelled(kept: Callable[[ModuleCall], Replay | None], call: ModuleCall, program: Program) -> None:
    """Let a program compute rows where they are asked for from now on, if that is found to be the forward."""
    replay = kept(call)
    if replay is not None and program.labelled is not None:
        program.decide_labelled(labelled_difference(replay, program, program.labelled))


def labelled_difference(replay: Replay, program: Program, labelled: Labelled) -> str | None:
    """Return how the rows that are asked for differ from those of the forward; None if but for rounding.

    With factors that show in the adapters, values and gradients are compared for some rows of each sequence and for one
    alone; then the values once more where the hidden states of all other rows are far off.
    """
    proof = _Proof(replay, program, labelled)
    return replay.without_trace(lambda _: proof.difference())


@dataclass(frozen=True, slots=True)
class _Proof:
    replay: Replay
    program: Program
    labelled: Labelled

    def difference(self) -> str | None:
        hidden = self._inputs(self.replay.call)[self.labelled.labels.hidden]
        if hidden.shape[0] * hidden.shape[1] < 2:
            return "there is only one row to compare"
        reason = None
        for asked in _trials(hidden):
            reason = reason or self._differs(asked, _wanting_gradients(hidden))
            reason = reason or self._differs(asked, with_far_rows(hidden, asked.rows.dead), values_only=True)
        return reason

    def _inputs(self, call: ModuleCall) -> tuple[Any, ...]:
        inputs = call.matched(self.program.guard.match_ones)
        assert not isinstance(inputs, int)
        return inputs

    def _differs(self, asked: Asked, copy: Callable[[Tensor], Tensor], values_only: bool = False) -> str | None:
        replay = self.replay
        theirs, mine = self._by_forward(copy), replay.again(copy)
        with_noise(mine.module)
        inputs = self._inputs(mine)
        before = {name: buffer.clone() for name, buffer in mine.module.named_buffers()}
        drawn = RandomState(replay.ambient.devices)
        rows = replay.run(lambda: self.labelled.function(mine.module, *inputs, asked))
        if RandomState(replay.ambient.devices) != drawn:
            return "it draws random numbers"
        if any(not torch.equal(buffer, before[name]) for name, buffer in mine.module.named_buffers()):
            return "it writes to buffers"
        reason = difference(*self._at_once(theirs, mine.module, inputs))
        precision = replay.precision(theirs[0])
        ours, others = (rows, (mine.args, mine.kwargs), mine.module), (self._rows(theirs[0], asked), *theirs[1:])
        reason = reason or values_differ(ours[0], others[0], precision)
        if reason is None and not values_only:
            precision = torch.bfloat16 if self.program.rounds_gradients else precision
            reason = replay.run(lambda: gradients_differ(ours, others, precision, lambda: self._shaken(asked, copy)))
        return None if reason is None else f"on the rows that are asked for {reason}"

    def _by_forward(self, copy: Callable[[Tensor], Tensor]) -> Run:
        call = self.replay.again(copy)
        with_noise(call.module)
        self.replay.random.restore()
        return self.replay.run(call.by_forward), (call.args, call.kwargs), call.module

    def _shaken(self, asked: Asked, copy: Callable[[Tensor], Tensor]) -> Run:
        run = self._by_forward(lambda value: rounded_otherwise(copy(value)))
        return (self._rows(run[0], asked), *run[1:])

    def _rows(self, result: Any, asked: Asked) -> tuple[Tensor, ...]:
        leaves = pytree.tree_leaves(result)
        found = (leaves[leaf.place] for leaf in self.labelled.labels.leaves)
        return tuple(value.flatten(0, 1).index_select(0, asked.rows.index).unsqueeze(0) for value in found)

    def _at_once(self, theirs: Run, module: Any, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
        """Return what a call that is left for later gives, with rows of the forward, and what the forward gives."""
        leaves = pytree.tree_leaves(theirs[0])
        shown = _ForwardRows([leaves[leaf.place] for leaf in self.labelled.labels.leaves])
        mine = self.replay.run(lambda: self.labelled.labels.early(module, *inputs, shown))
        return _detached(mine), _detached(theirs[0])


def _detached(result: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.detach, result)


class _ForwardRows:
    """Stands for a call: shows the forward's rows."""

    def __init__(self, rows: list[Tensor]) -> None:
        self._rows = rows

    def show(self, number: int) -> Tensor:
        return self._rows[number]


def _trials(hidden: Tensor) -> Iterator[Asked]:
    """Yield some rows, of each sequence another number, and the last one alone."""
    batch, length = hidden.shape[:2]
    numbers = torch.arange(batch * length, device=hidden.device)
    some = numbers[(numbers % length) % (2 + numbers // length) == 0][: batch * length - 1]
    yield asked_of(some, batch, length)
    yield asked_of(numbers[-1:], batch, length)


def _wanting_gradients(hidden: Tensor) -> Callable[[Tensor], Tensor]:
    """Return how arguments are copied, so that hidden states want gradients, as they do in a last block."""

    def copy(value: Tensor) -> Tensor:
        return value.detach().clone().requires_grad_(value.requires_grad or value is hidden)

    return copy

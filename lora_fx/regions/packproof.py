"""Compare the code of a program that runs on packed rows with the forward, on a call that has padding."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_fx.capture.guards import Match
from lora_fx.liveness.padding import Rows
from lora_fx.models.torch_internals import pytree
from lora_fx.regions.checking import ModuleCall, Replay, difference
from lora_fx.regions.gradients import Run, gradients_differ, values_differ, with_far_rows
from lora_fx.regions.packing import Packed, ProvingCall, RowTally, may_be_packed
from lora_fx.regions.program import Program


def rows_to_run(
    kept: Callable[[ModuleCall], Replay | None],
    tally: RowTally,
    call: ModuleCall,
    program: Program,
    inputs: tuple[Any, ...],
) -> Rows | None:
    """Return the rows on which a program may run its packed code, proven by now; None if on all."""
    packed = program.packed
    if packed is None or not program.may_pack or tally.stopped or not may_be_packed(call.module):
        return None
    rows = packed.rows(call.module, inputs)
    if rows is None or packed.proven:
        return rows
    replay = kept(call)
    if replay is not None:
        program.decide_packed(packed_difference(replay, program, packed, rows))
    return rows if packed.proven else None


def packed_difference(replay: Replay, program: Program, packed: Packed, rows: Rows) -> str | None:
    """Return how the packed code differs from the forward in the rows that are kept; None if but for rounding.

    Values and gradients are compared, with factors that show in the adapters.  Then the forward runs with other values
    in the rows that are left out: nothing that is kept may change by a bit.
    """
    return replay.without_trace(
        lambda _: _differs(replay, program, packed, rows) or _reaches(replay, program, packed, rows)
    )


def _differs(replay: Replay, program: Program, packed: Packed, rows: Rows) -> str | None:
    match = program.guard.match_ones

    def function(module: Any, *inputs: Any) -> Any:
        return packed.run(ProvingCall(module, inputs, rows))

    mine, theirs, alike = replay.both_with_noise(function, match)
    if not alike:
        return "on packed rows it draws other random numbers"
    mine, theirs = _of_kept(mine, rows), _of_kept(theirs, rows)
    precision = replay.precision(theirs[0])
    reason = values_differ(mine[0], theirs[0], precision)
    precision = torch.bfloat16 if program.rounds_gradients else precision
    reason = reason or replay.run(
        lambda: gradients_differ(mine, theirs, precision, lambda: _of_kept(replay.shaken(), rows))
    )
    return None if reason is None else f"on packed rows {reason}"


def _reaches(replay: Replay, program: Program, packed: Packed, rows: Rows) -> str | None:
    """Return whether something that is kept depends on a row that is left out."""
    found = depends_on(
        replay, program.guard.match_ones, packed.packing.hidden, rows, lambda result: _kept(result, rows)
    )
    return "what is kept depends on padding" if found else None


def depends_on(replay: Replay, match: Match, place: int, rows: Rows, kept: Callable[[Any], Any]) -> bool:
    """Whether what is kept of a forward's result changes by a bit where rows that are left out are far off.

    Args:
        match: gives the inputs of a program from the call.
        place: of the input that has the rows.
        kept: returns what is compared of a result.
    """
    inputs = replay.call.matched(match)
    assert not isinstance(inputs, int)
    results = []
    for call in (replay.again(), replay.again(with_far_rows(inputs[place], rows.dead))):
        replay.random.restore()
        results.append(pytree.tree_map_only(Tensor, Tensor.detach, kept(replay.run(call.by_forward))))
    return difference(*results) is not None


def _of_kept(run: Run, rows: Rows) -> Run:
    return (_kept(run[0], rows), *run[1:])


def _kept(result: Any, rows: Rows) -> Any:
    """Return the results with zeros in the rows that are left out."""

    def kept(value: Tensor) -> Tensor:
        if value.shape[:2] != rows.dead.shape or value.dim() != 3:
            return value
        return torch.where(rows.dead.unsqueeze(-1), torch.zeros((), dtype=value.dtype, device=value.device), value)

    return pytree.tree_map_only(Tensor, kept, result)

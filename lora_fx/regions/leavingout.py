"""Which code answers a call of a region: that for rows that are asked for, that for rows of real tokens, or for all."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lora_fx.liveness.padding import Rows
from lora_fx.liveness.rows import LazyRows
from lora_fx.regions.checking import ModuleCall, Replay
from lora_fx.regions.compiled import UNCOMPILED
from lora_fx.regions.crossing import Waiting, crossed, waiting_for_proof
from lora_fx.regions.labelling import DeferredCall, Deferring, may_be_deferred
from lora_fx.regions.labelproof import prove_labelled
from lora_fx.regions.packing import PackedCall, RowTally, is_packed, may_be_packed
from lora_fx.regions.packproof import rows_to_run
from lora_fx.regions.program import Program

Inputs = tuple[Any, ...]


def answered(
    kept: Callable[[ModuleCall], Replay | None],
    tally: RowTally,
    deferring: Deferring,
    call: ModuleCall,
    program: Program,
    inputs: Inputs,
    by_compiler: Callable[[ModuleCall, Program, Inputs], Any],
) -> Any:
    """Return what a program gives of a call, of whose arguments all rows are there.

    Where none of them is left out, by what `by_compiler` answers; it gives UNCOMPILED if that is nothing.
    """
    labelled = program.labelled if program.may_defer and deferring.wanted else None
    if labelled is not None and not labelled.proven and not labelled.draws(call.module) and may_be_packed(call.module):
        prove_labelled(kept, call, program)
    rows = rows_to_run(kept, tally, call, program, inputs)
    deferring.follow(program.labelled, inputs, tally)
    if rows is None and not may_be_left(deferring, call.module, program, inputs):
        answer = by_compiler(call, program, inputs)
        if answer is not UNCOMPILED:
            return deferring.noted(program.labelled, answer)
    return _run(tally, deferring, call.module, program, inputs, rows)


def may_be_left(deferring: Deferring, module: nn.Module, program: Program, inputs: Inputs) -> bool:
    """Whether a call's rows may be left for those who ask for them."""
    labelled = program.labelled
    return labelled is not None and program.may_defer and may_be_deferred(deferring, labelled, module, inputs)


def answered_late(tally: RowTally, deferring: Deferring, call: ModuleCall, program: Program, inputs: Inputs) -> Any:
    """Return what a program gives of a call that has rows of hidden states only; NotImplemented if it needs all."""
    if program.may_cross and may_be_packed(call.module):
        inputs = crossed(program.crossings, call.module, inputs)
        if not any(type(value) is LazyRows for value in inputs):
            if wants_all(tally, deferring, call.module, program, inputs):
                return NotImplemented
            return answered(_not_kept, tally, deferring, call, program, inputs, _not_compiled)
    packed = program.packed if program.may_pack and may_be_packed(call.module) else None
    rows = packed.rows(call.module, inputs) if packed is not None and is_packed(packed, inputs) else None
    if packed is None or not packed.proven or rows is None:
        return NotImplemented
    deferring.follow(program.labelled, inputs, tally)
    return _run(tally, deferring, call.module, program, inputs, rows)


def unproven(program: Program, module: nn.Module, inputs: Inputs) -> list[Waiting]:
    """Return what is to be proven of rows of other sequences on a call that has not all of them."""
    return waiting_for_proof(program.crossings, module, inputs) if program.may_cross and may_be_packed(module) else []


def wants_all(tally: RowTally, deferring: Deferring, module: nn.Module, program: Program, inputs: Inputs) -> bool:
    """Whether something is to be proven on a call, for which all rows must be there."""
    if any(type(value) is LazyRows for value in crossed(program.crossings, module, inputs)):
        return False
    packed, labelled = program.packed, program.labelled if deferring.wanted else None
    packs = packed is not None and not packed.proven and not tally.stopped and packed.rows(module, inputs) is not None
    defers = labelled is not None and not labelled.proven and not labelled.draws(module)
    return program.wants_proof or packs or defers


def _not_kept(call: ModuleCall) -> None:
    """Stands for what keeps a call to prove something on it."""


def _not_compiled(call: ModuleCall, program: Program, inputs: Inputs) -> Any:
    """Stands for a compiler, which is given no call that lacks rows."""
    return UNCOMPILED


def _run(
    tally: RowTally, deferring: Deferring, module: nn.Module, program: Program, inputs: Inputs, rows: Rows | None
) -> Any:
    def otherwise() -> Any:
        packed = program.packed
        if rows is None or packed is None:
            return program.run(module, inputs)
        return packed.run(PackedCall(packed, program.function, module, inputs, rows, tally))

    labelled = program.labelled
    if labelled is None or not may_be_left(deferring, module, program, inputs):
        return deferring.noted(labelled, otherwise())
    given = inputs[labelled.labels.hidden]
    left = rows if type(given) is LazyRows else None
    late = DeferredCall(labelled, module, inputs, left, otherwise, deferring.tally).result()
    return deferring.noted(labelled, late)

"""How the blocks of one kind come to a program for a call: one that waits is proven, one is recalled, or captured."""

from dataclasses import replace

from torch import Tensor

from lora_fx.capture.calls.objects import tensors_in
from lora_fx.capture.captured import BakesSize, Captured, NotCaptured, capture, capture_open
from lora_fx.capture.differing import differing_numbers
from lora_fx.capture.tracing.inputs import VaryingSizes
from lora_fx.regions.blocks import BlockPrograms
from lora_fx.regions.checking import Replay
from lora_fx.regions.known import KNOWN, Known, kind_of
from lora_fx.regions.program import Program
from lora_fx.regions.reuse import program_for

MOST_STATIC = 4
"""How many programs of a kind may be for one size each, of a forward that loops over a size or so."""


def prove_waiting(block: BlockPrograms, replay: Replay, result: object) -> Program | None:
    """Return the program that fits a call, now proven on it; one that is wrong is dropped."""
    program = next((program for program in block.programs if _fits(program, replay)), None)
    if program is None or _prove(program, replay, result):
        return program
    if not program.verified:
        block.programs.remove(program)
    return None


def recall(block: BlockPrograms, replay: Replay, result: object) -> Program | None:
    """Return a program for a call by a graph of such a block in another model, now proven on this call."""
    call = replay.call
    kind, varying = kind_of(call.module), block.sizes.varying(call.args, call.kwargs)
    for known in KNOWN.of(kind):
        # what was captured for sizes that vary otherwise turns others into constants
        if known.varying != varying or (known.static and _has_most_static(block)):
            continue
        program = _candidate(block, known, replay)
        if program is None or not _fits(program, replay):
            continue
        block.recalled[id(known.captured)] = (known.captured, None)
        if _prove(program, replay, result):
            block.programs.append(program)
            return program
        KNOWN.forget(kind, known.captured)
    return None


def capture_new(block: BlockPrograms, replay: Replay, result: object) -> Program:
    """Return a program for a call, captured now and proven on it; the block has it, in the place of what it replaces.

    Raises:
        NotCaptured: with the reason.
    """
    call = replay.call
    varying = block.sizes.varying(call.args, call.kwargs)
    captured, static = _captured(block, replay, varying)
    program = program_for(captured, call.module, block.passes, static)
    if captured.parameters:  # that this one is proven now; if it is not, the program is dropped
        program.guard.proven.add(program.parameters_of(call.module))
    difference = replay.difference(program, program.guard.match, result)
    if difference is not None:
        raise NotCaptured(f"the graph is not the forward: {difference}")
    program.verified = not any(tensor.is_meta for tensor in tensors_in((call.args, call.kwargs)))
    program, other = _generalised(block, program, replay, result, frozenset() if static else varying)
    if other is not None:
        block.programs.remove(other)
    block.programs.append(program)
    if block.known:
        known = Known(program.captured, program.static, varying)
        KNOWN.learn(kind_of(call.module), known, None if other is None else other.captured)
    return program


def _fits(program: Program, replay: Replay) -> bool:
    return type(replay.call.matched(program.guard.match_unproven)) is tuple


def _prove(program: Program, replay: Replay, result: object) -> bool:
    match = program.guard.match_unproven
    if replay.difference(program, match, result) is not None:
        return False
    inputs = replay.call.matched(match)
    assert not isinstance(inputs, int)
    program.guard.proven.add(program.parameters_of(replay.call.module))
    ones = program.ones_of(inputs)
    if ones:
        program.ones.add(ones)
    else:
        program.verified = not any(isinstance(value, Tensor) and value.is_meta for value in inputs)
    return True


def _candidate(block: BlockPrograms, known: Known, replay: Replay) -> Program | None:
    """Return the program that a known graph is on this kind of block, made once; None if it has been tried."""
    if any(program.captured is known.captured for program in block.programs):
        return None
    if id(known.captured) not in block.recalled:
        try:
            program = program_for(known.captured, replay.call.module, block.passes, known.static)
        except AttributeError:  # it reads what a forward makes first
            program = None
        block.recalled[id(known.captured)] = (known.captured, program)
    return block.recalled[id(known.captured)][1]


def _captured(block: BlockPrograms, replay: Replay, varying: VaryingSizes) -> tuple[Captured, bool]:
    """Return a graph of the call, and whether it is for these sizes only though they are known to vary."""
    call = replay.call
    try:
        left_open = frozenset(place for program in block.programs for place in program.captured.parameters)
        return capture(call.module, call.args, call.kwargs, varying, replay.recorded, left_open), False
    except BakesSize:
        if not varying or _has_most_static(block):
            raise
    return capture(call.module, call.args, call.kwargs, frozenset(), replay.recorded), True


def _has_most_static(block: BlockPrograms) -> bool:
    return sum(program.static for program in block.programs) >= MOST_STATIC


def _generalised(
    block: BlockPrograms, program: Program, replay: Replay, result: object, varying: VaryingSizes
) -> tuple[Program, Program | None]:
    """Return a program for both this one and one of an identical block, and the latter; else this one."""
    for other in block.programs:
        captured = _opened(program, other.captured, replay, varying)
        if captured is None:
            continue
        both = program_for(captured, replay.call.module, block.passes)
        if _prove(both, replay, result):
            if other.verified:  # for these it is the other program, which has been proven
                both.guard.proven.add(tuple(other.captured.dependencies.read[place] for place in captured.parameters))
            both.ones |= other.ones & program.ones
            return both, other
    return program, None


def _opened(program: Program, other: Captured, replay: Replay, varying: VaryingSizes) -> Captured | None:
    """Return a program's capture with the integers open in which an earlier one differs; None if it does otherwise.

    The pair alone does not tell what else other numbers lead to: `if self.layer_idx > 1` is false in both.
    """
    call, places = replay.call, differing_numbers(other, program.captured)
    if not places:
        return None
    found = capture_open(call.module, call.args, call.kwargs, varying, replay.recorded, places)
    if found is None or {*found.parameters} != places:
        return None
    if found.dependencies.retreats != program.captured.dependencies.retreats:
        return None
    return replace(found, example=other.example)  # of the first block, before which a cache has nothing of this one

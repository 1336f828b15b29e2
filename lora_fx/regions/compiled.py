"""A call that compiled code answers: found by its kind, or made now, proven on copies of the call."""

import time
import warnings
from typing import Any, Protocol

from torch import nn

from lora_fx.capture.guards import Match
from lora_fx.errors import LoraFxWarning
from lora_fx.passes.lift import Unfit
from lora_fx.progress.steps import running, step
from lora_fx.regions.checking import ModuleCall, Replay
from lora_fx.regions.compiling import Code, Compiling
from lora_fx.regions.program import Program

UNCOMPILED = object()
"""Stands for the answer of compiled code that there is none of."""


class KindOfBlock(Protocol):
    """What identical blocks share, as far as it matters here."""

    seconds: float
    lock: Any
    warned: bool
    """Whether it was said that torch.compile cannot make code for them."""


def compiled_answer(call: ModuleCall, program: Program, inputs: tuple[Any, ...], block: KindOfBlock, path: str) -> Any:
    """Return what compiled code answers; UNCOMPILED if there is none for such calls.

    For the first call of its kind it is made now, unless another thread is making some.
    """
    compiling = program.compiling
    operands = None if compiling is None else compiling.operands(call.module, inputs)
    if compiling is not None and operands is not None and compiling.wants(operands.kind):
        operands.undraw()
        if block.lock.acquire(blocking=False):
            try:
                _learn(call, program.guard.match_ones, compiling, operands.kind, block, path)
            finally:
                block.lock.release()
        operands = compiling.operands(call.module, inputs)
    if compiling is None or operands is None:
        return UNCOMPILED
    code = compiling.codes.get(operands.kind)
    try:
        if code is not None:
            return compiling.run(code, operands)
    except Unfit:  # noted
        pass
    operands.undraw()
    return UNCOMPILED


def _learn(
    call: ModuleCall, match: Match, compiling: Compiling, kind: tuple[Any, ...], block: KindOfBlock, path: str
) -> None:
    """Have code made for calls of this kind, and say once if there can be none."""
    started = time.perf_counter()
    with running("compile", None), step(f"compiling {type(call.module).__name__}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about code that the user has not written
        try:
            reason = _make(compiling, Replay(call), match, kind)
        except Exception as error:  # whatever a user's __deepcopy__ raises
            reason = f"the call cannot be made twice: {type(error).__name__}: {error}"[:200]
            compiling.codes[kind] = None
    block.seconds += time.perf_counter() - started
    if reason is None:
        return
    compiling.note(reason)
    if not block.warned:
        block.warned = True
        told = f"{path or 'the model'} runs without torch.compile: {reason}"
        warnings.warn(told, LoraFxWarning, stacklevel=4)


def _make(compiling: Compiling, replay: Replay, match: Match, kind: tuple[Any, ...]) -> str | None:
    """Have code compiled for calls of this kind, on a copy of one; return how it differs from the forward, or why not.

    `compiling` has it afterwards, or knows that there is none.
    """
    made: list[Code] = []

    def by_code(module: nn.Module, *inputs: Any) -> Any:
        operands = compiling.operands(module, inputs)
        if operands is None or operands.kind != kind:
            raise Unfit("a copy of the call is of another kind")
        made.append(compiling.make(operands))
        return made[0].compiled(operands.tensors)

    reason = " ".join((replay.fast_difference(by_code, match) or "").split()) or None  # a compiler tells in many lines
    if reason is None and not made[0].compilations:
        reason = "torch.compile is switched off"
    compiling.codes[kind] = made[0] if reason is None else None
    return reason

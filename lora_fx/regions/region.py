"""One region at run time: a submodule whose forward runs as whichever of its graphs fits the call.

A call that fits none runs the module's own forward (with its adapters), is counted with the reason, and is captured
for the next time.  So a capture can cost time but never correctness.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.capture.calls.ambient import RandomState, ambient_state
from lora_fx.capture.calls.arguments import flatten
from lora_fx.capture.calls.objects import tensors_in
from lora_fx.capture.calls.reasons import reason_of
from lora_fx.capture.captured import BakesSize, Captured, NotCaptured, capture
from lora_fx.capture.generalise import generalise
from lora_fx.capture.tracing.recording import OtherShape
from lora_fx.errors import LoraFxWarning
from lora_fx.models.layers import has_hooks
from lora_fx.regions.checking import REGION, Replay, RunsGraphs
from lora_fx.regions.program import Program, make_program
from lora_fx.regions.sizes import Sizes

MOST_GRAPHS = 16
"""How many graphs one region may capture; after that it warns and stays with those it has."""
MOST_CHECKS = 3
"""How often a program is compared with the forward at other sizes while a model is surveyed."""
MOST_STATIC = 4
"""How many of them may be for one size each, of a forward that loops over a size or so."""


class GuardedRegion(RunsGraphs):
    """Mixin for the module of a region."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # torch.compile and torch.export trace the Python forward with its adapters
            return super().forward(*args, **kwargs)
        region: Region = self.__dict__[REGION]
        hit = region.find(self, args, kwargs)
        if hit is None:
            return region.miss(self, super().forward, args, kwargs)
        program, inputs = hit
        if region.checking and program.checks < MOST_CHECKS:
            return region.check(self, super().forward, args, kwargs, program)
        if program.may_give_up:
            return region.attempt(self, super().forward, args, kwargs, hit)
        if program.wants_proof:
            return region.prove_fast(self, args, kwargs, hit)
        return program.run(self, inputs)


@dataclass(slots=True)
class BlockPrograms:
    """What identical blocks share: their programs, and the calls that could not be captured."""

    passes: tuple[str, ...] = ()
    """Names of what is done to programs to make training cheaper."""
    programs: list[Program] = field(default_factory=list)
    failures: dict[tuple[object, ...], str] = field(default_factory=dict)
    """Reason for each signature of a call that cannot be captured."""
    sizes: Sizes = field(default_factory=Sizes)
    seconds: float = 0.0
    """Time spent capturing and checking."""
    lock: Any = field(default_factory=threading.Lock)

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockPrograms:
        return self  # programs do not change; a copy of the model runs the same ones

    def __reduce__(self) -> tuple[Any, ...]:
        # the next process captures code itself, with its torch and its classes
        return (BlockPrograms, (self.passes,))

    def add(self, captured: Captured, module: nn.Module, static: bool) -> None:
        """Make a program of a graph that was captured from the base; it has yet to be proven."""
        self.programs.append(make_program(captured, module, self.passes, static))


@dataclass(slots=True)
class Region:
    """State of one region."""

    path: str
    block: BlockPrograms
    enabled: bool = True
    hits: int = 0
    misses: Counter[str] = field(default_factory=Counter)
    captures: int = 0
    mine: list[Program] = field(default_factory=list)
    """The programs that have fitted a call of this region, the latest first."""
    capturing: bool = True
    checking: bool = False
    """Whether what a program computes is compared with the forward, call by call."""

    def __getstate__(self) -> tuple[Any, ...]:
        return (self.path, self.block, self.enabled, self.hits, self.misses, self.capturing)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.path, self.block, self.enabled, self.hits, self.misses, self.capturing = state
        self.captures, self.mine, self.checking = 0, [], False

    # -- a call

    def find(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Program, tuple[Tensor, ...]] | None:
        """Return a proven program that fits the call, and its inputs."""
        if not self.enabled:
            return None
        for position, program in enumerate(self.mine):
            inputs = program.guard.match(module, args, kwargs)
            if type(inputs) is tuple and program.verified:
                self.hits += 1
                if position:
                    self.mine = [program, *(other for other in self.mine if other is not program)]
                return program, inputs
        return self._find_elsewhere(module, args, kwargs)

    def _find_elsewhere(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Program, tuple[Tensor, ...]] | None:
        """Look among the programs of identical blocks, and at sizes of 1."""
        for program in self.block.programs:
            inputs = program.guard.match(module, args, kwargs)
            if type(inputs) is tuple and program.verified:
                self.hits += 1
                self._keep(program)
                return program, inputs
        for program in self.block.programs:
            inputs = program.guard.match_ones(module, args, kwargs)
            if type(inputs) is tuple and program.ones_of(inputs) in program.ones:
                self.hits += 1
                self._keep(program)
                return program, inputs
        return None

    def _keep(self, program: Program) -> None:
        if program not in self.mine:
            self.mine = [program, *self.mine]

    def miss(self, module: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module's own forward; if worth while, prove or capture a graph for such calls afterwards."""
        if not self.enabled:
            return forward(*args, **kwargs)
        self.misses[self._why(module, args, kwargs)] += 1
        noted = self.block.sizes.noted(args, kwargs)
        if not self._may_capture(module, args, kwargs) or not self.block.lock.acquire(blocking=False):
            result = forward(*args, **kwargs)
            noted()  # only now: sizes that the forward refuses do not count
            return result
        try:
            started = time.perf_counter()
            replay = self._kept(module, args, kwargs)
            result = forward(*args, **kwargs)
            noted()
            if replay is not None:
                self._learn_or_note(replay, result)
            self.block.seconds += time.perf_counter() - started
            return result
        finally:
            self.block.lock.release()

    def _kept(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Replay | None:
        """Return the call as it was before the forward; None if it cannot be kept, with the reason noted."""
        try:
            return Replay(module, args, kwargs)
        except Exception as error:  # whatever a user's __deepcopy__ raises
            text = f"the call cannot be made twice: {type(error).__name__}: {error}"
            self._note_failure(module, args, kwargs, text[:200])
            return None

    def _note_failure(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> None:
        """Remember why calls like this one run without a graph."""
        self.block.failures[_signature(module, args, kwargs)] = reason

    def check(
        self, module: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any], program: Program
    ) -> Any:
        """Return what the forward returns; a program that computes something else is given up."""
        replay = self._kept(module, args, kwargs)
        program.checks += 1
        result = forward(*args, **kwargs)
        if replay is None:
            return result
        difference = replay.difference(program, program.guard.match_ones, result)
        if difference is not None:
            program.give_up()
            self.block.programs = [other for other in self.block.programs if other is not program]
            reason = f"the graph is not the forward at other sizes: {difference}"
            self._note_failure(module, replay.args, replay.kwargs, reason)
        return result

    def prove_fast(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        hit: tuple[Program, tuple[Any, ...]],
    ) -> Any:
        """Return what the fast program computes, if it is found to be the forward but for rounding; else the plain."""
        program, inputs = hit
        replay = self._kept(module, args, kwargs)
        if replay is not None:
            program.decide(replay.fast_difference(program, program.guard.match_ones))
        return program.run(module, inputs)

    def attempt(
        self,
        module: nn.Module,
        forward: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        hit: tuple[Program, tuple[Any, ...]],
    ) -> Any:
        """Return what the program computes; where a submodule returns another shape than it relies on, the forward."""
        program, inputs = hit
        before = RandomState(tuple({value.device for value in inputs if isinstance(value, Tensor)}))
        try:
            return program.function(module, *inputs)
        except OtherShape:
            before.restore()
            self.misses["a submodule returns a tensor of another shape"] += 1
            return forward(*args, **kwargs)

    def _why(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        programs = self.mine or self.block.programs
        if not programs:
            return self.block.failures.get(_signature(module, args, kwargs), "not captured yet")
        tried = [(program.guard.match(module, args, kwargs), program.guard.reasons) for program in programs]
        failed = [(index, reasons[index]) for index, reasons in tried if isinstance(index, int)]
        # the program that came furthest is the one that was meant
        return max(failed)[1] if len(failed) == len(tried) else "not compared with the forward yet"

    def _may_capture(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        # with a hook inside, capturing would fire it more often than the user calls the model
        if not self.capturing or any(map(has_hooks, list(module.modules())[1:])):
            return False
        if self.captures >= MOST_GRAPHS:
            self._warn_once()
            return False
        return _signature(module, args, kwargs) not in self.block.failures

    def _warn_once(self) -> None:
        self.capturing = False
        cause = ", ".join(reason for reason, _ in self.misses.most_common(3))
        warnings.warn(
            f"{self.path or 'the model'}: {MOST_GRAPHS} graphs captured and calls still differ ({cause}); "
            "further such calls run without a graph, correct but slower",
            LoraFxWarning,
            stacklevel=4,
        )

    # -- learning

    def _learn_or_note(self, replay: Replay, result: Any) -> None:
        """Learn from the call; an error of ours on the way is a reason to run without a graph, not the user's."""
        try:
            self._learn(replay, result)
        except Exception as error:
            self._note_failure(replay.module, replay.args, replay.kwargs, f"the capture failed: {reason_of(error)}")

    def _learn(self, replay: Replay, result: Any) -> None:
        """Prove a waiting program on this call, or capture a new one."""
        if self._waiting(replay, result) is None:
            self._capture(replay, result)

    def _waiting(self, replay: Replay, result: Any) -> Program | None:
        """Return a program that fits the call and has now been proven on it."""
        for program in self.block.programs:
            if type(program.guard.match_unproven(replay.module, replay.args, replay.kwargs)) is not tuple:
                continue
            if self._prove(program, replay, result):
                return program
            if not program.verified:
                self.block.programs.remove(program)
            return None
        return None

    def _prove(self, program: Program, replay: Replay, result: Any) -> bool:
        match = program.guard.match_unproven
        if replay.difference(program, match, result) is not None:
            return False
        inputs = match(replay.module, replay.args, replay.kwargs)
        assert not isinstance(inputs, int)
        program.guard.proven.add(program.parameters_of(replay.module))
        ones = program.ones_of(inputs)
        if ones:
            program.ones.add(ones)
        else:
            program.verified = not any(isinstance(value, Tensor) and value.is_meta for value in inputs)
        self._keep(program)
        return True

    def _capture(self, replay: Replay, result: Any) -> Program | None:
        self.captures += 1
        try:
            captured, static = self._captured(replay)
            program = make_program(captured, replay.module, self.block.passes, static)
            difference = replay.difference(program, program.guard.match, result)
            if difference is not None:
                raise NotCaptured(f"the graph is not the forward: {difference}")
        except NotCaptured as reason:
            self._note_failure(replay.module, replay.args, replay.kwargs, str(reason))
            return None
        program.verified = not any(tensor.is_meta for tensor in tensors_in((replay.args, replay.kwargs)))
        program = self._generalised(program, replay, result) or program
        self.block.programs.append(program)
        self._keep(program)
        return program

    def _generalised(self, program: Program, replay: Replay, result: Any) -> Program | None:
        """Return a program for both this one and one of an identical block, which it replaces, if there is one."""
        for other in self.block.programs:
            captured = generalise(other.captured, program.captured)
            if captured is None:
                continue
            both = make_program(captured, replay.module, self.block.passes)
            if self._prove(both, replay, result):
                values = tuple(other.captured.dependencies.read[place] for place in captured.parameters)
                both.guard.proven.add(values)  # for these it is the other program, which has been proven
                both.ones |= other.ones & program.ones
                self.block.programs.remove(other)
                return both
        return None

    def _captured(self, replay: Replay) -> tuple[Captured, bool]:
        """Return a graph of the call, and whether it is for these sizes only though they are known to vary."""
        varying = self.block.sizes.varying(replay.args, replay.kwargs)
        try:
            return capture(replay.module, replay.args, replay.kwargs, varying, replay.recorded), False
        except BakesSize:
            if not varying or sum(program.static for program in self.block.programs) >= MOST_STATIC:
                raise
        return capture(replay.module, replay.args, replay.kwargs, frozenset(), replay.recorded), True


def _signature(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[object, ...]:
    """Return what calls have in common that all can or all cannot be captured (sizes other than 1 do not count)."""
    flat = flatten(args, kwargs)
    around = ambient_state({leaf.value.device for leaf in flat.tensors()})
    # what fails at a size of 1 may be captured at others
    ones = tuple(tuple(size == 1 for size in leaf.value.shape) for leaf in flat.tensors())
    return (flat.shape_free(), ones, module.training, around)


def region_of(module: nn.Module) -> Region | None:
    """Return the region of a module, or None."""
    region: Region | None = module.__dict__.get(REGION)
    return region


def set_region(module: nn.Module, region: Region) -> None:
    module.__dict__[REGION] = region


def drop_region(module: nn.Module) -> None:
    module.__dict__.pop(REGION, None)

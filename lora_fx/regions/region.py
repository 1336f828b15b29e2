"""One region at run time: a submodule whose forward runs as whichever of its graphs fits the call.

A call that fits none runs the module's own forward (with its adapters), is counted with the reason, and is captured
for the next time.  So a capture can cost time but never correctness.
"""

import time
import warnings
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapters.selection import is_off
from lora_fx.capture.calls.ambient import RandomState
from lora_fx.capture.calls.reasons import reason_of
from lora_fx.capture.captured import NotCaptured
from lora_fx.capture.tracing.recording import OtherShape
from lora_fx.errors import LoraFxWarning
from lora_fx.liveness.rows import LazyRows, whole
from lora_fx.models.layers import has_hooks
from lora_fx.models.torch_internals import pytree
from lora_fx.models.walking import modules_of
from lora_fx.passes.pack import NOTHING_MIXED
from lora_fx.progress.steps import block_called
from lora_fx.regions.blocks import BlockPrograms
from lora_fx.regions.callfacts import facts_of, on_meta, sends, signature_of
from lora_fx.regions.checking import REGION, ModuleCall, Replay, RunsGraphs
from lora_fx.regions.compiled import UNCOMPILED, compiled_answer
from lora_fx.regions.compiling import may_be_compiled
from lora_fx.regions.crossing import Waiting
from lora_fx.regions.crossproof import prove_crossings
from lora_fx.regions.known import KNOWN, kind_of
from lora_fx.regions.labelling import Deferring
from lora_fx.regions.learning import capture_new, prove_waiting, recall
from lora_fx.regions.leavingout import answered, answered_late, unproven, wants_all
from lora_fx.regions.packing import RowTally, uncounted
from lora_fx.regions.program import Program
from lora_fx.regions.splitblock import CHANGED, LEARN, OTHERS, SplitBlock, split_of
from lora_fx.regions.thin import Purpose, ThinLinears

MOST_GRAPHS = 16
"""How many graphs one region may capture; after that it warns and stays with those it has."""
MOST_CHECKS = 3
"""How often a program is compared with the forward at other sizes while a model is surveyed."""
Hit = tuple[Program, tuple[Any, ...]]
"""A program that fits a call, and its inputs."""


class GuardedRegion(RunsGraphs):
    """Mixin for the module of a region."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # torch.compile and torch.export trace the Python forward with its adapters
            return super().forward(*args, **kwargs)
        region: Region = self.__dict__[REGION]
        if region.thin is not None and not region.thin.paused:
            return region.show(ModuleCall(self, super().forward, args, kwargs))
        if region.split is not None:
            return region.answer_split(ModuleCall(self, super().forward, args, kwargs))
        hit = region.find(self, args, kwargs)
        late = any(type(x) is LazyRows for x in ((*args, *kwargs.values()) if hit is None else hit[1]))
        if (
            hit is not None
            and hit[0].compiling is not None
            and not (hit[0].may_pack or hit[0].may_defer or late)
            and may_be_compiled()
        ):
            answer = region.by_compiler(ModuleCall(self, super().forward, args, kwargs), *hit)
            if answer is not UNCOMPILED:
                return answer
        if hit is not None and not (late or region.checking or hit[0].wants_care):
            return hit[0].run(self, hit[1])  # most calls end here, and none of them pays for a ModuleCall
        call = ModuleCall(self, super().forward, args, kwargs)
        return region.meet_late(call, hit) if late else region.meet(call, hit)


@dataclass(slots=True)
class Region:
    """State of one region."""

    path: str
    block: BlockPrograms
    number: int = 0
    """Its place among the regions that were installed with it, in the order in which a run mostly meets them."""
    enabled: bool = True
    hits: int = 0
    misses: Counter[str] = field(default_factory=Counter)
    captures: int = 0
    mine: list[Program] = field(default_factory=list)
    """The programs that have fitted a call of this region, the latest first."""
    capturing: bool = True
    checking: bool = False
    """Whether what a program computes is compared with the forward, call by call."""
    thin: ThinLinears | None = None
    """While the model only runs to show its calls: what keeps large products from being computed."""
    tally: RowTally = field(default_factory=RowTally)
    deferring: Deferring = field(default_factory=Deferring)
    split: SplitBlock | None = None
    """How processes share its layers; None if they do not, or in a way that no graph knows."""

    def __getstate__(self) -> tuple[Any, ...]:
        block = self.block if self.split is None else self.split.before
        facts = (self.path, block, self.number, self.enabled, self.hits, self.misses, self.capturing)
        return (*facts, self.deferring)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.path, self.block, self.number, self.enabled, self.hits, self.misses, self.capturing = state[:7]
        self.deferring = state[7]
        self.captures, self.mine, self.checking, self.thin, self.tally = 0, [], False, None, RowTally()
        self.split = None

    # -- a call

    def meet(self, call: ModuleCall, hit: Hit | None) -> Any:
        """Return what a call gives: by a program that fits it, once that is proven, or by the forward."""
        if hit is None:
            return self.miss(call)
        program, inputs = hit
        if self.checking and program.checks < MOST_CHECKS:
            return self.check(call, program)
        if program.may_give_up:
            return self.attempt(call, program, inputs)
        if program.wants_proof:
            self.prove_fast(call, program)
        return answered(self._kept, self.tally, self.deferring, call, program, inputs, self.by_compiler)

    def by_compiler(self, call: ModuleCall, program: Program, inputs: tuple[Any, ...]) -> Any:
        """Return what compiled code gives of a call; UNCOMPILED if there is none for it."""
        if program.compiling is None or self.checking or not may_be_compiled():
            return UNCOMPILED
        return compiled_answer(call, program, inputs, self.block, self.path)

    def meet_late(self, call: ModuleCall, hit: Hit | None) -> Any:
        """Return what a call gives among whose arguments are tensors that are not computed yet."""
        waiting: list[Waiting] = []
        proving = False
        if hit is not None:
            program, inputs = hit
            if program.why_not_packed == NOTHING_MIXED:
                return call.by_forward()
            waiting = unproven(program, call.module, inputs)
            answer = answered_late(self.tally, self.deferring, call, program, inputs)
            if answer is not NotImplemented:
                return answer
            proving = bool(waiting) or wants_all(self.tally, self.deferring, call.module, program, inputs)
        with uncounted(proving):
            args, kwargs = pytree.tree_map_only(LazyRows, whole, (call.args, call.kwargs))
        call = ModuleCall(call.module, call.forward, args, kwargs)
        if hit is not None:
            prove_crossings(self._kept, call, hit[0].guard.match_ones, waiting)
        return self.meet(call, self.find(call.module, args, kwargs))

    def find(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hit | None:
        """Return a proven program that fits the call, and its inputs: at sizes of 1 too."""
        if not self.enabled or is_off(self):
            return None
        for program in (*self.mine, *self.block.programs):
            inputs = program.guard.match(module, args, kwargs)
            if type(inputs) is tuple and program.verified:
                return self._hit(program, inputs)
        for program in self.block.programs:
            inputs = program.guard.match_ones(module, args, kwargs)
            if type(inputs) is tuple and program.ones_of(inputs) in program.ones:
                return self._hit(program, inputs)
        return None

    def show(self, call: ModuleCall) -> Any:
        """Answer a call in a run that shows what blocks are called with: computed as far as it teaches anything."""
        assert self.thin is not None
        if not self.capturing:
            with self.thin.unseen():
                key: tuple[object, ...] = (id(self.block), *signature_of(call, sizes=True))
            return self.thin.once(key, lambda: self.miss(call))
        with self.thin.unseen():
            program, inputs = self._settled(call)
            key = (id(program), *facts_of(inputs))
            hit = None if program is None else self.find(call.module, call.args, call.kwargs)
        if program is None:
            with self.thin.whole():
                return call.module.forward(*call.args, **call.kwargs)
        if hit is not None:
            return self.thin.once(key, lambda: hit[0].run(call.module, hit[1]))
        if program.verified and self.thin.purpose is Purpose.PROVE:
            return self.miss(call)
        self._keep(program)  # on the meta device there is nothing to compare
        return self.thin.once(key, call.by_forward)

    def _settled(self, call: ModuleCall) -> tuple[Program | None, tuple[Any, ...]]:
        """Return the program that fits a call, and its inputs, if nothing of it is to be compared or proven any more.

        But, at most, which of the kind's modules it stands for: a number that the program uses as an index.
        """
        for program in self.block.programs:
            inputs = call.matched(program.guard.match_unproven)
            if isinstance(inputs, int):
                continue
            if on_meta(inputs):
                return program, inputs
            if program.verified and not program.wants_proof and not program.may_give_up:
                compared = not self.checking or program.checks >= MOST_CHECKS
                ones = program.ones_of(inputs)
                return (program, inputs) if compared and (not ones or ones in program.ones) else (None, ())
        return None, ()

    def _hit(self, program: Program, inputs: tuple[Tensor, ...]) -> Hit:
        self.hits += 1
        if not self.mine or self.mine[0] is not program:
            self._keep(program)
        return program, inputs

    def _keep(self, program: Program) -> None:
        """Put the program first: it is likely to fit the next call too."""
        self.mine = [program, *(other for other in self.mine if other is not program)]

    def miss(self, call: ModuleCall) -> Any:
        """Run the module's own forward; if worth while, prove or capture a graph for such calls afterwards."""
        split = split_of(call.module, self.block)
        if isinstance(split, SplitBlock):  # what one process alone is told to leave does not part it from the others
            self.split, self.block, self.mine = split, split.programs, []
            return self.answer_split(call)
        if not self.enabled or is_off(self):
            return call.by_forward()
        block_called(self.number, self.path)
        with self._unseen():
            self.misses[split or self.why_missed(call)] += 1
            noted = self.block.sizes.noted(call.args, call.kwargs)
            learns = self._may_capture(call) and self.block.lock.acquire(blocking=False)
        if not learns:
            result = call.by_forward()
            noted()  # only now: sizes that the forward refuses do not count
            return result
        try:
            started = time.perf_counter()
            with self._unseen():
                replay = self._kept(call)
            result = call.by_forward()
            with self._unseen():
                noted()
                if replay is not None:
                    self._learn(replay, result)
            self.block.seconds += time.perf_counter() - started
            return result
        finally:
            self.block.lock.release()

    # -- a block of whose layers each process computes a part

    def answer_split(self, call: ModuleCall) -> Any:
        """Return what a call gives: by a graph of what this process computes of it, or by the forward, as all do."""
        split = self.split
        assert split is not None
        args, kwargs = pytree.tree_map_only(LazyRows, whole, (call.args, call.kwargs))
        if not sends((*args, *kwargs.values())):
            return call.by_forward()
        kept = split.here(call.module)
        if kept is None and split.stays(call.module):
            self.misses[split.why or CHANGED] += 1
            return call.forward(*args, **kwargs)
        if kept is None:
            self.be_whole()
            return call.module.forward(*args, **kwargs)
        here = ModuleCall(kept.module, call.forward, args, kwargs)
        on = self.enabled and not is_off(self)
        hit, number, why = split.standing(here, kept.hooked, self.find, self._may_capture, on)
        agreed = split.agrees(number)
        if agreed and number == LEARN and self._learn_split(split, call):
            hit, number, why = split.standing(here, kept.hooked, self.find, self._may_capture, on)
            agreed = split.agrees(number)
        if hit is None or not agreed:
            self.hits -= hit is not None
            if why is not None:
                self.misses[why or (self.why_missed(here) if agreed else OTHERS)] += 1
            return here.by_forward()
        program, inputs = hit
        if program.wants_proof:
            split.prove_fast(self._kept(split.alone(call)), program)
        return program.run(here.module, inputs)

    def _learn_split(self, split: SplitBlock, call: ModuleCall) -> bool:
        """Capture or prove a program for a call, and return whether there is one now; collective."""
        call = split.alone(call)
        with self.block.lock:
            started = time.perf_counter()
            self.block.sizes.noted(call.args, call.kwargs)()
            why = split.learn(self._kept(call))
            self.block.seconds += time.perf_counter() - started
        self.captures += 1
        if why is not None:
            self._note_failure(call, why)
        return why is None

    def be_whole(self) -> None:
        """Forget how processes share the layers, and what was captured of their parts; what it is now is found out."""
        if self.split is not None:
            self.block, self.split, self.mine = self.split.before, None, []

    def _unseen(self) -> AbstractContextManager[None]:
        return self.thin.unseen() if self.thin is not None and not self.thin.paused else nullcontext()

    def _kept(self, call: ModuleCall) -> Replay | None:
        """Return the call as it was before the forward; None if it cannot be kept, with the reason noted."""
        try:
            return Replay(call, None if self.thin is None or self.thin.paused else self.thin)
        except Exception as error:  # whatever a user's __deepcopy__ raises
            text = f"the call cannot be made twice: {type(error).__name__}: {error}"
            self._note_failure(call, text[:200])
            return None

    def _note_failure(self, call: ModuleCall, reason: str) -> None:
        """Remember why calls like this one run without a graph."""
        self.block.failures[signature_of(call)] = reason

    def check(self, call: ModuleCall, program: Program) -> Any:
        """Return what the forward returns; a program that computes something else is given up."""
        replay = self._kept(call)
        program.checks += 1
        result = call.by_forward()
        if replay is None:
            return result
        difference = replay.difference(program, program.guard.match_ones, result)
        if difference is not None:
            program.give_up()
            self.block.programs = [other for other in self.block.programs if other is not program]
            KNOWN.forget(kind_of(call.module), program.captured)
            self._note_failure(replay.call, f"the graph is not the forward at other sizes: {difference}")
        return result

    def prove_fast(self, call: ModuleCall, program: Program) -> None:
        """Let the program run its fast code from now on, if that is found to be the forward but for rounding."""
        replay = self._kept(call)
        if replay is not None:
            assert program.fast is not None
            match = program.guard.match_ones
            program.decide(replay.fast_difference(program.fast, match, program.rounds_gradients))

    def attempt(self, call: ModuleCall, program: Program, inputs: tuple[Any, ...]) -> Any:
        """Return what the program computes; where a submodule returns another shape than it relies on, the forward."""
        before = RandomState(tuple({value.device for value in inputs if isinstance(value, Tensor)}))
        try:
            return program.function(call.module, *inputs)
        except OtherShape:
            before.restore()
            self.misses["a submodule returns a tensor of another shape"] += 1
            return call.by_forward()

    def why_missed(self, call: ModuleCall) -> str:
        programs = self.mine or self.block.programs
        if not programs:
            return self.block.failures.get(signature_of(call), "not captured yet")
        tried = [(call.matched(program.guard.match), program.guard.reasons) for program in programs]
        failed = [(index, reasons[index]) for index, reasons in tried if isinstance(index, int)]
        # the program that came furthest is the one that was meant
        return max(failed)[1] if len(failed) == len(tried) else "not compared with the forward yet"

    def _may_capture(self, call: ModuleCall) -> bool:
        # with a hook inside, capturing would fire it more often than the user calls the model
        if not self.capturing or any(map(has_hooks, modules_of(call.module)[1:])):
            return False
        if self.captures >= MOST_GRAPHS:
            self._warn_once()
            return False
        return signature_of(call) not in self.block.failures

    def _warn_once(self) -> None:
        self.capturing = False
        cause = ", ".join(reason for reason, _ in self.misses.most_common(3))
        warnings.warn(
            f"{self.path or 'the model'}: {MOST_GRAPHS} graphs captured and calls still differ ({cause}); "
            "further such calls run without a graph, correct but slower",
            LoraFxWarning,
            stacklevel=4,
        )

    def _learn(self, replay: Replay, result: Any) -> None:
        """Prove a waiting program on this call, recall one of another model, or capture a new one.

        An error of ours on the way is a reason to run without a graph, not the user's.
        """
        try:
            program = prove_waiting(self.block, replay, result) or recall(self.block, replay, result)
            if program is None:
                self.captures += 1
                program = capture_new(self.block, replay, result)
            self._keep(program)
        except NotCaptured as reason:
            self._note_failure(replay.call, str(reason))
        except Exception as error:
            self._note_failure(replay.call, f"the capture failed: {reason_of(error)}")


def region_of(module: nn.Module) -> Region | None:
    """Return the region of a module, or None."""
    region: Region | None = module.__dict__.get(REGION)
    return region

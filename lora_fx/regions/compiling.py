"""Code of a program that torch.compile makes: one function for each kind of call, shared by blocks and by twins.

A kind of call is what the code is specialised on: dtypes, which tensors require a gradient, which sizes are 0 or 1 or
equal, autocast, constants of the block.  All other sizes vary without another compilation.  The function is compiled
once, on copies of the first call of its kind; should torch want to compile it again and again, it is given up.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn

from lora_fx.adapters.fused.eligible import is_watched
from lora_fx.adapters.fused.terms import autocast_dtype
from lora_fx.capture.calls.ambient import RandomState
from lora_fx.capture.captured import Captured
from lora_fx.capture.tracing.inputs import TensorInput
from lora_fx.models.code import compiled
from lora_fx.models.torch_internals import (
    CompilerError,
    checkpointing,
    dispatch_depth,
    function_modes,
    in_backward,
    inductor,
    keeping_what_is_saved,
    mark_dynamic,
)
from lora_fx.passes.lift import Lifted, Unfit

MOST_KINDS = 8
"""How many kinds of call of one program are compiled; further ones run as without a compiler."""
_MOST_AGAIN = 3
"""How often code may be lost, as where somebody has reset the compiler; then a program is compiled no more."""
_NUMBERS = itertools.count()
_SHARED: "WeakValueDictionary[tuple[Any, ...], Code]" = WeakValueDictionary()
"""Compiled code of this process by what it computes and for which kind of call, while a program has it."""
_MAY_COMPILE: ContextVar[bool] = ContextVar("lora_fx_may_compile", default=True)


def may_be_fast() -> bool:
    """Whether a call may keep other tensors for its gradients than the forward does.

    Not while torch checkpoints: it runs the block again in the backward pass, perhaps by its own forward, and must find
    the same tensors.
    """
    # a block that is run again in the backward pass: what for, once more
    return torch.is_grad_enabled() and not in_backward() and checkpointing() is None


def may_be_compiled() -> bool:
    """Whether, besides, nothing stands around a call that would not see into compiled code."""
    return may_be_fast() and _MAY_COMPILE.get() and not (is_watched() or dispatch_depth() or function_modes())


@contextlib.contextmanager
def without_compiling() -> Iterator[None]:
    """Keep runs of ours from compiling anything: what they call a program with is no user's."""
    token = _MAY_COMPILE.set(False)
    try:
        yield
    finally:
        _MAY_COMPILE.reset(token)


@dataclass(frozen=True, slots=True)
class Operands:
    """What compiled code is called with, and its kind."""

    tensors: tuple[Tensor, ...]
    recipe: tuple[Any, ...]
    kind: tuple[Any, ...]
    undraw: Callable[[], None]
    """Puts back the random state from before, if seeds of dropouts were drawn: the call is made otherwise."""


class Code:
    """A function of tensors, which torch compiles when it is first called."""

    def __init__(self, graph: fx.Graph, key: tuple[Any, ...]) -> None:
        self.key = key
        self.compilations = 0
        """How often torch has compiled it."""
        self.may_compile = False
        """Whether it is called to be compiled: never in the middle of a user's call."""
        # a name of its own: torch remembers by name and line which sizes vary
        function = compiled(graph, f"<lora_fx compiled graph {next(_NUMBERS)}>")
        self.function = torch.compile(function, backend=self._compile, fullgraph=True, dynamic=False)

    def _compile(self, graph_module: fx.GraphModule, example_inputs: Any) -> Any:
        if not self.may_compile:
            raise Unfit("not now")
        self.compilations += 1
        return keeping_what_is_saved(lambda: inductor(graph_module, example_inputs))

    def compiled(self, tensors: Sequence[Tensor]) -> Any:
        """Return what it computes, compiled now if need be."""
        self.may_compile = True
        try:
            return self.function(None, *tensors)
        finally:
            self.may_compile = False


@dataclass(slots=True)
class Compiling:
    """The compiled code of one program."""

    lifted: Lifted
    symbols: tuple[tuple[bool, ...], ...]
    """Of each input of the lifted graph, which of its sizes may vary."""
    codes: dict[tuple[Any, ...], Code | None] = field(default_factory=dict)
    """For each kind of call the code that has been compared with the forward, or None if there is none."""
    reasons: dict[str, None] = field(default_factory=dict)
    """Why calls are not served by compiled code."""
    lost: int = 0
    """How often torch wanted to compile code again, which was then made anew for a later call."""

    def operands(self, module: nn.Module, inputs: Sequence[Any]) -> Operands | None:
        """Return what the code for a call is given; None, with the reason noted, if it is not for compiled code."""
        undraw = _nothing
        if self.lifted.draws:
            undraw = RandomState(tuple({given.device for given in inputs if isinstance(given, Tensor)})).restore
        try:
            tensors, recipe = self.lifted.operands(module, inputs)
        except Unfit as reason:
            undraw()
            self.note(str(reason))
            return None
        return Operands(tensors, recipe, (recipe, *self._kind(tensors, recipe)), undraw)

    def _kind(self, tensors: Sequence[Tensor], recipe: Sequence[Any]) -> tuple[Any, ...]:
        first: dict[int, int] = {}
        sizes = []
        given = {recipe[number].number: which for number, which in enumerate(self.symbols)}
        facts: list[tuple[Any, ...]] = []
        for number, tensor in enumerate(tensors):
            which = given.get(number)
            shape, stride = (tensor.shape, tensor.stride()) if which is None else (len(which), None)
            facts.append((type(tensor), tensor.dtype, tensor.device, tensor.requires_grad, shape, stride))
            for size, varies in zip(tensor.shape, which or (), strict=which is not None):
                sizes.append(first.setdefault(size, len(first)) + 2 if varies and size > 1 else ~size)
        around = (autocast_dtype(tensors[0].device.type), torch.get_num_threads(), torch.get_default_dtype())
        return tuple(facts), tuple(sizes), around, torch.are_deterministic_algorithms_enabled()

    def wants(self, kind: tuple[Any, ...]) -> bool:
        """Whether code is to be made for this kind of call: there is none yet, and there are not too many kinds."""
        if kind in self.codes:
            return False
        if len(self.codes) < MOST_KINDS:
            return True
        self.note(f"calls of more than {MOST_KINDS} kinds")
        return False

    def make(self, operands: Operands) -> Code:
        """Return code for these operands, which are copies; it is compiled when it is called with them."""
        graph = self.lifted.written(len(operands.tensors), operands.recipe)
        source = graph.python_code("self")
        key = (source.src, tuple(sorted(source.globals.items(), key=lambda item: item[0])), operands.kind)
        code = _SHARED.get(key)
        if code is None:
            code = _SHARED[key] = Code(graph, key)
        for place, which in zip(operands.recipe, self.symbols, strict=False):
            tensor = operands.tensors[place.number]
            for dim, varies in enumerate(which):
                if varies and tensor.shape[dim] > 1:
                    mark_dynamic(tensor, dim)
        return code

    def run(self, code: Code, operands: Operands) -> Any:
        """Return what the code computes.

        Raises:
            Unfit: torch wanted to compile it once more; nothing has been computed.
        """
        try:
            return code.function(None, *operands.tensors)
        except CompilerError as error:
            _SHARED.pop(code.key, None)
            self.codes.pop(operands.kind, None)
            self.lost += 1
            if self.lost > _MOST_AGAIN:
                self.codes[operands.kind] = None
                self.note("torch compiles it again and again")
            raise Unfit("torch has lost the code") from error

    def note(self, reason: str) -> None:
        """Remember why a call runs without compiled code, for the report."""
        if reason:
            self.reasons[reason] = None


def _nothing() -> None:
    pass


def compiling_of(lifted: Lifted, captured: Captured) -> Compiling:
    """Return the compiled code of a program, none of which is made yet."""
    symbols = []
    for step in lifted.steps:
        if step.given >= 0:
            given = captured.inputs[step.given]
            assert isinstance(given, TensorInput)
            symbols.append(tuple(symbol is not None and not symbol.isdigit() for symbol in given.symbols))
    return Compiling(lifted, tuple(symbols))

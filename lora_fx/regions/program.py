"""A captured graph, made ready to run on the modules of one kind of block."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from lora_fx.adapters.attach import ITSELF, attached
from lora_fx.capture.captured import Captured
from lora_fx.capture.guards import Guard, compile_guard
from lora_fx.capture.tracing.inputs import TensorInput
from lora_fx.capture.tracing.recording import of_shape
from lora_fx.models.code import UncompiledGraph, compiled, copied_graph
from lora_fx.models.tensors import attribute_at
from lora_fx.passes.afresh import Afresh
from lora_fx.passes.apart import Apart
from lora_fx.passes.attend import ATTEND, Attend, why_kept
from lora_fx.passes.contract import Pass, apply_pass
from lora_fx.passes.cross import crossings_of
from lora_fx.passes.editor import Editor
from lora_fx.passes.flatten import Flatten, adapted_output, is_bypassed, is_plain_layer
from lora_fx.passes.halve import HALVE, Halve
from lora_fx.passes.inline import Inline, inlined, left_out
from lora_fx.passes.labels import labels_of
from lora_fx.passes.lift import Lifted, Unfit, lifted
from lora_fx.passes.pack import NotPacked, Pack, Packing
from lora_fx.passes.recompute import Recompute
from lora_fx.passes.spread import Spread, split_layers
from lora_fx.passes.stack import Stack
from lora_fx.regions.compiling import Compiling, compiling_of, may_be_fast
from lora_fx.regions.crossing import Crossing
from lora_fx.regions.labelling import Labelled
from lora_fx.regions.packing import Packed

_USUAL: tuple[Pass, ...] = (Stack(), Recompute())
_OPTIMISATIONS: tuple[Pass, ...] = (*_USUAL, Attend(), Halve())
USUAL = tuple(optimisation.name for optimisation in _USUAL)
"""What is done to programs to make training cheaper."""
COMPILE = "compile"
OPTIMISATIONS = (*(optimisation.name for optimisation in _OPTIMISATIONS), COMPILE)
"""What can be done, in this order; the others by their names only."""
CALLS = "it calls a submodule as a whole, and checks what that returns"
LIVENESS = "liveness"
"""What is done besides, to programs for calls with padding."""
LABELS = "labels"
"""What both that and the next name together do to last blocks."""
LOSS = "loss"
"""The name by which heads compute single rows: with both, last blocks do too."""


@dataclass(slots=True)
class Program:
    """Code for one graph, its guard, and what has been proven of it."""

    captured: Captured
    guard: Guard
    graph: fx.Graph
    function: Callable[..., Any]
    """Called with the module and the graph's inputs."""
    fast: Callable[..., Any] | None
    """Computes the same with fewer products and bytes, but for the order of sums, for calls with gradients; None if
    there is nothing to gain."""
    fast_passes: tuple[str, ...]
    """The optimisations that found something to do in the fast code."""
    packed: Packed | None
    """Its code for calls with gradients in which a mask says that rows are padding; None if it has none."""
    why_not_packed: str
    """Why it has none, or why it was given up."""
    may_give_up: bool
    """Whether the code checks on the way that a submodule returns what it relies on (`OtherShape`)."""
    computes: frozenset[str]
    """Paths of the linears that the code computes by itself instead of calling them."""
    static: bool = False
    """Whether it is for one size only that is known to vary."""
    verified: bool = False
    """Whether its result has been compared with the forward's, bit by bit."""
    proven_with_noise: bool = False
    """Whether it was also right with other factors in its adapters."""
    checks: int = 0
    """How often it was compared with the forward again, at other sizes."""
    fast_proven: bool = False
    """Whether results and gradients of the fast code have been compared with the forward's."""
    why_not_fast: str = ""
    """Why the fast code was given up."""
    compiling: Compiling | None = None
    """Its code by torch.compile, which is made at the first call of each kind; None where there can be none."""
    why_not_compiled: str = ""
    why_attention_kept: str = ""
    """Why the result of its attention is kept, though it was asked to be made again."""
    labelled: Labelled | None = None
    """Its code for the rows that somebody asks for; None if it has none."""
    why_not_labelled: str = ""
    crossings: dict[int, Crossing] = field(default_factory=dict)
    """Which of its inputs are rows of other sequences, whose padding may be left out, by their place."""
    leaves_module: bool = False
    """Whether its code can change nothing of a module but what copies of it share: it reads parameters only, and calls
    no submodule as a whole."""
    ones: set[frozenset[str]] = field(default_factory=set)
    """Sets of symbolic sizes for which it has been proven right when they are 1."""

    def run(self, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        """Return what it computes, by the fast code where that is proven and may be used."""
        if self.fast is not None and self.fast_proven and may_be_fast():
            return self.fast(module, *inputs)
        return self.function(module, *inputs)

    @property
    def optimised(self) -> tuple[str, ...]:
        """Names of the optimisations that its code for calls with gradients has, once that is proven."""
        is_compiled = self.compiling is not None and any(self.compiling.codes.values())
        packs = self.packed is not None and self.packed.proven
        more = ((COMPILE, is_compiled), (LIVENESS, packs))
        return (*(self.fast_passes if self.fast_proven else ()), *(name for name, holds in more if holds))

    @property
    def given_up(self) -> tuple[str, ...]:
        """Why an optimisation that was asked for is not done, or not to every call."""
        reasons = (self.why_not_compiled, *(self.compiling.reasons if self.compiling is not None else ()))
        kept = (f"attention: {reason}" for reason in (self.why_attention_kept,) if reason)
        return (
            *filter(None, (self.why_not_fast,)),
            *kept,
            *(f"not compiled: {reason}" for reason in filter(None, reasons)),
        )

    @property
    def may_pack(self) -> bool:
        """Whether it has code for packed rows that may answer a call now, or be proven on it."""
        return self.packed is not None and may_be_fast()

    @property
    def may_defer(self) -> bool:
        """Whether it has code for rows that are asked for that may answer a call now, or be proven on it."""
        return self.labelled is not None and may_be_fast()

    @property
    def may_cross(self) -> bool:
        """Whether rows of another sequence may be left out of a call now, or that be proven on it."""
        return bool(self.crossings) and may_be_fast()

    @property
    def labelled_proven(self) -> bool:
        """Whether that code has been compared with the forward."""
        return self.labelled is not None and self.labelled.proven

    @property
    def wants_care(self) -> bool:
        """Whether there is more to do for a call than to run its code."""
        return self.may_give_up or self.wants_proof or self.may_pack or self.may_defer

    @property
    def rounds_gradients(self) -> bool:
        """Whether gradients of the fast code are those of values that were rounded to bfloat16."""
        return HALVE in self.fast_passes

    @property
    def wants_proof(self) -> bool:
        """Whether the fast code could answer this call, had it been compared with the forward."""
        return self.fast is not None and not self.fast_proven and may_be_fast()

    def decide(self, difference: str | None) -> None:
        """Take the fast code as proven, or give it up for a difference that was found."""
        self.fast_proven = difference is None
        if difference is not None:
            self.fast, self.why_not_fast = None, difference

    def decide_packed(self, difference: str | None) -> None:
        """Take the code for packed rows as proven, or give it up for a difference that was found."""
        if self.packed is not None and difference is None:
            self.packed.proven = True
        else:
            self.packed, self.why_not_packed = None, difference or ""

    def decide_labelled(self, difference: str | None) -> None:
        """Take the code for rows that are asked for as proven, or give it up for a difference that was found."""
        if self.labelled is not None and difference is None:
            self.labelled.proven = True
        else:
            self.labelled, self.why_not_labelled = None, difference or ""

    def give_up(self) -> None:
        """Forget all that was proven, so that the program answers no call any more."""
        self.verified = False
        self.ones.clear()

    def anew(self) -> "Program":
        """Return a program with the same code of which nothing is proven."""
        return Program(
            self.captured,
            self.guard.anew(),
            self.graph,
            self.function,
            self.fast,
            self.fast_passes,
            self.packed,
            self.why_not_packed,
            self.may_give_up,
            self.computes,
            self.static,
            why_attention_kept=self.why_attention_kept,
            leaves_module=self.leaves_module,
        )

    def ones_of(self, inputs: tuple[Tensor, ...]) -> frozenset[str]:
        """Return the symbolic sizes that are 1 in these inputs."""
        found = set()
        for declared, tensor in zip(self.captured.inputs, inputs, strict=True):
            if isinstance(declared, TensorInput):
                for symbol, size in zip(declared.symbols, tensor.shape, strict=False):
                    if symbol is not None and size == 1:
                        found.add(symbol)
        return frozenset(found)

    def parameters_of(self, module: nn.Module) -> tuple[int, ...]:
        """Return the module's values of the integers that are parameters of the program."""
        return tuple(attribute_at(module, str(place)) for place in self.captured.parameters)


def make_program(captured: Captured, module: nn.Module, passes: Collection[str] = (), static: bool = False) -> Program:
    """Return the program of a captured graph on a module: the adapters that the module holds are injected.

    The program reads parameters from the module that it is called with, so all identical blocks can share it.

    Args:
        captured: the graph of the base.
        module: a block with its adapters.
        passes: names of the optimisations that its fast code may have.
        static: whether it is for one size only that is known to vary.

    Raises:
        AttributeError: the graph reads an attribute that this module has not.
    """
    graph_module = UncompiledGraph(module, copied_graph(captured.graph))
    bypassed = _bypassed(graph_module)
    seen_into = {str(node.target) for node in inlined(graph_module)} if passes else set()
    if COMPILE in passes:
        seen_into |= _dropouts(graph_module)
    if split := split_layers(module):
        apply_pass(Spread(split), Editor(graph_module))
    apply_pass(Flatten(), Editor(graph_module))
    if is_plain_layer(module) and attached(module) is not None:
        bypassed.add("")
        _write_layer(graph_module, module)
    graph_module.graph.lint()
    watched = (*captured.dependencies.inlined, *bypassed, *seen_into)
    classes = {path: type(module.get_submodule(path)) for path in watched if path}
    checks = any(node.target is of_shape for node in graph_module.graph.nodes)
    unset = {path: left_out(module.get_submodule(path)) for path in seen_into}
    guard = compile_guard(captured, classes, unset)
    graph = graph_module.graph
    computes = bypassed | set(_weights_read(graph, module))
    function = compiled(graph, _title(module))
    fast, fast_passes = (None, ()) if checks else _optimised(graph_module, module, passes)
    crossings: dict[int, Packing] = {}
    packed, why = None, CALLS if checks and LIVENESS in passes else ""
    if LIVENESS in passes and not checks:
        packed, why = _packed(graph_module, module, passes, captured)
        crossings = crossings_of(_plainer(graph_module, module), captured)
    program = Program(
        captured, guard, graph, function, fast, fast_passes, packed, why, checks, frozenset(computes), static
    )
    program.crossings = {place: Crossing(packing) for place, packing in crossings.items()}
    program.leaves_module = _leaves_module(graph, module)
    if ATTEND in passes and ATTEND not in fast_passes:
        program.why_attention_kept = why_kept(graph)
    if {LIVENESS, LOSS} <= set(passes) and not checks:
        program.labelled, program.why_not_labelled = _labelled(graph_module, module, passes, captured)
    if COMPILE in passes:
        try:
            program.compiling = compiling_of(_lifted(graph_module, module, captured), captured)
        except Unfit as reason:
            program.why_not_compiled = str(reason)
    graph.owning_module = None  # it would hold the module
    return program


def _leaves_module(graph: fx.Graph, module: nn.Module) -> bool:
    """Whether a graph calls no submodule as a whole, and reads parameters and layers with their adapters only."""
    if any(node.op == "call_module" for node in graph.nodes):
        return False
    names = [str(node.target) for node in graph.nodes if node.op == "get_attr" and node.target != ITSELF]
    return all(isinstance(attribute_at(module, name), (nn.Parameter, nn.Module)) for name in names)


def _lifted(graph_module: fx.GraphModule, module: nn.Module, captured: Captured) -> Lifted:
    """Return the graph for a compiler: siblings share a product, and what to make again is the compiler's choice."""
    copied = _plainer(graph_module, module)
    apply_pass(Stack(), Editor(copied))
    return lifted(copied, captured)


def _dropouts(graph_module: fx.GraphModule) -> set[str]:
    """Return the paths of the dropouts that the graph calls."""
    targets = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    return {path for path in targets if type(graph_module.get_submodule(path)) is nn.Dropout}


def _title(module: nn.Module) -> str:
    """Return what tracebacks call the code of the module's graphs."""
    return f"<lora_fx graph of {type(module).__name__}>"


def _plainer(graph_module: fx.GraphModule, module: nn.Module) -> fx.GraphModule:
    """Return a copy of a graph as passes read it best."""
    copied = UncompiledGraph(module, copied_graph(graph_module.graph))
    for step in (Inline(), Afresh()):
        apply_pass(step, Editor(copied))
    return copied


def _packed(
    graph_module: fx.GraphModule, module: nn.Module, passes: Collection[str], captured: Captured
) -> tuple[Packed | None, str]:
    """Return the code of a copy of the graph on packed rows, optimised as well; or None, and why there is none."""
    copied = _plainer(graph_module, module)
    pack = Pack(captured)
    try:
        apply_pass(pack, Editor(copied))
    except NotPacked as reason:
        return None, str(reason)
    assert pack.packing is not None
    assert pack.reading is not None
    apply_pass(Apart(pack.reading), Editor(copied))
    function, _ = _optimise(copied, module, passes)
    return Packed(function or compiled(copied.graph, _title(module)), pack.packing), ""


def _labelled(
    graph_module: fx.GraphModule, module: nn.Module, passes: Collection[str], captured: Captured
) -> tuple[Labelled | None, str]:
    """Return the code of a copy of the graph for rows that are asked for; or None, and why there is none."""
    copied = _plainer(graph_module, module)
    try:
        labels = labels_of(copied, captured, _title(module))
    except NotPacked as reason:
        return None, str(reason)
    late = UncompiledGraph(module, labels.late)
    function, _ = _optimise(late, module, passes)
    return Labelled(labels, function or compiled(late.graph, _title(module))), ""


def _optimised(
    graph_module: fx.GraphModule, module: nn.Module, passes: Collection[str]
) -> tuple[Callable[..., Any] | None, tuple[str, ...]]:
    """Return the function of a copy of the graph after the optimisations of these names, and those that changed it.

    The function is None where none of them did.
    """
    if not any(step.name in passes for step in _OPTIMISATIONS):
        return None, ()
    copied = _plainer(graph_module, module)
    return _optimise(copied, module, passes)


def _optimise(
    copied: fx.GraphModule, module: nn.Module, passes: Collection[str]
) -> tuple[Callable[..., Any] | None, tuple[str, ...]]:
    effective = []
    for step in _OPTIMISATIONS:
        if step.name in passes:
            editor = Editor(copied)
            apply_pass(step, editor)
            if editor.journal.modified:
                effective.append(step.name)
    if not effective:
        return None, ()
    for node in reversed(list(copied.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            copied.graph.erase_node(node)
    copied.graph.lint()
    return compiled(copied.graph, _title(module)), tuple(effective)


def _write_layer(graph_module: fx.GraphModule, layer: nn.Module) -> None:
    """Let the graph of an adapted layer's own forward call the layer with its adapter instead."""
    graph_module.add_module(ITSELF, layer)
    graph, output = graph_module.graph, next(iter(reversed(graph_module.graph.nodes)))
    x = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_before(output):
        output.args = (graph.call_function(adapted_output, (x, graph.get_attr(ITSELF))),)
    graph.eliminate_dead_code()


def _weights_read(graph: fx.Graph, module: nn.Module) -> Iterator[str]:
    """Yield the names of the parameters that the graph reads, with their adapters, and of the layers that own them."""
    for node in graph.nodes:
        path, _, name = str(node.target).rpartition(".")
        if node.op == "get_attr" and name in getattr(module.get_submodule(path), "_parameters", {}):
            yield str(node.target)
            if name == "weight":
                yield path


def _bypassed(graph_module: fx.GraphModule) -> set[str]:
    """Return the paths of the modules that the program will compute by itself instead of calling them."""
    targets = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    return {path for path in targets if is_bypassed(graph_module.get_submodule(path))}

"""A captured graph, made ready to run on the modules of one kind of block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from lora_fx.adapters.attach import share_adapter
from lora_fx.capture.captured import Captured, resolve
from lora_fx.capture.guards import Guard, compile_guard
from lora_fx.capture.inputs import TensorInput
from lora_fx.capture.recording import of_shape
from lora_fx.editor import Editor
from lora_fx.passes import apply_pass
from lora_fx.passes.flatten import Flatten, is_bypassed, is_plain_layer
from lora_fx.passes.inject import splice_adapters, splice_layer


@dataclass(slots=True)
class Program:
    """Code for one graph, its guard, and what has been proven of it."""

    captured: Captured
    guard: Guard
    graph: fx.Graph
    code: str
    function: Callable[..., Any]
    """Called with the module and the graph's inputs."""
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
    ones: set[frozenset[str]] = field(default_factory=set)
    """Sets of symbolic sizes for which it has been proven right when they are 1."""

    def give_up(self) -> None:
        """Forget all that was proven, so that the program answers no call any more."""
        self.verified = False
        self.ones.clear()

    def ones_of(self, inputs: tuple[Tensor, ...]) -> frozenset[str]:
        """Return the symbolic sizes that are 1 in these inputs."""
        return frozenset(
            symbol
            for each, tensor in zip(self.captured.inputs, inputs, strict=True)
            if isinstance(each, TensorInput)
            for symbol, size in zip(each.symbols, tensor.shape, strict=False)
            if symbol is not None and size == 1
        )

    def parameters_of(self, module: nn.Module) -> tuple[int, ...]:
        """Return the module's values of the integers that are parameters of the program."""
        return tuple(resolve(module, str(place)) for place in self.captured.parameters)


def make_program(captured: Captured, module: nn.Module) -> Program:
    """Return the program of a captured graph on a module: the adapters that the module holds are injected.

    The program reads parameters from the module that it is called with, so all identical blocks can share it.
    """
    graph_module = fx.GraphModule(module, copy.deepcopy(captured.graph))
    bypassed = _bypassed(graph_module)
    editor = Editor(graph_module)
    editor.by = "inject"
    splice_adapters(editor, only=bypassed)
    if is_plain_layer(module):  # a layer alone is the region
        bypassed.add("")
        share_adapter(module, graph_module)
        splice_layer(editor)
    factors = _bypassed(graph_module) - bypassed
    apply_pass(Flatten(), editor)
    graph_module.graph.lint()
    code = graph_module.graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, f"<lora_fx graph of {type(module).__name__}>", "exec"), scope)
    watched = (*captured.log.inlined, *bypassed, *factors)
    classes = {path: type(module.get_submodule(path)) for path in watched if path}
    checks = any(node.target is of_shape for node in graph_module.graph.nodes)
    guard = compile_guard(captured, classes)
    graph = graph_module.graph
    computes = bypassed | set(_weights_read(graph, module))
    return Program(captured, guard, graph, code.src, scope["forward"], checks, frozenset(computes))


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

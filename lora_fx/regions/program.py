"""A captured graph, made ready to run on the modules of one kind of block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from lora_fx.capture.captured import Captured, resolve
from lora_fx.capture.guards import Guard, compile_guard
from lora_fx.capture.inputs import TensorInput
from lora_fx.editor import Editor
from lora_fx.passes import apply_pass
from lora_fx.passes.flatten import Flatten, is_bypassed
from lora_fx.passes.inject import splice_adapters


@dataclass(slots=True)
class Program:
    """Code for one graph, its guard, and what has been proven of it."""

    captured: Captured
    guard: Guard
    graph: fx.Graph
    code: str
    function: Callable[..., Any]
    """Called with the module and the graph's inputs."""
    verified: bool = False
    """Whether its result has been compared with the forward's, bit by bit."""
    ones: set[frozenset[str]] = field(default_factory=set)
    """Sets of symbolic sizes for which it has been proven right when they are 1."""

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
    apply_pass(Flatten(), editor)
    graph_module.graph.lint()
    code = graph_module.graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, f"<lora_fx graph of {type(module).__name__}>", "exec"), scope)
    classes = {path: type(module.get_submodule(path)) for path in (*captured.log.inlined, *bypassed)}
    return Program(captured, compile_guard(captured, classes), graph_module.graph, code.src, scope["forward"])


def _bypassed(graph_module: fx.GraphModule) -> set[str]:
    """Return the paths of the modules that the program will compute by itself instead of calling them."""
    targets = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    return {path for path in targets if is_bypassed(graph_module.get_submodule(path))}

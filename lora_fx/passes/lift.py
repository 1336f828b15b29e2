"""lift: a region graph as a function of tensors alone, for a compiler: what it reads of its block becomes inputs.

So the function is not specialised on a block: one serves all blocks of a kind, and those of twins.  Adapted layers are
one operator for each input that they have (`adapters/fused/operators`).  What is no tensor (an eps, the p of a dropout)
is read at every call, and is a constant of the function that serves it.
"""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lora_fx.adapters.fused.operators import adapted_operands, as_operands
from lora_fx.adapters.fused.siblings import adapted_siblings
from lora_fx.capture.captured import Captured
from lora_fx.capture.tracing.inputs import TensorInput
from lora_fx.capture.tracing.recording import of_shape
from lora_fx.capture.tracing.writer import writes
from lora_fx.models.layers import has_hooks
from lora_fx.models.tensors import attribute_at
from lora_fx.passes.flatten import adapted_output
from lora_fx.passes.stack import is_adapted_linear

_PLAIN = (Tensor, nn.Parameter)
_CONSTANTS = (int, float, str, tuple, torch.dtype, type(None))


class Unfit(Exception):
    """This graph, or this call of it, is not for compiled code; the text is the reason.  An outcome, not an error."""


class Place(NamedTuple):
    """Stands for a tensor in a recipe: its number among the operands."""

    number: int


class Taking(NamedTuple):
    """A node that takes something from the block or the call, and what."""

    node: fx.Node
    path: str
    """Of an attribute, or of a dropout."""
    layers: tuple[str, ...] = ()
    """Of a call of adapted layers, their paths."""
    dtype: torch.dtype = torch.float32
    """Of their input."""
    given: int = -1
    """Of an input of the graph, its number."""


@dataclass(frozen=True, slots=True)
class Lifted:
    """A region graph that can be written as a function of tensors."""

    graph: fx.Graph
    steps: tuple[Taking, ...]
    draws: bool
    """Whether an adapter in it has a dropout."""

    def operands(self, module: nn.Module, inputs: Sequence[Any]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """Return the tensors of a call, each once, and the recipe: what each step takes, tensors by their `Place`.

        Dropouts of adapters draw their seeds here, in the order of the layers.

        Raises:
            Unfit: with what in this call a compiler cannot be given.
        """
        tensors: dict[int, Tensor] = {}
        places: dict[int, Place] = {}

        def placed(tensor: Tensor) -> Place:
            if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_inference():
                raise Unfit(f"a {type(tensor).__name__} is not a plain tensor")
            tensors[id(tensor)] = tensor  # also keeps it alive, so that no other gets its number
            return places.setdefault(id(tensor), Place(len(places)))

        recipe = tuple(_taken(step, module, inputs, placed) for step in self.steps)
        drops = any(all(taken) for step, taken in zip(self.steps, recipe, strict=True) if step.node.op == "call_module")
        if drops and any(taken[-1] for step, taken in zip(self.steps, recipe, strict=True) if step.layers):
            raise Unfit("dropouts of the model beside those of adapters would draw in another order")
        return tuple(tensors.values()), recipe

    def written(self, count: int, recipe: Sequence[Any]) -> fx.Graph:
        """Return the graph of a function of so many tensors that serves the calls with this recipe."""
        graph = fx.Graph()
        given = [graph.placeholder(f"t{number}") for number in range(count)]
        taken = {step.node: value for step, value in zip(self.steps, recipe, strict=True)}
        made: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            if node not in taken:
                if node.op == "output":
                    graph.output(fx.node.map_arg(node.args[0], made.__getitem__))
                elif node.op not in ("placeholder", "get_attr"):
                    made[node] = graph.node_copy(node, made.__getitem__)
                continue
            made[node] = _served(graph, node, taken[node], given, made)
        return graph


def _taken(step: Taking, module: nn.Module, inputs: Sequence[Any], placed: Any) -> Any:
    """Return what a step takes, for a recipe."""
    if step.given >= 0:
        given = inputs[step.given]
        return placed(given if given.is_contiguous() else given.contiguous())  # one order in memory: one code
    if step.layers:
        return _operands(step, module, placed)
    value = attribute_at(module, step.path)
    if isinstance(value, Tensor):
        return placed(value)
    if isinstance(value, nn.Module):
        if type(value) is not nn.Dropout or value.inplace or has_hooks(value):
            raise Unfit(f"{step.path} is no plain dropout")
        return (value.p, value.training)
    if isinstance(value, list):
        value = tuple(value)
    if not isinstance(value, _CONSTANTS):
        raise Unfit(f"{step.path} is a {type(value).__name__}")
    return value


def _operands(step: Taking, module: nn.Module, placed: Any) -> tuple[Any, ...]:
    """Return the tensors and constants of the layers of one call of adapted layers."""
    terms = []
    for path in step.layers:
        layer: Any = module.get_submodule(path)
        width = layer.in_features if isinstance(layer, nn.Linear) else layer.nx
        term = layer.adapted_term(_stub(step.dtype, width, layer._parameters["weight"].device))
        if term is None or term.facts.runs:
            raise Unfit(f"{path} is computed operation by operation" if term is None else f"{path} is adapted in part")
        terms.append(term)
    numbers, flags, tensors, seeds = as_operands(terms)
    return numbers, flags, tuple(map(placed, tensors)), tuple(map(placed, seeds))


@functools.lru_cache(maxsize=64)
def _stub(dtype: torch.dtype, width: int, device: torch.device) -> Tensor:
    """Return an input of no rows, to ask layers what they do with one of this dtype."""
    return torch.empty((0, width), dtype=dtype, device=device)


def _served(graph: fx.Graph, node: fx.Node, taken: Any, given: Sequence[fx.Node], made: dict[fx.Node, Any]) -> Any:
    """Write what stands for a node that takes something, and return it: a node, or a constant."""
    if isinstance(taken, Place):
        return given[taken.number]
    if node.op == "get_attr":
        return taken
    x = made[node.all_input_nodes[0]]
    if node.op == "call_module":
        p, training = taken
        return graph.call_function(F.dropout, (x, p, training)) if training and p else x
    numbers, flags, tensors, seeds = taken
    lists = [[given[place.number] for place in places] for places in (tensors, seeds)]
    results = graph.call_function(adapted_operands, (x, numbers, flags, *lists))
    return results if node.target is adapted_siblings else graph.call_function(operator.getitem, (results, 0))


def lifted(graph_module: fx.GraphModule, captured: Captured) -> Lifted:
    """Return a region graph, in which norms are functions and siblings are joined, as one of tensors.

    Raises:
        Unfit: with what in it a compiler cannot be given.
    """
    steps: list[Taking] = []
    inputs = iter(range(len(captured.inputs)))
    for node in graph_module.graph.nodes:
        _refuse(node)
        index = next(inputs) if node.op == "placeholder" else -1
        if node.op == "placeholder" and node.users:
            if not isinstance(captured.inputs[index], TensorInput):
                raise Unfit(f"it is given {captured.inputs[index].name}, which is no tensor")
            steps.append(Taking(node, "", given=index))
        elif node.target in (adapted_output, adapted_siblings):
            steps.append(_call_of_layers(node, graph_module, captured))
        elif node.op == "call_module" or (node.op == "get_attr" and not all(map(_is_call_of_layers, node.users))):
            steps.append(Taking(node, str(node.target)))
    return Lifted(graph_module.graph, tuple(steps), any(_draws(step, graph_module) for step in steps))


def _refuse(node: fx.Node) -> None:
    if node.target is of_shape:
        raise Unfit("a submodule's result is checked at every call")
    if writes(node):
        raise Unfit(f"it writes in place: {node.name}")


def _is_call_of_layers(node: fx.Node) -> bool:
    return node.target in (adapted_output, adapted_siblings)


def _call_of_layers(node: fx.Node, graph_module: fx.GraphModule, captured: Captured) -> Taking:
    if node.target is adapted_output and not is_adapted_linear(node, graph_module):
        raise Unfit(f"{node.args[1]} is no linear layer")
    x, *layers = node.args
    assert isinstance(x, fx.Node)
    placeholders = [other for other in graph_module.graph.nodes if other.op == "placeholder"]
    dtype = captured.inputs[placeholders.index(x)].dtype if x in placeholders else x.meta.get("tensor", (0, None))[1]  # type: ignore[union-attr]
    if dtype is None:
        raise Unfit("it was captured without inputs")
    return Taking(node, "", tuple(str(layer.target) for layer in layers), dtype)  # type: ignore[union-attr]


def _draws(step: Taking, graph_module: fx.GraphModule) -> bool:
    return any("lora_dropout" in graph_module.get_submodule(path)._modules for path in step.layers)

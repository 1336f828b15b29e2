"""Sites in a graph: the calls of a base weight, and the LoRA nodes beside them."""

import operator
import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx

from lora_fx.adapters.factors.lora import LoRAFactor
from lora_fx.errors import MergeError
from lora_fx.models.layers import kind_of
from lora_fx.passes.rawsites import LENGTHS, LoRANodes, is_dropout, raw_lora_nodes

LINEARS = (F.linear, torch.ops.aten.linear.default)
_FACTOR = re.compile(r"\.?lora_A\.[^.]+(\.\d+)?$")


def site_calls(graph_module: fx.GraphModule) -> Iterator[tuple[str, fx.Node]]:
    """Yield (path, node) of every call of a layer that has a weight to adapt, in the order of the graph.

    F.linear with a module's own `weight` is such a call too, of that module.  The node computes the base output.
    """
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            kind = kind_of(graph_module.get_submodule(str(node.target)))
            if kind is not None and (kind.called or kind.op == "linear"):
                yield str(node.target), node
        elif node.op == "call_function" and node.target in LINEARS:
            weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                owner, _, name = str(weight.target).rpartition(".")
                if owner and name == "weight":
                    yield owner, node


def first_argument(node: fx.Node) -> fx.Node:
    """Return the input of a layer's call."""
    value = next(iter((*node.args, *node.kwargs.values())))
    assert isinstance(value, fx.Node)
    return value


def lora_nodes(graph_module: fx.GraphModule) -> Iterator[LoRANodes]:
    """Yield the LoRA subgraph of every adapted call, found by structure from its lora_A.

    Raises:
        MergeError: where the nodes around a lora_A are no longer those that `inject` wrote.
    """
    for node in list(graph_module.graph.nodes):
        if node.op != "call_module" or not node.args:  # without x: read as a matrix, for a raw parameter
            continue
        factor = graph_module.get_submodule(str(node.target))
        if isinstance(factor, LoRAFactor) and factor.spec is not None:
            yield _around(node, _FACTOR.sub("", str(node.target)))
    yield from raw_lora_nodes(graph_module)


def _around(lora_a: fx.Node, path: str) -> LoRANodes:
    chain = [lora_a]

    def follow() -> fx.Node:
        users = list(chain[-1].users)
        if len(users) != 1:
            raise _changed(path, f"{chain[-1].name} is used {len(users)} times, not once")
        chain.append(users[0])
        return users[0]

    if is_dropout(follow()):  # of tokens, which are dropped as a whole
        follow()
    follow()  # lora_B
    result = follow()
    if result.op == "call_method" and result.target == "type_as":
        result = follow()
    is_dora = result.op == "call_module" and f"{LENGTHS}." in str(result.target)
    if not (result.target is operator.add or is_dora) or not isinstance(result.args[0], fx.Node):
        raise _changed(path, f"{result.name} is not base + delta")
    dropped = [node for node in lora_a.all_input_nodes if is_dropout(node)]
    return LoRANodes(path, result.args[0], result, (*reversed(chain), *_magnitude_inputs(result), *dropped))


def _changed(path: str, how: str) -> MergeError:
    return MergeError("a LoRA subgraph has been changed", [(path, how)])


def _magnitude_inputs(result: fx.Node) -> list[fx.Node]:
    """Return the nodes that DoRA's magnitude alone reads, users before what they use."""
    inputs: list[fx.Node] = []
    for value in result.kwargs.values():
        if isinstance(value, fx.Node) and len(value.users) == 1:
            inputs.append(value)
            inputs += [inner for inner in value.args if isinstance(inner, fx.Node) and value.op == "call_method"]
    return inputs

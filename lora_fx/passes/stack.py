"""stack: adapted layers on the same input become one call, which multiplies all their A by it at once.

Which layers those are is seen in the graph, not by name.  Between the first and the last of them there may be only
operations that are known to draw no random numbers and to write nothing in place; else they are left alone.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from lora_fx.adapters.fused.siblings import adapted_siblings
from lora_fx.models.layers import linear_layout
from lora_fx.passes.contract import Pass
from lora_fx.passes.editor import Editor
from lora_fx.passes.flatten import adapted_output
from lora_fx.passes.pointwise import is_quiet


@dataclass(frozen=True, slots=True)
class Stack(Pass):
    """Join siblings.  Ensures: the same results within the rounding of a sum in another order."""

    name: str = "stack"

    def run(self, editor: Editor) -> None:
        for siblings in list(_siblings(editor.graph_module)):
            _join(editor, siblings)


def _siblings(graph_module: fx.GraphModule) -> Iterator[list[fx.Node]]:
    """Yield the calls of adapted linears that can be made at once, two or more each."""
    open_groups: dict[fx.Node, list[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if is_adapted_linear(node, graph_module):
            if draws(node, graph_module):  # what has an earlier input, but comes later, would draw before
                yield from _closed(open_groups, but=node.args[0])
            open_groups.setdefault(node.args[0], []).append(node)
        elif not is_quiet(node):
            yield from _closed(open_groups)
    yield from _closed(open_groups)


def _closed(groups: dict[fx.Node, list[fx.Node]], but: object = None) -> Iterator[list[fx.Node]]:
    for x in list(groups):
        if x is not but:
            group = groups.pop(x)
            if len(group) > 1:
                yield group


def is_adapted_linear(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Whether the node calls one adapted layer that computes x Wᵀ + b and nothing else."""
    return node.target is adapted_output and linear_layout(type(_layer(node, graph_module))) is not None


def _layer(node: fx.Node, graph_module: fx.GraphModule) -> object:
    layer = node.args[1]
    assert isinstance(layer, fx.Node)
    return graph_module.get_submodule(str(layer.target))


def draws(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Whether the adapted layer that a node calls has a dropout."""
    return "lora_dropout" in getattr(_layer(node, graph_module), "_modules", {})


def _join(editor: Editor, siblings: list[fx.Node]) -> None:
    first, x = siblings[0], siblings[0].args[0]
    with editor.writing_after(first, str(first.meta.get("site", ""))) as write:
        layers = [write.graph.get_attr(str(node.args[1].target)) for node in siblings]  # type: ignore[union-attr]
        joined = write.graph.call_function(adapted_siblings, (x, *layers))
        results = [write.graph.call_function(operator.getitem, (joined, i)) for i in range(len(siblings))]
    for node, result in zip(siblings, results, strict=True):
        editor.replace(node, result, str(node.meta.get("site", "")))

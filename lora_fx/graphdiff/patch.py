"""Apply what a diff reports to a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lora_fx.graphdiff.changes import GraphEdit
from lora_fx.graphdiff.graphs import Graph, Statement, Weight


def patched(graph: Graph, edits: Sequence[GraphEdit], name: str, sums: tuple[int, int]) -> Graph:
    """Return the graph with the edits made; what no edit names stays, in its order.

    Args:
        graph: a of the diff; stays unchanged.
        edits: of a comparison.
        name: of the new graph.
        sums: its number of parameters, and their bytes.
    """
    new = {edit.after: edit for edit in edits if edit.after is not None}
    position = {edit.before: edit.after for edit in edits if edit.before is not None}
    waiting = iter([i for i in range(len(graph.nodes)) if i not in position])
    size = len(graph.nodes) - len(position) + len(new)
    origins = {j: next(waiting) for j in range(size) if j not in new}
    position |= {i: j for j, i in origins.items()}
    nodes: list[Statement] = []
    weights: dict[str, Weight] = {}
    for j in range(size):
        node = graph.nodes[origins[j]] if j in origins else new[j].node
        assert node is not None
        if j in origins:
            inputs = [position[i] for i in node.inputs]
            node = replace(node, inputs=tuple(i for i in inputs if i is not None))
        nodes.append(node)
        weights.update(new[j].weights if j in new else {weight: graph.weights[weight] for weight in node.weights})
    return Graph(name, tuple(nodes), weights, *sums)

"""Apply what a diff reports to a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lora_fx.graphdiff.changes import GraphEdit
from lora_fx.graphdiff.graphs import Graph, Statement, Weight


def patched(graph: Graph, edits: Sequence[GraphEdit], name: str, sums: tuple[int, int]) -> Graph:
    """Return the graph with the edits made; what no edit names stays, in its order."""
    gone = {edit.before for edit in edits if edit.before is not None}
    new = {edit.after: edit for edit in edits if edit.after is not None}
    kept = [i for i in range(len(graph.nodes)) if i not in gone]
    waiting = iter(kept)
    position: dict[int | None, int | None] = {edit.before: edit.after for edit in edits if edit.before is not None}
    origins: dict[int, int] = {}
    for j in range(len(kept) + len(new)):
        if j not in new:
            origins[j] = next(waiting)
            position[origins[j]] = j
    nodes: list[Statement] = []
    weights: dict[str, Weight] = {}
    for j in range(len(kept) + len(new)):
        node = _kept(graph.nodes[origins[j]], position) if j in origins else new[j].node
        assert node is not None
        nodes.append(node)
        weights.update(new[j].weights if j in new else {each: graph.weights[each] for each in node.weights})
    return Graph(name, tuple(nodes), weights, *sums)


def _kept(node: Statement, position: dict[int | None, int | None]) -> Statement:
    inputs = [position[i] for i in node.inputs]
    return replace(node, inputs=tuple(i for i in inputs if i is not None))

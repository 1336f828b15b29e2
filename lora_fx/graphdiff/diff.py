"""Two graphs side by side → GraphDiff.  Needs no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lora_fx.graphdiff.align import align, digest, increasing
from lora_fx.graphdiff.changes import Comparison, GraphDifference, GraphEdit, merged, site_changes
from lora_fx.graphdiff.graphs import INPUT, Graph
from lora_fx.graphdiff.naming import lines_of
from lora_fx.graphdiff.patch import patched
from lora_fx.graphdiff.render.dot import diff_dot, diff_graphml
from lora_fx.graphdiff.render.html import diff_html
from lora_fx.graphdiff.render.json import diff_json
from lora_fx.graphdiff.render.mermaid import diff_mermaid
from lora_fx.graphdiff.render.svg import diff_svg
from lora_fx.graphdiff.render.text import diff_text


@dataclass(frozen=True, slots=True)
class GraphDiff(GraphDifference):
    """How two graphs differ; falsy if they do not.  Values of weights are not compared."""

    def __str__(self) -> str:
        return diff_text(self)

    def applied_to(self, graph: Graph) -> Graph:
        """Return the graph with the reported edits made: applied to `a` it is `b`."""
        return patched(graph, self.compared.edits, self.b, (self.parameters[1], self.bytes[1]))

    def to_json(self) -> str:
        """Return changes, sums and edits as JSON."""
        return diff_json(self)

    def to_html(self) -> str:
        """Return one page that needs nothing else: pictures, lines, search."""
        return diff_html(self)

    def to_svg(self) -> str:
        """Return a picture of the blocks that differ, each kind once."""
        return diff_svg(self)

    def to_mermaid(self) -> str:
        """Return a flowchart that stays within the limits of GitHub; what does not fit is folded."""
        return diff_mermaid(self)

    def to_dot(self) -> str:
        """Return both graphs as one in Graphviz's language."""
        return diff_dot(self)

    def to_graphml(self) -> str:
        """Return both graphs as one in GraphML."""
        return diff_graphml(self)


def compare(a: Graph, b: Graph) -> GraphDiff:
    """Return how two graphs differ, grouped by site; mirrored if they are swapped."""
    swapped = digest(a) > digest(b)  # where alignment has a choice, it makes the same one both ways round
    one, other = (b, a) if swapped else (a, b)
    partner = align(one, other)
    in_order = _in_order(partner)
    first, second = map(tuple, lines_of(one, other, partner))
    lines = (second, first) if swapped else (first, second)
    if swapped:
        in_order = {i for j in in_order if (i := partner[j]) is not None}
        origin = {i: j for j, i in enumerate(partner)}
        partner = [origin.get(i) for i in range(len(a.nodes))]
    edits = tuple(_edits(a, b, partner, in_order))
    compared = Comparison(a, b, tuple(partner), frozenset(in_order), lines, edits)
    changed = {edit.before for edit in edits}
    return GraphDiff(
        a=a.name,
        b=b.name,
        changes=site_changes(compared),
        unchanged=sum(i not in changed and node.op != INPUT for i, node in enumerate(a.nodes)),
        parameters=(a.parameters, b.parameters),
        flops=(a.flops, b.flops),
        bytes=(a.bytes, b.bytes),
        comparison=compared,
    )


def _in_order(partner: Sequence[int | None]) -> set[int]:
    """Return the most positions whose partners are in the same order."""
    pairs = [(i, j) for i, j in enumerate(partner) if j is not None]
    return {pairs[position][0] for position in increasing([j for _, j in pairs])}


def _edits(a: Graph, b: Graph, partner: Sequence[int | None], in_order: Collection[int]) -> list[GraphEdit]:
    """Return what turns a into b, in the order of b, each removal where it was."""
    edits: list[GraphEdit] = []
    for i, j, out_of_order in merged(len(b.nodes), partner, in_order):
        if j is None:
            edits.append(GraphEdit(i, None))
        elif i is None or out_of_order or not _same(a, b, i, j, partner):
            node = b.nodes[j]
            edits.append(GraphEdit(i, j, node, {name: b.weights[name] for name in node.weights}))
    return edits


def _same(a: Graph, b: Graph, i: int, j: int, partner: Sequence[int | None]) -> bool:
    """Whether two paired nodes compute the same from the same, at the same place."""
    one, other = a.nodes[i], b.nodes[j]
    if (one.path, one.op, one.name, one.code, one.region, one.weights) != (
        other.path, other.op, other.name, other.code, other.region, other.weights,
    ):  # fmt: skip
        return False
    if [partner[source] for source in one.inputs] != list(other.inputs):
        return False
    return all(a.weights[name] == b.weights[name] for name in one.weights)

"""Two graphs side by side → GraphDiff.  Needs no torch."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from typing import Any

from lora_fx.graphdiff.align import align, digest, increasing
from lora_fx.graphdiff.changes import Comparison, GraphDifference, GraphEdit, merged, site_changes
from lora_fx.graphdiff.graphs import INPUT, Graph, Statement, Weight, statement_data, weights_data
from lora_fx.graphdiff.naming import lines_of
from lora_fx.graphdiff.render.dot import diff_dot, diff_graphml
from lora_fx.graphdiff.render.html import diff_html
from lora_fx.graphdiff.render.mermaid import diff_mermaid
from lora_fx.graphdiff.render.svg import diff_svg
from lora_fx.graphdiff.render.text import diff_text, sums_text
from lora_fx.planning.render.notebook import InNotebook
from lora_fx.text import json_text


@dataclass(frozen=True, slots=True, repr=False)
class GraphDiff(InNotebook, GraphDifference):
    """How two graphs differ; falsy if they do not.  Values of weights are not compared."""

    def _heading(self) -> str:
        return f"{self.a} → {self.b} · {sums_text(self)}"

    def __str__(self) -> str:
        return diff_text(self)

    def applied_to(self, graph: Graph) -> Graph:
        """Return the graph with the reported edits made: applied to `a` it is `b`.

        What no edit names stays, in its order.
        """
        edits = self.compared.edits
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
        return Graph(self.b, tuple(nodes), weights, self.parameters[1], self.bytes[1])

    def to_json(self) -> str:
        """Return changes, sums and edits as JSON; the edits are in the order of b."""
        document = {"schema_version": 1} | asdict(replace(self, comparison=None))
        del document["comparison"]
        lines = (json_text(_edit_data(edit)) for edit in self.compared.edits)
        head = json_text(document, indent=1)
        return f'{head[:-2]},\n "edits": [\n  ' + ",\n  ".join(lines) + "\n ]\n}"

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


def _edit_data(edit: GraphEdit) -> dict[str, Any]:
    data: dict[str, Any] = {"before": edit.before, "after": edit.after}
    if edit.node is not None:
        data |= {"node": statement_data(edit.node), "weights": weights_data(edit.weights)}
    return data


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


_identity = attrgetter("path", "op", "name", "code", "region", "weights")


def _same(a: Graph, b: Graph, i: int, j: int, partner: Sequence[int | None]) -> bool:
    """Whether two paired nodes compute the same from the same, at the same place."""
    one, other = a.nodes[i], b.nodes[j]
    return (
        _identity(one) == _identity(other)
        and [partner[source] for source in one.inputs] == list(other.inputs)
        and all(a.weights[name] == b.weights[name] for name in one.weights)
    )

"""Two graphs side by side → GraphDiff.  Needs no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from lora_fx.graphdiff.align import align, digest, increasing
from lora_fx.graphdiff.graphs import INPUT, Graph, Node, Weight
from lora_fx.graphdiff.naming import lines_of


@dataclass(frozen=True, slots=True)
class SiteChange:
    """What differs at one site or submodule."""

    path: str
    note: str
    """Rule, rank and scaling of an adapted site, of both sides if both have one."""
    removed: tuple[str, ...]
    added: tuple[str, ...]
    moved_from: str | None = None
    """Path in a, if the site has moved."""
    parameters: tuple[int, int] = (0, 0)
    """Of the changed statements, before and after."""
    flops: tuple[int, int] = (0, 0)
    bytes: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Edit:
    """One change of one statement: `before` is its position in a, `after` in b; None where it is not there."""

    before: int | None
    after: int | None
    node: Node | None = None
    """What stands at `after`."""
    weights: Mapping[str, Weight] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two graphs, which of their nodes are the same, and the line that each is."""

    a: Graph
    b: Graph
    partner: tuple[int | None, ...]
    """For each node of a, its position in b."""
    in_order: frozenset[int]
    """Nodes of a that have a partner, and stand on both sides in the same order."""
    lines: tuple[tuple[str, ...], tuple[str, ...]]
    edits: tuple[Edit, ...]


@dataclass(frozen=True, slots=True)
class GraphDiff:
    """How two graphs differ; falsy if they do not.  Values of weights are not compared."""

    a: str
    b: str
    changes: tuple[SiteChange, ...]
    unchanged: int
    """Number of statements that are the same on both sides."""
    parameters: tuple[int, int]
    """Number of parameters of each side."""
    flops: tuple[int, int] = (0, 0)
    """Floating-point operations with weights for one row of input (a token, a position of an image)."""
    bytes: tuple[int, int] = (0, 0)
    """What the parameters take."""
    comparison: Comparison | None = field(default=None, repr=False, compare=False)

    def __bool__(self) -> bool:
        return bool(self.changes)

    def __str__(self) -> str:
        from lora_fx.graphdiff.render.text import diff_text

        return diff_text(self)

    def applied_to(self, graph: Graph) -> Graph:
        """Return the graph with the reported edits made: applied to `a` it is `b`."""
        from lora_fx.graphdiff.patch import patched

        return patched(graph, self._compared.edits, self.b, (self.parameters[1], self.bytes[1]))

    def to_json(self) -> str:
        from lora_fx.graphdiff.render.json import diff_json

        return diff_json(self)

    def to_html(self) -> str:
        """Return one page that needs nothing else: pictures, lines, search."""
        from lora_fx.graphdiff.render.html import diff_html

        return diff_html(self)

    def to_svg(self) -> str:
        """Return a picture of the blocks that differ, each kind once."""
        from lora_fx.graphdiff.render.svg import diff_svg

        return diff_svg(self)

    def to_mermaid(self) -> str:
        """Return a flowchart that stays within the limits of GitHub; what does not fit is folded."""
        from lora_fx.graphdiff.render.mermaid import diff_mermaid

        return diff_mermaid(self)

    def to_dot(self) -> str:
        """Return both graphs as one in Graphviz's language."""
        from lora_fx.graphdiff.render.dot import diff_dot

        return diff_dot(self)

    def to_graphml(self) -> str:
        """Return both graphs as one in GraphML."""
        from lora_fx.graphdiff.render.dot import diff_graphml

        return diff_graphml(self)

    @property
    def _compared(self) -> Comparison:
        assert self.comparison is not None, "a GraphDiff is made by lora_fx.diff"
        return self.comparison


def compare(a: Graph, b: Graph) -> GraphDiff:
    """Return how two graphs differ, grouped by site; mirrored if they are swapped."""
    if digest(a) <= digest(b):  # where alignment has a choice, it makes the same one both ways round
        partner = align(a, b)
        in_order = _in_order(partner)
        lines = lines_of(a, b, partner)
    else:
        other = align(b, a)
        partner = _inverted(other, len(a.nodes))
        kept = _in_order(other)
        in_order = {i for j, i in enumerate(other) if i is not None and j in kept}
        after, before = lines_of(b, a, other)
        lines = before, after
    both = tuple(lines[0]), tuple(lines[1])
    compared = Comparison(a, b, tuple(partner), frozenset(in_order), both, tuple(_edits(a, b, partner, in_order)))
    changed = {edit.before for edit in compared.edits}
    unchanged = sum(i not in changed and node.op != INPUT for i, node in enumerate(a.nodes))
    return GraphDiff(
        a=a.name,
        b=b.name,
        changes=_changes(compared),
        unchanged=unchanged,
        parameters=(a.parameters, b.parameters),
        flops=(a.flops, b.flops),
        bytes=(a.bytes, b.bytes),
        comparison=compared,
    )


def _inverted(partner: Sequence[int | None], length: int) -> list[int | None]:
    found: list[int | None] = [None] * length
    for j, i in enumerate(partner):
        if i is not None:
            found[i] = j
    return found


def _in_order(partner: Sequence[int | None]) -> set[int]:
    """Return the most positions whose partners are in the same order."""
    pairs = [(i, j) for i, j in enumerate(partner) if j is not None]
    return {pairs[position][0] for position in increasing([j for _, j in pairs])}


Merged: TypeAlias = list[tuple[int | None, int | None, bool]]


def merged(number: int, partner: Sequence[int | None], in_order: Collection[int]) -> Merged:
    """Return the nodes of both graphs as one list, in the order of b: (position in a, in b, whether out of order).

    Args:
        number: of nodes of b.
        partner: as in `Comparison`, as is `in_order`.
    """
    origin = {j: i for i, j in enumerate(partner) if j is not None}
    found: Merged = []
    position = 0
    for j in range(number):
        i = origin.get(j)
        if i is not None and i in in_order:
            found += [(k, None, False) for k in range(position, i) if partner[k] is None]
            position = i
        found.append((i, j, i is not None and i not in in_order))
    return found + [(k, None, False) for k in range(position, len(partner)) if partner[k] is None]


def _edits(a: Graph, b: Graph, partner: Sequence[int | None], in_order: Collection[int]) -> list[Edit]:
    """Return what turns a into b, in the order of b, each removal where it was."""
    edits: list[Edit] = []
    for i, j, out_of_order in merged(len(b.nodes), partner, in_order):
        if j is None:
            edits.append(Edit(i, None))
        elif i is None or out_of_order or not _same(a, b, i, j, partner):
            node = b.nodes[j]
            edits.append(Edit(i, j, node, {name: b.weights[name] for name in node.weights}))
    return edits


def _same(a: Graph, b: Graph, i: int, j: int, partner: Sequence[int | None]) -> bool:
    """Whether two paired nodes compute the same from the same, at the same place."""
    one, other = a.nodes[i], b.nodes[j]
    if (one.path, one.op, one.name, one.code, one.region, one.weights) != (
        other.path, other.op, other.name, other.code, other.region, other.weights,
    ):  # fmt: skip
        return False
    if [partner[each] for each in one.inputs] != list(other.inputs):
        return False
    return all(a.weights[name] == b.weights[name] for name in one.weights)


# -- by site


@dataclass(slots=True)
class _Site:
    """The edits of one site."""

    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)


def _changes(compared: Comparison) -> tuple[SiteChange, ...]:
    a, b = compared.a, compared.b
    sites: dict[tuple[str, str], _Site] = {}
    for edit in compared.edits:
        old = None if edit.before is None else a.nodes[edit.before].path
        new = None if edit.after is None else b.nodes[edit.after].path
        pair = (old if old is not None else new or "", new if new is not None else old or "")
        site = sites.setdefault(pair, _Site())
        if edit.before is not None:
            site.before.append(edit.before)
        if edit.after is not None:
            site.after.append(edit.after)
    return tuple(_change(compared, *paths, site) for paths, site in sites.items())


def _change(compared: Comparison, old: str, new: str, site: _Site) -> SiteChange:
    site = replace(site, before=sorted(site.before), after=sorted(site.after))
    sides = [(compared.a, site.before), (compared.b, site.after)]
    costs = [_cost(graph, positions) for graph, positions in sides]
    removed, added = _site_lines(compared, site)
    return SiteChange(
        path=new,
        note=_note(*([graph.nodes[i].rule for i in positions] for graph, positions in sides)),
        removed=removed,
        added=added,
        moved_from=None if old == new else old,
        parameters=(costs[0][0], costs[1][0]),
        flops=(costs[0][1], costs[1][1]),
        bytes=(costs[0][2], costs[1][2]),
    )


def _cost(graph: Graph, positions: Sequence[int]) -> tuple[int, int, int]:
    """Return the parameters that the nodes read, their operations, and the bytes of the parameters."""
    nodes = [graph.nodes[i] for i in positions]
    weights = [graph.weights[name] for name in dict.fromkeys(name for node in nodes for name in node.weights)]
    return sum(w.parameters for w in weights), sum(node.flops for node in nodes), sum(w.bytes for w in weights)


def _note(before: Sequence[str], after: Sequence[str]) -> str:
    old, new = (next(filter(None, rules), "") for rules in (before, after))
    if not old or old == new:
        return new
    return f"{old} → {new}" if new else f"without {old}"


def _site_lines(compared: Comparison, site: _Site) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the lines of a site; where a line is the same on both sides, with what differs behind it."""
    before, after = ({i: lines[i] for i in where} for lines, where in zip(compared.lines, (site.before, site.after),
                                                                          strict=True))  # fmt: skip
    for i in site.before:
        j = compared.partner[i]
        if j in after and before[i] == after[j]:
            one, other = _details(compared, i, j)
            before[i] += one
            after[j] += other
    lines = [f"{text}  # an input" if compared.a.nodes[i].op == INPUT else text for i, text in before.items()]
    others = [f"{text}  # an input" if compared.b.nodes[j].op == INPUT else text for j, text in after.items()]
    return tuple(lines), tuple(others)


def _details(compared: Comparison, i: int, j: int) -> tuple[str, str]:
    """Return what differs between two nodes whose lines are the same: their weights, their module, or their place."""
    a, b = compared.a, compared.b
    one, other = a.nodes[i], b.nodes[j]
    facts = [{name: str(graph.weights[name]) for name in node.weights} for graph, node in ((a, one), (b, other))]
    differing = [{k: v for k, v in mine.items() if others.get(k) != v} for mine, others in (facts, facts[::-1])]
    if one.op != other.op:
        return f"  # {one.op}", f"  # {other.op}"
    if any(differing):
        return tuple("  # " + ", ".join(f"{_last(k)} {v}" for k, v in each.items()) for each in differing)  # type: ignore[return-value]
    if (one.path, one.region) != (other.path, other.region):
        return f"  # in {one.path or 'the model'}", f"  # in {other.path or 'the model'}"
    return tuple(f"  # after {lines[k - 1]}" if k else "  # first" for lines, k in zip(compared.lines, (i, j),
                                                                                         strict=True))  # type: ignore[return-value]  # fmt: skip


def _last(name: str) -> str:
    """Return `weight`, or of an adapter's parameter `lora_A weight`."""
    parts = name.split(".")
    return " ".join([*(part for part in parts if part.startswith("lora_")), parts[-1]])

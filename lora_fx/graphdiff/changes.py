"""What differs between two graphs, as data: statement by statement, and grouped by site.  Renderers take it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from lora_fx.graphdiff.graphs import INPUT, Graph, Statement, Weight


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
class GraphEdit:
    """One change of one statement: `before` is its position in a, `after` in b; None where it is not there."""

    before: int | None
    after: int | None
    node: Statement | None = None
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
    edits: tuple[GraphEdit, ...]


@dataclass(frozen=True, slots=True)
class GraphDifference:
    """The data of a GraphDiff.  Falsy if the graphs do not differ; values of weights are not compared."""

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

    @property
    def compared(self) -> Comparison:
        """The two graphs themselves."""
        assert self.comparison is not None, "a GraphDiff is made by lora_fx.diff"
        return self.comparison


Merged: TypeAlias = list[tuple[int | None, int | None, bool]]


def merged(number: int, partner: Sequence[int | None], in_order: Collection[int]) -> Merged:
    """Return the nodes of both graphs as one list, in the order of b: (position in a, in b, whether out of order).

    Args:
        number: of nodes of b.
        partner: as in `Comparison`, as is `in_order`.

    Example:
        Of three nodes of a, the first is the second of b, the last its first, and the one between is gone:
        `merged(2, [1, None, 0], {0})` is `[(2, 0, True), (0, 1, False), (1, None, False)]`.
    """
    origin = {j: i for i, j in enumerate(partner) if j is not None}
    entries: Merged = []
    position = 0
    for j in range(number):
        i = origin.get(j)
        if i is not None and i in in_order:
            entries += [(k, None, False) for k in range(position, i) if partner[k] is None]
            position = i
        entries.append((i, j, i is not None and i not in in_order))
    return entries + [(k, None, False) for k in range(position, len(partner)) if partner[k] is None]


# -- by site

_Positions: TypeAlias = tuple[list[int], list[int]]
"""Of the changed nodes of a site, in a and in b."""


def site_changes(compared: Comparison) -> tuple[SiteChange, ...]:
    """Return the edits of a comparison as changes of sites, in the order of their first edits."""
    sites: dict[tuple[str, str], _Positions] = {}
    for edit in compared.edits:
        old = None if edit.before is None else compared.a.nodes[edit.before].path
        new = None if edit.after is None else compared.b.nodes[edit.after].path
        paths = (old if old is not None else new or "", new if new is not None else old or "")
        before, after = sites.setdefault(paths, ([], []))
        before += [] if edit.before is None else [edit.before]
        after += [] if edit.after is None else [edit.after]
    return tuple(_change(compared, *paths, (sorted(a), sorted(b))) for paths, (a, b) in sites.items())


def _change(compared: Comparison, old: str, new: str, positions: _Positions) -> SiteChange:
    nodes = [[graph.nodes[i] for i in own] for graph, own in zip((compared.a, compared.b), positions, strict=True)]
    costs = zip(_cost(compared.a, nodes[0]), _cost(compared.b, nodes[1]), strict=True)
    moved_from = None if old == new else old
    return SiteChange(new, _note(*nodes), *_site_lines(compared, positions), moved_from, *costs)


def _cost(graph: Graph, nodes: Sequence[Statement]) -> tuple[int, int, int]:
    """Return the parameters that the nodes read, their operations, and the bytes of the parameters."""
    weights = [graph.weights[name] for name in dict.fromkeys(name for node in nodes for name in node.weights)]
    return sum(w.parameters for w in weights), sum(node.flops for node in nodes), sum(w.bytes for w in weights)


def _note(before: Sequence[Statement], after: Sequence[Statement]) -> str:
    old, new = (next((node.rule for node in nodes if node.rule), "") for nodes in (before, after))
    if not old or old == new:
        return new
    return f"{old} → {new}" if new else f"without {old}"


def _site_lines(compared: Comparison, positions: _Positions) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the lines of a site; where a line is the same on both sides, with what differs behind it."""
    before, after = ({i: lines[i] for i in own} for lines, own in zip(compared.lines, positions, strict=True))
    for i in before:
        j = compared.partner[i]
        if j in after and before[i] == after[j]:
            one, other = _details(compared, i, j)
            before[i] += f"  # {one}"
            after[j] += f"  # {other}"
    removed, added = (
        tuple(f"{text}  # an input" if graph.nodes[i].op == INPUT else text for i, text in lines.items())
        for graph, lines in ((compared.a, before), (compared.b, after))
    )
    return removed, added


def _details(compared: Comparison, i: int, j: int) -> tuple[str, str]:
    """Return what differs between two nodes whose lines are the same: their weights, their module, or their place."""
    one, other = compared.a.nodes[i], compared.b.nodes[j]
    if one.op != other.op:
        return one.op, other.op
    mine = {(name, str(compared.a.weights[name])) for name in one.weights}
    others = {(name, str(compared.b.weights[name])) for name in other.weights}
    if mine != others:
        return _weights_text(compared.a, one, others), _weights_text(compared.b, other, mine)
    if (one.path, one.region) != (other.path, other.region):
        return f"in {one.path or 'the model'}", f"in {other.path or 'the model'}"
    before, after = compared.lines
    return f"after {before[i - 1]}" if i else "first", f"after {after[j - 1]}" if j else "first"


def _weights_text(graph: Graph, node: Statement, others: Collection[tuple[str, str]]) -> str:
    """Return the weights of a node that are not among the others: `weight float32 [4, 4]`."""
    own = [(name, str(graph.weights[name])) for name in node.weights]
    return ", ".join(f"{_last(name)} {text}" for name, text in dict.fromkeys(own) if (name, text) not in others)


def _last(name: str) -> str:
    """Return `weight`, or of an adapter's parameter `lora_A weight`."""
    parts = name.split(".")
    return " ".join([*(part for part in parts if part.startswith("lora_")), parts[-1]])

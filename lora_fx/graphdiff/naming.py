"""The lines of two graphs, with names that agree wherever the nodes do."""

from collections.abc import Sequence

from lora_fx.graphdiff.graphs import INPUT, Graph, Statement
from lora_fx.text import visible


def lines_of(a: Graph, b: Graph, partner: Sequence[int | None]) -> tuple[list[str], list[str]]:
    """Return the statement of every node of both graphs; paired nodes have one name, so only real changes show.

    Args:
        a: whose nodes `partner` counts.
        b: the other graph.
        partner: for each node of a, its position in b.
    """
    before, after = _names(a, b, partner)
    return _lines(a, before), _lines(b, after)


def _lines(graph: Graph, names: Sequence[str]) -> list[str]:
    codes = [node.written([names[i] for i in node.inputs]) for node in graph.nodes]
    return [visible(f"{name} = {code}" if name else code) for name, code in zip(names, codes, strict=True)]


class _Names:
    """Numbers names, those of each region for themselves."""

    def __init__(self) -> None:
        self.taken: set[tuple[int, str, str]] = set()
        self.last: dict[tuple[str, str], int] = {}

    def take(self, name: str, owners: Sequence[tuple[int, Statement]]) -> str:
        self.taken.update((side, node.region, name) for side, node in owners)
        return name

    def new(self, stem: str, *owners: tuple[int, Statement]) -> str:
        """Return the next free name for a node, or for both of a pair."""
        home = min(node.region for _, node in owners)
        number = self.last.get((home, stem), 0) + 1
        while any((side, node.region, _numbered(stem, number)) in self.taken for side, node in owners):
            number += 1
        self.last[home, stem] = number
        return self.take(_numbered(stem, number), owners)


def _numbered(stem: str, number: int) -> str:
    return stem if number == 1 else f"{stem}_{number}"


def _names(a: Graph, b: Graph, partner: Sequence[int | None]) -> tuple[list[str], list[str]]:
    """Name pairs first, then what is on one side only and pairs whose names differ."""
    names = _Names()
    before, after = ([node.name for node in graph.nodes] for graph in (a, b))
    for side, graph in enumerate((a, b)):
        for node in graph.nodes:
            if node.op == INPUT:  # called as the forward calls it
                names.take(node.name, [(side, node)])
    pairs = [(i, j) for i, j in enumerate(partner) if j is not None and a.nodes[i].name == b.nodes[j].name]
    for i, j in sorted(pairs, key=lambda pair: (min(pair), max(pair))):
        if a.nodes[i].op != INPUT and a.nodes[i].name:
            before[i] = after[j] = names.new(a.nodes[i].name, (0, a.nodes[i]), (1, b.nodes[j]))
    done = {i for i, _ in pairs}, {j for _, j in pairs}
    last = names.last
    for side, (graph, own) in enumerate(((a, before), (b, after))):
        names.last = dict(last)
        for i, node in enumerate(graph.nodes):
            if i not in done[side] and node.op != INPUT and node.name:
                own[i] = names.new(node.name, (side, node))
    return before, after

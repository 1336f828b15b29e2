"""The lines of two graphs, with names that agree wherever the nodes do."""

from __future__ import annotations

from collections.abc import Sequence

from lora_fx.graphdiff.graphs import INPUT, Graph, Statement


def lines_of(a: Graph, b: Graph, partner: Sequence[int | None]) -> tuple[list[str], list[str]]:
    """Return the statement of every node of both graphs; paired nodes have one name, so only real changes show."""
    names = _names(a, b, partner)
    return _lines(a, names[0]), _lines(b, names[1])


def _lines(graph: Graph, names: Sequence[str]) -> list[str]:
    found = []
    for node, name in zip(graph.nodes, names, strict=True):
        code = node.written([names[i] for i in node.inputs])
        found.append(f"{name} = {code}" if name else code)
    return found


class _Names:
    """Numbers names, those of each region for themselves."""

    def __init__(self) -> None:
        self.taken: set[tuple[int, str, str]] = set()
        self.last: dict[tuple[str, str], int] = {}

    def take(self, side: int, node: Statement, name: str) -> None:
        self.taken.add((side, node.region, name))

    def new(self, stem: str, owners: Sequence[tuple[int, Statement]]) -> str:
        """Return the next free name for a node, or for both of a pair."""
        home = min(node.region for _, node in owners)
        number = self.last.get((home, stem), 0) + 1
        while any((side, node.region, _numbered(stem, number)) in self.taken for side, node in owners):
            number += 1
        self.last[home, stem] = number
        for side, node in owners:
            self.take(side, node, _numbered(stem, number))
        return _numbered(stem, number)


def _numbered(stem: str, number: int) -> str:
    return stem if number == 1 else f"{stem}_{number}"


def _names(a: Graph, b: Graph, partner: Sequence[int | None]) -> tuple[list[str], list[str]]:
    names = _Names()
    found = [node.name for node in a.nodes], [node.name for node in b.nodes]
    for side, graph in enumerate((a, b)):
        for node in graph.nodes:
            if node.op == INPUT:  # called as the forward calls it
                names.take(side, node, node.name)
    pairs = [(i, j) for i, j in enumerate(partner) if j is not None]
    for i, j in sorted(pairs, key=lambda pair: (min(pair), max(pair))):
        one, other = a.nodes[i], b.nodes[j]
        if one.op != INPUT and one.name and one.name == other.name:
            found[0][i] = found[1][j] = names.new(one.name, ((0, one), (1, other)))
    _number_rest(names, a, b, pairs, found)
    return found


def _number_rest(
    names: _Names, a: Graph, b: Graph, pairs: Sequence[tuple[int, int]], found: tuple[list[str], list[str]]
) -> None:
    """Name what is on one side only, and pairs whose names differ."""
    together = [(i, j) for i, j in pairs if a.nodes[i].name == b.nodes[j].name]
    done = {i for i, _ in together}, {j for _, j in together}
    last = dict(names.last)
    for side, graph in enumerate((a, b)):
        names.last = dict(last)
        for i, node in enumerate(graph.nodes):
            if i not in done[side] and node.op != INPUT and node.name:
                found[side][i] = names.new(node.name, ((side, node),))

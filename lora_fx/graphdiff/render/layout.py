"""Where the boxes of a picture stand: in rows by what they are computed from, and near it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx as nx

WIDTH, HEIGHT, GAP, ROW = 216, 42, 20, 74
_MARGIN = 40
"""Room on the right, for lines that go around boxes."""


@dataclass(frozen=True, slots=True)
class BoxLayout:
    """Left upper corners of the boxes, and the size of the whole."""

    corners: list[tuple[float, float]]
    width: float
    height: float


def layered(number: int, edges: Iterable[tuple[int, int]]) -> BoxLayout:
    """Return places for `number` boxes, in pixels; edges that go backwards do not count."""
    import networkx as nx  # only where a picture is drawn: the import takes 0.25 s

    graph = nx.DiGraph()
    graph.add_nodes_from(range(number))
    graph.add_edges_from((source, target) for source, target in edges if source < target)
    rows = _rows(graph)
    columns = _columns(graph, rows)
    sizes = Counter(rows)
    width = max(sizes.values(), default=1) * (WIDTH + GAP) + GAP
    corners: list[tuple[float, float]] = []
    for row, column in zip(rows, columns, strict=True):
        left = (width - sizes[row] * (WIDTH + GAP) + GAP) / 2
        corners.append((left + column * (WIDTH + GAP), GAP + row * ROW))
    return BoxLayout(corners, width + _MARGIN, GAP + (1 + max(rows, default=0)) * ROW)


def _rows(graph: "nx.DiGraph") -> list[int]:
    """Return the row of each box: below all its inputs, or, if it has none, just above what uses it."""
    import networkx as nx

    rows = {box: row for row, boxes in enumerate(nx.topological_generations(graph)) for box in boxes}
    for box in reversed(range(len(graph))):
        if graph.out_degree(box) and not graph.in_degree(box):
            rows[box] = min(rows[user] for user in graph.successors(box)) - 1
    return [rows[box] for box in range(len(graph))]


def _columns(graph: "nx.DiGraph", rows: list[int]) -> list[int]:
    """Return the place of each box in its row: in the order of the middles of its inputs."""
    by_row: dict[int, list[int]] = {}
    for box, row in enumerate(rows):
        by_row.setdefault(row, []).append(box)
    middle, column = [0.0] * len(rows), [0] * len(rows)
    for row in sorted(by_row):
        boxes = by_row[row]
        wanted = {box: fmean([middle[source] for source in graph.predecessors(box)] or [0.0]) for box in boxes}
        boxes.sort(key=lambda box: (wanted[box], box))
        for place, box in enumerate(boxes):
            column[box], middle[box] = place, place - (len(boxes) - 1) / 2
    return column

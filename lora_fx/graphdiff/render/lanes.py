"""Rows of boxes by what they are computed from, and the lanes in which long edges pass the boxes of rows between."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Edge = tuple[int, int]
_MOST_LANES = 4_000
"""Above, the longest edges go around all boxes: a chain that skips every row would take the square of the boxes."""


@dataclass(slots=True)
class Layers:
    """What stands in the rows of a picture: boxes, by their numbers, and lanes, by the numbers after those."""

    boxes: int
    row: list[int]
    """Of each box and lane."""
    rows: list[list[int]]
    above: list[list[int]] = field(default_factory=list)
    """What each is joined with in the row above it."""
    below: list[list[int]] = field(default_factory=list)
    lanes: dict[Edge, list[int]] = field(default_factory=dict)
    """The lanes of each edge, from the top; an edge that goes around all boxes is not there."""

    def add(self, row: int) -> int:
        """Return the number of a new lane."""
        self.row.append(row)
        self.rows[row].append(len(self.row) - 1)
        self.above.append([])
        self.below.append([])
        return len(self.row) - 1

    def join(self, upper: int, lower: int) -> None:
        self.below[upper].append(lower)
        self.above[lower].append(upper)


def layers_of(number: int, edges: Mapping[Edge, str]) -> Layers:
    """Return boxes in rows, and lanes for edges over more than one: edges of one kind from one box share theirs.

    Args:
        number: of boxes; those that are computed first have the lower numbers.
        edges: between boxes, and the kind of each; one that leads to a box before is drawn from below.
    """
    row = _rows(number, edges)
    rows: list[list[int]] = [[] for _ in range(1 + max(row, default=0))]
    for box in range(number):
        rows[row[box]].append(box)
    layers = Layers(number, row, rows, [[] for _ in row], [[] for _ in row])
    chains: dict[tuple[int, str, int], list[int]] = {}
    for edge in sorted(edges, key=lambda edge: (abs(row[edge[0]] - row[edge[1]]), edge)):
        upper, lower = sorted(edge)
        own = upper if edge == (upper, lower) else lower  # one that goes up flows otherwise than what goes down
        chain = chains.setdefault((upper, edges[edge], own), [])
        passed = row[lower] - row[upper] - 1
        if len(row) - number + passed - len(chain) > _MOST_LANES:
            continue
        while len(chain) < passed:
            lane = layers.add(row[upper] + len(chain) + 1)
            layers.join(chain[-1] if chain else upper, lane)
            chain.append(lane)
        layers.join(chain[passed - 1] if passed else upper, lower)
        layers.lanes[edge] = chain[:passed]
    return layers


def _rows(number: int, edges: Iterable[Edge]) -> list[int]:
    """Return the row of each box: below all its inputs, or, if it has none, just above what uses it."""
    inputs: list[list[int]] = [[] for _ in range(number)]
    users: list[list[int]] = [[] for _ in range(number)]
    for edge in edges:
        upper, lower = sorted(edge)
        inputs[lower].append(upper)
        users[upper].append(lower)
    rows: list[int] = []
    for box in range(number):
        rows.append(max((rows[upper] + 1 for upper in inputs[box]), default=0))
    for box in reversed(range(number)):
        if users[box] and not inputs[box]:
            rows[box] = min(rows[lower] for lower in users[box]) - 1
    return rows

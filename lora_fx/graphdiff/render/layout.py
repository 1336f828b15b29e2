"""Where the boxes of a picture stand, in rows by what they are computed from, and how lines pass between them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lora_fx.graphdiff.render.columns import GAP, columns
from lora_fx.graphdiff.render.crossings import ordered
from lora_fx.graphdiff.render.lanes import Edge, Layers, layers_of

WIDTH, HEIGHT = 216, 42
_LANE = 12
"""Width of a lane."""
_BEND, _MOST_BEND = 28, 76
"""Height of the space between two rows, in which lines bend: more where they go far to a side."""
_PORT, _CORNER = 18, 16
"""Between two lines that arrive at a box, and from the last one to the corner."""
Piece = tuple[float, float, float]
"""A vertical piece of a line: x, where it begins, where it ends.  Bends join pieces, in the space between two rows."""


@dataclass(frozen=True, slots=True)
class BoxLayout:
    """Left upper corners of the boxes, the pieces of the lines, and the size of the whole."""

    corners: list[tuple[float, float]]
    lines: dict[Edge, list[Piece]]
    width: float
    height: float


@dataclass(slots=True)
class _Course:
    """The pieces of a line as (x, first row, last row), from the upper box to the lower one."""

    pieces: list[tuple[float, int, int]]

    def add(self, x: float, first: int, last: int) -> None:
        """Add a piece; what goes straight on is one."""
        before, begin, _ = self.pieces[-1]
        if before == x:
            self.pieces[-1] = (x, begin, last)
        else:
            self.pieces.append((x, first, last))

    def bends(self) -> Iterable[tuple[int, float]]:
        """Yield (row below which it bends, how far to the side)."""
        for (x, _, row), (u, _, _) in pairwise(self.pieces):
            yield row, abs(u - x)


def layered(number: int, edges: Mapping[Edge, str]) -> BoxLayout:
    """Return places for `number` boxes, in pixels, and lines for `edges` that cross no box.

    Boxes that are computed first have the lower numbers.  Edges of one kind from one box share their lanes.
    """
    layers = layers_of(number, edges)
    widths = [WIDTH if one < number else _LANE for one in range(len(layers.row))]
    middles = [GAP + middle for middle in columns(layers, ordered(layers), widths)]
    width = max((middle + own / 2 for middle, own in zip(middles, widths, strict=True)), default=0.0) + GAP
    courses = {edge: _course(layers, middles, edge) for edge in layers.lanes}
    around = sorted(edge for edge in edges if edge not in courses)
    courses |= _around(layers, middles, around, width)
    width += max((x - width for edge in around for x, _, _ in courses[edge].pieces), default=-GAP) + GAP
    for edge, port in _ports(courses, middles).items():
        row = layers.row[max(edge)]
        courses[edge].add(port, row, row)
    tops = _tops(len(layers.rows), courses.values())
    corners = [(middles[box] - WIDTH / 2, tops[layers.row[box]]) for box in range(number)]
    lines = {edge: _line(courses[edge], tops, upwards=edge[0] > edge[1]) for edge in edges}
    return BoxLayout(corners, lines, width, tops[-1] + HEIGHT + GAP)


def _course(layers: Layers, middles: Sequence[float], edge: Edge) -> _Course:
    """Return the course of a line down to the space above its lower box."""
    row = layers.row[min(edge)]
    course = _Course([(middles[min(edge)], row, row)])
    for lane in layers.lanes[edge]:
        course.add(middles[lane], layers.row[lane], layers.row[lane])
    return course


def _around(layers: Layers, middles: Sequence[float], edges: Iterable[Edge], left: float) -> dict[Edge, _Course]:
    """Return the courses of lines around all boxes, each in the first lane right of `left` that is free there."""
    courses: dict[Edge, _Course] = {}
    free: list[int] = []
    for edge in sorted(edges, key=lambda edge: (layers.row[min(edge)], edge)):
        upper, lower = layers.row[min(edge)], layers.row[max(edge)]
        lane = next((lane for lane, row in enumerate(free) if row <= upper), len(free))
        free[lane : lane + 1] = [lower]
        courses[edge] = _Course([(middles[min(edge)], upper, upper)])
        courses[edge].add(left + lane * _LANE, upper + 1, lower - 1)
    return courses


def _ports(courses: Mapping[Edge, _Course], middles: Sequence[float]) -> dict[Edge, float]:
    """Return where lines arrive at their lower boxes: side by side; one from straight above stays straight."""
    arriving: dict[int, list[tuple[float, Edge]]] = {}
    for edge, course in courses.items():
        arriving.setdefault(max(edge), []).append((course.pieces[-1][0], edge))
    ports: dict[Edge, float] = {}
    for box, lines in arriving.items():
        lines.sort()
        straight = (k for k, (x, _) in enumerate(lines) if x == middles[box])
        middle = next(straight, (len(lines) - 1) / 2)
        apart = min(_PORT, (WIDTH / 2 - _CORNER) / max(len(lines) - 1, 1))
        ports |= {edge: middles[box] + (k - middle) * apart for k, (_, edge) in enumerate(lines)}
    return ports


def _tops(rows: int, courses: Iterable[_Course]) -> list[float]:
    """Return the upper border of each row."""
    aside = [0.0] * rows
    for course in courses:
        for row, far in course.bends():
            aside[row] = max(aside[row], far)
    tops = [float(GAP)]
    for far in aside[:-1]:
        tops.append(tops[-1] + HEIGHT + round(min(_BEND + far / 12, _MOST_BEND)))
    return tops


def _line(course: _Course, tops: Sequence[float], upwards: bool) -> list[Piece]:
    """Return the pieces of a line in pixels, from where it comes to where it goes."""
    line = [(x, tops[first], tops[last] + HEIGHT) for x, first, last in course.pieces]
    x, top, bottom = line[0]
    line[0] = (x, top + HEIGHT, bottom)  # it leaves the upper box at its lower border
    x, top, _ = line[-1]
    line[-1] = (x, top, tops[course.pieces[-1][2]])  # and meets the lower one at its upper border
    return [(x, bottom, top) for x, top, bottom in reversed(line)] if upwards else line

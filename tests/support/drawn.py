"""Looks at drawn graphs as a person does: where the boxes are, where each line begins, passes and ends."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass

_COMMAND = re.compile(r"([MVCml])([^MVCml]*)")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
SAMPLES = 40
"""Points that are looked at on each bend."""
Point = tuple[float, float]


@dataclass(frozen=True)
class Rectangle:
    """A box of the picture."""

    left: float
    top: float
    right: float
    bottom: float

    def holds(self, point: Point, margin: float = 0.25) -> bool:
        """Whether a point is inside, and not on the border."""
        x, y = point
        return self.left + margin < x < self.right - margin and self.top + margin < y < self.bottom - margin


def rectangles(drawn: str) -> list[Rectangle]:
    """Return the boxes of a drawing in the order in which they are drawn."""
    found = []
    for part in ElementTree.fromstring(f"<svg>{drawn}</svg>").iter("rect"):
        x, y, width, height = (float(part.attrib[name]) for name in ("x", "y", "width", "height"))
        found.append(Rectangle(x, y, x + width, y + height))
    return found


def lines(drawn: str) -> list[list[Point]]:
    """Return points of each line of a drawing, close to each other; the head of an arrow is left out."""
    parts = ElementTree.fromstring(f"<svg>{drawn}</svg>").iter("path")
    return [points_of(part.attrib["d"]) for part in parts if part.attrib["class"].startswith("edge")]


def points_of(path: str) -> list[Point]:
    """Return points on a path of M, V and C."""
    points: list[Point] = []
    for command, written in _COMMAND.findall(path):
        numbers = [float(number) for number in _NUMBER.findall(written)]
        if command == "M":
            points.append((numbers[0], numbers[1]))
        elif command == "V":
            (x, y), (end,) = points[-1], numbers
            points += [(x, y + (end - y) * step / SAMPLES) for step in range(1, SAMPLES + 1)]
        elif command == "C":
            points += _bend(points[-1], *zip(numbers[::2], numbers[1::2], strict=True))
        else:
            break  # the head of an arrow
    return points


def _bend(a: Point, b: Point, c: Point, d: Point) -> list[Point]:
    steps = (step / SAMPLES for step in range(1, SAMPLES + 1))
    shares = [((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3) for t in steps]
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = a, b, c, d
    return [(k * ax + m * bx + n * cx + p * dx, k * ay + m * by + n * cy + p * dy) for k, m, n, p in shares]


def trespassing(drawn: str) -> list[int]:
    """Return the numbers of the lines that run through a box, those they join among them."""
    boxes = rectangles(drawn)
    return [
        number for number, line in enumerate(lines(drawn)) if any(box.holds(point) for box in boxes for point in line)
    ]


def ends(drawn: str) -> list[tuple[int, int]]:
    """Return the boxes (from, to) whose borders each line joins, -1 where there is none."""
    boxes = rectangles(drawn)
    return [(_at(boxes, line[0]), _at(boxes, line[-1])) for line in lines(drawn)]


def _at(boxes: list[Rectangle], point: Point) -> int:
    x, y = point
    return next((k for k, box in enumerate(boxes) if box.left < x < box.right and y in (box.top, box.bottom)), -1)
